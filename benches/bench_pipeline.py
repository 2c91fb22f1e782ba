"""The streaming pipeline against the plain way in Python: read, hash, write, one fdatasync at the end.

Seconds are of whole installations into a file, made anew each time; every result is compared with the image. Counts
are those of the engine (``reads``, ``writes``, ``syncs``: operations on the medium; ``copies``: bytes) and of the
loops; ``crossings`` counts how often image bytes or callbacks made a run cross between Python and what works without
the interpreter lock.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import lzma
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from benches.data import compressible, incompressible, write_incompressible
from benches.measure import Measure

from rmaker_ota import ota_core
from rmaker_ota.install import Installer, InstallOptions, InstallResult
from rmaker_ota.targets.file import FileTarget

MIB = 1 << 20
PIECE = 1 << 16  # what the plain ways read at a time: what `shutil` and urllib3 take
ROUNDS = 7


@dataclass
class Done:
    """What one way of installing left behind."""

    out: Path
    sha256: bytes | None
    md5: bytes | None
    counts: Mapping[str, object]


def counts_of(done: Done) -> Mapping[str, object]:
    return done.counts


class Folder:
    """A new file to write for each run; the last one is removed first, so that no run overwrites blocks of another."""

    def __init__(self, root: Path) -> None:
        self._names = (root / f"out-{number}.bin" for number in itertools.count())
        self._last: Path | None = None

    def fresh(self) -> tuple[Path]:
        if self._last is not None:
            self._last.unlink(missing_ok=True)
        self._last = next(self._names)
        return (self._last,)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def size(quick: bool) -> int:
    return 2 * MIB + 4096 + 17 if quick else 64 * MIB


class Crossings:
    """Callbacks of one run."""

    def __init__(self) -> None:
        self.count = 1  # the run itself

    def __call__(self, *_: object) -> None:
        self.count += 1


def ours(source: str | bytes, options: InstallOptions) -> Callable[[Path], Done]:
    def run(out: Path) -> Done:
        crossings = Crossings()
        installer = Installer(
            source, FileTarget(out), options=options, header_gate=crossings, on_phase=crossings, on_progress=crossings
        )
        result: InstallResult = installer.run()
        names = ("reads", "writes", "syncs", "copies", "chunks", "direct")
        counts = {name: result.counts[name] for name in names} | {"crossings": crossings.count}
        return Done(out, result.sha256, result.md5, counts)

    return run


def plain(open_source: Callable[[], object], digests: tuple[str, ...] = ("sha256",)) -> Callable[[Path], Done]:
    """The loop anybody would write: read a piece, hash it, write it; `fdatasync` at the end."""

    def run(out: Path) -> Done:
        reads = writes = 0
        running = {name: hashlib.new(name) for name in digests}
        with open_source() as file, out.open("wb", buffering=0) as sink:  # type: ignore[attr-defined]
            while piece := file.read(PIECE):
                reads += 1
                for digest in running.values():
                    digest.update(piece)
                sink.write(piece)
                writes += 1
            os.fdatasync(sink.fileno())
        values = {name: digest.digest() for name, digest in running.items()}
        crossings = reads * (2 + len(digests)) + 1  # each call gives the lock away and takes it back
        counts = {"reads": reads, "writes": writes, "syncs": 1, "crossings": crossings}
        return Done(out, values.get("sha256"), values.get("md5"), counts)

    return run


def is_image(
    image_sha256: str, *, file: bytes | None = None, sha256: bool = True, md5: bool = False
) -> Callable[[Done], None]:
    """The file holds the image, and the digests are those of the file as served (``file``; None: the image)."""
    expected = image_sha256 if file is None else hashlib.sha256(file).hexdigest()

    def check(done: Done) -> None:
        with done.out.open("rb") as written:
            assert hashlib.file_digest(written, "sha256").hexdigest() == image_sha256
        assert (done.sha256.hex() if done.sha256 else None) == (expected if sha256 else None)
        if md5:
            assert done.md5 is not None

    return check


# ---- A file into a file, hashed and synced ---------------------------------------------------------------------------

FILE_TO_FILE = pytest.mark.benchmark(group="file into file, SHA-256, synced")


@pytest.fixture
def image_file(tmp_path: Path, size: int) -> tuple[Path, str]:
    path = tmp_path / "image.bin"
    return path, write_incompressible(path, size)


@FILE_TO_FILE
@pytest.mark.parametrize("threads", [True, False], ids=["threads", "one_thread"])
def test_file_into_file(
    measure: Measure, folder: Folder, image_file: tuple[Path, str], size: int, threads: bool
) -> None:
    path, sha256 = image_file
    measure(
        "ours, threads" if threads else "ours, one thread",
        ours(str(path), InstallOptions(sha256=sha256, threads=threads)),
        check=is_image(sha256),
        setup=folder.fresh,
        rounds=ROUNDS,
        work=size / MIB,
        unit="MiB",
        counts=counts_of,
    )


@FILE_TO_FILE
def test_file_into_file_in_plain_python(
    measure: Measure, folder: Folder, image_file: tuple[Path, str], size: int
) -> None:
    path, sha256 = image_file
    measure(
        "plain Python",
        plain(lambda: path.open("rb", buffering=0)),
        check=is_image(sha256),
        setup=folder.fresh,
        rounds=ROUNDS,
        work=size / MIB,
        unit="MiB",
        counts=counts_of,
    )


# ---- Which digests ---------------------------------------------------------------------------------------------------

DIGESTS = {"none": (), "SHA-256": ("sha256",), "SHA-256 and MD5": ("sha256", "md5")}


@pytest.mark.parametrize("plainly", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("digests", DIGESTS)
def test_digests(measure: Measure, benchmark: object, folder: Folder, size: int, digests: str, plainly: bool) -> None:
    benchmark.group = f"memory into file, digests: {digests}"  # type: ignore[attr-defined]
    image = incompressible(size)
    names = DIGESTS[digests]
    options = InstallOptions(
        compute_sha256="sha256" in names, md5=hashlib.md5(image).digest() if "md5" in names else None
    )
    measure(
        "plain Python" if plainly else "ours",
        plain(lambda: Memory(image), names) if plainly else ours(image, options),
        check=is_image(hashlib.sha256(image).hexdigest(), sha256="sha256" in names, md5="md5" in names),
        setup=folder.fresh,
        rounds=ROUNDS,
        work=size / MIB,
        unit="MiB",
        counts=counts_of,
    )


class Memory:
    """Reads bytes without copying them: no handicap for the plain way."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)

    def read(self, size: int) -> memoryview:
        piece, self._view = self._view[:size], self._view[size:]
        return piece

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# ---- Compressed files ------------------------------------------------------------------------------------------------


