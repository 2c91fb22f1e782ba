"""The library as a C program sees it: ctypes declarations from the specification (section 1), not from our headers.

    lib = load()
    lib.esp_rmaker_ota_enable(ctypes.byref(Config(...)), 2)

Loaded into this process, it works on the node that a test made in Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char, c_char_p, c_int, c_int32, c_size_t, c_void_p
from typing import Any

from rmaker_ota import embed
from rmaker_ota.embed import build_embed

WHY_NOT = build_embed.why_not()  # None: the library must be there


class Data(Structure):
    _fields_ = [
        ("url", c_char_p),
        ("stream_id", c_char_p),
        ("filesize", c_int),
        ("fw_version", c_char_p),
        ("file_md5", c_char_p),
        ("ota_job_id", c_char_p),
        ("server_cert", c_char_p),
        ("priv", c_void_p),
        ("metadata", c_char_p),
    ]


class DiagPriv(Structure):
    _fields_ = [("state", c_int), ("rmaker_ota", c_bool)]


JobCallback = CFUNCTYPE(c_int, c_void_p, POINTER(Data))
DiagCallback = CFUNCTYPE(c_int, POINTER(DiagPriv), c_void_p)
EventHandler = CFUNCTYPE(None, c_void_p, c_void_p, c_int32, c_void_p, c_size_t)
LogCallback = CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_char_p)


class Config(Structure):
    _fields_ = [("ota_cb", JobCallback), ("ota_diag", DiagCallback), ("server_cert", c_char_p), ("priv", c_void_p)]


class Info(Structure):
    _fields_ = [
        ("node_id", c_char * 129),
        ("project", c_char * 64),
        ("version", c_char * 64),
        ("slot", c_char * 32),
        ("connected", c_bool),
    ]


_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "esp_err_to_name": (c_char_p, c_int),
    "esp_rmaker_ota_enable": (c_int, POINTER(Config), c_int),
    "esp_rmaker_ota_enable_default": (c_int,),
    "esp_rmaker_ota_report_status": (c_int, c_void_p, c_int, c_char_p),
    "esp_rmaker_ota_default_cb": (c_int, c_void_p, POINTER(Data)),
    "esp_rmaker_ota_https_cb": (c_int, c_void_p, POINTER(Data)),
    "esp_rmaker_ota_mqtt_cb": (c_int, c_void_p, POINTER(Data)),
    "esp_rmaker_ota_fetch": (c_int,),
    "esp_rmaker_ota_fetch_with_delay": (c_int, c_int),
    "esp_rmaker_ota_mark_valid": (c_int,),
    "esp_rmaker_ota_mark_invalid": (c_int,),
    "rmaker_ota_version": (c_char_p,),
    "rmaker_ota_last_error": (c_char_p,),
    "rmaker_ota_open": (c_int, c_char_p),
    "rmaker_ota_start": (c_int,),
    "rmaker_ota_wait": (c_int, c_int, POINTER(c_int)),
    "rmaker_ota_wake": (None,),
    "rmaker_ota_stop": (c_int,),
    "rmaker_ota_restart": (c_int,),
    "rmaker_ota_info": (c_int, POINTER(Info)),
    "rmaker_ota_event_handler_register": (c_int, c_char_p, c_int32, EventHandler, c_void_p),
    "rmaker_ota_event_handler_unregister": (c_int, c_char_p, c_int32, EventHandler),
    "rmaker_ota_set_log": (c_int, c_int, LogCallback, c_void_p),
}


@functools.cache
def load() -> Any:
    """The library, with the prototypes of its functions."""
    lib = ctypes.CDLL(str(embed.LIBRARY))
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def last_error() -> str:
    text: bytes = load().rmaker_ota_last_error()
    return text.decode()


@contextmanager
def handling(
    handler: Callable[[bytes, int, bytes | None], None], base: bytes | None = None, event_id: int = -1
) -> Iterator[None]:
    """Has a function called with base, id and data of events."""

    @EventHandler
    def call(arg: int | None, event_base: int, number: int, data: int | None, size: int) -> None:
        handler(ctypes.string_at(event_base), number, None if data is None else ctypes.string_at(data, size))

    lib = load()
    assert lib.rmaker_ota_event_handler_register(base, event_id, call, None) == 0
    try:
        yield
    finally:
        assert lib.rmaker_ota_event_handler_unregister(base, event_id, call) == 0
