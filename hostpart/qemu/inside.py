"""What runs inside the built-in guest beside hostpart's own commands: ``probe``, and what the guest says of itself.

A probe is run in this process, on the CPU that it is told; nothing is leased there, for the guest is the VM's alone.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["firmware", "main", "probe"]

_USAGE = "usage: probe [--cpu LIST] NAME [OPTIONS]; hostpart run --probe NAME --help lists them\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the first argument names: ``probe``, or ``firmware``, and return the exit status."""
    what, *words = sys.argv[1:] if argv is None else argv
    return firmware() if what == "firmware" else probe(words)


def firmware() -> int:
    """Print which processors the firmware's table (MADT) lists, and whether that is what the kernel has.

    :return: 0 if so, 1 if not
    """
    from ..host import Host
    from ..topology import read_topology

    topology = read_topology(Host(), madt=True)
    ids = ", ".join("?" if pcpu.apic_id is None else str(pcpu.apic_id) for pcpu in topology.pcpus)
    said = "; ".join(topology.doubts) or "the kernel has the same"
    sys.stdout.write(f"firmware (MADT): APIC ids {ids}; {said}\n")
    return 0 if topology.madt else 1


def probe(words: Sequence[str]) -> int:
    """Run a probe, as ``hostpart run --probe`` would but in this process, and return its exit status.

    :param words: ``--cpu LIST`` (Linux numbers, as the guest has them) for where to run, the probe's name, its options
    """
    from ..cpuset import CpuSet

    rest = list(words)
    try:
        if rest[:1] == ["--cpu"]:
            os.sched_setaffinity(0, set(CpuSet.parse(rest[1])))
            del rest[:2]
        name = rest.pop(0)
    except (IndexError, ValueError, OSError) as error:
        sys.stderr.write(f"probe: {error}\n{_USAGE}")
        return 2
    from workers.probes import measurement, parameter
    from workers.probes.refusal import Refused

    try:
        # Not every one of them is a probe: hello only says where it is.
        module = __import__(f"workers.probes.{name}", fromlist=["main"]) if name.isidentifier() else None
    except ModuleNotFoundError:
        module = None
    if module is None or not hasattr(module, "main"):
        sys.stderr.write(f"probe: there is no probe {name!r}\n{_USAGE}")
        return 2
    found = getattr(module, "PROBE", None)
    if found is None:
        return int(module.main() or 0)
    try:
        os.environ.update(parameter.from_options(name, found.parameters, rest))
    except Refused as refusal:
        sys.stderr.write(f"probe: {refusal.problem}\ntry: {refusal.remedy}\n")
        return 2
    return measurement.run(found)


if __name__ == "__main__":
    sys.exit(main())
