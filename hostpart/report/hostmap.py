"""The host's map: packages, nodes, caches and cores as boxes in each other, and on each thread who was put there.

A letter stands for a placement, in the plan's order; the victim's pCPU is filled. What the kernel does not tell has no
box: its pCPUs are where the next box outside is.
"""

from __future__ import annotations

from ..cpuset import MAX_CPUS, CpuSet
from ..errors import UsageError
from ..topology import Pcpu, Topology, nested
from . import facts, quantity
from .finding import meaning
from .markup import Html, element, join, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = ["draw", "seats"]

_LEVELS = (("package", "package"), ("numa", "node"), ("llc", "cache"))
_NAMED_CORES = 32  # up to here each core has its name
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class _Seat:
    # One placement: whose pCPUs it takes.

    def __init__(self, letter: str, placement: str) -> None:
        self.letter, self.placement = letter, placement
        self.victims = self.aggressors = CpuSet()
        self.names: list[str] = []
        self.kinds: set[str] = set()


class _Box:
    def __init__(self, cpus: CpuSet, name: str, kind: str) -> None:
        self.cpus, self.kind, self.names = cpus, kind, [name]
        self.parts: list[_Box] = []


def draw(topology: object, caches: object, conditions: Sequence[Mapping[str, Any]], name: str) -> Html:
    """Return the map and under it what it shows as a table; or a sentence, where the topology is not known.

    :param topology: as ``hostpart topology --json`` prints it; None: not known
    :param caches: as the facts hold them
    :param conditions: of the plan or the analysis
    :param name: for the elements' ids
    """
    seated = _seats(conditions)
    try:
        host = Topology.from_json(topology)
    except UsageError:
        return join([element("p", "How the host is built is not known: no topology was kept.", class_="missing")])
    levels = nested(_boxes(host, caches if isinstance(caches, list) else []))
    drawing = _Drawing(host, seated)
    offline = host.numbers - host.online
    picture = element(
        "div",
        *drawing.inside(host.online, levels),
        _box("offline", f"offline: {len(offline)}", [drawing.cell(cpu) for cpu in offline]) if offline else None,
        class_="map many" if drawing.many else "map",
        role="img",
        aria_label=_sentence(host, seated),
        id=name,
    )
    headers = ["pCPU", "core", "cache", "node", "package", "kind", "state", "who was there"]
    rows = _rows(host, drawing)
    details = element(
        "details", element("summary", "Every pCPU as a table"), table(headers, rows, caption="pCPUs and who was there")
    )
    return join([picture, _legend(drawing), details])


# A row for each pCPU; on a large host for all that differ in number and core only.
def _rows(host: Topology, drawing: _Drawing) -> list[list[str]]:
    alike: dict[tuple[object, ...], list[Pcpu]] = {}
    for one in host.pcpus:
        state = "offline" if not one.online else "usable" if one.cpu in host.usable else "not usable"
        shared = (one.llc, one.numa, one.package, one.kind, state, drawing.who(one.cpu) or None)
        alike.setdefault((None if drawing.many else one.cpu, *shared), []).append(one)
    return [
        [
            str(CpuSet.of(one.cpu for one in those)),
            _numbers({one.core for one in those if one.core is not None}) or "–",
            *("–" if value is None else str(value) for value in shared),
        ]
        for (_, *shared), those in alike.items()
    ]


# A core's number may be any: as a set, large ones would be as many bits.
def _numbers(cores: set[int]) -> str:
    small = CpuSet.of(core for core in cores if core < MAX_CPUS)
    return ",".join([*([str(small)] if small else []), *(str(core) for core in sorted(cores) if core >= MAX_CPUS)])


def seats(conditions: Sequence[Mapping[str, Any]]) -> Html:
    """Return the table of placements: what each means, and on which pCPUs its victim and its aggressors were."""
    seen: dict[tuple[str, str, str, str], list[str]] = {}
    letters = {seat.placement: seat.letter for seat in _seats(conditions)}
    for one in conditions:
        if one.get("aggressor") is None:
            continue
        pinned = "any that is usable" if one.get("aggressor_pcpus") is None else str(one["aggressor_pcpus"])
        how = {"host": "pinned processes", "vm": "a VM of their own"}.get(str(one.get("as")), "–")
        if one.get("aggressor_pcpus") is None and one.get("as") != "vm":
            how = "processes"
        key = (str(one["placement"]), str(one.get("victim_pcpu")), pinned, how)
        names = seen.setdefault(key, [])
        if str(one["aggressor"]) not in names:
            names.append(str(one["aggressor"]))
    rows = [
        [
            _marked(letters.get(placement, ""), placement),
            meaning(placement),
            victim if victim != "None" else "–",
            pinned,
            how,
            ", ".join(names),
        ]
        for (placement, victim, pinned, how), names in seen.items()
    ]
    headers = ["placement", "where the aggressors were", "victim's pCPU", "aggressors' pCPUs", "as", "aggressors"]
    return table(headers, rows, caption="Who was where", label="placements and their pCPUs")


def _marked(letter: str, placement: str) -> Html:
    mark = element("span", letter, class_="mark") if letter else None
    return element("span", mark, " " if letter else None, placement, class_="whole" if len(placement) < 24 else None)


