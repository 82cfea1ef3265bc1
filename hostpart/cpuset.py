"""Sets of logical CPU numbers: the kernel's list and mask forms, both ways."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["MAX_CPUS", "CpuSet"]

MAX_CPUS = 8192  # the kernel's own largest CONFIG_NR_CPUS
_HEX = "0123456789abcdefABCDEF"


class CpuSet:
    """An immutable set of logical CPU numbers (Linux numbers, not APIC ids).

    The mask is the whole state, so ``0,1`` and ``0-1`` compare equal. It iterates in
    ascending order.
    """

    __slots__ = ("_text", "mask")
    mask: int
    _text: str

    def __init__(self, mask: int = 0) -> None:
        if mask < 0:
            raise ValueError(f"a CPU mask is not negative: {mask}")
        object.__setattr__(self, "mask", mask)

    @classmethod
    def of(cls, cpus: Iterable[int]) -> CpuSet:
        """Return the set of *cpus*.

        :raises ValueError: for a negative number
        """
        mask = 0
        for cpu in cpus:
            mask |= 1 << cpu
        return cls(mask)

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """Read the kernel's list form, strictly; blank text is the empty set.

        >>> CpuSet.parse("0-2,8\\n")
        CpuSet('0-2,8')

        :raises ValueError: naming the part that is not ``N`` or ``N-M`` below :data:`MAX_CPUS`

        Source: Documentation/admin-guide/kernel-parameters.rst, "<cpu-list>" (without its
        ``all``, ``N`` and stride forms, which the kernel reads but never prints).
        """
        body = text.strip(" \t\n")
        mask = 0
        for part in body.split(",") if body else ():
            low, dash, high = part.partition("-")
            if not (_is_number(low) and (_is_number(high) or not dash)):
                raise ValueError(f"{part!r} in {body!r} is not a CPU or a range of CPUs")
            first, last = int(low), int(high or low)
            if first > last:
                raise ValueError(f"{part!r} in {body!r} runs backwards")
            if last >= MAX_CPUS:
                raise ValueError(f"{part!r} in {body!r} is beyond CPU {MAX_CPUS - 1}")
            mask |= (1 << last + 1) - (1 << first)
        return cls(mask)

    @classmethod
    def parse_mask(cls, text: str) -> CpuSet:
        """Read the kernel's mask form: 32-bit words in hex, the highest first, with commas.

        :raises ValueError: where *text* is not of that form or names a CPU from :data:`MAX_CPUS` on
        """
        body = text.strip(" \t\n")
        words = body.split(",")
        if not all(0 < len(word) <= 8 and not word.strip(_HEX) for word in words):
            raise ValueError(f"{body!r} is not a CPU mask in hex")
        mask = int("".join([words[0], *(word.zfill(8) for word in words[1:])]), 16)
        if mask >> MAX_CPUS:
            raise ValueError(f"the mask names a CPU beyond {MAX_CPUS - 1}")
        return cls(mask)

    def to_mask(self) -> str:
        """Return the kernel's mask form (``"00000001,00000003"``)."""
        count = max(1, (self.mask.bit_length() + 31) // 32)
        return ",".join(f"{self.mask >> 32 * word & 0xFFFFFFFF:08x}" for word in reversed(range(count)))

    @property
    def lowest(self) -> int:
        """The lowest CPU of the set.

        :raises ValueError: for the empty set
        """
        if not self.mask:
            raise ValueError("an empty set of CPUs has no lowest")
        return (self.mask & -self.mask).bit_length() - 1

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a CpuSet is frozen")

    def __iter__(self) -> Iterator[int]:
        # Over the digits and not by shifting: that would be quadratic in the size of the machine.
        bits = bin(self.mask)[:1:-1]
        cpu = bits.find("1")
        while cpu >= 0:
            yield cpu
            cpu = bits.find("1", cpu + 1)

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __bool__(self) -> bool:
        return self.mask != 0

    def __contains__(self, cpu: object) -> bool:
        return isinstance(cpu, int) and cpu >= 0 and bool(self.mask >> cpu & 1)

    def __and__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.mask & other.mask)

    def __or__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.mask | other.mask)

    def __sub__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.mask & ~other.mask)

    def __xor__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.mask ^ other.mask)

    def __le__(self, other: CpuSet) -> bool:
        return self.mask & ~other.mask == 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuSet) and self.mask == other.mask

    def __hash__(self) -> int:
        return hash(self.mask)

    def __reduce__(self) -> tuple[type[CpuSet], tuple[int]]:
        return CpuSet, (self.mask,)

    def __str__(self) -> str:
        try:
            return self._text  # thousands of tasks have one mask, and each is remembered in words
        except AttributeError:
            object.__setattr__(self, "_text", self._worded())
            return self._text

    def _worded(self) -> str:
        spans: list[str] = []
        mask, base = self.mask, 0
        while mask:
            skip = (mask & -mask).bit_length() - 1
            mask >>= skip
            run = (~mask & mask + 1).bit_length() - 1
            first = base + skip
            spans.append(f"{first}" if run == 1 else f"{first}-{first + run - 1}")
            mask >>= run
            base = first + run
        return ",".join(spans)

    def __repr__(self) -> str:
        return f"CpuSet({str(self)!r})"


def _is_number(text: str) -> bool:
    # As the kernel prints one; int() takes blanks, signs, underscores and any script's digits besides. (Compiling
    # a regular expression would take longer than all that `hostpart run` does with these.)
    return text.isascii() and text.isdigit() and len(text) <= 4
