from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpart.cli import fleet as fleet_command
from hostpart.cli import fleet_hosts, main
from hostpart.cli.fleet import ACTIONS, action_parser
from hostpart.cli.fleet_hosts import read_answer
from hostpart.cpuset import CpuSet
from hostpart.fleet.roster import FleetHost

from .conftest import Place, wait_until
from .fleets import HELLO, Fleet, fleet_at

HOSTS = ("left", "right")
OWN = ("--preload", "hostpart.fleet.agent")


class Two:
    """Two workers of this machine as two hosts: leases and books of their own each."""

    def __init__(self, fleet: Fleet, places: dict[str, Place], place: Place) -> None:
        self.fleet, self.places, self.place = fleet, places, place

    def run(self, *args: str, **more: Any) -> Any:
        return self.place.run("fleet", "--scheduler", str(self.fleet.file), *args, **more)

    def json(self, *args: str, status: int = 0) -> dict[str, Any]:
        done = self.run(*args, "--json")
        assert done.returncode == status, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        assert told["schema"] == 1
        return told

    def vm(self, host: str, name: str) -> None:
        """Have a VM run on a host until it is stopped."""
        held = self.places[host].start("run", "--name", name, "--", "sh", "-c", "echo; exec sleep 300")
        assert held.stdout
        held.stdout.readline()

    def join(self, name: str) -> None:
        here = self.places[name]
        self.fleet.worker(
            *OWN, "--name", name, env={**here.env, "HOSTPART_FLEET_DIR": str(here.runtime.parent / "fleet")}
        )


@pytest.fixture
def two(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Two]:
    places = {}
    for name in HOSTS:
        (tmp_path / name).mkdir()
        places[name] = Place(tmp_path / name)
    try:
        with fleet_at(tmp_path / "dask") as fleet:
            there = Two(fleet, places, place)
            for name in HOSTS:
                there.join(name)
            yield there
    finally:
        for here in places.values():
            for process in here.started:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines()[1:] if line.strip()}


def test_topology_has_a_line_per_host_and_says_what_is_free(two: Two) -> None:
    usable = len(os.sched_getaffinity(0))
    done = two.run("topology")
    assert (done.returncode, done.stderr) == (0, "")
    head = done.stdout.splitlines()[0].split()
    assert head[:3] == ["host", "pCPUs", "cores"]
    assert sorted(rows(done.stdout)) == list(HOSTS)
    told = two.json("topology")
    assert [host["name"] for host in told["hosts"]] == list(HOSTS)
    assert told["left_out"] == []
    before = {host["name"]: host["topology"]["free"]["pcpus"] for host in told["hosts"]}
    if usable > 1:
        two.vm("left", "box")
        after = {host["name"]: host["topology"]["free"]["pcpus"] for host in two.json("topology")["hosts"]}
        assert after == {"left": before["left"] - 1, "right": before["right"]}


def test_the_hosts_option_asks_these_only_and_one_that_is_not_there_is_a_usage_error(two: Two) -> None:
    assert sorted(rows(two.run("--hosts", "right", "topology").stdout)) == ["right"]
    done = two.run("--hosts", "right,middle", "topology")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no host is named 'middle'; there are: left, right" in done.stderr


@pytest.mark.usefixtures("two_pcpus")
def test_plan_says_where_it_fits_and_why_not_elsewhere(two: Two) -> None:
    usable = len(os.sched_getaffinity(0))
    done = two.run("plan", "-n", str(usable - 1), "--policy", "spread")
    assert done.returncode == 0, done.stderr
    assert [rows(done.stdout)[name][1] for name in HOSTS] == ["yes", "yes"]
    assert "spread" in done.stdout
    two.vm("left", "box")
    done = two.run("plan", "-n", str(usable - 1))
    assert done.returncode == 0
    assert [rows(done.stdout)[name][1] for name in HOSTS] == ["no", "yes"]
    assert "wanted" in done.stdout
    told = {host["name"]: host for host in two.json("plan", "-n", str(usable - 1))["hosts"]}
    assert (told["left"]["fits"], told["right"]["fits"]) == (False, True)
    assert len(told["right"]["plan"]["placement"]) == usable - 1
    assert two.run("plan", "-n", "8000").returncode == 3
    assert two.run("plan").returncode == 2


def test_plan_hands_every_option_of_a_request_on() -> None:
    from hostpart.cli.fleet_plan import words

    given = ["--pcpus", "5,3", "--policy", "spread", "--smt", "whole", "--kind", "efficiency", "--reserve", "0-1,4"]
    assert words(action_parser("plan").parse_args(given)) == given
    assert words(action_parser("plan").parse_args(["-n", "2"])) == [
        "-n",
        "2",
        "--policy",
        "packed",
        "--smt",
        "exclusive",
    ]


