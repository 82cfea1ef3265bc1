"""Guests that do what guests must not: let leases go, leave their pCPU, multiply, die in the middle of a word."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hostpart import procfs
from hostpart.cpuset import CpuSet
from hostpart.lease import Leases
from hostpart.ledger import Ledger, VcpuRow, VmRow
from tests.conftest import Place, wait_until

USABLE = CpuSet.of(os.sched_getaffinity(0))

pytestmark = [
    pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users and to look at their processes"),
]


def write(place: Place, name: str, text: str, mode: int = 0o644) -> str:
    """Write a file that any user may read and return its path."""
    path = place.runtime.parent / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def the_vm(place: Place) -> tuple[VmRow, VcpuRow]:
    """Return the ledger's rows of the one VM with one vCPU that runs."""

    def running() -> bool:
        if not list(place.runtime.glob("*.sock")):
            return False  # root must not be the one who makes another user's ledger
        with Ledger(str(place.runtime)) as ledger:
            return [row.state for row in ledger.vms()] == ["RUNNING"]

    assert wait_until(running, 30)
    with Ledger(str(place.runtime)) as ledger:
        (row,) = ledger.vms()
        (vcpu,) = ledger.vcpus(row.id)
    return row, vcpu


def evidence_of(path: Path) -> dict[str, object]:
    """Return the evidence in a file."""
    document: dict[str, object] = json.loads(path.read_text())
    return document


# -- the lease it inherited ------------------------------------------------------------------------


def test_a_guest_that_unlocks_its_lease_is_called_broken_and_leased_again(place: Place) -> None:
    evidence = place.runtime.parent / "evidence.json"
    # The lease is at descriptor 200 or above; it ends when its keeper has noticed.
    guest = (
        'for fd in /proc/self/fd/2??; do flock -u "${fd##*/}"; done; touch let-go; '
        "until test -e end; do sleep 0.05; done"
    )
    front = place.start("run", "--name", "vm", "--evidence", str(evidence), "--", "sh", "-c", guest, cwd=place.runtime)
    assert wait_until((place.runtime / "let-go").exists)
    assert wait_until(lambda: place.free() != USABLE)  # it may be free for one period, not for longer
    (place.runtime / "end").touch()
    _, said = front.communicate(timeout=30)
    assert front.returncode == 0
    document = evidence_of(evidence)
    assert document["verdict"] == "broken"
    assert f"the lease on pCPU {max(USABLE)} was not held all the time" in str(document["reasons"])
    assert "was let go by somebody who inherited it, and taken again" in said
    assert "the partition did not hold" in said
    assert place.is_clean()


UNLOCK = 'for fd in /proc/self/fd/2??; do flock -u "${fd##*/}"; done; touch let-go; sleep 300'


def test_an_unlocked_pcpu_is_not_given_to_another_vm_of_the_same_user(place: Place) -> None:
    front = place.start("run", "--name", "vm", "--", "sh", "-c", UNLOCK, cwd=place.runtime)
    row, vcpu = the_vm(place)
    os.kill(row.keeper_pid, signal.SIGSTOP)
    try:
        # It may have taken it again before it was stopped; stopped, it can't take it a second time.
        assert wait_until((place.runtime / "let-go").exists)
        subprocess.run(["flock", "-u", "0"], stdin=lease_of(vcpu), check=True)
        assert place.free() == USABLE
        refused = place.run("run", "--pcpus", str(vcpu.pcpu), "--", "true")
        assert refused.returncode == 125
        assert "1 pCPU wanted" in refused.stderr
        assert "\ntry: " in refused.stderr
    finally:
        os.kill(row.keeper_pid, signal.SIGCONT)
    assert wait_until(lambda: place.free() != USABLE)
    front.terminate()
    front.communicate(timeout=30)
    assert place.is_clean()


