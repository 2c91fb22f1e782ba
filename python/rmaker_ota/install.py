"""One installation: a source, a target, and the engine between them.

    >>> options = InstallOptions(md5=digest)
    >>> result = install("https://example.com/fw.bin", "esp32-image:chip.bin", options=options)

`install` does it in one call; `Installer` is the same thing as an object with ``start``, ``progress``, ``cancel`` and
``result``. The bytes go from the source to the target inside the C engine; Python sees the first few hundred of them
(the header gate), the counters, and the result.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
import types
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rmaker_ota import ota_core
from rmaker_ota.errors import (
    ArgumentError,
    ImageError,
    NotResumableError,
    OtaError,
    OtaTimeoutError,
    RejectedError,
    StateError,
)
from rmaker_ota.records import dataclass

if TYPE_CHECKING:
    from rmaker_ota.targets.base import AppDescription, Slot, Target

IMAGE_MAGIC = b"\xe9"  # first byte of an ESP image (ESP-IDF ESP_IMAGE_HEADER_MAGIC)


class Phase(StrEnum):
    """Where an installation is, in this order."""

    CONNECTING = "connecting"  # the source is being opened
    HEADER = "header"  # open; the first bytes are gathered and judged
    RECEIVING = "receiving"  # accepted: bytes go to the slot
    RECEIVED = "received"  # the whole body is here; no verdict yet
    VERIFYING = "verifying"  # verifiers, sync, read back
    COMMITTING = "committing"  # becoming bootable
    DONE = "done"


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header gate is shown. Nothing has been written or erased yet.

    Attributes:
        description: the app descriptor; None: the image is no ESP app image (only where the target takes any image).
        raw: the first bytes of the image, at most ``header_size``; of a resumed one as they are on the slot.
        size: bytes of the image; None: not known.
        offset: bytes that are on the slot already; 0: the download is not resumed.
        entity_tag: strong entity tag of the file on the server, with quotes; "": none.
    """

    description: AppDescription | None
    raw: bytes
    size: int | None
    offset: int
    entity_tag: str


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Bytes of an image that are on the slot for good.

    Attributes:
        offset: how many, from the start of the image.
        sha256: their digest, 32 bytes. A slot that holds something else is not resumed onto.
        entity_tag: of the file they come from; "": none. With one the server is asked to send a changed file whole.
            Without one, a download is resumed only where a digest was announced or the target takes ESP images alone.
    """

    offset: int
    sha256: bytes
    entity_tag: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Counters of an installation; the bytes a resume took over count as read and written.

    Attributes:
        phase: where it is.
        bytes_read: of the file.
        bytes_written: of the image, as the slot took them.
        bytes_skipped: of those, how many were on the slot already and were left alone.
        bytes_total: size of the file; None: not known.
    """

    phase: Phase
    bytes_read: int
    bytes_written: int
    bytes_skipped: int
    bytes_total: int | None


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a file is fetched over HTTPS.

    Attributes:
        ca_file: PEM bundle to trust; None: the system's.
        ca_pem: PEM text to trust in its place; None: none.
        client_cert_file, client_key_file: PEM files to show to the server; None: none.
        proxy: as libcurl takes it; None: from the environment; "": none.
        connect_to: "HOST:PORT:CONNECT-TO-HOST:CONNECT-TO-PORT"; None: none.
        allow_http: take a plain ``http://`` URL too, in the clear.
        skip_common_name_check: do not compare the host name with the certificate.
        connect_timeout_s: seconds for the connection and the TLS handshake.
        stall_timeout_s: longest wait without a byte, seconds.
        deadline_s: seconds for the whole download; 0: none.
        max_bytes_per_s: bandwidth limit; 0: none.
        max_redirects: how many are followed; never from https to http.
        receive_buffer: bytes taken from the connection at once, 1024 at least; 0: 256 KiB.
    """

    ca_file: str | None = None
    ca_pem: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    proxy: str | None = None
    connect_to: str | None = None
    allow_http: bool = False
    skip_common_name_check: bool = False
    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 60.0
    deadline_s: float = 0.0
    max_bytes_per_s: int = 0
    max_redirects: int = 10
    receive_buffer: int = 0


@dataclass(frozen=True, slots=True)
class InstallOptions:
    """What is known of the file, and how it is installed.

    Attributes:
        sha256, md5: announced digests of the file as served, 32 and 16 bytes or hex text; None: not announced.
        size: announced bytes of the file; None: not announced.
        compute_sha256: compute the SHA-256 for the result although nobody announced one (0.57 s/GiB on another core).
        transform: "auto" (by magic number), "none", "gzip", "zlib", "zstd" or "xz".
        max_image_size: bytes a compressed file may expand to; 0: what the slot holds.
        header_size: bytes gathered before the header gate, 1 to 4096. With ``require_description`` a shorter file is an
            error.
        require_description: the image has to be an ESP app image; None: as the target says.
        activate: make the slot the next one to boot.
        read_back: after the sync, read the image from the slot and compare its digest.
        threads: overlap download, verification and writing on threads of the engine.
        buffer_size, buffer_count: of the ring between them; bytes, a multiple of 4096.
        progress_interval_s: seconds between two calls of ``on_progress``.
        checkpoint_bytes, checkpoint_s: at most so often the data is synced and ``on_checkpoint`` called; whichever is
            first.
        resume: where an earlier run ended; None: from the start.
    """

    sha256: bytes | str | None = None
    md5: bytes | str | None = None
    size: int | None = None
    compute_sha256: bool = True
    transform: str = "auto"
    max_image_size: int = 0
    header_size: int = 288
    require_description: bool | None = None
    activate: bool = True
    read_back: bool = False
    threads: bool = True
    buffer_size: int = 1 << 20
    buffer_count: int = 8
    progress_interval_s: float = 0.1
    checkpoint_bytes: int = 8 << 20
    checkpoint_s: float = 5.0
    resume: ResumePoint | None = None


@dataclass(frozen=True, slots=True)
class InstallResult:
    """What an installation did.

    Attributes:
        slot: name of the slot.
        project, version: of the app descriptor; None: the image has none.
        bytes_read: of the file, those a resume took over not included.
        bytes_written: to the medium, padding included.
        bytes_skipped: that were there already and were left alone.
        image_size: bytes of the image on the slot.
        sha256, md5: digests of the file as served; None: not computed.
        seconds: from start to end.
        activated: whether the slot is the next one to boot.
        resumed_from: bytes taken over from an earlier run.
        counts: counters of engine and sink (reads, writes, syncs, erases, copies, waits, ...).
    """

    slot: str
    project: str | None
    version: str | None
    bytes_read: int
    bytes_written: int
    bytes_skipped: int
    image_size: int
    sha256: bytes | None
    md5: bytes | None
    seconds: float
    activated: bool
    resumed_from: int
    counts: dict[str, int | str]


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """The checks of an image against the running one (RainMaker specification, section 4.4), as a header gate.

    Attributes:
        target: whose running slot and secure version are compared with.
        skip_project, skip_version, skip_secure_version: leave that check out.
    """

    target: Target
    skip_project: bool = False
    skip_version: bool = False
    skip_secure_version: bool = False

    def __call__(self, header: ImageHeader) -> None:
        """Accepts the image by returning.

        Raises:
            RejectedError: it is of another project, has the running version or too small a secure version.
        """
        new = header.description
        running = self.target.running_slot()
        if new is None or running is None:
            return
        old = self.target.describe(running)
        if old is not None and not self.skip_project and new.project_name != old.project_name:
            raise RejectedError(
                f"the image is of project {new.project_name!r}, {old.project_name!r} is running", stage="header"
            )
        if old is not None and not self.skip_version and new.version == old.version:
            raise RejectedError(f"the image has version {new.version!r}, which is running", stage="header")
        if not self.skip_secure_version and new.secure_version < self.target.secure_version:
            raise RejectedError(
                f"the image has secure version {new.secure_version}, at least {self.target.secure_version} is needed",
                status="ERR_SECURE_VERSION",
                esp_err=0x1504,
                stage="header",
            )


def make_source(
    source: ota_core.Source | str | os.PathLike[str] | bytes | int,
    http: HttpOptions = HttpOptions(),
    resume: ResumePoint | None = None,
) -> ota_core.Source:
    """The engine's source for what a caller named.

    Args:
        source: an http(s) URL, a path, "-" (standard input), an open descriptor, bytes, or a source.
        http: how a URL is fetched.
        resume: where the download will begin, for its entity tag.

    Raises:
        ArgumentError: the source is none of these, the URL cannot be used, or a certificate or key of ``http`` cannot.
    """
    if isinstance(source, ota_core.Source):
        return source
    if isinstance(source, bytes):
        return ota_core.MemorySource(source)
    if isinstance(source, int):
        return ota_core.FdSource(source)
    if source == "-":
        if sys.__stdin__ is None:  # closed when the process began; something else may have descriptor 0 by now
            raise ArgumentError("standard input is closed", stage="source")
        return ota_core.FdSource(0)
    if isinstance(source, str) and "://" in source:
        return ota_core.HttpSource(
            source,
            ca_file=http.ca_file,
            ca_pem=http.ca_pem,
            client_cert_file=http.client_cert_file,
            client_key_file=http.client_key_file,
            proxy=http.proxy,
            connect_to=http.connect_to,
            allow_http=http.allow_http,
            skip_common_name_check=http.skip_common_name_check,
            connect_timeout_ms=_milliseconds("connect_timeout_s", http.connect_timeout_s),
            stall_timeout_ms=_milliseconds("stall_timeout_s", http.stall_timeout_s),
            deadline_ms=_milliseconds("deadline_s", http.deadline_s),
            max_bytes_per_s=http.max_bytes_per_s,
            max_redirects=http.max_redirects,
            receive_buffer=http.receive_buffer,
            entity_tag=resume.entity_tag if resume is not None else None,
        )
    return ota_core.FileSource(os.fspath(source))


def _refuse_itself(source: object, path: str) -> None:
    """Raises ArgumentError when the source is the very file or device the target would empty or write over."""
    if not isinstance(source, str | int | os.PathLike):
        return
    try:
        here, there = os.stat(0 if source == "-" else source), os.stat(path)
    except (OSError, ValueError):
        return  # no path, or none that is there
    same_device = stat.S_ISBLK(here.st_mode) and stat.S_ISBLK(there.st_mode) and here.st_rdev == there.st_rdev
    if same_device or os.path.samestat(here, there):
        raise ArgumentError(f"the source is the target itself, {path}", stage="source")


class Installer:
    """One installation as an object.

    Args:
        source: an http(s) URL, a path, "-" (standard input), an open descriptor, bytes, or a source of the engine.
        target: where the image goes.
        slot: which slot; None: the target's next one.
        options: what is known of the file, and how it is installed.
        http: how a URL is fetched.
        header_gate: sees the header before anything is written; returning accepts, raising refuses (`run` raises that
            very exception).
        on_phase, on_progress, on_checkpoint: told about it; what they raise ends the installation.

    Callbacks are called on the thread that runs the installation. `cancel` and `progress` may be called from any
    thread.
    """

    def __init__(
        self,
        source: ota_core.Source | str | os.PathLike[str] | bytes | int,
        target: Target,
        *,
        slot: Slot | None = None,
        options: InstallOptions = InstallOptions(),
        http: HttpOptions = HttpOptions(),
        header_gate: Callable[[ImageHeader], None] | None = None,
        on_phase: Callable[[Phase], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_checkpoint: Callable[[ResumePoint], None] | None = None,
    ) -> None:
        self._source_like = source
        self._target = target
        self._slot = slot
        self._options = options
        self._http = http
        self._header_gate = header_gate
        self._on_phase = on_phase
        self._on_progress = on_progress
        self._on_checkpoint = on_checkpoint
        self._lock = threading.Lock()
        self._cancelled = False
        self._begun = False
        self._pipeline: ota_core.Pipeline | None = None
        self._sink: ota_core.Sink | None = None
        self._description: AppDescription | None = None
        self._thread: threading.Thread | None = None
        self._result: InstallResult | None = None
        self._error: BaseException | None = None

    def run(self) -> InstallResult:
        """Installs on the calling thread.

        Raises:
            OtaError: the first failure of any stage; the slot in use is untouched.
            StateError: it was run or started before.
            BaseException: exactly what a callback raised.
        """
        self._begin()
        return self._install_or_release()

    def start(self) -> None:
        """Installs on a thread of its own; `result` waits for it. Raises StateError if it was run or started before."""
        self._begin()
        self._thread = threading.Thread(target=self._install_and_keep, name="rmaker-ota-install", daemon=True)
        self._thread.start()

    def result(self, timeout: float | None = None) -> InstallResult:
        """Waits for a started installation.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            OtaTimeoutError: it is not finished yet.
            OtaError: what ended it.
        """
        if self._thread is None:
            raise StateError("the installer was not started")
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise OtaTimeoutError(f"the installation is not finished after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Ends the installation with CancelledError unless it has begun to commit. Any thread, any time."""
        with self._lock:
            self._cancelled = True
            if self._pipeline is not None:
                self._pipeline.cancel()

    def progress(self) -> Progress:
        """Where it is. Any thread, any time."""
        pipeline, sink = self._pipeline, self._sink
        if pipeline is None or sink is None:
            return Progress(Phase.CONNECTING, 0, 0, 0, None)
        phase, position, size, image_bytes = pipeline.progress()
        return Progress(Phase(phase), position, image_bytes, sink.counts["bytes_skipped"], size)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with self._lock:
            if self._begun:
                raise StateError("an installer runs once")
            self._begun = True

    def _install_and_keep(self) -> None:
        try:
            self._result = self._install_or_release()
        except BaseException as exc:  # handed to whoever asks for the result
            self._error = exc

    def _install_or_release(self) -> InstallResult:
        try:
            return self._install()
        except BaseException:
            self._target.release()  # what was stopped for it goes on with the image it had
            raise

    def _install(self) -> InstallResult:
        began = time.monotonic()
        options = self._options
        _check_numbers(options, self._http)
        slot = self._slot if self._slot is not None else self._target.next_slot()
        rules = self._target.verify_image_rules()
        self._require = options.require_description if options.require_description is not None else bool(rules)
        _refuse_itself(self._source_like, self._target.uri.partition(":")[2])
        self._refuse_unsafe_resume(any_image=not rules)
        source = make_source(self._source_like, self._http, options.resume)
        sink = self._target.open_sink(slot, activate=options.activate)
        if isinstance(sink, ota_core.SerialSink):
            sink.announce(sha256=digest("sha256", options.sha256, 32), md5=digest("md5", options.md5, 16))
        checkpoints = self._on_checkpoint is not None
        resume = options.resume
        if resume is not None and resume.offset % sink.resume_size != 0:
            offset = resume.offset - resume.offset % sink.resume_size
            raise ArgumentError(f"resume offset {resume.offset} is no multiple of {sink.resume_size}, try {offset}")
        pipeline = ota_core.Pipeline(
            source,
            sink,
            transform=options.transform,
            file_sha256=digest("sha256", options.sha256, 32),
            file_md5=digest("md5", options.md5, 16),
            compute_sha256=options.compute_sha256,
            file_size=options.size,
            image_rules=dict(rules, slot_size=slot.size) if rules else None,
            max_image_size=options.max_image_size or slot.size,
            header_size=options.header_size,
            header_required=self._require,
            read_back=options.read_back,
            single_thread=not options.threads,
            chunk_count=options.buffer_count,
            chunk_size=options.buffer_size,
            tick_ms=max(1, _milliseconds("progress_interval_s", options.progress_interval_s)),
            checkpoint_bytes=options.checkpoint_bytes if checkpoints else 0,
            checkpoint_ms=_milliseconds("checkpoint_s", options.checkpoint_s) if checkpoints else 0,
            resume_offset=resume.offset if resume is not None else 0,
            resume_sha256=resume.sha256 if resume is not None else None,
        )
        with self._lock:
            self._pipeline, self._sink = pipeline, sink
            if self._cancelled:
                pipeline.cancel()
        pipeline.run(
            on_header=self._header,
            on_phase=self._phase if self._on_phase is not None else None,
            on_checkpoint=self._checkpoint if checkpoints else None,
            on_tick=self._tick if self._on_progress is not None else None,
        )
        self._tick()
        counts: dict[str, int | str] = {**sink.counts, **pipeline.counts(), "requests": source.requests}
        description = self._description
        return InstallResult(
            slot=slot.name,
            project=description.project_name if description is not None else None,
            version=description.version if description is not None else None,
            bytes_read=source.bytes_read,
            bytes_written=sink.counts["bytes_written"],
            bytes_skipped=sink.counts["bytes_skipped"],
            image_size=int(counts["image_size"]),
            sha256=pipeline.sha256,
            md5=pipeline.md5,
            seconds=time.monotonic() - began,
            activated=options.activate and bool(rules),
            resumed_from=int(counts["resumed_from"]),
            counts=counts,
        )

    def _refuse_unsafe_resume(self, *, any_image: bool) -> None:
        """Raises NotResumableError where nothing would tell that the server has another file by now.

        An entity tag tells, an announced digest does, and so does the structure of an ESP image.
        """
        options, source = self._options, self._source_like
        if options.resume is None or options.resume.offset == 0 or options.resume.entity_tag or not any_image:
            return
        if isinstance(source, str) and "://" in source and options.sha256 is None and options.md5 is None:
            raise NotResumableError("the server gave no entity tag and no digest was announced", stage="source")

    def _header(self, raw: bytes, size: int | None, offset: int, entity_tag: str) -> None:
        self._description = describe_image(raw, required=self._require)
        if self._header_gate is not None:
            self._header_gate(ImageHeader(self._description, raw, size, offset, entity_tag))

    def _phase(self, phase: str) -> None:
        if self._on_phase is not None:
            self._on_phase(Phase(phase))

    def _checkpoint(self, offset: int, sha256: bytes, entity_tag: str) -> None:
        if self._on_checkpoint is not None:
            self._on_checkpoint(ResumePoint(offset, sha256, entity_tag))

    def _tick(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress())


