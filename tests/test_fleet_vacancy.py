"""What hosts have free, as far as it is known to who sends them requests."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from hostpart.fleet import vacancy
from hostpart.fleet.vacancy import LAG_S, Vacancy

TWO = {"pcpus": 2.0, "cores": 1.0}
ONE = {"pcpus": 1.0}


@pytest.fixture
def known() -> Vacancy:
    """Two hosts of two pCPUs."""
    made = Vacancy()
    made.told({"a": TWO, "b": TWO})
    return made


def test_hosts_with_room_are_found_going_round(known: Vacancy) -> None:
    assert [known.fitting(ONE, (), 1) for _ in range(3)] == [["a"], ["b"], ["a"]]
    assert known.fitting(ONE, ("a",), 2) == ["b"]
    assert known.fitting({"pcpus": 3.0}, (), 2) == []
    assert known.fitting({"unheard of": 1.0}, (), 2) == []


def test_what_is_on_its_way_leaves_less_to_spare_and_takes_nothing(known: Vacancy) -> None:
    known.reserve(["a", "b"], TWO)
    assert known.spare(ONE, (), 2) == []
    assert sorted(known.fitting(ONE, (), 2)) == ["a", "b"]
    known.settle(["a", "b"], TWO)
    assert sorted(known.spare(ONE, (), 2)) == ["a", "b"]


def test_what_a_host_says_limits_what_it_has_told(known: Vacancy) -> None:
    known.say("a", {"pcpus": 1.0, "cores": 0.0}, 5)
    assert known.of("a") == {"pcpus": 1.0, "cores": 0.0}
    known.told({"a": TWO, "b": TWO})  # it has told the scheduler before
    assert known.of("a") == {"pcpus": 1.0, "cores": 0.0}
    known.say("a", TWO, 4)  # an older word that comes late
    assert known.of("a") == {"pcpus": 1.0, "cores": 0.0}
    known.told({"a": {"pcpus": 0.0, "cores": 0.0}, "b": TWO})  # others have come since
    assert known.of("a") == {"pcpus": 0.0, "cores": 0.0}


def test_what_ended_before_a_host_looked_is_not_counted_twice(known: Vacancy) -> None:
    known.say("a", {"pcpus": 1.0, "cores": 1.0}, 5)
    known.give("a", ONE, 4)
    assert known.of("a")["pcpus"] == 1.0
    known.give("a", ONE, 5)
    assert known.of("a")["pcpus"] == 2.0
    known.give("a", ONE, 6)
    assert known.of("a")["pcpus"] == 2.0, "more than it has told"
    known.give("b", ONE, 1)
    assert known.of("b") == TWO


def test_what_ended_after_a_host_looked_counts_though_its_look_is_heard_of_later(known: Vacancy) -> None:
    known.say("a", {"pcpus": 0.0, "cores": 0.0}, 3)
    known.give("a", ONE, 4)
    assert known.of("a")["pcpus"] == 1.0
    known.say("a", {"pcpus": 0.0, "cores": 0.0}, 4)
    assert known.of("a")["pcpus"] == 1.0
    known.say("a", {"pcpus": 0.0, "cores": 0.0}, 3)
    assert known.of("a")["pcpus"] == 1.0, "an older word"
    known.say("a", {"pcpus": 0.0, "cores": 0.0}, 5)  # it was in there, and something else has come
    assert known.of("a")["pcpus"] == 0.0
    known.give("b", ONE, 2)
    known.say("b", {"pcpus": 0.0, "cores": 0.0}, 2)
    assert known.of("b")["pcpus"] == 1.0, "the first that was heard of it"


def test_what_holds_without_a_word_of_what_is_left_counts_by_its_needs(known: Vacancy) -> None:
    known.take("a", ONE, 1)
    assert known.of("a")["pcpus"] == 1.0
    known.take("c", ONE, 1)
    assert known.of("c") == {}


def test_after_a_while_what_was_told_holds_alone(known: Vacancy, monkeypatch: pytest.MonkeyPatch) -> None:
    known.say("a", {"pcpus": 0.0}, 1)
    later = time.monotonic() + LAG_S
    monkeypatch.setattr(vacancy, "time", SimpleNamespace(monotonic=lambda: later))
    assert known.of("a")["pcpus"] == 0.0, "nothing has been told since"
    known.told({"a": TWO})
    assert known.of("a") == TWO
    assert known.free() == {"a": TWO}
