"""Records: what `dataclass(frozen=True, slots=True)` promises, and `dataclasses` agrees."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from rmaker_ota.records import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """Somewhere."""

    x: int
    y: int = 2
    label: str | None = None

    @property
    def total(self) -> int:
        return self.x + self.y


@dataclasses.dataclass(frozen=True, slots=True)
class Usual:
    x: int
    y: int = 2
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Hidden:
    x: int
    secret: bytes = dataclasses.field(default=b"", repr=False, compare=False)
    items: tuple[int, ...] = dataclasses.field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Derived(Point):
    z: int = 3


@dataclass(frozen=True, slots=True)
class Checked:
    x: int = 0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x is {self.x}")


@dataclass(slots=True)
class Loose:
    x: int


@dataclass(frozen=True, slots=True)
class Nothing:
    """A record without fields."""


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1,), {}),
    ((1, 5), {}),
    ((1, 5, "a"), {}),
    ((), {"x": 1, "label": "b"}),
    ((3,), {"y": 4}),
]


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_record_is_made_shown_and_compared_as_a_dataclass_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    record, usual = Point(*args, **kwargs), Usual(*args, **kwargs)
    assert repr(record) == repr(usual).replace("Usual", "Point")
    assert (record.x, record.y, record.label) == (usual.x, usual.y, usual.label)
    assert record == Point(*args, **kwargs)
    assert hash(record) == hash(Point(*args, **kwargs)) == hash(usual)
    assert record != Point(99)
    assert record != usual
    assert record.total == record.x + record.y


def test_a_record_checks_its_fields_each_time_it_is_made() -> None:
    assert Checked().x == 0
    with pytest.raises(ValueError, match="x is -1"):
        Checked(-1)
    with pytest.raises(ValueError, match="x is -1"):
        dataclasses.replace(Checked(1), x=-1)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, "", 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1})])
def test_wrong_arguments_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Point(*args, **kwargs)


def test_record_does_not_change() -> None:
    record = Point(1)
    for change in (lambda: setattr(record, "x", 2), lambda: setattr(record, "new", 2), lambda: delattr(record, "x")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    assert record == Point(1)
    assert not hasattr(record, "__dict__")


def test_dataclasses_takes_it_for_its_own() -> None:
    record = Point(1)
    assert dataclasses.is_dataclass(Point)
    assert dataclasses.replace(record, y=7) == Point(1, 7)
    assert dataclasses.asdict(record) == {"x": 1, "y": 2, "label": None}
    assert dataclasses.astuple(record) == (1, 2, None)
    ours, theirs = dataclasses.fields(Point), dataclasses.fields(Usual)
    assert [(each.name, each.type, each.default) for each in ours] == [
        (each.name, each.type, each.default) for each in theirs
    ]
    assert str(inspect.signature(Point)) == str(inspect.signature(Usual))


def test_record_can_be_copied_and_pickled() -> None:
    record = Point(1, label="a")
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == copy.copy(record) == record


def test_record_matches_by_position() -> None:
    match Point(1, 2, "a"):
        case Point(x, y, label):
            assert (x, y, label) == (1, 2, "a")


def test_class_keeps_what_it_was_written_with() -> None:
    assert (Point.__name__, Point.__qualname__, Point.__module__, Point.__doc__) == (
        "Point",
        "Point",
        __name__,
        "Somewhere.",
    )
    assert repr(Nothing()) == "Nothing()"
    assert Nothing() == Nothing()


def test_fields_of_dataclasses_are_honoured() -> None:
    assert repr(Hidden(1, b"s", (2,))) == "Hidden(x=1, items=(2,))"
    assert Hidden(1, b"s") == Hidden(1, b"t")


def test_what_is_no_plain_record_is_a_dataclass_too() -> None:
    assert repr(Derived(1)) == "Derived(x=1, y=2, label=None, z=3)"
    assert Derived(1) != Point(1)
    loose = Loose(1)
    loose.x = 2
    assert loose == Loose(2)


def test_what_a_record_cannot_be_is_said_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="a default that can change"):

        @dataclass(frozen=True, slots=True)
        class Shared:
            items: list[int] = []  # noqa: RUF012
