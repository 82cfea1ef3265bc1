"""Which accelerator QEMU has: asked of the real QEMU, with its own TCG to show that the firmware is right."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostpart import procfs
from hostpart.errors import Failed, HostpartError, NotPermitted
from hostpart.qemu import accelerator, firmware, trial
from hostpart.qemu.accelerator import KVM_DEVICE, Accelerator, choose
from hostpart.qemu.trial import Trial, attempt, attempt_ioctls
from tests.conftest import Place, wait_until

QEMU = shutil.which("qemu-system-x86_64") or ""
TCG = Accelerator("tcg", "", "tcg,thread=multi")
KVM = Accelerator("kvm", "", "kvm")
FOREVER = firmware.image(b"\xeb\xfe")  # jmp to itself

needs_qemu = pytest.mark.skipif(not QEMU, reason="needs qemu-system-x86_64")
needs_device = pytest.mark.skipif(
    not (os.access(KVM_DEVICE, os.R_OK | os.W_OK) and os.uname().machine == "x86_64"),
    reason="needs a /dev/kvm that may be opened, on x86_64",
)


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("HOSTPART_RUNTIME_DIR", str(tmp_path / "run"))
    yield
    for pid in _left(tmp_path):  # of a test that failed
        os.kill(pid, signal.SIGKILL)


# Processes that were started by this test, and theirs: its runtime directory is in their environment.
def _left(tmp_path: Path) -> list[int]:
    mark = os.fsencode(f"HOSTPART_RUNTIME_DIR={tmp_path / 'run'}\0")
    pids = [pid for pid in procfs.processes() if mark in (procfs.environ_block(pid) or b"")]
    return [pid for pid in pids if pid != os.getpid()]


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


class Counted:
    """A QEMU that notes every start, and takes *accel* where KVM is asked for."""

    def __init__(self, folder: Path, accel: str) -> None:
        self.note = folder / "starts"
        text = f'echo >> {self.note}\nfor one do shift; [ "$one" = kvm ] && one={accel}; set -- "$@" "$one"; done'
        self.path = _script(folder / "qemu", f'{text}\nexec {QEMU} "$@"')

    def choose(self, wanted: str = "auto", *, cpu: str = "max", machine: str = "q35") -> Accelerator:
        return choose(wanted, self.path, machine=machine, cpu=cpu, limit_s=30)

    @property
    def starts(self) -> int:
        return len(self.note.read_text()) if self.note.exists() else 0


@pytest.fixture
def working(tmp_path: Path) -> Counted:
    """Stands for a QEMU whose KVM works: its TCG does the work."""
    return Counted(tmp_path, "tcg")


@pytest.fixture
def failing(tmp_path: Path) -> Counted:
    """Stands for a QEMU that was built without KVM: it says so in its own words."""
    return Counted(tmp_path, "hvf")


# -- the firmware --------------------------------------------------------------------------------------


@needs_qemu
@pytest.mark.parametrize("cpu", ["max", "qemu64", "Skylake-Server", "EPYC"])
@pytest.mark.parametrize("machine", ["q35", "pc", "microvm"])
def test_the_firmware_passes_under_tcg(machine: str, cpu: str) -> None:
    assert attempt(QEMU, "tcg", machine=machine, cpu=cpu, limit_s=30) == Trial(True, "", float("inf"))


def _changed(old: str, new: str) -> bytes:
    code = firmware._CODE
    assert code.count(bytes.fromhex(old)) == 1
    return firmware.image(code.replace(bytes.fromhex(old), bytes.fromhex(new)))


@needs_qemu
@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        pytest.param("48 81 fb e4 c5 be 00", "48 81 fb e5 c5 be 00", "wrong results", id="another sum"),
        pytest.param("66 0f d4 c1", "66 0f d5 c1", "wrong results", id="another SSE instruction"),
        pytest.param("48 0f 45 f1", "48 0f 44 f1", "wrong results", id="another condition"),
        pytest.param("66 0f c4 c0 02", "0f 0b 90 90 90", "reset", id="no such instruction"),
        pytest.param("b8 83 00 00 00", "b8 82 00 00 00", "reset", id="no page present"),
        pytest.param("0d 00 01 00 00", "0d 00 00 00 00", "reset", id="no long mode"),
        pytest.param("b0 2a", "b0 00", "status 1", id="another exit status"),
        pytest.param("e6 f4 f4", "90 90 f4", "not through after 1.5 s", id="says nothing"),
    ],
)
def test_a_firmware_broken_on_purpose_fails(old: str, new: str, seen: str) -> None:
    limit_s = 1.5 if "not through" in seen else 30
    came = attempt(QEMU, "tcg", machine="q35", cpu="max", limit_s=limit_s, image=_changed(old, new))
    assert not came.works
    assert seen in came.seen


@needs_qemu
def test_what_the_processor_says_it_has_is_tried(tmp_path: Path) -> None:
    shlx = _changed("c4 e2 71 f7 d0", "0f 0b 90 90 90")
    assert "reset" in attempt(QEMU, "tcg", machine="q35", cpu="max", limit_s=30, image=shlx).seen
    assert attempt(QEMU, "tcg", machine="q35", cpu="qemu64", limit_s=30, image=shlx).works


def test_the_offsets_in_the_firmwares_comments_are_right() -> None:
    at = 0
    for line in Path(str(firmware.__file__)).read_text(encoding="utf-8").split("\n"):
        found = re.fullmatch(r' {4}"([0-9a-f ]+)"  # ([0-9a-f]{3})( .*)?', line)
        if found:
            assert at == int(found[2], 16), line
            at += len(bytes.fromhex(found[1]))
    assert at == len(firmware._CODE)


def test_code_that_does_not_fit_below_the_reset_vector_is_refused() -> None:
    assert len(firmware.image(bytes(4080))) == 65536
    with pytest.raises(ValueError, match="do not fit"):
        firmware.image(bytes(4081))


# -- the choice on this machine ------------------------------------------------------------------------


def _kernel() -> str:
    cached = os.path.expanduser("~/.cache/hostpart-lab/kernels/6.12*/vmlinuz-*")
    found = [path for path in [*sorted(glob.glob(cached)), *sorted(glob.glob("/boot/vmlinuz-*"))] if os.access(path, 4)]
    if not found:
        pytest.skip("needs a Linux kernel to boot")
    return found[0]


# Whether Linux comes as far as to look for its root file system.
def _boots(accel: str, machine: str, cpu: str) -> bool:
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256M", "-machine", machine]
    argv += [
        "-accel",
        accel,
        "-cpu",
        cpu,
        "-kernel",
        _kernel(),
        "-append",
        "console=ttyS0 panic=-1",
        "-serial",
        "stdio",
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        assert qemu.stdout is not None
        said, until = b"", time.monotonic() + 120
        try:
            while time.monotonic() < until and b"KVM internal error" not in said:
                if not select.select([qemu.stdout], [], [], 1)[0]:
                    continue
                chunk = os.read(qemu.stdout.fileno(), 65536)
                said += chunk
                if not chunk or b"Unable to mount root fs" in said:
                    break
        finally:
            qemu.kill()
    return b"Unable to mount root fs" in said


@needs_qemu
@pytest.mark.parametrize("cpu", ["max", "qemu64"])
def test_a_kernel_boots_with_what_is_chosen_and_kvm_is_passed_over_only_where_none_would(cpu: str) -> None:
    chosen = choose("auto", QEMU, machine="q35", cpu=cpu)
    assert _boots(chosen.argument, "q35", cpu)
    if os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        assert (chosen.name == "kvm") == _boots("kvm", "q35", cpu)


@needs_qemu
@needs_device
@pytest.mark.parametrize("cpu", ["max", "qemu64", "Skylake-Server", "host"])
def test_kvm_is_taken_or_refused_with_qemus_words(cpu: str) -> None:
    began = time.monotonic()
    chosen = choose("auto", QEMU, machine="q35", cpu=cpu)
    if chosen.name == "kvm":
        assert chosen == KVM
        assert choose("kvm", QEMU, machine="q35", cpu=cpu) == KVM
        return
    assert chosen == Accelerator("tcg", chosen.why, TCG.argument)
    assert f"KVM does not work here with machine q35 and CPU {cpu}: " in chosen.why
    assert re.search("failed|error|not through", chosen.why)
    with pytest.raises(Failed) as caught:
        choose("kvm", QEMU, machine="q35", cpu=cpu)
    assert str(caught.value).split(":")[0] in chosen.why
    assert 'accelerator = "tcg"' in caught.value.remedy
    if "not through" not in chosen.why:
        assert time.monotonic() - began < 5  # QEMU that has stopped its guest is not waited for


@needs_device
def test_a_vm_with_a_vcpu_can_be_made_by_ioctls_alone() -> None:
    assert attempt_ioctls(KVM_DEVICE, 3).works
    refused = attempt_ioctls("/dev/null", 3)
    assert not refused.works
    assert os.strerror(errno.ENOTTY) in refused.seen


# -- what is looked at before QEMU ---------------------------------------------------------------------


def test_tcg_is_taken_unseen(tmp_path: Path) -> None:
    assert choose("tcg", _script(tmp_path / "qemu", "exit 9"), machine="q35", cpu="max") == TCG
    assert not list((tmp_path / "run").iterdir())


def test_another_word_is_a_mistake_of_the_callers() -> None:
    with pytest.raises(ValueError, match="hvf"):
        choose("hvf", "/bin/true", machine="q35", cpu="max")


@pytest.mark.parametrize("wanted", ["auto", "kvm", "tcg"])
@pytest.mark.parametrize("kind", ["missing", "not in PATH", "not executable", "a folder"])
def test_a_binary_that_is_not_there_is_said_whatever_is_wanted(tmp_path: Path, wanted: str, kind: str) -> None:
    (tmp_path / "plain").write_text("")
    name = {
        "missing": f"{tmp_path}/none", "not in PATH": "qemu-system-none",
        "not executable": f"{tmp_path}/plain", "a folder": str(tmp_path),
    }[kind]  # fmt: skip
    with pytest.raises(Failed) as caught:
        choose(wanted, name, machine="q35", cpu="max")
    assert name in str(caught.value)
    assert "install" in caught.value.remedy


def test_a_qemu_for_another_architecture_has_no_kvm_here(tmp_path: Path) -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    path = _script(tmp_path / f"qemu-system-{other}", "exit 9")
    chosen = choose("auto", path, machine="virt", cpu="max")
    assert (chosen.name, chosen.argument) == ("tcg", TCG.argument)
    assert other in chosen.why
    assert os.uname().machine in chosen.why
    with pytest.raises(Failed, match="another architecture"):
        choose("kvm", path, machine="virt", cpu="max")


def test_a_missing_device_is_said(tmp_path: Path) -> None:
    device = f"{tmp_path}/kvm"
    chosen = choose("auto", "/bin/true", machine="q35", cpu="max", device=device)
    assert chosen == Accelerator("tcg", f"there is no {device} ({os.strerror(errno.ENOENT)})", TCG.argument)
    with pytest.raises(Failed) as caught:
        choose("kvm", "/bin/true", machine="q35", cpu="max", device=device)
    assert re.search("modprobe kvm_|nested=1|BIOS|dmesg", caught.value.remedy)


def test_a_device_that_is_not_kvms_is_said() -> None:
    assert "does not answer" in choose("auto", "/bin/true", machine="q35", cpu="max", device="/dev/null").why


# Says what choose("kvm") and choose("auto") make of a device, as another user.
_ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from hostpart.qemu.accelerator import choose
try:
    choose("kvm", "/bin/true", machine="q35", cpu="max", device=sys.argv[2])
except Exception as error:
    said = [type(error).__name__, error.exit_code, str(error), error.remedy]
print(json.dumps([*said, choose("auto", "/bin/true", machine="q35", cpu="max", device=sys.argv[2]).why]))
"""


