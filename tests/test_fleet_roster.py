from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpart.errors import UsageError
from hostpart.fleet import cluster, roster
from hostpart.fleet.roster import FleetHost, Roster, choose, differences, read

from .fleets import HELLO, Fleet, fleet_at

SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
FREE = {"hostpart-pcpus": 4.0, "hostpart-cores": 2.0, "hostpart-core-pcpus": 4.0, "hostpart-llc": 3.0}


def worker(name: object = None, **hello: object) -> dict[str, object]:
    return {"type": "Worker", "name": name, "resources": FREE, "status": "running", "hostpart": {**HELLO, **hello}}


def identity(*workers: dict[str, object], port: int = 1000) -> dict[str, object]:
    addresses = [f"tcp://127.0.0.1:{port + index}" for index in range(len(workers))]
    return {
        "type": "Scheduler",
        "workers": {
            address: {**one, "name": address if one["name"] is None else one["name"]}
            for address, one in zip(addresses, workers, strict=True)
        },
    }


def names(one: Roster) -> list[str]:
    return [host.name for host in one.hosts]


def by_hostname(one: Roster) -> dict[object, str]:
    return {host.hello["machine"]: host.name for host in one.hosts}


def test_a_host_has_the_name_that_its_worker_was_given() -> None:
    assert names(read(identity(worker("box"), worker("node-10"), worker("node-9")))) == ["box", "node-9", "node-10"]


def test_a_host_without_one_has_its_own_and_never_an_address() -> None:
    assert names(read(identity(worker(None, hostname="a.example.org"), worker(0, hostname="b")))) == [
        "a.example.org", "b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("a/b c\x1b[31m", "a-b-c-31m"),
        ("..", "node"),
        ("", "node"),
        ("--json", "json"),
        ("x" * 5000, "x" * 64),
        ("größe\n", "gr-e"),
        ({"a": 1}, "node"),
    ],
    ids=lambda value: str(value)[:12].encode("unicode_escape").decode(),
)
def test_a_name_is_fit_for_a_file_and_for_a_terminal(given_name: object, name: str) -> None:
    assert names(read(identity(worker(given_name)))) == [name]


def test_names_are_unique_and_do_not_depend_on_who_came_first() -> None:
    workers = [worker(None, machine=f"{number:016x}") for number in range(4)]
    there = by_hostname(read(identity(*workers)))
    assert sorted(there.values()) == ["node", "node-2", "node-3", "node-4"]
    assert by_hostname(read(identity(*reversed(workers), port=3000))) == there
    assert names(read(identity(worker("node"), worker("node"), worker("node-2")))) == ["node", "node-2", "node-3"]
    long = read(identity(*[worker("x" * 64)] * 12))
    assert len(set(names(long))) == 12
    assert max(map(len, names(long))) <= 64


def test_a_host_keeps_its_name_when_its_worker_is_started_again_and_another_comes_before_it() -> None:
    a, b, c = (worker(None, machine=letter * 16) for letter in "abc")
    before = read(identity(b, c))
    assert by_hostname(before) == {"b" * 16: "node", "c" * 16: "node-2"}
    after = roster.read(identity(a, c, b, port=5000), before)
    assert by_hostname(after) == {"a" * 16: "node-3", "b" * 16: "node", "c" * 16: "node-2"}


def test_the_name_of_a_host_that_is_gone_is_kept_for_it() -> None:
    a, b = (worker(None, machine=letter * 16) for letter in "ab")
    one = read(identity(a))
    two = read(identity(b), one)
    three = read(identity(worker(None, machine="c" * 16)), two)
    four = read(identity(b, a, port=7000), three)
    assert [by_hostname(each) for each in (one, two, three, four)] == [
        {"a" * 16: "node"}, {"b" * 16: "node-2"}, {"c" * 16: "node-3"}, {"a" * 16: "node", "b" * 16: "node-2"},
    ]  # fmt: skip


def test_a_host_that_was_rebooted_is_the_same_host() -> None:
    before = read(identity(worker(None), worker(None, machine="f" * 16)))
    after = read(identity(worker(None, machine="f" * 16), worker(None, boot_id="b1"), port=4000), before)
    assert by_hostname(after) == by_hostname(before)


def test_workers_share_where_boot_and_domain_are_the_same_and_their_cpus_overlap() -> None:
    there = read(
        identity(
            worker("a", usable="0-1"), worker("b", usable="1-2"), worker("c", usable="3"),
            worker("d", domain="d1"), worker("e", boot_id="b1"),
        )
    )  # fmt: skip
    assert {host.name: host.shares_with for host in there.hosts} == {
        "a": ("b",), "b": ("a",), "c": (), "d": (), "e": (),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        ("up to no good", "no table"),
        ({**HELLO, "protocol": 2, "version": "0.9"}, "speaks protocol 2 (hostpart 0.9), and this hostpart 1"),
        ({**HELLO, "protocol": 10**400}, "protocol another"),
        ({**HELLO, "protocol": True}, "'protocol' is no number"),
        ({**HELLO, "protocol": "1"}, "'protocol' is no number"),
        ({**HELLO, "hostname": 5}, "'hostname' is of type int"),
        ({**HELLO, "hostname": "a\x1b]0;b\x07"}, "'hostname' is no plain text"),
        ({**HELLO, "hostname": ""}, "'hostname' is empty"),
        ({**HELLO, "version": "9" * 100_000}, "'version' is too long"),
        ({**HELLO, "machine": "../../../etc/pwd"}, "'machine' is not 16"),
        ({**HELLO, "usable": "0-99999"}, "'usable' is no set of CPUs"),
        ({**HELLO, "usable": "x"}, "'usable' is no set of CPUs"),
        ({**HELLO, "command": "hostpart"}, "'command' is no list of words"),
        ({**HELLO, "command": ["a\nb"]}, "'command' is no list of words"),
        ({**HELLO, "command": ["a"] * 1000}, "'command' is no list of words"),
        ({key: value for key, value in HELLO.items() if key != "boot_id"}, "'boot_id' is missing"),
        ({}, "'protocol' is no number"),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode() if isinstance(value, str) else None,
)
def test_a_worker_that_is_no_host_as_it_should_be_is_left_out_with_the_reason(hello: object, why: str) -> None:
    there = read(identity(worker("good"), {**worker("bad"), "hostpart": hello}))
    assert names(there) == ["good"]
    (out,) = there.left_out
    assert why in out.why
    assert out.name == "bad"
    assert out.remedy
    assert len(out.why) < 200
    assert out.why.isprintable()


