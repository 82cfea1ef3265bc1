"""The cgroup leaf: finding the own cgroup in recorded mounts, and a real leaf where this process may make one."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hostpart import procfs
from hostpart.cgroup import Leaf, own_cgroup
from hostpart.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"


def machine(root: Path, cgroup: str, mountinfo: str) -> Host:
    """Return a host whose process files say this."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    return Host(str(root))


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "path"),
    [
        pytest.param(
            "0::/user.slice/a.scope\n",
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
            "/sys/fs/cgroup/user.slice/a.scope",
            id="unified",
        ),
        pytest.param(
            "3:cpuset:/x\n1:cpu:/\n0::/\n",
            f"{V1}41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "/sys/fs/cgroup/unified",
            id="hybrid, in the root",
        ),
        pytest.param(
            "0::/docker/abc/job\n",
            "50 40 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            "/sys/fs/cgroup/job",
            id="the mount shows a part",
        ),
        pytest.param(
            "0::/docker/abcdef\n",
            "50 40 0:26 /docker/abc /elsewhere ro - cgroup2 cgroup rw\n"
            "51 40 0:26 / /mnt/with\\040space rw - cgroup2 cgroup rw\n",
            "/mnt/with space/docker/abcdef",
            id="the first mount shows another part",
        ),
        pytest.param(
            "0::/../job\n", "50 40 0:26 /.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "/sys/fs/cgroup/job", id="above"
        ),
    ],
)
def test_the_own_cgroup_is_found_where_the_mount_shows_it(
    tmp_path: Path, cgroup: str, mountinfo: str, path: str
) -> None:
    assert own_cgroup(machine(tmp_path, cgroup, mountinfo)) == (path, "")


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "reason"),
    [
        pytest.param("1:cpu:/\n", V1, "no cgroup v2", id="version 1 only"),
        pytest.param("0::/a\n", V1, "no mount shows", id="not mounted"),
        pytest.param(
            "0::/a\n", "50 40 0:26 /b /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "no mount shows", id="outside the mount"
        ),
        pytest.param("0::/a (deleted)\n", V1, "was removed", id="removed"),
    ],
)
def test_why_there_is_no_cgroup_is_said(tmp_path: Path, cgroup: str, mountinfo: str, reason: str) -> None:
    path, said = own_cgroup(machine(tmp_path, cgroup, mountinfo))
    assert path is None
    assert reason in said


def test_a_threaded_parent_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    # A directory stands in for a cgroup: no cgroup.type appears in it, as in one that can't be used.
    mounts = f"50 40 0:26 / {tmp_path}/cg rw - cgroup2 cgroup rw\n"
    machine(tmp_path / "m", "0::/\n", mounts)
    host = Host(str(tmp_path / "m"))
    own = tmp_path / "m" / str(tmp_path / "cg").lstrip("/")
    own.mkdir(parents=True)
    (own / "cgroup.procs").touch()

    leaf, reason = Leaf.create("t", host)

    assert leaf is None
    assert "not usable" in reason
    assert [entry.name for entry in own.iterdir()] == ["cgroup.procs"]


@pytest.mark.parametrize("token", ["", "a/b", "..\n", "ä"])
def test_a_token_that_is_no_name_is_a_mistake(token: str) -> None:
    with pytest.raises(ValueError):
        Leaf.create(token)


