"""The border of the engine: results, errors, callbacks, lifetimes, threads."""

from __future__ import annotations

import gc
import gzip
import hashlib
import random
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import errors, ota_core
from rmaker_ota.esp_build import build_image

DATA = random.Random(1).randbytes(3_000_001)


class BoomError(Exception):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slot.bin"


def pipeline(path: Path, source: ota_core.Source | None = None, **options: Any) -> ota_core.Pipeline:
    return ota_core.Pipeline(source or ota_core.MemorySource(DATA), ota_core.FileSink(path), **options)


@pytest.mark.parametrize("single_thread", [False, True])
@pytest.mark.parametrize("size", [1, 4095, 4096, 1 << 20, (1 << 20) + 1, 3_000_001])
def test_the_slot_holds_exactly_the_image(path: Path, size: int, single_thread: bool) -> None:
    source = ota_core.MemorySource(DATA[:size])
    run = pipeline(path, source, single_thread=single_thread, compute_md5=True, read_back=True)
    run.run()
    assert path.read_bytes() == DATA[:size]
    assert run.sha256 == hashlib.sha256(DATA[:size]).digest()
    assert run.md5 == hashlib.md5(DATA[:size]).digest()
    assert run.progress() == ("done", size, size, size)
    assert run.counts()["copies"] == 0


def test_only_digests_that_somebody_asked_for_are_computed(path: Path) -> None:
    run = pipeline(path, compute_sha256=False)
    run.run()
    assert run.sha256 is None
    assert run.md5 is None


def test_what_a_callback_raises_arrives_as_the_same_object_with_its_traceback(path: Path) -> None:
    boom = BoomError("no")

    def raise_it(*_: object) -> None:
        raise boom

    for name in ("on_header", "on_phase"):
        with pytest.raises(BoomError) as caught:
            pipeline(path).run(**{name: raise_it})
        assert caught.value is boom
        assert any(entry.name == "raise_it" for entry in caught.traceback)
        assert not path.exists()


def test_a_refused_header_writes_nothing(path: Path) -> None:
    seen = []

    def refuse(raw: bytes, size: int | None, offset: int, entity_tag: str) -> None:
        seen.append((raw, size, offset, entity_tag))
        raise errors.RejectedError("not this one")

    with pytest.raises(errors.RejectedError, match="not this one"):
        pipeline(path).run(on_header=refuse)
    assert seen == [(DATA[:288], len(DATA), 0, "")]
    assert not path.exists()


def test_phases_come_in_order(path: Path) -> None:
    phases: list[str] = []
    pipeline(path).run(on_phase=phases.append)
    assert tuple(phases) == ota_core.PHASES


@pytest.mark.parametrize("single_thread", [False, True])
def test_a_whole_body_is_told_of_before_the_verdict_on_it(path: Path, single_thread: bool) -> None:
    def phases_of(image: bytes) -> list[str]:
        phases: list[str] = []
        run = pipeline(path, ota_core.MemorySource(image), single_thread=single_thread, image_rules={"chip_id": 5})
        with pytest.raises(errors.VerifyError):
            run.run(on_phase=phases.append)
        return phases

    assert phases_of(build_image(size=1_000_000, bad_checksum=True))[-1] == "received"
    assert "received" not in phases_of(build_image(size=65536, chip_id=9))  # judged by its first bytes


@pytest.mark.parametrize("single_thread", [False, True])
def test_the_gate_is_asked_when_the_header_is_there(path: Path, single_thread: bool) -> None:
    source = ota_core.PushSource(size=1 << 20)
    run = pipeline(path, source, single_thread=single_thread)
    asked = threading.Event()
    thread = threading.Thread(target=lambda: run.run(on_header=lambda *_: asked.set()))
    thread.start()
    source.write(bytes(300))
    assert asked.wait(10)
    source.write(bytes((1 << 20) - 300))
    source.end()
    thread.join(10)
    assert not thread.is_alive()


def test_digest_mismatch_is_an_error_and_names_both(path: Path) -> None:
    with pytest.raises(errors.DigestError) as caught:
        pipeline(path, file_sha256=bytes(32)).run()
    assert caught.value.status == "ERR_SHA256"
    assert hashlib.sha256(DATA).hexdigest() in str(caught.value)
    with pytest.raises(errors.DigestError) as caught:
        pipeline(path, file_md5=bytes(16)).run()
    assert caught.value.status == "ERR_MD5"


def test_system_errors_carry_errno(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="slot") as caught:
        pipeline(tmp_path / "missing" / "slot").run()
    assert caught.value.device_code == 2
    assert caught.value.stage == "sink"
    with pytest.raises(OSError, match="directory") as refused:
        pipeline(tmp_path).run()
    assert refused.value.errno == 21


