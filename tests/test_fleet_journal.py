"""The directory of a fleet run: whole lines or none, files that no host's name gets out of, and nothing believed."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpart.errors import Failed, UsageError
from hostpart.experiment.analysis import analyse
from hostpart.experiment.pooled import pool
from hostpart.fleet import journal as module
from hostpart.fleet.journal import Journal, file_name, hosts, is_fleet, read
from hostpart.report.fleet import report
from tests import experiments
from tests.fleet_results import DOCUMENT, REQUEST, three, values, write

_RUN_KIND = {**DOCUMENT, "kind": "run"}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1), "beta": values(2)}, about={"beta": {"skew_s": -1.5}})
    fleet = read(str(there))
    assert fleet.document["run"] == DOCUMENT["run"]
    assert [one.name for one in fleet.hosts] == ["alpha", "beta"]
    alpha, beta = fleet.hosts
    made = experiments.results(values(1))
    assert alpha.results is not None
    assert alpha.results.experiment["plan"] == made.experiment["plan"]
    assert [run["run"] for run in alpha.runs] == [run["run"] for run in made.runs]
    assert alpha.runs[0]["metrics"] == made.runs[0]["metrics"]
    assert (beta.skew_s, beta.hello["hostname"], beta.facts["hostname"]) == (-1.5, "beta", "beta")
    assert fleet.requests[REQUEST] == {**fleet.requests[REQUEST], "state": "ended", "host": "alpha", "status": 0}
    assert alpha.outcomes[REQUEST]["status"] == 0
    assert fleet.damaged == 0
    assert is_fleet(str(there))
    assert not is_fleet(str(tmp_path))
    # The analysis of a host's lines is that of its own directory.
    assert analyse(alpha.results, resamples=199)["conditions"] == analyse(made, resamples=199)["conditions"]


def test_a_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(tmp_path / "one"), _RUN_KIND)
    wrote: list[bytes] = []
    real = os.write

    def written(fd: int, data: Any) -> int:
        wrote.append(bytes(data))
        return real(fd, data)

    monkeypatch.setattr(os, "write", written)
    journal.line("alpha", "event", request=REQUEST, event={"event": "ready", "text": "x" * 100_000}, offset=7)
    journal.decision(REQUEST, "started", host="alpha")
    journal.close()
    assert [data[-1:] for data in wrote] == [b"\n", b"\n"]
    assert _lines(tmp_path / "one/requests.jsonl")[0] | {"at": ""} == {
        "id": REQUEST, "state": "started", "host": "alpha", "at": "",
    }  # fmt: skip
    first = _lines(tmp_path / "one/hosts/alpha.jsonl")[0]
    assert list(first) == ["schema", "received", "kind", "request", "event", "offset"]
    assert (first["schema"], first["kind"], first["received"][-1]) == (1, "event", "Z")


@pytest.mark.parametrize("tail", [b'{"kind":"event","requ', b"\0\0\0", b"[1,2]", b'{"a":1}{'])
def test_a_cut_last_line_is_taken_away_and_the_next_stands_alone(tmp_path: Path, tail: bytes) -> None:
    there = tmp_path / "one"
    journal = Journal(str(there), _RUN_KIND)
    journal.line("alpha", "event", request=REQUEST, event={"n": 1}, offset=10)
    journal.decision(REQUEST, "placed", host="alpha")
    journal.close()
    for name in ("hosts/alpha.jsonl", "requests.jsonl"):
        with (there / name).open("ab") as file:
            file.write(tail)
    assert read(str(there)).damaged == 2
    journal = Journal(str(there))
    journal.line("alpha", "event", request=REQUEST, event={"n": 2}, offset=20)
    journal.decision(REQUEST, "ended", host="alpha")
    journal.close()
    assert [line["event"]["n"] for line in _lines(there / "hosts/alpha.jsonl")] == [1, 2]
    assert [line["state"] for line in _lines(there / "requests.jsonl")] == ["placed", "ended"]
    assert read(str(there)).damaged == 0


def test_a_whole_last_line_without_its_end_stays(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1)})
    path = there / "hosts/alpha.jsonl"
    whole = _lines(path)
    path.write_bytes(path.read_bytes()[:-1])
    journal = Journal(str(there))
    journal.line("alpha", "event", request=REQUEST, event={})
    journal.close()
    assert _lines(path)[:-1] == whole


def test_offsets_are_known_again(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "one"), _RUN_KIND)
    journal.line("tcp://10.0.0.1:1", "event", request=REQUEST, event={}, offset=10)
    journal.line("tcp://10.0.0.1:1", "event", request=REQUEST, event={}, offset=25)
    journal.line("beta", "event", request=REQUEST, event={}, offset=5)
    for _ in range(2):
        assert journal.offset("tcp://10.0.0.1:1", REQUEST) == 25
        assert journal.offset("beta", REQUEST) == 5
        assert journal.offset(None, REQUEST) == 25
        assert journal.offset("gamma", REQUEST) == journal.offset(None, "other.1") == 0
        journal.close()
        journal = Journal(str(tmp_path / "one"))
    # What was cut is asked for again.
    path = tmp_path / "one/hosts" / f"{file_name('tcp://10.0.0.1:1')}.jsonl"
    journal.close()
    path.write_bytes(path.read_bytes()[:-4])
    journal = Journal(str(tmp_path / "one"))
    assert journal.offset("tcp://10.0.0.1:1", REQUEST) == 10
    journal.close()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    there = str(tmp_path / "one")
    journal = Journal(there, _RUN_KIND)
    with pytest.raises(UsageError, match="another process is writing"):
        Journal(there)
    journal.close()
    journal.close()
    Journal(there).close()
    with pytest.raises(ValueError, match="closed"):
        journal.decision(REQUEST, "asked")


def test_another_run_and_strange_directories_are_refused(tmp_path: Path) -> None:
    Journal(str(tmp_path / "one"), _RUN_KIND).close()
    Journal(str(tmp_path / "one"), _RUN_KIND).close()  # the same one
    with pytest.raises(UsageError, match="another fleet run") as caught:
        Journal(str(tmp_path / "one"), {**_RUN_KIND, "run": "ba9876543210"})
    assert "--resume" in caught.value.remedy
    with pytest.raises(UsageError, match="No such file"):
        Journal(str(tmp_path / "two"))
    assert not (tmp_path / "two").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        Journal(str(tmp_path / "full"), _RUN_KIND)
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    (tmp_path / "three").mkdir()
    for text in ("", "[]", '{"schema":2,"kind":"run"}', '{"schema":1,"kind":"x"}', "[" * 100_000, "1" * 5000):
        (tmp_path / "three/fleet.json").write_text(text)
        with pytest.raises(UsageError, match="not a fleet run"):
            read(str(tmp_path / "three"))


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(tmp_path / "one"), _RUN_KIND)
    journal.line("alpha", "event", request=REQUEST, event={"n": 1}, offset=3)
    real = os.write
    left = [40]

    def short(fd: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        some = min(left[0], len(data))
        left[0] -= some
        return real(fd, data[:some])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(Failed, match="No space left") as caught:
        journal.line("alpha", "event", request=REQUEST, event={"n": 2}, offset=6)
    assert "make room" in caught.value.remedy
    assert "--resume" in caught.value.remedy
    assert journal.offset("alpha", REQUEST) == 3
    monkeypatch.undo()
    journal.line("alpha", "event", request=REQUEST, event={"n": 3}, offset=6)
    journal.close()
    assert [line["event"]["n"] for line in _lines(tmp_path / "one/hosts/alpha.jsonl")] == [1, 3]


def test_a_real_limit_of_the_kernel_leaves_no_half_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from hostpart.errors import Failed\n"
        "from hostpart.fleet.journal import Journal\n"
        "from tests.fleet_results import DOCUMENT\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "journal = Journal(sys.argv[1], DOCUMENT)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    for number in range(100): journal.line('a', 'event', request='r.1', event={'text': 'x' * 300})\n"
        "except Failed as error: print(error)\n"
        "journal.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "one")], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    data = (tmp_path / "one/hosts/a.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert 3000 < len(data) <= 5000
    assert len(_lines(tmp_path / "one/hosts/a.jsonl")) == data.count(b"\n")


_NAMES = st.one_of(
    st.text(max_size=200),
    st.sampled_from(["", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "a\nb", "con", "-rf", ".hidden"]),
    st.integers(),
)


@given(one=_NAMES, other=_NAMES)
def test_no_name_leaves_the_directory_and_no_two_share_a_file(one: str | int, other: str | int) -> None:
    made = file_name(one)
    assert 1 <= len(made) <= 100
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert made[0] not in ".-"
    assert (made == file_name(other)) == (str(one) == str(other))


def test_a_name_made_to_look_like_anothers_file_has_a_file_of_its_own() -> None:
    target = file_name("tcp://10.0.0.1:33445")
    assert file_name(target) != target


def test_more_hosts_than_files_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(128, len(os.listdir("/proc/self/fd")) + 80), hard))
    try:
        journal = Journal(str(tmp_path / "one"), _RUN_KIND)
        for turn in range(2):
            for host in range(300):
                journal.line(f"host-{host}", "event", request=REQUEST, event={"turn": turn})
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(len(_lines(path)) == 2 for path in (tmp_path / "one/hosts").iterdir())
    assert [one.name for one in hosts(str(tmp_path / "one"))][:3] == ["host-0", "host-1", "host-2"]


def test_what_is_no_json_is_kept_as_null_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 1 << 16)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    journal = Journal(str(tmp_path / "one"), _RUN_KIND)
    for event in (float("nan"), {"x": float("inf")}, 10**5000, deep, "x" * 100_000):
        journal.line("alpha", "event", request=REQUEST, event=event, offset=4)
    journal.host("alpha", hello={"load": float("nan")}, skew_s=0.5)
    with pytest.raises(ValueError, match="none of"):
        journal.line("alpha", "gossip", request=REQUEST)
    journal.close()
    lines = _lines(tmp_path / "one/hosts/alpha.jsonl")
    assert [(line["event"], line["unkept"], line["offset"]) for line in lines[:5]] == [(None, ["event"], 4)] * 5
    assert (lines[5]["hello"], lines[5]["unkept"], lines[5]["skew_s"]) == (None, ["hello"], 0.5)
    assert read(str(tmp_path / "one")).damaged == 0


def test_links_and_pipes_in_the_place_of_files_are_not_followed(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1)})
    (tmp_path / "secret").write_text("kept\n")
    (there / "hosts/beta.jsonl").symlink_to(tmp_path / "secret")
    os.mkfifo(there / "hosts/gamma.jsonl")
    assert [one.name for one in read(str(there)).hosts] == ["alpha", "beta", "gamma"]  # and does not wait
    (there / "hosts/gamma.jsonl").unlink()
    with pytest.raises(Failed):
        Journal(str(there))
    assert (tmp_path / "secret").read_text() == "kept\n"


def test_of_a_run_that_was_made_again_the_last_counts(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": {"integer|affinity|alone": [1.0, 2.0]}})
    journal = Journal(str(there))
    again = experiments.results({"integer|affinity|alone": [7.0, 2.0]}).runs[0]
    journal.line("alpha", "run", request=REQUEST, run=again)
    journal.close()
    [host] = read(str(there)).hosts
    assert [run["metrics"]["rate"]["value"] for run in host.runs] == [7.0, 2.0]


def test_of_two_requests_on_a_host_that_with_more_runs_counts(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1)})
    journal = Journal(str(there))
    journal.line("alpha", "experiment", request="ffffffffffff.9", document=experiments.results(values(4)).experiment)
    journal.close()
    [host] = read(str(there)).hosts
    assert len(host.runs) == 72


def test_a_host_that_said_nothing_is_there(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1), "tcp://10.0.0.9:1": None})
    alpha, mute = read(str(there)).hosts
    assert (mute.name, mute.file, mute.results, mute.runs) == ("tcp://10.0.0.9:1", None, None, ())
    assert alpha.file == "alpha"


def test_a_name_that_is_anothers_is_not_taken_over(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1), "beta": values(2)})
    path = there / "hosts/beta.jsonl"
    path.write_text(path.read_text().replace('"name":"beta"', '"name":"alpha"'))
    assert [one.name for one in read(str(there)).hosts] == ["alpha", "beta"]


_STRANGE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from([1e999, -(10**400), "\x1b[31m", "<img src=x onerror=alert(1)>", "\ud800", "0-9999999", {}, []]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    # Where something can be put in the place of what is there; of long lists only the first.
    found = [path]
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:2]
        if isinstance(value, list)
        else []
    )
    for key, one in inner:
        found += _places(one, (*path, key))
    return found


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_host_that_says_anything_costs_its_own_results_only(tmp_path: Path, data: st.DataObject) -> None:
    there = tmp_path / "one"
    if not there.exists():
        small = {name: held[:6] for name, held in values(1).items() if name.startswith("integer")}
        write(there, {"alpha": small, "beta": small, "gamma": small})
        (tmp_path / "whole").write_bytes((there / "hosts/gamma.jsonl").read_bytes())
    lines = [json.loads(line) for line in (tmp_path / "whole").read_bytes().splitlines()]
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        *path, last = data.draw(st.sampled_from([one for one in _places(lines[number]) if one]))
        inside = lines[number]
        try:
            for key in path:
                inside = inside[key]
            inside[last] = data.draw(_STRANGE)
        except (LookupError, TypeError):
            continue  # it was replaced before
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (there / "hosts/gamma.jsonl").write_text(text)
    fleet = read(str(there))
    assert [one.name for one in fleet.hosts[:2]] == ["alpha", "beta"]
    # Nothing of it stops an analysis either, or gets into the page as markup.
    analyses = {one.name: analyse(one.results, resamples=199) for one in fleet.hosts if one.results}
    assert {"alpha", "beta"} <= analyses.keys()
    page = report(fleet, analyses, pool(analyses))
    page.encode()
    assert "<img" not in page
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b"[" * 200_000,
        b'{"kind":"run","request":"r.1","run":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"kind":"run","request":"r.1","run":{"run":' + b"9" * 5000 + b"}}",
        b'{"kind":"run","request":"r.1","run":{"run":1e999,"block":0,"session":0,"condition":"x"}}',
        b'{"kind":"run","request":7,"run":{}}',
        b'{"kind":"experiment","request":"r.1","document":{"schema":1,"name":"x","design":{},"plan":{"conditions":[7],"runs":[]}}}',
        b'{"kind":"session","request":"r.1","session":{"session":-1}}',
        b'{"kind":"root","request":"r.1"}',
    ],
    ids=lambda line: line[:40].decode("latin-1") or "empty",
)
def test_a_line_that_is_not_what_it_should_be_is_counted(tmp_path: Path, line: bytes) -> None:
    there = write(tmp_path / "one", {"alpha": values(1)})
    before = read(str(there))
    with (there / "hosts/alpha.jsonl").open("ab") as file:
        file.write(line + b"\n")
    after = read(str(there))
    assert after.damaged == 1
    assert after.hosts[0].runs == before.hosts[0].runs


def test_a_line_without_end_is_not_taken_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = three(tmp_path / "one")
    monkeypatch.setattr(module, "_LONGEST", 1 << 20)
    path = there / "hosts/alpha.jsonl"
    with path.open("ab") as file:
        file.write(b'{"kind":"event","request":"r.1","event":"' + b"x" * (40 << 20) + b'"}\n')
        file.write(b'{"kind":"event","request":"r.1","event":1}\n')
    tracemalloc.start()
    lines = [len(line) for line in module._lines(str(path))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(lines) == 78
    assert peak < 8 << 20
    assert read(str(there)).hosts[0].damaged == 1


def test_long_texts_are_cut(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1)}, about={"alpha": {"facts": {"driver": "x" * 1_000_000}}})
    assert len(read(str(there)).hosts[0].facts["driver"]) < 10_000
