"""``hostpart topology``: what this host has, or a recorded one, as a drawing or as JSON.

Reading is :mod:`hostpart.topology`'s, and who holds a pCPU is :mod:`hostpart.lease`'s to say.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from ..cpuset import CpuSet
from ..host import Host
from ..topology import nested, read_topology
from . import columns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..topology import Topology

__all__ = ["add", "draw", "run"]

_NARROWEST = 40  # columns; three boxes in each other and one core fit
_LABELLED_CORES = 32  # up to here each core has a box of its own, above it a pair of brackets
_DRAWN_PCPUS = 288  # above this a box names its pCPUs as a list
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MANY = "*"  # the letter of every holder from the 53rd on
_UNUSABLE = "-"
_LINES = ("┌┐└┘─│", "++++-|")
_STYLES = {"held": "\x1b[1;36m", "unusable": "\x1b[2m", "off": "\x1b[0m"}
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_EPILOG = """\
With --json, 'free' is what one request can have on this host now: 'pcpus' with --smt shared, 'core_pcpus' with
--smt exclusive, 'cores' whole cores, and 'llc' the most below one last-level cache.

A letter after a pCPU says which VM holds it, and '-' that this process may not use it.
NUMA, package and core are named by number; a cache is the last level that the cores in its box share.

Exit status: 0 done, 2 --root names no machine, 4 it may not be read.

Example: hostpart topology --json > here.json && hostpart plan --host here.json -n 2
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Say what ``hostpart topology`` takes."""
    parser.description = "Show the host's packages, NUMA nodes, caches, cores and threads, and who holds each pCPU."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--root",
        default="/",
        metavar="DIR|TARBALL",
        help="a recorded machine instead of this one: a folder or a .tar.bz2, .tar.gz or .tar.xz with 'sys' in it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the topology of ``args.root``.

    :raises HostpartError: where it cannot be read
    """
    host = Host.open(args.root)
    topology = read_topology(host, madt=True)
    if args.json:
        import json

        document = topology.to_json()
        if host.live:
            document["free"] = _free(topology)
        print(json.dumps(document, indent=1))
        return 0
    holders: Mapping[int, str] = {}
    if host.live:
        from ..census import holders as read_holders

        holders = read_holders(topology.numbers)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(draw(topology, holders, width=columns(), colour=colour, unicode=_takes_unicode()))
    return 0


def _free(topology: Topology) -> dict[str, Any] | None:
    # As 'plan' has it. A lock that does not come free is no reason to keep the rest back.
    from ..allocator import room
    from ..config import ServiceVm
    from ..front import say
    from ..launcher import supply_now
    from ..lease import AllocatorBusy, Leases

    try:
        return room(topology, supply_now(topology, ServiceVm(), CpuSet(), Leases())).to_json()
    except AllocatorBusy as error:
        say(f"what is free is not known: {error}\ntry: {error.remedy}")
        return None


def draw(topology: Topology, holders: Mapping[int, str], *, width: int, colour: bool, unicode: bool) -> str:
    """Return a drawing of the host for people, with no line end after the last line.

    :param holders: pCPU (Linux's number) to the name of the VM that holds it
    :param width: columns to keep to; below 40 it keeps to 40
    :param colour: with ANSI colours
    :param unicode: with box characters, else in ASCII
    """
    lines = _Drawing(topology, holders, colour, unicode).lines(max(width, _NARROWEST))
    return "\n".join(line.rstrip() for line in lines)