def test_a_vm_whose_pcpu_went_to_somebody_else_is_ended_and_says_who_has_it(place: Place) -> None:
    evidence = place.runtime.parent / "evidence.json"
    front = place.start("run", "--name", "vm", "--evidence", str(evidence), "--", "sh", "-c", UNLOCK, cwd=place.runtime)
    row, vcpu = the_vm(place)
    os.kill(row.keeper_pid, signal.SIGSTOP)
    leases, fd = Leases(str(place.leases)), None
    try:
        assert wait_until((place.runtime / "let-go").exists)
        subprocess.run(["flock", "-u", "0"], stdin=lease_of(vcpu), check=True)
        with leases.lock():
            fd = leases.take(vcpu.pcpu)
        assert fd is not None
    finally:
        os.kill(row.keeper_pid, signal.SIGCONT)
    _, said = front.communicate(timeout=30)
    assert front.returncode == 128 + signal.SIGKILL
    assert f"pid {os.getpid()} (" in said
    assert "has it now: the VM is ended" in said
    assert evidence_of(evidence)["verdict"] == "broken"
    assert place.free() == USABLE - CpuSet.of([vcpu.pcpu])
    os.close(fd)
    assert place.is_clean()


def lease_of(vcpu: VcpuRow) -> int:
    """Open what a guest inherited: not the same as opening the directory again, which is another lock's."""
    pidfd = os.pidfd_open(vcpu.pid)
    try:
        inherited = min(int(name) for name in os.listdir(f"/proc/{vcpu.pid}/fd") if int(name) >= 200)
        import ctypes

        fd = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, inherited, 0)  # pidfd_getfd(2), the same everywhere
        if fd < 0:
            pytest.skip(f"needs pidfd_getfd(2): {os.strerror(ctypes.get_errno())}")
        return int(fd)
    finally:
        os.close(pidfd)


# -- its pCPU --------------------------------------------------------------------------------------


def wander(place: Place, policy: str) -> subprocess.Popen[str]:
    """Start a guest that allows itself another pCPU and stays there until it is put back or ended."""
    guest = f"taskset -p -c {min(USABLE)} $$ > /dev/null; touch gone; until test -e end; do sleep 0.05; done"
    return place.start(
        "run",
        "--name",
        "vm",
        "--on-drift",
        policy,
        "--evidence",
        "evidence.json",
        "--",
        "sh",
        "-c",
        guest,
        cwd=place.runtime,
    )


def test_a_guest_that_leaves_its_pcpu_is_warned_of(anyones_place: Place) -> None:
    front = wander(anyones_place, "warn")
    _, vcpu = the_vm(anyones_place)
    assert wait_until((anyones_place.runtime / "gone").exists)
    assert "was allowed on CPUs" in anyones_place.run("show", "vm").stdout
    assert procfs.allowed(vcpu.pid) == CpuSet.of([min(USABLE)])
    (anyones_place.runtime / "end").touch()
    _, said = front.communicate(timeout=30)
    assert front.returncode == 0
    assert f"not on {vcpu.pcpu} alone (on_drift = 'warn')" in said
    assert evidence_of(anyones_place.runtime / "evidence.json")["verdict"] == "broken"
    assert anyones_place.is_clean()


def test_a_guest_that_leaves_its_pcpu_is_put_back(anyones_place: Place) -> None:
    front = wander(anyones_place, "repin")
    _, vcpu = the_vm(anyones_place)
    assert wait_until((anyones_place.runtime / "gone").exists)
    assert wait_until(lambda: procfs.allowed(vcpu.pid) == CpuSet.of([vcpu.pcpu]))
    (anyones_place.runtime / "end").touch()
    front.communicate(timeout=30)
    assert front.returncode == 0
    assert evidence_of(anyones_place.runtime / "evidence.json")["verdict"] == "broken"
    assert anyones_place.is_clean()


def test_a_guest_that_leaves_its_pcpu_is_killed(anyones_place: Place) -> None:
    front = wander(anyones_place, "kill")
    _, said = front.communicate(timeout=30)
    assert front.returncode == 128 + signal.SIGKILL
    assert "on_drift = 'kill'" in said
    assert evidence_of(anyones_place.runtime / "evidence.json")["verdict"] == "broken"
    assert anyones_place.is_clean()


# -- its processes ---------------------------------------------------------------------------------

THOUSAND = """
import os, signal, sys
made = 0
for _ in range(1000):
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 4096)
        while True:
            signal.pause()
    made += 1
print(made, flush=True)
if sys.argv[1:] == ["stay"]:
    signal.pause()
"""


def python_of(place: Place) -> str:
    """Return the interpreter that this place's commands use."""
    return next(part for part in place.command if os.path.basename(part).startswith("python") and "=" not in part)


