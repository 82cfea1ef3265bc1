"""Evidence as a file holds it, for the tests of what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

from hostpart import evidence

__all__ = ["SCHEMA", "about", "document"]

SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())


def document(path: Path) -> dict[str, Any]:
    """Return the evidence in a file, which agrees with its schema."""
    found: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def about(doc: dict[str, Any], *words: str) -> list[str]:
    """Return the reasons in which all *words* are."""
    return [reason for reason in doc["reasons"] if all(word in reason for word in words)]
