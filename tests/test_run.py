"""``hostpart run`` as a user of env(1), timeout(1) and taskset(1) expects it, on real pCPUs."""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart import evidence
from hostpart.cli.run import warn_of_throttling
from hostpart.config import Guest, VmConfig
from hostpart.host import Host
from hostpart.topology import read_topology
from tests.conftest import Place, wait_until

SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())
USABLE = sorted(os.sched_getaffinity(0))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def python(code: str) -> list[str]:
    """Return a command that runs *code*."""
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def caller() -> Callable[[], None]:
    """What a caller may have set before it starts hostpart: run in the child, before exec."""

    def settle() -> None:
        os.umask(0o027)
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, 150))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGWINCH])

    return settle


def error_of(path: Path) -> dict[str, Any]:
    """Return the error in an evidence file."""
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    error: dict[str, Any] = document["error"]
    assert error["problem"]
    assert error["remedy"]
    return error


# -- exit statuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param("exit 0", 0, id="success"),
        pytest.param("exit 7", 7, id="its own"),
        pytest.param("exit 255", 255, id="the largest"),
        pytest.param("kill -TERM $$", 143, id="SIGTERM"),
        pytest.param("kill -KILL $$", 137, id="SIGKILL"),
        pytest.param("kill -PIPE $$", 141, id="SIGPIPE"),
    ],
)
def test_the_exit_status_is_the_commands_own(place: Place, script: str, status: int) -> None:
    done = place.run("run", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert place.is_clean()


def test_a_command_that_is_not_there_gives_127_and_says_so(place: Place) -> None:
    done = place.run("run", "--", "no-such-command-1")
    assert done.returncode == 127
    assert "no-such-command-1" in done.stderr
    assert "No such file" in done.stderr
    assert place.is_clean()


@pytest.mark.parametrize("what", ["a file", "a directory"])
def test_a_command_that_cannot_be_executed_gives_126_and_says_so(place: Place, tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    path.mkdir() if what == "a directory" else path.write_text("true\n")
    done = place.run("run", "--", str(path))
    assert done.returncode == 126
    assert "Permission denied" in done.stderr
    assert place.is_clean()


def test_a_script_without_an_interpreter_line_is_run_by_the_shell(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$1"; exit 3\n')
    script.chmod(0o755)
    done = place.run("run", str(script), "one two")
    assert (done.returncode, done.stdout) == (3, "one two\n")


def test_a_request_that_does_not_fit_gives_125_and_the_evidence_says_3(place: Place, tmp_path: Path) -> None:
    done = place.run("run", "-n", "8192", "--evidence", str(tmp_path / "e.json"), "--", "true")
    assert done.returncode == 125
    assert "8192 pCPUs wanted" in done.stderr
    assert "try: " in done.stderr
    assert error_of(tmp_path / "e.json")["exit_code"] == 3
    assert place.is_clean()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--bogus"], id="unknown option"),
        pytest.param(["-n", "0"], id="no vCPUs"),
        pytest.param(["-n", "two"], id="no number"),
        pytest.param(["-n", "1", "--pcpus", "0"], id="two counts"),
        pytest.param(["--pcpus", "0,,1"], id="an empty part"),
        pytest.param(["--pcpus", "1,1"], id="a pCPU twice"),
        pytest.param(["--pcpus", "9000"], id="beyond any pCPU"),
        pytest.param(["--policy", "best"], id="unknown policy"),
        pytest.param(["--smt", "off"], id="unknown SMT mode"),
        pytest.param(["--isolation", "total"], id="unknown level"),
        pytest.param(["--sched", "fifo"], id="fifo without a priority"),
        pytest.param(["--sched", "fifo:100"], id="priority too high"),
        pytest.param(["--sched", "batch:1"], id="batch with a priority"),
        pytest.param(["--nice", "20"], id="nice too high"),
        pytest.param(["--name", "A b"], id="no name"),
        pytest.param(["--name", "vm0"], id="the service VM's name"),
        pytest.param(["--reserve", "x"], id="no list"),
        pytest.param(["--wait=soon"], id="no time"),
        pytest.param(["--user", "no-such-user-1"], id="unknown user"),
        pytest.param(["--group", "no-such-group-1"], id="unknown group"),
        pytest.param(["--evidence", "/no/such/folder/e.json"], id="nowhere to write"),
        pytest.param(["--scope", "everything"], id="unknown scope"),
    ],
)
def test_a_wrong_option_gives_125_runs_nothing_and_says_what_to_try(place: Place, options: list[str]) -> None:
    done = place.run("run", *options, "--", "echo", "it ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert "\ntry: " in done.stderr
    assert "Traceback" not in done.stderr
    assert place.is_clean()


@pytest.mark.parametrize("args", [[], ["--"], ["-v"], ["-n", "1", "--"]])
def test_run_without_a_command_gives_125_and_says_how_it_is_used(place: Place, args: list[str]) -> None:
    done = place.run("run", *args)
    assert (done.returncode, done.stdout) == (125, "")
    assert "hostpart run -- COMMAND" in done.stderr


@pytest.mark.parametrize(
    "args", [["--", "echo", "-n", "1", "--wait"], ["echo", "-n", "1", "--wait"]], ids=["--", "bare"]
)
def test_options_after_the_command_are_the_commands(place: Place, args: list[str]) -> None:
    done = place.run("run", *args)
    assert (done.returncode, done.stdout) == (0, "1 --wait")


def test_a_command_after_a_bare_wait_is_not_taken_for_seconds_in_silence(place: Place) -> None:
    done = place.run("run", "--wait", "sleep", "1")
    assert done.returncode == 125
    assert "--wait=SECONDS" in done.stderr
    assert place.run("run", "--wait", "--", "true").returncode == 0


# -- input and output ----------------------------------------------------------------------------------


def test_a_large_standard_input_passes_through_a_pipe_unchanged(place: Place) -> None:
    text = "".join(f"line {number}\n" for number in range(200_000))
    process = place.start("run", "--", "cat", stdin=subprocess.PIPE)
    out, err = process.communicate(text, timeout=60)
    assert out == text
    assert (process.returncode, err) == (0, "")


def test_bytes_that_are_no_text_pass_through_unchanged(place: Place, tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    (tmp_path / "in").write_bytes(data)
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "wb") as stdout:
        done = subprocess.run(
            [*place.command, "run", "--", "cat"], env=place.env, stdin=stdin, stdout=stdout, check=True, timeout=60
        )
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == data


def test_standard_output_and_error_stay_apart_and_get_nothing_else(place: Place) -> None:
    done = place.run("run", "--", "sh", "-c", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_a_guest_whose_reader_has_gone_ends(place: Place) -> None:
    process = place.start("run", "--", "yes")
    assert process.stdout
    assert process.stdout.readline() == "y\n"
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE
    assert place.is_clean()


def test_who_writes_to_a_guest_that_has_ended_gets_a_broken_pipe(place: Place) -> None:
    process = place.start("run", "--", "head", "-n", "1", stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.write("one\n")
    process.stdin.flush()
    assert process.wait(20) == 0
    with pytest.raises(BrokenPipeError):
        os.write(process.stdin.fileno(), b"two\n")


def test_an_argument_of_any_bytes_reaches_the_command(place: Place) -> None:
    argument = b"\xff\x80 \n\t'\""
    argv = [*map(os.fsencode, place.command), b"run", b"--", b"printf", b"%s", argument]
    done = subprocess.run(argv, env=place.env, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, argument, b"")


def test_a_command_with_control_characters_is_named_without_them(place: Place) -> None:
    done = place.run("run", "--", "\x1b[31mred\x07")
    assert done.returncode == 127
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


# -- what the guest inherits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["grep", "-E", "^Sig(Blk|Ign)|^NoNewPrivs|^Seccomp:", "/proc/self/status"], id="signals"),
        pytest.param(["cat", "/proc/self/limits"], id="limits"),
        pytest.param(["sh", "-c", "umask; ulimit -n; ulimit -Hn"], id="umask"),
        pytest.param(["pwd", "-P"], id="directory"),
        pytest.param(["nice"], id="nice"),
        pytest.param(
            ["cat", "/proc/self/oom_score_adj", "/proc/self/timerslack_ns", "/proc/self/coredump_filter"], id="sundries"
        ),
        pytest.param(["cut", "-d ", "-f5-8", "/proc/self/stat"], id="job"),
    ],
)
def test_the_guest_is_as_the_caller_made_it(
    place: Place, tmp_path: Path, caller: Callable[[], None], command: list[str]
) -> None:
    bare = subprocess.run(
        command,
        cwd=tmp_path,
        env=place.env,
        capture_output=True,
        text=True,
        preexec_fn=caller,
        check=True,
        timeout=60,
    )
    done = place.run("run", "--", *command, cwd=tmp_path, preexec_fn=caller)
    assert done.stdout == bare.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_is_the_callers_and_what_hostpart_adds(place: Place) -> None:
    place.env |= {"EMPTY": "", "ODD NAME": "a=b\nc", "LANG": "C.UTF-8"}
    done = place.run("run", "--name", "box", "--", "env", "-0")
    seen = dict(item.split("=", 1) for item in done.stdout.rstrip("\0").split("\0"))
    added = {name: value for name, value in seen.items() if name not in place.env}
    token = added.pop("HOSTPART_RUN")
    assert len(token) == 32
    assert added.pop("HOSTPART_PCPU") in map(str, USABLE)
    assert added == {"HOSTPART_VM": "box", "HOSTPART_VCPU": "0", "HOSTPART_VCPUS": "1"}
    assert {name: seen[name] for name in place.env} == place.env


def test_an_extra_descriptor_reaches_the_guest_and_hostparts_own_do_not(place: Place) -> None:
    read, write = os.pipe()
    code = (
        "import os; here = [int(fd) for fd in os.listdir('/proc/self/fd')];"
        "kinds = {fd: os.readlink(f'/proc/self/fd/{fd}') for fd in here if os.path.lexists(f'/proc/self/fd/{fd}')};"
        f"os.write({write}, repr(kinds).encode())"
    )
    process = place.start("run", "--", *python(code), pass_fds=(write,))
    os.close(write)
    assert process.wait(30) == 0
    kinds = ast.literal_eval(os.read(read, 65536).decode())
    os.close(read)
    leases = {fd: kind for fd, kind in kinds.items() if fd >= 200}
    assert [kind for kind in leases.values() if not kind.startswith(str(place.leases))] == []
    assert len(leases) == 1
    assert set(kinds) - set(leases) == {0, 1, 2, write}


def test_the_exec_is_in_place_so_the_guest_is_the_worker(place: Place, tmp_path: Path) -> None:
    done = place.run("run", "--evidence", str(tmp_path / "e.json"), "--", "sh", "-c", "echo $$")
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["vcpus"][0]["pid"] == int(done.stdout)


def test_nohup_outside_still_holds_inside(place: Place, tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = place.start(
        "run", "--", "sh", "-c", f"touch {flag}; read line; echo $line", stdin=subprocess.PIPE, preexec_fn=ignore
    )
    assert wait_until(flag.exists)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate("still here\n", timeout=30)
    assert (process.returncode, out) == (0, "still here\n")


# -- where it runs -------------------------------------------------------------------------------------

PIN = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['HOSTPART_PCPU'], os.environ['HOSTPART_VCPU'])"
STATUS = ["sh", "-c", 'sed -n "s/^Cpus_allowed_list:.//p" /proc/self/status; echo "$HOSTPART_PCPU"']


def test_the_kernel_says_that_the_guest_is_on_the_pcpu_the_allocator_chose(place: Place) -> None:
    plan = json.loads(place.run("plan", "-n", "1", "--json").stdout)
    done = place.run("run", "--", *STATUS)
    assert done.stdout.split() == [plan["cpus"], plan["cpus"]]


def test_an_explicit_list_means_what_it_says_even_for_pcpu_0(place: Place) -> None:
    for cpu in USABLE[:2]:
        done = place.run("run", "--pcpus", str(cpu), "--", *STATUS)
        assert done.stdout.split() == [str(cpu)] * 2


def test_a_reserved_pcpu_is_given_to_nobody(place: Place) -> None:
    done = place.run(
        "run", "--reserve", f"{USABLE[1]}-{USABLE[-1]}" if len(USABLE) > 1 else str(USABLE[0]), "--", "echo", "it ran"
    )
    assert (done.returncode, done.stdout) == (125, "")
    done = place.run("run", "--pcpus", str(USABLE[-1]), "--reserve", str(USABLE[-1]), "--", "echo", "it ran")
    assert (done.returncode, done.stdout) == (125, "")


def test_the_guest_was_pinned_before_it_ran(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    done = place.run("run", "--evidence", str(path), "--", "sh", "-c", "echo $HOSTPART_PCPU")
    [vcpu] = json.loads(path.read_text())["vcpus"]
    assert vcpu["affinity"] == {"start": done.stdout.strip(), "end": done.stdout.strip()}
    assert vcpu["cpus_seen"] == done.stdout.strip()
    assert vcpu["migrations"] == {"value": 0, "covers": "thread"}


@pytest.mark.skipif(len(USABLE) < 3, reason="needs three usable pCPUs")
def test_two_vcpus_are_two_processes_on_two_pcpus(place: Place) -> None:
    done = place.run("run", "-n", "2", "--", *python(PIN))
    seats = sorted(line.split()[:2] for line in done.stdout.splitlines())
    assert len({pcpu for _, pcpu in seats}) == 2
    assert all(mask == f"[{pcpu}]" for mask, pcpu in seats)


def test_only_vcpu_0_has_the_standard_input(place: Place) -> None:
    if len(USABLE) < 3:
        pytest.skip("needs three usable pCPUs")
    process = place.start("run", "-n", "2", "--", "sh", "-c", 'echo "$HOSTPART_VCPU:$(cat)"', stdin=subprocess.PIPE)
    out, _ = process.communicate("text", timeout=30)
    assert sorted(out.splitlines()) == ["0:text", "1:"]


def test_an_smp_guest_is_one_process_and_is_told_its_places(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    done = place.run(
        "run",
        "--smp",
        "--evidence",
        str(path),
        "--",
        "sh",
        "-c",
        'echo "$HOSTPART_PCPU $OMP_PLACES $OMP_PROC_BIND $GOMP_CPU_AFFINITY"',
    )
    pcpu = done.stdout.split()[0]
    assert done.stdout.split() == [pcpu, f"{{{pcpu}}}", "true", pcpu]
    [vcpu] = json.loads(path.read_text())["vcpus"]
    assert (vcpu["kind"], vcpu["pcpus"]) == ("smp", pcpu)


def test_smt_whole_says_why_where_a_request_cannot_fill_cores(place: Place) -> None:
    done = place.run("run", "--smt", "whole", "-n", "8191", "--", "true")
    assert done.returncode == 125
    assert "try: " in done.stderr


# -- waiting for a pCPU --------------------------------------------------------------------------------


@pytest.fixture
def occupied(place: Place, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """All pCPUs that guests can have are held; call it to let them go."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    count = str(max(1, len(USABLE) - 1))
    process = place.start("run", "-n", count, "--smp", "--name", "first", "--", "sh", "-c", f"echo there; cat {gate}")
    assert process.stdout
    assert process.stdout.readline() == "there\n"

    def leave() -> None:
        gate.write_text("")
        assert process.wait(20) == 0

    yield leave
    if process.poll() is None:
        process.terminate()


def test_a_wait_that_is_over_says_who_holds_what(place: Place, occupied: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    begin = time.monotonic()
    done = place.run("run", "--wait=0.3", "--evidence", str(path), "--", "true")
    assert time.monotonic() - begin >= 0.3
    assert done.returncode == 125
    assert "leased to other VMs" in done.stderr
    assert error_of(path)["exit_code"] == 3


def test_without_wait_a_busy_pcpu_is_refused_at_once(place: Place, occupied: Callable[[], None]) -> None:
    done = place.run("run", "--", "true")
    assert done.returncode == 125
    assert "waiting" not in done.stderr


def test_three_who_wait_get_the_pcpu_in_the_order_they_came(
    place: Place, occupied: Callable[[], None], tmp_path: Path
) -> None:
    order = tmp_path / "order"
    waiters = []
    count = str(max(1, len(USABLE) - 1))
    for number in range(3):
        said = tmp_path / f"stderr{number}"
        with open(said, "w") as stderr:
            waiters.append(
                place.start(
                    "run", "-n", count, "--smp", "--wait", "--", "sh", "-c", f"echo {number} >> {order}", stderr=stderr
                )
            )
        assert wait_until(lambda said=said: "waiting for pCPUs" in said.read_text())
    assert "behind 2" in said.read_text()
    occupied()
    assert [waiter.wait(30) for waiter in waiters] == [0, 0, 0]
    assert order.read_text().split() == ["0", "1", "2"]
    assert wait_until(place.is_clean)


def test_a_wait_for_what_can_never_fit_is_refused_at_once(place: Place, occupied: Callable[[], None]) -> None:
    done = place.run("run", "--wait", "-n", "8192", "--", "true", timeout=20)
    assert done.returncode == 125
    assert "waiting" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(place: Place, occupied: Callable[[], None], number: signal.Signals) -> None:
    process = place.start("run", "--wait", "--", "true")
    assert process.stderr
    assert "waiting" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(20) == 128 + number


# -- signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_hostpart_reaches_the_guest_which_decides(place: Place, number: signal.Signals) -> None:
    script = f"trap 'echo got it; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    process = place.start("run", "--", "sh", "-c", script)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (9, "got it\n", "")


def test_a_guest_that_does_not_mind_a_signal_dies_of_it(place: Place) -> None:
    process = place.start("run", "--", "sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout
    process.stdout.readline()
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert place.is_clean()


# -- a partition within a partition --------------------------------------------------------------------


def test_a_run_within_a_run_is_refused_with_a_way_out(place: Place) -> None:
    inner = [*place.command, "run", "--", "echo", "it ran"]
    done = place.run("run", "--name", "outer", "--", *inner)
    assert (done.returncode, done.stdout) == (125, "")
    assert "'outer'" in done.stderr
    assert "env -u HOSTPART_VM" in done.stderr


# -- whose rights --------------------------------------------------------------------------------------


@as_root
def test_user_takes_away_every_privilege(place: Place) -> None:
    code = (
        "import os; status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line);"
        "names = 'Uid', 'Gid', 'Groups', 'CapInh', 'CapPrm', 'CapEff', 'CapAmb';"
        "print({name: status[name].split() for name in names}, os.environ['HOME'])"
    )
    done = place.run("run", "--user", "nobody", "--", "/usr/bin/env", "python3", "-S", "-c", code)
    if done.returncode == 126:
        done = place.run("run", "--user", "nobody", "--", "/usr/bin/python3", "-S", "-c", code)
    seen, _, home = done.stdout.rpartition(" ")
    facts = ast.literal_eval(seen)
    import pwd

    entry = pwd.getpwnam("nobody")
    assert facts["Uid"] == [str(entry.pw_uid)] * 4
    assert facts["Gid"] == [str(entry.pw_gid)] * 4
    assert facts["Groups"] == [str(entry.pw_gid)]
    assert {facts[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert home.strip() == entry.pw_dir


@as_root
def test_a_user_by_number_without_an_entry_does_not_keep_roots_group(place: Place) -> None:
    done = place.run("run", "--user", "54321", "--", "id", "-G")
    assert (done.returncode, done.stdout) == (125, "")
    assert "--group" in done.stderr
    done = place.run("run", "--user", "54321", "--group", "54322", "--", "sh", "-c", "id -u; id -G")
    assert done.stdout.split() == ["54321", "54322"]


@as_root
def test_a_guest_of_another_user_is_still_pinned_and_ended(place: Place) -> None:
    process = place.start("run", "--user", "nobody", "--", "sh", "-c", "echo ready; sleep 60 & wait")
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert place.is_clean()


def test_an_unprivileged_user_can_run_a_guest_on_a_pcpu_of_its_own(nobodys_place: Place) -> None:
    done = nobodys_place.run(
        "run",
        "--strict",
        "--",
        "sh",
        "-c",
        "id -u; sed -n 's/^Cpus_allowed_list:.//p' /proc/self/status; echo $HOSTPART_PCPU",
        cwd="/",
    )
    assert done.returncode in (0, 5), done.stderr  # 5: another program may be pinned to that pCPU just now
    uid, mask, pcpu = done.stdout.split()
    assert uid == "65534"
    assert mask == pcpu


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--user", "root"], "root"), (["--sched", "fifo:1"], "rtprio"), (["--nice", "-5"], "ulimit -e")],
    ids=["user", "fifo", "nice"],
)
def test_what_an_unprivileged_user_may_not_do_is_said_with_a_way_out(
    nobodys_place: Place, options: list[str], word: str, tmp_path: Path
) -> None:
    path = nobodys_place.runtime / "e.json"
    done = nobodys_place.run("run", *options, "--evidence", str(path), "--", "echo", "it ran", cwd="/")
    assert (done.returncode, done.stdout) == (125, "")
    assert word in done.stderr
    assert error_of(path)["exit_code"] == 4


# -- how it is scheduled -------------------------------------------------------------------------------

SCHED = "import os; print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)"


@pytest.mark.parametrize(
    ("asked", "policy", "priority"),
    [
        ("other", os.SCHED_OTHER, 0),
        ("batch", os.SCHED_BATCH, 0),
        ("idle", os.SCHED_IDLE, 0),
        pytest.param("fifo:10", os.SCHED_FIFO, 10, marks=as_root),
        pytest.param("rr:7", os.SCHED_RR, 7, marks=as_root),
    ],
)
def test_the_kernel_says_that_the_guest_has_the_policy_asked_for(
    place: Place, asked: str, policy: int, priority: int
) -> None:
    done = place.run("run", "--sched", asked, "--", *python(SCHED))
    assert done.stdout.split() == [str(policy), str(priority)]


@as_root
@pytest.mark.parametrize("nice", [-7, 0, 12])
def test_the_guest_has_the_nice_value_asked_for_and_hostpart_keeps_its_own(place: Place, nice: int) -> None:
    script = 'nice; cut -d" " -f19 /proc/$PPID/stat'
    assert place.run("run", "--nice", str(nice), "--", "sh", "-c", script).stdout.split() == [str(nice), "0"]


def test_a_real_time_guest_is_warned_about_exactly_where_throttling_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    off = int(Path("/proc/sys/kernel/sched_rt_runtime_us").read_text()) < 0
    warn_of_throttling(VmConfig("rt", Guest("command", ("true",)), 1, sched="fifo", priority=10))
    assert ("throttling is off" in capsys.readouterr().err) == off
    warn_of_throttling(VmConfig("rt", Guest("command", ("true",)), 1))
    assert capsys.readouterr().err == ""


@as_root
def test_mlock_locks_the_commands_memory_or_is_refused(place: Place) -> None:
    done = place.run("run", "--mlock", "--", "grep", "VmLck", "/proc/self/status")
    if done.returncode == 125:
        assert "mlockall" in done.stderr
        return
    assert done.returncode == 0
    assert int(done.stdout.split()[1]) > 0


# -- evidence and isolation ----------------------------------------------------------------------------


def test_the_evidence_agrees_with_its_schema_and_with_the_run(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    done = place.run("run", "--name", "box", "--evidence", str(path), "--", "sh", "-c", "sleep 0.4; exit 3")
    assert done.returncode == 3
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["vm"] == "box"
    [vcpu] = document["vcpus"]
    assert vcpu["exit"] == {"code": 3}
    assert vcpu["looks"] >= 3
    assert document["isolation"]["reached"] == "affinity"


def test_the_evidence_of_a_guest_that_was_killed_names_the_signal(place: Place, tmp_path: Path) -> None:
    place.run("run", "--evidence", str(tmp_path / "e.json"), "--", "sh", "-c", "kill -KILL $$")
    assert json.loads((tmp_path / "e.json").read_text())["vcpus"][0]["exit"] == {"signal": 9}


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs")
@pytest.mark.parametrize(("strict", "status"), [([], 0), (["--strict"], 5)], ids=["plain", "strict"])
def test_a_guest_that_leaves_its_pcpu_is_found_out(place: Place, strict: list[str], status: int) -> None:
    code = "import os, time; os.sched_setaffinity(0, range(1024)); time.sleep(0.6)"
    done = place.run("run", *strict, "--", *python(code))
    assert done.returncode == status
    assert "did not hold" in done.stderr


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs")
def test_on_drift_repin_puts_the_guest_back(place: Place) -> None:
    code = (
        "import os, time; home = os.sched_getaffinity(0); os.sched_setaffinity(0, range(1024))\n"
        "until = time.monotonic() + 10\n"
        "while os.sched_getaffinity(0) != home and time.monotonic() < until: time.sleep(0.02)\n"
        "raise SystemExit(os.sched_getaffinity(0) != home)"
    )
    assert place.run("run", "--on-drift", "repin", "--", *python(code)).returncode == 0


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs")
def test_on_drift_kill_ends_the_guest(place: Place) -> None:
    code = "import os, time; os.sched_setaffinity(0, range(1024)); time.sleep(30)"
    done = place.run("run", "--on-drift", "kill", "--", *python(code))
    assert done.returncode == 128 + signal.SIGKILL
    assert place.is_clean()


def test_an_isolation_that_is_not_reached_is_said_and_recorded(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    done = place.run("run", "--isolation", "full", "--evidence", str(path), "--", "true")
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    isolation = document["isolation"]
    assert isolation["asked"] == "full"
    # The tests' scope is their own tree of processes, which no cpuset is for.
    assert isolation["reached"] == ("sweep" if len(USABLE) > 1 else "affinity")
    assert isolation["stopped_by"]
    assert isolation["stopped_by"] in done.stderr
    assert f"try: {isolation['remedy']}" in done.stderr


def test_an_isolation_that_is_required_and_out_of_reach_changes_nothing(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    done = place.run("run", "--isolation", "full", "--require", "--evidence", str(path), "--", "echo", "it ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert error_of(path)["exit_code"] == 4
    assert place.is_clean()


def test_a_kind_that_this_host_does_not_have_is_refused_with_that_reason(place: Place) -> None:
    if any(pcpu.kind for pcpu in read_topology(Host()).pcpus):
        pytest.skip("needs a host whose pCPUs are all of one kind")
    done = place.run("run", "--kind", "performance", "--", "true")
    assert done.returncode == 125
    assert "kind" in done.stderr
    assert "try:" in done.stderr