@pytest.mark.usefixtures("two_pcpus")
def test_ps_lists_the_vms_of_all_hosts_and_stop_ends_one_where_it_is(two: Two) -> None:
    assert "no VM of yours" in two.run("ps").stdout
    two.vm("left", "box")
    two.vm("right", "crate")
    done = two.run("ps")
    assert {name: row[1:3] for name, row in rows(done.stdout).items()} == {
        "left": ["box", "RUNNING"], "right": ["crate", "RUNNING"],
    }  # fmt: skip
    assert {host["name"]: [vm["vm"] for vm in host["vms"]] for host in two.json("ps")["hosts"]} == {
        "left": ["box"], "right": ["crate"],
    }  # fmt: skip
    done = two.run("stop", "-t", "1", "crate")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "hostpart: crate on right is gone\n")
    assert sorted(rows(two.run("ps").stdout)) == ["left"]
    told = two.json("stop", "box")
    assert [host["name"] for host in told["hosts"]] == ["left"]
    everything = CpuSet.of(os.sched_getaffinity(0))
    assert wait_until(lambda: all(here.free() == everything for here in two.places.values()))


@pytest.mark.usefixtures("two_pcpus")
def test_stop_wants_to_know_the_host_where_two_have_such_a_vm_and_none_is_a_usage_error(two: Two) -> None:
    done = two.run("stop", "box")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no host has a VM named 'box'; none is running" in done.stderr
    two.vm("left", "box")
    two.vm("right", "box")
    done = two.run("stop", "box")
    assert done.returncode == 2
    assert "2 hosts have a VM named 'box': left, right" in done.stderr
    assert two.run("stop", "--host", "right", "box").returncode == 0
    assert sorted(rows(two.run("ps").stdout)) == ["left"]
    assert two.run("stop", "--host", "right", "box").returncode == 2
    assert two.run("stop", "--host", "nowhere", "box").returncode == 2
    assert two.run("stop", "box").returncode == 0


@pytest.mark.usefixtures("two_pcpus")
def test_two_workers_that_share_a_host_are_one_place_for_its_vms(two: Two) -> None:
    here = two.places["left"]
    two.fleet.worker(*OWN, "--name", "again", env=here.env)
    two.vm("left", "box")
    done = two.run("ps")
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["again", "box"]]
    assert "again takes pCPUs from the same leases as left" in two.run("topology").stdout
    assert two.run("stop", "box").returncode == 0


def test_a_host_that_does_not_answer_is_a_row_that_says_so(
    two: Two, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, since nobody should wait for twenty seconds.
    monkeypatch.setattr(fleet_hosts, "ANSWER_S", 2.0)
    (silent,) = (one for one in two.fleet.processes if isinstance(one.args, list) and "left" in one.args)
    silent.send_signal(signal.SIGSTOP)
    try:
        assert main(["fleet", "--scheduler", str(two.fleet.file), "topology"]) == 1
        out, err = capsys.readouterr()
        assert " no answer " in next(line for line in out.splitlines() if line.startswith("left"))
        assert rows(out)["right"][1].isdecimal()
        assert err == "hostpart: left: no answer within 2 s\n"
        assert main(["fleet", "--scheduler", str(two.fleet.file), "ps", "--json"]) == 1
        told = {host["name"]: host for host in json.loads(capsys.readouterr().out)["hosts"]}
        assert (told["left"]["problem"], told["right"]["problem"]) == ("no answer within 2 s", None)
        assert main(["fleet", "--scheduler", str(two.fleet.file), "stop", "box"]) == 1
        assert "no host that answers has a VM named 'box'; left: no answer" in capsys.readouterr().err
    finally:
        silent.send_signal(signal.SIGCONT)


def test_workers_that_are_no_hosts_are_said_and_do_no_harm(two: Two) -> None:
    two.fleet.says({**HELLO, "hostname": "\x1b[2Jx"}, "--name", "evil\x1b[31m")
    two.fleet.worker("--name", "plain")
    done = two.run("topology")
    assert done.returncode == 0
    assert "left out: plain (tcp://127.0.0.1:" in done.stderr
    assert "has no hostpart in it; start it with: dask worker" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert [one["name"] for one in two.json("topology")["left_out"]] == ["evil-31m", "plain"]


def test_a_worker_that_claims_to_be_a_host_and_is_none_is_a_row(two: Two) -> None:
    two.fleet.says(HELLO, "--name", "fake")
    done = two.run("topology")
    assert done.returncode == 1
    assert "fake: it refused: this Dask worker is no host" in done.stderr


def test_an_empty_fleet_and_one_that_is_away_are_failures_with_a_remedy(place: Place, tmp_path: Path) -> None:
    with fleet_at(tmp_path / "dask") as fleet:
        done = place.run("fleet", "--scheduler", fleet.address, "topology")
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            f"try: on each host: dask worker {fleet.address} --nthreads 1 --preload hostpart.fleet.agent" in done.stderr
        )
    done = place.run("fleet", "topology")
    assert done.returncode == 2
    assert "try: add --scheduler ADDRESS" in done.stderr
    done = place.run("fleet", "--scheduler", "tcp://192.0.2.1:8786", "ps")
    assert done.returncode == 2
    assert "plain text over a network" in done.stderr
    assert "Traceback" not in done.stderr