class _Drawing:
    # One drawing's settings, and how a set of pCPUs becomes lines. A block is a list of lines of
    # one visible width.

    def __init__(self, topology: Topology, holders: Mapping[int, str], colour: bool, unicode: bool) -> None:
        self.topology = topology
        self.holders = holders
        self.colour = colour
        self.lines_of_box = _LINES[0 if unicode else 1]
        names = sorted(
            set(holders.values()), key=lambda name: (min(cpu for cpu in holders if holders[cpu] == name), name)
        )
        self.letters = {name: _LETTERS[index] if index < len(_LETTERS) else _MANY for index, name in enumerate(names)}
        self.digits = len(str(max(topology.numbers, default=0)))
        self.labelled = len(topology.cores) <= _LABELLED_CORES
        hybrid = 2 if any(pcpu.kind for pcpu in topology.pcpus) else 0
        self.core_name = len(f"core {len(topology.cores) - 1}") + hybrid  # columns, so that all are alike
        self.listed = len(topology.online) > _DRAWN_PCPUS

    def lines(self, width: int) -> list[str]:
        topology = self.topology
        lines = [*_wrap(self.summary(), width)]
        groups = nested(_groups(topology, brief=not self.labelled))
        lines += self.inside(topology.online, groups, width)
        offline = topology.numbers - topology.online
        if offline:
            lines += _wrap(f"offline: {offline}", width)
        lines += self.legend(width)
        return lines

    def summary(self) -> str:
        topology = self.topology
        pcpus = topology.pcpus
        parts = [_count(len(topology.online), "pCPU")]
        for noun, ids in (
            ("core", {pcpu.core for pcpu in pcpus}),
            ("package", {pcpu.package for pcpu in pcpus}),
            ("NUMA node", {pcpu.numa for pcpu in pcpus}),
        ):
            known = len(ids - {None})
            if known:
                parts.append(_count(known, noun))
        usable = f"usable {topology.usable}" if topology.usable else "none usable"
        return f"{', '.join(parts)}; {usable}; {topology.root}"

    def legend(self, width: int) -> list[str]:
        lines = []
        online = self.topology.online
        if online - self.topology.usable - CpuSet.of(self.holders):
            lines.append(f"{_UNUSABLE} not usable by this process")
        for name, letter in self.letters.items():
            held = CpuSet.of(cpu for cpu, holder in self.holders.items() if holder == name)
            lines += _wrap(f"{letter} {name}: pCPU {held}", width)
        return lines

    # The block of a set of pCPUs: the groups in it as boxes, and the cores in none of them.
    def inside(self, cpus: CpuSet, groups: list[_Group], width: int) -> list[str]:
        blocks = []
        rest = cpus
        for group in groups:
            rest -= group.cpus
            body = self.inside(group.cpus, group.parts, width - 4)
            blocks.append(self.box(_named(group.names, width - 6), body))
        if rest:
            blocks += self.cores(rest, width)
        return _flow(blocks, width, gap=1)

    def cores(self, cpus: CpuSet, width: int) -> list[list[str]]:
        if self.listed:
            text = f"pCPU {cpus} ({_count(sum(1 for core in self.topology.cores if core & cpus), 'core')})"
            held = CpuSet.of(self.holders) & cpus
            return [_padded(_wrap(text, width) + (_wrap(f"held: {held}", width) if held else []))]
        blocks = []
        for core in self.topology.cores:
            if not core & cpus:
                continue
            pcpu = self.topology.pcpu(core.lowest)
            kind = {"performance": "P", "efficiency": "E"}.get(pcpu.kind or "", "")
            if self.labelled:
                cells = _flow([[self.cell(cpu)] for cpu in core], width - 4, gap=1)
                name = f"core {'?' if pcpu.core is None else pcpu.core} {kind}".strip()
                blocks.append(self.box(name, cells, self.core_name))
            else:
                cells = _flow([[self.cell(cpu)] for cpu in core], width - 2 - len(kind), gap=1)
                blocks.append([f"{kind}[{line}]" for line in _padded(cells)])
        return [_flow(blocks, width, gap=0 if self.labelled else 1)]

    def cell(self, cpu: int) -> str:
        number = f"{cpu:>{self.digits}}"
        holder = self.holders.get(cpu)
        if holder is not None:
            return self.styled(number + self.letters[holder], "held")
        if cpu not in self.topology.usable:
            return self.styled(number + _UNUSABLE, "unusable")
        return f"{number} "

    def styled(self, text: str, style: str) -> str:
        return f"{_STYLES[style]}{text}{_STYLES['off']}" if self.colour else text

    def box(self, title: str, body: list[str], least: int = 0) -> list[str]:
        top_left, top_right, bottom_left, bottom_right, across, down = tuple(self.lines_of_box)
        inner = max(least, _seen(title), *(_seen(line) for line in body))
        head = f"{top_left}{across}{title}{across * (inner - _seen(title))}{across}{top_right}"
        rows = [f"{down} {line}{' ' * (inner - _seen(line))} {down}" for line in body]
        return [head, *rows, f"{bottom_left}{across * (inner + 2)}{bottom_right}"]


class _Group:
    # pCPUs that share something, by all its names, and the groups inside it.

    def __init__(self, cpus: CpuSet, name: str) -> None:
        self.cpus = cpus
        self.names = [name]
        self.parts: list[_Group] = []


def _groups(topology: Topology, *, brief: bool) -> list[_Group]:
    groups: dict[CpuSet, _Group] = {}
    cores = set(topology.cores)
    packages: set[CpuSet] = set()
    for field, noun in (("package", "package"), ("die", "die"), ("numa", "NUMA"), ("llc", "cache")):
        masks: dict[int, int] = {}
        for pcpu in topology.pcpus:
            number = getattr(pcpu, field)
            if pcpu.online and number is not None:
                masks[number] = masks.get(number, 0) | 1 << pcpu.cpu
        for number, mask in masks.items():
            cpus = CpuSet(mask)
            # A cache of one core says nothing that the core does not, nor a die that is its package;
            # on POWER a package may be one core, and there are many.
            if cpus in cores and (brief or field == "llc"):
                continue
            if field == "die" and cpus in packages:
                continue
            if field == "package":
                packages.add(cpus)
            if cpus in groups:
                groups[cpus].names.append(f"{noun} {number}")
            else:
                groups[cpus] = _Group(cpus, f"{noun} {number}")
    return list(groups.values())


# Blocks side by side, in as many rows as *width* asks for.
def _flow(blocks: Sequence[list[str]], width: int, gap: int) -> list[str]:
    rows: list[list[list[str]]] = []
    room = 0
    for block in blocks:
        needs = _seen(block[0])
        if not rows or room < needs + gap:
            rows.append([])
            room = width + gap
        rows[-1].append(block)
        room -= needs + gap
    lines = []
    for row in rows:
        height = max(len(block) for block in row)
        full = [[*block, *[" " * _seen(block[0])] * (height - len(block))] for block in row]
        lines += [(" " * gap).join(parts) for parts in zip(*full, strict=True)]
    return _padded(lines)


def _padded(lines: list[str]) -> list[str]:
    widest = max(map(_seen, lines), default=0)
    return [line + " " * (widest - _seen(line)) for line in lines]


# Text in lines of *width*; a CPU list breaks after a comma, and a word that is longer is cut.
def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for whole in re.findall(r"[^ ,]*[ ,]?", text):
        word = whole
        if len(lines[-1]) + len(word.rstrip()) > width and lines[-1]:
            lines.append("  ")
        while len(lines[-1]) + len(word.rstrip()) > width:
            room = width - len(lines[-1])
            lines[-1] += word[:room]
            lines.append("  ")
            word = word[room:]
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _named(names: list[str], width: int) -> str:
    text = ", ".join(names)
    return text if len(text) <= width else text[: max(width, 0)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seen(text: str) -> int:
    return len(_STYLE.sub("", text)) if "\x1b" in text else len(text)


def _takes_unicode() -> bool:
    try:
        "".join(_LINES[0]).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
