"""The isolation ladder: how far the host is kept off the pCPUs that user VMs hold, and the way back.

``level`` names the levels, one module per mechanism says what is written where, and ``reconcile`` brings the whole
host to where it should be, which follows from the VMs in the ledger alone.
"""

from .level import LEVELS, Isolation, Wish

__all__ = ["LEVELS", "Isolation", "Wish"]
