"""What does taking pCPUs from the host and giving them back cost, compared with ``tuna`` and ``cset shield``?

All run in one virtual machine of the lab (``tests/vm``), in turns, on the same sleeping tasks. It is emulated, so only
ratios and counts of system calls are printed. Level ``sweep`` is compared with ``tuna --isolate`` and ``--include``,
level ``cpuset`` with ``cset shield``, which needs version 1 of the controller. ``command`` is a whole command with its
interpreter's start; ``library`` is a process forked off one that has all modules loaded. The sleepers are subshells of
one dash, which wait to open a FIFO: they copy few pages, so that 10,000 fit. ``x100`` makes them threads of Python
processes instead, 100 each.

    python -m bench.bench_isolation [-k KERNEL] [-s v1|v2] [-n RUNS] [-m MEGABYTES] [-p tuna|cset] [-l LIMIT_S]
        [--library] [TASKS[xTHREADS] ...]
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

__all__ = ["main"]

CPUS = "4,6"
_PEERS = (
    "cpuset", "python3-cpuset", "tuna", "python3-linux-procfs", "python3-ethtool", "python3-six", "python3-future",
)  # fmt: skip
_SITE = "/lab/peers"
_TRACE = Path("/sys/kernel/tracing")
_TASKS = ("100", "1000", "10000", "1000x100")
_MEGABYTES = 3072  # 10,000 sleepers take some two thirds of it, most of that the kernel's
_SAID = "/run/said"
_LIMIT_S = 3600.0


_GATE = "/run/gate"  # nobody ever opens it for writing
_BRANCH = 100
# In branches, since a subshell clears its parent's table of jobs, and so gets a copy of it.
_SUBSHELLS = """
j=0
while [ $j -lt $1 ]; do
    ( i=0
      while [ $i -lt $2 ]; do ( exec >/dev/null; read x <$3 ) & i=$((i + 1)); done
      echo; exec >/dev/null; read x <$3 ) &
    j=$((j + 1))
done
read x <$3
"""
_THREADS = """
import os, sys, threading, time
threading.stack_size(65536)
processes, threads = map(int, sys.argv[1:])
read, write = os.pipe()
for _ in range(processes):
    if not os.fork():
        lock = threading.Lock()
        lock.acquire()
        for _ in range(threads - 1):
            threading.Thread(target=lock.acquire, daemon=True).start()
        os.write(write, b".")
        time.sleep(1e6)
    os.read(read, 1)
print(flush=True)
time.sleep(1e6)
"""


class Way:
    """One tool: what it does in order, by name, as commands and as calls of its library, and *tidy*, not measured."""

    def __init__(
        self,
        name: str,
        commands: dict[str, list[str]],
        calls: dict[str, Callable[[], None]],
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.commands, self.calls, self.tidy = name, commands, calls, tidy


# -- outside -------------------------------------------------------------------------------------------


def main() -> int:
    """Boot the machine and run this file in it; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_isolation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-k", "--kernel", default="6.1")
    parser.add_argument("-s", "--setup", default="v1")
    parser.add_argument("-n", "--runs", type=int, default=9)
    parser.add_argument("-p", "--peer", choices=["tuna", "cset"], help="with this one only")
    parser.add_argument("-m", "--megabytes", type=int, default=_MEGABYTES, help="the machine's memory")
    parser.add_argument("-l", "--limit", type=float, default=_LIMIT_S, metavar="SECONDS", help="the machine ends then")
    parser.add_argument("--library", action="store_true", help="without whole commands")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("tasks", nargs="*", default=_TASKS)
    args = parser.parse_args()
    if args.inside:
        return _inside(args.tasks, args.runs, args.peer, commands=not args.library)
    from tests.vm import debian
    from tests.vm.image import HOME, project
    from tests.vm.machine import TOPOLOGIES, Kind, booted, resumed

    smp, nodes, megabytes = TOPOLOGIES["2x2x2"]
    if args.megabytes != megabytes:
        TOPOLOGIES["bench"] = (smp, nodes, args.megabytes)
    kind = Kind(args.kernel, args.setup, "bench" if "bench" in TOPOLOGIES else "2x2x2")
    peers, packed = debian.programs(_PEERS), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in (peers / "usr/lib/python3/dist-packages").iterdir():
            if path.name.split(".")[0] in ("cpuset", "tuna", "procfs", "ethtool", "six", "future", "past"):
                archive.add(path, f"{_SITE}/{path.name}")
        for folder in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"):
            for path in (peers / folder).glob("libnl-*.so*"):
                archive.add(path, f"/usr/lib/{path.name}")
        for name in ("cset", "tuna"):
            archive.add(peers / "usr/bin" / name, f"/usr/bin/{name}")
        for path in Path(__file__).parent.glob("*.py"):
            archive.add(path, f"{HOME}/bench/{path.name}")
    argv = ["python3", "-m", "bench.bench_isolation", "--inside", "-n", str(args.runs), *args.tasks]
    argv[4:4] = [*(["-p", args.peer] if args.peer else []), *(["--library"] if args.library else [])]
    with resumed(kind, booted(kind), lambda line: print(line, flush=True)) as guest, guest.limit(args.limit):
        guest.say({"do": "unpack"}, project(everything=True))
        guest.say({"do": "unpack"}, packed.getvalue())
        status = int(str(guest.say({"do": "execute", "argv": argv, "cwd": HOME})["status"]))
    if status < 0:
        print(f"ended by signal {-status} in the machine: is its memory too small? see -m", file=sys.stderr)
    return status if status >= 0 else 128 - status


