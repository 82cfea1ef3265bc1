"""One host setting that is moved away from the guests' pCPUs, and the one function that brings any of them to where
it should be, at the start, at the end or after a crash.

A setting can read itself, say what it should be, and write. What it was before hostpart first touched it, and what
hostpart wrote since, is in the ledger before the write (:class:`hostpart.ledger.Known`). When to settle which is
:mod:`hostpart.isolation.reconcile`'s to say.
"""

from __future__ import annotations

import errno

from ..cpuset import CpuSet
from ..ledger import Known
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Protocol

    from ..host import Host

    class Setting(Protocol):
        """What :func:`settle` asks of a setting; values are text in one canonical form."""

        @property
        def key(self) -> str:
            """Its name in the ledger, unique on this host within one boot."""

        def read(self, host: Host) -> str:
            """Return the value that it has."""

        def wanted(self, baseline: str, service: CpuSet, released: CpuSet) -> str:
            """Return the value that it should have while *released*, which is not empty, is the guests'."""

        def write(self, host: Host, value: str) -> None:
            """Give it a value."""


__all__ = ["MaskFile", "Outcome", "settle"]

_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.ENXIO})
# What the kernel answers where a mask is not to be changed: an interrupt that cannot be steered is EIO on 6.1 and
# EPERM on 6.12, a value that it can't honour EINVAL or EOVERFLOW, a read-only mount EROFS.
_REFUSED = frozenset({errno.EIO, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOVERFLOW, errno.EROFS, errno.EBUSY})


class MaskFile(Value):
    """A file with a set of CPUs (Linux numbers) in it.

    :ivar key: its path below the host's root
    :ivar hexadecimal: in mask form; else in list form
    :ivar empty: whether the empty set is a value of its own ("off") and not one to widen
    """

    key: str
    hexadecimal: bool = False
    empty: bool = False

    def read(self, host: Host) -> str:
        """Return the set in list form."""
        text = host.read_text(self.key)
        return str(CpuSet.parse_mask(text) if self.hexadecimal else CpuSet.parse(text))

    def wanted(self, baseline: str, service: CpuSet, released: CpuSet) -> str:
        """Return the baseline without *released*; where nothing would be left, *service*."""
        before = CpuSet.parse(baseline)
        if self.empty and not before:
            return baseline
        return str(before - released or service)

    def write(self, host: Host, value: str) -> None:
        """Write the set in the file's own form."""
        host.write_text(self.key, CpuSet.parse(value).to_mask() if self.hexadecimal else value)


class Outcome(Value):
    """What became of one setting.

    :ivar what: ``kept`` as it is, ``written``, ``restored`` to its baseline, ``foreign`` (somebody else changed it
        meanwhile, and it is left as it is), ``refused`` by the kernel, or ``gone``
    :ivar was: what it had, *is*: what it has
    """

    key: str
    what: str
    was: str = ""
    now: str = ""
    why: str = ""


def settle(
    settings: Iterable[Setting],
    known: Mapping[str, Known],
    released: Callable[[str], CpuSet] | CpuSet,
    service: CpuSet,
    host: Host,
    remember: Callable[[Mapping[str, Known]], None],
    forget: Callable[[Iterable[str]], None],
) -> list[Outcome]:
    """Bring each setting to its baseline without *released*, or back to its baseline where *released* is empty.

    :param known: what the ledger has of them
    :param released: the pCPUs that guests hold, as far as these settings are concerned
    :param service: what to use where a baseline has nothing else
    :param remember: enters values in the ledger; done before the write
    :param forget: strikes settings out that have their baseline again, or are somebody else's by now
    """
    outcomes = []
    for setting in settings:
        free = released if isinstance(released, CpuSet) else released(setting.key)
        outcomes.append(_settle(setting, known.get(setting.key), free, service, host, remember, forget))
    return outcomes


def _settle(
    setting: Setting,
    known: Known | None,
    released: CpuSet,
    service: CpuSet,
    host: Host,
    remember: Callable[[Mapping[str, Known]], None],
    forget: Callable[[Iterable[str]], None],
) -> Outcome:
    key = setting.key
    try:
        now = setting.read(host)
    except OSError as error:
        if error.errno not in _GONE | _REFUSED:
            raise
        if known is not None:
            forget([key])
        return Outcome(key, "gone", why=error.strerror or "")
    if known is None:
        if not released:
            return Outcome(key, "kept", now, now)
        known = Known(now, (now,))
    elif now not in known.ours:
        # Somebody else's by now: left alone, and said. What it was before is not to be put back any more. That is
        # remembered as long as anything is released: the next call would else take it for a setting not seen yet.
        if released:
            remember({key: Known(now)})
        else:
            forget([key])
        return Outcome(key, "foreign", now, now)
    want = setting.wanted(known.baseline, service, released) if released else known.baseline
    if want != now:
        # Remember, then write. A crash between the two leaves a memory of a write that never came; the other order
        # leaves a change that nobody remembers.
        remember({key: Known(known.baseline, (now, want))})
        try:
            setting.write(host, want)
            is_now = setting.read(host)
        except OSError as error:
            if error.errno not in _GONE | _REFUSED:
                raise
            if now == known.baseline:
                forget([key])
            return Outcome(key, "refused", now, now, error.strerror or "")
        if is_now != want:
            # The kernel made something of its own of it, which is to be undone like what was asked for.
            remember({key: Known(known.baseline, (want, is_now))})
            return Outcome(key, "refused", now, is_now, f"{want} was written and {is_now} is what it has")
    if want == known.baseline:
        forget([key])
    return Outcome(key, "kept" if want == now else "restored" if not released else "written", now, want)
