"""The shape of the code: which way imports run, what every module says of itself, and what the tools say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostpart.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
# A module imports only from lower rows; those of one row do not know each other.
LAYERS = (
    ("value", "cpuset", "__init__"),
    ("errors",),
    ("host", "procfs", "channel", "memlock", "systemd", "toml_table"),
    ("madt", "tree", "cgroup", "lease", "ledger", "rehearsal"),
    ("topology", "control", "hypercall", "isolation", "occupancy", "auditor"),
    ("allocator", "recovery", "evidence"),
    ("qemu",),
    ("config", "hypervisor", "census"),
    ("vhm", "audit"),
    ("device_model",),
    ("machines",),
    ("keeper",),
    ("service_vm", "front", "attachment"),
    ("launcher",),
    ("experiment",),
    ("fleet",),
    ("report",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The package itself only names what its modules offer, and imports each when it is first asked for.
MODULES = sorted(path for path in (ROOT / "hostpart").glob("*.py") if path.stem != "__init__")
PACKAGES = ("isolation", "qemu", "experiment", "fleet", "report")  # a layer each, whose parts know each other
MODULES += sorted(path for package in PACKAGES for path in (ROOT / "hostpart" / package).glob("*.py"))
SOURCES = sorted(path for top in ("hostpart", "workers") for path in (ROOT / top).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    # Modules of hostpart that a module of hostpart imports, anywhere in it.
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 + (path.parent.name in ("cli", *PACKAGES)):
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hostpart"):
            found.add((node.module or "").partition(".")[2].split(".")[0] or "__init__")
    return {name if name in LEVEL else "__init__" for name in found}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_imports_run_one_way(path: Path) -> None:
    own = path.stem if path.parent.name == "hostpart" else path.parent.name
    assert not {name for name in _imports(path) if LEVEL[name] >= LEVEL[own] and name != own}


def test_workers_import_nothing_of_hostpart() -> None:
    for path in (ROOT / "workers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "hostpart"], path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_and_what_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if not body:
        return
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert module.__all__
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    missing = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for one in (node, *inside):
            if (
                isinstance(one, (ast.FunctionDef, ast.ClassDef))
                and not one.name.startswith("_")
                and not ast.get_docstring(one)
            ):
                overrides = isinstance(one, ast.FunctionDef) and one.name in ("remedy", "emit", "close")
                if not overrides:
                    missing.append(f"{node.name}.{one.name}")
    assert missing == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "hostpart", command, "--help"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert "usage: hostpart" in done.stdout
    assert "Exit status" in done.stdout


def test_the_top_level_holds_what_people_expect() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs git and a checkout")
    assert {path.split("/")[0] for path in done.stdout.splitlines()} == {
        ".ci", ".gitignore", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md",
        "bench", "hostpart", "pyproject.toml", "tests", "workers",
    }  # fmt: skip


def test_every_command_of_the_readme_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"hostpart ([a-z-]+)\b", text))
    assert set(COMMANDS) - {"completion"} <= named


def test_ruff_is_clean() -> None:
    for args in (["check"], ["format", "--check"]):
        done = subprocess.run(
            ["ruff", *args, "--quiet", "."], cwd=ROOT, capture_output=True, text=True, env=_tools(), check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_is_clean() -> None:
    done = subprocess.run(["mypy"], cwd=ROOT, capture_output=True, text=True, env=_tools(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _tools() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