# -- inside --------------------------------------------------------------------------------------------


def _inside(sizes: list[str], runs: int, peer: str | None, *, commands: bool) -> int:
    if not os.path.exists("/lab/inside.py"):
        raise SystemExit("--inside is for the virtual machine: it moves every task there is")
    os.environ.update(PYTHONPATH=_SITE, LC_ALL="C")
    sys.path.append(_SITE)
    v1 = os.path.exists("/sys/fs/cgroup/cpuset")
    for name in ("event-fork", "overwrite"):
        (_TRACE / "options" / name).write_text("1")
    (_TRACE / "buffer_size_kb").write_text("64")
    pairs = {
        "tuna": (_hostpart("sweep"), _tuna()),
        "cset": (_hostpart("cpuset"), _cset() if v1 else _hostpart("sweep")),
    }
    for size in sizes:
        count, _, threads = size.partition("x")
        group = _population(int(count), int(threads or 1))
        try:
            for pair in [pairs[peer]] if peer else pairs.values():
                print(f"{_tasks()} tasks ({count}, {threads or 1} per process), {' / '.join(one.name for one in pair)}")
                for whole in (True, False) if commands else (False,):
                    _compare(pair, runs, commands=whole)
        finally:
            os.killpg(group, 9)
            while _living(group):
                try:
                    os.waitpid(group, 0)
                except ChildProcessError:
                    time.sleep(0.1)  # those that init has to wait for
    return 0


def _tasks() -> int:
    return sum(len(_threads(pid)) for pid in os.listdir("/proc") if pid.isdigit())


