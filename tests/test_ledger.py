"""The ledger as a real file: older, newer, damaged, full, read-only, removed, and written by many at once."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpart.errors import HostpartError
from hostpart.ledger import Known, Ledger, LedgerUnusable, NameTaken, VcpuRow, VmRow, runtime_directory
from tests.conftest import Place

NOBODY = 65534
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
# As hostpart made it before it knew of idle siblings, cgroups, log files and host settings.
VERSION_1 = """
CREATE TABLE vm (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, service INTEGER NOT NULL, token TEXT NOT NULL UNIQUE,
    boot_id TEXT NOT NULL, state TEXT NOT NULL, vcpu_num INTEGER NOT NULL, guest TEXT NOT NULL,
    keeper_pid INTEGER NOT NULL, keeper_start INTEGER NOT NULL, front_pid INTEGER NOT NULL, started REAL NOT NULL);
CREATE UNIQUE INDEX vm_name ON vm (name) WHERE service = 0;
CREATE TABLE vcpu (
    vm INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE, vcpu INTEGER NOT NULL, pcpu INTEGER NOT NULL,
    service INTEGER NOT NULL, pid INTEGER NOT NULL, start INTEGER NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (vm, vcpu));
CREATE UNIQUE INDEX vcpu_pcpu ON vcpu (pcpu) WHERE service = 0;
INSERT INTO vm VALUES (7, 'old', 0, 'aa', 'boot', 'RUNNING', 1, 'sleep', 11, 22, 33, 44.5);
INSERT INTO vcpu VALUES (7, 0, 3, 0, 55, 66, 'RUNNING');
PRAGMA user_version = 1;
"""


def vm_row(name: str = "rt", **changes: object) -> VmRow:
    row = VmRow(0, name, 0, os.urandom(16).hex(), "boot", "INIT", 1, "sleep 1", 10, 20, 30, 40.5)
    return row.replace(**changes)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(str(tmp_path)) as there:
        yield there


# -- what it holds -----------------------------------------------------------------------------------


@given(TEXT, TEXT, TEXT, *[INTEGERS] * 4, st.floats(allow_nan=False), TEXT, TEXT)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vm_comes_back_as_it_was_entered(
    ledger: Ledger, name: str, boot: str, guest: str, vcpu_num: int, pid: int, start: int, front: int, started: float,
    idle: str, log: str,
) -> None:  # fmt: skip
    row = vm_row(name, boot_id=boot, guest=guest, vcpu_num=vcpu_num, keeper_pid=pid, keeper_start=start)
    row = row.replace(front_pid=front, started=started, idle=idle, leaf=guest, log=log)
    number = ledger.add_vm(row)
    try:
        assert ledger.vms() == [row.replace(id=number)]
    finally:
        ledger.remove_vm(number)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vcpus_come_back_in_order_and_a_doubled_vcpu_or_pcpu_is_refused(
    ledger: Ledger, wanted: list[tuple[int, int]]
) -> None:
    number = ledger.add_vm(vm_row())
    entered: dict[int, VcpuRow] = {}
    try:
        for vcpu, pcpu in wanted:
            row = VcpuRow(number, vcpu, pcpu, 0, 100 + vcpu, 5, "INIT")
            if vcpu in entered or pcpu in {one.pcpu for one in entered.values()}:
                with pytest.raises(LedgerUnusable, match=f"has a vCPU on pCPU {pcpu}, or vCPU {vcpu}"):
                    ledger.add_vcpu(row)
            else:
                ledger.add_vcpu(row)
                entered[vcpu] = row
        assert ledger.vcpus(number) == [entered[vcpu] for vcpu in sorted(entered)]
    finally:
        ledger.remove_vm(number)
    assert ledger.vcpus(number) == []


def test_two_user_vms_cannot_have_one_pcpu_and_the_service_vm_may_be_there_too(ledger: Ledger) -> None:
    one, two = ledger.add_vm(vm_row("one")), ledger.add_vm(vm_row("two"))
    service = ledger.add_vm(vm_row("vm0", service=1))
    ledger.add_vcpu(VcpuRow(one, 0, 3, 0, 1, 1, "INIT"))
    ledger.add_vcpu(VcpuRow(service, 0, 3, 1, 1, 1, "INIT"))
    with pytest.raises(LedgerUnusable, match="pCPU 3"):
        ledger.add_vcpu(VcpuRow(two, 0, 3, 0, 1, 1, "INIT"))
    ledger.remove_vcpu(one, 0)
    ledger.add_vcpu(VcpuRow(two, 0, 3, 0, 1, 1, "INIT"))


def test_a_name_is_one_user_vm_s_and_any_number_of_service_vms(ledger: Ledger) -> None:
    ledger.add_vm(vm_row("rt"))
    with pytest.raises(NameTaken, match="'rt' is running already") as caught:
        ledger.add_vm(vm_row("rt"))
    assert caught.value.remedy == "give this one another name, or run 'hostpart stop rt' first"
    assert ledger.add_vm(vm_row("vm0", service=1)) != ledger.add_vm(vm_row("vm0", service=1))


def test_an_id_is_never_used_again(ledger: Ledger) -> None:
    first = ledger.add_vm(vm_row())
    ledger.remove_vm(first)
    assert ledger.add_vm(vm_row()) > first


def test_a_vm_s_state_is_that_of_its_vcpus_which_have_not_ended(ledger: Ledger) -> None:
    number = ledger.add_vm(vm_row(vcpu_num=2))
    for vcpu in (0, 1):
        ledger.add_vcpu(VcpuRow(number, vcpu, vcpu, 0, 1, 1, "INIT"))
    ledger.set_vcpu_state(number, 1, "ZOMBIE")
    ledger.set_vm_state(number, "PAUSED")
    assert [row.state for row in ledger.vms()] == ["PAUSED"]
    assert [row.state for row in ledger.vcpus(number)] == ["PAUSED", "ZOMBIE"]


# -- other versions and broken files -----------------------------------------------------------------


def make_old(directory: Path) -> None:
    database = sqlite3.connect(directory / "ledger.sqlite")
    database.executescript(VERSION_1)
    database.close()


def test_a_ledger_of_version_1_is_read_and_brought_up(tmp_path: Path) -> None:
    make_old(tmp_path)
    for _ in range(2):
        with Ledger(str(tmp_path)) as ledger:
            old = VmRow(7, "old", 0, "aa", "boot", "RUNNING", 1, "sleep", 11, 22, 33, 44.5, "", "", "")
            assert ledger.vms() == [old]
            assert ledger.vcpus(7) == [VcpuRow(7, 0, 3, 0, 55, 66, "RUNNING")]
    with Ledger(str(tmp_path)) as ledger:
        assert ledger.add_vm(vm_row("new", idle="4-5", leaf="/cg", log="/log")) == 8
        assert ledger.vms()[1].idle == "4-5"


def test_an_old_ledger_brought_up_by_many_at_once_is_brought_up_once(tmp_path: Path) -> None:
    make_old(tmp_path)
    script = "import sys; from hostpart.ledger import Ledger; print(len(Ledger(sys.argv[1]).vms()))"
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["1"] * 8


def test_a_newer_ledger_is_refused_and_left_as_it_is(place: Place) -> None:
    path = place.runtime / "ledger.sqlite"
    database = sqlite3.connect(path)
    database.executescript("CREATE TABLE hologram (x); PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    done = place.run("ps")
    assert done.returncode == 1
    assert "is of version 99, made by a newer hostpart" in done.stderr
    assert "try: use the newer hostpart" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, os.urandom(5000), b"#!/bin/sh\n" * 200],
    ids=["text", "header only", "random", "script"],
)
def test_a_file_that_is_no_ledger_is_named_with_a_way_out_and_not_touched(place: Place, content: bytes) -> None:
    path = place.runtime / "ledger.sqlite"
    path.write_bytes(content)
    done = place.run("run", "--", "true")
    assert done.returncode == 125
    assert f"{path} is damaged" in done.stderr
    assert f"mv {path} {path}.damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == content
    path.rename(f"{path}.damaged")
    assert place.run("run", "--", "true").returncode == 0


@given(st.lists(st.tuples(st.integers(0, 45055), st.integers(0, 255)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_are_read_or_refused_in_words_and_never_raise_sqlite_s_errors(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    path = tmp_path / "ledger.sqlite"
    path.unlink(missing_ok=True)
    (tmp_path / "ledger.sqlite-journal").unlink(missing_ok=True)
    with Ledger(str(tmp_path)) as ledger:
        number = ledger.add_vm(vm_row())
        ledger.add_vcpu(VcpuRow(number, 0, 3, 0, 1, 1, "INIT"))
    content = bytearray(path.read_bytes())
    for at, byte in flips:
        content[at % len(content)] = byte
    path.write_bytes(content)
    try:
        with Ledger(str(tmp_path)) as ledger:
            for row in ledger.vms():
                ledger.vcpus(row.id)
            ledger.add_vm(vm_row("other"))
    except (LedgerUnusable, NameTaken) as error:
        refusal: HostpartError | None = error
    else:
        refusal = None
    assert refusal is None or (str(refusal) and refusal.remedy)


def test_a_damage_whose_message_is_no_text_is_told_as_damage(tmp_path: Path) -> None:
    Ledger(str(tmp_path)).close()
    path = tmp_path / "ledger.sqlite"
    content = path.read_bytes()
    assert b"CREATE TABLE vcpu" in content
    path.write_bytes(content.replace(b"CREATE TABLE vcpu", b"CREATE \x80ABLE vcpu"))
    with pytest.raises(LedgerUnusable, match="is damaged"):
        Ledger(str(tmp_path))


def test_a_removed_ledger_is_told_apart_and_the_next_one_is_new(tmp_path: Path) -> None:
    with Ledger(str(tmp_path)) as ledger:
        ledger.add_vm(vm_row())
        os.unlink(ledger.path)
        with pytest.raises(LedgerUnusable, match="was removed or replaced while it was open"):
            ledger.add_vm(vm_row("two"))
    with Ledger(str(tmp_path)) as ledger:
        assert ledger.vms() == []


def test_a_disk_that_is_full_is_said_and_the_ledger_is_as_before(tmp_path: Path) -> None:
    # The kernel refuses a file's growth beyond RLIMIT_FSIZE as it does on a full disk.
    with Ledger(str(tmp_path)) as ledger:
        ledger.add_vm(vm_row())
    script = (
        "import os, resource, signal, sys\n"
        "from hostpart.ledger import Ledger, LedgerUnusable, VmRow\n"
        "ledger = Ledger(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "size = os.stat(ledger.path).st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try:\n"
        "    for n in range(1000):\n"
        "        ledger.add_vm(VmRow(0, f'vm-{n}', 0, str(n), 'b', 'INIT', 1, 'x' * 3000, 1, 2, 3, 4.0))\n"
        "except LedgerUnusable as error: print(error); print(error.remedy)\n"
        "print(len(ledger.vms()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    problem, remedy, count = done.stdout.splitlines()
    assert "cannot grow: the disk is full" in problem or "cannot be written" in problem
    assert f"df {tmp_path}" in remedy
    with Ledger(str(tmp_path)) as ledger:
        assert len(ledger.vms()) == int(count) >= 1


def test_a_full_database_is_told_as_a_full_disk(ledger: Ledger) -> None:
    ledger._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerUnusable, match="cannot grow: the disk is full"):
        ledger.add_vm(vm_row(guest="x" * 100_000))


@pytest.fixture
def as_nobody() -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    setpriv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*setpriv, sys.executable, "-c", "import hostpart"], cwd="/", check=False).returncode:
        pytest.skip("needs an interpreter and a hostpart that other users can read")
    return setpriv


def run_as(setpriv: list[str], directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from hostpart.__main__ import main; sys.exit(main())"
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPART_")}
    env |= {"HOSTPART_RUNTIME_DIR": str(directory), "HOSTPART_LEASE_DIR": "/sys/devices/system/cpu"}
    return subprocess.run(
        [*setpriv, sys.executable, "-c", code, *args], cwd="/", env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """A directory whose path another user may walk."""
    changed = []
    for part in (tmp_path, *tmp_path.parents):
        mode = stat.S_IMODE(part.stat().st_mode)
        if not mode & 0o001:
            part.chmod(mode | 0o001)
            changed.append((part, mode))
    yield tmp_path
    for part, mode in changed:
        part.chmod(mode)


@pytest.mark.parametrize("what", ["the file", "the directory"])
def test_a_ledger_that_cannot_be_written_is_exit_4_with_the_file_s_name(
    as_nobody: list[str], open_path: Path, what: str
) -> None:
    directory = open_path / "run"
    directory.mkdir(0o700)
    make_old(directory)  # it has to be brought up, which needs a journal beside it
    path = directory / "ledger.sqlite"
    for entry in (directory, path):
        os.chown(entry, NOBODY, NOBODY)
    if what == "the file":
        path.chmod(0o400)
    else:
        directory.chmod(0o500)
    before = path.read_bytes()
    done = run_as(as_nobody, directory, "ps")
    assert done.returncode == 4, done.stderr
    assert f"{path} cannot be written" in done.stderr
    assert f"ls -l {path}" in done.stderr
    assert path.read_bytes() == before


# -- the runtime directory ----------------------------------------------------------------------------


def make_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def make_open(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)


def make_foreign(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)


WRONG: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "a link": (make_link, "is a symbolic link, and is not followed", 4),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "is a symbolic link", 4),
    "another user's": (make_foreign, f"belongs to uid {NOBODY}, not to you", 4),
    "open to others": (lambda path: make_open(path, 0o755), "is open to others (mode 755)", 4),
    "open to the group": (lambda path: make_open(path, 0o710), "is open to others (mode 710)", 4),
    "a file": (lambda path: path.touch(), "is not a directory", 1),
    "a pipe": (os.mkfifo, "is not a directory", 1),
}


@pytest.mark.parametrize(("make", "problem", "code"), WRONG.values(), ids=list(WRONG))
def test_a_runtime_directory_that_cannot_be_trusted_is_refused_and_nothing_is_written_there(
    place: Place, make: Callable[[Path], object], problem: str, code: int
) -> None:
    if problem.startswith("belongs") and os.geteuid() != 0:
        pytest.skip("needs root, to give a directory away")
    place.runtime.rmdir()
    make(place.runtime)
    done = place.run("ps")
    assert done.returncode == code
    assert f"{place.runtime} {problem}" in done.stderr
    assert "\ntry: " in done.stderr
    if place.runtime.is_dir():
        assert not list(place.runtime.iterdir())


def test_a_runtime_directory_is_made_for_its_owner_alone_whatever_the_umask(place: Place) -> None:
    place.runtime.rmdir()
    done = place.run("ps", preexec_fn=lambda: os.umask(0))
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(place.runtime.stat().st_mode) == 0o700


def test_a_runtime_directory_that_cannot_be_made_is_said_with_where_to_look(place: Place) -> None:
    place.env["HOSTPART_RUNTIME_DIR"] = str(place.runtime / "not" / "there")
    done = place.run("ps")
    assert done.returncode == 1
    assert "cannot be made: No such file or directory" in done.stderr
    assert f"ls -ld {place.runtime / 'not'}" in done.stderr


def test_a_user_s_directory_is_below_xdg_s_where_that_is_the_user_s(as_nobody: list[str], open_path: Path) -> None:
    own, foreign = open_path / "own", open_path / "foreign"
    own.mkdir(0o700)
    foreign.mkdir(0o700)
    os.chown(own, NOBODY, NOBODY)
    code = "from hostpart.ledger import _home; import os; print(_home(os.geteuid()))"
    homes = {}
    for name, value in (("own", str(own)), ("foreign", str(foreign)), ("relative", "own"), ("none", "")):
        done = subprocess.run(
            [*as_nobody, sys.executable, "-c", code], env={"XDG_RUNTIME_DIR": value}, cwd="/",
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        homes[name] = done.stdout.strip()
    assert homes["own"] == f"{own}/hostpart"
    without = f"/run/user/{NOBODY}/hostpart" if Path(f"/run/user/{NOBODY}").exists() else f"/tmp/hostpart-{NOBODY}"
    assert homes["foreign"] == homes["relative"] == homes["none"] == without


def test_root_s_directory_is_in_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from hostpart.ledger import _home

    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    assert _home(0) == "/run/hostpart"


def test_the_environment_names_it_for_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTPART_RUNTIME_DIR", str(tmp_path / "mine"))
    assert runtime_directory() == str(tmp_path / "mine")


# -- death and crowds ---------------------------------------------------------------------------------

WRITER = """
import os, sys
from hostpart.ledger import Ledger, VcpuRow, VmRow
ledger, who, rounds = Ledger(sys.argv[1]), sys.argv[2], int(sys.argv[3])
n = 0
while n < rounds or rounds < 0:
    row = VmRow(0, f"{who}-{n}", 0, os.urandom(16).hex(), "b", "INIT", 1, "x" * 2000, 1, 2, 3, 4.0)
    number = ledger.add_vm(row)
    ledger.add_vcpu(VcpuRow(number, 0, int(who), 0, 1, 1, "INIT"))
    ledger.set_vm_state(number, "RUNNING")
    if n % 3 == 2: ledger.remove_vm(number)
    else: ledger.remove_vcpu(number, 0)
    n += 1
    if n == 3: print("writes", flush=True)
