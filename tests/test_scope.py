"""Whose tasks are covered: how it is written, and who belongs to a tree, a user and a cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation.affinity import Task
from hostpart.isolation.scope import Scope, below, default_scope, parse


def task(tid: int, ppid: int, tgid: int = 0, uid: int = 0) -> Task:
    """A thread of which only the kin counts."""
    return Task(tid, tgid or tid, 1, ppid, 1, 0, "x", uid, CpuSet.of([0]))


# 1 ── 10 ── 11 ── 12, with a thread 13 of its own; 20 is beside them
TASKS = {1: task(1, 0), 10: task(10, 1), 11: task(11, 10), 12: task(12, 11), 13: task(13, 11, 12), 20: task(20, 1)}


def covered(text: str, tmp_path: Path) -> set[int]:
    """Return the threads that a scope covers."""
    covers = parse(text).covers(Host(str(tmp_path)), TASKS)
    return {tid for tid, one in TASKS.items() if covers(one)}


@pytest.mark.parametrize("text", ["host", "user", "tree:17", "cgroup:/", "cgroup:/a b/c:d", "cgroup:/sys/fs/cgroup/x"])
def test_a_scope_is_written_as_it_is_read(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "''"),
        ("hosts", "'hosts'"),
        ("host:1", "'host:1'"),
        ("user:root", "'user:root'"),
        ("tree", "''"),
        ("tree:", "''"),
        ("tree:0", "'0'"),
        ("tree:-1", "'-1'"),
        ("tree:1 ", "'1 '"),
        ("tree:١", "'١'"),
        ("tree:99999999999", "'99999999999'"),
        ("cgroup", "''"),
        ("cgroup:a", "'a'"),
        ("cgroup:/a/../b", "'/a/../b'"),
        ("cgroup:/a\0b", "'/a\\x00b'"),
    ],
)
def test_what_is_no_scope_is_refused_with_the_part_that_is_wrong(text: str, wrong: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert wrong in str(error.value)
    assert str(error.value).startswith("want ")


@given(st.text())
def test_any_text_is_a_scope_or_a_value_error(text: str) -> None:
    try:
        assert str(parse(text)) == text or text.startswith("tree:0")
    except ValueError:
        pass


def test_the_host_is_everybody(tmp_path: Path) -> None:
    assert covered("host", tmp_path) == set(TASKS)


def test_a_tree_is_its_top_and_all_below_it_with_their_threads(tmp_path: Path) -> None:
    assert covered("tree:10", tmp_path) == {10, 11, 12, 13}
    assert covered("tree:12", tmp_path) == {12, 13}
    assert covered("tree:1", tmp_path) == set(TASKS)
    assert covered("tree:999", tmp_path) == set()


def test_parents_in_a_ring_do_not_hang_it() -> None:
    ring = {5: task(5, 6), 6: task(6, 7), 7: task(7, 5)}
    is_below = below({1}, ring)
    assert [is_below(pid) for pid in ring] == [False] * 3


def test_a_user_is_who_the_real_uid_says(tmp_path: Path) -> None:
    mine, other = task(5, 1, uid=os.getuid()), task(6, 1, uid=os.getuid() + 1)
    covers = parse("user").covers(Host(str(tmp_path)), {5: mine, 6: other})
    assert (covers(mine), covers(other)) == (True, False)


@pytest.mark.parametrize(
    "folder",
    ["sys/fs/cgroup/a", "sys/fs/cgroup/unified/a", "sys/fs/cgroup/cpuset/a"],
    ids=["version 2", "hybrid", "version 1"],
)
@pytest.mark.parametrize("mounted", [True, False], ids=["as mounted", "below the mount"])
def test_a_cgroup_is_its_processes_and_those_below(tmp_path: Path, folder: str, *, mounted: bool) -> None:
    for path, pids in ((folder, "10\n12\n"), (f"{folder}/b/c", "20\n"), (f"{folder}/b", ""), (f"{folder}x", "11\n")):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "cgroup.procs").write_text(pids)
    assert covered(f"cgroup:/{folder}" if mounted else "cgroup:/a", tmp_path) == {10, 12, 13, 20}
    assert covered(f"cgroup:/{folder}/b/" if mounted else "cgroup:/a/b/", tmp_path) == {20}


def test_a_cgroup_that_is_not_there_covers_nobody(tmp_path: Path) -> None:
    assert covered("cgroup:/nowhere", tmp_path) == set()


def test_the_default_follows_the_environment_and_then_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSTPART_SCOPE", raising=False)
    assert default_scope() == ("user" if os.geteuid() else "host")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_scope() == "user"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_scope() == "host"
    monkeypatch.setenv("HOSTPART_SCOPE", "tree:5")
    assert default_scope() == "tree:5"


def test_two_equal_scopes_are_equal() -> None:
    assert parse("tree:5") == Scope("tree", pid=5)
    assert parse("tree:5") != parse("tree:6")
