"""Local time of a node: download windows are minutes since local midnight."""

from __future__ import annotations

import io
import re
import struct
import time
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


def load_timezone(name: str) -> tzinfo:
    """A time zone by its IANA name (``Europe/Berlin``) or by a POSIX TZ string (``CET-1CEST,M3.5.0,M10.5.0/3``).

    Raises:
        ValueError: neither.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    # A name must have three letters or stand in <>, an offset must follow: the parser below takes more than that.
    if not re.match(r"([A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)[+-]?\d", name) or not name.isascii() or "\n" in name:
        raise ValueError(f"not a time zone: {name!r}")
    # A time zone file (RFC 8536, version 2) without transitions: its footer, the POSIX string, is always in force.
    counts = (0, 0, 0, 0, 1, 1)  # UT indicators, standard indicators, leap seconds, transitions, types, name bytes
    block = struct.pack(">4s1s15x6I", b"TZif", b"2", *counts) + struct.pack(">iBB", 0, 0, 0) + b"\0"
    zone = ZoneInfo.from_file(io.BytesIO(block + block + f"\n{name}\n".encode("ascii")), key=name)
    zone.utcoffset(datetime(2026, 1, 1))
    return zone


def local_minute(unix: float, zone: tzinfo | None) -> int:
    """Minutes since local midnight, 0 to 1439, at a moment given in Unix seconds. ``zone`` None: the system's."""
    if zone is None:
        local = time.localtime(unix)
        return local.tm_hour * 60 + local.tm_min
    moment = datetime.fromtimestamp(unix, UTC).astimezone(zone)
    return moment.hour * 60 + moment.minute
