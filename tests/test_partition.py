"""Cgroup cpusets on recorded trees: where the home would be, what stands in the way, and what does not hold.

What the kernel really does is tried in ``tests/vm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.errors import NotPermitted
from hostpart.host import Host
from hostpart.isolation import cpuset1, partition
from hostpart.isolation.cgroup_files import Mount, mounts
from hostpart.isolation.level import Wish
from hostpart.isolation.reach import reach
from hostpart.ledger import Holding, Known, Ledger

V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
RO = "30 23 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
A = Holding("a" * 32, 0, 0, "cpuset", "host", CpuSet.parse("4-5"), CpuSet(), CpuSet(), cycle=False)
T = Holding("t" * 32, 0, 0, "cpuset", "host", CpuSet.parse("2"), CpuSet(), CpuSet(), cycle=False, threaded=True)
TREE = "sys/fs/cgroup"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own."""
    (tmp_path / "ledger").mkdir()
    with Ledger(str(tmp_path / "ledger")) as ledger:
        yield ledger


def machine(tmp_path: Path, mountinfo: str, **files: str) -> Host:
    """Return a recorded host with eight CPUs; a file's name has two underscores for each slash."""
    root = tmp_path / "host"
    there = {
        "proc/self/mountinfo": mountinfo,
        "proc/self/cgroup": "0::/\n",
        "proc/cmdline": "quiet\n",
        "sys/devices/system/cpu/online": "0-7\n",
        "sys/devices/system/cpu/possible": "0-7\n",
        "sys/devices/system/cpu/isolated": "\n",
        "sys/devices/system/cpu/nohz_full": "(null)\n",
        f"{TREE}/cgroup.procs": "1\n",
        f"{TREE}/cgroup.controllers": "cpuset cpu\n",
        f"{TREE}/cgroup.subtree_control": "cpuset\n",
        f"{TREE}/cpuset.cpus.effective": "0-7\n",
    }
    there |= {f"{TREE}/{name.replace('__', '/')}": text for name, text in files.items()}
    for name, text in there.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(str(root))


def homes(**changes: str) -> dict[str, str]:
    """Return the files of both homes, with A in the one and T, whose vCPUs are threads, in the other."""
    other = {name: text for name, text in home().items() if name.startswith("hostpart__")}
    other = {
        name.replace("hostpart__", "hostpart-threads__").replace(A.token, T.token): text.replace("4-5", "2")
        for name, text in other.items()
    }
    other |= {f"hostpart-threads__{T.token}__cgroup.type": "threaded\n", "hostpart-threads__cgroup.type": "threaded\n"}
    root = {"cpuset.cpus.effective": "0-1,3,6-7\n", "cpuset.cpus.isolated": "2,4-5\n"}
    return {**home(), **other, **root, **changes}


def home(**changes: str) -> dict[str, str]:
    """Return the files of a home that holds A, as Linux 6.12 has them."""
    files = {
        "cgroup.subtree_control": "cpuset\n",
        "cgroup.procs": "",
        "cpuset.cpus": "4-5\n",
        "cpuset.cpus.partition": "isolated\n",
        "cpuset.cpus.effective": "\n",
    }
    child = {"cgroup.procs": "", "cpuset.cpus": "4-5\n", "cpuset.cpus.partition": "isolated\n", "cpuset.mems": "\n"}
    child["cpuset.cpus.effective"] = "4-5\n"
    there = {f"hostpart__{name}": text for name, text in files.items()}
    there |= {f"hostpart__{A.token}__{name}": text for name, text in child.items()}
    return {**there, "cpuset.cpus.effective": "0-3,6-7\n", "cpuset.cpus.isolated": "4-5\n", **changes}


def test_nothing_stands_in_the_way_of_a_plain_host(tmp_path: Path, ledger: Ledger) -> None:
    assert partition.obstacle(machine(tmp_path, V2), ledger, CpuSet.parse("4-5")) is None


@pytest.mark.parametrize(
    ("mountinfo", "files", "wanted", "saying"),
    [
        pytest.param("", {}, "4", "cgroup v2 is not mounted", id="no tree"),
        pytest.param(V2, {"cgroup.controllers": "cpu\n"}, "4", "no cpuset controller", id="no controller"),
        pytest.param(V2, {"cgroup.type": "domain\n"}, "4", "this is a container", id="container"),
        pytest.param(V2, {}, "0-7", "nothing of CPU 0-7 would be left", id="all CPUs"),
        pytest.param(
            V2, {"x__cgroup.procs": "", "x__cpuset.cpus": "3-4\n"}, "4-5", "/x lays claim to CPU 4", id="sibling"
        ),
        pytest.param(V2, {"cpuset.cpus.effective": "0-4\n"}, "4-5", "CPU 5 is not among those", id="elsewhere"),
        pytest.param(V2, {"hostpart__cgroup.procs": ""}, "4", "knows nothing of", id="foreign home"),
        pytest.param(
            V2, {"hostpart-threads__cgroup.procs": ""}, "4", "/hostpart-threads that this", id="foreign threads"
        ),
    ],
)
def test_an_obstacle_is_named_and_nothing_is_written(
    tmp_path: Path, ledger: Ledger, mountinfo: str, files: dict[str, str], wanted: str, saying: str
) -> None:
    # A recorded host answers every write with an error, so settling gets as far as the obstacle or fails here.
    host = machine(tmp_path, mountinfo, **files)
    found = partition.obstacle(host, ledger, CpuSet.parse(wanted))
    assert found is not None
    assert saying in found.problem
    assert found.remedy
    one = Holding("a" * 32, 0, 0, "full", "host", CpuSet.parse(wanted), CpuSet(), CpuSet(), cycle=False)
    assert partition.settle(host, ledger, [one]) == [found.problem]
    assert ledger.known() == {}


def test_what_holds_is_found_to_hold(tmp_path: Path, ledger: Ledger) -> None:
    host = machine(tmp_path, V2, **home())
    ledger.remember({f"partition:{TREE}": Known("-", ("4-5",))})
    assert partition.check(host, [A]) == []
    assert partition.settle(host, ledger, [A]) == []  # no write is made: each would fail
    assert partition.held(host, ledger) == CpuSet.parse("4-5")
    assert partition.remembered(ledger.known())


def test_two_homes_that_hold_are_found_to_hold(tmp_path: Path, ledger: Ledger) -> None:
    host = machine(tmp_path, V2, **homes())
    ledger.remember({f"partition:{TREE}": Known("-", ("2,4-5",))})
    assert partition.check(host, [A, T]) == []
    assert partition.settle(host, ledger, [A, T]) == []  # no write is made: each would fail
    assert partition.held(host, ledger) == CpuSet.parse("2,4-5")
    assert partition.obstacle(host, ledger, CpuSet.parse("2,4-5"), threaded=True) is None


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        pytest.param({f"hostpart-threads__{T.token}__cgroup.type": "domain invalid\n"}, "takes no threads", id="type"),
        pytest.param({"hostpart-threads__cpuset.cpus.partition": "member\n"}, "'member'", id="home"),
        pytest.param({"cpuset.cpus.isolated": "4-5\n"}, "may run on its CPU 2", id="root"),
    ],
)
def test_what_does_not_hold_of_threads_is_theirs_alone(tmp_path: Path, changes: dict[str, str], saying: str) -> None:
    host = machine(tmp_path, V2, **homes(**changes))
    for token in ("", T.token):
        (problem,) = partition.check(host, [A, T], token)
        assert saying in problem
        assert "/hostpart-threads" in problem
    assert partition.check(host, [A, T], A.token) == []


def test_threads_need_the_trees_root(tmp_path: Path, ledger: Ledger) -> None:
    # What a container's administrator has handed over: whole processes can be there, and no threads.
    files = {"cgroup.type": "domain\n", "cgroup.procs": "", "cpuset.cpus.partition": "root\n"}
    host = machine(tmp_path, V2, **files)
    assert partition.handed_over(host)
    assert partition.obstacle(host, ledger, T.pcpus) is None
    found = partition.obstacle(host, ledger, T.pcpus, threaded=True)
    assert found is not None
    assert "at the root of the cgroup tree only" in found.problem
    assert found.remedy
    assert partition.settle(host, ledger, [T]) == [found.problem]
    for threaded in (False, True):
        wish = Wish("cpuset", "user", threaded=threaded)
        reached = reach(wish, host, ledger, T.pcpus)
        assert (reached.reached, reached.stopped_by, reached.remedy) == (
            ("sweep", found.problem, found.remedy) if threaded else ("cpuset", "", "")
        )
        if threaded:
            with pytest.raises(NotPermitted, match="is required and cannot be reached"):
                reach(wish.replace(require=True), host, ledger, T.pcpus)


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        pytest.param({"cpuset.cpus.effective": "0-3,5-7\n"}, "may run on its CPU 5", id="the root still has one"),
        pytest.param({"cpuset.cpus.isolated": "4\n"}, "may run on its CPU 5", id="one is not isolated"),
        pytest.param(
            {"hostpart__cpuset.cpus.partition": "isolated invalid (x)\n"}, "'isolated invalid (x)'", id="invalid"
        ),
        pytest.param({"hostpart__cpuset.cpus": "4-6\n"}, "has CPU 4-6 and should have 4-5", id="other CPUs"),
        pytest.param(
            {"cgroup.subtree_control": "\n"}, "switched off for /sys/fs/cgroup/hostpart", id="controller gone"
        ),
        pytest.param({"hostpart__cgroup.subtree_control": "\n"}, "for the cgroups in", id="guard gone"),
        pytest.param({f"hostpart__{A.token}__cpuset.cpus.effective": "2\n"}, "may use CPU 2", id="a VM elsewhere"),
        pytest.param({f"hostpart__{A.token}__cpuset.cpus.partition": "member\n"}, "'member'", id="a VM without"),
    ],
)
def test_what_does_not_hold_is_said(tmp_path: Path, changes: dict[str, str], saying: str) -> None:
    problems = partition.check(machine(tmp_path, V2, **home(**changes)), [A])
    assert len(problems) == 1
    assert saying in problems[0]


def test_before_linux_6_7_the_root_does_not_list_what_is_isolated(tmp_path: Path) -> None:
    files = home()
    del files["cpuset.cpus.isolated"]
    assert partition.check(machine(tmp_path, V2, **files), [A]) == []


def test_every_mask_that_the_kernel_may_give_is_named(tmp_path: Path) -> None:
    host = machine(tmp_path, V2, **{"x__cgroup.procs": "", "x__cpuset.cpus": "3,5-6\n"})
    assert partition.wide(host, [A]) == ("0-3,6-7", "0-7", "3,5-6", "3,6")
    # One home may be there while the other comes.
    assert {"0-3,6-7", "0-1,3-7", "0-1,3,6-7"} <= set(partition.wide(host, [A, T]))


def test_mounts_tell_the_versions_apart(tmp_path: Path) -> None:
    assert mounts(machine(tmp_path, V1 + RO)) == [
        Mount("sys/fs/cgroup/cpuset", "cgroup", False, ("rw", "cpuset")),
        Mount("sys/fs/cgroup", "cgroup2", True, ("rw",)),
    ]


def test_a_hybrid_host_is_one_of_version_1(tmp_path: Path) -> None:
    host = machine(tmp_path, V2 + V1, **{"cpuset__cpuset.cpus": "0-7\n"})
    assert cpuset1.mounted(host)
    assert cpuset1.leaf(host, A.token) == f"sys/fs/cgroup/cpuset/hostpart/{A.token}"
    assert cpuset1.threads(host, A.token) == ("", f"sys/fs/cgroup/cpuset/hostpart/{A.token}/tasks")
    assert not cpuset1.mounted(machine(tmp_path / "other", V2))


def test_a_guests_cgroup_and_the_files_to_watch(tmp_path: Path) -> None:
    host = machine(tmp_path, V2)
    assert partition.leaf(host, A.token) == f"{TREE}/hostpart/{A.token}"
    assert partition.watch_files(host, A.token) == [
        f"{TREE}/hostpart/cpuset.cpus.partition",
        f"{TREE}/hostpart/{A.token}/cpuset.cpus.partition",
    ]
    assert partition.threads(host, T.token) == (
        f"{TREE}/cgroup.procs",
        f"{TREE}/hostpart-threads/{T.token}/cgroup.threads",
    )
    assert partition.watch_files(host, T.token, threaded=True) == [
        f"{TREE}/hostpart-threads/cpuset.cpus.partition",
        f"{TREE}/hostpart-threads/{T.token}/cpuset.cpus.partition",
    ]
    with pytest.raises(FileNotFoundError, match="not mounted"):
        partition.leaf(machine(tmp_path / "other", ""), A.token)
