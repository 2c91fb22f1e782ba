"""`dataclass(frozen=True, slots=True)` that costs little at import.

`dataclasses.dataclass` compiles six functions for each class, 0.9 ms of CPU a class (CPython 3.11, 2-core x86), and
installing one image needs ten classes. This one compiles ``__init__`` alone and shares the rest. Type checkers see
`dataclasses.dataclass`, and `dataclasses.fields`, ``replace``, ``asdict`` and ``is_dataclass`` work as usual.

It makes plain records: fields with or without a default, and ``__post_init__`` to check them. What needs more (other
arguments, `dataclasses.field`, a base class with fields) it leaves to `dataclasses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool = False, slots: bool = False):
        """As `dataclasses.dataclass`."""
        if frozen and slots:
            return make_record
        import dataclasses

        return dataclasses.dataclass(frozen=frozen, slots=slots)


def make_record(cls: type[Any]) -> type[Any]:
    """The class made anew, as a record of the fields annotated in its body."""
    namespace = dict(cls.__dict__)
    annotations: dict[str, Any] = namespace.get("__annotations__", {})
    names = tuple(annotations)
    defaults = {name: namespace.pop(name) for name in names if name in namespace}
    if any(type(value).__module__ == "dataclasses" for value in defaults.values()) or any(
        hasattr(base, "__match_args__") for base in cls.__mro__[1:]
    ):
        import dataclasses

        return dataclasses.dataclass(frozen=True, slots=True)(cls)
    for name, value in defaults.items():
        if type(value).__hash__ is None:
            raise TypeError(f"{cls.__qualname__}.{name}: a default that can change would be shared by all records")

    parameters = ", ".join(["self", *(f"{name}=defaults[{name!r}]" if name in defaults else name for name in names)])
    steps = [f"set_field(self, {name!r}, {name})" for name in names]
    if hasattr(cls, "__post_init__"):
        steps.append("self.__post_init__()")
    body = "; ".join(steps) or "pass"
    scope: dict[str, Any] = {"defaults": defaults, "set_field": object.__setattr__, "__name__": cls.__module__}
    exec(f"def __init__({parameters}): {body}", scope)
    scope["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    scope["__init__"].__annotations__ = {**annotations, "return": None}

    for name in ("__dict__", "__weakref__"):
        namespace.pop(name, None)
    kind: Any = type(cls)
    made: type[Any] = kind(
        cls.__name__,
        cls.__bases__,
        {
            **METHODS,
            "__dataclass_fields__": Details(),
            "__dataclass_params__": Details(),
            **namespace,
            "__init__": scope["__init__"],
            "__slots__": names,
            "__match_args__": names,
            "__qualname__": cls.__qualname__,
            "__record_defaults__": defaults,
        },
    )
    return made


def values(record: Any) -> tuple[Any, ...]:
    return tuple([getattr(record, name) for name in record.__match_args__])


class Methods:
    """What all records share."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)  # type: ignore[attr-defined]
        return f"{type(self).__qualname__}({fields})"

    def __eq__(self, other: object) -> bool:
        return values(self) == values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(values(self))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        refuse(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        refuse(f"cannot delete field {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), values(self)

    def __replace__(self, **changes: Any) -> Any:
        import dataclasses

        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


METHODS = {name: value for name, value in vars(Methods).items() if callable(value)}


def refuse(message: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(message)


class Details:
    """What `dataclasses` wants to know of a record, made when it asks."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, record: Any, owner: type[Any]) -> Any:
        import dataclasses

        rows = [
            (name, kind, dataclasses.field(default=owner.__record_defaults__[name]))
            if name in owner.__record_defaults__
            else (name, kind)
            for name, kind in owner.__annotations__.items()
        ]
        twin = dataclasses.make_dataclass(owner.__name__, rows, frozen=True, slots=True)
        for name in ("__dataclass_fields__", "__dataclass_params__"):
            setattr(owner, name, getattr(twin, name))
        return getattr(twin, self._name)
