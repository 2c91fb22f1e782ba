"""One download attempt: the installer on a thread of its own, told and asked in the words of the workflow.

Every attempt that is started ends with exactly one `AttemptFinished` or `AttemptFailed`, unless it is cancelled: then
with none.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rmaker_ota.errors import ArgumentError, CancelledError, OtaError
from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker.workflow import (
    AttemptCheckpoint,
    AttemptFailed,
    AttemptFinished,
    AttemptHeader,
    AttemptProgress,
    AttemptReceived,
    ImageDescription,
    Input,
    ResumePoint,
    Stage,
    StartAttempt,
)

if TYPE_CHECKING:
    from rmaker_ota import ota_core
    from rmaker_ota.config import OtaSection
    from rmaker_ota.install import ImageHeader, InstallResult, Phase, Progress
    from rmaker_ota.install import ResumePoint as SlotResumePoint
    from rmaker_ota.targets.base import Slot, Target

log = logging.getLogger(__name__)

# Error statuses whose device code is an HTTP status, not an errno.
_HTTP_CODES = re.compile(r"ERR_HTTP_(STATUS|REDIRECT|DOWNGRADE|NOT_MODIFIED|PROTOCOL|RANGE|TLS)")
# Error statuses that come before any answer of the server.
_UNANSWERED = re.compile(r"ERR_(HTTP_(CONNECT|RESOLVE|TLS|CONNECT_TIMEOUT|NO_RESPONSE|URL|INSECURE)|STALLED|DEADLINE)")
# Bytes go to the slot a buffer at a time. A cut costs what is in the one being filled, which is much of a small image.
SMALL_SLOT = 32 << 20
SMALL_BUFFER = 64 << 10
LARGE_BUFFER = 1 << 20
SECTOR = 4096
SOURCE_FAILED = "ERR_CALLBACK"  # what an installation fails with when a source that is run elsewhere did
_IMPOSSIBLE_MD5 = bytes(16)  # stands for an announced text that is no MD5: nothing can match it


class Installation(Protocol):
    """What an attempt needs of `rmaker_ota.install.Installer`."""

    def run(self) -> InstallResult: ...

    def cancel(self) -> None: ...

    def progress(self) -> Progress: ...


@dataclass(frozen=True)
class Callbacks:
    """What an installation calls, on its thread."""

    header_gate: Callable[[ImageHeader], None]
    on_phase: Callable[[Phase], None]
    on_progress: Callable[[Progress], None]
    on_checkpoint: Callable[[SlotResumePoint], None] | None


# Makes an installation: what to do, into which slot of which target.
InstallationFactory = Callable[[StartAttempt, "Target", "Slot", "OtaSection", Callbacks], Installation]


@dataclass(frozen=True)
class SourceFailure:
    """Why a source that is run elsewhere failed: ``stage``, and what the server ``said``."""

    stage: Stage
    said: str = ""


class Refused(Exception):
    """Raised in the header gate for an image the workflow refused."""


class Attempt:
    """One attempt, from `start` to its last message.

    Args:
        action: what to do.
        target: where to.
        options: of download and installation.
        post: takes what happens; called on the attempt's thread.
        make: makes the installation; None: the real one.
        ended: called when nothing more comes.
        source_failure: asked when the installation failed in its source; None: the error says it all.
    """

    def __init__(
        self,
        action: StartAttempt,
        target: Target,
        options: OtaSection,
        post: Callable[[Input], object],
        *,
        make: InstallationFactory | None = None,
        ended: Callable[[], None] = lambda: None,
        source_failure: Callable[[], SourceFailure | None] = lambda: None,
    ) -> None:
        self._action = action
        self._target = target
        self._options = options
        self._post = post
        self._make = make or make_installation
        self._ended = ended
        self._source_failure = source_failure
        self._lock = threading.Lock()
        self._verdict = threading.Event()
        self._refusal: str | None = None
        self._installation: Installation | None = None
        self._cancelled = False
        self._gate_passed = False
        self._answered = False
        self._finishing = False
        self._thread = threading.Thread(target=self._run, name=f"rmaker-attempt-{action.attempt}", daemon=True)

    @property
    def number(self) -> int:
        """The workflow's number of this attempt."""
        return self._action.attempt

    def start(self) -> None:
        with self._lock:
            if not self._cancelled:
                self._thread.start()
                return
        self._ended()

    def decide(self, refusal: str | None) -> None:
        """Answers the header gate: None accepts."""
        self._refusal = refusal
        self._verdict.set()

    def cancel(self, timeout_s: float) -> bool:
        """Ends the attempt, which posts nothing any more.

        Returns:
            Whether its thread has ended in the time given.
        """
        with self._lock:
            self._cancelled = True
            if self._installation is not None:
                self._installation.cancel()
            is_started = self._thread.ident is not None
        self._verdict.set()
        if is_started:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def progress(self) -> Progress | None:
        """Counters of the installation; None before it has begun."""
        installation = self._installation
        return None if installation is None else installation.progress()

    # -- the thread

    def _run(self) -> None:
        last: Input | None = None
        try:
            result = self._install()
            last = AttemptFinished(self._action.attempt, result.slot, result.version)
        except CancelledError:
            pass  # by `cancel`: nobody else can
        except Exception as error:
            last = self._failure(error)
        finally:
            if last is not None and not self._cancelled:
                self._post(last)
            self._ended()

    def _install(self) -> InstallResult:
        slot = self._target.next_slot()
        installation = self._make(
            self._action,
            self._target,
            slot,
            self._options,
            Callbacks(
                header_gate=lambda header: self._gate(header, slot.name),
                on_phase=self._phase,
                on_progress=self._progress,
                on_checkpoint=self._checkpoint if self._action.keep_position else None,
            ),
        )
        with self._lock:
            self._installation = installation
            if self._cancelled:
                raise CancelledError("the node stops")
        return installation.run()

    def _gate(self, header: ImageHeader, slot: str) -> None:
        self._answered = True
        found = header.description
        description = (
            None if found is None else ImageDescription(found.project_name, found.version, found.secure_version)
        )
        self._post(AttemptHeader(self._action.attempt, description, header.offset, slot))
        self._verdict.wait()
        if self._cancelled:
            raise CancelledError("the node stops")
        if self._refusal is not None:
            raise Refused(self._refusal)
        self._gate_passed = True

    def _phase(self, phase: Phase) -> None:
        if phase == "received":
            progress = self.progress()
            self._post(AttemptReceived(self._action.attempt, 0 if progress is None else progress.bytes_read))
        self._finishing = phase in ("verifying", "committing")

    def _progress(self, progress: Progress) -> None:
        if self._gate_passed:
            self._post(AttemptProgress(self._action.attempt, progress.bytes_read))

    def _checkpoint(self, point: SlotResumePoint) -> None:
        log.debug("%d bytes are durable", point.offset)
        self._post(AttemptCheckpoint(self._action.attempt, ResumePoint(point.offset, point.sha256, point.entity_tag)))

    def _failure(self, error: Exception) -> AttemptFailed:
        number = self._action.attempt
        if isinstance(error, Refused):
            log.info("image refused: %s", error)
            return AttemptFailed(number, Stage.TRANSFER)
        if not isinstance(error, OtaError):
            log.error("installation failed in an unexpected way", exc_info=error)
            return AttemptFailed(number, Stage.TRANSFER if self._gate_passed else Stage.BEGIN, answered=self._answered)
        log.warning("attempt %d: %s", self._action.number, error)
        cause = self._source_failure() if error.status == SOURCE_FAILED else None
        if cause is not None:
            return AttemptFailed(number, cause.stage, answered=self._answered, said=cause.said)
        return AttemptFailed(
            number,
            self._stage(error),
            self._esp_err(error),
            self._errno(error),
            self._answered or (error.stage == "source" and not _UNANSWERED.match(error.status)),
        )

    def _esp_err(self, error: OtaError) -> int:
        """The code the firmware's client reports."""
        if error.status == "ERR_HTTP_URL":
            scheme, found, _ = self._action.url.partition("://")
            other = bool(found) and scheme.lower() not in ("http", "https")
            return EspErr.HTTP_INVALID_TRANSPORT if other else EspErr.FAIL
        return EspErr.FAIL if error.status == "ERR_HTTP_NO_RESPONSE" else error.esp_err

    def _errno(self, error: OtaError) -> int:
        if _HTTP_CODES.match(error.status):
            return 0
        if error.status == "ERR_HTTP_CONNECT_TIMEOUT":
            return error.device_code or errno.ETIMEDOUT
        return max(error.device_code, 0)

    def _stage(self, error: OtaError) -> Stage:
        """What of the firmware's flow an error of the engine belongs to (specification, section 4.2)."""
        match error.status, error.stage:
            case (("ERR_IMAGE_CHIP" | "ERR_IMAGE_REVISION"), _):
                return Stage.CHIP
            case (("ERR_IMAGE_MAGIC" | "ERR_IMAGE_FLASH_MODE"), _) if self._gate_passed:
                # The firmware notices with the first write; over MQTT, when it verifies the whole image.
                return Stage.TRANSFER if self._action.stream_id is None else Stage.VALIDATE
            case _, "header":
                return Stage.DESCRIPTION
            case _, _ if not self._gate_passed:
                return Stage.BEGIN
            case "ERR_INCOMPLETE", "source":
                return Stage.INCOMPLETE
            case _, ("source" | "transform"):
                return Stage.TRANSFER
            case _, "verify":
                return Stage.VALIDATE
            case _, "commit":
                return Stage.FINISH
        return Stage.FINISH if self._finishing else Stage.TRANSFER