def _asked(place: Place, device: str) -> list[object]:
    source = str(place.leases.parent / "source")
    done = subprocess.run(
        [*place.command[:-1], _ASK, source, device], env=place.env, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("gid", "mode", "remedy"),
    [
        pytest.param(1, 0o660, r"sudo usermod -aG \w+ nobody", id="a group that may"),
        pytest.param(1, 0o640, "run as root: sudo ", id="a group that may read only"),
        pytest.param(0, 0o660, "run as root: sudo ", id="root's group"),
    ],
)
def test_a_device_of_others_is_a_matter_of_permission(nobodys_place: Place, gid: int, mode: int, remedy: str) -> None:
    device = nobodys_place.leases.parent / "kvm"
    device.touch()
    os.chown(device, 0, gid)
    device.chmod(mode)
    kind, code, problem, mended, why = _asked(nobodys_place, str(device))
    assert (kind, code) == ("NotPermitted", NotPermitted.exit_code)
    assert f"{device} may not be opened by nobody" in str(problem)
    assert f"{mode:04o}" in str(problem)
    assert re.match(remedy, str(mended))
    assert why == problem
    assert not list(nobodys_place.runtime.iterdir())


def test_the_real_device_may_be_roots_alone(nobodys_place: Place) -> None:
    try:
        if os.stat(KVM_DEVICE).st_mode & 0o007:
            pytest.skip("needs a /dev/kvm that is not everybody's")
    except FileNotFoundError:
        pytest.skip("needs a /dev/kvm")
    kind, _, problem, _, _ = _asked(nobodys_place, KVM_DEVICE)
    assert kind == "NotPermitted"
    assert os.strerror(errno.EACCES) in str(problem)


@needs_qemu
@needs_device
def test_a_qemu_without_kvm_says_so_itself(failing: Counted) -> None:
    assert "invalid accelerator hvf" in failing.choose().why
    assert failing.starts == 1


@needs_device
def test_a_binary_that_the_kernel_does_not_execute_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    assert os.strerror(errno.ENOEXEC) in choose("auto", str(broken), machine="q35", cpu="max", limit_s=30).why


# -- the process ---------------------------------------------------------------------------------------


@needs_qemu
def test_a_firmware_that_loops_for_ever_is_ended_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    came = attempt(QEMU, "tcg", machine="q35", cpu="max", limit_s=1.0, image=FOREVER)
    assert 1.0 <= time.monotonic() - began < 4.0  # less than 1.1 where nothing else runs
    assert not came.works
    assert "not through after 1 s" in came.seen
    assert _left(tmp_path) == []


def test_what_a_wrapper_has_started_is_ended_too(tmp_path: Path) -> None:
    path = _script(tmp_path / "qemu", "sleep 100 &\nsleep 100")
    began = time.monotonic()
    assert not attempt(path, "tcg", machine="q35", cpu="max", limit_s=0.5).works
    assert time.monotonic() - began < 10
    assert wait_until(lambda: not _left(tmp_path))


def test_a_wrapper_that_leaves_something_behind_is_not_waited_for(tmp_path: Path) -> None:
    path = _script(tmp_path / "qemu", "sleep 100 &\necho gone >&2\nexit 3")
    began = time.monotonic()
    assert attempt(path, "tcg", machine="q35", cpu="max", limit_s=20).seen == 'QEMU ended with status 3: "gone"'
    assert time.monotonic() - began < 10
    assert wait_until(lambda: not _left(tmp_path))


