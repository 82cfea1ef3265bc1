"""Workloads for a vCPU, one a module; usable as python guests.

``hello`` says where it is. The others are probes: each loads or measures the pCPU it runs on in one way for some
seconds and writes one record (``record.schema.json``) at its end. ``hostpart run --probe NAME`` runs one; as a guest in
a scenario it is ``python = "workers.probes.NAME:main"``, with its options as ``HOSTPART_PROBE_*`` in ``env``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .measurement import Probe

__all__ = ["find"]


def find(name: str) -> Probe:
    """Return the probe of that name: its module's ``PROBE``.

    :raises ImportError: where there is none
    """
    probe: Probe = __import__(f"{__name__}.{name}", fromlist=["PROBE"]).PROBE
    return probe
