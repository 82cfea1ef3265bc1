"""SIGKILL at every named point of a release, of a return and of a restore, inside virtual machines.

The points are those that a run really passes: it is watched once, and then each is died at. So that this is affordable
under emulation, the keeper here is one without a front and a guest: it is forked, enters its VM, takes the host up the
ladder and down again with the code that a keeper has for that, and is gone. Whole commands that die are in
``test_isolation.py``, and at the end of this file where it is their front that dies.

Every point but the tasks' masks is died at each time that it is passed. Of the masks, which are hundreds that differ
in nothing but the task, those around the others are, and a sample whose seed is printed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hostpart.host import Host
from hostpart.isolation.level import Wish
from hostpart.isolation.watch import Watch
from hostpart.ledger import Ledger, VmRow, boot_id
from hostpart.procfs import start_time
from tests.vm.command import run, sleeper, start, wait_until
from tests.vm.fingerprint import fingerprint
from tests.vm.remains import remains
from workers import crash

pytestmark = pytest.mark.vm(limit_s=1500, every=())

S, IDLE = "4,6", "5,7"
LEVELS = ("sweep", "cpuset", "full")
PARTS = 6
SAMPLE = 8  # masks of each part


@pytest.fixture
def before() -> dict[str, str]:
    """The host as it is before anything, with tasks as a busy one has them: free, pinned, stopped."""
    for cpus in ((), (1,), (4,), (1, 4), (4, 5, 6, 7)):
        sleeper(*cpus)
    os.kill(sleeper(3, 6), signal.SIGSTOP)
    # What the first time changes for good is not hostpart's: CPUs that have been offline once.
    assert run("run", "--isolation", "full", "--require", "--pcpus", S, "--", "true").code == 0
    return fingerprint()


def _same(before: dict[str, str], what: str) -> None:
    left: list[str] = []

    def settled() -> bool:
        left[:] = remains(before)
        return not left

    assert wait_until(settled, 3.0), what + "\n" + "\n".join(left)


def _forked(what: Callable[[], None], die_at: str = "", log: str = "") -> int:
    # What became of it: its exit code, negative the signal that ended it.
    pid = os.fork()
    if not pid:
        code = 1
        try:
            crash.arm(die_at)
            crash.record(log)
            what()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _keep(level: str, *, end: bool = True) -> None:
    with Ledger() as ledger:
        row = VmRow(
            0, "rt", 0, "f" * 16, boot_id(), "RUNNING", 2, "none", os.getpid(), start_time(os.getpid()) or 0,
            os.getppid(), time.time(), pcpus=S, idle=IDLE,
        )  # fmt: skip
        row = row.replace(id=ledger.add_vm(row))
        watch = Watch(ledger, Host(), row, lambda _: None)
        assert watch.begin(Wish(level, require=True)).reached == level
        if end:
            watch.end()
            ledger.remove_vm(row.id)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def _restore() -> None:
    done = run("restore")
    assert done.code == 0, done.err


def _passed(log: Path) -> list[str]:
    # Each point with the number of the time that it is passed, in order. "write.before" and "write.after" are others'
    # second names.
    times: Counter[str] = Counter()
    found = []
    for name in log.read_text().split():
        times[name] += 1
        if name not in ("write.before", "write.after"):
            found.append(f"{name}@{times[name]}")
    return found


def _chosen(points: list[str], part: int) -> list[str]:
    number = int.from_bytes(os.urandom(4))
    sys.stdout.write(f"the sample of part {part} is that of seed {number}\n")
    masks = [at for at, name in enumerate(points) if ".affinity." in name]
    others = {at for at, name in enumerate(points) if ".affinity." not in name}
    edges = {at for at in masks if {at - 2, at - 1, at + 1, at + 2} & others}
    sample = random.Random(number).sample(masks, min(len(masks), SAMPLE))
    mine = [points[at] for at in sorted(others | edges)][part::PARTS]
    return [*mine, *(points[at] for at in sample)]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("level", LEVELS)
def test_the_host_is_as_it_was_wherever_a_release_or_a_return_dies(
    level: str, part: int, before: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "points"
    assert _forked(lambda: _keep(level), log=str(log)) == 0
    points = _passed(log)
    assert "watch.ended@1" in points
    chosen = _chosen(points, part)
    died = 0
    for name in chosen:
        code = _forked(lambda: _keep(level), die_at=name)
        assert code in (0, -signal.SIGKILL), name
        died += code < 0
        _restore()
        _same(before, f"died at {name}")
    sys.stdout.write(f"{level}: {len(points)} points are passed; died at {died} of {len(chosen)}\n")
    # Some tasks, and so some masks, are there in one run and not in the next.
    assert died > 0.8 * len(chosen)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("level", LEVELS)
def test_the_host_is_as_it_was_wherever_a_restore_dies(
    level: str, part: int, before: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "points"
    assert _forked(lambda: _keep(level, end=False)) == -signal.SIGKILL
    assert run("restore", points=str(log)).code == 0
    points = _passed(log)
    assert "recovery@1" in points
    chosen = _chosen(points, part)
    died = 0
    for name in chosen:
        assert _forked(lambda: _keep(level, end=False)) == -signal.SIGKILL
        done = run("restore", die_at=name)
        assert done.code in (0, -signal.SIGKILL), (name, done)
        died += done.code < 0
        _restore()
        _same(before, f"restore died at {name}")
    sys.stdout.write(f"{level}: {len(points)} points are passed; died at {died} of {len(chosen)}\n")
    assert died > 0.8 * len(chosen)


@pytest.mark.parametrize("level", LEVELS)
def test_the_host_is_as_it_was_if_a_second_death_follows_the_first(
    level: str, before: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "points"
    assert _forked(lambda: _keep(level), log=str(log)) == 0
    points = _passed(log)
    number = int.from_bytes(os.urandom(4))
    sys.stdout.write(f"the deaths are those of seed {number}\n")
    chance = random.Random(number)
    for _ in range(15):
        first, second, third = chance.choice(points), chance.choice(points), f"write.after@{chance.randint(1, 60)}"
        _forked(lambda: _keep(level), die_at=first)
        run("restore", die_at=third)
        _forked(lambda: _keep(level), die_at=second)
        _restore()
        _same(before, f"died at {first}, restore at {third}, then at {second}")


@pytest.mark.parametrize("whom", ["parent", "both"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_host_is_as_it_was_if_the_front_dies_while_its_keeper_is_at_a_point(
    level: str, whom: str, before: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "points"
    command = ("run", "--isolation", level, "--require", "--pcpus", S, "--", "true")
    assert run(*command, points=str(log)).code == 0
    # The front's own points come before its keeper is there, or have the keeper for a parent of nobody's.
    names = [
        name for name in dict.fromkeys(log.read_text().split()) if name.startswith(("write.", "watch.", "keeper."))
    ]
    assert len(names) > 10
    for name in names:
        started = start(*command, die_at=f"{name}={whom}")
        code = started.wait().code
        assert code == -signal.SIGKILL, (name, code, started.err)
        if whom == "both":
            _restore()
        _same(before, f"{whom} died at {name}")
