"""What comes from others is text: nothing of it is unpickled, evaluated or given to a shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import Place

ROOT = Path(__file__).resolve().parent.parent / "hostpart"
MODULES = sorted([*(ROOT / "fleet").glob("*.py"), *(ROOT / "cli").glob("fleet*.py")])
# Modules that make objects or commands of bytes, and builtins that make code of text.
REFUSED = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "yaml"}
CALLS = {"eval", "exec", "compile", "system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [name for name in names if name.partition(".")[0] in REFUSED]
        if isinstance(node, ast.Call):
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            regular = (
                isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "re"
            )
            assert name not in CALLS or (name == "compile" and regular), ast.unparse(node)
            assert not [one for one in node.keywords if one.arg == "shell"], ast.unparse(node)


def test_words_reach_the_guest_as_they_are(place: Place, tmp_path: Path) -> None:
    place.env["HOSTPART_FLEET_DIR"] = str(tmp_path / "fleet")
    words = [
        "$(touch made)",
        "`touch made`",
        "; touch made",
        "a b",
        "",
        "{dir}/../x",
        "--out",
        "*",
        'quoted "twice"',
        "ü\n",
    ]
    done = place.run("fleet", "--local", "1", "run", "--", "printf", "%s|", *words, timeout=90, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{word}|" for word in words)
    assert not (tmp_path / "made").exists()
