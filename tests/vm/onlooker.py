"""What the kernel says of every thread of each QEMU in a machine, all the time, by code that shares nothing with it."""

from __future__ import annotations

import json
import os
import re
import select
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["Onlooker", "Sight", "Thread"]

_PROGRAM = "qemu-system"
_FIND_ROUNDS = 5  # as often is looked for another QEMU


class Sight(NamedTuple):
    """A thread was seen so, once or more.

    :ivar mask: the CPUs that it may run on
    :ivar processor: the one that it runs on, or ran on last
    :ivar times: how often
    :ivar first_ns: how long it had run when it was first seen so
    :ivar last_ns: likewise, last
    """

    mask: str
    processor: int
    times: int
    first_ns: int
    last_ns: int


class Thread(NamedTuple):
    """A thread and all that was seen of it, in the order in which it was seen so first."""

    pid: int
    tid: int
    name: str
    sights: tuple[Sight, ...]


class Onlooker:
    """A process that looks from now on, from the moment that QEMU is one.

    :param cpu: where it is itself
    :param pause_s: how long it waits between two looks
    """

    def __init__(self, cpu: int, pause_s: float = 0.0) -> None:
        self._told, told = os.pipe()
        end, self._end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._told)
            os.close(self._end)
            _look(cpu, pause_s, end, told)
        os.close(told)
        os.close(end)

    def seen(self) -> list[Thread]:
        """End it, and return what it has seen."""
        os.close(self._end)
        with open(self._told, encoding="utf-8") as file:
            found: list[Any] = json.load(file)
        os.waitpid(self.pid, 0)
        return [
            Thread(pid, tid, name, tuple(Sight(mask, cpu, *figures) for mask, cpu, figures in sights))
            for pid, tid, name, sights in found
        ]


def _look(cpu: int, pause_s: float, end: int, told: int) -> NoReturn:
    code = 1
    try:
        os.sched_setaffinity(0, {cpu})
        names: dict[tuple[int, int], str] = {}
        seen: dict[tuple[int, int], dict[tuple[str, int], list[int]]] = {}
        pids: list[int] = []
        rounds = 0
        while not select.select([end], [], [], pause_s if pids else 0)[0]:
            if not pids or rounds % _FIND_ROUNDS == 0:
                pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_qemu(name)]
            rounds += 1
            for pid in pids:
                for tid in _listed(f"/proc/{pid}/task"):
                    _note(pid, int(tid), names, seen)
        rows = [
            (pid, tid, names[pid, tid], [(mask, cpu, figures) for (mask, cpu), figures in sights.items()])
            for (pid, tid), sights in seen.items()
        ]
        with open(told, "w", encoding="utf-8") as file:
            json.dump(rows, file)
        code = 0
    finally:
        os._exit(code)


def _is_qemu(pid: str) -> bool:
    return _read(f"/proc/{pid}/comm").startswith(_PROGRAM)


def _note(
    pid: int,
    tid: int,
    names: dict[tuple[int, int], str],
    seen: dict[tuple[int, int], dict[tuple[str, int], list[int]]],
) -> None:
    folder = f"/proc/{pid}/task/{tid}"
    status = _read(f"{folder}/status")
    stat, ran = _read(f"{folder}/stat"), _read(f"{folder}/schedstat")
    mask = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
    if not (stat and ran and mask) or stat[stat.rindex(")") + 2] in "ZX":
        return  # it has ended
    name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
    ran_ns = int(ran.split()[0])
    names[pid, tid] = name
    figures = seen.setdefault((pid, tid), {}).setdefault((mask[1], int(fields[36])), [0, ran_ns, ran_ns])
    figures[0] += 1
    figures[2] = ran_ns


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
