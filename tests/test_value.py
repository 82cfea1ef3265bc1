"""Frozen values: what a dataclass would promise, without one."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.value import Value


class Point(Value):
    x: int
    y: int = 0

    _hidden: int = 7
    UNIT = "m"


class Point3(Point):
    z: int = 0


class Renamed(Point):
    x: int
    label: str = ""


def test_fields_come_in_order_of_declaration_and_inherited_ones_first() -> None:
    assert Point._fields == ("x", "y")
    assert Point3._fields == ("x", "y", "z")
    assert Renamed._fields == ("y", "x", "label"), "what is declared again moves to its new place"


def test_what_is_not_annotated_or_is_private_is_no_field() -> None:
    assert Point(1).asdict() == {"x": 1, "y": 0}
    with pytest.raises(TypeError, match="'_hidden' is no field"):
        Point(1, _hidden=3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "Point needs 'x'"),
        ((1, 2, 3), {}, "takes 2 fields, got 3"),
        ((1,), {"x": 2}, "'x' is given twice"),
        ((1,), {"q": 2}, "'q' is no field"),
    ],
    ids=["missing", "too many", "doubled", "unknown"],
)
def test_wrong_fields_are_a_type_error_that_names_them(
    args: tuple[int, ...], kwargs: dict[str, int], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Point(*args, **kwargs)


def test_a_value_can_be_neither_changed_nor_emptied() -> None:
    point = Point(1, 2)
    with pytest.raises(TypeError, match="frozen"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="frozen"):
        setattr(point, "new", 3)  # noqa: B010
    with pytest.raises(TypeError, match="frozen"):
        del point.x
    assert point == Point(1, 2)


def test_replace_leaves_the_original_as_it_was() -> None:
    point = Point(1, 2)
    assert point.replace(y=5) == Point(1, 5)
    assert point == Point(1, 2)
    with pytest.raises(TypeError, match="no field"):
        point.replace(w=1)


def test_values_of_different_classes_are_never_equal() -> None:
    assert Point(1, 2) != Point3(1, 2)
    assert Point(1, 2) != (1, 2)


def test_values_of_equal_fields_of_different_classes_are_two_keys() -> None:
    assert len({Point(1, 2), Point(1, 2), Point3(1, 2)}) == 2


def test_a_value_with_a_list_in_it_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point([]))  # type: ignore[arg-type]


@given(st.integers(), st.integers(), st.integers())
def test_a_value_survives_pickling_and_its_repr_makes_it_again(x: int, y: int, z: int) -> None:
    value = Point3(x, y, z)
    assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301
    assert eval(repr(value)) == value  # noqa: S307
    assert hash(pickle.loads(pickle.dumps(value))) == hash(value)  # noqa: S301