def announced_md5(text: str | None) -> bytes | None:
    """An announced MD5 as 16 bytes; text that is none becomes a digest nothing matches."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9A-Fa-f]{32}", text) is None:
        log.warning("announced MD5 %.64r is not 32 hex digits", text)
        return _IMPOSSIBLE_MD5
    return bytes.fromhex(text)


def make_installation(
    action: StartAttempt,
    target: Target,
    slot: Slot,
    options: OtaSection,
    callbacks: Callbacks,
    *,
    source: ota_core.Source | None = None,
    batch_size: int = 0,
) -> Installation:
    """The real installation: HTTPS, or another source, through the engine into the target.

    Args:
        source: bytes that do not come from the action's URL.
        batch_size: bytes after which a position is kept, as nearly as sectors allow; 0: as the options say.
    """
    from rmaker_ota.install import HttpOptions, Installer, InstallOptions  # the engine: loaded with the first job
    from rmaker_ota.install import ResumePoint as SlotResumePoint

    if source is None and "://" not in action.url:
        raise ArgumentError("the URL of the image has no scheme", status="ERR_HTTP_URL", stage="source")
    kept = action.resume
    buffer_size = SMALL_BUFFER if slot.size <= SMALL_SLOT else LARGE_BUFFER
    checkpoint_bytes = options.ota_checkpoint_kib * 1024
    if batch_size:
        checkpoint_bytes = buffer_size = -(-batch_size // SECTOR) * SECTOR
    return Installer(
        action.url if source is None else source,
        target,
        slot=slot,
        options=InstallOptions(
            md5=announced_md5(action.md5),
            size=action.size or None,
            compute_sha256=False,
            header_size=action.header_size,
            read_back=options.ota_read_back,
            progress_interval_s=0.25,
            checkpoint_bytes=checkpoint_bytes,
            checkpoint_s=options.ota_checkpoint_s,
            buffer_size=buffer_size,
            resume=None if kept is None else SlotResumePoint(kept.offset, kept.sha256, kept.entity_tag),
        ),
        http=HttpOptions(
            ca_pem=action.server_cert,
            proxy=options.http_proxy,
            allow_http=action.allow_http,
            skip_common_name_check=action.skip_common_name_check,
            connect_timeout_s=options.http_connect_timeout_s,
            stall_timeout_s=options.http_stall_timeout_s,
            deadline_s=options.http_deadline_s,
            max_bytes_per_s=options.http_max_bytes_per_s,
            receive_buffer=options.http_rx_buffer_size or 0,
        ),
        header_gate=callbacks.header_gate,
        on_phase=callbacks.on_phase,
        on_progress=callbacks.on_progress,
        on_checkpoint=callbacks.on_checkpoint,
    )
