"""The guests' pCPUs as exclusive cpusets of a version 1 hierarchy, on hosts that have the controller there.

There is one cpuset ``hostpart``, the home, with all pCPUs that VMs hold, exclusive and without load balancing, and in
it one cpuset per VM, named by the VM's token. Beside it is ``hostpart.system`` with all other CPUs, and every task of
the root cpuset that can be moved is moved there; from then on the kernel refuses to let one of them run on the home's
CPUs. Tasks that stay are the kernel's own: kthreadd and those bound to their CPUs. Cpusets of others are not touched.

All follows from the VMs that hold pCPUs now; the ledger has one entry, made before the first write. Moving a task
gives it all CPUs of its new cpuset: what masks tasks had is :mod:`hostpart.isolation.affinity`'s to put back. Where
all CPUs of a cpuset go offline the kernel moves its tasks into the one above, and that is not undone here.

Source: Documentation/admin-guide/cgroup-v1/cpusets.rst.
"""

from __future__ import annotations

import errno
import os

from ..cpuset import CpuSet
from ..errors import as_root
from ..ledger import Known
from .cgroup_files import (
    Obstacle,
    Refused,
    below,
    children,
    cpus,
    kill,
    make,
    masks,
    mounts,
    ours,
    read,
    remove,
    set_masks,
    until,
    words,
    write,
)
from .level import at_least

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..host import Host
    from ..ledger import Holding, Ledger

__all__ = [
    "UNIFIED",
    "Obstacle",
    "check",
    "handed_over",
    "held",
    "leaf",
    "leave",
    "mounted",
    "obstacle",
    "remembered",
    "rewrites",
    "settle",
    "threads",
    "watch_files",
    "wide",
]

UNIFIED = False  # a VM's cgroup can be entered, and neither frozen nor killed whole

_KEY = "cpuset1:"  # and the hierarchy's directory; baseline: the root's sched_load_balance
_HOME = "hostpart"
_SYSTEM = "hostpart.system"
_CPU = "sys/devices/system/cpu"
_KILL_S = 5.0  # for killed guests to be gone
_PASSES = 20  # over tasks that fork while they are moved


# -- looking -------------------------------------------------------------------------------------------


def mounted(host: Host) -> bool:
    """Whether the cpuset controller is in a version 1 hierarchy that this process sees."""
    return _base(host) is not None


def obstacle(host: Host, ledger: Ledger, wanted: CpuSet, *, threaded: bool = False) -> Obstacle | None:  # noqa: ARG001
    """Say what stands in the way of exclusive cpusets of *wanted*, if anything does. Nothing is changed.

    :param wanted: all pCPUs (Linux numbers) that VMs would hold, running ones included; empty: not known yet
    :param threaded: as version 2's; here each thread has a cpuset of its own anyway
    """
    base = _base(host)
    if base is None:
        return Obstacle("the cpuset controller is in no version 1 hierarchy", "see /proc/self/mountinfo")
    if not host.exists(f"{base}/release_agent"):
        return Obstacle(f"this is a container: /{base} is not the hierarchy's root", "run it on the host")
    if any(mount.readonly for mount in mounts(host) if mount.directory == base):
        return Obstacle(f"/{base} is mounted read-only", f"mount -o remount,rw /{base}")
    if not ours(host, base, f"{base}/tasks", f"{base}/cpuset.sched_load_balance"):
        return Obstacle(f"/{base} can't be written by uid {os.geteuid()}", as_root())
    known = _KEY + base in ledger.known(tasks=False)
    for name in (_HOME, _SYSTEM):
        if not known and host.exists(f"{base}/{name}"):
            return Obstacle(
                f"there is a cpuset /{base}/{name} that this ledger ({ledger.path}) knows nothing of",
                f"end what runs in it, and remove it: 'rmdir /{base}/{name}/*/ /{base}/{name}'",
            )
    taken = cpus(host, f"{_CPU}/isolated") & wanted
    if taken:
        return Obstacle(
            f"CPU {taken} was set apart at boot with isolcpus=, which cpusets would undo",
            "ask for other pCPUs, or take isolcpus= off the kernel's command line and boot again",
        )
    there = cpus(host, f"{base}/cpuset.cpus")
    if wanted and not there - wanted - cpus(host, f"{_CPU}/nohz_full") - cpus(host, f"{_CPU}/isolated"):
        return Obstacle(
            f"with CPU {wanted} no CPU of {there} would be left for the host's own tasks, but such as were set apart"
            " at boot",
            f"ask for {len(there) - 1} or fewer" if len(there) > 1 else "a host with one CPU can give none away",
        )
    for name in children(host, base):
        both = cpus(host, f"{base}/{name}/cpuset.cpus") & wanted
        if both and name not in (_HOME, _SYSTEM):
            rest = cpus(host, f"{base}/{name}/cpuset.cpus") - wanted
            narrow = f"'echo {rest} > /{base}/{name}/cpuset.cpus', and the same in the cpusets in it before"
            return Obstacle(
                f"the cpuset /{base}/{name} has CPU {both}, and no exclusive one may overlap it",
                f"{narrow if rest else f'end what is in /{base}/{name}'}, or ask for other pCPUs",
            )
    return None


