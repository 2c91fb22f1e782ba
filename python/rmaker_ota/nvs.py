"""What an NVS partition is made of, as plain records, and a listing that shows no secrets.

The C engine (``src/csrc/esp/esp_nvs.c``) reads and writes; `rmaker_ota.ota_core.Nvs` and the ``nvs_*`` functions return
and take these. Names and strings that are not UTF-8 carry their bytes as surrogates (``errors="surrogateescape"``).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

NvsType = Literal["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "float", "double", "str", "blob"]
"""Types that can be written. An item of a type nobody knows has ``"0x77"`` here and its raw bytes as value."""

NvsValue = int | float | str | bytes

SECRET_KEYS = frozenset({"client_key", "random", "password", "passphrase", "psk", "secret"})
"""Keys whose values are never shown: those of ``rmaker_creds`` (private key, random bytes of the proof of possession)
and the usual names of others."""

_SECRET_PARTS = ("pswd", "passwd", "password", "pmk", "_key", "secret")


class NvsItem(NamedTuple):
    """One live value. ``namespace`` is None when no entry names its index."""

    namespace: str | None
    key: str
    type: str
    value: NvsValue


class NvsOp(NamedTuple):
    """One flash operation: ``data`` is what lies at ``offset`` (bytes in the partition) afterwards.

    ``erase`` is one sector of 4096 bytes; ``program`` only clears bits. Each has to be on the medium before the next.
    """

    op: Literal["program", "erase"]
    offset: int
    data: bytes


class NvsPage(NamedTuple):
    """A page as it was found.

    ``seq`` and ``version`` are 0 where there is no readable header; ``written`` counts its entries in that state.
    """

    state: Literal["empty", "active", "full", "freeing", "corrupt"]
    seq: int
    version: int
    written: int


def is_secret(key: str) -> bool:
    """Whether the value of a key must not be shown."""
    lowered = key.lower()
    return lowered in SECRET_KEYS or any(part in lowered for part in _SECRET_PARTS)


def shown_value(item: NvsItem) -> Any:
    """A value as a listing shows it: numbers as they are, text escaped, bytes in hexadecimal, secrets not at all.

    Returns:
        int | float | str: ready for JSON. Blobs above 64 bytes are shown by their first 32 and their length.
    """
    value = item.value
    if is_secret(item.key) or _has_private_key(value):
        size = len(value) if isinstance(value, str | bytes) else 1
        return f"({size} {'byte' if size == 1 else 'bytes'}, not shown)"
    if isinstance(value, str):
        plain, question, query = value.partition("?")
        if question and "://" in plain:  # a URL's query is where signatures are
            return _printable(f"{plain}?({len(query.encode('utf-8', 'surrogateescape'))} bytes, not shown)")
        return _printable(value)
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 64 else f"{value[:32].hex()}... ({len(value)} bytes)"
    return value


def describe(items: list[NvsItem]) -> list[dict[str, Any]]:
    """Items as dicts for JSON output: ``namespace``, ``key``, ``type``, ``value``; secrets masked."""
    return [
        {
            "namespace": None if item.namespace is None else _printable(item.namespace),
            "key": _printable(item.key),
            "type": item.type,
            "value": shown_value(item),
        }
        for item in items
    ]


def _has_private_key(value: NvsValue) -> bool:
    """Whether a value holds a private key in PEM, whatever its name is."""
    return (isinstance(value, bytes) and b"PRIVATE KEY" in value) or (isinstance(value, str) and "PRIVATE KEY" in value)


def _printable(text: str) -> str:
    """Text without surrogates and control characters: those that cannot be printed are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )
