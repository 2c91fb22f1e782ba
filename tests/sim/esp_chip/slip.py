"""SLIP, in bulk: no loop over bytes."""

from __future__ import annotations

import re

END = b"\xc0"
_ODD_ESCAPE = re.compile(rb"\xdb(?![\xdc\xdd])", re.DOTALL)


def encode(payload: bytes) -> bytes:
    """A frame with both delimiters."""
    return END + payload.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc") + END


def decode(body: bytes) -> bytes | None:
    """What stood between two delimiters. None: a bad escape."""
    if b"\xdb" not in body:
        return body
    if _ODD_ESCAPE.search(body):
        return None
    return body.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb")
