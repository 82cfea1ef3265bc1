"""The small host settings on made-up machines: what is found, in which form it is written, and what is said."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hostpart.config import Guest, VmConfig
from hostpart.cpuset import CpuSet
from hostpart.device_model import refused
from hostpart.errors import UsageError
from hostpart.host import Host
from hostpart.isolation import (
    LEVELS,
    hotplug,
    irq,
    irqbalance,
    mems,
    reconcile,
    rps,
    stat_interval,
    watchdog,
    workqueue,
    writeback,
)
from hostpart.isolation.setting import MaskFile, Outcome, settle
from hostpart.ledger import Known, Ledger
from workers.vcpu import STAGES

MODULES: tuple[ModuleType, ...] = (irqbalance, irq, workqueue, writeback, watchdog, stat_interval, rps)
SERVICE = CpuSet.parse("0-3")
FILES = {
    "proc/irq/default_smp_affinity": "ff\n",
    "proc/irq/10/smp_affinity_list": "0-7\n",
    "proc/irq/10/effective_affinity_list": "3\n",
    "proc/irq/9/smp_affinity_list": "4-5\n",
    "proc/irq/9/effective_affinity_list": "\n",
    "sys/devices/virtual/workqueue/cpumask": "ff\n",
    "sys/devices/virtual/workqueue/writeback/cpumask": "ff\n",
    "proc/sys/kernel/watchdog_cpumask": "0-7\n",
    "proc/sys/vm/stat_interval": "1\n",
    "sys/class/net/eth0/queues/rx-10/rps_cpus": "00\n",
    "sys/class/net/eth0/queues/rx-2/rps_cpus": "30\n",
    "sys/class/net/eth0/queues/tx-0/xps_cpus": "ff\n",
    "sys/class/net/bonding_masters": "",
    **{f"sys/devices/system/cpu/cpu{cpu}/online": "1\n" for cpu in range(1, 8)},
    "sys/devices/system/cpu/online": "0-7\n",
    "sys/devices/system/node/has_memory": "0-1\n",
    "proc/self/status": "Name:\tx\nMems_allowed_list:\t0-1\n",
}


class Tree(Host):
    """A directory whose files take every write, but for those that refuse it.

    :ivar refuses: errno by file
    :ivar makes: what a file has after any write to it
    """

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        super().__init__(str(root))
        self.refuses: dict[str, int] = {}
        self.makes: dict[str, str] = {}
        self.writes: list[tuple[str, str]] = []
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def write_text(self, name: str, text: str) -> None:
        """Write, or refuse."""
        self.writes.append((name, text))
        if name in self.refuses:
            raise OSError(self.refuses[name], "refused", self.path(name))
        Path(self.path(name)).write_text(self.makes.get(name, text) + "\n")


@pytest.fixture
def host(tmp_path: Path) -> Tree:
    """A machine with eight CPUs and one of every setting."""
    return Tree(tmp_path / "host", FILES)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own."""
    with Ledger(str(tmp_path)) as ledger:
        yield ledger


def bring(host: Host, ledger: Ledger, released: str, *modules: ModuleType) -> dict[str, Outcome]:
    """Settle the modules' settings, with the CPUs of this list released."""
    known, taken = ledger.known(), CpuSet.parse(released)
    there = [one for module in modules or MODULES for one in module.settings(host)]
    outcomes = settle(there, known, taken, SERVICE, host, ledger.remember, ledger.forget)
    return {one.key: one for one in outcomes}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_machine_without_such_files_has_nothing_to_narrow(tmp_path: Path, module: ModuleType) -> None:
    assert module.settings(Host(str(tmp_path))) == []


def test_every_setting_is_found_again_by_its_key_alone_and_by_one_module_only(host: Tree) -> None:
    for module in MODULES:
        for setting in module.settings(host):
            assert [other.of(setting.key) for other in (*MODULES, hotplug) if other.of(setting.key)] == [setting]


@pytest.mark.parametrize(
    "key",
    [
        "", "task:1:2", "proc/irq", "proc/irq/x/smp_affinity_list", "proc/irq/9/smp_affinity", "irqbalance:1", "wide",
        "irqbalance:1:x", "sys/devices/system/cpu/online", "sys/devices/system/cpu/cpu/online",
        "sys/devices/system/cpu/cpu01/online", "sys/class/net/eth0/queues/tx-0/xps_cpus", "sys/fs/cgroup/cpuset.cpus",
    ],
)  # fmt: skip
def test_a_key_of_something_else_is_nobodys(key: str) -> None:
    assert [module for module in (*MODULES, hotplug) if module.of(key) is not None] == []


def test_settings_are_found_in_the_order_of_their_numbers(host: Tree) -> None:
    assert [one.key for one in irq.settings(host)] == [
        "proc/irq/default_smp_affinity",
        "proc/irq/9/smp_affinity_list",
        "proc/irq/10/smp_affinity_list",
    ]
    assert [one.key.split("/")[5] for one in rps.settings(host)] == ["rx-2", "rx-10"]


def test_each_file_is_written_in_its_own_form(host: Tree, ledger: Ledger) -> None:
    bring(host, ledger, "4-5")
    assert dict(host.writes) == {
        "proc/irq/default_smp_affinity": "000000cf",
        "proc/irq/10/smp_affinity_list": "0-3,6-7",
        "proc/irq/9/smp_affinity_list": "0-3",
        "sys/devices/virtual/workqueue/cpumask": "000000cf",
        "sys/devices/virtual/workqueue/writeback/cpumask": "000000cf",
        "proc/sys/kernel/watchdog_cpumask": "0-3,6-7",
        "proc/sys/vm/stat_interval": "120",
        "sys/class/net/eth0/queues/rx-2/rps_cpus": "0000000f",
    }
    bring(host, ledger, "")
    assert ledger.known() == {}
    assert [Path(host.path(name)).read_text().strip().lstrip("0") for name in dict(host.writes)] == [
        FILES[name].strip().lstrip("0") for name in dict(host.writes)
    ]


def test_a_setting_that_has_no_released_cpu_is_not_written(host: Tree, ledger: Ledger) -> None:
    bring(host, ledger, "7", irq)
    assert [name for name, _ in host.writes] == ["proc/irq/default_smp_affinity", "proc/irq/10/smp_affinity_list"]


@pytest.mark.parametrize(
    ("number", "file", "where"), [(10, errno.EIO, "it goes to CPU 3"), (9, errno.EPERM, "not in use")]
)
def test_an_interrupt_that_cannot_be_steered_is_said_with_where_it_goes(
    host: Tree, ledger: Ledger, number: int, file: int, where: str
) -> None:
    key = f"proc/irq/{number}/smp_affinity_list"
    host.refuses[key] = file
    outcome = bring(host, ledger, "4-5")[key]
    assert (outcome.what, key in ledger.known()) == ("refused", False)
    assert "does not let this interrupt be steered" in outcome.why
    assert where in outcome.why


def reconciled(host: Host, ledger: Ledger, released: str) -> None:
    """Bring every setting to where a reconcile would, with the CPUs of this list released at the highest level."""
    taken = CpuSet.parse(released)
    reconcile.bring(host, ledger, dict.fromkeys(LEVELS, taken), CpuSet.parse("0-7") - taken)


def plug(host: Tree, number: int, mask: str, node: int = -1) -> None:
    """Have an interrupt appear, with the mask that the kernel gives it."""
    folder = Path(host.path(f"proc/irq/{number}"))
    folder.mkdir()
    (folder / "smp_affinity_list").write_text(mask + "\n")
    (folder / "node").write_text(f"{node}\n")


def mask_of(host: Tree, number: int) -> str:
    """Return an interrupt's mask."""
    return host.read_text(f"proc/irq/{number}/smp_affinity_list").strip()


@pytest.mark.parametrize(
    ("released", "node", "begins", "ends"),
    [
        ("4-5", -1, "0-3,6-7", "0-7"),
        ("4-5", 1, "6-7", "4-7"),
        ("4-5", 0, "0-3", "0-3"),
        ("4-7", 1, "0-3", "4-7"),  # nothing of its node was left
        ("4-5", -1, "1", "1"),  # its driver chose it
        ("4-5", 1, "0-3,6-7", "0-3,6-7"),
    ],
)
@pytest.mark.parametrize("between", [(), ("4-6",), ("6", "1,6")])
def test_an_interrupt_that_appears_meanwhile_has_afterwards_what_it_would_have_had(
    host: Tree, ledger: Ledger, released: str, node: int, begins: str, ends: str, between: tuple[str, ...]
) -> None:
    for number, its in enumerate(("0-3", "4-7")):
        path = Path(host.path(f"sys/devices/system/node/node{number}"))
        path.mkdir()
        (path / "cpulist").write_text(its + "\n")
    reconciled(host, ledger, released)
    plug(host, 30, begins, node)
    for others in between:
        reconciled(host, ledger, others)
        assert not CpuSet.parse(mask_of(host, 30)) & CpuSet.parse(others)
    reconciled(host, ledger, "")
    assert (mask_of(host, 30), ledger.known()) == (ends, {})


def test_an_interrupt_that_was_there_with_the_narrowed_mask_keeps_it(host: Tree, ledger: Ledger) -> None:
    plug(host, 30, "0-3,6-7")
    for released in ("4-5", "4-6", "4-5", ""):
        reconciled(host, ledger, released)
    assert (mask_of(host, 30), ledger.known()) == ("0-3,6-7", {})


def test_an_interrupt_that_comes_back_under_its_number_is_a_new_one(host: Tree, ledger: Ledger) -> None:
    plug(host, 30, "1,4")
    reconciled(host, ledger, "4-5")
    shutil.rmtree(host.path("proc/irq/30"))
    reconciled(host, ledger, "4-5")
    plug(host, 30, "0-3,6-7")
    reconciled(host, ledger, "")
    assert (mask_of(host, 30), ledger.known()) == ("0-7", {})


def test_an_interrupt_that_comes_while_the_default_is_put_back_is_not_forgotten(host: Tree, ledger: Ledger) -> None:
    class Plugged(Tree):
        def write_text(self, name: str, text: str) -> None:
            if name == "proc/irq/default_smp_affinity":
                plug(self, 30, "0-3,6-7")
            super().write_text(name, text)

    reconciled(host, ledger, "4-5")
    reconciled(Plugged(Path(host.root), {}), ledger, "")
    assert (mask_of(host, 30), ledger.known()) == ("0-7", {})


def test_on_a_read_only_machine_everything_is_refused_and_nothing_remembered(host: Tree, ledger: Ledger) -> None:
    outcomes = bring(Host(host.root), ledger, "4-5")
    assert {one.what for one in outcomes.values()} == {"refused", "kept"}
    assert ledger.known() == {}


def test_what_the_kernel_made_of_a_write_is_undone_too(host: Tree, ledger: Ledger) -> None:
    key = "proc/irq/10/smp_affinity_list"
    host.makes[key] = "1"
    assert bring(host, ledger, "4-5", irq)[key].what == "refused"
    host.makes.clear()
    assert bring(host, ledger, "4-5", irq)[key].what == "written"
    host.makes[key] = "1"
    assert bring(host, ledger, "4-6", irq)[key].now == "1"
    host.makes.clear()
    assert bring(host, ledger, "", irq)[key].what == "restored"
    assert Path(host.path(key)).read_text() == "0-7\n"


def test_what_is_somebody_elses_by_now_stays_so_until_all_is_over(host: Tree, ledger: Ledger) -> None:
    key = "proc/irq/10/smp_affinity_list"
    bring(host, ledger, "4-5", irq)
    Path(host.path(key)).write_text("4-6\n")
    for released in ("4-5", "4-5", "4-7", ""):
        assert bring(host, ledger, released, irq)[key].what == "foreign"
    assert (Path(host.path(key)).read_text(), ledger.known()) == ("4-6\n", {})


@pytest.mark.parametrize("isolated", ["00", "c0"])
def test_the_workqueues_mask_is_the_one_asked_for_and_is_left_where_cpus_are_isolated(
    tmp_path: Path, ledger: Ledger, isolated: str
) -> None:
    top = "sys/devices/virtual/workqueue"
    tree = Tree(
        tmp_path / "x", {f"{top}/cpumask": "3f", f"{top}/cpumask_requested": "ff", f"{top}/cpumask_isolated": isolated}
    )
    found = workqueue.settings(tree)
    assert len(found) == (isolated == "00")
    known = workqueue.of(f"{top}/cpumask")
    assert known is not None
    assert known.read(tree) == "0-7"


def test_the_daemon_is_known_by_the_kernels_name_and_start_time(tmp_path: Path) -> None:
    def stat(pid: int, comm: str, state: str = "S") -> dict[str, str]:
        return {f"proc/{pid}/stat": f"{pid} ({comm}) {state} {' '.join(['0'] * 18)} {pid * 10} 0\n"}

    files = {
        **stat(5, "irqbalance"),
        **stat(6, ") R irqbalance"),
        **stat(7, "irqbalance", "Z"),
        **stat(12, "irqbalance"),
    }
    tree = Tree(tmp_path, files)
    by_root = Path(tree.path("proc/5")).stat().st_uid == 0
    assert [one.key for one in irqbalance.settings(tree)] == (
        ["irqbalance:5:50", "irqbalance:12:120"] if by_root else []
    )
    known = irqbalance.of("irqbalance:5:51")
    assert known is not None
    with pytest.raises(ProcessLookupError):
        known.read(tree)
    known = irqbalance.of("irqbalance:5:50")
    assert known is not None
    assert known.read(tree) == "running"
    tree.write_text("proc/5/stat", stat(5, "irqbalance", "T")["proc/5/stat"])
    assert known.read(tree) == "stopped"


def test_a_daemon_that_is_gone_is_forgotten(host: Tree, ledger: Ledger) -> None:
    key = "irqbalance:99999999:5"
    ledger.remember({key: Known("running", ("running", "stopped"))})
    setting = irqbalance.of(key)
    assert setting is not None
    (outcome,) = settle([setting], ledger.known(), CpuSet(), SERVICE, host, ledger.remember, ledger.forget)
    assert (outcome.what, ledger.known()) == ("gone", {})


