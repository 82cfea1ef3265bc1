"""A mark for values of a parameter that run with all cases only: others go the same ways."""

from __future__ import annotations

import pytest

__all__ = ["SELDOM"]

SELDOM = pytest.mark.vm(every=())