def handed_over(host: Host) -> bool:  # noqa: ARG001 - as version 2's
    """Whether the home is in a partition of an administrator's: never, as version 1 has no partitions to hand over."""
    return False


def held(host: Host, ledger: Ledger) -> CpuSet:
    """Return the pCPUs (Linux numbers) that the home has to itself at this moment."""
    kept = CpuSet()
    for base in _bases(ledger.known(tasks=False)):
        if _flag(host, f"{base}/{_HOME}/cpuset.cpu_exclusive"):
            kept |= cpus(host, f"{base}/{_HOME}/cpuset.cpus")
    return kept


def remembered(known: Mapping[str, Known]) -> bool:
    """Whether the ledger has something of these cpusets to be undone."""
    return bool(_bases(known))


def leaf(host: Host, token: str) -> str:
    """Return the cpuset of the VM with that *token*, relative to the host's root.

    Its guest enters by ``cgroup.procs``, and pins itself afterwards: before, the kernel refuses.

    :raises FileNotFoundError: where there is no such hierarchy
    """
    return f"{_place(host)}/{_HOME}/{token}"


def threads(host: Host, token: str) -> tuple[str, str]:
    """Return nothing that the process of threads has to enter, and the file that takes each of the threads.

    :raises FileNotFoundError: as :func:`leaf` does
    """
    return "", f"{leaf(host, token)}/tasks"


def leave(host: Host) -> str:
    """Return the file, relative to the host's root, that takes a thread out of any VM's cpuset.

    :raises FileNotFoundError: as :func:`leaf` does
    """
    return f"{_place(host)}/tasks"


def watch_files(host: Host, token: str, *, threaded: bool = False) -> list[str]:  # noqa: ARG001 - as partition's
    """Return no files: the kernel tells nobody when a version 1 cpuset changes."""
    return []


def check(host: Host, holdings: Iterable[Holding], token: str = "") -> list[str]:
    """Return what does not hold at this moment, a sentence each; empty: all cpusets are as they should be.

    :param token: of the one VM whose own cpuset is looked at, beside the home; all without it
    """
    wants = _wants(holdings)
    base = _base(host)
    if not wants:
        return []
    if base is None:
        return ["the cpuset controller's hierarchy is not mounted any more"]
    found = _faults(host, base, _union(wants))
    for name, one in wants.items():
        if token in ("", name):
            found += _child_faults(host, base, f"{base}/{_HOME}/{name}", one)
    return found


def rewrites(host: Host) -> bool:  # noqa: ARG001 - as version 2's
    """Whether the kernel may give tasks other masks for good when cpusets change: with version 1 it does."""
    return True


def wide(host: Host, holdings: Iterable[Holding]) -> tuple[str, ...]:
    """Return the masks, in list form, that the kernel may give to tasks of the host while :func:`settle` runs."""
    base = _base(host)
    if base is None:
        return ()
    after, before = _union(_wants(holdings)), cpus(host, f"{base}/{_HOME}/cpuset.cpus")
    all_cpus = {cpus(host, f"{base}/cpuset.cpus"), cpus(host, f"{_CPU}/online"), cpus(host, f"{_CPU}/possible")}
    masks = {one - less for one in all_cpus for less in (CpuSet(), before, after, before | after)}
    return tuple(sorted(str(mask) for mask in masks if mask))


# -- changing ------------------------------------------------------------------------------------------


def settle(host: Host, ledger: Ledger, holdings: Iterable[Holding]) -> list[str]:
    """Bring the cpusets to what the VMs hold; with none, take all away and leave the hierarchy as it was.

    A VM's cpuset that is there without the VM is removed, and whatever runs in it killed.

    :return: what could not be done, a sentence each
    :raises OSError: what the kernel is not known to answer here
    """
    wants, known = _wants(holdings), ledger.known(tasks=False)
    pins = masks(host, [f"{one}/tasks" for base in _bases(known) for one in below(host, f"{base}/{_HOME}")])
    try:
        if wants:
            return _set_up(host, ledger, wants, known)
        for base in _bases(known):
            _take_down(host, ledger, base, known[_KEY + base])
    except Refused as refused:
        return [str(refused)]
    finally:
        # A write to a cpuset's CPUs gives them all to every task in it.
        set_masks(host, pins)
    return []


def _set_up(host: Host, ledger: Ledger, wants: dict[str, Holding], known: Mapping[str, Known]) -> list[str]:
    base = next(iter(_bases(known)), None) or _base(host)
    if base is None:
        return ["the cpuset controller is in no version 1 hierarchy"]
    union, home, system = _union(wants), f"{base}/{_HOME}", f"{base}/{_SYSTEM}"
    if _KEY + base in known:
        for name in children(host, home):
            if name not in wants:
                _end(host, f"{home}/{name}")
    found = obstacle(host, ledger, union)
    if found is not None:
        return [found.problem]
    if _KEY + base not in known:
        ledger.remember({_KEY + base: Known(read(host, f"{base}/cpuset.sched_load_balance").strip(), ("0",))})
    # What is offline is in no cpuset of version 1; it comes back with the CPU, at the next call.
    there = cpus(host, f"{base}/cpuset.cpus")
    mems = cpus(host, f"{base}/cpuset.mems")
    make(host, system)
    make(host, home)
    # The system's first without what either has: an exclusive home can't grow over it.
    _put(host, f"{system}/cpuset.cpus", there - union - cpus(host, f"{home}/cpuset.cpus"))
    _put(host, f"{home}/cpuset.cpus", union & there)
    _put(host, f"{system}/cpuset.cpus", there - union)
    for directory in (system, home):
        _put(host, f"{directory}/cpuset.mems", mems)
    _set(host, f"{home}/cpuset.cpu_exclusive", "1")
    _set(host, f"{home}/cpuset.sched_load_balance", "0")
    _set(host, f"{base}/cpuset.sched_load_balance", "0")
    _move(host, base, system)
    problems = [] if host.rehearses else _faults(host, base, union)
    for token, one in wants.items():
        problems += _set_up_child(host, base, f"{home}/{token}", one, mems)
    return problems


def _set_up_child(host: Host, base: str, child: str, one: Holding, mems: CpuSet) -> list[str]:
    try:
        make(host, child)
        _put(host, f"{child}/cpuset.cpus", one.pcpus & cpus(host, f"{base}/cpuset.cpus"))
        _put(host, f"{child}/cpuset.mems", one.mems or mems)
        _set(host, f"{child}/cpuset.cpu_exclusive", "1")
        _set(host, f"{child}/cpuset.sched_load_balance", "0")
    except Refused as refused:
        return [str(refused)]
    return [] if host.rehearses else _child_faults(host, base, child, one)


def _take_down(host: Host, ledger: Ledger, base: str, known: Known) -> None:
    home, system = f"{base}/{_HOME}", f"{base}/{_SYSTEM}"
    if host.exists(home):
        for name in children(host, home):
            _end(host, f"{home}/{name}")
        _end(host, home)
    if host.exists(system):
        _move(host, system, base)
        remove(host, system)
    now = read(host, f"{base}/cpuset.sched_load_balance").strip()
    if now in known.ours and now != known.baseline:
        write(host, f"{base}/cpuset.sched_load_balance", known.baseline)
    ledger.forget([_KEY + base])


# Moves every thread that the kernel lets go; they fork meanwhile, so until a pass finds no new one.
def _move(host: Host, source: str, target: str) -> None:
    stay: set[str] = set()
    for _ in range(_PASSES):
        tids = [tid for tid in words(host, f"{source}/tasks") if tid not in stay]
        if not tids:
            return
        for tid in tids:
            try:
                write(host, f"{target}/tasks", tid)
            except Refused as refused:
                # EINVAL: kthreadd, and kernel threads that are bound to their CPU. Others are gone.
                if refused.number not in (errno.EINVAL, errno.ESRCH):
                    raise
                stay.add(tid)
            if host.rehearses:
                stay.add(tid)
    raise Refused(f"tasks in /{source} fork faster than they can be moved to /{target}; run it again")


def _end(host: Host, directory: str) -> None:
    def empty() -> bool:
        return kill(host, directory, "cgroup.procs")

    if not empty() and not host.rehearses and not until(empty, _KILL_S):
        raise Refused(
            f"processes in /{directory} were killed and do not end, so their pCPUs can't be given back yet;"
            f" see 'ps -o pid,stat,wchan,comm $(cat /{directory}/cgroup.procs)', and run 'hostpart restore' later"
        )
    remove(host, directory)


def _put(host: Host, name: str, wanted: CpuSet) -> None:
    if wanted and cpus(host, name) != wanted:
        write(host, name, str(wanted))


def _set(host: Host, name: str, flag: str) -> None:
    if read(host, name).strip() != flag:
        write(host, name, flag)


# -- what is wrong -------------------------------------------------------------------------------------


def _faults(host: Host, base: str, union: CpuSet) -> list[str]:
    home, system = f"{base}/{_HOME}", f"{base}/{_SYSTEM}"
    there = cpus(host, f"{base}/cpuset.cpus")
    for directory, wanted in ((home, union & there), (system, there - union)):
        if not host.exists(directory):
            return [f"the cpuset /{directory} is gone"]
        has = cpus(host, f"{directory}/cpuset.cpus")
        if has != wanted:
            return [f"/{directory} has CPU {has or 'none'} and should have {wanted or 'none'}"]
    if not _flag(host, f"{home}/cpuset.cpu_exclusive"):
        return [f"/{home} is not exclusive any more"]
    for directory in (base, home):
        if _flag(host, f"{directory}/cpuset.sched_load_balance"):
            return [f"/{directory} has its load balanced over all its CPUs again"]
    return []


def _child_faults(host: Host, base: str, child: str, one: Holding) -> list[str]:
    if not host.exists(child):
        return [f"the cpuset /{child} is gone"]
    wanted = one.pcpus & cpus(host, f"{base}/cpuset.cpus")
    if not wanted:
        return [f"CPU {one.pcpus} is offline: the kernel has moved what ran in /{child} elsewhere"]
    has = cpus(host, f"{child}/cpuset.cpus")
    if has != wanted:
        return [f"/{child} has CPU {has or 'none'} and should have {wanted}"]
    if one.mems and cpus(host, f"{child}/cpuset.mems") != one.mems:
        return [f"/{child} has memory of node {cpus(host, f'{child}/cpuset.mems') or 'none'}, not of {one.mems}"]
    return []


def _flag(host: Host, name: str) -> bool:
    return read(host, name).strip() == "1"


def _base(host: Host) -> str | None:
    for mount in mounts(host):
        if mount.kind == "cgroup" and "cpuset" in mount.options and host.exists(f"{mount.directory}/cpuset.cpus"):
            return mount.directory
    return None


def _place(host: Host) -> str:
    base = _base(host)
    if base is None:
        raise FileNotFoundError(errno.ENOENT, "the cpuset controller is in no version 1 hierarchy")
    return base


def _bases(known: Mapping[str, Known]) -> list[str]:
    return [key.removeprefix(_KEY) for key in known if key.startswith(_KEY)]


def _wants(holdings: Iterable[Holding]) -> dict[str, Holding]:
    return {one.token: one for one in holdings if at_least(one.level, "cpuset")}


def _union(wants: dict[str, Holding]) -> CpuSet:
    union = CpuSet()
    for one in wants.values():
        union |= one.released
    return union
