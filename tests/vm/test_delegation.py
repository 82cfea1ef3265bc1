"""Cgroups that were handed to a user: what that user gets of the ladder there, and what root may take."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.vm.command import Done, run, start
from tests.vm.fingerprint import difference, fingerprint

pytestmark = pytest.mark.vm()

_NOBODY = 65534
_TREE = Path("/sys/fs/cgroup")
_TOP = _TREE / "theirs"
_LEFT = "cpuset.cpus.effective"
_PLACE = "/tmp/nobodys-place"


def _hand_over(partition: str) -> None:
    # CPUs 4-7, with a cgroup for the user's shells.
    (_TREE / "cgroup.subtree_control").write_text("+cpuset")
    (_TOP / "shell").mkdir(parents=True)
    (_TOP / "cpuset.cpus").write_text("4-7")
    (_TOP / "cpuset.cpus.partition").write_text(partition)
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "shell", "shell/cgroup.procs"):
        os.chown(_TOP / name, _NOBODY, _NOBODY)
    os.mkdir(_PLACE, 0o700)
    os.chown(_PLACE, _NOBODY, _NOBODY)


def _as_nobody(level: str, *more: str) -> Done:
    words = ("run", "--isolation", level, "--pcpus", "6", *more, "--", "cat", "/proc/self/cgroup", f"{_TOP}/{_LEFT}")
    # Nobody else's process is to be in there: before Linux 6.2 the user could not switch a controller on for it.
    mine = os.sched_getaffinity(0)
    (_TOP / "shell/cgroup.procs").write_text("0")
    started = start(*words, uid=_NOBODY, environ={"HOSTPART_RUNTIME_DIR": _PLACE})
    (_TREE / "cgroup.procs").write_text("0")
    os.sched_setaffinity(0, mine)
    return started.wait()


@pytest.mark.parametrize("kind", ["root", "isolated"])
def test_a_user_has_partitions_in_the_one_that_was_handed_over(kind: str) -> None:
    _hand_over(kind)
    before = fingerprint()
    evidence = f"{_PLACE}/e.json"
    done = _as_nobody("cpuset", "--require", "--evidence", evidence)
    assert (done.code, done.err.count("Traceback")) == (0, 0), done
    cgroup, effective = done.out.split()
    assert re.fullmatch(r"0::/theirs/hostpart/[0-9a-f]{32}", cgroup)
    assert effective == "4-5", "6 is the guest's, and 7 is idle beside it"
    document = json.loads(Path(evidence).read_text())
    assert (document["isolation"]["reached"], document["isolation"]["scope"]) == ("cpuset", "user")
    assert document["verdict"] != "broken", document["reasons"]
    assert difference(before, fingerprint(), bound=False) == []


def test_more_than_a_partition_is_roots_and_the_user_is_told() -> None:
    _hand_over("root")
    before = fingerprint()
    done = _as_nobody("full")
    assert done.code == 0, done.err
    assert "isolation is 'cpuset', not 'full': interrupts" in done.err
    assert _as_nobody("full", "--require").code == 125
    assert difference(before, fingerprint(), bound=False) == []


def test_a_cgroup_that_is_no_partition_gives_a_user_none() -> None:
    _hand_over("member")
    before = fingerprint()
    done = _as_nobody("cpuset", "--require")
    assert (done.code, done.out) == (125, ""), done
    assert "needs root" in done.err or "the scope is 'user'" in done.err
    assert "\ntry: " in done.err
    assert difference(before, fingerprint(), bound=False) == []


def test_root_takes_nothing_that_was_handed_to_somebody_else() -> None:
    _hand_over("member")
    before = fingerprint()
    done = run("run", "--isolation", "cpuset", "--require", "--pcpus", "6", "--", "true")
    assert (done.code, done.out) == (125, ""), done
    assert "/sys/fs/cgroup/theirs lays claim to CPU 6" in done.err
    assert "echo 4-5 > /sys/fs/cgroup/theirs/cpuset.cpus" in done.err
    assert difference(before, fingerprint(), bound=False) == []