# A real leaf


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    made, reason = Leaf.create(f"test-{uuid.uuid4().hex}")
    if made is None:
        pytest.skip(f"needs a delegated cgroup v2: {reason}")
    try:
        yield made
    finally:
        # Not with the code under test, and only what the test put there.
        places = [directory for directory, _, _ in os.walk(made.path)]
        for place in places:
            for pid in Path(place, "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        for place in reversed(places):
            wait_until_empty(place)
            os.rmdir(place)


def wait_until_empty(cgroup: str) -> None:
    """Wait for the processes that were killed in it."""
    until(lambda: "populated 0" in Path(cgroup, "cgroup.events").read_text())


def inside(leaf: Leaf, *command: str) -> list[str]:
    """Return the command line that runs *command* in the leaf from its first instruction."""
    return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', leaf.procs_path, *command]


@pytest.fixture
def counter(leaf: Leaf) -> Iterator[Callable[[], int]]:
    """Run a process in the leaf that counts, with a child that counts; return the sum so far."""
    source = """
import mmap, os, sys
shared = mmap.mmap(int(sys.argv[1]), 16)
at = 0 if os.fork() else 8
n = 0
while True:
    n += 1
    shared[at : at + 8] = n.to_bytes(8, "little")
"""
    memory = os.memfd_create("count")
    os.ftruncate(memory, 16)
    shared = mmap.mmap(memory, 16)
    with subprocess.Popen(inside(leaf, sys.executable, "-c", source, str(memory)), pass_fds=[memory]) as process:
        os.close(memory)
        try:
            until(lambda: any(shared[:8]) and any(shared[8:]))
            yield lambda: int.from_bytes(shared[:8], "little") + int.from_bytes(shared[8:], "little")
        finally:
            if os.path.exists(leaf.procs_path):
                for pid in Path(leaf.procs_path).read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            process.kill()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for *condition*, or fail."""
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it never came"
        time.sleep(0.001)


def test_nothing_in_the_leaf_runs_while_frozen(leaf: Leaf, counter: Callable[[], int]) -> None:
    assert leaf.freeze(10)
    at = counter()
    time.sleep(0.1)
    assert counter() == at

    assert leaf.thaw()
    until(lambda: counter() > at)


def test_a_frozen_leaf_is_killed_whole_and_then_removed(leaf: Leaf, counter: Callable[[], int]) -> None:
    assert leaf.populated() is True
    assert not leaf.remove(0.01)
    assert leaf.freeze(10)
    if not leaf.kill():
        pytest.skip("needs cgroup.kill (Linux 5.14)")
    until(lambda: leaf.populated() is False)
    assert leaf.remove()
    assert not os.path.exists(leaf.path)


def test_cpu_time_of_reaped_children_counts(leaf: Leaf) -> None:
    before = leaf.cpu_usage_us()
    if before is None:
        pytest.skip("needs cpu.stat")
    burn = "import os, time\nwhile time.process_time() < 0.05: pass"
    subprocess.run(
        inside(
            leaf,
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])",
        ),
        check=True,
    )
    after = leaf.cpu_usage_us()
    assert after is not None
    assert 50_000 <= after - before < 10_000_000


def test_cgroups_that_the_guest_made_go_with_the_leaf(leaf: Leaf) -> None:
    os.makedirs(f"{leaf.path}/a/b/c")
    os.mkdir(f"{leaf.path}/d")
    with subprocess.Popen(["sleep", "30"]) as process:
        Path(leaf.path, "a/b/cgroup.procs").write_text(str(process.pid))
        assert leaf.populated() is True
        assert not leaf.remove(0.01)
        process.kill()
    assert leaf.remove()
    assert not os.path.exists(leaf.path)


def test_a_process_enters_from_outside_and_a_gone_one_is_said(leaf: Leaf) -> None:
    with subprocess.Popen(["sleep", "30"]) as process:
        assert leaf.enter(process.pid) == ""
        assert Path(leaf.procs_path).read_text().split() == [str(process.pid)]
        process.kill()
    assert procfs.start_time(process.pid) is None
    assert leaf.enter(process.pid) == f"process {process.pid} is gone"


def test_a_leaf_that_is_gone_says_so_and_raises_nothing(leaf: Leaf) -> None:
    assert leaf.remove()
    assert leaf.remove(0)
    assert leaf.populated() is None
    assert leaf.cpu_usage_us() is None
    assert not leaf.freeze(0)
    assert not leaf.thaw()
    assert not leaf.kill()
    assert "can't be written" in leaf.enter(os.getpid())


def test_frozen_is_what_the_kernel_says_not_what_was_written(tmp_path: Path) -> None:
    # Files that stand in for a cgroup with a task that does not stop.
    (tmp_path / "cgroup.freeze").write_text("0")
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert not Leaf(str(tmp_path)).freeze(0.01)
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert Leaf(str(tmp_path)).freeze(0.01)
    assert (tmp_path / "cgroup.freeze").read_text() == "1"


def test_the_same_token_twice_is_refused(leaf: Leaf) -> None:
    token = os.path.basename(leaf.path).removeprefix("hostpart-")
    again, reason = Leaf.create(token)
    assert again is None
    assert reason
    assert leaf.populated() is False


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_without_delegation_there_is_none_and_the_reason(leaf: Leaf) -> None:
    # Imported before: that user may not be able to read this interpreter's library.
    source = """
import os
from hostpart.cgroup import Leaf
os.setresuid(65534, 65534, 65534)
print(*Leaf.create("x"))
"""
    done = subprocess.run(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    own = os.path.dirname(leaf.path)
    assert done.stdout == f"None cgroup {own} is not delegated to this user\n"
