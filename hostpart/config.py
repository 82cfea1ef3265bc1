"""Scenario files: TOML text to typed values, every fault at once and each led by its key.

``hostpart run`` builds the same values from its options, so importing this costs little.
Whether a scenario fits the host is for the allocator to say; whether a user, a program or a
directory exists, for the launch.
"""

from __future__ import annotations

import os

from .allocator import POLICIES, SMT_MODES, Request
from .cpuset import MAX_CPUS, CpuSet
from .errors import ConfigError
from .isolation import LEVELS
from .toml_table import (
    Faults,
    Table,
    names_in,
    one_of,
    read_argv,
    read_flag,
    read_named,
    read_number,
    read_text,
    read_toml,
    read_whole,
    shown,
)
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .qemu.config import QemuGuest

__all__ = [
    "DRIFT_ANSWERS",
    "GUEST_KINDS",
    "ISOLATION_LEVELS",
    "PCPU_KINDS",
    "SCHED_POLICIES",
    "SERVICE_VM_NAME",
    "Guest",
    "Part",
    "Scenario",
    "ServiceVm",
    "VmConfig",
    "check_name",
    "example_names",
    "load_scenario",
    "parse_scenario",
    "parse_sched",
]

GUEST_KINDS = ("command", "smp", "python", "qemu")
ISOLATION_LEVELS = LEVELS
DRIFT_ANSWERS = ("warn", "repin", "kill")
RELEASES = ("worker", "hotplug")  # its worker ends; the CPU goes offline and online too, as launch_uos.sh did it
PCPU_KINDS = ("performance", "efficiency")  # of a hybrid machine, as the topology names them
SCHED_POLICIES = ("other", "batch", "idle", "fifo", "rr")
SERVICE_VM_NAME = "vm0"

_EXAMPLES = os.path.join(os.path.dirname(__file__), "examples")
_LOWER, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


class Guest(Value):
    """What runs on a VM's vCPUs.

    :ivar kind: one of :data:`GUEST_KINDS`: ``command`` is exec'd once per vCPU, ``smp`` once
        over all the VM's pCPUs, ``python`` is called in each worker, ``qemu`` is one machine whose vCPUs are threads
    :ivar argv: program and arguments (``command`` and ``smp``); no shell reads them
    :ivar target: ``"package.module:function"`` (``python``)
    :ivar cwd: where it starts; ``None``: where hostpart was started
    :ivar env: names and values laid over the caller's environment
    :ivar qemu: the machine (``qemu``)
    """

    kind: str
    argv: tuple[str, ...] = ()
    target: str = ""
    cwd: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    qemu: QemuGuest | None = None

    @property
    def shared(self) -> bool:
        """Whether one process carries all its vCPUs."""
        return self.kind in ("smp", "qemu")


class Part(Value):
    """A run of a VM's vCPUs that have one guest.

    :ivar first: the first one's number in the VM
    """

    guest: Guest
    first: int
    count: int

    @property
    def vcpus(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.count)


