"""A lab: a scheduler, hosts with a worker each, and the user's side, in a network of namespaces of their own.

A host has a network, a name, a machine id, a boot id and processes of its own, a lease directory, a runtime directory
and a directory of errands; its pCPUs are this machine's. Where namespaces can't be made the same is there on the
loopback interface, without what only namespaces give: :attr:`Lab.apart` tells. Everything ends with the lab, and with
the process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostpart import procfs
from hostpart.cpuset import CpuSet
from hostpart.lease import Leases
from hostpart.ledger import Ledger
from tests.conftest import HOSTPART, wait_until
from tests.fleet import certificates, namespaces

__all__ = ["Host", "Lab", "Process"]

_HERE = Path(__file__).resolve().parent
_DASK = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
# What is lost is to be noticed in seconds, and a program that hangs is to be told from a slow one.
_SOON = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s",
    "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "false",
    "DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "60s",
}
_LOOK = ["topology", "--json"]  # a worker's own, now and then: it holds nothing
# A killed pytest takes its lab along.
_WITH_ME = ["setpriv", "--pdeathsig", "KILL"]


class Process:
    """A process of a host's: its pid in this namespace of pids, and its words."""

    def __init__(self, pid: int, argv: list[str]) -> None:
        self.pid, self.argv = pid, argv

    def __repr__(self) -> str:
        return f"{self.pid}: {' '.join(self.argv)[:160]}"


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Host:
    """One host; started by :meth:`boot`.

    :ivar env: what its worker runs with; to be changed before it is started
    :ivar options: more words for its worker
    :ivar preload: whether the worker is one of hostpart's
    """

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name, self.folder = lab, name, lab.folder / name
        self.leases, self.runtime, self.errands = (self.folder / part for part in ("leases", "run", "errands"))
        self.errands.mkdir(parents=True, mode=0o700)
        for part in ("leases", "tmp"):
            (self.folder / part).mkdir(parents=True)
        self.runtime.mkdir(mode=0o700)
        self.env = lab.env | {
            "HOSTPART_LEASE_DIR": str(self.leases),
            "HOSTPART_RUNTIME_DIR": str(self.runtime),
            "HOSTPART_FLEET_DIR": str(self.errands),
            # Its first process and all below: in a namespace of pids that is number 1.
            "HOSTPART_SCOPE": "tree:1" if lab.apart else f"tree:{os.getpid()}",
            "TMPDIR": str(self.folder / "tmp"),
        }
        self.options: list[str] = []
        self.preload = True
        self.prefix: list[str] = []
        self._machine = uuid.uuid4().hex
        self._idle = self.folder / "idle"
        self._init: subprocess.Popen[bytes] | None = None
        self._restarted = 0

    # -- its life

    def boot(self) -> None:
        """Start it, as after its power was off: a new boot id, the same disk."""
        assert self._init is None, f"{self.name} is up"
        for part, text in (("machine-id", self._machine), ("boot-id", str(uuid.uuid4()))):
            (self.folder / part).write_text(text + "\n")
        mounts = [("machine-id", "/etc/machine-id"), ("boot-id", "/proc/sys/kernel/random/boot_id")]
        told = {
            "argv": [*self.prefix, *self._worker()],
            "env": self.env,
            "log": str(self.log),
            "idle": str(self._idle),
            "hostname": f"host-{self.name}" if self.lab.apart else "",
            "mounts": [(str(self.folder / what), where) for what, where in mounts if Path(where).exists()],
        }
        if not self.lab.apart:
            told["mounts"] = []
        (self.folder / "supervisor.json").write_text(json.dumps(told))
        enter = self.lab.within(self.name)
        if self.lab.apart:
            enter += ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
        supervisor = [sys.executable, "-I", str(_HERE / "supervisor.py"), str(self.folder / "supervisor.json")]
        with self.log.open("ab") as log:
            self._init = subprocess.Popen(
                [*_WITH_ME, *enter, *supervisor], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env
            )

    def _worker(self) -> list[str]:
        words = [sys.executable, "-m", "distributed.cli.dask_worker", self.lab.address, *self.lab.dask_tls()]
        words += ["--host", self.lab.address_of(self.name), "--nthreads", "1", "--name", self.name, "--no-dashboard"]
        words += ["--local-directory", str(self.folder / "tmp"), "--memory-limit", "0", *self.options]
        return [*words, "--preload", "hostpart.fleet.agent"] if self.preload else words

    @property
    def log(self) -> Path:
        """The file that its worker and its supervisor write to."""
        return self.folder / "log"

    @property
    def up(self) -> bool:
        """Whether it has been started, and not killed since."""
        return self._init is not None

    def kill(self) -> None:
        """Kill every process of it at once."""
        assert self._init is not None, f"{self.name} is down"
        init, self._init = self._init, None
        if self.lab.apart:
            # All that is in a namespace of pids is killed by the kernel with its first process.
            for pid in procfs.processes():
                if _parent(pid) == init.pid:
                    os.kill(pid, signal.SIGKILL)
            init.kill()
            init.wait()
            return
        init.kill()
        init.wait()
        while left := self.processes():
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)

    # -- its worker

    def restarts(self, allowed: bool) -> None:
        """Whether a worker that has ended is started again."""
        if allowed:
            self._idle.unlink(missing_ok=True)
        else:
            self._idle.touch()

    def worker(self) -> list[Process]:
        """Give the processes of the worker, its nanny among them; errands are none of them."""
        return [process for process in self.processes() if self._is_dasks(process)]

    def _is_dasks(self, process: Process) -> bool:
        words = " ".join(process.argv[1:])  # the interpreter's path may have any word in it
        return "distributed.cli.dask_worker" in words or ("multiprocessing" in words and "hostpart" not in words)

    def kill_worker(self) -> None:
        """Kill the worker and its nanny at once, and nothing else."""
        found = self.worker()
        # The nanny first: it would start another worker.
        for process in sorted(found, key=lambda process: "dask_worker" not in " ".join(process.argv)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        pids = [process.pid for process in found]
        assert wait_until(lambda: not any(_alive(pid) for pid in pids))

    # -- what is on it

    def processes(self) -> list[Process]:
        """Give its living processes, without the supervisor."""
        found = []
        if self.lab.apart:
            init = self._first()
            own = init and self._namespace(init)
            pids = [pid for pid in procfs.processes() if own and pid != init and self._namespace(pid) == own]
        else:
            mark = os.fsencode(f"HOSTPART_RUNTIME_DIR={self.runtime}\0")
            pids = [pid for pid in procfs.processes() if mark in (procfs.environ_block(pid) or b"")]
        for pid in pids:
            argv = _words(pid)
            if argv and _alive(pid) and "supervisor.py" not in " ".join(argv):
                found.append(Process(pid, argv))
        return found

    def _first(self) -> int:
        if self._init is None:
            return 0
        return next((pid for pid in procfs.processes() if _parent(pid) == self._init.pid), 0)

    @staticmethod
    def _namespace(pid: int) -> str:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid")
        except OSError:
            return ""

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a hostpart command on it, as somebody who has logged in."""
        enter: list[str] = []
        if self.lab.apart:
            enter = ["nsenter", "--target", str(self._first()), "--mount", "--uts", "--net", "--pid"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*enter, *HOSTPART, *words], env=self.env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a hostpart command on it to its end."""
        with self.start(*words) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def left(self) -> list[str]:
        """Name what is on it that an errand may have left: leases, VMs, sockets, processes."""
        usable = CpuSet.of(os.sched_getaffinity(0))
        leases = Leases(str(self.leases))
        with leases.lock():
            taken = leases.survey(usable).taken
        with Ledger(str(self.runtime)) as ledger:
            found = [f"VM {vm.name}" for vm in ledger.vms()]
        found += [f"pCPUs {taken}"] if taken else []
        found += [str(path) for path in self.runtime.glob("*.sock")]
        found += [str(one) for one in self.processes() if not self._is_dasks(one) and one.argv[-2:] != _LOOK]
        return [f"{self.name}: {one}" for one in found]


class Lab:
    """See the module; everything is taken away by :meth:`close`.

    :ivar apart: whether there are namespaces, and so cables, and whole hosts to kill
    :ivar address: the scheduler's
    :ivar env: what the user's side runs with
    :ivar python: the interpreter of everything in it
    """

    python = sys.executable

    def __init__(self, folder: Path, names: Sequence[str], *, apart: bool | None = None) -> None:
        self.folder = folder
        namespaces.sweep()
        self.why_not = namespaces.lacking() if apart is None or apart else "was asked to do without"
        self.apart = not self.why_not
        self._stack = contextlib.ExitStack()
        self.certificates = certificates.made(folder / "tls")
        dropped = ("HOSTPART_", "DASK_", "NO_COLOR", "XDG_", "PYTEST_", "SSH_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        (folder / "user").mkdir()
        for part in ("home", "tmp", "leases"):
            (folder / "user" / part).mkdir()
        (folder / "user" / "run").mkdir(mode=0o700)
        self.env |= _SOON | {
            "HOME": str(folder / "user" / "home"),
            "TMPDIR": str(folder / "user" / "tmp"),
            "HOSTPART_LEASE_DIR": str(folder / "user" / "leases"),
            "HOSTPART_RUNTIME_DIR": str(folder / "user" / "run"),
            "HOSTPART_SCOPE": f"tree:{os.getpid()}",
        }
        self._network: namespaces.Network | None = None
        self._scheduler: subprocess.Popen[bytes] | None = None
        self._onlooker: subprocess.Popen[str] | None = None
        self._clients: list[subprocess.Popen[str]] = []
        try:
            if self.apart:
                self._network = namespaces.Network(["s", *names])
                self._stack.callback(self._network.close)
            self.address = f"tls://{self.address_of('s')}:{8786 if self.apart else _free_port()}"
            self.hosts = {name: Host(self, name) for name in names}
            self.start_scheduler()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def close(self) -> None:
        """Kill all that is in the lab, and take its network away."""
        for host in getattr(self, "hosts", {}).values():
            if host.up:
                host.kill()
        for process in (*self._clients, self._onlooker, self._scheduler):
            if process is not None:
                if process.poll() is None:
                    process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        with contextlib.suppress(OSError):
                            stream.close()
        self._stack.close()

    # -- the network

    def address_of(self, name: str) -> str:
        """Give a member's address; the scheduler is ``s``."""
        return self._network.address_of(name) if self._network else "127.0.0.1"

    def within(self, name: str) -> list[str]:
        """Give the words that run a command in a member's network; the user's is ``net``."""
        if self._network is None:
            return []
        space = self._network.middle if name == "net" else self._network.namespace(name)
        return ["ip", "netns", "exec", space]

    def unplug(self, name: str) -> None:
        """Pull a member's cable out."""
        assert self._network is not None, "there are no cables"
        self._network.unplug(name)

    def plug(self, name: str) -> None:
        """Put a member's cable back in."""
        assert self._network is not None, "there are no cables"
        self._network.plug(name)

    # -- the scheduler

    def dask_tls(self) -> list[str]:
        """Give Dask's words for the lab's certificates."""
        return self.certificates.options("--tls-ca-file", "--tls-cert", "--tls-key")

    def start_scheduler(self) -> None:
        """Start it, at the address that it always has."""
        where, _, port = self.address.removeprefix("tls://").partition(":")
        words = [*_DASK, "--host", where, "--port", port, "--protocol", "tls", "--no-dashboard", *self.dask_tls()]
        with (self.folder / "scheduler.log").open("ab") as log:
            self._scheduler = subprocess.Popen(
                [*_WITH_ME, *self.within("s"), *words], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def scheduler_runs(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._scheduler is not None and self._scheduler.poll() is None

    def kill_scheduler(self) -> None:
        """Kill it; its workers see that and end."""
        assert self._scheduler is not None
        self._scheduler.kill()
        self._scheduler.wait()

    # -- the user's side

    def client(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Start a hostpart command where the users are."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options |= {"cwd": self.folder / "user", "env": self.env, **more}
        process: subprocess.Popen[str] = subprocess.Popen(
            [*_WITH_ME, *self.within("net"), *HOSTPART, *words], text=True, **options
        )
        self._clients.append(process)
        return process

    def fleet(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """Start ``hostpart fleet`` on this lab's cluster."""
        return self.client("fleet", "--scheduler", self.address, *self.certificates.options(), *words, **more)

    def run(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``hostpart fleet`` to its end."""
        process = self.fleet(*words)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(
                f"fleet {words} did not end in {timeout:g} s; {out!r}, {err!r}, {self.logs()}"
            ) from None
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Ask the scheduler for its workers, by name; none while it does not answer."""
        if self._onlooker is None:
            tls = zip(("CA_FILE", "CLIENT__CERT", "CLIENT__KEY"), map(str, self.certificates), strict=True)
            env = self.env | {f"DASK_DISTRIBUTED__COMM__TLS__{name}": path for name, path in tls}
            self._onlooker = subprocess.Popen(
                [*_WITH_ME, *self.within("net"), sys.executable, str(_HERE / "onlooker.py"), self.address],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        assert self._onlooker.stdin
        assert self._onlooker.stdout
        self._onlooker.stdin.write("\n")
        self._onlooker.stdin.flush()
        answer: Mapping[str, Any] = json.loads(self._onlooker.stdout.readline())
        found: dict[str, dict[str, Any]] = answer.get("workers", {})
        return found

    def joined(self, *names: str, timeout: float = 60) -> bool:
        """Wait until the scheduler's workers are exactly these; whether that came true."""
        return wait_until(lambda: set(self.workers()) == set(names), timeout)

    def left(self) -> list[str]:
        """Name what is on any host that an errand may have left."""
        return [one for host in self.hosts.values() for one in host.left()]

    def logs(self) -> str:
        """Give the ends of what scheduler and hosts have logged, for a test that has failed."""
        files = [self.folder / "scheduler.log", *(host.log for host in self.hosts.values())]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files if path.exists())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def lab(folder: Path, names: Sequence[str] = ("a", "b", "c"), *, preload: bool = True) -> Iterator[Lab]:
    """Give a lab whose hosts have all been started."""
    with Lab(folder, names) as here:
        for host in here.hosts.values():
            host.preload = preload
            host.boot()
        yield here
