"""What is still to be done of a call of the fleet: nothing twice, nothing forgotten, and what is not known is said."""

from __future__ import annotations

import itertools

import pytest

from hostpart.fleet.request import Request
from hostpart.fleet.resumption import BEGIN, DONE, FOLLOW, UNKNOWN, Before, Known, best, chosen, decide, last

RUN = "0123456789ab"
STATES = ("placing", "held", "running", "ended", "refused", "given-up", "lost", "unknown")
DECISIONS = ("", "placed", "starting", "started", "ended", "refused", "given-up", "lost")


def request(kind: str = "run") -> Request:
    return Request(RUN, 0, (kind, "x"), {})


def known(state: str, host: str = "a", attempt: int = 1, **more: object) -> Known:
    return Known(host, attempt, {"state": state, **more})


@pytest.mark.parametrize(
    ("before", "there", "want"),
    [
        ("", None, BEGIN),
        ("placed", None, BEGIN),  # it was held, and held is not run
        ("starting", None, UNKNOWN),
        ("started", None, UNKNOWN),
        ("lost", None, UNKNOWN),
        ("ended", None, DONE),
        ("refused", None, DONE),
        ("given-up", None, BEGIN),
        ("started", "running", FOLLOW),
        ("started", "ended", FOLLOW),
        ("lost", "ended", FOLLOW),
        ("starting", "held", FOLLOW),
        ("starting", "given-up", BEGIN),  # its own host says that the word never came
        ("started", "lost", UNKNOWN),
        ("", "held", FOLLOW),
    ],
)  # fmt: skip
def test_a_command_is_run_once(before: str, there: str | None, want: str) -> None:
    had = Before(before, 1, "a" if before else None)
    assert decide(request(), had, known(there) if there else None) == want


def test_what_another_host_holds_is_not_started_while_the_first_may_have_run_it() -> None:
    for state, other in itertools.product(("starting", "started", "lost"), ("held", "placing", "given-up", "refused")):
        assert decide(request(), Before(state, 1, "a"), known(other, "b", 2)) == UNKNOWN
        assert decide(request(), Before(state, 1, "a"), known(other, "b", 2), again=True) == BEGIN


def test_nothing_that_may_have_run_begins_anew_unless_asked() -> None:
    for before, there, host in itertools.product(DECISIONS, (None, *STATES), ("a", "b")):
        had = Before(before, 1, "a" if before else None)
        what = decide(request(), had, known(there, host) if there else None)
        may_have_run = before in ("starting", "started", "lost", "ended") or there in ("running", "ended", "lost")
        never_started = host == "a" and there in ("given-up", "refused")  # by the word of the only host that could
        if may_have_run and not never_started:
            assert what != BEGIN, (before, there, host)


@pytest.mark.parametrize(
    ("there", "want"),
    [
        (None, BEGIN), (known("running"), FOLLOW), (known("ended", status=0), FOLLOW),
        (known("ended", status=1), BEGIN), (known("lost"), BEGIN),
    ],
)  # fmt: skip
def test_an_experiment_goes_on_where_it_was(there: Known | None, want: str) -> None:
    assert decide(request("experiment"), Before("started", 0, "a"), there) == want


def test_of_several_errands_the_one_that_ran_counts() -> None:
    assert best([known("held", "a", 3), known("running", "b", 1)]) == known("running", "b", 1)
    assert best([known("given-up", "a", 1), known("held", "b", 2)]) == known("held", "b", 2)
    assert best([known("held", "a", 1), known("held", "b", 2)]) == known("held", "b", 2)
    assert best([known("what"), known("unknown")]) is None


def test_the_last_decision_counts_and_keeps_its_host() -> None:
    decisions: dict[str, dict[str, object]] = {
        f"{RUN}.0.1": {"state": "given-up", "host": "a"},
        f"{RUN}.0.2": {"state": "started", "host": "b"},
        f"{RUN}.1.1": {"state": "lost", "host": None},
        "../../etc": {"state": "started", "host": "c"},
        f"{RUN}.x.1": {"state": "started", "host": "c"},
    }
    assert last(decisions) == {0: Before("started", 2, "b"), 1: Before("lost", 1, None)}


def test_an_experiment_that_is_done_is_not_begun_again_where_its_host_knows_it_no_more() -> None:
    assert decide(request("experiment"), Before("ended", 1, "a", 0), None) == DONE
    assert decide(request("experiment"), Before("ended", 1, "a", 1), None) == BEGIN
    assert decide(request("experiment"), Before("lost", 1, "a"), None) == BEGIN


def test_no_other_host_speaks_for_the_one_that_has_a_request() -> None:
    own, other = known("running"), known("ended", "b")
    assert chosen(Before("started", 1, "a"), [other, own]) == own
    assert chosen(Before("placed", 1, "a"), [other, own]) == other
    assert chosen(Before("placed", 1, "a"), [other, own], "a") == own
    assert chosen(Before("placed", 1, "a"), [other], "a") is None
