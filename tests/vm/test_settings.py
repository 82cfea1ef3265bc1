"""The small host settings, inside virtual machines: kept off the released pCPUs, and put back exactly."""

from __future__ import annotations

import glob
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation import LEVELS, irqbalance, reconcile
from hostpart.isolation.setting import Outcome, settle
from hostpart.ledger import Ledger
from hostpart.rehearsal import Rehearsal
from tests.vm.devices import DEVICES, unplug
from tests.vm.fingerprint import difference, fingerprint
from workers import crash

pytestmark = pytest.mark.vm(every=())

RPS = "/sys/class/net/lo/queues/rx-0/rps_cpus"
WORKQUEUE = "/sys/devices/virtual/workqueue"
CGROUP = "/sys/fs/cgroup"


def bring(ledger: Ledger, released: str, host: Host | None = None) -> dict[str, Outcome]:
    """Settle every mechanism as a reconcile does, with the CPUs of this list released at the highest level."""
    taken = CpuSet.parse(released)
    service = CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text()) - taken
    outcomes = reconcile.bring(host or Host(), ledger, dict.fromkeys(LEVELS, taken), service)
    return {one.key: one for one in outcomes}


@pytest.fixture
def few() -> None:
    """No device with many interrupts has a driver: for what goes through all writes."""
    unplug()


@pytest.fixture
def only_the_port() -> None:
    """As ``few``, but the virtual port keeps its driver."""
    unplug(but="port")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own; RPS is on, some masks differ, and all is as it was when the test has ended."""
    for number, path in enumerate(queues()):
        put(path, ("ff", "3c", "30")[number % 3] if path != RPS else "ff")
    put("/proc/irq/4/smp_affinity_list", "4")
    put("/proc/irq/3/smp_affinity_list", "2,4-5")
    before = fingerprint(tasks=False)
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        bring(ledger, "")
        assert ledger.known() == {}
    assert difference(before, fingerprint(tasks=False)) == []


def put(path: str, text: str) -> None:
    """Write as an operator would, not through hostpart."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def get(path: str) -> str:
    """Read as an operator would."""
    return Path(path).read_text().strip()


def cpus(path: str) -> set[int]:
    """Return a mask by a reader of this test's own: every other file than a list's is in hex."""
    text = get(path)
    if not path.endswith(("_list", "watchdog_cpumask")):
        mask = int(text.replace(",", ""), 16)
        return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}
    spans = (span.partition("-") for span in text.split(",") if span)
    return {cpu for low, _, high in spans for cpu in range(int(low), int(high or low) + 1)}


def queues() -> list[str]:
    """Return what steers the packets of each network queue: the loopback's, and of the cards that have a driver."""
    return sorted(glob.glob("/sys/class/net/*/queues/rx-*/rps_cpus"))


def spread() -> set[str]:
    """Return the masks of interrupts whose driver has the kernel spread them over all CPUs: a virtual disk's."""
    return {path.rpartition("/")[0] + "/smp_affinity_list" for path in glob.glob("/proc/irq/*/virtio*-req.*")}


def masks() -> list[str]:
    """Return the masks that hostpart narrows and that can be changed."""
    # A PC's timer and cascade.
    fixed = {"/proc/irq/0/smp_affinity_list", "/proc/irq/2/smp_affinity_list", *spread()}
    found = [
        "/proc/irq/default_smp_affinity",
        *(set(glob.glob("/proc/irq/*/smp_affinity_list")) - fixed),
        f"{WORKQUEUE}/cpumask",
        f"{WORKQUEUE}/writeback/cpumask",
        "/proc/sys/kernel/watchdog_cpumask",
        *queues(),
    ]
    return [path for path in found if os.path.exists(path)]


@pytest.mark.parametrize("released", ["4-5", "1", "1-7", "0-3", "7"])
def test_no_setting_has_a_released_cpu_and_all_come_back(ledger: Ledger, released: str) -> None:
    before = {path: cpus(path) for path in masks()}
    assert len(before) > 10
    bring(ledger, released)
    gone = {cpu for cpu in range(8) if cpu in CpuSet.parse(released)}
    for path, was in before.items():
        assert cpus(path) == (was - gone or set(range(8)) - gone), path
    assert get("/proc/sys/vm/stat_interval") == "120"


