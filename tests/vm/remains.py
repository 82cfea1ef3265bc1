"""What is left of hostpart on a host that was as a fingerprint says before it, in the ledger or out of it."""

from __future__ import annotations

import os

from hostpart.ledger import Ledger
from tests.vm.fingerprint import difference, fingerprint

__all__ = ["remains"]


def remains(before: dict[str, str]) -> list[str]:
    """Return what is not as it was, and what the ledger still has, a line each."""
    # 6.1's kernel rewrites the masks of its own bound threads, and lets nobody write them.
    left = difference(before, fingerprint(), bound=not os.uname().release.startswith("6.1."))
    with Ledger() as ledger:
        left += [f"the ledger remembers {key}: {known}" for key, known in ledger.known().items()]
        left += [f"the ledger has {row.name}" for row in ledger.vms()]
    return left
