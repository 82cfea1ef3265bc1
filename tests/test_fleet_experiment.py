"""One experiment on three real hosts, of which one is slowed: the page in a real browser says so, also after a cut."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.fleet import journal
from tests.conftest import wait_until
from tests.fleet.lab import Lab
from tests.test_report_browser import Opened, browser

pytest.importorskip("distributed")

__all__ = ["browser"]

NAMES = ("a", "b", "c")
# The least CPU time of its own that a sum took, of many: it hardly depends on who shares the CPU, which all three do,
# for their pCPUs are those of one machine. A slowed host adds up more.
_WORK = """
import os, time
def took():
    began = time.process_time()
    sum(turn * turn for turn in range(round(40000 * float(os.environ.get("SLOWED", 1)))))
    return 1e6 * (time.process_time() - began)
print("cpu:", min(took() for _ in range(25)), "us")
"""
DESIGN = f"""
name = "work"
processes = 5
seconds = 0.1
settle = 0.05
placements = ["same-pcpu"]
scope = "experiment"
[[victim]]
name = "sum"
command = {json.dumps([sys.executable, "-c", _WORK])}
metric = 'cpu: ([0-9.]+) us'
unit = "us"
[[aggressor]]
name = "spinner"
probe = "spin"
options = {{ engine = "python" }}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts, the third twice as slow."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two usable pCPUs")
    with Lab(tmp_path_factory.mktemp("experiment"), NAMES) as here:
        (here.folder / "user" / "work.toml").write_text(DESIGN)
        here["c"].env["SLOWED"] = "2"
        for host in here.hosts.values():
            host.boot()
        assert here.joined(*NAMES), here.logs()
        yield here


def test_the_slowed_host_is_named_on_the_page(lab: Lab, tmp_path: Path, browser: browser) -> None:  # type: ignore[valid-type]
    out = tmp_path / "out"
    began = lab.fleet("experiment", "work.toml", "--out", str(out))

    def runs() -> dict[str, int]:
        files = (out / "hosts").glob("*.jsonl")
        return {file.stem: file.read_text().count('"kind":"run"') for file in files}

    # Cut short once each host has begun, and finished by another.
    assert wait_until(lambda: len(runs()) == 3 and all(runs().values()), 90), lab.logs()
    began.send_signal(signal.SIGKILL)
    began.communicate()
    done = lab.run("experiment", "--resume", str(out), timeout=240)
    assert done.returncode == 0, done.stderr
    kept = journal.read(str(out))
    assert [host.name for host in kept.hosts] == list(NAMES)
    planned = {host.name: len(host.experiment["plan"]["runs"]) for host in kept.hosts if host.experiment}
    assert {host.name: len(host.runs) for host in kept.hosts} == planned
    assert min(planned.values()) >= 15
    # Each was begun once: a session more would have made what was missing, or made some again.
    assert {host.name: len(host.sessions) for host in kept.hosts} == dict.fromkeys(NAMES, 1)
    assert all(host.facts["kernel"]["release"] == os.uname().release for host in kept.hosts)
    pooled = json.loads((out / "analysis.json").read_text())["pooled"]
    assert [one["host"] for one in pooled["outliers"]] == ["c"]
    opened = Opened(browser, out / "report.html", 1280)
    try:
        text = opened.page.inner_text("main")
        assert opened.said == []
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert "Host c stands out: sum alone (affinity)" in text
        assert not [name for name in "ab" if f"Host {name} stands out" in text]
    finally:
        opened.context.close()
    assert wait_until(lambda: lab.left() == [], 20), lab.left()
