"""Cases that run in virtual machines: outside they are ordinary items, whose reports come from inside.

``@pytest.mark.vm(kernels=..., setups=..., topology=..., cmdline=..., cargo=..., limit_s=..., every=...)`` on a test
function, a class or a file makes a case; the nearest mark's words count. Inside, the same files are collected and the
functions really run.

Each time a case runs on one of its kernels, or on those that ``every`` names: True stands for all, ``()`` for none. On
the others it runs with ``HOSTPART_VM_FULL=1``, or where ``-k`` asks for it: all together take hours.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from tests.vm import debian
from tests.vm.cache import LabError, Unavailable
from tests.vm.cargo import CARGOES
from tests.vm.host import lacking
from tests.vm.image import HOME, ROOT, project
from tests.vm.machine import SETUPS, TOPOLOGIES, Dead, Kind, collected, resumed

INSIDE = "HOSTPART_INSIDE" in os.environ
_DEFAULTS: dict[str, Any] = {
    "kernels": tuple(debian.KERNELS),
    "setups": ("v2",),
    "topology": "2x2x2",
    "cmdline": "",
    "cargo": "",
    "limit_s": 120,
    "every": None,
}
_USUAL = "6.12"
_FALLEN = re.compile(r"Kernel panic|Oops:|BUG:")
_TRIES = 3


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "vm(kernels, setups, topology, cmdline, cargo, limit_s, every): runs in virtual machines"
    )


def _wants(node: pytest.Item) -> dict[str, Any] | None:
    marks = list(node.iter_markers("vm"))
    if not marks:
        return None
    wants = dict(_DEFAULTS)
    for mark in reversed(marks):
        wants |= mark.kwargs
    every = wants["every"]
    if every is None:
        every = (_USUAL,) if _USUAL in wants["kernels"] else wants["kernels"][:1]
    wants["every"] = wants["kernels"] if every is True else tuple(every)
    known = set(wants["kernels"]) | set(wants["every"]) <= set(debian.KERNELS) and set(wants["setups"]) <= set(SETUPS)
    known = known and wants["topology"] in TOPOLOGIES and wants["cargo"] in ("", *CARGOES)
    if len(wants) != len(_DEFAULTS) or not known:
        raise pytest.UsageError(f"{node.nodeid}: the mark vm has words that the lab does not know: {wants}")
    return wants


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> tuple[str, str] | None:
    """The kernel series and the set-up of the machine that the case runs in; None for a test that is no case."""
    return getattr(request, "param", None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wants = _wants(metafunc.definition)
    if wants:
        machines = [(kernel, setup) for setup in wants["setups"] for kernel in wants["kernels"]]
        metafunc.parametrize("machine", machines, ids=["-".join(one) for one in machines], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE or not isinstance(item, pytest.Function) or not item.get_closest_marker("vm"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # This item has set nothing up, but the one before may have left its folder's node for it.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INSIDE or os.environ.get("HOSTPART_VM_FULL") == "1" or config.option.keyword:
        return
    left = [item for item in items if not _always(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if _always(item)]


def _always(item: pytest.Item) -> bool:
    wants = _wants(item)
    if wants is None:
        return True
    assert isinstance(item, pytest.Function)
    named: Any = item.callspec.params["machine"]
    kernel, _ = named
    return kernel in wants["every"]


def _reports(item: pytest.Function) -> list[pytest.TestReport]:
    wants = _wants(item)
    assert wants is not None
    named: Any = item.callspec.params["machine"]
    kernel, setup = named
    kind = Kind(kernel, setup, wants["topology"], wants["cmdline"], wants["cargo"])
    # What could not be had for one case is not tried again for the next.
    lacks = item.config.stash.setdefault(_LACKS, {})
    try:
        if "" not in lacks:
            lacks[""] = lacking()
        if why := lacks[""] or lacks.get(kernel):
            raise Unavailable(why)
        return _inside(item, kind, wants["limit_s"])
    except Unavailable as unavailable:
        lacks[kernel] = str(unavailable)
        if os.environ.get("HOSTPART_REQUIRE_VM") == "1":
            return [_report(item, "setup", "failed", f"{unavailable} (HOSTPART_REQUIRE_VM=1 forbids to skip)")]
        return [_report(item, "setup", "skipped", (__file__, 0, f"Skipped: {unavailable}"))]
    except LabError as error:
        return [_report(item, "call", "failed", str(error))]


def _inside(item: pytest.Function, kind: Kind, limit_s: float) -> list[pytest.TestReport]:
    packed = item.config.stash.get(_PROJECT, b"")
    if not packed:
        packed = item.config.stash[_PROJECT] = project()
    state = collected(kind, packed)
    for left in reversed(range(_TRIES)):
        try:
            with resumed(kind, state) as machine, machine.limit(limit_s):
                said = machine.say({"do": "run", "case": item.nodeid})
            break
        except Dead as dead:
            # An emulator with a thread per CPU: now and then a kernel falls over code that it patched itself.
            if not left or not _FALLEN.search(str(dead)):
                raise
    if "failed" in said:
        raise LabError("\n".join([str(said["failed"]), *machine.console[-60:]]))
    reports = []
    told: Any = said["data"]
    for data in json.loads(told):
        # JSON knows no tuples, and pytest tells some by them.
        if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
            path, line, why = data["longrepr"]
            data["longrepr"] = (path.replace(HOME, str(ROOT), 1), line, why)
        data["sections"] = [tuple(section) for section in data["sections"]]
        data["user_properties"] = [tuple(pair) for pair in data["user_properties"]]
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        if report.failed and machine.console:
            report.sections.append((f"Console of {kind.label}", "\n".join(machine.console[-60:])))
        reports.append(report)
    return reports


def _report(item: pytest.Function, when: Any, outcome: Any, why: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, why, when)


_LACKS = pytest.StashKey[dict[str, str]]()
_PROJECT = pytest.StashKey[bytes]()
