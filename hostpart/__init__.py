"""Static CPU partitioning on an ordinary Linux host: a physical CPU for each virtual CPU, and proof that it held."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .allocator import Placement, Request, Supply, place
    from .config import Scenario, load_scenario, parse_scenario
    from .cpuset import CpuSet
    from .errors import HostpartError
    from .host import Host
    from .launcher import launch
    from .topology import Pcpu, Topology, read_topology

__all__ = [
    "CpuSet",
    "Host",
    "HostpartError",
    "Pcpu",
    "Placement",
    "Request",
    "Scenario",
    "Supply",
    "Topology",
    "__version__",
    "launch",
    "load_scenario",
    "parse_scenario",
    "place",
    "read_topology",
]

__version__ = "0.2.0"

_HOMES = {
    "CpuSet": "cpuset",
    "Host": "host",
    "HostpartError": "errors",
    "Pcpu": "topology",
    "Placement": "allocator",
    "Request": "allocator",
    "Scenario": "config",
    "Supply": "allocator",
    "Topology": "topology",
    "launch": "launcher",
    "load_scenario": "config",
    "parse_scenario": "config",
    "place": "allocator",
    "read_topology": "topology",
}


def __getattr__(name: str) -> object:
    # Each from its module when it is first asked for: a command imports only what it needs.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
