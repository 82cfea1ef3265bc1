"""The NUMA nodes that a guest's memory comes from: which there are, whether a wish can be met, and what holds.

The worker binds itself before its guest starts (:mod:`workers.vcpu`), which needs no privilege; the cgroup's
``cpuset.mems`` is set where its CPUs are. Sets of nodes are :class:`~hostpart.cpuset.CpuSet`, too.

Source: Documentation/admin-guide/mm/numa_memory_policy.rst; proc_pid_numa_maps(5).
"""

from __future__ import annotations

from ..cpuset import CpuSet
from ..errors import UsageError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host

__all__ = ["Memory", "check", "held", "nodes"]


class Memory(Value):
    """Where the memory of a process may come from, and does; ``None`` and empty where the kernel does not say.

    :ivar allowed: nodes that its cpuset allows
    :ivar policies: the policies of its mappings, as the kernel words them: ``bind:1``, ``default``, ``prefer:0``
    :ivar pages: nodes and how many pages are on each, in pages of each mapping's own size
    """

    allowed: CpuSet | None
    policies: tuple[str, ...] = ()
    pages: tuple[tuple[int, int], ...] = ()


def nodes(host: Host) -> CpuSet:
    """Return the nodes that have memory; none where the kernel knows no nodes."""
    try:
        return CpuSet.parse(host.read_text("sys/devices/system/node/has_memory"))
    except FileNotFoundError:
        return CpuSet()


def check(host: Host, wish: CpuSet) -> None:
    """See that every node of *wish* has memory, and that this process may use it.

    :raises UsageError: where not, or where nothing is wished for
    """
    there = nodes(host)
    if not there:
        raise UsageError("this kernel knows no NUMA nodes to bind memory to", "leave --mems away")
    if not wish or wish - there:
        which = f"node {wish - there} has" if wish else "an empty set of nodes has"
        raise UsageError(
            f"{which} no memory to bind a guest to; node {there} {'have' if len(there) > 1 else 'has'} some",
            f"choose --mems from {there}; see 'hostpart topology'",
        )
    may = _allowed(host, "self")
    if may is not None and wish - may:
        raise UsageError(
            f"this process may not use memory of node {wish - may}: its cpuset allows node {may}",
            f"choose --mems from {there & may}, or start it from another cgroup: 'cat /proc/self/cgroup'",
        )


def held(host: Host, pid: int) -> Memory:
    """Return what holds for process *pid*.

    It needs the right to trace the process, else only *allowed* is told. The kernel walks all its page tables, so this
    is for the evidence and not for every look.
    """
    policies: dict[str, None] = {}
    pages: dict[int, int] = {}
    try:
        text = host.read_text(f"proc/{pid}/numa_maps")
    except OSError:
        text = ""
    for line in text.splitlines():
        _, policy, *words = line.split(" ")
        policies[policy] = None
        for word in words:
            name, equals, count = word.partition("=")
            if equals and name[0] == "N" and name[1:].isdigit():
                pages[int(name[1:])] = pages.get(int(name[1:]), 0) + int(count)
    return Memory(_allowed(host, str(pid)), tuple(sorted(policies)), tuple(sorted(pages.items())))


def _allowed(host: Host, pid: str) -> CpuSet | None:
    try:
        text = host.read_text(f"proc/{pid}/status")
    except OSError:
        return None
    line = text.partition("\nMems_allowed_list:")[2].partition("\n")[0]
    return CpuSet.parse(line) if line else None
