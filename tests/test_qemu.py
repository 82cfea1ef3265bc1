"""Guests under QEMU on this machine's cores: where its threads run, how a guest ends, what is left."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart import evidence, madt, procfs
from hostpart.cpuset import CpuSet
from hostpart.occupancy import process_ns
from tests.conftest import Place, wait_until
from tests.guest_os import Sampler, evidence_of, kernel, lacks, qemu_of, scenario
from tests.test_terminal import PROMPT, Terminal
from tests.vm.sector import SAYS, sector

pytestmark = pytest.mark.skipif(bool(lacks()), reason=lacks() or "-")

SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())
SLEEP = "while :; do sleep 1; done"


def started(place: Place, path: str, *more: str, **options: object) -> tuple[subprocess.Popen[str], int]:
    """Launch a scenario and wait until its guest runs; return the front, and QEMU's pid."""
    front = place.start("launch", path, *more, **options)
    # QEMU's threads are pinned after it has opened its monitor; the VM runs when its guest does.
    assert wait_until(lambda: state(place) == "RUNNING" or front.poll() is not None, 30)
    assert front.poll() is None, front.communicate()
    pid = qemu_of(place)
    assert pid
    return front, pid


def state(place: Place, name: str = "linux") -> str | None:
    """Return the state that ``ps`` says the VM is in."""
    vms: list[dict[str, Any]] = json.loads(place.run("ps", "--json").stdout)["vms"]
    return next((str(vm["state"]) for vm in vms if vm["vm"] == name), None)


def vcpu_of(place: Place, name: str = "linux") -> dict[str, Any]:
    """Return what ``show`` says of the first vCPU."""
    done = place.run("show", name, "--json")
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return dict((shown.get("evidence") or shown)["vcpus"][0])


