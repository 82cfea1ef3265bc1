"""Whom no sweep touches: the processes of VMs, told by number and start time."""

from __future__ import annotations

import os
from pathlib import Path

from hostpart.isolation.reconcile import guests
from hostpart.ledger import Known, Ledger, VmRow
from hostpart.procfs import start_time


def test_a_keepers_number_that_is_another_process_by_now_protects_nobody(tmp_path: Path) -> None:
    mine = os.getpid()
    born = start_time(mine)
    assert born is not None
    with Ledger(str(tmp_path)) as ledger:
        row = VmRow(0, "rt", 0, "a" * 32, "boot", "RUNNING", 1, "sleep 1", mine, born, mine, 40.5)
        number = ledger.add_vm(row)
        assert guests(ledger) == {mine}
        ledger.remove_vm(number)
        ledger.add_vm(row.replace(keeper_start=born - 1))
        assert guests(ledger) == set()


def test_an_attached_process_whose_number_was_used_again_is_not_protected(tmp_path: Path) -> None:
    mine = os.getpid()
    born = start_time(mine)
    assert born is not None
    with Ledger(str(tmp_path)) as ledger:
        for start, found in ((born, {mine}), (born - 1, set())):
            # As attached.take enters a main thread: where it was, and the masks it has had since.
            key = f"attached:{'a' * 32}:{mine}:{mine}:{start}"
            ledger.remember({key: Known("0-1||", ("0-1", "1"))})
            assert guests(ledger) == found
            ledger.forget([key])
