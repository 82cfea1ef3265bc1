"""Running processes put on pCPUs of their own inside virtual machines, and given back exactly, however it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hostpart import procfs
from hostpart.ledger import Ledger
from tests.vm.command import run, wait_until
from tests.vm.fingerprint import difference, fingerprint
from tests.vm.seldom import SELDOM

pytestmark = pytest.mark.vm(limit_s=240)

S = {4, 6}


def _sleep_on(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    time.sleep(1000)


def _process() -> int:
    # A process whose threads have masks of their own, and a child.
    pid = os.fork()
    if not pid:
        for cpu in (0, 1):
            threading.Thread(target=_sleep_on, args=[cpu]).start()
        if not os.fork():
            os.sched_setaffinity(0, {2, 3})
        while True:
            time.sleep(1000)
    assert wait_until(lambda: sorted(map(sorted, _masks(pid))) == [[0], list(range(8)), [1]] and _children(pid))
    child = _child(pid)
    assert wait_until(lambda: os.sched_getaffinity(child) == {2, 3})
    return pid


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")


def _child(pid: int) -> int:
    return int(_children(pid).split()[0])


def _masks(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(int(tid)) for tid in sorted(os.listdir(f"/proc/{pid}/task"), key=int)]


def _same(before: dict[str, str]) -> None:
    bound = not os.uname().release.startswith("6.1.")
    assert wait_until(lambda: not difference(before, fingerprint(), bound=bound), 3.0), "\n".join(
        difference(before, fingerprint(), bound=bound)
    )
    with Ledger() as ledger:
        assert not ledger.remembers()


def _attach(level: str, pid: int) -> None:
    done = run("attach", "--isolation", level, "--require", "--pcpus", "4,6", "--name", "rt", str(pid))
    assert done.code == 0, done.err
    assert _masks(pid) == [S, S, S]
    assert _masks(_child(pid)) == [S]


@pytest.mark.parametrize(
    "level", ["affinity", *(pytest.param(level, marks=SELDOM) for level in ("sweep", "cpuset")), "full"]
)
def test_a_process_with_its_threads_and_child_is_given_back_on_stop(level: str) -> None:
    pid = _process()
    before = fingerprint()
    _attach(level, pid)
    shown = json.loads(run("show", "--json", "rt").out)
    # At the lowest level the host's own tasks may run there, and taint.
    assert shown["evidence"]["verdict"] != "broken", shown
    assert [one["pcpu"] for one in shown["evidence"]["pcpus"]] == [4, 6]
    assert run("audit", "--strict", "--foreign-limit", "100").code == 0
    assert str(pid) in run("ps").out
    assert run("stop", "rt").code == 0
    _same(before)


@pytest.mark.parametrize("level", [pytest.param("affinity", marks=SELDOM), "cpuset"])
def test_it_outlives_its_keeper_and_restore_gives_it_back(level: str) -> None:
    pid = _process()
    child = _child(pid)
    before = fingerprint()
    _attach(level, pid)
    with Ledger() as ledger:
        keeper = next(row.keeper_pid for row in ledger.vms())
    os.kill(keeper, signal.SIGKILL)
    assert wait_until(lambda: (stat := procfs.read_stat(keeper)) is None or stat.dead)
    assert run("restore").code == 0
    for one in (pid, child):
        os.kill(one, 0)
    _same(before)
