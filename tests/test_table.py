from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cli.table import colour_wanted, plain, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    drawn = table(["VM", "PCPUS", "STATE"], [["rt", "2-3", "RUNNING"], ["a-long-name", "4", "PAUSED"]], colour=False)
    assert drawn.splitlines() == [
        "VM           PCPUS  STATE",
        "rt           2-3    RUNNING",
        "a-long-name  4      PAUSED",
    ]


def test_numbers_stand_to_the_right_and_what_is_not_known_is_a_dash() -> None:
    drawn = table(["PID", "WAIT", "VM"], [[7, None, "a"], [12345, 0.5, None]], colour=False)
    assert drawn.splitlines() == ["  PID  WAIT  VM", "    7     -  a", "12345   0.5  -"]


def test_a_column_with_a_word_among_numbers_stands_to_the_left() -> None:
    assert table(["N"], [["rest"], [1]], colour=False).splitlines() == ["N", "rest", "1"]


def test_true_and_false_are_words_and_not_numbers() -> None:
    assert table(["HELD", "X"], [[True, 1], [False, 2]], colour=False).splitlines() == ["HELD  X", "yes   1", "no    2"]


def test_no_rows_leave_the_headers() -> None:
    assert table(["VM", "PID"], [], colour=False) == "VM  PID"


def test_a_row_with_a_cell_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        table(["VM", "PID"], [["rt"]], colour=False)


def test_only_the_headers_are_bold() -> None:
    assert table(["VM"], [["rt"]], colour=True) == "\x1b[1mVM\x1b[0m\nrt"


@pytest.mark.parametrize(
    ("text", "width"),
    [
        pytest.param("日本", 4, id="wide"),
        pytest.param("e\u0301", 1, id="combining"),
        pytest.param("né", 2, id="accent"),
    ],
)
def test_cells_line_up_by_terminal_columns(text: str, width: int) -> None:
    line = table(["A", "B"], [[text, "|"], ["-----", "|"]], colour=False).splitlines()[1]
    assert line == text + " " * (5 - width) + "  |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("\x1b[2J", r"\x1b[2J", id="escape sequence"),
        pytest.param("a\nb\tc", r"a\nb\tc", id="newline and tab"),
        pytest.param("\x9b31m", r"\x9b31m", id="8-bit control sequence"),
        pytest.param("a\u202eb", r"a\u202eb", id="right-to-left override"),
        pytest.param("\udcff", r"\udcff", id="byte that was not UTF-8"),
    ],
)
def test_control_characters_are_shown_and_never_emitted(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert table([text], [[text]], colour=False) == f"{shown}\n{shown}"


@given(st.lists(st.lists(st.text() | st.integers() | st.none() | st.booleans(), min_size=2, max_size=2)))
def test_a_table_has_one_line_per_row_and_can_always_be_written(rows: list[list[object]]) -> None:
    drawn = table(["A", "B"], rows, colour=False)
    lines = drawn.split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)
    drawn.encode("utf-8")


@pytest.mark.parametrize(
    ("environment", "terminal", "wanted"),
    [
        pytest.param({"TERM": "xterm"}, True, True, id="terminal"),
        pytest.param({"TERM": "xterm"}, False, False, id="pipe"),
        pytest.param({"TERM": "dumb"}, True, False, id="dumb terminal"),
        pytest.param({"TERM": "xterm", "NO_COLOR": "1"}, True, False, id="NO_COLOR"),
        pytest.param({"TERM": "xterm", "NO_COLOR": ""}, True, True, id="NO_COLOR empty"),
    ],
)
def test_colour_is_for_terminals_whose_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, wanted: bool
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert colour_wanted(Terminal() if terminal else io.StringIO()) is wanted


def test_a_closed_stdout_wants_no_colour() -> None:
    assert colour_wanted(None) is False