def console(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# -- where its threads run -----------------------------------------------------------------------------


def test_each_vcpu_thread_is_on_its_pcpu_and_no_other_thread_is(place: Place, tmp_path: Path) -> None:
    show = "for f in /sys/firmware/acpi/tables/APIC; do echo; od -An -v -tx1 $f | tr -d ' \\n'; echo; done; nproc"
    path = scenario(tmp_path / "vm.toml", show, console=f"file:{tmp_path}/console")
    sampler = Sampler(place)
    sampler.start()
    done = place.run("launch", path, "--results", str(tmp_path / "results"))
    sampler.finish()
    said = console(tmp_path / "console")
    assert done.returncode == 0, done.stdout + done.stderr + said
    document = evidence_of(tmp_path / "results")
    jsonschema.validate(document, SCHEMA)
    (vcpu,), (machine,) = document["vcpus"], document["machines"]
    pcpu = vcpu["pcpu"]
    # From outside, all the time.
    assert sampler.rounds > 100
    assert sampler.vcpus() == {vcpu["tid"]: {(CpuSet.of([pcpu]), pcpu)}}
    kept = CpuSet.parse(machine["emulator_pcpus"])
    assert pcpu not in kept
    assert {mask for mask, _ in sampler.others()} == {kept}
    assert {cpu for _, cpu in sampler.others()} <= set(kept)
    # What hostpart says of it.
    assert document["verdict"] in ("held", "tainted"), document["reasons"]
    assert (vcpu["kind"], vcpu["pid"], vcpu["cpus_seen"]) == ("qemu", sampler.pid, str(pcpu))
    assert vcpu["affinity"] == {"start": str(pcpu), "end": str(pcpu)}
    assert vcpu["migrations"]["value"] == 0
    assert vcpu["run_ns"]["value"] > 500_000_000
    assert machine["end"] == "the guest powered off"
    assert machine["accelerator"] == "tcg"
    # What the guest says: its firmware lists one processor.
    table = next(line for line in said.splitlines() if len(line) > 80 and line.startswith("41504943"))
    listed = [entry for entry in madt.parse_madt(bytes.fromhex(table)) if entry.enabled]
    assert [entry.apic_id for entry in listed] == [0] == [one["apic_id"] for one in machine["vcpus"]]
    assert place.is_clean()


def test_a_vcpu_that_is_moved_breaks_the_partition(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", SLEEP, console="none"), "--strict", "--json")
    vcpu = vcpu_of(place)
    other = next(cpu for cpu in os.sched_getaffinity(0) if cpu != vcpu["pcpu"])
    os.sched_setaffinity(vcpu["tid"], {other})
    assert wait_until(lambda: vcpu_of(place)["drift"] is not None)
    assert place.run("stop", "linux", "-t", "0").returncode == 0
    out, err = front.communicate(timeout=30)
    document = json.loads(out.splitlines()[-1])["evidence"]
    assert document["verdict"] == "broken"
    assert any(f"thread {vcpu['tid']}) was allowed on CPUs {other}" in reason for reason in document["reasons"])
    assert "(on_drift = 'warn')" in err
    assert procfs.read_stat(pid) is None
    assert place.is_clean()


def test_a_vcpu_that_is_moved_is_put_back(place: Place, tmp_path: Path) -> None:
    path = scenario(tmp_path / "vm.toml", SLEEP, vm='on_drift = "repin"', console="none")
    _, pid = started(place, path)
    vcpu = vcpu_of(place)
    others = {tid: procfs.allowed(pid, tid) for tid in procfs.threads(pid) if tid != vcpu["tid"]}
    kept = next(iter(others.values()))
    assert kept is not None
    assert set(others.values()) == {kept}
    os.sched_setaffinity(vcpu["tid"], set(kept))
    assert wait_until(lambda: procfs.allowed(pid, vcpu["tid"]) == CpuSet.of([vcpu["pcpu"]]))
    # Its other threads are not taken along.
    assert {tid: procfs.allowed(pid, tid) for tid in others} == others
    # And one of those on the guest's pCPU is as much amiss.
    os.sched_setaffinity(next(iter(others)), {vcpu["pcpu"]})
    assert wait_until(lambda: {tid: procfs.allowed(pid, tid) for tid in others} == others)
    assert place.run("stop", "linux", "-t", "0").returncode == 0


def test_another_thread_of_qemu_on_the_guests_pcpu_breaks_it(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", SLEEP, console="none"), "--json")
    vcpu = vcpu_of(place)
    astray = next(tid for tid in procfs.threads(pid) if tid not in (vcpu["tid"], pid))
    os.sched_setaffinity(astray, {vcpu["pcpu"]})
    time.sleep(0.6)
    assert place.run("stop", "linux", "-t", "0").returncode == 0
    document = json.loads(front.communicate(timeout=30)[0].splitlines()[-1])["evidence"]
    assert document["verdict"] == "broken"
    assert any(f"thread {astray})" in reason for reason in document["reasons"])


# -- life ----------------------------------------------------------------------------------------------


def test_a_paused_guest_does_not_run(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", "while :; do :; done", console="none", powerdown=2))
    tid = vcpu_of(place)["tid"]

    def ran_ns() -> int:
        found = procfs.schedstat(pid, tid)
        assert found
        return found[0]

    assert place.run("pause", "linux").returncode == 0
    assert state(place) == "PAUSED"
    before = ran_ns()
    time.sleep(1.0)
    assert ran_ns() - before < 20_000_000
    assert place.run("resume", "linux").returncode == 0
    assert wait_until(lambda: ran_ns() - before > 300_000_000)
    assert place.run("pause", "linux").returncode == 0
    # A paused guest can be stopped, in order.
    assert place.run("stop", "linux", timeout=60).returncode == 0
    front.communicate(timeout=10)
    assert place.is_clean()


def test_a_guest_that_is_to_stop_powers_off(place: Place, tmp_path: Path) -> None:
    path = scenario(
        tmp_path / "vm.toml", "trap 'echo asked; exit 0' TERM; echo up; " + SLEEP, console=f"file:{tmp_path}/con"
    )
    front, _ = started(place, path, "--json")
    assert wait_until(lambda: "up" in console(tmp_path / "con").splitlines(), 60), console(tmp_path / "con")
    assert place.run("stop", "linux", timeout=60).returncode == 0
    out, err = front.communicate(timeout=10)
    assert "asked" in console(tmp_path / "con")
    assert json.loads(out.splitlines()[-1])["evidence"]["machines"][0]["end"] == "the guest powered off", err
    assert front.returncode == 0


def test_a_disk_is_booted_and_its_guest_minds_the_power_button(place: Place, tmp_path: Path) -> None:
    # Its name is one that QEMU's options have to have escaped.
    image = tmp_path / "a, b=c.raw"
    image.write_bytes(sector(1))
    path = scenario(
        tmp_path / "vm.toml", None, kernel=None, append=None, disks=[image.name], console="file:con, sole",
        vm=f'cwd = "{tmp_path}"',
    )  # fmt: skip
    front, _ = started(place, path, "--json")
    assert wait_until(lambda: SAYS in console(tmp_path / "con, sole"), 30)
    assert place.run("stop", "linux").returncode == 0
    document = json.loads(front.communicate(timeout=10)[0].splitlines()[-1])["evidence"]
    assert document["machines"][0]["end"] == "the guest powered off"
    assert front.returncode == 0
    assert place.is_clean()


def test_a_guest_that_does_not_power_off_is_ended(place: Place, tmp_path: Path) -> None:
    # Its one CPU turns in a circle with interrupts off: no power button and no key reaches it, however late.
    (tmp_path / "deaf.raw").write_bytes(b"\xfa\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    path = scenario(
        tmp_path / "vm.toml", None, kernel=None, append=None, disks=["deaf.raw"], powerdown=1, console="none",
        vm=f'cwd = "{tmp_path}"',
    )  # fmt: skip
    front, pid = started(place, path)
    began = time.monotonic()
    assert place.run("stop", "linux").returncode == 0
    assert time.monotonic() - began < 4
    assert "did not power off in time" in front.communicate(timeout=10)[1]
    assert procfs.read_stat(pid) is None
    assert place.is_clean()


def test_qemu_that_does_not_answer_does_not_hang_anything(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", SLEEP, powerdown=1, console="none"))
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert place.run("show", "linux").returncode == 0
    place.run("pause", "linux")
    assert place.run("stop", "linux", timeout=60).returncode == 0
    assert time.monotonic() - began < 20
    front.communicate(timeout=10)
    assert procfs.read_stat(pid) is None
    assert place.is_clean()


def test_ctrl_c_twice_does_not_wait_for_the_guest(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", "trap '' TERM; " + SLEEP, console="none"))
    began = time.monotonic()
    for _ in range(2):
        front.send_signal(signal.SIGINT)
        time.sleep(1.0)
    front.communicate(timeout=20)
    assert time.monotonic() - began < 12
    assert front.returncode == 128 + signal.SIGINT
    assert procfs.read_stat(pid) is None


def test_a_guest_that_reboots_stays_where_it_is(place: Place, tmp_path: Path) -> None:
    path = scenario(
        tmp_path / "vm.toml", "echo up; sleep 1; reboot -f", on_reboot="restart", console=f"file:{tmp_path}/con"
    )
    front, pid = started(place, path, "--json")
    tid = vcpu_of(place)["tid"]
    assert wait_until(lambda: console(tmp_path / "con").count("up\n") >= 2, 90), console(tmp_path / "con")
    assert vcpu_of(place)["tid"] == tid
    assert place.run("stop", "linux", "-t", "0").returncode == 0
    out, err = front.communicate(timeout=10)
    document = json.loads(out.splitlines()[-1])["evidence"]
    assert document["machines"][0]["resets"] >= 1
    assert "restarted itself" in err
    assert document["vcpus"][0]["drift"] is None
    assert procfs.read_stat(pid) is None


def test_a_kernel_that_panics(place: Place, tmp_path: Path) -> None:
    path = scenario(tmp_path / "vm.toml", None, on_reboot="end", console=f"file:{tmp_path}/con")
    done = place.run("launch", path)
    assert done.returncode == 1
    assert "a reboot, or a panic of its kernel; see its console" in done.stderr
    assert "Kernel panic" in console(tmp_path / "con")
    assert place.is_clean()


# -- its console ---------------------------------------------------------------------------------------


def test_a_terminal_is_the_guests_and_is_given_back(place: Place, tmp_path: Path) -> None:
    run = "echo up; read -r word; echo got-$word; " + SLEEP
    path = scenario(tmp_path / "vm.toml", run, console="stdio", powerdown=1)
    terminal = Terminal(place)
    try:
        before = termios.tcgetattr(terminal.fd)
        terminal.type(f"hp launch {path}\n")
        terminal.expect(r"up\r+\n", 60)
        assert termios.tcgetattr(terminal.fd) != before
        terminal.type("word\r")
        terminal.expect(r"got-word\r+\n")
        pid = qemu_of(place)
        assert pid
        # What it shares with nobody, nobody has to put up with: neither waits in vain for a reader or a writer.
        assert not fcntl.fcntl(terminal.fd, fcntl.F_GETFL) & os.O_NONBLOCK
        os.kill(pid, signal.SIGKILL)
        terminal.expect(f"was killed by signal 9(?s:.*){PROMPT}")
        assert termios.tcgetattr(terminal.fd) == before
        assert "exit 1" in terminal.run("echo exit $?")
        # Ctrl-C is hostpart's: the guest is asked to end.
        terminal.type(f"hp launch {path}\n")
        terminal.expect(r"up\r+\n", 60)
        terminal.type("\x03")
        terminal.expect(PROMPT, 40)
        assert "exit 130" in terminal.run("echo exit $?")
        assert termios.tcgetattr(terminal.fd) == before
    finally:
        terminal.close()
    assert place.is_clean()


def test_a_console_at_a_socket(place: Place, tmp_path: Path) -> None:
    path = scenario(tmp_path / "vm.toml", "read -r word; echo got-$word", console=f"unix:{tmp_path}/con.sock")
    front, _ = started(place, path)
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(f"{tmp_path}/con.sock")
        seen = b""
        while b"hostpart guest: " not in seen:
            seen += one.recv(4096)
        time.sleep(1.0)
        one.sendall(b"word\r")
        while b"got-word" not in seen:
            part = one.recv(4096)
            assert part, seen
            seen += part
    front.communicate(timeout=30)
    assert front.returncode == 0
    assert not (tmp_path / "con.sock").exists()


def test_the_output_of_the_guests_command_comes_as_it_is(place: Place, tmp_path: Path) -> None:
    path = scenario(tmp_path / "vm.toml", "printf 'a\\nb\\0\\377'; exit 7", console="none", output=f"{tmp_path}/out")
    done = place.run("launch", path)
    assert (tmp_path / "out").read_bytes() == b"a\nb\0\xff"
    # And its exit status is the VM's as far as that it has failed.
    assert done.returncode == 1
    assert "its command ended with another status than 0" in done.stderr


def test_in_the_background_its_console_is_the_log(place: Place, tmp_path: Path) -> None:
    done = place.run("launch", "-d", scenario(tmp_path / "vm.toml", "echo hello from inside", console="stdio"))
    assert done.returncode == 0, done.stderr
    log = place.runtime / "log" / "linux.log"
    assert wait_until(lambda: "hello from inside" in log.read_text(), 60)
    assert wait_until(place.is_clean, 20)


# -- what is killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["QEMU", "keeper", "front", "front and keeper", "keeper and QEMU"])
def test_nothing_is_left_of_what_is_killed(place: Place, tmp_path: Path, who: str) -> None:
    path = scenario(tmp_path / "vm.toml", SLEEP, console=f"unix:{tmp_path}/con.sock")
    front, qemu = started(place, path)
    stat = procfs.read_stat(qemu)
    assert stat
    pids = {"QEMU": qemu, "keeper": stat.ppid, "front": front.pid}
    victims = [pid for name, pid in pids.items() if name in who.split(" and ")]
    for pid in victims:  # so that none sees the other's end
        os.kill(pid, signal.SIGSTOP)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    err = front.communicate(timeout=30)[1]
    assert wait_until(lambda: procfs.read_stat(qemu) is None)
    if who == "QEMU":
        assert front.returncode == 1
        assert f"QEMU (pid {qemu}) was killed by signal 9: its guest is gone" in err
    elif "front" not in who:
        assert "was killed" in err
    if "front" in who:
        place.run("restore")
    assert wait_until(place.is_clean)
    assert not (tmp_path / "con.sock").exists()


def test_the_monitor_is_lost(place: Place, tmp_path: Path) -> None:
    front, pid = started(place, scenario(tmp_path / "vm.toml", SLEEP, console="none"))
    cut(pid)
    time.sleep(0.5)
    assert procfs.read_stat(pid) is not None
    # What needs it, does without.
    assert place.run("pause", "linux").returncode == 0
    before = process_ns(pid)
    time.sleep(1.0)
    assert process_ns(pid) == before
    assert place.run("resume", "linux").returncode == 0
    assert place.run("stop", "linux", timeout=30).returncode == 0
    assert "the QMP connection to QEMU is gone" in front.communicate(timeout=10)[1]
    assert place.is_clean()


def cut(pid: int) -> None:
    """Shut the connection of a QEMU's monitor down, as a fault in QEMU would."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            fd = libc.syscall(438, pidfd, int(name), 0)  # pidfd_getfd
            if fd < 0:
                pytest.skip("needs ptrace access to QEMU")
            with socket.socket(fileno=fd) as one:
                one.shutdown(socket.SHUT_RDWR)
    os.close(pidfd)


def test_a_vcpu_that_somebody_plugs_in_is_seen(place: Place, tmp_path: Path) -> None:
    side = f"{tmp_path}/side.sock"
    args = ["-qmp", f"unix:{side},server=on,wait=off", "-smp", "1,maxcpus=2,cores=2"]
    path = scenario(tmp_path / "vm.toml", SLEEP, topology="flat", cpu="qemu64", console="none", args=args)
    front, _ = started(place, path, "--json")
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(side)
        lines = monitor.makefile("rw")
        lines.readline()
        driver = {"driver": "qemu64-x86_64-cpu", "id": "more", "socket-id": 0, "core-id": 0, "thread-id": 0}
        answers = []
        for order in (
            {"execute": "qmp_capabilities"},
            {"execute": "query-hotpluggable-cpus"},
        ):
            lines.write(json.dumps(order) + "\n")
            lines.flush()
            answers.append(json.loads(lines.readline()))
        free = next(one for one in answers[1]["return"] if "qom-path" not in one)
        lines.write(json.dumps({"execute": "device_add", "arguments": {**driver, **free["props"]}}) + "\n")
        lines.flush()
        assert wait_until(lambda: "return" in lines.readline())
    time.sleep(0.8)
    assert place.run("stop", "linux", "-t", "0").returncode == 0
    out, err = front.communicate(timeout=10)
    document = json.loads(out.splitlines()[-1])["evidence"]
    assert document["verdict"] == "broken"
    assert any("QEMU has a vCPU more than the VM" in reason for reason in document["reasons"])
    assert "QEMU has a vCPU more than the VM" in err


# -- what cannot be had --------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, object], int, str]] = {
    "initrd": ({"run": None, "initrd": "/nowhere/initrd.img"}, 2, "the initrd '/nowhere/initrd.img'"),
    "disk": ({"run": None, "disks": ["/nowhere/disk.qcow2"]}, 2, "the disk image '/nowhere/disk.qcow2'"),
    "kernel": ({"kernel": "/nowhere/vmlinuz"}, 2, "/nowhere/vmlinuz"),
    "memory": ({"memory": "30T"}, 1, "memory"),
    "program": ({"binary": "qemu-system-none"}, 1, "qemu-system-none"),
    "machine": ({"machine": "none-such"}, 1, "unsupported machine type"),
    "cpu": ({"cpu": "none-such"}, 1, "none-such"),
    "argument": ({"args": ["-none-such"]}, 1, "none-such"),
    "console": ({"console": "file:/nowhere/console"}, 2, "/nowhere"),
    "threads": ({"args": ["-accel", "tcg,thread=single", "-icount", "1"]}, 1, ""),
}


@pytest.mark.parametrize("what", CASES)
def test_what_cannot_be_had_is_said(place: Place, tmp_path: Path, what: str) -> None:
    keys, code, words = CASES[what]
    done = place.run("launch", scenario(tmp_path / "vm.toml", **{"run": "true", "console": "none", **keys}))  # type: ignore[arg-type]
    assert done.returncode == code, done.stderr
    problem, _, remedy = done.stderr.rpartition("\ntry: ")
    assert words in problem
    assert "Traceback" not in done.stderr
    assert remedy.strip()
    assert place.is_clean()


def test_kvm_is_refused_where_it_is_not(place: Place, tmp_path: Path) -> None:
    done = place.run("launch", scenario(tmp_path / "vm.toml", accelerator="kvm", console="none"))
    if done.returncode == 0:
        pytest.skip("KVM works here")
    assert done.returncode in (1, 4)
    assert "kvm" in done.stderr.lower()
    assert "\ntry: " in done.stderr
    assert place.is_clean()


def test_an_ordinary_user_boots_a_guest_too(nobodys_place: Place) -> None:
    import qemu.qmp

    root = nobodys_place.runtime.parent
    shutil.copytree(Path(str(qemu.qmp.__file__)).parent, root / "source" / "qemu" / "qmp")
    shutil.copy(kernel(), root / "vmlinuz")
    (root / "vmlinuz").chmod(0o644)
    path = scenario(root / "vm.toml", "id -u; hostpart-guest firmware", kernel=str(root / "vmlinuz"), console="stdio")
    sampler = Sampler(nobodys_place)
    sampler.start()
    done = nobodys_place.run("launch", path, "--json", timeout=120)
    sampler.finish()
    assert done.returncode == 0, done.stderr
    assert "firmware (MADT): APIC ids 0; the kernel has the same" in done.stderr
    document = json.loads(done.stdout.splitlines()[-1])["evidence"]
    (vcpu,), (machine,) = document["vcpus"], document["machines"]
    assert sampler.vcpus() == {vcpu["tid"]: {(CpuSet.of([vcpu["pcpu"]]), vcpu["pcpu"])}}
    assert {mask for mask, _ in sampler.others()} == {CpuSet.parse(machine["emulator_pcpus"])}
    assert document["verdict"] != "broken", document["reasons"]
    assert nobodys_place.is_clean()