"""


def writer(directory: Path, who: int, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(who), str(rounds)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def integrity(directory: Path) -> str:
    database = sqlite3.connect(directory / "ledger.sqlite")
    try:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        database.close()


def test_many_writers_at_once_lose_nothing_and_wait_for_each_other(tmp_path: Path) -> None:
    writers = [writer(tmp_path, who, 30) for who in range(6)]
    for process in writers:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with Ledger(str(tmp_path)) as ledger:
        names = [row.name for row in ledger.vms()]
    assert sorted(names) == sorted(f"{who}-{n}" for who in range(6) for n in range(30) if n % 3 != 2)
    assert integrity(tmp_path) == "ok"


def test_a_writer_killed_at_any_instant_leaves_a_ledger_that_opens(tmp_path: Path) -> None:
    import time

    for number in range(12):
        process = writer(tmp_path, number, -1)
        assert process.stdout is not None
        assert process.stdout.readline() == "writes\n"
        time.sleep(number * 0.0011)  # another instant each time; any will do
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Ledger(str(tmp_path)) as ledger:
            for row in ledger.vms():
                assert row.state in ("INIT", "RUNNING")
                assert len(ledger.vcpus(row.id)) <= 1
                ledger.remove_vm(row.id)
        assert integrity(tmp_path) == "ok"


# Dies inside the transaction, between two of its statements: the journal is hot then.
DIE_WITHIN = """
import os, signal, sys
from hostpart.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger._db.execute("PRAGMA cache_size = 1")  # so that changed pages reach the file before the commit
ledger._db.execute("BEGIN IMMEDIATE")
for n in range(int(sys.argv[2])):
    ledger._db.execute("UPDATE vm SET state = 'TORN', guest = ? WHERE id = ?", ("y" * 3000, n + 1))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("statements", [0, 1, 20, 60])
