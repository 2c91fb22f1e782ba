"""Targets: where an image can go. `open_target` finds the kind by the scheme of its URI and imports only that one."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from rmaker_ota.errors import ArgumentError

if TYPE_CHECKING:
    from rmaker_ota.targets.base import Target

# Scheme: module and class, which takes the path and the options of that kind.
SCHEMES = {
    "file": ("rmaker_ota.targets.file", "FileTarget"),
    "esp32-image": ("rmaker_ota.targets.esp32_image", "Esp32ImageTarget"),
}


def open_target(uri: str, **options: Any) -> Target:
    """Opens a target.

    Args:
        uri: ``file:PATH`` (a raw file or block device as one slot) or ``esp32-image:PATH`` (a flash image).
        options: keyword arguments of that kind's class.

    Raises:
        ArgumentError: no such kind of target, or it has no such option.
        OtaError: it cannot be opened.
    """
    scheme, colon, path = uri.partition(":")
    if not colon or scheme not in SCHEMES:
        raise ArgumentError(f"{uri!r} is no target: {' or '.join(f'{name}:PATH' for name in SCHEMES)} expected")
    if not path:
        raise ArgumentError(f"{uri!r} lacks the path behind {scheme}:")
    module, name = SCHEMES[scheme]
    kind = getattr(importlib.import_module(module), name)
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise ArgumentError(f"a target {scheme}: has no option {option}")
    target: Target = kind(path, **options)
    return target
