"""Memory from one NUMA node, inside virtual machines with two."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.errors import UsageError
from hostpart.host import Host
from hostpart.isolation import mems
from tests.vm.seldom import SELDOM
from workers.guest import Command, Python
from workers.vcpu import Order, fork

pytestmark = pytest.mark.vm()

PAGES = 2000
GUEST = f"""
import mmap, os, time
block = mmap.mmap(-1, {PAGES} * 4096)
for page in range({PAGES}):
    block[page * 4096] = 1
os.write(1, b"touched\\n")
time.sleep(1000)
"""


class Worker:
    """A worker whose guest touches memory and waits; ended by :meth:`end`."""

    def __init__(self, folder: Path, kind: str, nodes: frozenset[int] | None, uid: int, cpu: int = 1) -> None:
        status_r, self.status_w = os.pipe()
        start_r, start_w = os.pipe()
        out_r, out_w = os.pipe()
        (folder / "touching.py").write_text(f"def main():\n{GUEST.replace(chr(10), chr(10) + '    ')}")
        guest = Command([sys.executable, "-c", GUEST]) if kind == "command" else Python("touching:main")
        order = Order(
            "box",
            0,
            frozenset({cpu}),
            guest,
            environ=dict(os.environ),
            status_fd=self.status_w,
            start_fd=start_r,
            stdout_fd=out_w,
            cwd=str(folder),
            ids=(uid, uid, []) if uid else None,
            mems=nodes,
        )
        self.pid = fork(order)
        self.told = self._line(status_r)
        if " ready " in self.told:
            os.write(start_w, b"S")
            assert self._line(out_r) == "touched\n"
        for fd in (status_r, self.status_w, start_r, start_w, out_r, out_w):
            os.close(fd)

    @staticmethod
    def _line(fd: int) -> str:
        assert select.select([fd], [], [], 60)[0]
        return os.read(fd, 4096).decode()

    def blocks(self) -> list[str]:
        """Return the lines of numa_maps for mappings with the pages that the guest touched."""
        lines = Path(f"/proc/{self.pid}/numa_maps").read_text().splitlines()
        return [line for line in lines if f"dirty={PAGES}" in line.split() or f"anon={PAGES}" in line.split()]

    def end(self) -> int:
        """End it, if it has not ended, and return its wait status."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return os.waitpid(self.pid, 0)[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory that everybody may enter."""
    for one in (tmp_path, *tmp_path.parents[:-2]):
        one.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("uid", [0, 65534], ids=["root", "nobody"])
@pytest.mark.parametrize("kind", ["command", pytest.param("python", marks=SELDOM)])
@pytest.mark.parametrize("node", [0, 1])
def test_what_a_guest_touches_is_on_its_node_wherever_it_runs(folder: Path, kind: str, node: int, uid: int) -> None:
    worker = Worker(folder, kind, frozenset({node}), uid, cpu=1 if node else 5)  # on the other node
    blocks = worker.blocks()
    held = mems.held(Host(), worker.pid)
    worker.end()
    assert len(blocks) == 1, blocks
    assert blocks[0].split()[1] == f"bind:{node}"
    assert f"N{node}={PAGES}" in blocks[0].split()
    assert held.allowed == CpuSet.parse("0-1")
    assert held.policies == (f"bind:{node}",)
    assert dict(held.pages)[node] >= PAGES


def test_a_guest_that_is_not_bound_has_memory_from_where_it_runs(folder: Path) -> None:
    worker = Worker(folder, "command", None, 0, cpu=5)
    (block,) = worker.blocks()
    held = mems.held(Host(), worker.pid)
    worker.end()
    assert block.split()[1] == "default"
    assert f"N1={PAGES}" in block.split()
    assert held.policies == ("default",)


@pytest.mark.parametrize("nodes", [set(), {7}, {64}], ids=["none", "one without memory", "one in the second word"])
def test_a_node_that_cannot_be_is_told_before_the_guest_starts(folder: Path, nodes: set[int]) -> None:
    worker = Worker(folder, "command", frozenset(nodes), 0)
    assert worker.told.split()[:3] == ["0", "failed", "mems"]
    assert os.waitstatus_to_exitcode(worker.end()) != 0


def test_a_wish_is_checked_against_the_nodes_with_memory() -> None:
    host = Host()
    assert mems.nodes(host) == CpuSet.parse("0-1")
    for wish in ("0", "1", "0-1"):
        mems.check(host, CpuSet.parse(wish))
    for wish in ("", "2", "1-2"):
        with pytest.raises(UsageError, match="no memory to bind a guest to"):
            mems.check(host, CpuSet.parse(wish))