def test_an_interval_that_is_longer_already_stays(ledger: Ledger) -> None:
    put("/proc/sys/vm/stat_interval", "300")
    bring(ledger, "4-5")
    assert get("/proc/sys/vm/stat_interval") == "300"
    bring(ledger, "")
    assert get("/proc/sys/vm/stat_interval") == "300"
    put("/proc/sys/vm/stat_interval", "1")


def test_steering_that_is_off_stays_off(ledger: Ledger) -> None:
    put(RPS, "0")
    put(f"{WORKQUEUE}/writeback/cpumask", "00")
    outcome = bring(ledger, "4-5")
    assert (outcome[RPS[1:]].what, cpus(RPS), cpus(f"{WORKQUEUE}/writeback/cpumask")) == ("kept", set(), set())
    bring(ledger, "")
    assert (cpus(RPS), cpus(f"{WORKQUEUE}/writeback/cpumask")) == (set(), set())
    put(RPS, "ff")
    put(f"{WORKQUEUE}/writeback/cpumask", "ff")


def test_vms_that_come_and_go_in_any_order_leave_nothing(ledger: Ledger) -> None:
    was = {path: cpus(path) for path in masks()}
    chance = random.Random(7)
    vms = [{4, 5}, {6}, {1, 2, 3}, {7}]
    held: list[set[int]] = []
    for _ in range(24):
        one = chance.choice(vms)
        if one in held:
            held.remove(one)
        else:
            held.append(one)
        taken = set().union(*held)
        bring(ledger, str(CpuSet.of(taken)))
        for path, before in was.items():
            assert cpus(path) == (before - taken or (set(range(8)) - taken if taken else before)), (path, held)


def test_what_somebody_else_changed_is_left_alone_and_said_as_long_as_it_lasts(ledger: Ledger) -> None:
    theirs = {
        "/proc/irq/10/smp_affinity_list": "1,4",
        "/proc/irq/default_smp_affinity": "33",
        f"{WORKQUEUE}/cpumask": "3f",
        "/proc/sys/kernel/watchdog_cpumask": "0,4",
        "/proc/sys/vm/stat_interval": "7",
        RPS: "31",
    }
    was = {path: get(path) for path in theirs}
    bring(ledger, "4-5")
    for path, value in theirs.items():
        put(path, value)
    changed = {path: get(path) for path in theirs}
    for released in ("4-5", "4-7", "4-7", "6", ""):
        outcomes = bring(ledger, released)
        assert {path: get(path) for path in theirs} == changed, released
        assert [path for path in theirs if outcomes[path[1:]].what != "foreign"] == [], released
    assert ledger.known() == {}
    for path, value in was.items():
        put(path, value)


def test_an_interrupt_that_cannot_be_steered_is_left_and_named(ledger: Ledger) -> None:
    outcomes = bring(ledger, "4-5")
    for number in (0, 2):
        one = outcomes[f"proc/irq/{number}/smp_affinity_list"]
        assert (one.what, one.now, cpus("/" + one.key)) == ("refused", one.was, set(range(8)))
        assert "does not let this interrupt be steered" in one.why
        assert one.key not in ledger.known()


@pytest.mark.vm(kernels=("6.1", "6.12"))  # those whose package of drivers the mirror has
def test_a_queue_that_the_kernel_spreads_itself_is_left_and_named_where_it_would_be_moved(ledger: Ledger) -> None:
    there = {path: cpus(path) for path in spread()}
    assert sorted(map(sorted, there.values())) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    outcomes = bring(ledger, "4-6")
    for path, was in there.items():
        one = outcomes[path[1:]]
        assert (one.what, cpus(path)) == ("refused" if was & {4, 5, 6} else "kept", was)
        if one.what == "refused":
            assert "does not let this interrupt be steered; it goes to CPU " in one.why
        assert one.key not in ledger.known()


