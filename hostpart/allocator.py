"""Choose pCPUs: topology, supply and request in; a placement, or a refusal with its reason, out.

Pure: no files, no clock, no order that depends on hashing. Who is free and who holds what is for
:mod:`hostpart.lease`; what a machine looks like, for :mod:`hostpart.topology`.

The policies but ``first-fit`` give what Kubernetes' static CPU manager gives (kubernetes,
pkg/kubelet/cm/cpumanager/cpu_assignment.go, its ``takeByTopology…`` functions; KEP-2902, KEP-4800);
``first-fit`` with ``smt="shared"`` is ACRN's ``allocate_pcpu()``. Which pCPUs a policy may choose
from is decided before it is asked, from the SMT mode; the sizes of nodes, packages and caches stay the
machine's. Every step is linear or n log n in the number of pCPUs; numbers of CPUs are Linux's.
"""

from __future__ import annotations

from itertools import pairwise

from .cpuset import CpuSet
from .errors import DoesNotFit
from .topology import Topology
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

__all__ = [
    "POLICIES",
    "SMT_MODES",
    "Placement",
    "Request",
    "Room",
    "Supply",
    "place",
    "place_all",
    "rest_count",
    "room",
]

POLICIES = ("first-fit", "packed", "spread", "numa-spread", "llc")
SMT_MODES = ("exclusive", "whole", "shared")
_LOOSER = {"whole": ("exclusive", "shared"), "exclusive": ("shared",), "shared": ()}  # modes that may give more
_ONE = "this is the only usable pCPU and the host needs one, so nothing can be released"
_MORE = "run on a machine, or in a cgroup, with two or more usable pCPUs"


class Request(Value):
    """What one VM asks for.

    :ivar count: how many vCPUs; 0 means "the rest" to :func:`place_all` and :func:`rest_count`
    :ivar pcpus: an explicit list, vCPU i on the i-th (as ACRN's ``cpu_affinity``); empty: the policy chooses
    :ivar kind: only pCPUs of this kind (``"performance"``), where given
    """

    count: int
    pcpus: tuple[int, ...] = ()
    policy: str = "packed"
    smt: str = "exclusive"
    kind: str | None = None


class Supply(Value):
    """What there is to give at one instant.

    :ivar free: usable, not leased, not the service VM's, not reserved
    :ivar host: the service VM's own: kept and reserved
    :ivar taken: leased to other VMs, their idle siblings included
    :ivar avoid: to be passed over while anything else fits (foreign tasks are pinned there alone)
    :ivar reserved: the part of ``host`` that was reserved, for the wording of a refusal alone
    """

    free: CpuSet
    host: CpuSet = CpuSet()
    taken: CpuSet = CpuSet()
    avoid: CpuSet = CpuSet()
    reserved: CpuSet = CpuSet()


class Placement(Value):
    """Where one VM's vCPUs go.

    :ivar pcpus: vCPU i's pCPU; ascending, unless the request named them
    :ivar idle: siblings that are leased too and stay idle
    :ivar shares_core: the VM's pCPUs whose core the service VM shares
    :ivar why: what was decided, a sentence each, for people
    """

    pcpus: tuple[int, ...]
    idle: CpuSet = CpuSet()
    shares_core: CpuSet = CpuSet()
    why: tuple[str, ...] = ()


class Room(Value):
    """How large a request can be now, in pCPUs; what each fits says :func:`room`.

    :ivar cpus: the pCPUs that are free (Linux numbers)
    :ivar pcpus: the most under ``shared``
    :ivar cores: how many cores are free as a whole
    :ivar core_pcpus: the most under ``exclusive``
    :ivar llc: the most that are free below one last-level cache
    """

    cpus: CpuSet
    pcpus: int
    cores: int
    core_pcpus: int
    llc: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**self.asdict(), "cpus": str(self.cpus)}


def place(topology: Topology, supply: Supply, request: Request) -> Placement:
    """Give the request its pCPUs, or refuse it whole.

    ``exclusive``: only cores of which no thread is in ``supply.taken``; one that the service VM
    uses comes last, and is told of in ``shares_core``. ``whole``: only cores all of whose online
    threads are free, and a count that is a multiple of the machine's threads per core. ``shared``:
    any free thread. A count of 0 gets an empty placement.

    :raises DoesNotFit: saying how many were free, what blocks the rest and what would fit
    :raises ValueError: for an unknown policy or SMT mode, a negative count, or one that is not the
        length of the explicit list
    """
    _check(request)
    machine = _machine(topology)
    if request.pcpus:
        return _place_explicit(machine, topology, supply, request)
    if not request.count:
        return Placement(())
    offer = _Offer(machine, supply, request)
    if request.kind not in (None, *machine.kinds) or not offer.fits(request.count):
        raise _refusal(machine, topology, supply, request, offer)
    chosen, why = offer.choose(request.count)
    return _placement(machine, supply, request, sorted(chosen), [_where(machine, request.policy, chosen), *why])


def rest_count(topology: Topology, supply: Supply, request: Request) -> int:
    """Return how many vCPUs "the rest" is now: the count with which :func:`place` fits.

    All that the request's SMT mode and kind let it have without sharing a core with the service
    VM and without ``supply.avoid``; where that is nothing, what it can have with them.

    :param request: its count and explicit list are not looked at
    :raises DoesNotFit: where not even one vCPU fits
    """
    request = request.replace(count=1, pcpus=())
    _check(request)
    machine = _machine(topology)
    offer = _Offer(machine, supply, request)
    count = offer.rest if request.kind in (None, *machine.kinds) else 0
    if not count:
        raise _refusal(machine, topology, supply, request, offer)
    return count


def room(topology: Topology, supply: Supply) -> Room:
    """Say how much one request can have now, without asking for a number of vCPUs.

    A ``shared`` request of ``pcpus`` fits and one more does not; so does an ``exclusive`` one of ``core_pcpus``, cores
    that the service VM shares included.
    """
    machine = _machine(topology)
    cpus = _given(supply) & machine.online
    by_cache = [0] * len(machine.cache_size)
    for cpu in _cpus(cpus):
        by_cache[machine.cache_of[machine.core_of[cpu]]] += 1
    cores = len(_Offer(machine, supply, Request(1, smt="whole")).cores)
    return Room(cpus, len(cpus), cores, _Offer(machine, supply, Request(1)).total, max(by_cache, default=0))


def place_all(topology: Topology, supply: Supply, requests: Mapping[str, Request | None]) -> dict[str, Placement]:
    """Place the VMs of one scenario: all of them, or none.

    Explicit lists come first, then the counted ones in the mapping's order, then the one whose
    count is 0, which gets the rest (:func:`rest_count`); ``None`` is ``Request(0)``.

    :return: in the mapping's order
    :raises DoesNotFit: for the first VM that does not fit, with its name in ``vm``
    :raises ValueError: as :func:`place`, and where two VMs ask for the rest
    """
    wants = {name: request or Request(0) for name, request in requests.items()}
    rest = [name for name, want in wants.items() if not want.pcpus and not want.count]
    if len(rest) > 1:
        raise ValueError(f"only one VM can have the rest: {', '.join(rest)}")
    placed: dict[str, Placement] = {}
    for name in sorted(wants, key=lambda name: (not wants[name].pcpus, name in rest)):
        want = wants[name]
        try:
            if name in rest:
                want = want.replace(count=rest_count(topology, supply, want))
            placement = placed[name] = place(topology, supply, want)
        except DoesNotFit as refusal:
            raise DoesNotFit(refusal.wanted, refusal.free, refusal.blocks, refusal.fits, vm=name) from None
        held = _cpuset(placement.pcpus) | placement.idle
        supply = supply.replace(free=supply.free - held, taken=supply.taken | held)
    return {name: placed[name] for name in wants}


def _check(request: Request) -> None:
    if request.policy not in POLICIES:
        raise ValueError(f"no policy {request.policy!r}; there are {', '.join(POLICIES)}")
    if request.smt not in SMT_MODES:
        raise ValueError(f"no SMT mode {request.smt!r}; there are {', '.join(SMT_MODES)}")
    if request.count < 0:
        raise ValueError(f"a count of vCPUs is not negative: {request.count}")
    if request.pcpus and request.count != len(request.pcpus):
        raise ValueError(f"{request.count} vCPUs, but {len(request.pcpus)} pCPUs are listed")


# --- the machine, by dense numbers -------------------------------------------------------------


class _Machine:
    """The online pCPUs as cores in nodes, packages and caches, numbered from 0 in order of their ids.

    A pCPU without a core is a core of its own. Cores without a node, package or cache share one,
    so that a machine that tells nothing is one node with one package and one cache.
    """

    def __init__(self, topology: Topology) -> None:
        online = [pcpu for pcpu in topology.pcpus if pcpu.online]
        groups: dict[tuple[int, int], list[int]] = {}
        for pcpu in online:
            # Next to real core ids, the number of the pCPU itself stands where there is none.
            key = (pcpu.cpu, 1) if pcpu.core is None else (pcpu.core, 0)
            threads = groups.get(key)
            if threads is None:
                groups[key] = [pcpu.cpu]
            else:
                threads.append(pcpu.cpu)
        self.cores = [sorted(groups[key]) for key in sorted(groups)]
        size = max((pcpu.cpu for pcpu in topology.pcpus), default=-1) + 1
        self.core_of = [-1] * size
        for core, threads in enumerate(self.cores):
            for cpu in threads:
                self.core_of[cpu] = core
        first = {pcpu.cpu: pcpu for pcpu in online}
        leads = [first[threads[0]] for threads in self.cores]
        self.node_of, self.node_size = self._grouped([lead.numa for lead in leads])
        self.package_of, self.package_size = self._grouped([lead.package for lead in leads])
        self.cache_of, self.cache_size = self._grouped([lead.llc for lead in leads])
        self.online = _cpuset([pcpu.cpu for pcpu in online])
        self.kinds: dict[str, CpuSet] = {
            kind: _cpuset([pcpu.cpu for pcpu in online if pcpu.kind == kind])
            for kind in sorted({pcpu.kind for pcpu in online if pcpu.kind is not None})
        }
        # kubelet's order by number puts first threads first only where siblings are numbered
        # apart; see _spread().
        self.threads = max(map(len, self.cores), default=1)
        self.numbered_apart = not any(
            later - earlier == 1 for threads in self.cores for earlier, later in pairwise(threads)
        )

    def _grouped(self, ids: list[int | None]) -> tuple[list[int], list[int]]:
        known = sorted({-1 if one is None else one for one in ids})
        dense = {one: number for number, one in enumerate(known)}
        group_of = [dense[-1 if one is None else one] for one in ids]
        size = [0] * len(known)
        for core, group in enumerate(group_of):
            size[group] += len(self.cores[core])
        return group_of, size


def _machine(topology: Topology) -> _Machine:
    # Kept with the value it is computed from; a Topology compares, prints and pickles by its fields alone.
    kept: _Machine | None = topology.__dict__.get("_machine")
    if kept is None:
        kept = topology.__dict__["_machine"] = _Machine(topology)
    return kept


def _cpus(cpus: CpuSet) -> list[int]:
    # Through the binary text: one pass, where peeling off bits costs one pass each.
    return [cpu for cpu, digit in enumerate(bin(cpus.mask)[:1:-1]) if digit == "1"]


def _cpuset(cpus: Iterable[int]) -> CpuSet:
    cpus = list(cpus)
    if not cpus:
        return CpuSet()
    digits = bytearray(b"0") * (max(cpus) + 1)
    for cpu in cpus:
        digits[-1 - cpu] = 49  # "1"
    return CpuSet(int(digits, 2))


# --- what a request may have -------------------------------------------------------------------


def _given(supply: Supply) -> CpuSet:
    return supply.free - supply.host - supply.taken


class _Offer:
    """What one request may choose from, in layers: a layer is touched when those before it are used up.

    :ivar unit: a count must be a multiple of it
    :ivar layers: whether they are to be avoided, and the pCPUs, ascending
    :ivar cores: under ``whole``, the cores that are free
    :ivar total: the pCPUs of all layers
    """

    def __init__(self, machine: _Machine, supply: Supply, request: Request) -> None:
        self.machine, self.request = machine, request
        self.unit = 1
        allowed = _given(supply) & machine.online
        if request.kind is not None:
            allowed &= machine.kinds.get(request.kind, CpuSet())
        avoid = allowed & supply.avoid
        self.cores: list[int] = []
        self.layers: list[tuple[bool, list[int]]]
        if request.smt == "shared":
            self.layers = [(False, _cpus(allowed - avoid)), (True, _cpus(avoid))]
        elif request.smt == "whole":
            self._offer_cores(allowed, avoid)
        else:
            self._offer_exclusive(allowed, avoid, supply)
        self.layers = [layer for layer in self.layers if layer[1]]
        self.total = sum(len(cpus) for _, cpus in self.layers)

    def _offer_cores(self, allowed: CpuSet, avoid: CpuSet) -> None:
        machine = self.machine
        free, shunned = bytearray(len(machine.cores)), set()
        for cpu in _cpus(allowed):
            free[machine.core_of[cpu]] += 1
        for cpu in _cpus(avoid):
            shunned.add(machine.core_of[cpu])
        kind = None if self.request.kind is None else machine.kinds.get(self.request.kind, CpuSet())
        for core, threads in enumerate(machine.cores):
            if kind is None or threads[0] in kind:
                self.unit = max(self.unit, len(threads))
            if free[core] == len(threads):
                self.cores.append(core)
        good = [cpu for core in self.cores if core not in shunned for cpu in machine.cores[core]]
        bad = [cpu for core in self.cores if core in shunned for cpu in machine.cores[core]]
        self.layers = [(False, sorted(good)), (True, sorted(bad))]

    def _offer_exclusive(self, allowed: CpuSet, avoid: CpuSet, supply: Supply) -> None:
        machine = self.machine
        others, hosts = bytearray(len(machine.cores)), bytearray(len(machine.cores))
        for cpu in _cpus(supply.taken & machine.online):
            others[machine.core_of[cpu]] = 1
        for cpu in _cpus(supply.host & machine.online):
            hosts[machine.core_of[cpu]] = 1
        # A task pinned to the same pCPU takes turns with the guest; one on the sibling only shares
        # its core. So the host's cores come before pCPUs to avoid.
        self.layers = [(False, []), (False, []), (True, []), (True, [])]
        for base, cpus in ((0, allowed - avoid), (2, avoid)):
            for cpu in _cpus(cpus):
                core = machine.core_of[cpu]
                if not others[core]:
                    self.layers[base + hosts[core]][1].append(cpu)

    @property
    def most(self) -> int:
        """The largest count such that it and every smaller multiple of ``unit`` fits."""
        if self._alike:
            return self.total
        reach, most = self._reach(), 0
        while reach >> most + self.unit & 1:
            most += self.unit
        return most

    @property
    def _alike(self) -> bool:
        # Whether every count up to the total that is a multiple of the unit can be made up.
        if self.request.smt != "whole":
            return True
        return all(len(self.machine.cores[core]) == self.unit for core in self.cores)

    def _reach(self) -> int:
        # Bit n: some set of the free cores, which differ in size, has n threads in all.
        reach = 1
        for core in self.cores:
            reach |= reach << len(self.machine.cores[core])
        return reach

    def fits(self, count: int) -> bool:
        """Whether *count* vCPUs can be had."""
        if count % self.unit or count > self.total:
            return False
        return self._alike or bool(self._reach() >> count & 1)

    @property
    def rest(self) -> int:
        """How many the first layer has."""
        if not self.layers:
            return 0
        first = len(self.layers[0][1])
        if self.request.smt != "whole":
            return first
        first -= first % self.unit
        return first if first and self.fits(first) else self.most

    def choose(self, count: int) -> tuple[list[int], list[str]]:
        """Choose *count* pCPUs, which fit."""
        if self.request.smt == "whole":
            return self._choose_cores(count)
        chosen: list[int] = []
        why: list[str] = []
        for avoided, cpus in self.layers:
            need = count - len(chosen)
            if need <= 0:
                break
            picked = cpus
            if need < len(cpus):
                picked, how = _by_policy(self.machine, cpus, need, self.request)
                why += how
            chosen += picked
            if avoided:
                why.append(f"tasks of others are pinned to pCPU {_cpuset(picked)}, but nothing else was left")
        return chosen, why

    def _choose_cores(self, count: int) -> tuple[list[int], list[str]]:
        machine = self.machine
        pools = [cpus for _, cpus in self.layers]
        for cpus in (pools[0], [cpu for pool in pools for cpu in pool]):
            if len(cpus) < count:
                continue
            chosen, why = _by_policy(machine, sorted(cpus), count, self.request, self.unit)
            if len(chosen) == count and _fills_cores(machine, chosen):
                break
            # The cores differ in size, and the policy cut one or found none small enough.
            fitting = _matched(machine, sorted({machine.core_of[cpu] for cpu in cpus}), count)
            if fitting is not None:
                chosen = fitting
                break
        shunned = {cpu for avoided, pool in self.layers if avoided for cpu in pool}
        if shunned.intersection(chosen):
            cores = _cpuset(shunned.intersection(chosen))
            why.append(f"tasks of others are pinned to the cores of pCPU {cores}, but nothing else was left")
        return chosen, why


def _fills_cores(machine: _Machine, cpus: Iterable[int]) -> bool:
    cpus = set(cpus)
    return sum(len(machine.cores[core]) for core in {machine.core_of[cpu] for cpu in cpus}) == len(cpus)


def _matched(machine: _Machine, cores: Sequence[int], count: int) -> list[int] | None:
    # Whole cores of *count* threads in all: as many of the large ones as leave a rest that the
    # smaller ones can make up.
    classes: dict[int, list[int]] = {}
    for core in cores:
        classes.setdefault(len(machine.cores[core]), []).append(core)
    sizes = sorted(classes, reverse=True)
    reach = [1]
    for size in reversed(sizes):
        below = reach[0]
        for _ in classes[size]:
            below |= below << size
        reach.insert(0, below)
    chosen: list[int] = []
    for number, size in enumerate(sizes):
        many = min(len(classes[size]), count // size)
        while many >= 0 and not reach[number + 1] >> count - many * size & 1:
            many -= 1
        if many < 0:
            return None
        chosen += classes[size][:many]
        count -= many * size
    return [cpu for core in chosen for cpu in machine.cores[core]]


# --- the policies ------------------------------------------------------------------------------


class _Pool:
    """Free pCPUs by core, and what was chosen of them.

    A stage of a policy puts nodes, packages and cores in order when it begins: those with the
    fewest free pCPUs first, then by id, so that what is in use fills up.

    :param cpus: ascending
    """

    def __init__(self, machine: _Machine, cpus: Sequence[int], need: int) -> None:
        self.machine, self.need = machine, need
        self.chosen: list[int] = []
        free: dict[int, list[int]] = {}
        core_of = machine.core_of
        for cpu in cpus:
            core = core_of[cpu]
            if core in free:
                free[core].append(cpu)
            else:
                free[core] = [cpu]
        # In order of core ids, for sorting is stable.
        self.free = {core: free[core] for core in sorted(free)}
        self.node_free, self.package_free = [0] * len(machine.node_size), [0] * len(machine.package_size)
        node_of, package_of = machine.node_of, machine.package_of
        for core, threads in self.free.items():
            self.node_free[node_of[core]] += len(threads)
            self.package_free[package_of[core]] += len(threads)
        # Where packages are as many as nodes or more, a node holds packages; else the reverse.
        self.nodes_outside = len(machine.package_size) >= len(machine.node_size)

    def take(self, core: int, cpus: Sequence[int] | None = None) -> None:
        """Choose *cpus* of a core, or all that are free of it."""
        threads = self.free.pop(core)
        if cpus is not None and len(cpus) < len(threads):
            self.free[core] = [cpu for cpu in threads if cpu not in cpus]
            threads = list(cpus)
        self.chosen += threads
        self.need -= len(threads)
        self.node_free[self.machine.node_of[core]] -= len(threads)
        self.package_free[self.machine.package_of[core]] -= len(threads)

    def take_groups(self, order: Iterable[int], group_of: Sequence[int], size: Sequence[int]) -> None:
        """Choose whole nodes, packages or caches: those entirely free and no larger than the need."""
        members = self.members(group_of)
        for group in order:
            cores = members.get(group, ())
            if size[group] <= self.need and sum(len(self.free[core]) for core in cores) == size[group]:
                for core in cores:
                    self.take(core)

    def members(self, group_of: Sequence[int]) -> dict[int, list[int]]:
        """The cores with a free pCPU, by group, in no order to rely on."""
        members: dict[int, list[int]] = {}
        for core in self.free:
            group = group_of[core]
            if group in members:
                members[group].append(core)
            else:
                members[group] = [core]
        return members

    def _nested(
        self, outer: tuple[Sequence[int], Sequence[int]], inner: tuple[Sequence[int], Sequence[int]]
    ) -> list[int]:
        # The inner groups of each outer one, both in order; one that reaches into two counts for the first.
        (outer_of, outer_free), (inner_of, inner_free) = outer, inner
        within: dict[int, dict[int, None]] = {}
        for core in self.free:
            within.setdefault(outer_of[core], {})[inner_of[core]] = None
        order: dict[int, None] = {}
        for group in sorted(sorted(within), key=outer_free.__getitem__):
            for one in sorted(sorted(within[group]), key=inner_free.__getitem__):
                order[one] = None
        return list(order)

    def _plain(self, group_of: Sequence[int], group_free: Sequence[int]) -> list[int]:
        return sorted(sorted({group_of[core] for core in self.free}), key=group_free.__getitem__)

    def nodes(self) -> list[int]:
        """The nodes with a free pCPU, in order."""
        nodes, packages = (self.machine.node_of, self.node_free), (self.machine.package_of, self.package_free)
        return self._plain(*nodes) if self.nodes_outside else self._nested(packages, nodes)

    def packages(self) -> list[int]:
        """The packages with a free pCPU, in order."""
        nodes, packages = (self.machine.node_of, self.node_free), (self.machine.package_of, self.package_free)
        return self._nested(nodes, packages) if self.nodes_outside else self._plain(*packages)

    def cores(self) -> Iterator[int]:
        """The cores with a free pCPU: in order of the inner of node and package, then of their own."""
        inner = self.machine.package_of if self.nodes_outside else self.machine.node_of
        order = self.packages() if self.nodes_outside else self.nodes()
        members = self.members(inner)
        for group in order:
            yield from sorted(sorted(members[group]), key=lambda core: len(self.free[core]))

    def take_node_and_package(self) -> None:
        """Choose whole nodes and packages, the outer of the two first."""
        for nodes in (self.nodes_outside, not self.nodes_outside):
            if nodes:
                self.take_groups(self.nodes(), self.machine.node_of, self.machine.node_size)
            else:
                self.take_groups(self.packages(), self.machine.package_of, self.machine.package_size)

    def take_cores(self) -> None:
        """Choose entirely free cores no larger than the need."""
        sizes = self.machine.cores
        for core in self.cores():
            if not self.need:
                break
            if len(self.free[core]) == len(sizes[core]) <= self.need:
                self.take(core)

    def take_threads(self) -> None:
        """Choose threads, a core after the other."""
        for core in self.cores():
            if not self.need:
                break
            self.take(core, self.free[core][: self.need])


def _by_policy(
    machine: _Machine, cpus: Sequence[int], need: int, request: Request, unit: int = 1
) -> tuple[list[int], list[str]]:
    # cpus is ascending and has more than enough; under "whole" all of them are of whole cores.
    whole, policy = request.smt == "whole", request.policy
    if policy == "first-fit":
        return _first_fit(machine, cpus, need, whole), []
    if policy == "numa-spread":
        return _numa_spread(machine, cpus, need, unit)
    if policy == "spread" and not whole:
        return _spread(machine, cpus, need, request.smt == "shared"), []
    pool = _Pool(machine, cpus, need)
    pool.take_node_and_package()
    if policy == "llc":
        _take_caches(pool)
    pool.take_cores()
    pool.take_threads()
    return pool.chosen, []


def _first_fit(machine: _Machine, cpus: Sequence[int], need: int, whole: bool) -> list[int]:
    if not whole:
        return list(cpus[:need])
    chosen: list[int] = []
    for cpu in cpus:
        threads = machine.cores[machine.core_of[cpu]]
        if cpu == threads[0] and len(threads) <= need - len(chosen):
            chosen += threads
    return chosen


def _spread(machine: _Machine, cpus: Sequence[int], need: int, shared: bool) -> list[int]:
    # kubelet takes whole nodes and packages as packed does, then a package's pCPUs by number,
    # trusting that Linux numbers first threads before second ones. Where that isn't so, as with
    # siblings 0 and 1, or where cores are partly in use, the n-th free thread of each core comes
    # before the n+1-th of any. Machines with three and more threads numbered apart (Xeon Phi)
    # follow kubelet to the letter when cores may be shared.
    pool = _Pool(machine, cpus, need)
    pool.take_node_and_package()
    by_number = shared and machine.threads > 2 and machine.numbered_apart
    members = pool.members(machine.package_of)
    chosen = pool.chosen
    for package in pool.packages():
        if len(chosen) >= need:
            break
        ranked = [
            (0 if by_number else rank, cpu) for core in members[package] for rank, cpu in enumerate(pool.free[core])
        ]
        chosen += [cpu for _, cpu in sorted(ranked)[: need - len(chosen)]]
    return chosen


def _take_caches(pool: _Pool) -> None:
    # Whole caches; then, in the order that stood before, the first cache whose lowest cores with a
    # free thread make up the need exactly (save threads of the last). kubelet looks no further
    # than those cores, and tries no second split.
    machine = pool.machine
    if not pool.need:
        return
    cache_free = [0] * len(machine.cache_size)
    for core, threads in pool.free.items():
        cache_free[machine.cache_of[core]] += len(threads)
    within: dict[int, dict[int, None]] = {}
    for core in pool.free:
        within.setdefault(machine.node_of[core], {})[machine.cache_of[core]] = None
    order: dict[int, None] = {}
    for node in pool.nodes():
        for cache in sorted(sorted(within[node]), key=cache_free.__getitem__):
            order[cache] = None
    pool.take_groups(order, machine.cache_of, machine.cache_size)
    if not pool.need:
        return
    members = pool.members(machine.cache_of)
    many = -(-pool.need // machine.threads)
    for cache in order:
        cores = sorted(members.get(cache, ()))[:many]
        threads = sorted(cpu for core in cores for cpu in pool.free[core])
        if len(threads) >= pool.need:
            keep = set(threads[: pool.need])
            for core in cores:
                pool.take(core, [cpu for cpu in pool.free[core] if cpu in keep])
            return


# --- numa-spread -------------------------------------------------------------------------------

# How many nodes _split() looks at, counted once for each set that they are in. That is every set,
# and so kubelet's answer, on any machine of up to 8 nodes, and on larger ones where neighbours in
# the order have as many free pCPUs as each other. Beyond, it ends with the best set seen or the
# fullest nodes, whichever leaves the machine more even: kubelet's own search doubles with each node.
_EFFORT = 12_000


def _numa_spread(machine: _Machine, cpus: Sequence[int], need: int, unit: int) -> tuple[list[int], list[str]]:
    pool = _Pool(machine, cpus, need)
    nodes = pool.nodes()
    # How many nodes it takes at least, as kubelet reckons: by what a node has on average, in use or not.
    groups, all_groups = need // unit, -(-len(machine.online) // unit)
    per_node = -(-all_groups // len(machine.node_size))
    split = _split(
        [pool.node_free[node] for node in nodes], need, unit, -(-groups // per_node), min(groups, len(nodes))
    )
    if split is None:
        pool.take_node_and_package()
        pool.take_cores()
        pool.take_threads()
        return pool.chosen, ["no even split over NUMA nodes fits, so they are filled one after the other"]
    share, combo, extra = split
    of_node: dict[int, list[int]] = {}
    for cpu in cpus:
        of_node.setdefault(machine.node_of[machine.core_of[cpu]], []).append(cpu)
    chosen: list[int] = []
    for number in combo:
        for want in (share, *[unit] * extra.get(number, 0)):
            here = _Pool(machine, of_node[nodes[number]], want)
            here.take_node_and_package()
            here.take_cores()
            here.take_threads()
            chosen += here.chosen
            used = set(here.chosen)
            of_node[nodes[number]] = [cpu for cpu in of_node[nodes[number]] if cpu not in used]
    return chosen, []


def _split(
    free: Sequence[int], need: int, unit: int, low: int, high: int
) -> tuple[int, list[int], dict[int, int]] | None:
    """Share *need* pCPUs, in groups of *unit*, evenly among the fewest nodes that can.

    Of the sets of so many nodes it takes the one that leaves the machine's nodes most evenly
    free, the first of equals in the order of *free* (KEP-2902).

    :param free: free pCPUs by node, in kubelet's order
    :param low, high: how many nodes to try, in kubelet's reckoning
    :return: what each node gives; the nodes, by index; and the groups that some give on top
    """
    for many in range(low, high + 1):
        share = need // unit // many * unit
        groups = (need - share * many) // unit
        fit = [node for node, count in enumerate(free) if count >= share]
        fullest = sorted(sorted(fit, key=lambda node: -free[node])[:many])
        # What the fullest can't give, no others can.
        if len(fullest) < many or sum(free[node] // unit for node in fullest) * unit < need:
            continue
        evenness = _Evenness(free, need)
        base = sum(count * count for count in free)
        best: tuple[float, list[int], dict[int, int]] | None = None
        effort = _EFFORT
        for combo in _subsets(fit, free, many):
            if (best is not None and best[0] == 0) or effort <= 0:
                break
            effort -= len(fit)
            if sum(free[node] // unit for node in combo) * unit < need:
                continue
            squares = base - sum(share * (2 * free[node] - share) for node in combo)
            left = {node: free[node] - share for node in combo}
            able = [node for node in combo if left[node] >= unit]
            local: tuple[float, list[int], dict[int, int]] | None = None
            # The more nodes give the rest the better, kubelet finds: so from the most down to one.
            for givers in range(len(able), 0, -1) if groups else (0,):
                for subset in _subsets(able, left, givers):
                    effort -= len(able)
                    score, extra = _evened(evenness, squares, left, subset, groups, unit)
                    if extra is not None and (local is None or score < local[0]):
                        local = score, combo, extra
                    if effort <= 0:
                        break
                if effort <= 0:
                    break
            if local is not None and (best is None or local[0] < best[0]):
                best = local
        if effort <= 0:
            left = {node: free[node] - share for node in fullest}
            giving = sorted(sorted(fullest, key=lambda node: -left[node])[:groups])
            squares = base - sum(share * (2 * free[node] - share) for node in fullest)
            score, extra = _evened(evenness, squares, left, giving, groups, unit)
            if extra is None:
                giving = [node for node in fullest if left[node] >= unit]
                score, extra = _evened(evenness, squares, left, giving, groups, unit)
            if extra is not None and (best is None or score < best[0]):
                best = score, fullest, extra
        if best is not None:
            return share, best[1], best[2]
    return None


class _Evenness:
    """The standard deviation of what nodes have left, from its sum of squares, to kubelet's three decimals."""

    def __init__(self, free: Sequence[int], need: int) -> None:
        self.nodes = len(free)
        self.sum = sum(free) - need
        self.mean = int(self.sum / self.nodes * 1000 + 0.5) / 1000

    def of(self, squares: int) -> float:
        variance = (squares - 2 * self.mean * self.sum + self.nodes * self.mean * self.mean) / self.nodes
        return int(max(variance, 0.0) ** 0.5 * 1000 + 0.5) / 1000


def _evened(
    evenness: _Evenness, squares: int, left: Mapping[int, int], givers: Sequence[int], groups: int, unit: int
) -> tuple[float, dict[int, int] | None]:
    # Take the groups from the givers in turn, and tell how even that leaves all nodes.
    extra: dict[int, int] = {}
    if len(givers) >= groups:
        for node in givers[:groups]:
            if left[node] < unit:
                return 0.0, None
            squares -= unit * (2 * left[node] - unit)
            extra[node] = 1
        return evenness.of(squares), extra
    if sum(left[node] // unit for node in givers) < groups:
        return 0.0, None
    while groups:
        for node in givers:
            given = extra.get(node, 0)
            rest = left[node] - given * unit
            if groups and rest >= unit:
                squares -= unit * (2 * rest - unit)
                extra[node] = given + 1
                groups -= 1
    return evenness.of(squares), extra


def _subsets(nodes: Sequence[int], count: Mapping[int, int] | Sequence[int], many: int) -> Iterator[list[int]]:
    # Subsets of *many* nodes in lexicographic order, without those that differ from an earlier
    # one only by neighbours with the same count, since they come out alike.
    runs: list[list[int]] = []
    for node in nodes:
        if runs and count[runs[-1][0]] == count[node]:
            runs[-1].append(node)
        else:
            runs.append([node])
    taken = [0] * len(runs)
    at, short = 0, many
    while True:
        while short and at < len(runs):
            taken[at] = min(short, len(runs[at]))
            short -= taken[at]
            at += 1
        if short:
            return
        yield [node for run, number in zip(runs, taken, strict=True) for node in run[:number]]
        # Back to the last run that can give one up to those after it.
        short = room = 0
        for at in range(len(runs) - 1, -1, -1):
            if taken[at] and room > short:
                break
            short += taken[at]
            room += len(runs[at])
            taken[at] = 0
        else:
            return
        taken[at] -= 1
        short += 1
        at += 1


# --- explicit lists ----------------------------------------------------------------------------


def _place_explicit(machine: _Machine, topology: Topology, supply: Supply, request: Request) -> Placement:
    wanted, blocks = request.pcpus, []
    seen: set[int] = set()
    twice = sorted({cpu for cpu in wanted if cpu in seen or seen.add(cpu)})  # type: ignore[func-returns-value]
    if twice:
        blocks.append(f"listed more than once: pCPU {_list(twice)}")
    known = {pcpu.cpu for pcpu in topology.pcpus}
    absent = sorted(seen - known)
    if absent:
        blocks.append(f"not on this machine: pCPU {_list(absent)}")
    real = _cpuset(cpu for cpu in seen if cpu in known)
    blocks += _held(machine, topology, supply, real - _given(supply))
    if request.kind is not None and real - machine.kinds.get(request.kind, CpuSet()):
        other = real - machine.kinds.get(request.kind, CpuSet())
        blocks.append(f"not of kind {request.kind!r}: pCPU {other}" if machine.kinds else _no_kinds())
    if request.smt != "shared":
        used = {machine.core_of[cpu] for cpu in _cpus(real & machine.online)}
        siblings = _cpuset(cpu for core in used for cpu in machine.cores[core]) - real
        if request.smt == "exclusive" and siblings & supply.taken:
            blocks.append(f"cores shared with another VM: it holds pCPU {siblings & supply.taken}")
        if request.smt == "whole" and siblings:
            blocks.append(f"cores not filled: pCPU {siblings} would be left over")
    if blocks and _has_one(topology, supply):
        raise DoesNotFit(request.count, _given(supply), [*blocks, _ONE], _MORE)
    if blocks:
        offer = _Offer(machine, supply, request)
        raise DoesNotFit(request.count, _given(supply), blocks, _fits_explicit(offer))
    why = [f"on the pCPUs that were asked for: {_list(wanted)}"]
    if real & supply.avoid:
        why.append(f"tasks of others are pinned to pCPU {real & supply.avoid}")
    return _placement(machine, supply, request, wanted, why)


def _fits_explicit(offer: _Offer) -> str:
    choice = _cpuset(cpu for _, cpus in offer.layers for cpu in cpus)
    if not choice:
        return _nothing()
    if offer.request.smt == "whole":
        return f"list whole cores of pCPU {choice}"
    return f"list pCPUs of {choice}"


def _list(cpus: Iterable[int]) -> str:
    return ",".join(map(str, cpus))


# --- answers and refusals ----------------------------------------------------------------------


def _placement(
    machine: _Machine, supply: Supply, request: Request, cpus: Sequence[int], why: Sequence[str]
) -> Placement:
    idle = shares = CpuSet()
    why = list(why)
    if request.smt == "exclusive":
        own = _cpuset(cpus)
        used = sorted({machine.core_of[cpu] for cpu in cpus})
        siblings = _cpuset(cpu for core in used for cpu in machine.cores[core]) - own
        idle = siblings - supply.host - supply.taken
        hosts = {machine.core_of[cpu] for cpu in _cpus(siblings & supply.host)}
        shares = _cpuset(cpu for cpu in cpus if machine.core_of[cpu] in hosts)
        if shares:
            why.append(f"pCPU {shares} shares a core with the host: too few cores without one of its pCPUs")
            if request.pcpus:
                why[-1] = f"pCPU {shares} shares a core with the host"
        if idle:
            why.append(f"pCPU {idle} stays idle: no other VM may use these cores")
    return Placement(tuple(cpus), idle, shares, tuple(why))


def _where(machine: _Machine, policy: str, cpus: Sequence[int]) -> str:
    cores = {machine.core_of[cpu] for cpu in cpus}
    nodes = len({machine.node_of[core] for core in cores})
    said = f"{policy}: {_counted(len(cpus), 'pCPU')} on {_counted(len(cores), 'core')}"
    return f"{said} of {_counted(nodes, 'NUMA node')}" if len(machine.node_size) > 1 else said


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _held(machine: _Machine, topology: Topology, supply: Supply, cpus: CpuSet) -> list[str]:
    # Why these pCPUs are not free, each for one reason.
    said = []
    for reason, group in (
        ("leased to other VMs", supply.taken),
        ("reserved", supply.host & supply.reserved),
        ("kept by the service VM", supply.host),
        ("offline", _all(topology) - machine.online),
        ("not usable by this process (affinity or cgroup)", _all(topology) - topology.usable),
        ("left out of the choice", cpus),
    ):
        part = cpus & group
        if part:
            said.append(f"{reason}: pCPU {part}")
            cpus -= part
    return said


def _all(topology: Topology) -> CpuSet:
    return _cpuset(pcpu.cpu for pcpu in topology.pcpus)


def _no_kinds() -> str:
    return "this machine's pCPUs have no kinds"


def _nothing() -> str:
    return "stop a VM ('hostpart ps' lists them), or let the service VM keep fewer pCPUs"


def _refusal(machine: _Machine, topology: Topology, supply: Supply, request: Request, offer: _Offer) -> DoesNotFit:
    count, free = request.count, _given(supply)
    blocks = _held(machine, topology, supply, _all(topology) - free)
    allowed = free & machine.online
    if request.kind is not None:
        of_kind = machine.kinds.get(request.kind, CpuSet())
        if not machine.kinds:
            blocks.append(_no_kinds())
        elif not of_kind:
            blocks.append(f"no pCPU is of kind {request.kind!r}, there are {', '.join(machine.kinds)}")
        elif allowed - of_kind:
            blocks.append(f"not of kind {request.kind!r}: pCPU {allowed - of_kind}")
        allowed &= of_kind
    barred = allowed - _cpuset(cpu for _, cpus in offer.layers for cpu in cpus)
    if request.smt == "whole":
        if barred:
            blocks.append(f"cores not wholly free: pCPU {barred}")
        if count % offer.unit:
            blocks.append(f"{count} is not a multiple of {offer.unit}, the threads of a core")
    elif barred:
        blocks.append(f"cores shared with another VM: pCPU {barred}")
    if _has_one(topology, supply):
        return DoesNotFit(count, free, [*blocks, _ONE], _MORE)
    return DoesNotFit(count, free, blocks, _fits(machine, supply, request, offer))


def _has_one(topology: Topology, supply: Supply) -> bool:
    return len(topology.usable) == 1 and topology.usable <= supply.host


def _fits(machine: _Machine, supply: Supply, request: Request, offer: _Offer) -> str:
    said = []
    if request.kind is not None and not machine.kinds.get(request.kind):
        most = _Offer(machine, supply, request.replace(kind=None)).most
        return f"leave out the kind for up to {most}" if most else _nothing()
    if offer.most:
        noun = "vCPU" if offer.most == 1 else "vCPUs"
        some = f"{offer.most}" if offer.most == offer.unit else f"{offer.most} or fewer"
        step = f", in multiples of {offer.unit}" if offer.unit > 1 else ""
        said.append(f"ask for {some} {noun}{step}")
    best = 0 if request.count % offer.unit else offer.most
    for smt in _LOOSER[request.smt]:
        most = _Offer(machine, supply, request.replace(smt=smt)).most
        if most > best:
            said.append(f"use --smt {smt} for up to {most}")
            best = most
    return ", or ".join(said) or _nothing()
