"""Experiments inside virtual machines: every degree of sharing, the ladder as a factor, and the host as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vm.command import run, start, wait_until
from tests.vm.fingerprint import difference, fingerprint

pytestmark = pytest.mark.vm(limit_s=500)

DESIGN = """
processes = 1
seconds = 1.0
warmup = 0.1
settle = 1.0
isolation = ["affinity", "cpuset"]
placements = ["same-pcpu"]
[[victim]]
probe = "noise"
options = { engine = "python" }
[[aggressor]]
name = "spinners"
probe = "spin"
"""


def design(path: Path, text: str = DESIGN) -> str:
    """Write an experiment's file; return its name."""
    path.write_text(text)
    return str(path)


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the runs by condition; of several the last."""
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return {run["condition"]: run for run in map(json.loads, lines)}


def test_every_degree_that_the_machine_has_is_planned(tmp_path: Path) -> None:
    done = run("experiment", "--plan", "example:interference", "--json")
    assert done.code == 0, done.err
    conditions = {one["placement"]: one for one in json.loads(done.out)["plan"]["conditions"]}
    victim = conditions["alone"]["victim_pcpu"]
    cpu = Path(f"/sys/devices/system/cpu/cpu{victim}")
    siblings = (cpu / "topology/thread_siblings_list").read_text().strip()
    assert "0" not in siblings.replace("-", ",").split(",")  # the service VM keeps pCPU 0, and has its core to itself
    own_node = next(path.name for path in cpu.glob("node[0-9]*"))
    assert {"free", "same-pcpu", "sibling"} < set(conditions)
    assert conditions["sibling"]["aggressor_pcpus"] in siblings
    far = conditions["other-package"]["aggressor_pcpus"].replace("-", ",").split(",")
    assert not any((Path(f"/sys/devices/system/cpu/cpu{one}") / own_node).exists() for one in far)


def test_a_partition_is_worth_something_and_the_host_is_as_it_was(tmp_path: Path) -> None:
    before = fingerprint()
    done = run("experiment", design(tmp_path / "d.toml"), "--out", str(tmp_path / "out"), "--no-report")
    assert done.code == 0, done.err
    made = runs(tmp_path / "out")
    queued = {}
    for level in ("affinity", "cpuset"):
        one = made[f"noise|{level}|spinners|same-pcpu"]
        assert one["evidence"]["isolation"]["reached"] == level
        (vcpu,) = one["evidence"]["vcpus"]
        # What the victim waited for its pCPU, by what it ran there: the kernel's own count, which emulation does not
        # change.
        queued[level] = vcpu["wait_ns"]["value"] / vcpu["run_ns"]["value"]
    assert queued["affinity"] > 0.5
    assert queued["cpuset"] < 0.2
    assert difference(before, fingerprint()) == []


def test_killed_it_leaves_nothing_on_the_host(tmp_path: Path) -> None:
    before = fingerprint()
    text = DESIGN.replace("seconds = 1.0", "seconds = 60").replace('["affinity", "cpuset"]', '"cpuset"')
    started = start("experiment", design(tmp_path / "d.toml", text), "--out", str(tmp_path / "out"), "--no-report")
    assert wait_until(lambda: difference(before, fingerprint()) != [] or started.ended(), 120)
    started.kill(9)
    assert wait_until(started.ended, 10)
    assert wait_until(lambda: difference(before, fingerprint()) == [], 60), difference(before, fingerprint())
    assert run("restore").code == 0
    assert difference(before, fingerprint()) == []