def packed(kind: str, image: bytes, folder: Path) -> bytes:
    match kind:
        case "gzip":
            return gzip.compress(image, 6, mtime=0)
        case "zlib":
            return zlib.compress(image, 6)
        case "xz":
            return lzma.compress(image, preset=1)
    program = shutil.which("zstd")
    if program is None:
        pytest.skip("the zstd program makes the file, and is not installed")
    (folder / "image").write_bytes(image)
    return subprocess.run([program, "-q", "-3", "-c", str(folder / "image")], check=True, capture_output=True).stdout


def plain_transform(kind: str, path: Path) -> Callable[[], object] | None:
    """Python's own streaming decoder; None: this Python has none."""
    match kind:
        case "gzip":
            return lambda: gzip.open(path, "rb")
        case "xz":
            return lambda: lzma.open(path, "rb")
        case "zstd":
            try:
                from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
            except ImportError:
                return None
            return lambda: zstd.open(path, "rb")
    return None


@pytest.mark.parametrize("plainly", [False, True], ids=["ours", "plain"])
@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_compressed_file_into_file(
    measure: Measure, benchmark: object, tmp_path: Path, folder: Folder, quick: bool, kind: str, plainly: bool
) -> None:
    benchmark.group = f"{kind} file into file, image hashed, synced"  # type: ignore[attr-defined]
    size = (2 if quick else 16) * MIB
    image = compressible(size)
    file = packed(kind, image, tmp_path)
    path = tmp_path / f"image.{kind}"
    path.write_bytes(file)
    opened = plain_transform(kind, path)
    if plainly and opened is None:
        pytest.skip(f"this Python has no streaming {kind} decoder of its own")
    sha256 = hashlib.sha256(image).hexdigest()
    if plainly:
        assert opened is not None
        way, check = plain(opened), is_image(sha256)  # of the image: the file itself it does not see
    else:
        way, check = ours(str(path), InstallOptions(transform=kind)), is_image(sha256, file=file)
    measure(
        "plain Python" if plainly else "ours",
        way,
        check=check,
        setup=folder.fresh,
        rounds=5,
        work=size / MIB,
        unit="MiB",
        counts=lambda done: {"file_is": f"{100 * len(file) // size} % of the image", **done.counts},
    )


def test_the_engine_names_what_it_unpacked(tmp_path: Path) -> None:
    """The bench above measures what it says it does: auto finds each kind by its magic number."""
    for kind in ("gzip", "zlib", "xz"):
        sink = ota_core.FileSink(tmp_path / kind)
        pipeline = ota_core.Pipeline(ota_core.MemorySource(packed(kind, b"x" * 70000, tmp_path)), sink)
        pipeline.run()
        assert (pipeline.counts()["transform"], pipeline.counts()["image_size"]) == (kind, 70000)
