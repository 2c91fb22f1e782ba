"""The C ABI: ``esp_rmaker_ota.h`` and ``libesp_rmaker_ota.so``, for programs that are not written in Python.

esp_rmaker_ota.h, rmaker_ota_host.h   the interface, as plain declarations that cffi can read
bodies.py                             what each function does
host.c                                what has to be C: starting Python, errors of a thread, waiting, restarting
build_embed.py                        makes the library, and the headers a C program includes
include/, lib/                        what it made; nothing is there where it could not
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE_DIR = HERE / "include"
LIBRARY_DIR = HERE / "lib"
PKG_CONFIG_DIR = LIBRARY_DIR / "pkgconfig"
SONAME = "libesp_rmaker_ota.so.0"
LIBRARY = LIBRARY_DIR / SONAME
