"""Guests under QEMU for tests: scenario files, and what the kernel says of QEMU's threads while they run."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from hostpart import procfs
from hostpart.cpuset import CpuSet
from tests.conftest import Place
from tests.vm import debian
from tests.vm.cache import LabError
from tests.vm.host import lacking, missing

__all__ = ["QUIET", "Sampler", "evidence_of", "kernel", "lacks", "qemu_of", "scenario"]

QUIET = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on"


@cache
def lacks() -> str:
    """Return why no guest can be booted here; empty where one can."""
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two CPUs: one for the guest, one for QEMU's own threads"
    if why := lacking():
        return why
    if why := missing(lambda: [] if shutil.which("busybox") else ["busybox-static"], "the built-in guest"):
        return why
    try:
        debian.kernel("6.12")
    except LabError as error:
        return str(error)
    return ""


def kernel() -> str:
    """Return a kernel to boot."""
    return str(debian.kernel("6.12"))


def scenario(path: Path, run: str | None = "true", name: str = "linux", vm: str = "", **keys: object) -> str:
    """Write a scenario with one guest on one vCPU; return its name.

    :param run: what the built-in guest runs; None: there is no root file system, so the kernel panics
    :param vm: more lines of ``[[vm]]``
    :param keys: more keys of ``[vm.qemu]``
    """
    given: dict[str, object] = {"kernel": kernel(), "append": QUIET, "accelerator": "tcg", "memory": "192M", **keys}
    if run is not None:
        given["run"] = run
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items() if value is not None]
    count = "" if "pcpus" in vm or "vcpus" in vm else "vcpus = 1"
    path.write_text(
        "\n".join(["[[vm]]", f'name = "{name}"', count, "foreign_limit = 100", vm, "[vm.qemu]", *lines, ""])
    )
    return str(path)


def qemu_of(place: Place) -> int | None:
    """Return the pid of the QEMU that runs in *place*; None where there is none."""
    for pid in place.processes():
        try:
            if "qemu-system" in os.readlink(f"/proc/{pid}/exe"):
                return pid
        except OSError:
            continue
    return None


def evidence_of(folder: Path, name: str = "linux") -> dict[str, Any]:
    """Return what ``launch --results`` wrote of a VM."""
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return document


class Sampler(threading.Thread):
    """Reads the mask and the last CPU of each of QEMU's threads, over and over, from its birth to its end.

    :ivar seen: by thread: its name, and each (mask, CPU, whether it had run guest code) that was seen
    """

    TRIFLE_NS = 60_000_000  # more than a vCPU's thread runs before its guest does

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        self.place = place
        self.pid = 0
        self.seen: dict[int, tuple[str, set[tuple[CpuSet, int, bool]]]] = {}
        self.rounds = 0
        self._over = False

    def run(self) -> None:
        until = time.monotonic() + 60
        while not self._over and time.monotonic() < until and not (pid := qemu_of(self.place) or 0):
            time.sleep(0.005)
        if not pid:
            return
        self.pid = pid
        while not self._over and (stat := procfs.read_stat(pid)) is not None and not stat.dead:
            self.rounds += 1
            for tid in procfs.threads(pid):
                self._read(pid, tid)
            time.sleep(0.002)

    def _read(self, pid: int, tid: int) -> None:
        # The run time first: what was a trifle before the mask was read is one that may not have been pinned.
        ran, mask, now = procfs.schedstat(pid, tid), procfs.allowed(pid, tid), procfs.read_stat(pid, tid)
        if ran is not None and mask is not None and now is not None:
            _, states = self.seen.setdefault(tid, (now.comm, set()))
            self.seen[tid] = now.comm, states
            states.add((mask, now.processor, ran[0] > self.TRIFLE_NS))

    def finish(self) -> None:
        """Wait for QEMU's end, or for this thread's."""
        self.join(60)
        self._over = True
        self.join()

    def vcpus(self) -> dict[int, set[tuple[CpuSet, int]]]:
        """Return, by vCPU thread, the masks and CPUs that it had once the guest ran."""
        return {
            tid: {(mask, cpu) for mask, cpu, ran in states if ran}
            for tid, (comm, states) in self.seen.items()
            if comm.startswith("CPU ")
        }

    def others(self) -> set[tuple[CpuSet, int]]:
        """Return the masks and CPUs of QEMU's other threads."""
        return {
            (mask, cpu) for comm, states in self.seen.values() if not comm.startswith("CPU ") for mask, cpu, _ in states
        }
