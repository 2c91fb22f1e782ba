"""The image files of the job service, each named by its SHA-256. They are written once and never changed.

An image is streamed in: digests and app descriptor are found while it passes, whatever its size. It appears under its
name only after it is on the medium as a whole; what an interrupted import left behind is removed at the next start.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rmaker_ota.cloud.store import Image, Store
from rmaker_ota.errors import ArgumentError, DataError, ImageError, NotFoundError, UnsupportedError
from rmaker_ota.targets.base import AppDescription

CHUNK = 1 << 20  # bytes read and hashed at a time
HEAD_SIZE = 288  # image header 24, segment header 8, app descriptor 256
UNFINISHED = ".import-"
STREAM_ID_LENGTH = 32  # 42 characters are what the reference has room for


def stream_id(sha256: str) -> str:
    """The id of the stream that is the image with this SHA-256 (64 hex digits)."""
    return sha256[:STREAM_ID_LENGTH]


def describe_head(head: bytes) -> AppDescription | None:
    """The app descriptor in the first 288 bytes of an image, or None when it is not an ESP app image."""
    from rmaker_ota.inspect import app_description  # brings the C engine, which nothing else here needs

    try:
        return app_description(head)
    except (ImageError, DataError, UnsupportedError):
        return None


def check_image(path: Path) -> AppDescription:
    """Looks whether a file, packed or not, is an app image a node would install: structure, checksum, appended hash.

    The engine does with it what a node does, into a scratch file.

    Raises:
        OtaError: it is none; the message says why.
    """
    from rmaker_ota.install import ImageHeader, Installer, InstallOptions
    from rmaker_ota.targets.file import FileTarget

    class AppSlot(FileTarget):
        def verify_image_rules(self) -> dict[str, int]:
            return {"bytes_after_allowed": True}

    found: list[AppDescription] = []

    def gate(header: ImageHeader) -> None:
        assert header.description is not None
        found.append(header.description)

    with tempfile.TemporaryDirectory(prefix="rmaker-ota-") as scratch:
        options = InstallOptions(compute_sha256=False, require_description=True)
        Installer(path, AppSlot(Path(scratch) / "slot"), options=options, header_gate=gate).run()
    return found[0]


class ImageStore:
    """The directory of image files; created when missing.

    Args:
        directory: where the files lie.
        store: where their records are kept.
        clock: Unix seconds.
    """

    def __init__(self, directory: Path, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._store = store
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(UNFINISHED + "*"):
            left.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the image with this SHA-256 (64 hex digits) lies, whether it exists or not."""
        return self._directory / f"{sha256}.bin"

    def begin(self, name: str) -> ImageWriter:
        """Starts an import; ``name`` is what people call the image."""
        return ImageWriter(self, name)

    def import_file(self, path: Path) -> Image:
        """Takes a copy of a file.

        Raises:
            OSError: it cannot be read, or the copy not written.
            ArgumentError: the file is empty.
        """
        with path.open("rb") as source, self.begin(path.name) as writer:
            while chunk := source.read(CHUNK):
                writer.write(chunk)
            return writer.commit()

    def require(self, sha256: str) -> Image:
        """The record of an image.

        Raises:
            NotFoundError: there is no such image.
        """
        image = self._store.image(sha256)
        if image is None:
            raise NotFoundError(f"no image with SHA-256 {sha256!r} here")
        return image


class ImageWriter:
    """One import: `write` until everything was given, then `commit`. Leaving the block without it drops everything."""

    def __init__(self, images: ImageStore, name: str) -> None:
        self._images = images
        self._name = name
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False)  # what otaurl announces; nobody's security rests on it
        self._head = b""
        self._size = 0
        descriptor, path = tempfile.mkstemp(prefix=UNFINISHED, dir=images._directory)
        self._path: Path | None = Path(path)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, chunk: bytes) -> None:
        """Takes the next bytes of the image. Raises OSError when they cannot be written."""
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]
        self._sha256.update(chunk)
        self._md5.update(chunk)
        self._size += len(chunk)
        if len(self._head) < HEAD_SIZE:
            self._head += bytes(chunk[: HEAD_SIZE - len(self._head)])

    def commit(self) -> Image:
        """Puts the image in its place, durably, and returns its record (the first one of equal images).

        Raises:
            ArgumentError: it is empty.
            OSError: it could not be put on the medium.
        """
        if self._size == 0:
            raise ArgumentError(f"{self._name}: the image is empty")
        assert self._path is not None, "already committed"
        sha256 = self._sha256.hexdigest()
        os.fsync(self._file.fileno())
        self._path.replace(self._images.path(sha256))
        self._path = None
        _sync_directory(self._images._directory)
        description = describe_head(self._head)
        return self._images._store.add_image(
            Image(
                sha256=sha256,
                md5=self._md5.hexdigest(),
                size=self._size,
                name=self._name,
                imported_at=self._images._clock(),
                project=description.project_name if description else None,
                version=description.version if description else None,
                secure_version=description.secure_version if description else None,
                chip_id=description.chip_id if description else None,
            )
        )

    def close(self) -> None:
        """Ends the import; drops what was not committed. Calling it again is harmless."""
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
