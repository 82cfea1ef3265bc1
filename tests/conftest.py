"""Fixtures: a place of its own for each test, and a pCPU that no other test is using."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostpart
import workers
from hostpart import cgroup, procfs
from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.lease import Leases

# The interpreter that runs the tests has hostpart installed; `-m` would put the current directory first.
HOSTPART = [sys.executable, "-c", "import sys; from hostpart.__main__ import main; sys.exit(main())"]
SYSTEM_LEASES = "/sys/devices/system/cpu"


class Place:
    """A lease directory and a runtime directory of the test's own, and hostpart commands that use them.

    :ivar env: the environment of those commands
    """

    command = HOSTPART

    def __init__(self, root: Path) -> None:
        self.leases, self.runtime = root / "leases", root / "run"
        self.leases.mkdir()
        self.runtime.mkdir(mode=0o700)
        dropped = ("HOSTPART_", "NO_COLOR", "XDG_RUNTIME_DIR")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.env |= {"HOSTPART_LEASE_DIR": str(self.leases), "HOSTPART_RUNTIME_DIR": str(self.runtime)}
        # Whoever runs these tests, root too: no task may be moved but those that the tests started themselves.
        self.env["HOSTPART_SCOPE"] = f"tree:{os.getpid()}"
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *args: str, timeout: float = 60, **more: object) -> subprocess.CompletedProcess[str]:
        """Run one hostpart command to its end."""
        options: dict[str, object] = {"stdin": subprocess.DEVNULL, **more}
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [*self.command, *args],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )

    def start(self, *args: str, **more: object) -> subprocess.Popen[str]:
        """Start one hostpart command; what is left of it when the test ends is killed."""
        options: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **more,
        }
        process = subprocess.Popen([*self.command, *args], env=self.env, text=True, **options)  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def free(self) -> CpuSet:
        """Return the pCPUs that nobody leases here."""
        usable = CpuSet.of(os.sched_getaffinity(0))
        leases = Leases(str(self.leases))
        with leases.lock():
            return usable - leases.survey(usable).taken

    def processes(self) -> list[int]:
        """Return the living processes started in this place: its runtime directory is in their environment."""
        mark = os.fsencode(f"HOSTPART_RUNTIME_DIR={self.runtime}\0")
        return [pid for pid in procfs.processes() if mark in (procfs.environ_block(pid) or b"")]

    def is_clean(self) -> bool:
        """Whether no lease, no ledger row, no socket and no process is left."""
        from hostpart.ledger import Ledger

        with Ledger(str(self.runtime)) as ledger:
            rows = ledger.vms()
        usable = CpuSet.of(os.sched_getaffinity(0))
        left = list(self.runtime.glob("*.sock")) or self.processes()
        return not rows and self.free() == usable and not left


def wait_until(what: object, timeout: float = 10.0) -> bool:
    """Poll until the callable *what* is true; whether it came true in time."""
    assert callable(what)
    until = time.monotonic() + timeout
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _ended(here: Place) -> Iterator[Place]:
    yield here
    for process in here.started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place of the test's own; processes started through it are gone afterwards."""
    yield from _ended(Place(tmp_path))


NOBODY = 65534


@pytest.fixture
def nobodys_place(tmp_path: Path) -> Iterator[Place]:
    """As *place*, with every command run by uid 65534, which owns the directories.

    The interpreter of the tests may lie where that user cannot go; then the system's runs a copy of the source.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    # By way of a shell: setpriv still has root's capabilities while it executes something, and so could execute
    # anything.
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", 'exec "$@"', "sh"]
    root = Path(tempfile.mkdtemp(prefix="hostpart-nobody-"))  # tmp_path is below a directory of mode 0700
    try:
        source = root / "source"
        for package in (hostpart, workers):
            folder = Path(str(package.__file__)).parent
            shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        root.chmod(0o755)
        main = f"import sys; sys.path.insert(0, {str(source)!r}); from hostpart.__main__ import main; sys.exit(main())"
        for python in (sys.executable, "/usr/bin/python3"):
            command = [*become, python, "-B", "-c"]
            wanted = "import sys; sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([*command, wanted], capture_output=True, check=False).returncode == 0:
                break
        else:
            pytest.skip("needs a Python 3.11 that uid 65534 may execute")
        here = Place(root)
        here.command = [*command, main]
        for folder in (here.leases, here.runtime):
            os.chown(folder, NOBODY, NOBODY)
        yield from _ended(here)
    finally:
        shutil.rmtree(root)


@pytest.fixture(params=["root with a cgroup leaf", "root without a leaf", "another user"])
def anyones_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place once with a cgroup v2 of its own to put leaves in, once with one that takes none, once uid 65534's.

    Whatever lives in it when the test ends is killed, and no leaf may be left.
    """
    if request.param == "another user":
        here: Place = request.getfixturevalue("nobodys_place")
        group = None
    else:
        here = request.getfixturevalue("place")
        own, reason = cgroup.own_cgroup(Host())
        group = Path(own or "/nowhere") / f"hostpart-test-{os.getpid()}-{tmp_path.name}"
        try:
            group.mkdir()
            if request.param == "root without a leaf":
                (group / "cgroup.max.descendants").write_text("0")
        except OSError as error:
            pytest.skip(f"needs a cgroup v2 to make others in: {reason or error.strerror}")
        here.command = ["sh", "-c", f'echo 0 > {group}/cgroup.procs && exec "$@"', "sh", *here.command]
    try:
        yield here
        left = [path.name for path in group.iterdir() if path.is_dir()] if group else []
        assert not left, "a leaf is left behind"
    finally:
        for pid in here.processes():
            os.kill(pid, signal.SIGKILL)
        if group is not None:
            leaf = cgroup.Leaf(str(group))
            leaf.kill()
            leaf.remove()


@pytest.fixture
def pcpu() -> Iterator[int]:
    """A pCPU that this test has for itself on the whole host, by hostpart's lease; the lowest only if it is alone."""
    usable = sorted(os.sched_getaffinity(0), reverse=True)
    leases = Leases(SYSTEM_LEASES)
    until = time.monotonic() + 300
    while True:
        with leases.lock(30):
            for cpu in usable[: max(1, len(usable) - 1)]:
                fd = leases.take(cpu)
                if fd is not None:
                    break
            else:
                cpu, fd = -1, None
        if fd is not None:
            break
        if time.monotonic() > until:
            pytest.fail("no pCPU became free in 300 s: 'hostpart ps' says who holds them")
        time.sleep(0.05)
    yield cpu
    os.close(fd)


@pytest.fixture
def two_pcpus() -> None:
    """Skip where the host has one usable pCPU only."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two usable pCPUs")
