"""The lab of many hosts itself: what it claims to do to them is done, and nothing of it is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart import procfs
from tests.conftest import wait_until
from tests.fleet import namespaces
from tests.fleet.lab import Lab, lab

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts with Dask's workers as they come, whatever hostpart's agent can do."""
    with lab(tmp_path_factory.mktemp("lab"), preload=False) as found:
        assert found.joined("a", "b", "c"), found.logs()
        yield found


@pytest.fixture
def cables(here: Lab) -> Lab:
    """The same, where there are cables."""
    if not here.apart:
        pytest.skip(here.why_not)
    return here


def test_hosts_differ_in_what_tells_hosts_apart(cables: Lab) -> None:
    said = {}
    for name, host in cables.hosts.items():
        done = host.run("topology", "--json")
        assert done.returncode == 0, done.stderr
        assert cables.workers()[name]["address"].startswith(f"tls://{cables.address_of(name)}:")
        said[name] = (Path(host.folder / "machine-id").read_text(), Path(host.folder / "boot-id").read_text())
    assert len(set(said.values())) == 3
    assert socket.gethostname() != "host-a", "this machine's name is what it was"


def test_a_cable_that_is_pulled_is_noticed_and_the_worker_is_back_with_it(cables: Lab) -> None:
    cables.unplug("b")
    try:
        assert cables.joined("a", "c", timeout=40), cables.logs()
    finally:
        cables.plug("b")
    assert cables.joined("a", "b", "c"), cables.logs()


def test_a_killed_worker_is_restarted_unless_that_is_forbidden(here: Lab) -> None:
    host = here["a"]
    before = {process.pid for process in host.worker()}
    assert before
    host.restarts(False)
    try:
        host.kill_worker()
        assert here.joined("b", "c"), here.logs()
        assert host.worker() == []
    finally:
        host.restarts(True)
    assert here.joined("a", "b", "c"), here.logs()
    assert before.isdisjoint(process.pid for process in host.worker())


def test_a_host_that_is_killed_has_no_process_left_and_boots_again(here: Lab) -> None:
    host = here["c"]
    pids = [process.pid for process in host.processes()]
    boot = (host.folder / "boot-id").read_text()
    host.kill()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert here.joined("a", "b", timeout=40), here.logs()
    host.boot()
    assert here.joined("a", "b", "c"), here.logs()
    assert (host.folder / "boot-id").read_text() != boot


def test_a_scheduler_that_is_killed_is_found_again_at_its_address(here: Lab) -> None:
    here.kill_scheduler()
    assert here.workers() == {}
    here.start_scheduler()
    assert here.joined("a", "b", "c"), here.logs()


def test_what_a_host_holds_is_seen_from_outside(here: Lab) -> None:
    host = here["b"]
    assert here.left() == []
    done = host.run("run", "-n", "1", "--isolation", "affinity", "--", "true")
    assert done.returncode == 0, done.stderr
    assert here.left() == []
    with host.start("run", "-n", "1", "--name", "held", "--isolation", "affinity", "--", "sleep", "60") as front:
        assert wait_until(lambda: any("VM held" in one for one in here.left()))
        assert any("pCPUs" in one for one in here.left())
        assert any("sleep 60" in one for one in here.left())
        assert host.run("stop", "held").returncode == 0
        front.wait(20)
    assert wait_until(lambda: here.left() == []), here.left()


class _Mishap(Exception):
    pass


def _fails_in_a_lab(folder: Path, seen: dict[str, set[str]]) -> None:
    before = set(namespaces.leftovers(os.getpid()))
    with lab(folder, ["a"], preload=False) as found:
        if not found.apart:
            pytest.skip(found.why_not)
        assert found.joined("a"), found.logs()
        seen["namespaces"] = set(namespaces.leftovers(os.getpid())) - before
        seen["pids"] = {str(process.pid) for process in found["a"].processes()}
        raise _Mishap


def test_nothing_of_a_lab_is_left_behind_by_a_test_that_fails(tmp_path: Path) -> None:
    seen: dict[str, set[str]] = {}
    with pytest.raises(_Mishap):
        _fails_in_a_lab(tmp_path, seen)
    assert len(seen["namespaces"]) == 3
    assert seen["namespaces"].isdisjoint(namespaces.leftovers())
    assert seen["pids"]
    assert seen["pids"].isdisjoint(str(pid) for pid in procfs.processes())
    assert "to-a" not in Path("/proc/net/dev").read_text()


def test_what_a_killed_lab_left_is_taken_away_by_the_next(here: Lab) -> None:
    if not here.apart:
        pytest.skip(here.why_not)
    dead = next(pid for pid in range(4_000_000, 5_000_000) if not Path(f"/proc/{pid}").exists())
    name = f"hplab{dead}x0-net"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert name in namespaces.leftovers()
    namespaces.sweep()
    assert name not in namespaces.leftovers()
    assert namespaces.leftovers(os.getpid()), "those of the living stay"


def test_a_lab_without_namespaces_has_the_same_hosts_on_the_loopback(tmp_path: Path) -> None:
    with Lab(tmp_path, ["a", "b"], apart=False) as found:
        for host in found.hosts.values():
            host.preload = False
            host.boot()
        assert found.joined("a", "b"), found.logs()
        pids = [process.pid for process in found["b"].processes()]
        assert pids
        found["b"].kill()
        assert found["b"].processes() == []
        assert [pid for pid in pids if pid in {process.pid for process in found["a"].processes()}] == []
        assert found.joined("a", timeout=40), found.logs()
