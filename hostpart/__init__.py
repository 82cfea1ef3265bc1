"""Static CPU partitioning on an ordinary Linux host: each virtual CPU on a physical CPU of its own, and proof that it held."""

__all__ = ["__version__"]

__version__ = "0.1.0"
