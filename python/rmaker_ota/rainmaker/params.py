"""Devices and services of a node, and their parameters: what they are, what they hold, what may be written to them.

    power = Param("Power", "esp.param.power", False)
    lamp = Device("Lamp", "esp.device.lightbulb", [power], write_cb=lambda device, param, value: switch(value))
    node.add_device(lamp)
    power.update_and_report(True)

Pure: no socket, no clock, no thread. `workflow` says what goes onto the wire and when, a node calls the callbacks.
Values may be changed and read from any thread. What comes from the network is hostile: `Params.parse_writes` accepts
nothing that `Param.check` does not.

Source: specification, sections 3.1 to 3.4.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

from rmaker_ota.errors import ArgumentError
from rmaker_ota.rainmaker.messages import MAX_PAYLOAD, JsonValue, attributes_json, has_surrogate, parse_object
from rmaker_ota.records import dataclass

Value = bool | int | float | str | dict[str, JsonValue] | list[JsonValue]
WriteCallback = Callable[["Device", "Param", Value], object]

MAX_TEXT = 32 * 1024  # bytes of JSON one value may have; a message of AWS IoT holds 128 KiB
MAX_NAME = 256  # characters
OTA_SERVICE = "OTA"
GROUPS_SERVICE = "Groups"
CONNECTIVITY_SERVICE = "Connectivity"

_DATA_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "string": str, "object": dict, "array": list}
_PROPERTIES = ("read", "write", "time_series", "simple_ts")  # in the order of the node configuration


@dataclass(frozen=True, slots=True)
class Bounds:
    """Smallest and largest value, both allowed; ``step`` is for user interfaces, None: not said."""

    min: int | float
    max: int | float
    step: int | float | None = None


class Param:
    """One parameter of a device or service.

    Args:
        name: unique within its device.
        type: such as ``"esp.param.power"``; None: not said.
        value: what it holds at first.
        data_type: ``bool``, ``int``, ``float``, ``string``, ``object`` or ``array``; None: that of the value.
        properties: of ``read``, ``write``, and ``time_series`` or ``simple_ts``.
        bounds: for numbers; values outside are refused.
        valid_strs: for strings; other values are refused.
        ui_type: such as ``"esp.ui.slider"``.

    Raises:
        ArgumentError: these do not fit together; the message says which.
    """

    def __init__(
        self,
        name: str,
        type: str | None,
        value: Value,
        *,
        data_type: str | None = None,
        properties: Iterable[str] = ("read", "write"),
        bounds: Bounds | None = None,
        valid_strs: Sequence[str] | None = None,
        ui_type: str | None = None,
    ) -> None:
        self.name = _name(name, "parameter")
        self.type = _text(type, f"type of parameter {name}")
        self.data_type = data_type or _data_type_of(name, value)
        self.properties = _properties(name, properties)
        self.bounds = bounds
        if valid_strs is None:
            self.valid_strs = None
        else:
            self.valid_strs = tuple(_text(each, f"string of parameter {name}") or "" for each in valid_strs)
        self.ui_type = _text(ui_type, f"ui_type of parameter {name}")
        self.device: Device | None = None
        if self.data_type not in _DATA_TYPES:
            self._refuse(f'data type "{self.data_type}", expected one of {", ".join(_DATA_TYPES)}')
        if self.valid_strs is not None and self.data_type != "string":
            self._refuse("valid_strs are for strings")
        if bounds is not None:
            self._check_bounds(bounds)
        self._value = self.check(value)
        self._changed = False

    @property
    def value(self) -> Value:
        """What it holds now; of objects and arrays not a copy: do not change it."""
        return self._value

    @property
    def changed(self) -> bool:
        """Whether it was updated since it was reported last."""
        return self._changed

    @property
    def full_name(self) -> str:
        """For people: ``Lamp.Power``."""
        return self.name if self.device is None else f"{self.device.name}.{self.name}"

    def check(self, value: object) -> Value:
        """A value as this parameter holds it: integers become floats where those are meant.

        Raises:
            ArgumentError: not of its data type, outside its bounds, none of its strings, or too large.
        """
        if self.data_type == "float" and isinstance(value, int) and not isinstance(value, bool) and _is_int64(value):
            value = float(value)
        wanted = _DATA_TYPES[self.data_type]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            self._refuse(f"{_shown(value)}, expected {self.data_type}")
        if isinstance(value, int) and not _is_int64(value):
            self._refuse(f"{_shown(value)}, expected 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(f"{value}, expected a finite number")
        if self.bounds is not None and isinstance(value, (int, float)):
            low, high = self.bounds.min, self.bounds.max
            if not low <= value <= high:
                self._refuse(f"{value}, expected {low} to {high}")
        if self.valid_strs is not None and value not in self.valid_strs:
            self._refuse(f"{_shown(value)}, expected one of {', '.join(map(json.dumps, self.valid_strs))}")
        if isinstance(value, (str, dict, list)):
            return self._checked_text(value)
        assert isinstance(value, (bool, int, float))
        return value

    def update(self, value: object) -> None:
        """Holds another value from now on, which goes out with the next report.

        Raises:
            ArgumentError: see `check`; nothing changes.
        """
        self.put(self.check(value))

    def update_and_report(self, value: object) -> None:
        """`update`, then `report`."""
        self.update(value)
        self.report()

    def report(self) -> None:
        """Reports this parameter, and with it every other one of the node that was updated since its last report.

        Before the node has started nothing is sent: the value goes out at the start.

        Raises:
            OtaError: not sent; it is tried again by itself.
        """
        self._changed = True
        params = None if self.device is None else self.device.params_of_node
        if params is not None:
            params.report()

    def put(self, value: Value) -> None:
        """Holds a value that was checked already, or needs no check."""
        self._value = value
        self._changed = True  # after the value: see `Params.take_changed`

    def restore(self, value: Value) -> None:
        """Holds a checked value of an earlier boot, which the initial report will say."""
        self._value = value

    def to_json(self) -> dict[str, object]:
        """Its part of the node configuration (section 3.2)."""
        message: dict[str, object] = {"name": self.name}
        if self.type is not None:
            message["type"] = self.type
        message["data_type"] = self.data_type
        message["properties"] = list(self.properties)
        if self.bounds is not None:
            bounds = {"min": self.bounds.min, "max": self.bounds.max}
            message["bounds"] = bounds if self.bounds.step is None else bounds | {"step": self.bounds.step}
        if self.valid_strs is not None:
            message["valid_strs"] = list(self.valid_strs)
        if self.ui_type is not None:
            message["ui_type"] = self.ui_type
        return message

    def _check_bounds(self, bounds: Bounds) -> None:
        if self.data_type not in ("int", "float"):
            self._refuse("bounds are for numbers")
        for number in (bounds.min, bounds.max, *(() if bounds.step is None else (bounds.step,))):
            fits = isinstance(number, int) or (self.data_type == "float" and math.isfinite(number))
            if isinstance(number, bool) or not fits:
                self._refuse(f"bound {_shown(number)}, expected {self.data_type}")
        if bounds.min > bounds.max:
            self._refuse(f"bounds from {bounds.min} to {bounds.max}: nothing lies between")
        if bounds.step is not None and bounds.step <= 0:
            self._refuse(f"step {bounds.step}, expected more than 0")

    def _checked_text(self, value: str | dict[str, JsonValue] | list[JsonValue]) -> Value:
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError: half of a surrogate pair
            self._refuse(f"not a value of JSON: {error.__class__.__name__}")
        if size > MAX_TEXT:
            self._refuse(f"{size} bytes, expected at most {MAX_TEXT}")
        if isinstance(value, str):
            return value
        kept = json.loads(text)  # a copy: the caller's may change
        assert isinstance(kept, (dict, list))
        return kept

    def _refuse(self, reason: str) -> NoReturn:
        raise ArgumentError(f"parameter {self.full_name}: {reason}")

    def __repr__(self) -> str:
        return f"<Param {self.full_name}>"


class Device:
    """Something a node has and people use.

    Args:
        name: unique within its node, services included.
        type: such as ``"esp.device.lightbulb"``.
        params: in the order of the node configuration.
        write_cb: called with device, parameter and checked value for each parameter that is written from outside, on a
            thread of the node. It does what is asked and says so with `Param.update_and_report`; what it raises is
            logged. None: nothing can be written.
        subtype, model: free text; None: not said.
        attributes: facts that never change.
        primary: name of the parameter that stands for the device.

    Raises:
        ArgumentError: a name twice, or a primary parameter that is not there.
    """

    is_service = False

    def __init__(
        self,
        name: str,
        type: str | None = None,
        params: Iterable[Param] = (),
        *,
        write_cb: WriteCallback | None = None,
        subtype: str | None = None,
        model: str | None = None,
        attributes: Mapping[str, str] | None = None,
        primary: str | None = None,
    ) -> None:
        self.name = _name(name, "device")
        self.type = _text(type, f"type of {name}")
        self.subtype = _text(subtype, f"subtype of {name}")
        self.model = _text(model, f"model of {name}")
        self.attributes = dict(attributes or {})
        self.primary = primary
        self.write_cb = write_cb
        self.params_of_node: Params | None = None
        self.params = tuple(params)
        self._by_name = {param.name: param for param in self.params}
        if len(self._by_name) != len(self.params):
            raise ArgumentError(f"device {name}: two parameters of one name")
        if primary is not None and primary not in self._by_name:
            raise ArgumentError(f'device {name}: no parameter "{primary}" to be the primary one')
        for param in self.params:
            if param.device is not None:
                raise ArgumentError(f"device {name}: parameter {param.name} belongs to {param.device.name}")
        for param in self.params:
            param.device = self

    def __getitem__(self, name: str) -> Param:
        """The parameter of that name. Raises KeyError."""
        return self._by_name[name]

    def __iter__(self) -> Iterator[Param]:
        return iter(self.params)

    def get(self, name: str) -> Param | None:
        """The parameter of that name, or None."""
        return self._by_name.get(name)

    def to_json(self) -> dict[str, object]:
        """Its part of the node configuration (section 3.2)."""
        message: dict[str, object] = {"name": self.name}
        for key in ("type", "subtype", "model"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.attributes:
            message["attributes"] = attributes_json(self.attributes)
        if self.primary is not None:
            message["primary"] = self.primary
        message["params"] = [param.to_json() for param in self.params]
        return message

    def __repr__(self) -> str:
        return f"<{self.__class__.__name__} {self.name}>"


class Service(Device):
    """Something a node does, such as the OTA service. Otherwise as `Device`."""

    is_service = True


class Groups(Service):
    """The service that makes a node report to a group: add it, and whoever manages the node sets the group's id.

    The id is kept over restarts. With one, reports go to ``params/local/<id>``, and writes are taken from
    ``params/remote/<id>`` too.
    """

    def __init__(self) -> None:
        super().__init__(GROUPS_SERVICE, "esp.service.groups", [Param("GroupID", "esp.param.group-id", "")])

    @property
    def group_id(self) -> str:
        """Empty: none."""
        return str(self["GroupID"].value)


class Connectivity(Service):
    """The service that tells users whether a node is connected: true a while after each connect, false by the broker,
    which is given that message when the node connects (section 8.5)."""

    def __init__(self) -> None:
        super().__init__(
            CONNECTIVITY_SERVICE,
            "esp.service.connectivity",
            [Param("Connected", "esp.param.connected", False, properties=("read",))],
        )


def ota_service() -> Service:
    """The service of the params workflow (section 3.1)."""
    return Service(
        OTA_SERVICE,
        "esp.service.ota",
        [
            Param("Status", "esp.param.ota_status", "", properties=("read",)),
            Param("Info", "esp.param.ota_info", "", properties=("read",)),
            Param("URL", "esp.param.ota_url", "", properties=("write",)),
        ],
    )


@dataclass(frozen=True, slots=True)
class Write:
    """What one message writes to one device, in the order of the device's parameters."""

    device: Device
    values: Sequence[tuple[Param, Value]]


