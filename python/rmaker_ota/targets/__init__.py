"""Where images go. `open_target` makes a target from its URI; `base.Target` says what all of them offer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rmaker_ota.errors import ArgumentError

if TYPE_CHECKING:
    from rmaker_ota.targets.base import Target

# scheme -> module and class; imported when the first target of the kind is opened
_KINDS: dict[str, tuple[str, str]] = {
    "file": ("rmaker_ota.targets.file", "FileTarget"),
    "esp32-image": ("rmaker_ota.targets.esp32_image", "Esp32ImageTarget"),
    "esp32-serial": ("rmaker_ota.targets.esp32_serial", "Esp32SerialTarget"),
}


def open_target(uri: str, **options: Any) -> Target:
    """The target a URI names.

    Args:
        uri: ``file:PATH`` (raw file or block device), ``esp32-image:PATH`` (flash image of a virtual ESP32) or
            ``esp32-serial:PORT`` (ESP32 behind a serial port).
        options: keyword arguments of the target's class. Those that are None are left out.

    Raises:
        ArgumentError: the kind of target, or an option, is not known.
        OtaError: the target cannot be opened.
    """
    scheme, _, rest = uri.partition(":")
    if scheme not in _KINDS or not rest:
        known = ", ".join(f"{name}:PATH" for name in _KINDS)
        raise ArgumentError(f"target {uri!r} is none of {known}", stage="target")
    if "\0" in rest:
        raise ArgumentError(f"target {uri!r} contains a NUL character", stage="target")
    module, name = _KINDS[scheme]
    kind: Callable[..., Target] = getattr(importlib.import_module(module), name)
    given = {key: value for key, value in options.items() if value is not None}
    known_options = [key for key in inspect.signature(kind).parameters if key != "path"]
    for key in given:
        if key not in known_options:
            raise ArgumentError(
                f"a {scheme}: target has no option {key!r}, only {', '.join(known_options)}", stage="target"
            )
    return kind(rest, **given)


__all__ = ["open_target"]
