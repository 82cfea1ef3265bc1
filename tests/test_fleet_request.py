"""What a host is asked, and what it needs to have for it."""

from __future__ import annotations

import argparse
import json

import pytest

from hostpart.cli import options
from hostpart.cli import run as run_command
from hostpart.cli.fleet_session import words_of
from hostpart.errors import UsageError
from hostpart.fleet.request import Request, needs_of, new_run, number_of
from hostpart.fleet.supply import CORE_PCPUS, LLC, PCPUS


def test_a_request_is_json_and_its_name_tells_which_it_is() -> None:
    run = new_run()
    text = Request(run, 7, ("run", "-n", "2", "--", "a b"), {PCPUS: 2.0}, env={"A": "1"}).text(3)
    document = json.loads(text)
    assert document["argv"] == ["run", "-n", "2", "--", "a b"]
    assert document["env"] == {"A": "1"}
    assert number_of(document["id"]) == (7, 3)
    for wrong in ("", "a.b.c", f"{run}.1", f"{run}.1.2.3", f"../{run}.1.2", f"{run}.1.x"):
        with pytest.raises(ValueError):
            number_of(wrong)


def test_a_request_asks_for_what_it_needs() -> None:
    assert needs_of(2, "shared", "packed", 8) == {PCPUS: 2}
    assert needs_of(2, "exclusive", "packed", 8) == {PCPUS: 2, CORE_PCPUS: 2}
    assert needs_of(8, "whole", "llc", 8) == {PCPUS: 8, CORE_PCPUS: 8, LLC: 8}


def test_a_vm_that_spans_hosts_is_refused() -> None:
    with pytest.raises(UsageError, match="a VM lies on one host") as caught:
        needs_of(9, "exclusive", "packed", 8)
    assert "--gang" in caught.value.remedy


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "3", "--policy", "spread", "--smt", "shared"],
        ["--pcpus", "5,3", "--reserve", "0-1,4"],
        ["--smp", "--isolation", "sweep", "--require", "--strict", "-vv", "--mlock"],
        ["--sched", "fifo:50", "--nice", "-5", "--foreign-limit", "2.5", "--on-drift", "kill", "--mems", "0"],
        [],
    ],
)
def test_a_hosts_hostpart_is_asked_the_same(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    run_command.add(parser)
    given = parser.parse_args([*words, "--", "true", "-n", "9"])
    again = parser.parse_args([*words_of(parser._actions, given, ["wait"]), "--", "true", "-n", "9"])
    assert again == given
    assert options.request_of(again) == options.request_of(given)