def install(
    source: ota_core.Source | str | os.PathLike[str] | bytes | int,
    target: Target | str,
    *,
    slot: Slot | None = None,
    options: InstallOptions = InstallOptions(),
    http: HttpOptions = HttpOptions(),
    header_gate: Callable[[ImageHeader], None] | None = None,
    on_phase: Callable[[Phase], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_checkpoint: Callable[[ResumePoint], None] | None = None,
    cancel: threading.Event | None = None,
) -> InstallResult:
    """Installs one image into one target; see `Installer` for the arguments.

    Args:
        target: where the image goes; a URI is opened and closed again (`rmaker_ota.targets.open_target`).
        cancel: an event whose setting ends the installation; looked at every ``progress_interval_s``.

    Raises:
        OtaError: the first failure of any stage; the slot in use is untouched.
        CancelledError: ``cancel`` was set.
    """
    if isinstance(target, str):
        from rmaker_ota.targets import open_target

        with open_target(target) as opened:
            return install(
                source,
                opened,
                slot=slot,
                options=options,
                http=http,
                header_gate=header_gate,
                on_phase=on_phase,
                on_progress=on_progress,
                on_checkpoint=on_checkpoint,
                cancel=cancel,
            )
    installer: Installer

    def progress(now: Progress) -> None:
        if cancel is not None and cancel.is_set():
            installer.cancel()
        if on_progress is not None:
            on_progress(now)

    installer = Installer(
        source,
        target,
        slot=slot,
        options=options,
        http=http,
        header_gate=header_gate,
        on_phase=on_phase,
        on_progress=progress if cancel is not None or on_progress is not None else None,
        on_checkpoint=on_checkpoint,
    )
    return installer.run()


def describe_image(raw: bytes, *, required: bool) -> AppDescription | None:
    """The app descriptor in the first bytes of an image.

    Args:
        raw: at least 288 bytes of it.
        required: raise where there is none.

    Raises:
        ImageError: there is none, in stage "header".
    """
    if raw[:1] != IMAGE_MAGIC and not required:
        return None  # without the ESP formats, which take 20 ms to import
    from rmaker_ota.inspect import app_description

    try:
        return app_description(raw)
    except OtaError as exc:
        if not required:
            return None
        raise ImageError(
            exc.message, status=exc.status, esp_err=exc.esp_err, stage="header", offset=exc.offset
        ) from None


def digest(name: str, value: bytes | str | None, size: int) -> bytes | None:
    """A digest given as bytes or hex text, as bytes.

    Raises:
        ArgumentError: it is not ``size`` bytes, or not hex.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value)
        except ValueError:
            raise ArgumentError(f"{name} is {value!r}, expected {2 * size} hex digits") from None
    if len(value) != size:
        raise ArgumentError(f"{name} has {len(value)} bytes, expected {size}")
    return value


def _check_numbers(options: InstallOptions, http: HttpOptions) -> None:
    """Raises ArgumentError for a number the engine cannot take, naming it."""
    checks = [
        ("size", options.size or 0, 63),
        ("max_image_size", options.max_image_size, 63),
        ("header_size", options.header_size, 31),
        ("buffer_size", options.buffer_size, 31),
        ("buffer_count", options.buffer_count, 31),
        ("checkpoint_bytes", options.checkpoint_bytes, 63),
        ("resume offset", options.resume.offset if options.resume is not None else 0, 63),
        ("max_bytes_per_s", http.max_bytes_per_s, 63),
        ("max_redirects", http.max_redirects, 31),
        ("receive_buffer", http.receive_buffer, 24),
    ]
    for name, value, bits in checks:
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ArgumentError(f"{name} is {value!r}, expected a whole number from 0 to 2**{bits} - 1")


def _milliseconds(name: str, seconds: float) -> int:
    if not 0 <= seconds <= 1e9:
        raise ArgumentError(f"{name} is {seconds}, expected 0 to 1e9 seconds")
    return round(seconds * 1000)


class _CallableModule(types.ModuleType):
    """``rmaker_ota.install`` is this module, whoever imports it first, and a function to its users."""

    def __call__(self, *args: Any, **kwargs: Any) -> InstallResult:
        return install(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

__all__ = [
    "HttpOptions",
    "ImageHeader",
    "ImagePolicy",
    "InstallOptions",
    "InstallResult",
    "Installer",
    "Phase",
    "Progress",
    "ResumePoint",
    "describe_image",
    "install",
    "make_source",
]