def test_one_that_says_more_than_anybody_reads_is_heard_to_the_end(tmp_path: Path) -> None:
    path = _script(tmp_path / "qemu", "seq 100000 >&2; echo the end >&2; exit 3")
    assert (
        attempt(path, "tcg", machine="q35", cpu="max", limit_s=20).seen == 'QEMU ended with status 3: "100000; the end"'
    )


def test_what_qemu_says_is_one_line_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    path = _script(tmp_path / "qemu", r"printf 'qemu: warning: x\n\033[31mno\tKVM\n\377\n' >&2; exit 3")
    seen = attempt(path, "tcg", machine="q35", cpu="max", limit_s=20).seen
    assert seen == 'QEMU ended with status 3: "[31mno KVM; \ufffd"'


def test_one_that_stops_its_guest_and_stays_is_ended_at_once(tmp_path: Path) -> None:
    said = "KVM internal error. Suberror: 1\nextra data[0]: 0x1\nemulation failure\nRAX=0 RBX=0\nCode=90 <66> 0f ef c0"
    path = _script(tmp_path / "qemu", f"printf '{said}\n' >&2; exec sleep 100")
    began = time.monotonic()
    came = attempt(path, "kvm", machine="q35", cpu="max", limit_s=20)
    assert time.monotonic() - began < 10
    wanted = '"KVM internal error. Suberror: 1, emulation failure, at the instruction 66 0f ef c0"'
    assert came.seen == f"the guest was stopped: {wanted}"


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[str]:
    """A QEMU that no signal ends: it freezes itself, by cgroup v1, which holds off SIGKILL until it is thawed."""
    group = Path(f"/sys/fs/cgroup/freezer/hostpart-test-{os.getpid()}")
    try:
        group.mkdir()
        state = group / "freezer.state"
        state.read_text()
    except OSError as error:
        pytest.skip(f"needs a freezer of cgroup v1: {error.strerror}")
    try:
        yield _script(tmp_path / "qemu", f"echo $$ > {group}/cgroup.procs\necho FROZEN > {state}\nexec sleep 100")
    finally:
        pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        state.write_text("THAWED")
        for pid in pids:
            os.waitpid(pid, 0)
        assert wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_a_process_that_cannot_be_killed_does_not_hold_the_caller(frozen: str) -> None:
    began = time.monotonic()
    came = attempt(frozen, "kvm", machine="q35", cpu="max", limit_s=0.5)
    assert time.monotonic() - began < 10
    assert not came.works
    assert "has not ended" in came.seen


