"""URLs that open one thing for a limited time: ``<base>/images/<sha256>?expires=<Unix seconds>&sig=<hex>``.

The signature is an HMAC-SHA256 over path and time with a secret only this service knows: nobody else can make, change
or prolong a URL. Whoever holds one may use it until it expires, as with pre-signed URLs of object stores. The query is
a secret: it never goes to a log.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from rmaker_ota.errors import StateError

SECRET_SIZE = 32
MAX_EXPIRES_DIGITS = 12


class LinkCheck(enum.Enum):
    """What is to be said of a URL."""

    GOOD = "good"
    EXPIRED = "expired"
    FORGED = "forged"


class Links:
    """Makes and checks URLs.

    Args:
        secret: the key of the signatures, `load_secret`.
        ttl_s: how long a URL is good, seconds.
        clock: Unix seconds.
    """

    def __init__(self, secret: bytes, *, ttl_s: int, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._ttl_s = ttl_s
        self._clock = clock
        self.base = ""

    def image_url(self, sha256: str) -> str:
        """A URL for an image, good from now on for the time to live."""
        path = f"/images/{sha256}"
        expires = str(int(self._clock()) + self._ttl_s)
        return f"{self.base}{path}?expires={expires}&sig={self._sign(path, expires)}"

    def check(self, path: str, expires: str, signature: str) -> LinkCheck:
        """Judges what came with a request. The comparison takes the same time wherever the signature is wrong."""
        expected = self._sign(path, expires)
        genuine = hmac.compare_digest(expected.encode(), signature.encode("utf-8", "surrogatepass"))
        if not genuine or not expires.isascii() or not expires.isdecimal() or len(expires) > MAX_EXPIRES_DIGITS:
            return LinkCheck.FORGED
        return LinkCheck.GOOD if self._clock() < int(expires) else LinkCheck.EXPIRED

    def _sign(self, path: str, expires: str) -> str:
        message = f"{path}\n{expires}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def load_secret(path: Path, *, size: int = SECRET_SIZE) -> bytes:
    """The secret kept in a file; made (mode 0600) when there is no such file.

    Raises:
        StateError: the file is shorter than a secret.
        OSError: it can neither be read nor made.
    """
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        write_private(path, secrets.token_bytes(size))
        secret = path.read_bytes()
    if len(secret) < size:
        raise StateError(f"{path}: damaged, {len(secret)} bytes instead of {size}: remove it to get a new one")
    return secret


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file only its owner can read, never visible with another mode; FileExistsError when it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