# -- hotplug -------------------------------------------------------------------------------------------


def test_the_last_cpus_are_not_taken_offline(host: Tree, ledger: Ledger) -> None:
    (Path(host.root) / "sys/devices/system/cpu/online").write_text("1-3\n")
    (problem,) = hotplug.cycle(host, ledger, CpuSet.parse("1-3"))
    assert "leave one to the service VM" in problem
    assert (host.writes, ledger.known()) == ([], {})


def test_a_kernel_without_hotplug_is_said_for_each_cpu(tmp_path: Path, ledger: Ledger) -> None:
    tree = Tree(tmp_path / "x", {"sys/devices/system/cpu/online": "0-3"})
    problems = hotplug.cycle(tree, ledger, CpuSet.parse("2-3"))
    assert [problem[:28] for problem in problems] == ["CPU 2 cannot be taken offlin", "CPU 3 cannot be taken offlin"]


def test_an_error_in_the_middle_brings_back_what_is_offline(host: Tree, ledger: Ledger) -> None:
    class Interrupted(Tree):
        def write_text(self, name: str, text: str) -> None:
            if name.endswith("cpu5/online") and text == "0":
                raise KeyboardInterrupt
            super().write_text(name, text)

    tree = Interrupted(Path(host.root), {})
    with pytest.raises(KeyboardInterrupt):
        hotplug.cycle(tree, ledger, CpuSet.parse("4-6"))
    assert [text for name, text in tree.writes if name.endswith("cpu4/online")] == ["0", "1"]
    assert ledger.known() == {}


def test_a_cpu_of_a_killed_cycle_comes_online_by_its_key(host: Tree, ledger: Ledger) -> None:
    key = "sys/devices/system/cpu/cpu5/online"
    host.write_text(key, "0")
    ledger.remember({key: Known("1", ("1", "0"))})
    setting = hotplug.of(key)
    assert setting is not None
    (outcome,) = settle([setting], ledger.known(), CpuSet(), CpuSet(), host, ledger.remember, ledger.forget)
    assert (outcome.what, host.read_text(key), ledger.known()) == ("restored", "1\n", {})


# -- memory --------------------------------------------------------------------------------------------


def test_a_wish_for_nodes_says_which_there_are(host: Tree) -> None:
    mems.check(host, CpuSet.parse("0-1"))
    with pytest.raises(UsageError, match=r"node 2-3 has no memory to bind a guest to; node 0-1 have some") as caught:
        mems.check(host, CpuSet.parse("1-3"))
    assert "--mems from 0-1" in caught.value.remedy


def test_a_wish_outside_this_process_cpuset_is_refused(host: Tree) -> None:
    (Path(host.root) / "proc/self/status").write_text("Mems_allowed_list:\t0\nMems_allowed_list:\t0\n")
    with pytest.raises(UsageError, match="may not use memory of node 1") as caught:
        mems.check(host, CpuSet.parse("0-1"))
    assert "--mems from 0" in caught.value.remedy


def test_a_kernel_without_nodes_has_nothing_to_bind_to(tmp_path: Path) -> None:
    assert mems.nodes(Host(str(tmp_path))) == CpuSet()
    with pytest.raises(UsageError, match="knows no NUMA nodes"):
        mems.check(Host(str(tmp_path)), CpuSet.parse("0"))


def test_pages_are_counted_by_node_and_policies_named_once(tmp_path: Path) -> None:
    tree = Tree(
        tmp_path,
        {
            "proc/7/status": "Name:\tx\nMems_allowed_list:\t0-1\n",
            "proc/7/numa_maps": "00400000 bind:1 file=/a\\040N1=5 mapped=2 N0=2 kernelpagesize_kB=4\n"
            "7f000000 bind:1 anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4\n7ffe0000 default stack\n",
        },
    )
    assert mems.held(tree, 7) == mems.Memory(CpuSet.parse("0-1"), ("bind:1", "default"), ((0, 3), (1, 2)))
    assert mems.held(tree, 8) == mems.Memory(None)


def test_a_refused_binding_has_a_sentence_of_its_own() -> None:
    assert "mems" in STAGES
    error = refused(VmConfig("box", Guest("command", ("true",)), mems=CpuSet.parse("1")), 0, 2, "mems", errno.EINVAL)
    assert "bind the memory of vCPU 0 of VM 'box' to NUMA node 1: Invalid argument (EINVAL)" in str(error)
    assert "--mems" in error.remedy


def test_masks_that_would_be_empty_become_the_services() -> None:
    setting = MaskFile("x")
    assert setting.wanted("4-5", SERVICE, CpuSet.parse("4-7")) == "0-3"
    assert MaskFile("x", empty=True).wanted("", SERVICE, CpuSet.parse("4-7")) == ""