@needs_qemu
@pytest.mark.parametrize(
    "before",
    [
        pytest.param("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", id="SIGCHLD ignored"),
        pytest.param("os.closerange(0, 3)", id="no standard streams"),
        pytest.param("os.close(0)", id="no standard input"),
        pytest.param("os.closerange(1, 3)", id="no output"),
        pytest.param("signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())", id="all signals blocked"),
        pytest.param("[os.set_inheritable(os.dup(2), True) for _ in range(9)]", id="descriptors to inherit"),
    ],
)
def test_whatever_the_caller_has_the_answer_is_the_same(before: str) -> None:
    code = f"""
import os, signal, sys
from hostpart.qemu.trial import attempt
{before}
handler, mask = signal.getsignal(signal.SIGCHLD), signal.pthread_sigmask(signal.SIG_BLOCK, ())
files = [os.stat(fd).st_ino if fd else 0 for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{{fd}}")]
came = attempt({QEMU!r}, "tcg", machine="q35", cpu="max", limit_s=30)
words = attempt({QEMU!r}, "tcg", machine="q35", cpu="nonsense", limit_s=30).seen
same = handler == signal.getsignal(signal.SIGCHLD) and mask == signal.pthread_sigmask(signal.SIG_BLOCK, ())
same &= "find CPU model 'nonsense'" in words
same &= files == [os.stat(fd).st_ino for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{{fd}}")]
os._exit(0 if came.works and same else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@needs_qemu
def test_qemu_ends_with_its_caller(tmp_path: Path) -> None:
    code = f"""
from hostpart.qemu import firmware
from hostpart.qemu.trial import attempt
attempt({QEMU!r}, "tcg", machine="q35", cpu="max", limit_s=60, image=firmware.image(b"\\xeb\\xfe"))
"""
    caller = subprocess.Popen([sys.executable, "-c", code])

    def qemus() -> list[int]:
        return [pid for pid in _left(tmp_path) if pid != caller.pid and _name(pid).startswith("qemu")]

    try:
        assert wait_until(qemus)
        assert os.getsid(qemus()[0]) == qemus()[0] != os.getsid(caller.pid)
    finally:
        caller.kill()
        caller.wait()
    assert wait_until(lambda: not qemus())


@needs_qemu
def test_an_interrupt_from_the_keyboard_leaves_nothing_behind(tmp_path: Path) -> None:
    code = f"""
import os
from hostpart.qemu import firmware
from hostpart.qemu.trial import attempt
try:
    attempt({QEMU!r}, "tcg", machine="q35", cpu="max", limit_s=60, image=firmware.image(b"\\xeb\\xfe"))