@pytest.mark.vm(kernels=("6.1", "6.12"))
def test_the_queues_of_a_network_card_leave_the_released_pcpus_and_come_back(ledger: Ledger) -> None:
    steered = {path: cpus(path) for path in queues() if "/lo/" not in path}
    assert len(steered) == 9
    interrupts = {
        f"{os.path.dirname(path)}/smp_affinity_list": CpuSet.parse(get(f"{os.path.dirname(path)}/smp_affinity_list"))
        for path in glob.glob("/proc/irq/*/eth1-rxtx-*")
    }
    assert len(interrupts) == 8
    for number, path in enumerate(sorted(interrupts)):
        put(path, str(number))
    bring(ledger, "4-5")
    for path, was in steered.items():
        assert cpus(path) == (was - {4, 5} or {0, 1, 2, 3, 6, 7})
    for number, path in enumerate(sorted(interrupts)):
        assert cpus(path) == ({0, 1, 2, 3, 6, 7} if number in (4, 5) else {number})
    bring(ledger, "")
    assert {path: cpus(path) for path in steered} == steered
    for number, (path, mask) in enumerate(sorted(interrupts.items())):
        assert cpus(path) == {number}
        put(path, str(mask))


def test_a_rehearsal_lists_every_write_once_and_makes_none(ledger: Ledger) -> None:
    before = fingerprint(tasks=False)
    host = Rehearsal()
    with ledger.copy() as copy:
        bring(copy, "4-5", host)
        first = len(host.writes)
        outcomes = bring(copy, "4-5", host)
        assert {one.what for one in outcomes.values()} == {"kept"}
        assert len(host.writes) == first > 10
        bring(copy, "", host)
        assert copy.known() == {}
    assert ledger.known() == {}
    assert difference(before, fingerprint(tasks=False)) == []


# -- interrupts that come and go -----------------------------------------------------------------------


PORT = DEVICES["port"][0]  # whose driver every kernel has
DRIVER = f"/sys/bus/pci/drivers/{DEVICES['port'][1]}"


def port() -> dict[str, str]:
    """Return the masks of the port's interrupts, by file; none while it has no driver."""
    name = "".join(map(os.path.basename, glob.glob(f"/sys/bus/pci/devices/{PORT}/virtio*")))
    found = [os.path.dirname(path) for path in glob.glob(f"/proc/irq/*/{name}-*") if name]
    return {f"{folder}/smp_affinity_list": get(f"{folder}/smp_affinity_list") for folder in found}


@pytest.fixture
def unplugged(ledger: Ledger) -> Iterator[dict[str, str]]:
    """The port has no driver; what its interrupts get where nothing is released."""
    put(f"{DRIVER}/unbind", PORT)
    put(f"{DRIVER}/bind", PORT)
    masks = port()
    put(f"{DRIVER}/unbind", PORT)
    assert (len(masks), port()) == (2, {})
    yield masks
    if not port():
        put(f"{DRIVER}/bind", PORT)


@pytest.mark.parametrize("later", ["", "4-6", "6"], ids=["not looked at", "with more released", "with others released"])
def test_an_interrupt_that_appears_meanwhile_ends_with_what_it_would_have_had(
    ledger: Ledger, unplugged: dict[str, str], later: str
) -> None:
    bring(ledger, "4-5")
    put(f"{DRIVER}/bind", PORT)
    assert all(not cpus(path) & {4, 5} for path in port())
    if later:
        bring(ledger, later)
        gone = {cpu for cpu in range(8) if cpu in CpuSet.parse(later)}
        for path, mask in unplugged.items():
            assert cpus(path) == set(CpuSet.parse(mask)) - gone
    bring(ledger, "")
    assert (port(), ledger.known()) == (unplugged, {})


def test_an_interrupt_that_goes_and_comes_between_two_looks_ends_with_what_it_had(
    ledger: Ledger, unplugged: dict[str, str]
) -> None:
    put(f"{DRIVER}/bind", PORT)
    bring(ledger, "4-5")
    put(f"{DRIVER}/unbind", PORT)
    put(f"{DRIVER}/bind", PORT)
    bring(ledger, "4-6")
    bring(ledger, "")
    assert (port(), ledger.known()) == (unplugged, {})


def test_a_new_interrupt_that_somebody_steered_stays_where_they_did(ledger: Ledger, unplugged: dict[str, str]) -> None:
    bring(ledger, "4-5")
    put(f"{DRIVER}/bind", PORT)
    theirs = min(port())
    put(theirs, "1-2")
    bring(ledger, "")
    assert (port(), ledger.known()) == (unplugged | {theirs: "1-2"}, {})
    put(theirs, unplugged[theirs])


def test_an_old_interrupt_with_just_the_narrowed_mask_is_not_taken_for_a_new_one(ledger: Ledger) -> None:
    was = get("/proc/irq/10/smp_affinity_list")
    put("/proc/irq/10/smp_affinity_list", "0-3,6-7")
    for released in ("4-5", "4-5", ""):
        bring(ledger, released)
        assert get("/proc/irq/10/smp_affinity_list") == "0-3,6-7"
    put("/proc/irq/10/smp_affinity_list", was)


@pytest.mark.vm(limit_s=400)
@pytest.mark.parametrize("point", ["write.before", "write.after", "ledger.remember.after", "ledger.forget.before"])
def test_killed_at_any_point_a_new_interrupt_ends_with_what_it_would_have_had(
    only_the_port: None, ledger: Ledger, unplugged: dict[str, str], tmp_path: Path, point: str
) -> None:
    died = 0
    for number in itertools.count(1, 7):
        bring(ledger, "4-5")
        put(f"{DRIVER}/bind", PORT)
        was_killed = dies(tmp_path, f"{point}@{number}", ("4-6", ""))
        bring(ledger, "")
        assert (port(), ledger.known()) == (unplugged, {}), number
        put(f"{DRIVER}/unbind", PORT)
        if not was_killed:
            break
        died += 1
    assert died >= 3


# -- death at every point ------------------------------------------------------------------------------


def dies(directory: Path, where: str, steps: tuple[str, ...]) -> bool:
    """Bring the host through *steps* in a child that dies at the named point; return whether it did."""
    pid = os.fork()
    if not pid:
        try:
            with Ledger(str(directory)) as ledger:
                crash.arm(where)
                for released in steps:
                    bring(ledger, released)
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.vm(limit_s=400)
@pytest.mark.parametrize(
    ("point", "stride"),
    [
        ("write.before", 1),
        ("write.after", 1),
        ("ledger.remember.before", 3),
        ("ledger.remember.after", 3),
        ("ledger.forget.before", 3),
        ("ledger.forget.after", 3),
    ],
)
@pytest.mark.parametrize("then", ["", "6-7"], ids=["nothing is released then", "another VM is there then"])
def test_killed_at_any_point_it_is_put_right_by_the_next_call(
    few: None, ledger: Ledger, tmp_path: Path, point: str, stride: int, then: str
) -> None:
    was = {path: cpus(path) for path in masks()}
    before = fingerprint(tasks=False)
    died = 0
    for number in itertools.count(1, stride):
        if not dies(tmp_path, f"{point}@{number}", ("4-5", "4-6", "")):
            break
        died += 1
        if then:
            bring(ledger, then)
            gone = {6, 7}
            assert [path for path in was if cpus(path) != (was[path] - gone or set(range(8)) - gone)] == [], number
        foreign = [one.key for one in bring(ledger, "").values() if one.what == "foreign"]
        assert (foreign, ledger.known()) == ([], {}), number
        assert difference(before, fingerprint(tasks=False)) == [], number
    assert died >= 5, "so few points say that the test looked at nothing"


# -- the daemon ----------------------------------------------------------------------------------------


REAL = "/usr/sbin/irqbalance"


def daemon(folder: Path, uid: int = 0, interval_s: int = 3600) -> int:
    """Start the machine's own irqbalance where there is one, else a process of its name; return its pid.

    :param interval_s: how long it waits before it moves interrupts for the first time, and from then on
    """
    program = folder / "irqbalance"
    if not program.exists():
        program.symlink_to(sys.executable)
    pid = os.fork()
    if not pid:
        if uid:
            os.setuid(uid)
        if os.path.exists(REAL) and not uid:
            os.execv(REAL, ["irqbalance", "--foreground", f"--interval={interval_s}"])
        os.execv(program, ["irqbalance", "-S", "-c", "import time; time.sleep(1000)"])
    until = time.monotonic() + 20
    while get(f"/proc/{pid}/comm") != "irqbalance" or state(pid) != "S":
        assert time.monotonic() < until
        time.sleep(0.01)
    return pid


def state(pid: int) -> str:
    """Return the kernel's letter for what a process does."""
    return get(f"/proc/{pid}/stat").rpartition(") ")[2][0]


def end(pid: int) -> None:
    """End a process of this test."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def key_of(pid: int) -> str:
    """Return its key in the ledger, the start time read by this test."""
    return f"irqbalance:{pid}:{get(f'/proc/{pid}/stat').rpartition(') ')[2].split()[19]}"


def only_irqbalance(ledger: Ledger, released: str) -> dict[str, str]:
    """Settle the daemon alone and return what became of it, by key."""
    host, known, taken = Host(), ledger.known(), CpuSet.parse(released)
    there = {one.key: one for one in irqbalance.settings(host)} if taken else {}
    there |= {key: one for key in known if (one := irqbalance.of(key)) is not None and key not in there}
    outcomes = settle(there.values(), known, taken, CpuSet.of([0]), host, ledger.remember, ledger.forget)
    return {one.key: one.what for one in outcomes}


def test_irqbalance_pauses_while_anything_is_released(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    key = key_of(pid)
    assert only_irqbalance(ledger, "4-5") == {key: "written"}
    assert state(pid) == "T"
    assert only_irqbalance(ledger, "4-7") == {key: "kept"}
    assert state(pid) == "T"
    assert only_irqbalance(ledger, "") == {key: "restored"}
    assert (state(pid) in "SR", ledger.known()) == (True, {})
    end(pid)


@pytest.mark.skipif(not os.path.exists(REAL), reason="there is no irqbalance in this guest")
def test_while_it_is_paused_no_interrupt_goes_back_to_a_released_cpu(ledger: Ledger, tmp_path: Path) -> None:
    was = {path: get(path) for path in glob.glob("/proc/irq/*/smp_affinity_list")}
    pid = daemon(tmp_path, interval_s=1)
    time.sleep(3)  # it has moved some by now, and would go on
    moved = [path for path, mask in was.items() if get(path) != mask]
    bring(ledger, "4-5")
    paused = {path: get(path) for path in was}
    time.sleep(4)
    assert {path: get(path) for path in was} == paused
    assert [one.key for one in bring(ledger, "4-5").values() if one.what == "foreign"] == []
    bring(ledger, "")
    end(pid)
    for path in moved or was:
        if get(path) != was[path]:
            put(path, was[path])


def test_an_irqbalance_that_somebody_stopped_before_stays_stopped(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert only_irqbalance(ledger, "4-5") == {key_of(pid): "kept"}
    only_irqbalance(ledger, "")
    assert (state(pid), ledger.known()) == ("T", {})
    end(pid)


def test_an_irqbalance_that_was_started_anew_is_paused_and_goes_on_too(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    key = key_of(pid)
    only_irqbalance(ledger, "4-5")
    end(pid)
    other = daemon(tmp_path)
    assert only_irqbalance(ledger, "4-5") == {key: "gone", key_of(other): "written"}
    assert (state(other), list(ledger.known())) == ("T", [key_of(other)])
    only_irqbalance(ledger, "")
    assert (state(other) in "SR", ledger.known()) == (True, {})
    end(other)


def test_one_that_was_continued_by_hand_is_paused_again_and_goes_on_at_the_end(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    only_irqbalance(ledger, "4-5")
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.1)
    assert only_irqbalance(ledger, "4-5") == {key_of(pid): "written"}
    assert state(pid) == "T"
    only_irqbalance(ledger, "")
    assert state(pid) in "SR"
    end(pid)


def test_a_users_process_of_that_name_is_not_touched(ledger: Ledger, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    pid = daemon(tmp_path, uid=65534)
    assert only_irqbalance(ledger, "4-5") == {}
    assert state(pid) == "S"
    end(pid)


def test_a_rehearsal_would_stop_it_and_does_not(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    host = Rehearsal()
    with ledger.copy() as copy:
        for released, what in (("4-5", "written"), ("4-5", "kept"), ("", "restored")):
            assert bring(copy, released, host)[key_of(pid)].what == what
    signals = [line for line in host.writes if line.startswith("kill")]
    assert (signals, state(pid)) == ([f"kill -19 {pid}", f"kill -18 {pid}"], "S")
    end(pid)


def test_killed_around_the_signal_it_goes_on_after_the_next_call(ledger: Ledger, tmp_path: Path) -> None:
    pid = daemon(tmp_path)
    for point in ("write.signal.before", "write.signal.after"):
        for number in (1, 2):
            assert dies(tmp_path, f"{point}@{number}", ("4-5", "")), (point, number)
            bring(ledger, "")
            assert (state(pid) in "SR", ledger.known()) == (True, {})
    end(pid)


# -- workqueues and partitions -------------------------------------------------------------------------


@pytest.fixture
def partition() -> Iterator[str]:
    """An isolated partition of CPU 6-7 that somebody else has made, removed at the end."""
    if "cpuset" not in (Path(CGROUP) / "cgroup.controllers").read_text().split():
        pytest.skip("no cpuset controller in a cgroup v2 tree here")
    control = f"{CGROUP}/cgroup.subtree_control"
    was_on = "cpuset" in get(control).split()
    put(control, "+cpuset")
    path = f"{CGROUP}/theirs"
    os.mkdir(path)
    put(f"{path}/cpuset.cpus", "6-7")
    put(f"{path}/cpuset.cpus.partition", "isolated")
    yield path
    put(f"{path}/cpuset.cpus.partition", "member")
    os.rmdir(path)
    if not was_on:
        put(control, "-cpuset")


def test_the_workqueues_mask_is_exact_though_a_partition_of_ours_narrows_it_meanwhile(ledger: Ledger) -> None:
    if "cpuset" not in (Path(CGROUP) / "cgroup.controllers").read_text().split():
        pytest.skip("no cpuset controller in a cgroup v2 tree here")
    control, path = f"{CGROUP}/cgroup.subtree_control", f"{CGROUP}/ours"
    was_on = "cpuset" in get(control).split()
    put(control, "+cpuset")
    bring(ledger, "6-7")
    os.mkdir(path)
    put(f"{path}/cpuset.cpus", "6-7")
    put(f"{path}/cpuset.cpus.partition", "isolated")
    outcomes = bring(ledger, "6-7")
    assert outcomes[f"{WORKQUEUE[1:]}/cpumask"].what == "kept"
    assert cpus(f"{WORKQUEUE}/cpumask") == set(range(6))
    bring(ledger, "5-7")
    assert cpus(f"{WORKQUEUE}/cpumask") == set(range(5))
    put(f"{path}/cpuset.cpus.partition", "member")
    os.rmdir(path)
    bring(ledger, "")
    assert cpus(f"{WORKQUEUE}/cpumask") == set(range(8))
    if not was_on:
        put(control, "-cpuset")


def test_what_somebody_elses_partition_keeps_from_the_workqueues_is_not_given_back(
    ledger: Ledger, partition: str
) -> None:
    before = {path: get(path) for path in glob.glob(f"{WORKQUEUE}/cpumask*")}
    bring(ledger, "4-5")
    bring(ledger, "")
    assert {path: get(path) for path in glob.glob(f"{WORKQUEUE}/cpumask*")} == before