class Params:
    """All devices and services of one node.

    Attributes:
        reporter: sends what was updated; set by the node. Raises OtaError.
    """

    def __init__(self) -> None:
        self.reporter: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._all: tuple[Device, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """In the order they were added; services are apart."""
        return tuple(one for one in self._all if not one.is_service)

    @property
    def services(self) -> tuple[Device, ...]:
        return tuple(one for one in self._all if one.is_service)

    @property
    def groups(self) -> Groups | None:
        """The service `Groups`, if it was added."""
        return next((one for one in self._all if isinstance(one, Groups)), None)

    @property
    def connectivity(self) -> Connectivity | None:
        """The service `Connectivity`, if it was added."""
        return next((one for one in self._all if isinstance(one, Connectivity)), None)

    def add(self, device: Device) -> None:
        """Adds a device or a service.

        Raises:
            ArgumentError: there is one of that name, or it belongs to a node already.
        """
        with self._lock:
            if device.params_of_node is not None:
                raise ArgumentError(f"{device.name} belongs to a node already")
            if any(one.name == device.name for one in self._all):
                raise ArgumentError(f'there is a device or service "{device.name}" already')
            device.params_of_node = self
            self._all = (*self._all, device)

    def report(self) -> None:
        """Reports every parameter that was updated since its last report. Raises OtaError."""
        self.reporter()

    def values(self) -> dict[str, dict[str, Value]]:
        """What all of them hold, for the initial report; says nothing of what was reported (section 3.4)."""
        return {one.name: {param.name: param.value for param in one.params} for one in self._all if one.params}

    def take_changed(self) -> tuple[dict[str, dict[str, Value]], list[Param]]:
        """What was updated since it was taken last, and the parameters concerned; see `put_back`."""
        values: dict[str, dict[str, Value]] = {}
        taken = []
        for device in self._all:
            for param in device.params:
                if param._changed:
                    param._changed = False  # before its value is read: one that comes now is taken again, not lost
                    values.setdefault(device.name, {})[param.name] = param.value
                    taken.append(param)
        return values, taken

    @staticmethod
    def put_back(taken: Iterable[Param]) -> None:
        """They were not sent after all."""
        for param in taken:
            param._changed = True

    def parse_writes(self, payload: bytes) -> tuple[list[Write], list[str]]:
        """Reads a ``params/remote`` message: what it may write, and a sentence for all it may not.

        Of equal names the first one counts, as in the firmware. Devices come in the order of the node.

        Raises:
            ValueError: no JSON object, too long, or nested too deeply.
        """
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"{len(payload)} bytes")
        try:
            members = {name: value for name, (value, _) in parse_object(payload.decode("utf-8")).items()}
        except RecursionError:
            raise ValueError("nested too deeply") from None
        writes: list[Write] = []
        refused = [f"no device {_shown(name)}" for name in members if all(name != one.name for one in self._all)]
        for device in self._all:
            if device.name not in members:
                continue
            wanted = members[device.name]
            if not isinstance(wanted, dict):
                refused.append(f"{device.name}: {_shown(wanted)}, expected an object")
                continue
            refused += [f"{device.name}: no parameter {_shown(name)}" for name in wanted if device.get(name) is None]
            values = []
            for param in device.params:
                if param.name not in wanted:
                    continue
                try:
                    if "write" not in param.properties:
                        raise ArgumentError(f"parameter {param.full_name}: not to be written")
                    values.append((param, param.check(wanted[param.name])))
                except ArgumentError as error:
                    refused.append(str(error))
            if values:
                writes.append(Write(device, values))
        return writes, refused


def _name(name: str, what: str) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or has_surrogate(name):
        raise ArgumentError(f"{_shown(name)} is no name of a {what}: expected a text of 1 to {MAX_NAME} characters")
    return name


def _text(text: str | None, what: str) -> str | None:
    """A text of the node configuration; None: there is none."""
    if text is not None and (not isinstance(text, str) or has_surrogate(text)):
        raise ArgumentError(f"{_shown(text)} is no {what}: expected a text")
    return text


def _data_type_of(name: str, value: object) -> str:
    for data_type, wanted in _DATA_TYPES.items():
        if isinstance(value, wanted):  # `bool` comes before `int`
            return data_type
    raise ArgumentError(f"parameter {name}: {_shown(value)}, expected one of {', '.join(_DATA_TYPES)}")


def _properties(name: str, properties: Iterable[str]) -> tuple[str, ...]:
    given = set(properties)
    if unknown := given - set(_PROPERTIES):
        raise ArgumentError(f"parameter {name}: property {_shown(min(unknown))}, expected {', '.join(_PROPERTIES)}")
    if not given & {"read", "write"}:
        raise ArgumentError(f"parameter {name}: neither read nor write")
    if {"time_series", "simple_ts"} <= given:
        raise ArgumentError(f"parameter {name}: time_series and simple_ts exclude each other")
    return tuple(each for each in _PROPERTIES if each in given)


def _is_int64(value: int) -> bool:
    """Not ``in range(...)``, which counts from its start for a subclass of int, such as an enum."""
    return -(2**63) <= value < 2**63


def _shown(value: object) -> str:
    """A value somebody else chose, for a message."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and not isinstance(value, bool) and not _is_int64(value):
        return "a large number"  # `str` refuses 4300 digits
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