def test_a_transaction_cut_off_by_death_has_not_happened(tmp_path: Path, statements: int) -> None:
    with Ledger(str(tmp_path)) as ledger:
        for number in range(60):
            ledger.add_vm(vm_row(f"vm-{number}", guest="x" * 3000))
        before = ledger.vms()
    done = subprocess.run([sys.executable, "-c", DIE_WITHIN, str(tmp_path), str(statements)], check=False)
    assert done.returncode == -signal.SIGKILL
    if statements == 60:
        assert (tmp_path / "ledger.sqlite-journal").exists(), "nothing had reached the file: this tests too little"
    with Ledger(str(tmp_path)) as ledger:
        assert ledger.vms() == before
    assert integrity(tmp_path) == "ok"


def test_a_closed_ledger_is_a_mistake_of_the_caller_s_not_a_damaged_file(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.close()
    ledger.close()
    with pytest.raises(sqlite3.ProgrammingError):
        ledger.vms()


def test_settings_are_told_without_the_tasks(ledger: Ledger) -> None:
    keys = ["kthread", "kthread:1:2", "kthreads:1", "task:3:4", "tasks", "attached:t:1:2:3", "sys/a", "wide", ""]
    ledger.remember({key: Known("0-1", ("0",)) for key in keys})
    assert list(ledger.known()) == keys
    assert list(ledger.known(tasks=False)) == [key for key in keys if not key.startswith(("task:", "kthread:"))]