def _population(count: int, threads: int) -> int:
    # Sleepers below a process that leads their group, all there when this returns.
    if threads == 1:
        if not os.path.exists(_GATE):
            os.mkfifo(_GATE)
        leaders = -(-count // _BRANCH)
        argv = ["dash", "-c", _SUBSHELLS, "sh", str(leaders), str(count // leaders - 1), _GATE]
    else:
        leaders = 1
        argv = [sys.executable, "-c", _THREADS, str(count // threads), str(threads)]
    top = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
    assert top.stdout is not None
    for _ in range(leaders):
        top.stdout.readline()
    top.stdout.close()
    return top.pid


def _living(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _hostpart(level: str) -> Way:
    from hostpart.isolation import reconcile
    from hostpart.ledger import Ledger, VmRow, boot_id

    def take() -> None:
        with Ledger() as ledger:
            pid = os.getpid()  # a VM's keeper, below which all are guests: it is not the sleepers' parent
            row = VmRow(
                0, "bench", 0, "0" * 32, boot_id(), "INIT", 0, "true", pid, 1, pid, time.time(), pcpus=CPUS, level=level
            )
            ledger.add_vm(row)
            reconcile.reconcile(ledger)

    def give() -> None:
        with Ledger() as ledger:
            for row in ledger.vms():
                ledger.remove_vm(row.id)
            reconcile.reconcile(ledger)

    run = ["hostpart", "run", "--isolation", level, "--require", "--pcpus", CPUS, "--", "true"]
    return Way(f"hostpart {level}", {"all": run}, {"release": take, "return": give})


def _tuna() -> Way:
    from tuna import tuna

    # Debian 12's tuna 0.15 has no way back: --include ends with a TypeError, a set added to a list.
    return Way(
        "tuna",
        {"release": ["tuna", "--cpus", CPUS, "--isolate"]},
        {"release": lambda: tuna.isolate_cpus([4, 6], os.cpu_count())},
        _widen,
    )


def _widen() -> None:
    for tid in (int(tid) for pid in os.listdir("/proc") if pid.isdigit() for tid in _threads(pid)):
        try:
            if not {4, 6} & os.sched_getaffinity(tid):
                os.sched_setaffinity(tid, range(os.cpu_count() or 1))
        except OSError:
            continue  # bound by the kernel, or ended


def _threads(pid: str) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _cset() -> Way:
    from cpuset import main as cset

    def call(command: list[str]) -> Callable[[], None]:
        def it() -> None:
            sys.argv = command
            cset.main()

        return it

    steps = {
        "release": ["cset", "shield", f"--cpu={CPUS}", "--kthread=on"],
        "return": ["cset", "shield", "--reset"],
    }
    return Way("cset shield", steps, {name: call(command) for name, command in steps.items()})


def _compare(pair: tuple[Way, Way], runs: int, *, commands: bool) -> None:
    kind = "command" if commands else "library"
    taken: tuple[dict[str, list[tuple[float, float, int]]], ...] = ({}, {})
    for number in range(runs + 1):
        for way, found in zip(pair, taken, strict=True):
            done = {step: _measured(what) for step, what in (way.commands if commands else way.calls).items()}
            way.tidy()
            if number:  # the first fills caches
                if commands or len(done) > 1:
                    wall, cpu, calls = zip(*done.values(), strict=True)
                    done.setdefault("all", (sum(wall), sum(cpu), sum(calls)))
                for step, one in done.items():
                    found.setdefault(step, []).append(one)
    for step in [one for one in taken[0] if one in taken[1]]:
        mine, theirs = (found[step] for found in taken)
        counts = " and ".join(f"{median(one[2] for one in found[step]):.0f}" for found in taken)
        print(f"  {kind} {step:8} system calls {counts}", end="")
        for name, at in (("wall", 0), ("cpu", 1)):
            print(f"; {name} {_spread([a[at] / b[at] for a, b in zip(mine, theirs, strict=True)])}", end="")
            # What else the machine did can only add: the least of each side has least of that in it.
            print(f", least {min(one[at] for one in mine) / min(one[at] for one in theirs):.2f}", end="")
        # For growth from size to size only: what a second is worth here is nobody's to know.
        print(
            f"; least units {' and '.join(f'{min(one[1] for one in found[step]):.3f}' for found in taken)}", flush=True
        )


def _spread(ratios: list[float]) -> str:
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _measured(what: list[str] | Callable[[], None]) -> tuple[float, float, int]:
    # Wall-clock and CPU seconds of a process and its children, and the system calls that they made. Counting these
    # costs a little for each, on both sides.
    gate, opened = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(opened)
        os.read(gate, 1)
        code = 1
        try:
            null = os.open(_SAID, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(null, 0)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if not callable(what):
                os.execvp(what[0], what)
            what()
            code = 0
        except SystemExit as end:
            code = 1 if end.code else 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    (_TRACE / "set_event_pid").write_text(str(pid))
    before = _events()
    (_TRACE / "events/raw_syscalls/sys_enter/enable").write_text("1")
    start = time.perf_counter()
    os.write(opened, b".")
    _, status, used = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    (_TRACE / "events/raw_syscalls/sys_enter/enable").write_text("0")
    (_TRACE / "set_event_pid").write_text("")
    os.close(gate)
    os.close(opened)
    if status:
        said = Path(_SAID).read_text()
        raise SystemExit(f"{what} ended with {status}: {said[-2000:]}")
    return wall, used.ru_utime + used.ru_stime, _events() - before


def _events() -> int:
    total = 0
    for path in _TRACE.glob("per_cpu/cpu*/stats"):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(": ")
            if name in ("entries", "overrun"):
                total += int(value)
    return total


if __name__ == "__main__":
    sys.exit(main())
