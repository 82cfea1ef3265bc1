"""The tests; run them with ``pytest -n auto``."""