def _seats(conditions: Iterable[Mapping[str, Any]]) -> list[_Seat]:
    found: dict[str, _Seat] = {}
    victims = CpuSet()
    for one in conditions:
        victims |= _set(one.get("victim_pcpu"))
        if one.get("aggressor") is None:
            continue
        placement = str(one["placement"])
        # Beyond the alphabet a number: there are as many placements as kinds of core make of them.
        letter = _LETTERS[len(found)] if len(found) < len(_LETTERS) else str(len(found) + 1)
        seat = found.setdefault(placement, _Seat(letter, placement))
        seat.victims |= _set(one.get("victim_pcpu"))
        seat.aggressors |= _set(one.get("aggressor_pcpus"))
    if not found and victims:
        alone = _Seat("", "alone")
        alone.victims = victims
        return [alone]
    return list(found.values())


def _set(value: object) -> CpuSet:
    try:
        return CpuSet() if value is None else CpuSet.parse(str(value))
    except ValueError:
        return CpuSet()


def _sentence(host: Topology, seated: Sequence[_Seat]) -> str:
    parts = [quantity.count(len(host.online), "pCPU")]
    for field, noun in (("core", "core"), ("llc", "last-level cache"), ("numa", "NUMA node"), ("package", "package")):
        known = {getattr(one, field) for one in host.pcpus if one.online} - {None}
        if known:
            parts.append(quantity.count(len(known), noun))
    victims = CpuSet()
    for seat in seated:
        victims |= seat.victims
    told = f" The victim was on pCPU {victims}." if victims else ""
    others = [f"{seat.placement} on {seat.aggressors}" for seat in seated if seat.aggressors]
    told += f" Aggressors, by placement: {'; '.join(others)}." if others else ""
    return f"Map of the host: {', '.join(parts)}.{told}"


def _legend(drawing: _Drawing) -> Html:
    seated = drawing.seated
    items = [join([element("span", "V", class_="mark victim"), " the victim"])] if drawing.victims else []
    items += [_marked(seat.letter, seat.placement) for seat in seated if seat.aggressors]
    free = [seat for seat in seated if seat.letter and not seat.aggressors]
    items += [_marked(seat.letter, f"{seat.placement}: anywhere, so not drawn") for seat in free]
    if drawing.host.online - drawing.host.usable:
        items.append(join([element("span", "0", class_="cpu unusable"), " not usable"]))
    return element("ul", *(element("li", item) for item in items), class_="legend", aria_label="key")


class _Drawing:
    def __init__(self, host: Topology, seated: Sequence[_Seat]) -> None:
        self.host, self.seated = host, seated
        self.victims = CpuSet()
        for seat in seated:
            self.victims |= seat.victims
        self.named = len(host.cores) <= _NAMED_CORES
        self.many = not self.named

    def inside(self, cpus: CpuSet, boxes: Sequence[_Box]) -> list[Html]:
        found, rest = [], cpus
        for box in boxes:
            rest -= box.cpus
            found.append(_box(box.kind, " · ".join(box.names), self.inside(box.cpus, box.parts)))
        cores = [self.core(core & rest) for core in self.host.cores if core & rest]
        return [*found, *cores]

    def core(self, threads: CpuSet) -> Html:
        first = self.host.pcpu(threads.lowest)
        kind = {"performance": "P", "efficiency": "E"}.get(first.kind or "", "")
        name = f"core {'?' if first.core is None else first.core} {kind}".strip() if self.named else kind
        return _box("core", name, [self.cell(cpu) for cpu in threads])

    def cell(self, cpu: int) -> Html:
        letters = [seat.letter for seat in self.seated if cpu in seat.aggressors]
        marks = [element("span", "V", class_="mark victim")] if cpu in self.victims else []
        marks += [element("span", letter, class_="mark") for letter in letters]
        usable = cpu in self.host.usable
        return element(
            "span",
            element("span", cpu, class_="pcpu"),
            *marks,
            class_=f"cpu{' seat' if cpu in self.victims else ''}{'' if usable else ' unusable'}",
            title=f"pCPU {cpu}: {self.who(cpu)}" if marks else None,
        )

    def who(self, cpu: int) -> str:
        told = ["the victim"] if cpu in self.victims else []
        there = [seat.placement for seat in self.seated if cpu in seat.aggressors]
        return ", ".join(told + ([f"aggressors of {', '.join(there)}"] if there else []))


def _box(kind: str, name: str, children: Iterable[Html]) -> Html:
    head = element("span", name, class_="name") if name else None
    return element("div", head, element("div", *children, class_="inside"), class_=f"box {kind}")


def _boxes(host: Topology, caches: Sequence[Mapping[str, Any]]) -> list[_Box]:
    found: dict[CpuSet, _Box] = {}
    cores = set(host.cores)
    for field, noun in _LEVELS:
        members: dict[int, list[int]] = {}
        for one in host.pcpus:
            number = getattr(one, field)
            if one.online and number is not None:
                members.setdefault(number, []).append(one.cpu)
        for number, cpus in members.items():
            shared = CpuSet.of(cpus)
            if field == "llc" and shared in cores:
                continue  # a cache of one core says nothing that the core does not
            name = _cache(shared, number, caches) if field == "llc" else f"{noun} {number}"
            if shared in found:
                found[shared].names.append(name)
            else:
                found[shared] = _Box(shared, name, noun)
    return list(found.values())


def _cache(cpus: CpuSet, number: int, caches: Sequence[Mapping[str, Any]]) -> str:
    told = [one for one in caches if isinstance(one, dict) and isinstance(one.get("level"), int)]
    same = [one for one in told if _set(one.get("cpus")) & cpus == cpus]
    if not same:
        return f"cache {number}"
    last = max(same, key=lambda one: int(one["level"]))
    known = f" {facts.size(last['size_bytes'])}" if last.get("size_bytes") else ""
    return f"L{last['level']}{known}"