class VmConfig(Value):
    """One user VM as it was asked for.

    :ivar vcpus: how many; 0 stands for ``"rest"``: what is left when every other VM has its own
    :ivar pcpus: Linux CPU numbers, vCPU i on the i-th; empty: the policy chooses
    :ivar mix: how many vCPUs have which guest, in their order, where they are not all one's; *guest* is the first then
    :ivar kind: only pCPUs of this kind, one of :data:`PCPU_KINDS`; ``None``: of any
    :ivar scope: whose tasks may be moved for that, as :func:`hostpart.isolation.scope.parse` reads it; empty: the
        default
    :ivar require: whether a level below ``isolation`` is an error
    :ivar mems: NUMA nodes that the guest's memory is bound to; empty: not bound
    :ivar on_drift: what to do when a vCPU leaves its pCPU, one of :data:`DRIFT_ANSWERS`
    :ivar foreign_limit: percent of a pCPU's time that may go to others before the verdict is tainted
    :ivar user: name or number of the user the guest runs as; ``None``: the caller
    :ivar group: likewise, of its group
    :ivar sched: one of :data:`SCHED_POLICIES`
    :ivar priority: 1 to 99 for ``fifo`` and ``rr``, else 0
    :ivar nice: -20 to 19; ``None``: the caller's
    :ivar mlock: whether the guest's memory is locked in RAM
    """

    name: str
    guest: Guest
    vcpus: int = 0
    pcpus: tuple[int, ...] = ()
    policy: str = Request.policy
    smt: str = Request.smt
    kind: str | None = None
    isolation: str = "affinity"
    scope: str = ""
    require: bool = False
    mems: CpuSet = CpuSet()
    on_drift: str = "warn"
    foreign_limit: float = 1.0
    user: str | None = None
    group: str | None = None
    sched: str = "other"
    priority: int = 0
    nice: int | None = None
    mlock: bool = False
    mix: tuple[tuple[int, Guest], ...] = ()

    def parts(self, vcpu_num: int) -> tuple[Part, ...]:
        """Return which guest is on which of the VM's *vcpu_num* vCPUs."""
        parts: list[Part] = []
        for count, guest in self.mix or ((vcpu_num, self.guest),):
            parts.append(Part(guest, sum(part.count for part in parts), count))
        return tuple(parts)

    @property
    def guests(self) -> tuple[Guest, ...]:
        """Its guests, in the order of their vCPUs."""
        return tuple(guest for _, guest in self.mix) or (self.guest,)

    @property
    def threaded(self) -> bool:
        """Whether some of its vCPUs are threads of a process whose other threads stay with the host."""
        return any(guest.kind == "qemu" for guest in self.guests)


class ServiceVm(Value):
    """What the service VM holds on to when it releases pCPUs.

    :ivar keep: how many pCPUs it keeps, at least one (the lowest usable, unless listed)
    :ivar keep_cpus: which ones, where listed; ``keep`` is then their number
    :ivar reserve: pCPUs that no VM is given
    :ivar release: one of :data:`RELEASES`: how a pCPU leaves the service VM
    """

    keep: int = 1
    keep_cpus: CpuSet = CpuSet()
    reserve: CpuSet = CpuSet()
    release: str = "worker"


class Scenario(Value):
    """One scenario file.

    :ivar source: the file's name as the user gave it, for messages
    :ivar vms: in the file's order, which is the order in which they are created
    """

    source: str
    vms: tuple[VmConfig, ...]
    service: ServiceVm = ServiceVm()

    @property
    def explicit(self) -> CpuSet:
        """The pCPUs (Linux numbers) that its VMs name themselves."""
        return CpuSet.of(pcpu for vm in self.vms for pcpu in vm.pcpus)


def check_name(name: str) -> str:
    """Return *name* if a user VM may be called that.

    :raises ValueError: saying what a name may look like
    """
    if not 0 < len(name) <= 63 or name[0] in "._-" or name.strip(_LOWER + _DIGITS + "._-"):
        raise ValueError(
            "a VM's name has 1 to 63 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit, "
            f"got {shown(name)}"
        )
    if name == SERVICE_VM_NAME:
        raise ValueError(f"{name!r} is the service VM's own name")
    return name


def parse_sched(text: str) -> tuple[str, int]:
    """Return the scheduling policy and priority of ``"other"``, ``"batch"``, ``"idle"``, ``"fifo:N"`` or ``"rr:N"``.

    :return: one of :data:`SCHED_POLICIES`, and 1 to 99 for the two real-time ones, else 0
    :raises ValueError: saying what was wanted

    Source: sched(7), "Scheduling policies".
    """
    policy, colon, number = text.partition(":")
    if policy not in SCHED_POLICIES or (colon and not (0 < len(number) <= 2 and not number.strip(_DIGITS))):
        raise ValueError(f"want other, batch, idle, fifo:N or rr:N with N from 1 to 99, got {shown(text)}")
    priority = int(number or 0)
    if policy not in ("fifo", "rr"):
        if number:
            raise ValueError(f"{policy} takes no priority, got {shown(text)}; want {policy} alone, or fifo:N or rr:N")
    elif not priority:
        raise ValueError(f"{policy} needs a priority from 1 to 99, such as {policy}:50, got {shown(text)}")
    return policy, priority


def example_names() -> tuple[str, ...]:
    """Return the names of the scenarios that come with hostpart, sorted, without their prefix."""
    return names_in(_EXAMPLES)


def load_scenario(name: str) -> Scenario:
    """Read a scenario file, or one of hostpart's own as ``example:NAME``.

    :raises ConfigError: where it cannot be read, or with all its faults
    """
    return parse_scenario(read_named(name, _EXAMPLES, "example"), name)


def parse_scenario(text: str | bytes, source: str) -> Scenario:
    """Return the scenario that *text* describes.

    :param source: where it came from, for messages
    :raises ConfigError: with every fault, in the file's order of VMs (the first hundred), and
        nothing else, whatever *text* holds
    """
    faults = Faults(source)
    top = Table("", read_toml(text, source), faults)
    service = _read_service(top)
    vms = _read_vms(top)
    top.refuse_others()
    _check_claims(service, vms, faults)
    if faults.found:
        raise ConfigError(source, faults.found)
    return Scenario(source, tuple(vm for _, vm in vms), service)


def _read_service(top: Table) -> ServiceVm:
    table = top.table("service")
    kept = table.read("keep", _keep, 1)
    reserve = table.read("reserve", _cpu_set, CpuSet())
    release = table.read("release", one_of(RELEASES), ServiceVm.release)
    table.refuse_others()
    if isinstance(kept, CpuSet):
        return ServiceVm(len(kept), kept, reserve, release)
    return ServiceVm(kept, CpuSet(), reserve, release)


def _read_vms(top: Table) -> list[tuple[int, VmConfig]]:
    # With their index in the file, since a VM without a usable name is left out.
    tables = top.take("vm")
    if tables is None or tables == []:
        top.fault("vm", "want at least one user VM, each under [[vm]]")
    elif isinstance(tables, dict):
        top.fault("vm", "want each user VM under [[vm]], got [vm]")
    elif not isinstance(tables, list):
        top.fault("vm", f"want each user VM under [[vm]], got {shown(tables)}")
    else:
        vms = []
        for index, table in enumerate(tables):
            if isinstance(table, dict):
                vms.append((index, _read_vm(Table(f"vm[{index}]", table, top.faults))))
            else:
                top.faults.note(f"vm[{index}]: want a table, got {shown(table)}")
        return vms
    return []


def _read_vm(table: Table) -> VmConfig:
    if "name" not in table.rest:
        table.fault("name", "is missing")
    name = table.read("name", _vm_name, "")
    vcpus, pcpus = _read_count(table)
    guest, mix = _read_guests(table, vcpus)
    sched, priority = table.read(
        "sched", lambda value: parse_sched(read_text(value)), (VmConfig.sched, VmConfig.priority)
    )
    vm = VmConfig(
        name=name,
        guest=guest,
        vcpus=vcpus,
        pcpus=pcpus,
        policy=table.read("policy", one_of(POLICIES), VmConfig.policy),
        smt=table.read("smt", one_of(SMT_MODES), VmConfig.smt),
        kind=table.read("kind", one_of(PCPU_KINDS), VmConfig.kind),
        isolation=table.read("isolation", one_of(ISOLATION_LEVELS), VmConfig.isolation),
        scope=table.read("scope", _scope, VmConfig.scope),
        mems=table.read("mems", _cpu_set, VmConfig.mems),
        require=table.read("require", read_flag, VmConfig.require),
        on_drift=table.read("on_drift", one_of(DRIFT_ANSWERS), VmConfig.on_drift),
        foreign_limit=table.read("foreign_limit", lambda value: read_number(value, 0, 100), VmConfig.foreign_limit),
        user=table.read("user", read_text, VmConfig.user),
        group=table.read("group", read_text, VmConfig.group),
        sched=sched,
        priority=priority,
        nice=table.read("nice", lambda value: read_whole(value, -20, 19), VmConfig.nice),
        mlock=table.read("mlock", read_flag, VmConfig.mlock),
        mix=mix,
    )
    table.refuse_others()
    return vm


def _read_count(table: Table) -> tuple[int, tuple[int, ...]]:
    given = [key for key in ("vcpus", "pcpus") if key in table.rest]
    # A faulty count reads as -1, which no caller sees: faults end in an error.
    vcpus = table.read("vcpus", _vcpus, -1)
    pcpus = table.read("pcpus", _pcpus, ())
    if not given:
        table.fault("vcpus", 'is missing: want vcpus = N, vcpus = "rest" or pcpus = [N, ...]')
    elif pcpus and vcpus >= 0 and vcpus != len(pcpus):
        table.fault("vcpus", f"does not agree with pcpus, which lists {len(pcpus)}; leave vcpus out")
    return len(pcpus) or vcpus, pcpus


def _read_guests(table: Table, vcpus: int) -> tuple[Guest, tuple[tuple[int, Guest], ...]]:
    several = table.take("guest")
    if several is None:
        return _read_guest(table), ()
    for kind in GUEST_KINDS:
        if table.take(kind) is not None:
            table.fault(kind, "belongs under one of [[vm.guest]] where there are such")
    if not isinstance(several, list) or not several or not all(isinstance(one, dict) for one in several):
        table.fault("guest", f"want each guest under [[vm.guest]], got {shown(several)}")
        return Guest(""), ()
    mix = []
    for index, one in enumerate(several):
        part = Table(f"{table.where}.guest[{index}]", one, table.faults)
        if "vcpus" not in part.rest:
            part.fault("vcpus", "is missing: want how many of the VM's vCPUs this guest has")
        count = part.read("vcpus", lambda value: read_whole(value, 1, MAX_CPUS), 0)
        mix.append((count, _read_guest(part)))
        part.refuse_others()
    if sum(count for count, _ in mix) != vcpus and not table.faults.found:
        rest = "the rest" if vcpus == 0 else vcpus
        table.fault("guest", f"has {sum(count for count, _ in mix)} vCPUs in all, and the VM has {rest}; want as many")
    return mix[0][1], tuple(mix)


def _read_guest(table: Table) -> Guest:
    given = [kind for kind in GUEST_KINDS if kind in table.rest]
    if not given:
        table.fault(None, f"want a guest: one of {', '.join(GUEST_KINDS)}")
    elif len(given) > 1:
        table.fault(None, f"want one guest, got {' and '.join(given)}")
    argvs = [table.read(kind, read_argv, ()) for kind in ("command", "smp")]
    target = table.read("python", _target, "")
    qemu = None
    if "qemu" in given:
        from .qemu import config as machine

        qemu = machine.read(table.table("qemu"))
    else:
        table.known.append("qemu")
    cwd = table.read("cwd", read_text, None)
    env = table.table("env")
    variables = tuple((name, env.read(name, _environment_reader(name), "")) for name in tuple(env.rest))
    return Guest(given[0] if given else "", argvs[0] or argvs[1], target, cwd, variables, qemu)


def _check_claims(service: ServiceVm, vms: list[tuple[int, VmConfig]], faults: Faults) -> None:
    """Note what two VMs, or a VM and the service VM, both ask for."""
    names: dict[str, str] = {}
    owners = dict.fromkeys(service.reserve, "reserved in [service]")
    owners.update(dict.fromkeys(service.keep_cpus, "kept by the service VM"))
    rest = ""
    for index, vm in vms:
        where = f"vm[{index}]"
        if vm.name and names.setdefault(vm.name, where) != where:
            faults.note(f"{where}.name: {vm.name!r} is {names[vm.name]}'s name already")
        if service.release == "hotplug" and vm.isolation == "affinity":
            faults.note(
                f'{where}.isolation: want "sweep" or more with [service] release = "hotplug": a task that is pinned to '
                "one CPU loses its pin for good when that CPU goes offline, so tasks must be moved first"
            )
        for cpu in vm.pcpus:
            if owners.setdefault(cpu, f"{where}'s") != f"{where}'s":
                faults.note(f"{where}.pcpus: pCPU {cpu} is {owners[cpu]} already")
        if vm.vcpus == 0:
            if rest:
                faults.note(f'{where}.vcpus: {rest} has "rest" already, which leaves nothing')
            rest = rest or where


# Readers of one value: what it means, or a ValueError with one argument for each fault.


def _scope(value: object) -> str:
    from .isolation.scope import parse

    text = read_text(value)
    parse(text)
    return text


def _vm_name(value: object) -> str:
    return check_name(read_text(value))


def _vcpus(value: object) -> int:
    if value == "rest":
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'want a whole number from 1, or "rest", got {shown(value)}')
    if value < 1:
        raise ValueError(f"want a whole number from 1, got {shown(value)}")
    return read_whole(value, 1, MAX_CPUS)


def _cpu_set(value: object) -> CpuSet:
    if not isinstance(value, str):
        raise ValueError(f'want a CPU list such as "0-2,8", got {shown(value)}')
    try:
        return CpuSet.parse(value)
    except ValueError as error:
        problem = str(error)
        raise ValueError(problem if len(problem) < 200 else f"is not a CPU list: {shown(value)}") from None


def _keep(value: object) -> int | CpuSet:
    if isinstance(value, str):
        cpus = _cpu_set(value)
        if not cpus:
            raise ValueError("want at least one CPU: the service VM never runs without")
        return cpus
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'want a whole number from 1, or a CPU list such as "0-1", got {shown(value)}')
    return read_whole(value, 1, MAX_CPUS)


def _pcpus(value: object) -> tuple[int, ...]:
    if isinstance(value, str):
        cpus = tuple(_cpu_set(value))
    elif isinstance(value, list):
        wrong = [
            f"want CPU numbers from 0 to {MAX_CPUS - 1}, got {shown(cpu)} in place {place}"
            for place, cpu in enumerate(value)
            if isinstance(cpu, bool) or not isinstance(cpu, int) or not 0 <= cpu < MAX_CPUS
        ]
        if wrong:
            raise ValueError(*wrong)
        cpus = tuple(value)
        seen: set[int] = set()
        twice = CpuSet.of(cpu for cpu in cpus if cpu in seen or seen.add(cpu))  # type: ignore[func-returns-value]
        if twice:
            raise ValueError(f"lists pCPU {twice} more than once; each vCPU needs one of its own")
    else:
        raise ValueError(f'want a list of CPU numbers, or a CPU list such as "3,5", got {shown(value)}')
    if not cpus:
        raise ValueError("want at least one CPU, got none")
    return cpus


def _target(value: object) -> str:
    text = read_text(value)
    module, _, function = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ValueError(f'want "package.module:function", got {shown(value)}')
    return text


def _environment_reader(name: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not name or "=" in name or "\0" in name:
            raise ValueError("is no name for an environment variable: it is empty, or holds '=' or NUL")
        if name.startswith("HOSTPART_") and not name.startswith("HOSTPART_PROBE_"):
            raise ValueError("is set by hostpart itself")
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"want text{' without NUL' if isinstance(value, str) else ''}, got {shown(value)}")
        return value

    return read