def test_a_worker_without_hostpart_is_left_out_and_the_remedy_is_the_preload() -> None:
    plain = {key: value for key, value in worker("dask").items() if key != "hostpart"}
    there = read(identity(plain, {**worker("going"), "status": "closing_gracefully"}))
    assert there.hosts == ()
    assert [one.name for one in there.left_out] == ["dask", "going"]
    assert "--preload hostpart.fleet.agent" in there.left_out[0].remedy


def test_resources_that_are_no_numbers_are_nothing() -> None:
    odd = {"hostpart-pcpus": "4", "hostpart-cores": -1, "hostpart-core-pcpus": float("nan"), "hostpart-llc": 10**400}
    (host,) = read(identity({**worker(), "resources": odd})).hosts
    assert host.resources == dict.fromkeys(FREE, 0.0)
    (host,) = read(identity({**worker(), "resources": FREE | {"GPU": 1.0}})).hosts
    assert host.resources == FREE


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": junk, "status": junk, "resources": junk},
            optional={
                "hostpart": junk | st.builds(lambda key, value: {**HELLO, key: value}, st.sampled_from([*HELLO]), junk)
            },
        ),
        max_size=4,
    ),
    st.dictionaries(junk.filter(lambda key: key.__hash__ is not None), junk, max_size=2) | junk,
)
def test_whatever_workers_say_every_name_is_safe_and_unique(workers: list[dict[str, object]], odd: object) -> None:
    told = identity(*workers)
    assert isinstance(told["workers"], dict)
    before = copy.deepcopy(told["workers"])
    if isinstance(odd, dict):
        told["workers"].update(odd)
    there = read(told)
    given_names = [*names(there), *(one.name for one in there.left_out)]
    assert len(set(given_names)) == len(given_names) == len(told["workers"])
    assert [name for name in given_names if not SAFE.fullmatch(name)] == []
    assert all(one.why.isprintable() and one.address.isprintable() for one in there.left_out)
    assert str({key: told["workers"][key] for key in before}) == str(before)
    assert read(odd) == Roster() or isinstance(odd, dict)
    again = read(told, there)
    assert names(again) == names(there)


def test_choosing_keeps_the_hosts_named_and_says_what_is_wrong_with_others() -> None:
    there = read(identity(worker("a"), worker("b"), {**worker("c"), "hostpart": None}))
    assert choose(there, []) is there
    assert names(choose(there, ["b"])) == ["b"]
    with pytest.raises(UsageError, match=r"no host is named 'd'; there are: a, b"):
        choose(there, ["a", "d"])
    with pytest.raises(UsageError, match="c has no hostpart in it") as caught:
        choose(there, ["c"])
    assert "--preload" in caught.value.remedy


def test_differences_are_said_in_a_sentence_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    from hostpart import __version__

    same = {"version": __version__, "python": platform.python_version()}
    assert differences(read(identity(worker("a", **same), worker("b", **same))).hosts) == ()
    told = differences(read(identity(worker("a", **same), worker("b", **{**same, "version": "9.9"}))).hosts)
    assert told == (f"versions of hostpart differ: {__version__} here; {__version__} on a; 9.9 on b",)
    many: list[FleetHost] = list(read(identity(*[worker(f"n{i}", **{**same, "python": "9"}) for i in range(9)])).hosts)
    assert "and 3 more" in differences(many)[0]
    assert differences([]) == ()


def look(fleet: Fleet, before: Roster | None = None) -> Roster:
    async def seen() -> Roster:
        async with cluster.connect(cluster.Where(scheduler=fleet.address)) as there:
            return await roster.look(there.client, before)

    return cluster.run(seen())


def test_a_real_scheduler_is_asked_afresh(tmp_path: Path) -> None:
    with fleet_at(tmp_path / "fleet") as fleet:
        assert look(fleet) == Roster()
        fleet.says(HELLO, "--name", "box", "--resources", "hostpart-pcpus=2")
        again = fleet.says({**HELLO, "hostname": "other", "domain": "d1"})
        fleet.says({**HELLO, "protocol": 7}, "--name", "new")
        fleet.worker("--name", "plain")
        there = look(fleet)
        assert names(there) == ["box", "other"]
        assert there.hosts[0].resources["hostpart-pcpus"] == 2
        assert [one.name for one in there.left_out] == ["new", "plain"]
        fleet.end(again)
        gone = look(fleet, there)
        assert (names(gone), [host.name for host in gone.gone]) == (["box"], ["other"])
        fleet.says({**HELLO, "hostname": "other", "domain": "d1"})
        assert names(look(fleet, gone)) == ["box", "other"]