def test_local_workers_do_without_a_cluster(place: Place, tmp_path: Path) -> None:
    place.env["HOSTPART_FLEET_DIR"] = str(tmp_path / "fleet")
    done = place.run("fleet", "--local", "2", "topology")
    assert done.returncode == 0, done.stderr
    assert len(rows(done.stdout)) >= 2
    assert "share this host's pCPUs" in done.stderr
    assert wait_until(lambda: not place.processes())


# The command line


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_its_own_help(place: Place, action: str) -> None:
    place.env["COLUMNS"] = "80"
    done = place.run("fleet", action, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^usage: hostpart fleet (\[\.\.\.\] )?{action}\b", done.stdout)
    assert "Exit status" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert f"  {action} " in place.run("fleet", "--help").stdout


def test_an_option_of_no_action_is_refused_by_the_action(place: Place) -> None:
    done = place.run("fleet", "topology", "--no-such-option")
    assert done.returncode == 2
    assert "try: hostpart fleet topology --help" in done.stderr
    assert place.run("fleet", "nonsense").returncode == 2
    assert place.run("fleet").returncode == 2
    assert place.run("fleet", "--local", "1", "--ssh", "x", "ps").returncode == 2
    assert place.run("fleet", "--hosts", "a,,b", "ps").returncode == 2


def test_an_action_gets_all_that_follows_it_and_the_fleets_options_beside_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import argparse
    from types import SimpleNamespace

    from hostpart.cli import parsers

    seen = []

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("-n", type=int)
        parser.add_argument("command", nargs=argparse.REMAINDER)

    def run(args: argparse.Namespace) -> int:
        seen.append((args.where.scheduler, args.where.insecure, args.hosts, args.n, args.command))
        return 7

    monkeypatch.setattr(fleet_command, "_module", lambda _: SimpleNamespace(add=add, run=run))
    line = ["--scheduler", "a:1", "--hosts", "x,y", "run", "-n", "2", "--", "cmd", "--hosts", "z", "--insecure"]
    assert fleet_command.run(parsers()["fleet"].parse_args(line)) == 7
    assert seen == [("a:1", False, ("x", "y"), 2, ["--", "cmd", "--hosts", "z", "--insecure"])]


@pytest.mark.parametrize(
    "text",
    [None, 5, b"{}", "", "[]", "{}", "null", '{"status": "0", "stdout": "", "stderr": ""}', "[" * 100_000,
     '{"status": 0, "stdout": "no json", "stderr": ""}', '{"status": 0, "stdout": "[]", "stderr": ""}',
     '{"status": true, "stdout": "{}", "stderr": ""}',
     '{"status": 0, "stdout": "' + "[" * 100_000 + '", "stderr": ""}'],
    ids=repr,
)  # fmt: skip
def test_an_answer_that_is_none_is_a_problem_of_that_host(text: object) -> None:
    answer = read_answer(FleetHost("a", "tcp://127.0.0.1:1", HELLO, {}), text)
    assert (answer.answered, answer.document, answer.problem) == (False, None, "its answer is not what it should be")


def test_what_a_host_says_went_wrong_is_shown_without_its_control_characters() -> None:
    host = FleetHost("a", "tcp://127.0.0.1:1", HELLO, {})
    told = {"status": 3, "stdout": "", "stderr": "hostpart: noted\nhostpart: 2 wanted\x1b[2J\ntry: less\n"}
    assert read_answer(host, json.dumps(told)).problem == "2 wanted\\x1b[2J"
    told = {"error": {"problem": "no\x07"}}
    assert read_answer(host, json.dumps(told)).problem == "it refused: no\\x07"
