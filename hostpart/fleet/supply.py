"""What a host has to give, as the resources that Dask chooses hosts by. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CORES", "CORE_PCPUS", "LLC", "NOTHING", "PCPUS", "resources"]

PCPUS = "hostpart-pcpus"  # free pCPUs
CORES = "hostpart-cores"  # whole cores that are free
CORE_PCPUS = "hostpart-core-pcpus"  # pCPUs that one request with smt = "exclusive" can get
LLC = "hostpart-llc"  # free pCPUs of one last-level cache
_KEYS = {PCPUS: "pcpus", CORES: "cores", CORE_PCPUS: "core_pcpus", LLC: "llc"}
_MOST = 8192
NOTHING: Mapping[str, float] = dict.fromkeys(_KEYS, 0.0)  # what a host has that is spoken for


def resources(document: object) -> dict[str, float]:
    """Return the resources that ``hostpart topology --json`` tells of.

    :param document: as it was printed; where it does not say what is free, nothing is
    :raises ValueError: naming what is not a number of pCPUs
    """
    free = document.get("free") if isinstance(document, dict) else None
    if free is None:
        return dict(NOTHING)
    if not isinstance(free, dict):
        raise ValueError(f"free: want an object, got {free!r}")
    found: dict[str, float] = {}
    for name, key in _KEYS.items():
        count = free.get(key)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST:
            raise ValueError(f"free.{key}: want a whole number from 0 to {_MOST}, got {count!r}")
        found[name] = float(count)
    return found