def test_a_thousand_children_that_outlive_the_guest_are_ended_and_told(anyones_place: Place) -> None:
    script, evidence = write(anyones_place, "thousand.py", THOUSAND), anyones_place.runtime / "evidence.json"
    done = anyones_place.run("run", "--evidence", str(evidence), "--", python_of(anyones_place), script)
    assert (done.returncode, done.stdout) == (0, "1000\n")
    assert anyones_place.is_clean()
    document = evidence_of(evidence)
    assert document["verdict"] in ("tainted", "broken")
    assert "1000 processes of the guest outlived its vCPUs and had to be ended" in str(document["reasons"])


def test_a_thousand_children_are_stopped_with_their_vm(anyones_place: Place) -> None:
    script = write(anyones_place, "thousand.py", THOUSAND)
    front = anyones_place.start("run", "--name", "vm", "--", python_of(anyones_place), script, "stay")
    assert front.stdout is not None
    assert front.stdout.readline() == "1000\n"
    assert anyones_place.run("stop", "--time", "0", "vm").returncode == 0
    assert anyones_place.free() == USABLE
    front.wait(30)
    assert anyones_place.is_clean()


# -- commands that are none ------------------------------------------------------------------------


def test_a_command_that_is_not_there_is_named_with_status_127(anyones_place: Place) -> None:
    anyones_place.env["PATH"] = (
        "/usr/bin:/bin"  # a directory that may not be searched would make it 126, as with env(1)
    )
    done = anyones_place.run("run", "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, "hostpart: 'no-such-command': No such file or directory\n")
    assert anyones_place.is_clean()


@pytest.mark.parametrize("what", ["a file without x", "a directory", "a script whose interpreter is not there"])
def test_a_command_that_cannot_be_executed_is_named(anyones_place: Place, what: str) -> None:
    if what == "a directory":
        path = str(anyones_place.runtime.parent)
    else:
        path = write(
            anyones_place, "script", "#!/no/such/interpreter\n", 0o644 if what == "a file without x" else 0o755
        )
    done = anyones_place.run("run", "--", path)
    code, why = (127, "No such file") if "interpreter" in what else (126, "Permission denied")
    assert done.returncode == code
    assert f"hostpart: {path!r}: {why}" in done.stderr
    assert anyones_place.is_clean()


def test_a_script_without_a_first_line_goes_to_the_shell(anyones_place: Place) -> None:
    path = write(anyones_place, "script", "echo $1 $HOSTPART_VCPU\n", 0o755)
    done = anyones_place.run("run", "--", path, "vcpu")
    assert (done.returncode, done.stdout) == (0, "vcpu 0\n")
    assert anyones_place.is_clean()


# -- guests in Python ------------------------------------------------------------------------------

GUEST = """
import logging, os, signal, sys, threading, time

def raises():
    raise LookupError("the guest's own")

def leaves():
    sys.exit(7)

def says():
    sys.exit("in words")

def dies():
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(60)

def vanishes():
    os._exit(9)

def threads():
    def later():
        time.sleep(0.3)
        print("a thread's last word")
    threading.Thread(target=later).start()

def logs():
    for number in range(2000):
        logging.getLogger("guest").info("record %d", number)

def is_a_number():
    return 3
"""


def launch(place: Place, function: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Launch a VM with one vCPU that runs a function of GUEST."""
    write(place, "survivor.py", GUEST)
    path = write(place, "one.toml", f'[[vm]]\nname = "vm"\nvcpus = 1\npython = "survivor:{function}"\n')
    return place.run("launch", "--results", str(place.runtime / "results"), *options, path, cwd=place.runtime.parent)


@pytest.mark.parametrize(
    ("function", "exit_of", "said"),
    [
        pytest.param("raises", {"code": 1}, "LookupError: the guest's own", id="raises"),
        pytest.param("leaves", {"code": 7}, "", id="exits with a number"),
        pytest.param("says", {"code": 1}, "in words", id="exits with a sentence"),
        pytest.param("dies", {"signal": signal.SIGUSR2}, "", id="is killed by a signal"),
        pytest.param("vanishes", {"code": 9}, "", id="ends without Python"),
        pytest.param("threads", {"code": 0}, "a thread's last word", id="starts a thread"),
        pytest.param("is_a_number", {"code": 3}, "", id="returns a number"),
        pytest.param("is_not_there", {"code": 1}, "has no attribute 'is_not_there'", id="is not there"),
    ],
)
def test_a_python_guest_ends_as_it_ends_and_nothing_is_left(
    place: Place, function: str, exit_of: dict[str, int], said: str
) -> None:
    done = launch(place, function)
    assert done.returncode == (0 if exit_of == {"code": 0} else 1)
    assert said in done.stdout + done.stderr
    vcpus = evidence_of(place.runtime / "results" / "vm.json")["vcpus"]
    assert isinstance(vcpus, list)
    assert [vcpu["exit"] for vcpu in vcpus] == [exit_of]
    assert place.is_clean()


def test_no_record_of_a_guest_that_logs_and_ends_is_lost(place: Place) -> None:
    done = launch(place, "logs", "-v")
    assert done.returncode == 0
    records = [line.rpartition(" ")[2] for line in done.stderr.splitlines() if ": record " in line]
    assert records == [str(number) for number in range(2000)]
    assert place.is_clean()


# Two workers that log on a host with two pCPUs: the service VM keeps none. No command can ask for that.
TWO_LOGGERS = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from hostpart.cli.verbosity import enable
from hostpart.config import Guest, ServiceVm, VmConfig
from hostpart.device_model import Caller
from hostpart.front import Front
from hostpart.host import Host
from hostpart.keeper import Options
from hostpart.topology import read_topology

enable(1)
front = Front(read_topology(Host()), Caller(), stop_on_interrupt=True)
config = VmConfig("vm", Guest("python", target="loggers:main"), vcpus=2)
keeper = front.start(config, ServiceVm(keep=0), Options())
front.wait(lambda: keeper.has("ready"))
front.running()
front.wait(lambda: keeper.over)
front.end()
print(keeper.error or keeper.said["ended"]["statuses"])
"""
LOGGERS = """
import logging, os, time

def main():
    log = logging.getLogger("guest")
    if os.environ["HOSTPART_VCPU"] == "0":
        for _ in range(8):
            log.info("long %s", "x" * 300_000)
        time.sleep(300)
    for number in range(500):
        log.info("record %d", number)
    while not os.path.exists("end"):
        time.sleep(0.02)
    for number in range(500, 1000):
        log.info("record %d", number)
"""


def full_pipe(pid: int) -> str | None:
    """Return the pipe, open above the standard descriptors of a process, that has no room for another record."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            pipe = os.readlink(path)
            if int(name) > 2 and pipe.startswith("pipe:"):
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                (waiting,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
                os.close(fd)
                if waiting > 60_000:
                    return pipe
        except FileNotFoundError:
            continue
    return None


def writers(pipe: str, pids: list[int]) -> list[int]:
    """Return those of some processes that have a pipe open for writing."""
    found = []
    for pid in pids:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}") == pipe:
                flags = Path(f"/proc/{pid}/fdinfo/{name}").read_text().partition("flags:\t")[2].split()[0]
                found += [pid] if int(flags, 8) & os.O_ACCMODE == os.O_WRONLY else []
    return found


def test_a_worker_killed_in_the_middle_of_a_log_record_takes_no_others_records_with_it(place: Place) -> None:
    write(place, "loggers.py", LOGGERS)
    place.command = [sys.executable, "-c", TWO_LOGGERS]
    # Nobody reads stderr yet: the receiver waits in the middle of a record, and so does the worker, its pipe full.
    front = place.start(cwd=place.runtime.parent)

    def workers() -> list[int]:
        with Ledger(str(place.runtime)) as ledger:
            return [vcpu.pid for row in ledger.vms() if row.state == "RUNNING" for vcpu in ledger.vcpus(row.id)]

    assert wait_until(lambda: len(workers()) == 2, 30)
    victim, _ = workers()
    assert wait_until(lambda: full_pipe(victim), 30)
    pipe = full_pipe(victim)
    assert pipe is not None
    # With a writer besides, the receiver would not see the victim's end, and would hold up everybody's.
    assert writers(pipe, place.processes()) == [victim]
    os.kill(victim, signal.SIGKILL)
    assert wait_until(lambda: (stat := procfs.read_stat(victim)) is None or stat.dead)
    (place.runtime.parent / "end").touch()
    out, said = front.communicate(timeout=60)
    assert out == "[9, 0]\n"
    records = [line.rpartition(" ")[2] for line in said.splitlines() if ": record " in line]
    assert records == [str(number) for number in range(1000)]
    assert "Traceback" not in said
    assert place.is_clean()