except KeyboardInterrupt:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        os._exit(7)
"""
    caller = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until(lambda: [pid for pid in _left(tmp_path) if _name(pid).startswith("qemu")])
        caller.send_signal(signal.SIGINT)
        assert caller.wait(30) == 7
    finally:
        caller.kill()
        caller.wait()


def test_nothing_that_the_caller_has_open_is_handed_on(tmp_path: Path) -> None:
    path = _script(tmp_path / "qemu", f"ls -l /proc/$$/fd >{tmp_path}/seen")
    (tmp_path / "lease").mkdir()
    fd = os.open(tmp_path / "lease", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        attempt(path, "tcg", machine="q35", cpu="max", limit_s=20)
    finally:
        os.close(fd)
    seen = (tmp_path / "seen").read_text()
    assert "hostpart-firmware" in seen
    assert "lease" not in seen


def test_qemu_has_no_signal_blocked_that_the_caller_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "qemu"  # no shell's script: dash unblocks all signals itself
    path.write_text(f"#!{sys.executable} -IS\nimport signal, sys\nsys.exit(repr(signal.pthread_sigmask(0, ())))\n")
    path.chmod(0o755)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGCHLD})
    try:
        seen = attempt(str(path), "tcg", machine="q35", cpu="max", limit_s=20).seen
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert seen == 'QEMU ended with status 1: "set()"'


def _name(pid: int) -> str:
    found = procfs.read_stat(pid)
    return found.comm if found else ""


@needs_qemu
@needs_device
def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard[1], hard[1]))
    try:
        choose("auto", QEMU, machine="q35", cpu="max")
        abort = _script(tmp_path / "qemu", "kill -ABRT $$")
        assert "SIGABRT" in attempt(abort, "kvm", machine="q35", cpu="max", limit_s=30).seen
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, hard)
    assert not list(here.iterdir())
    assert len(list((tmp_path / "run").iterdir())) == 1


# -- the answer kept -----------------------------------------------------------------------------------


@needs_qemu
@needs_device
def test_an_answer_is_asked_for_once(working: Counted, tmp_path: Path) -> None:
    assert [working.choose(), working.choose(), working.choose("kvm")] == [KVM] * 3
    assert working.starts == 1
    (file,) = (tmp_path / "run").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@needs_qemu
@needs_device
def test_another_machine_or_processor_is_another_question(working: Counted) -> None:
    for machine, cpu in (("q35", "max"), ("pc", "max"), ("q35", "qemu64"), ("q35", "max"), ("pc", "max")):
        assert working.choose(machine=machine, cpu=cpu) == KVM
    assert working.starts == 3


@needs_qemu
@needs_device
def test_a_failure_is_remembered_for_auto_and_looked_at_again_where_kvm_is_insisted_on(failing: Counted) -> None:
    first = failing.choose()
    assert (first.name, failing.choose(), failing.starts) == ("tcg", first, 1)
    with pytest.raises(Failed):
        failing.choose("kvm")
    assert failing.starts == 2


@needs_qemu
@needs_device
def test_a_failure_is_not_believed_for_ever(failing: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_FAILS_S", -1.0)
    failing.choose()
    failing.choose()
    assert failing.starts == 2


@needs_device
def test_what_tells_nothing_of_kvm_is_not_remembered(tmp_path: Path) -> None:
    killed = _script(tmp_path / "qemu", "kill -KILL $$")
    assert "SIGKILL" in choose("auto", killed, machine="q35", cpu="max", limit_s=30).why
    assert not list((tmp_path / "run").iterdir())


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@needs_qemu
@needs_device
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.utime(path, ns=(0, 1)), id="its time"),
        pytest.param(lambda path: path.write_text(path.read_text() + "\n"), id="its size"),
        pytest.param(_replaced, id="the file"),
    ],
)
def test_another_qemu_at_the_same_path_is_asked_anew(working: Counted, change: Callable[[Path], None]) -> None:
    working.choose()
    change(Path(working.path))
    assert working.choose() == KVM
    assert working.starts == 2


@needs_qemu
@needs_device
def test_an_answer_of_another_boot_is_not_believed(
    working: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working.choose()
    monkeypatch.setattr(accelerator, "boot_id", lambda: "another")  # the kernel has one for each boot only
    assert working.choose() == working.choose() == KVM
    assert working.starts == 2
    assert len(list((tmp_path / "run").iterdir())) == 1


@needs_qemu
@needs_device
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:0], id="empty"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data.replace(b"works", b"fails"), id="turned round"),
        pytest.param(lambda data: data + b"more\0", id="longer"),
        pytest.param(lambda data: b"\xff" * len(data), id="other bytes"),
        pytest.param(lambda data: data * 10000, id="large"),
    ],
)
def test_a_damaged_answer_is_ignored_and_written_anew(
    working: Counted, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    working.choose()
    (file,) = (tmp_path / "run").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert working.choose() == KVM
    assert working.starts == 2
    assert file.read_bytes() == whole
    assert working.choose() == KVM
    assert working.starts == 2


@needs_qemu
@needs_device
@pytest.mark.parametrize("kind", ["link", "folder", "FIFO"])
def test_what_is_no_file_is_not_followed(working: Counted, tmp_path: Path, kind: str) -> None:
    working.choose()
    (file,) = (tmp_path / "run").iterdir()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    if kind == "link":
        file.symlink_to(elsewhere)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    before = elsewhere.read_bytes()
    assert working.choose() == KVM
    assert working.starts == 2
    assert elsewhere.read_bytes() == before
    assert kind == "folder" or file.is_file()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file.name]


@needs_qemu
@needs_device
def test_a_runtime_directory_that_cannot_be_used_costs_the_memory_only(working: Counted, tmp_path: Path) -> None:
    (tmp_path / "run").chmod(0o755)  # open to others: the ledger refuses it, and says so
    assert working.choose() == working.choose() == KVM
    assert working.starts == 2


def test_every_error_is_one_that_the_command_line_can_show(tmp_path: Path) -> None:
    with pytest.raises(HostpartError) as caught:
        choose("kvm", "/bin/true", machine="q35", cpu="max", device=f"{tmp_path}/kvm")
    assert set(caught.value.to_json()) == {"exit_code", "problem", "remedy"}
    assert signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN
