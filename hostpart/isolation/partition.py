"""The guests' pCPUs as isolated partitions of the cgroup v2 tree: the kernel itself keeps every other task off them.

There is one cgroup ``hostpart``, the home, an isolated partition of all pCPUs that VMs hold, and in it one isolated
partition per VM, named by the VM's token. Idle siblings belong to the home alone. An empty cgroup beside the VMs', the
guard, keeps the cpuset controller from being taken away above: the kernel refuses that while a cgroup hands it on
(systemd tries whenever it reloads).

A VM whose vCPUs are threads of a process that stays with the host has its cgroup in a second home beside the first,
``hostpart-threads``. All of it is threaded, so threads can be in it whose process is in the cgroup that the second
home is in. That one can have both kinds of cgroup in it, and processes of its own, at the tree's root only.

The home is at the tree's root. Where this process can't write there, but is somewhere below a cgroup that an
administrator has made a partition and handed over, the home is in that one.

All follows from the VMs that hold pCPUs now; the ledger has one entry, made before the first write, for what was not
there before. The files are never taken at their word: a partition's own state may say ``isolated`` while tasks of
the host run there, so it is judged by the CPUs that the cgroup above has left. What the kernel does to the masks of
tasks on the way is :mod:`hostpart.isolation.affinity`'s to put right.

Source: Documentation/admin-guide/cgroup-v2.rst, "Cpuset Interface Files".
"""

from __future__ import annotations

import errno
import os

from ..cgroup import own_cgroup
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
    "obstacle",
    "remembered",
    "rewrites",
    "settle",
    "threads",
    "watch_files",
    "wide",
]

UNIFIED = True  # a VM's cgroup is of version 2: it can be frozen and killed whole, unless it is a threaded one

_KEY = "partition:"  # and the directory that the home is in; baseline: whether the controller was handed on there
_HOME = "hostpart"
_THREADS = "hostpart-threads"
_HOMES = (_HOME, _THREADS)
_GUARD = "guard"
_ON, _OFF = "cpuset", "-"
_CPU = "sys/devices/system/cpu"
_KILL_S = 5.0  # for killed guests to be gone
_BACK_S = 2.0  # for the CPUs of a removed partition to be back; Linux 6.1 takes up to 50 ms
_LATE_S = 0.2  # the same, where it may as well be somebody else's that stays

# -- looking -------------------------------------------------------------------------------------------


def obstacle(host: Host, ledger: Ledger, wanted: CpuSet, *, threaded: bool = False) -> Obstacle | None:
    """Say what stands in the way of an isolated partition of *wanted*, if anything does. Nothing is changed.

    :param wanted: all pCPUs (Linux numbers) that VMs would hold, running ones included; empty: not known yet
    :param threaded: whether vCPUs of one of them are threads of a process that stays with the host
    """
    base = _base(host)
    if isinstance(base, Obstacle):
        return base
    return (
        _no_controller(host, base)
        or (_no_threads(host, base) if threaded else None)
        or _not_ours(host, ledger, base)
        or _boot_isolated(host, wanted)
        or _none_left(host, base, wanted)
        or _overlap(host, base, wanted)
    )


def handed_over(host: Host) -> bool:
    """Whether the home is in a partition that an administrator has made, and handed over: not at the tree's root."""
    base = _base(host)
    return not isinstance(base, Obstacle) and host.exists(f"{base}/cgroup.type")


def held(host: Host, ledger: Ledger) -> CpuSet:
    """Return the pCPUs (Linux numbers) that the homes keep from other tasks at this moment."""
    kept = CpuSet()
    for base in _bases(ledger.known(tasks=False)):
        kept |= _claimed(host, base) - _effective(host, base)
    return kept


def remembered(known: Mapping[str, Known]) -> bool:
    """Whether the ledger has something of these cgroups to be undone."""
    return bool(_bases(known))


def leaf(host: Host, token: str) -> str:
    """Return the cgroup of the VM with that *token*, relative to the host's root.

    Its guest enters by ``cgroup.procs``, and pins itself afterwards: before, the kernel refuses.

    :raises FileNotFoundError: where this host has no place for one
    """
    return f"{_place(host)}/{_HOME}/{token}"


def threads(host: Host, token: str) -> tuple[str, str]:
    """Return where the process of a VM's threads has to be, and where each of the threads has to be then.

    Both are files, relative to the host's root: a ``cgroup.procs`` that takes the process, best before it makes
    threads, since it takes all of them along; and a ``cgroup.threads`` that takes a thread by its number, or the
    caller by ``0``. It is pinned afterwards: before, the kernel refuses. What a thread in there forks stays there.

    :raises FileNotFoundError: as :func:`leaf` does
    """
    base = _place(host)
    return f"{base}/cgroup.procs", f"{base}/{_THREADS}/{token}/cgroup.threads"


def leave(host: Host) -> str:
    """Return the file, relative to the host's root, that takes a thread out of any VM's cgroup again.

    :raises FileNotFoundError: as :func:`leaf` does
    """
    return f"{_place(host)}/cgroup.threads"


def watch_files(host: Host, token: str, *, threaded: bool = False) -> list[str]:
    """Return the files, relative to the host's root, that ``poll`` gives ``POLLPRI`` of when a state changes.

    :raises FileNotFoundError: as :func:`leaf` does
    """
    child = os.path.dirname(threads(host, token)[1]) if threaded else leaf(host, token)
    return [f"{directory}/cpuset.cpus.partition" for directory in (child.rpartition("/")[0], child)]


def check(host: Host, holdings: Iterable[Holding], token: str = "") -> list[str]:
    """Return what does not hold at this moment, a sentence each; empty: the kernel keeps the host off every pCPU held.

    CPUs that are offline are left out: nothing runs there, and a VM all of whose pCPUs are offline is named.

    :param token: of the one VM whose own cgroup is looked at, beside its home; all without it
    """
    wants = _wants(holdings)
    if not wants:
        return []
    base = _base(host)
    if isinstance(base, Obstacle):
        return [base.problem]
    found: list[str] = []
    for name, its in _by_home(wants).items():
        if its and (token in its or token not in wants):
            found += _home_faults(host, base, name, _union(its.values()))
            for child, one in its.items():
                if token in ("", child):
                    found += _child_faults(host, f"{base}/{name}/{child}", one)
    return found


def rewrites(host: Host) -> bool:
    """Whether the kernel may give tasks other masks than their own for good when a partition is made or removed.

    Those that have the file asked for, from Linux 6.7 on, keep what a task was given (8f9ea86fdf99, in 6.2).
    """
    base = _base(host)
    return isinstance(base, Obstacle) or not host.exists(f"{base}/cpuset.cpus.isolated")


def wide(host: Host, holdings: Iterable[Holding]) -> tuple[str, ...]:
    """Return the masks, in list form, that the kernel may give to tasks of the host while :func:`settle` runs.

    Before Linux 6.2 making and removing a partition, and switching the controller on and off, give each task of a
    cgroup what the cgroup has now, whatever mask it had.
    """
    base = _base(host)
    if isinstance(base, Obstacle):
        return ()
    taken = {CpuSet()}
    for name, its in _by_home(_wants(holdings)).items():
        before, after = cpus(host, f"{base}/{name}/cpuset.cpus"), _union(its.values())
        steps = {CpuSet(), before, after, before | after, before & after}
        taken = {one | step for one in taken for step in steps}
    all_cpus = {_online(host), cpus(host, f"{_CPU}/possible"), _effective(host, base)}
    stages = {one - less for one in all_cpus for less in taken}
    sets = {cpus(host, f"{directory}/cpuset.cpus") for directory in below(host, base)} - {CpuSet()}
    masks = stages | {cpus & stage for cpus in sets for stage in stages}
    return tuple(sorted(str(mask) for mask in masks if mask))


# -- changing ------------------------------------------------------------------------------------------


def settle(host: Host, ledger: Ledger, holdings: Iterable[Holding]) -> list[str]:
    """Bring the cgroups to what the VMs hold; with none, take all away and leave the tree as it was.

    A VM's cgroup that is there without the VM is removed, and whatever runs in it killed.

    :return: what could not be done, a sentence each
    :raises OSError: what the kernel is not known to answer here
    """
    wants, known = _wants(holdings), ledger.known(tasks=False)
    homes = [f"{base}/{name}" for base in _bases(known) for name in _HOMES]
    pins = masks(host, [f"{one}/cgroup.threads" for home in homes for one in below(host, home)])
    try:
        if wants:
            return _set_up(host, ledger, wants, known)
        for base in _bases(known):
            _take_down(host, ledger, base, known[_KEY + base])
    except Refused as refused:
        return [str(refused)]
    finally:
        # Before Linux 6.2 a change of the home gives every task in it all CPUs of its cgroup.
        set_masks(host, pins)
    return []


def _set_up(host: Host, ledger: Ledger, wants: dict[str, Holding], known: Mapping[str, Known]) -> list[str]:
    base = next(iter(_bases(known)), None) or _base(host)
    if isinstance(base, Obstacle):
        return [base.problem]
    homes, union = _by_home(wants), _union(wants.values())
    if _KEY + base in known:
        for name, its in homes.items():
            for child in children(host, f"{base}/{name}"):
                if child not in (*its, _GUARD):
                    _end(host, f"{base}/{name}/{child}")
    empty = [f"{base}/{name}" for name, its in homes.items() if not its and host.exists(f"{base}/{name}")]
    if not empty and not any(
        _home_faults(host, base, name, _union(its.values()))
        or any(_child_faults(host, f"{base}/{name}/{token}", one) for token, one in its.items())
        for name, its in homes.items()
        if its
    ):
        return []
    # Before the first write: a sibling that overlaps would take the partition from VMs that run.
    found = obstacle(host, ledger, union, threaded=bool(homes[_THREADS]))
    if found is not None:
        return [found.problem]
    _remember(host, ledger, base, union, known.get(_KEY + base))
    _hand_on(host, base)
    # First what one home has and the other gets: they may not overlap.
    for home in empty:
        _end_home(host, home)
    for name, its in homes.items():
        has, own = cpus(host, f"{base}/{name}/cpuset.cpus"), _union(its.values())
        if (has - own) & union:
            if has & own:
                write(host, f"{base}/{name}/cpuset.cpus", str(has & own))
            elif set(children(host, f"{base}/{name}")) <= {_GUARD}:  # where there are more, guests may run in them
                _end_home(host, f"{base}/{name}")
    problems: list[str] = []
    for name, its in homes.items():
        if its:
            problems += _set_up_home(host, base, name, its)
    return problems


def _set_up_home(host: Host, base: str, name: str, its: dict[str, Holding]) -> list[str]:
    home, union = f"{base}/{name}", _union(its.values())
    for directory in (home, f"{home}/{_GUARD}"):
        _make(host, directory, threaded=name == _THREADS)
    _hand_on(host, home)
    if cpus(host, f"{home}/cpuset.cpus") != union:
        write(host, f"{home}/cpuset.cpus", str(union))
    if _state(host, home) != "isolated" if host.rehearses else _home_faults(host, base, name, union):
        _isolate(host, home)
    problems = [] if host.rehearses else _home_faults(host, base, name, union)
    for token, one in its.items():
        problems += _set_up_child(host, f"{home}/{token}", one)
    return problems


def _set_up_child(host: Host, child: str, one: Holding) -> list[str]:
    try:
        _make(host, child, threaded=one.threaded)
        if cpus(host, f"{child}/cpuset.cpus") != one.pcpus:
            write(host, f"{child}/cpuset.cpus", str(one.pcpus))
        if one.mems and cpus(host, f"{child}/cpuset.mems") != one.mems:
            write(host, f"{child}/cpuset.mems", str(one.mems))
        wrong = _state(host, child) != "isolated" if host.rehearses else _child_faults(host, child, one)
        if wrong and one.pcpus & _online(host):  # where all are offline, nothing can be mended before they are back
            _isolate(host, child)
    except Refused as refused:
        return [str(refused)]
    return [] if host.rehearses else _child_faults(host, child, one)


def _make(host: Host, directory: str, *, threaded: bool) -> None:
    make(host, directory)
    if threaded and not _threaded(host, directory):
        write(host, f"{directory}/cgroup.type", "threaded")


# Makes a partition of *directory*, also of one that says it is one and is not: for that it has to be none first.
def _isolate(host: Host, directory: str) -> None:
    if _state(host, directory) not in ("", "member"):
        # Its own partitions before it: where one stays, Linux 6.12 takes its CPUs from its tasks in between, and
        # leaves it without them.
        for name in children(host, directory):
            if _state(host, f"{directory}/{name}") not in ("", "member"):
                write(host, f"{directory}/{name}/cpuset.cpus.partition", "member")
        write(host, f"{directory}/cpuset.cpus.partition", "member")
    write(host, f"{directory}/cpuset.cpus.partition", "isolated")


def _take_down(host: Host, ledger: Ledger, base: str, known: Known) -> None:
    if not host.exists(base):  # handed over by an administrator, and removed since
        ledger.forget([_KEY + base])
        return
    for name in _HOMES:
        if host.exists(f"{base}/{name}"):
            _end_home(host, f"{base}/{name}")
    if known.baseline == _OFF and _handed_on(host, base):
        users = [name for name in children(host, base) if _uses(host, f"{base}/{name}")]
        if not users:
            write(host, f"{base}/cgroup.subtree_control", "-cpuset")
    ours = CpuSet()
    for text in known.ours:
        ours |= CpuSet.parse(text)
    if not host.rehearses and not until(lambda: not _missing(host, base, ours), _BACK_S):
        raise Refused(
            f"the kernel has not given CPU {_missing(host, base, ours)} back to /{base};"
            f" see /{base}/cpuset.cpus.effective, and run 'hostpart restore' again"
        )
    ledger.forget([_KEY + base])
    if known.baseline == _OFF and _handed_on(host, base) and not host.rehearses:
        raise Refused(f"the cpuset controller, off before, stays on in /{base}: the cgroup {users[0]!r} uses it by now")


def _missing(host: Host, base: str, wanted: CpuSet) -> CpuSet:
    # Those that are neither back nor in somebody else's partition by now.
    missing = (wanted & _online(host)) - _effective(host, base)
    for name in children(host, base) if missing else ():
        if _state(host, f"{base}/{name}") in ("root", "isolated"):
            missing -= cpus(host, f"{base}/{name}/cpuset.cpus")
    return missing


def _end_home(host: Host, home: str) -> None:
    for name in children(host, home):
        _end(host, f"{home}/{name}")
    _end(host, home)


# Kills what is in *directory*, and removes it with the cgroups that a guest has made in it.
def _end(host: Host, directory: str) -> None:
    if _populated(host, directory):
        threads = _threaded(host, directory)
        file = "cgroup.threads" if threads else "cgroup.procs"

        def empty() -> bool:
            if threads:  # the kernel kills no threaded cgroup whole
                kill(host, directory, file)
            return not _populated(host, directory)

        if threads:
            kill(host, directory, file)
        else:
            write(host, f"{directory}/cgroup.kill", "1")
        if not host.rehearses and not until(empty, _KILL_S):
            raise Refused(
                f"processes in /{directory} were killed and do not end, so their pCPUs can't be given back yet;"
                f" see 'ps -o pid,stat,wchan,comm $(cat /{directory}/{file})', and run 'hostpart restore' later"
            )
    if _state(host, directory) not in ("", "member"):
        write(host, f"{directory}/cpuset.cpus.partition", "member")
    remove(host, directory)


def _remember(host: Host, ledger: Ledger, base: str, union: CpuSet, known: Known | None) -> None:
    if known is None:
        known = Known(_ON if _handed_on(host, base) else _OFF)
    # The latest first; all that it ever was since has to come back.
    ours = CpuSet(union.mask)
    for text in known.ours:
        ours |= CpuSet.parse(text)
    if known.ours != (str(ours),):
        ledger.remember({_KEY + base: Known(known.baseline, (str(ours),))})


def _hand_on(host: Host, directory: str) -> None:
    if not _handed_on(host, directory):
        write(host, f"{directory}/cgroup.subtree_control", "+cpuset")


# -- what is wrong -------------------------------------------------------------------------------------


def _home_faults(host: Host, base: str, name: str, union: CpuSet) -> list[str]:
    home = f"{base}/{name}"
    if not host.exists(home):
        return [f"the cgroup /{home} is gone"]
    online = _online(host)
    there, state = cpus(host, f"{home}/cpuset.cpus"), _state(host, home)
    if not _handed_on(host, base) or not state:
        return [f"the cpuset controller was switched off for /{home}"]
    if not _handed_on(host, home):
        return [f"the cpuset controller was switched off for the cgroups in /{home}"]
    if there != union:
        return [f"/{home} has CPU {there or 'none'} and should have {union}"]
    if not union & online:
        return []  # no task runs there; each VM is named for it
    if state != "isolated":
        return [f"/{home} is no isolated partition any more: the kernel says {state!r}"]
    leaked = _effective(host, base) & union
    if host.exists(f"{base}/cpuset.cpus.isolated"):  # from Linux 6.7 on, at the tree's root
        leaked |= (union & online) - cpus(host, f"{base}/cpuset.cpus.isolated")
    return [f"/{home} says it is isolated, and tasks of the host may run on its CPU {leaked}"] if leaked else []


def _child_faults(host: Host, child: str, one: Holding) -> list[str]:
    if not host.exists(child):
        return [f"the cgroup /{child} is gone"]
    if one.threaded and not _threaded(host, child):
        return [f"the cgroup /{child} takes no threads"]
    online = _online(host)
    there, state = cpus(host, f"{child}/cpuset.cpus"), _state(host, child)
    if not state:
        return [f"the cpuset controller was switched off for /{child}"]
    if there != one.pcpus:
        return [f"/{child} has CPU {there or 'none'} and should have {one.pcpus}"]
    if not one.pcpus & online:
        return [f"CPU {one.pcpus} is offline: what runs in /{child} runs elsewhere until it is back"]
    if state != "isolated":
        return [f"/{child} is no isolated partition any more: the kernel says {state!r}"]
    has = _effective(host, child)
    if has != one.pcpus & online:
        return [f"/{child} may use CPU {has or 'none'} and should have {one.pcpus & online}"]
    if one.mems and cpus(host, f"{child}/cpuset.mems") != one.mems:
        return [f"/{child} has memory of node {cpus(host, f'{child}/cpuset.mems') or 'any'}, not of {one.mems}"]
    return []


def _no_controller(host: Host, base: str) -> Obstacle | None:
    if "cpuset" in words(host, f"{base}/cgroup.controllers"):
        return None
    cmdline = words(host, "proc/cmdline")
    disabled = [word for word in cmdline if word.startswith("cgroup_disable=") and "cpuset" in word]
    if disabled:
        return Obstacle(
            f"the cpuset controller was switched off at boot with {disabled[0]!r}",
            "take that off the kernel's command line and boot again",
        )
    return Obstacle(
        f"there is no cpuset controller in /{base}/cgroup.controllers",
        f"have it handed down: 'echo +cpuset > cgroup.subtree_control' in every cgroup above /{base};"
        " where a version 1 hierarchy has it (see /proc/self/mountinfo), boot with systemd.unified_cgroup_hierarchy=1",
    )


def _no_threads(host: Host, base: str) -> Obstacle | None:
    if not host.exists(f"{base}/cgroup.type"):
        return None
    return Obstacle(
        "vCPUs that are threads of a process which stays with the host can have a partition at the root of the cgroup"
        f" tree only, and what was handed over is /{base}",
        as_root() if os.geteuid() else "run it on the host and not inside a container",
    )


def _not_ours(host: Host, ledger: Ledger, base: str) -> Obstacle | None:
    homes = [f"{base}/{name}" for name in _HOMES if host.exists(f"{base}/{name}")]
    if not homes or _KEY + base in ledger.known(tasks=False):
        return None
    home = homes[0]
    return Obstacle(
        f"there is a cgroup /{home} that this ledger ({ledger.path}) knows nothing of",
        f"end what runs in it, and remove it: 'rmdir /{home}/*/ /{home}'",
    )


def _boot_isolated(host: Host, wanted: CpuSet) -> Obstacle | None:
    # Linux 6.12 refuses a partition of such CPUs ("conflicts with housekeeping setup"), 6.19 makes one, and does not
    # count them as isolated any more once it is removed.
    taken = cpus(host, f"{_CPU}/isolated") & wanted
    if not taken:
        return None
    return Obstacle(
        f"CPU {taken} was set apart at boot with isolcpus=, and a partition of it is refused by the kernel or"
        " can't be undone",
        "ask for other pCPUs, or take isolcpus= off the kernel's command line and boot again",
    )


def _none_left(host: Host, base: str, wanted: CpuSet) -> Obstacle | None:
    there = _effective(host, base) | _claimed(host, base)
    left = there - wanted
    if not wanted or left - cpus(host, f"{_CPU}/nohz_full") - cpus(host, f"{_CPU}/isolated"):
        return None
    if left:
        return Obstacle(
            f"with CPU {wanted} only CPU {left} would be left for the host's own tasks, and it was set apart at boot"
            " with nohz_full= or isolcpus=",
            f"leave another CPU to the host, ask for CPU {left} and not for all others, or boot without that option",
        )
    return Obstacle(
        f"with CPU {wanted} nothing of CPU {there} would be left for the host's own tasks",
        f"ask for {len(there) - 1} or fewer" if len(there) > 1 else "a host with one CPU can give none away",
    )


def _overlap(host: Host, base: str, wanted: CpuSet) -> Obstacle | None:
    for name in children(host, base):
        if name in _HOMES:
            continue
        sibling = f"{base}/{name}"
        has = cpus(host, f"{sibling}/cpuset.cpus")
        both = (has | cpus(host, f"{sibling}/cpuset.cpus.exclusive")) & wanted
        if both:
            rest = has - wanted
            unit = name.endswith((".slice", ".service", ".scope")) and host.exists("run/systemd/system")
            # Of a cgroup with tasks in it the file can be narrowed, and not be emptied again.
            narrow = (
                f"systemctl set-property --runtime {name} AllowedCPUs={rest}"
                if unit
                else f"echo {rest} > /{sibling}/cpuset.cpus"
            )
            return Obstacle(
                f"the cgroup /{sibling} lays claim to CPU {both} (its cpuset.cpus), and no partition may overlap that",
                f"{f'{narrow!r}' if rest else f'end what is in /{sibling}'}, or ask for other pCPUs",
            )

    def missing() -> CpuSet:
        here = _effective(host, base) | _claimed(host, base)
        return (wanted & _online(host)) - here

    if not until(lambda: not missing(), _LATE_S):
        elsewhere = missing()
        return Obstacle(
            f"CPU {elsewhere} is not among those that /{base} has to give (cpuset.cpus.effective)"
            " and belongs to another cgroup's partition",
            f"ask for other pCPUs; 'grep -r . /{base} --include=cpuset.cpus.partition' shows the partitions",
        )
    return None


# -- where ---------------------------------------------------------------------------------------------


def _place(host: Host) -> str:
    base = _base(host)
    if isinstance(base, Obstacle):
        raise FileNotFoundError(errno.ENOENT, base.problem)
    return base


def _base(host: Host) -> str | Obstacle:
    # The directory, relative to the host's root, that the home is or would be in.
    trees = {mount.directory: mount for mount in mounts(host) if mount.kind == "cgroup2"}
    if not trees:
        return Obstacle("cgroup v2 is not mounted", "mount -t cgroup2 none /sys/fs/cgroup")
    # The tree's root is the one cgroup without a type; in a container the mount shows another one.
    roots = [top for top in trees if not host.exists(f"{top}/cgroup.type")]
    for root in roots:
        if _writable(host, root):
            return root
    own, reason = own_cgroup(host)
    if own is None:
        return Obstacle(f"which cgroup this process is in can't be told: {reason}", "see /proc/self/mountinfo")
    directory = own.strip("/")
    while directory and directory not in roots and any(f"{directory}/".startswith(f"{one}/") for one in trees):
        if _state(host, directory) in ("root", "isolated") and _writable(host, directory):
            if words(host, f"{directory}/cgroup.procs"):
                return Obstacle(
                    f"processes are in the cgroup /{directory} itself, so it can have no partitions in it",
                    f"move them, your shell too: 'mkdir /{directory}/rest', and write their pids to its cgroup.procs",
                )
            return directory
        directory = directory.rpartition("/")[0]
    top = (roots or list(trees))[0]
    if trees[top].readonly:
        return Obstacle(f"/{top} is mounted read-only", f"mount -o remount,rw /{top}")
    if roots and os.geteuid():
        return Obstacle(f"/{top} belongs to root, and this is uid {os.geteuid()}", as_root())
    if roots:
        return Obstacle(
            f"/{top} can't be written, although this is uid 0", "run it on the host and not inside a container"
        )
    return Obstacle(
        f"this is a container: /{top} is not the cgroup tree's root, and no partition of its own either",
        "run it on the host, or give the container pCPUs there: 'echo isolated > cpuset.cpus.partition' in its cgroup",
    )


def _writable(host: Host, directory: str) -> bool:
    return ours(host, directory, f"{directory}/cgroup.procs", f"{directory}/cgroup.subtree_control")


def _bases(known: Mapping[str, Known]) -> list[str]:
    return [key.removeprefix(_KEY) for key in known if key.startswith(_KEY)]


def _wants(holdings: Iterable[Holding]) -> dict[str, Holding]:
    return {one.token: one for one in holdings if at_least(one.level, "cpuset")}


def _by_home(wants: dict[str, Holding]) -> dict[str, dict[str, Holding]]:
    # What each home is to hold; of both of them, also where it is nothing.
    return {name: {token: one for token, one in wants.items() if one.threaded == (name == _THREADS)} for name in _HOMES}


def _union(holdings: Iterable[Holding]) -> CpuSet:
    union = CpuSet()
    for one in holdings:
        union |= one.released
    return union


# -- files ---------------------------------------------------------------------------------------------


def _effective(host: Host, directory: str) -> CpuSet:
    return cpus(host, f"{directory}/cpuset.cpus.effective")


def _claimed(host: Host, base: str) -> CpuSet:
    # What the homes have now.
    return cpus(host, f"{base}/{_HOME}/cpuset.cpus") | cpus(host, f"{base}/{_THREADS}/cpuset.cpus")


def _online(host: Host) -> CpuSet:
    return cpus(host, f"{_CPU}/online")


def _state(host: Host, directory: str) -> str:
    return read(host, f"{directory}/cpuset.cpus.partition").strip()


def _threaded(host: Host, directory: str) -> bool:
    return read(host, f"{directory}/cgroup.type").strip() == "threaded"


def _handed_on(host: Host, directory: str) -> bool:
    return "cpuset" in words(host, f"{directory}/cgroup.subtree_control")


def _populated(host: Host, directory: str) -> bool:
    return "populated 1" in read(host, f"{directory}/cgroup.events")


def _uses(host: Host, directory: str) -> bool:
    # Whether somebody has set a cpuset there.
    files = ("cpuset.cpus", "cpuset.mems", "cpuset.cpus.exclusive")
    return (
        any(words(host, f"{directory}/{name}") for name in files)
        or _state(host, directory) not in ("", "member")
        or _handed_on(host, directory)
    )
