"""The packages that experiments need and that nothing else of hostpart does."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import UsageError

__all__ = ["need"]

# By the name under which they are imported; the rest of the extra is the report's.
_PACKAGES = {"hdrh": "hdrhistogram", "numpy": "numpy", "plotly": "plotly", "rich": "rich", "scipy": "scipy"}


def need() -> None:
    """Refuse where a package is missing: to be called before a module that imports one is.

    It imports none of them.

    :raises UsageError: naming what is missing
    """
    missing = [package for name, package in _PACKAGES.items() if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"experiments need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            "pip install 'hostpart[experiment]'",
        )