def test_cancel_from_another_thread_ends_a_waiting_run(path: Path) -> None:
    source = ota_core.PushSource(capacity=4096)
    source.write(bytes(4096))
    run = pipeline(path, source)
    started = threading.Event()
    raised: list[BaseException] = []

    def body() -> None:
        try:
            run.run(on_header=lambda *_: started.set())
        except errors.OtaError as exc:
            raised.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    assert started.wait(10)
    run.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(raised[0], errors.CancelledError)


def test_python_runs_on_while_the_engine_does(path: Path) -> None:
    # the pushing thread needs the GIL for every write: with the engine holding it, this would never end
    source = ota_core.PushSource(size=len(DATA), capacity=65536)

    def push() -> None:
        for offset in range(0, len(DATA), 50_000):
            source.write(DATA[offset : offset + 50_000])
        source.end()

    thread = threading.Thread(target=push)
    thread.start()
    pipeline(path, source).run()
    thread.join(10)
    assert path.read_bytes() == DATA


def test_an_interrupt_ends_a_waiting_run(path: Path) -> None:
    run = pipeline(path, ota_core.PushSource(), tick_ms=1)

    def interrupt(phase: str) -> None:
        if phase == "header":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.run(on_phase=interrupt)


def test_a_run_keeps_what_it_needs_alive_and_no_longer(path: Path) -> None:
    class Recorder:
        def __call__(self, phase: str) -> None:
            self.phase = phase

    recorder = Recorder()
    gone = weakref.ref(recorder)
    run = pipeline(path)
    run.run(on_phase=recorder)
    del recorder
    gc.collect()
    assert gone() is None
    with pytest.raises(errors.StateError):
        run.run()


def test_checkpoints_tell_a_prefix_and_its_digest(path: Path) -> None:
    points: list[tuple[int, bytes, str]] = []
    source = ota_core.PushSource(size=len(DATA))
    part = DATA[:1_000_000]
    source.write(part)
    source.fail("ERR_HTTP_CLOSED", "closed", offset=len(part))
    with pytest.raises(errors.DownloadError) as caught:
        pipeline(path, source, checkpoint_bytes=1 << 30, chunk_size=65536).run(
            on_checkpoint=lambda *point: points.append(point)
        )
    assert caught.value.status == "ERR_HTTP_CLOSED"
    assert [point[0] for point in points] == [len(part) // 4096 * 4096]
    offset, sha256, _ = points[0]
    assert sha256 == hashlib.sha256(DATA[:offset]).digest()

    # and the resume takes it from there
    seen: list[int] = []
    run = pipeline(path, resume_offset=offset, resume_sha256=sha256, file_sha256=hashlib.sha256(DATA).digest())
    run.run(on_header=lambda raw, size, start, tag: seen.append(start))
    assert seen == [offset]
    assert path.read_bytes() == DATA
    assert run.counts()["resumed_from"] == offset


def test_a_compressed_file_is_unpacked(path: Path) -> None:
    packed = gzip.compress(DATA[:500_000])
    source = ota_core.MemorySource(packed)
    run = pipeline(path, source, file_sha256=hashlib.sha256(packed).digest(), file_size=len(packed))
    run.run()
    assert path.read_bytes() == DATA[:500_000]
    assert run.counts()["transform"] == "gzip"
    path.unlink()
    pipeline(path, ota_core.MemorySource(packed), transform="none").run()
    assert path.read_bytes() == packed


def test_wrong_arguments_name_themselves(path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"transform": "rar"}, "transform"),
        ({"file_sha256": b"short"}, "sha256"),
        ({"file_md5": "text"}, "md5"),
        ({"image_rules": {"chip": 5}}, "chip"),
        ({"chunk_size": 1000}, "4096"),
        ({"header_size": 5000}, "header_size"),
    ]
    for options, word in wrong:
        with pytest.raises(errors.ArgumentError, match=word):
            pipeline(path, **options)


def test_every_failing_call_on_the_file_is_reported(path: Path) -> None:
    n = 0
    while True:
        fault = ota_core.Fault(after=n, count=1, errnum=28)
        sink = ota_core.FileSink(path, fault=fault)
        try:
            ota_core.Pipeline(ota_core.MemorySource(DATA[:200_000]), sink, chunk_size=65536).run()
        except errors.DeviceError as exc:
            assert exc.status == "ERR_NO_SPACE"
            assert exc.errno == 28
        if fault.seen <= n:
            break
        n += 1
    assert n >= 5
    assert path.read_bytes() == DATA[:200_000]


def test_nothing_leaks_descriptors(path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        pipeline(path, ota_core.MemorySource(DATA[:10_000])).run()
        with pytest.raises(errors.DigestError):
            pipeline(path, ota_core.MemorySource(DATA[:10_000]), file_sha256=bytes(32)).run()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
