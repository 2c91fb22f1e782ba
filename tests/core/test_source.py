"""What every source promises, and what files, descriptors, memory and pushed bytes do beside it."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmaker_ota import errors
from rmaker_ota.errors import ArgumentError, CancelledError, DataError, DigestError, OtaError, StateError
from rmaker_ota.ota_core import (
    FdSource,
    FileSource,
    HttpSource,
    MemorySource,
    PushSource,
    Source,
    SourceInfo,
    status_table,
)
from tests.sim import https_server as sim

IMAGE = random.Random(3).randbytes(100_003)
SIZE = len(IMAGE)


def read_all(source: Source, size: int = 4096) -> bytes:
    parts = []
    while part := source.read(size):
        assert len(part) <= size
        parts.append(part)
    return b"".join(parts)


def feed(source: PushSource, data: bytes, piece: int = 1000) -> threading.Thread:
    """Pushes from another thread, as long as somebody reads."""

    def run() -> None:
        with contextlib.suppress(CancelledError):
            for at in range(0, len(data), piece):
                source.write(data[at : at + piece])
            source.end()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


KINDS = ("file", "fd", "pipe", "memory", "push", "http")
Maker = Callable[[], Source]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    """Makes sources of IMAGE, one kind after the other."""
    with contextlib.ExitStack() as stack:
        path = tmp_path / "image.bin"
        path.write_bytes(IMAGE)

        def pipe() -> Source:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)

            def run() -> None:
                with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as end:
                    end.write(IMAGE)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            return FdSource(reader)

        def push() -> Source:
            source = PushSource(SIZE, 10_000)
            thread = feed(source, IMAGE)
            stack.callback(thread.join)
            stack.callback(source.cancel)
            return source

        makers: dict[str, Maker] = {
            "file": lambda: FileSource(path),
            "fd": lambda: FdSource(stack.enter_context(path.open("rb"))),
            "pipe": pipe,
            "memory": lambda: MemorySource(IMAGE),
            "push": push,
        }
        if request.param == "http":
            server = stack.enter_context(sim.HttpsServer([sim.serve(IMAGE)]))
            makers["http"] = lambda: HttpSource(server.url(), ca_pem=server.ca_pem, proxy="")
        yield makers[request.param]


@pytest.mark.parametrize("size", [1000, 4096, SIZE * 2])
def test_it_gives_every_byte_once_and_then_the_end(make: Maker, size: int) -> None:
    source = make()
    info = source.open()
    assert info.offset == 0
    assert info.size in (SIZE, None)
    assert read_all(source, size) == IMAGE
    assert source.read(size) == b""
    assert source.bytes_read == SIZE
    assert source.requests == 1
    source.close()
    source.close()


def test_it_starts_at_the_offset_or_says_that_it_starts_over(make: Maker) -> None:
    source = make()
    offset = source.open(5000).offset
    assert offset in (0, 5000)
    assert read_all(source) == IMAGE[offset:]


def test_it_is_closed_until_opened_and_opened_once(make: Maker) -> None:
    source = make()
    with pytest.raises(StateError):
        source.read(1)
    source.open()
    with pytest.raises(StateError):
        source.open()
    with pytest.raises(ArgumentError):
        source.read(0)
    assert source.read(1) == IMAGE[:1]  # none of that did any harm
    source.close()
    with pytest.raises(StateError):
        source.read(1)


def test_a_cancelled_source_stays_cancelled(make: Maker) -> None:
    source = make()
    source.open()
    source.cancel()
    source.cancel()
    for _ in range(2):
        with pytest.raises(CancelledError) as caught:
            source.read(1)
        assert caught.value.stage == "source"
    source.close()
    with pytest.raises(CancelledError):
        source.open()


def test_it_may_be_dropped_while_open(make: Maker) -> None:
    with make() as source:
        source.open()
        source.read(10)
        del source


def test_sizes_and_offsets_are_checked(make: Maker) -> None:
    source = make()
    for bad in (-1, 2**64):
        with pytest.raises(ArgumentError):
            source.open(bad)
    with pytest.raises(TypeError):
        source.open("0")  # type: ignore[arg-type]
    source.open()
    with pytest.raises(ArgumentError):
        source.read(-1)


@pytest.mark.parametrize("kind", [FileSource, FdSource, MemorySource, PushSource, HttpSource])
def test_a_source_made_past_its_constructor_is_no_trap(kind: type[Source]) -> None:
    source = kind.__new__(kind)
    source.cancel()
    source.close()
    assert (source.bytes_read, source.requests) == (0, 0)
    with pytest.raises(StateError):
        source.open()
    if isinstance(source, PushSource):
        acts: list[Callable[[], object]] = [source.drain, source.end]
        acts += [lambda: source.write(b"x"), lambda: source.fail("ERR_STALLED")]
        for act in acts:
            with pytest.raises(StateError):
                act()


def test_a_source_is_set_up_once() -> None:
    source = MemorySource(b"abc")
    with pytest.raises(StateError):
        MemorySource.__init__(source, b"def")


# ---- Files and descriptors -------------------------------------------------------------------------------------------


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match=r"missing\.bin") as caught:
        FileSource(tmp_path / "missing.bin").open()
    assert caught.value.device_code == 2


def test_a_path_with_any_bytes_is_found(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.bin"
    Path(os.fsdecode(path)).write_bytes(IMAGE)
    source = FileSource(os.fsdecode(path))
    assert source.open() == SourceInfo(SIZE, 0, "")
    with pytest.raises(errors.NotFoundError):
        FileSource(os.fsdecode(path + b"\xff")).open()  # its error text is not UTF-8


def test_a_path_with_a_nul_is_refused() -> None:
    with pytest.raises(ArgumentError, match="NUL"):
        FileSource("a\0b")


def test_an_open_file_stays_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "image.bin"
    path.write_bytes(IMAGE)
    with path.open("rb") as file:
        file.seek(3)
        source = FdSource(file.fileno())
        assert source.open() == SourceInfo(SIZE - 3, 0, "")
        assert read_all(source) == IMAGE[3:]
        del source
        assert file.read(1) == IMAGE[3:4]
    with pytest.raises(errors.DeviceError):
        FdSource(-1)


def test_memory_is_held_not_copied() -> None:
    data = bytearray(b"abcdef")
    source = MemorySource(data)
    with pytest.raises(BufferError):
        data.append(0)
    source.open()
    data[0] = ord("X")
    assert read_all(source) == b"Xbcdef"
    del source
    data.append(0)


# ---- Pushed bytes ----------------------------------------------------------------------------------------------------


def test_a_failure_arrives_with_all_its_details_behind_the_bytes() -> None:
    source = PushSource()
    source.open()
    source.write(b"abc")
    source.fail(errors.DownloadError("no such stream", status="ERR_HTTP_STATUS", offset=3, device_code=404))
    source.end()
    assert source.read(10) == b"abc"
    for _ in range(2):
        with pytest.raises(errors.DownloadError, match="no such stream") as caught:
            source.read(10)
        assert (caught.value.status, caught.value.offset, caught.value.device_code) == ("ERR_HTTP_STATUS", 3, 404)


def test_any_status_and_any_exception_can_be_the_failure() -> None:
    for name, number, esp_err, _ in status_table():
        source = PushSource()
        source.open()
        if number >= 0:
            with pytest.raises(ArgumentError):
                source.fail(name)
            continue
        source.fail(name, "why: \0 50%s ü")
        with pytest.raises(OtaError) as caught:
            source.read(1)
        assert (caught.value.status, caught.value.esp_err) == (name, esp_err)
        assert str(caught.value) == "why: ? 50%s ü"
    source = PushSource()
    source.open()
    source.fail(KeyError("block 7"))
    with pytest.raises(errors.CallbackError, match="KeyError: 'block 7'"):
        source.read(1)
    with pytest.raises(ArgumentError):
        source.fail("ERR_OF_MINE")


def test_the_announced_size_is_held_to_both_ways() -> None:
    source = PushSource(5)
    source.open()
    source.write(b"abcd")
    source.end()
    assert source.read(10) == b"abcd"
    with pytest.raises(DataError) as early:
        source.read(10)
    assert (early.value.status, early.value.offset) == ("ERR_INCOMPLETE", 4)
    with pytest.raises(StateError):
        source.write(b"e")
    source = PushSource(5)
    source.open()
    with pytest.raises(DigestError):
        source.write(b"abcdef")
    with pytest.raises(DigestError) as late:
        source.read(10)
    assert late.value.status == "ERR_SIZE"


def test_pushed_bytes_may_begin_in_the_middle() -> None:
    source = PushSource(SIZE, offset=5000)
    thread = feed(source, IMAGE[5000:])
    with pytest.raises(StateError):
        source.open(0)
    assert source.open(5000) == SourceInfo(SIZE, 5000, "")
    assert read_all(source) == IMAGE[5000:]
    thread.join()


def test_a_writer_hears_when_the_reader_leaves() -> None:
    source = PushSource(capacity=10)
    source.open()
    raised: list[type[BaseException]] = []

    def run(act: Callable[[], object]) -> None:
        try:
            act()
        except OtaError as exc:
            raised.append(type(exc))

    threads = [threading.Thread(target=run, args=(act,)) for act in (lambda: source.write(bytes(100)), source.drain)]
    for thread in threads:
        thread.start()
    source.close()
    for thread in threads:
        thread.join(30)
    assert raised == [CancelledError] * 2


def test_draining_waits_for_the_reader_to_ask_again() -> None:
    source = PushSource()
    source.open()
    drained = threading.Event()

    def run() -> None:
        for byte in (b"a", b"b"):
            source.write(byte)
            source.drain()
        drained.set()
        source.end()

    thread = threading.Thread(target=run)
    thread.start()
    assert source.read(10) == b"a"  # never both at once
    assert not drained.is_set()
    assert source.read(10) == b"b"
    assert source.read(10) == b""
    thread.join()
    assert drained.is_set()
