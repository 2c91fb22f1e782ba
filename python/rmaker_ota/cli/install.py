"""``rmaker-ota install SOURCE TARGET``: one image into one target."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import click

from rmaker_ota.cli import errors, output
from rmaker_ota.errors import ConfigError, NotResumableError, OtaError, TargetError
from rmaker_ota.esp_err import esp_err_name
from rmaker_ota.install import (
    HttpOptions,
    ImageHeader,
    ImagePolicy,
    Installer,
    InstallOptions,
    InstallResult,
    Phase,
    Progress,
    ResumePoint,
)
from rmaker_ota.targets import open_target
from rmaker_ota.targets.base import Slot, Target

if TYPE_CHECKING:
    from pathlib import Path

RESUME_UNIT = 4096  # checkpoints lie on whole blocks and sectors
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class HexDigest(click.ParamType[bytes]):
    """A digest in hex, of a fixed number of bytes."""

    name = "hex"

    def __init__(self, len_bytes: int) -> None:
        self.len_bytes = len_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            digest = bytes.fromhex(value)
        except ValueError:
            self.fail(f"{value!r} is not hex", param, ctx)
        if len(digest) != self.len_bytes:
            self.fail(f"{2 * self.len_bytes} hex digits expected, found {len(value)}", param, ctx)
        return digest


class ByteCount(click.ParamType[int]):
    """A number of bytes; K, M and G behind it are powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("ib").removesuffix("b")
        unit = text[-1:] if text[-1:] in UNITS else ""
        try:
            count = float(text[: len(text) - len(unit)]) * UNITS[unit]
        except ValueError:
            self.fail(f"{value!r} is no number of bytes (examples: 1048576, 512K, 1.5M)", param, ctx)
        if not 1 <= count < 1 << 63 or count != int(count):
            self.fail(f"{value!r} is no whole number of bytes above 0", param, ctx)
        return int(count)


SECONDS = click.FloatRange(min=0, min_open=True, max=31_536_000)


class ResumeFile:
    """How far an installation came, kept in a file: ``--resume FILE``.

    It is written after the bytes it speaks of are on the medium, replaced by rename, and removed when the image is
    installed. The record counts only for the same source, target and slot; the query of a URL, which may hold a secret
    and changes with every signature, is not kept. A local file that was changed in between is another source: it has
    no entity tag that would tell.
    """

    def __init__(self, path: Path, source: str, target: str, slot: str) -> None:
        self.path = path
        is_url = source.lower().startswith(("http:", "https:"))
        self._identity: dict[str, object] = {
            "source": source.partition("?")[0] if is_url else source,
            "source_file": None if is_url else self._facts(source),
            "target": target,
            "slot": slot,
        }

    @staticmethod
    def _facts(source: str) -> list[int] | None:
        from pathlib import Path

        try:
            status = Path(source).stat()
        except OSError:
            return None  # the source says what is wrong with it
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]

    def load(self) -> ResumePoint | None:
        """Where to go on; None to begin at the start.

        Raises:
            ConfigError: the file is there and is no resume record.
        """
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            point = ResumePoint(record["offset"], bytes.fromhex(record["sha256"]), record["entity_tag"])
            if type(point.offset) is not int or not 0 <= point.offset < 1 << 63 or point.offset % RESUME_UNIT != 0:
                raise ValueError(f"offset is {point.offset!r}")
            if len(point.sha256) != 32:
                raise ValueError(f"sha256 has {len(point.sha256)} bytes")
            if not isinstance(point.entity_tag, str):
                raise TypeError(f"entity_tag is {point.entity_tag!r}")
            identity = {key: record.get(key) for key in self._identity}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise ConfigError(
                f"{self.path} is no resume record ({exc!r}); remove it to start from the beginning"
            ) from exc
        return point if identity == self._identity and point.offset > 0 else None

    def save(self, point: ResumePoint) -> None:
        """Keeps a checkpoint, on the medium when it returns."""
        record = {
            **self._identity,
            "offset": point.offset,
            "sha256": point.sha256.hex(),
            "entity_tag": point.entity_tag,
        }
        temporary = self.path.with_name(f".{self.path.name}.new")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)
        self._sync_directory()

    def clear(self) -> None:
        """Forgets it: the image is installed."""
        if self.path.exists():
            self.path.unlink()
            self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def resume_file(path: str, source: str, target: str, slot: str) -> ResumeFile:
    from pathlib import Path  # 4 ms of imports that most installations do without

    if not Path(path).parent.is_dir():
        raise ConfigError(f"--resume {path}: there is no such directory to keep the file in")
    return ResumeFile(Path(path), source, target, slot)


def report(
    status: str,
    *,
    slot: Slot | None,
    header: ImageHeader | None,
    result: InstallResult | None,
    progress: Progress | None,
    seconds: float,
    error: BaseException | None,
) -> dict[str, Any]:
    """The object `--json` prints."""
    description = header.description if header else None
    counts = result or progress
    written = counts.bytes_written if counts else 0
    if counts is progress and progress is not None:  # its count has those that were left alone too
        written -= progress.bytes_skipped
    failure = None
    if error is not None:
        failure = {
            "name": esp_err_name(error.esp_err) if isinstance(error, OtaError) else "ESP_FAIL",
            "stage": error.stage if isinstance(error, OtaError) else "none",
            "offset": error.offset if isinstance(error, OtaError) else 0,
            "message": errors.describe(error),
        }
    return {
        "status": status,
        "slot": (result.slot if result else None) or (slot.name if slot else None),
        "project": result.project if result else description.project_name if description else None,
        "version": result.version if result else description.version if description else None,
        "bytes_read": counts.bytes_read if counts else 0,
        "bytes_written": max(written, 0),
        "bytes_skipped": counts.bytes_skipped if counts else 0,
        "sha256": result.sha256.hex() if result and result.sha256 else None,
        "md5": result.md5.hex() if result and result.md5 else None,
        "seconds": round(result.seconds if result else seconds, 6),
        "error": failure,
    }


def summary(result: InstallResult, target: Target, *, left_alone: bool) -> str:
    """What a person reads at the end."""
    what = " ".join(part for part in (result.project, result.version) if part) or "the image"
    where = target.uri if target.uri.endswith(f":{result.slot}") else f"{result.slot} of {target.uri}"
    parts = [f"{output.mib(result.bytes_read)} read", f"{output.mib(result.bytes_written)} written"]
    if result.bytes_skipped:
        parts.append(f"{output.mib(result.bytes_skipped)} were there already")
    if result.resumed_from:
        parts.append(f"resumed at {output.mib(result.resumed_from)}")
    rate = f"{output.mib(result.bytes_read / result.seconds)}/s" if result.seconds > 0 else ""
    lines = [f"installed {what} into {where}: {', '.join(parts)}, {result.seconds:.2f} s, {rate}"]
    if result.sha256:
        lines.append(f"SHA-256 {result.sha256.hex()}")
    if result.md5:
        lines.append(f"MD5 {result.md5.hex()}")
    if left_alone:
        lines.append(f"{result.slot} was not activated: what booted before boots next")
    return "\n".join(lines)


def confirm(target: Target, slot: str) -> str:
    """Restarts into the new image and confirms it when its console is well; what to tell of that.

    Raises:
        TargetError: it was not well; the image before runs again.
    """
    boot = target.restart()
    if boot.slot is None or boot.slot.name != slot:
        runs = f"{boot.slot.name} runs again" if boot.slot else "nothing boots"
        why = next((reason for reason in boot.reasons if reason.startswith("the console")), boot.reasons[-1])
        raise TargetError(f"the image in {slot} was rolled back: {why}; {runs}", stage="target")
    target.mark_valid()
    well = next((reason for reason in boot.reasons if reason.startswith("the console")), "it runs")
    return f"{slot} runs and is confirmed: {well}"


@click.command("install")
@click.argument("source")
@click.argument("target")
@click.option("--sha256", type=HexDigest(32), metavar="HEX", help="Expected SHA-256 of the file as served.")
@click.option("--md5", type=HexDigest(16), metavar="HEX", help="Expected MD5 of the file as served.")
@click.option("--size", type=ByteCount(), help="Expected size of the file as served.")
@click.option(
    "--transform",
    type=click.Choice(["auto", "none", "gzip", "zlib", "zstd", "xz"]),
    default="auto",
    show_default=True,
    help="How the file is packed.",
)
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="CA certificates to trust (PEM).")
@click.option("--cert", type=click.Path(exists=True, dir_okay=False), help="Client certificate (PEM).")
@click.option("--key", type=click.Path(exists=True, dir_okay=False), help="Key of the client certificate (PEM).")
@click.option("--proxy", metavar="URL", help="Proxy to use; '' for none.  [default: from the environment]")
@click.option("--allow-http", is_flag=True, help="Accept a plain http URL.")
@click.option("--connect-timeout", type=SECONDS, default=5.0, show_default=True, metavar="S", help="Time to connect.")
@click.option(
    "--stall-timeout", type=SECONDS, default=60.0, show_default=True, metavar="S", help="Longest wait without a byte."
)
@click.option("--deadline", type=SECONDS, metavar="S", help="Time for the whole download.  [default: none]")
@click.option("--limit-rate", type=ByteCount(), help="Bytes per second to take at most.")
@click.option(
    "--resume",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Go on from, and keep checkpoints in, FILE.",
)
@click.option("--read-back", is_flag=True, help="Read the slot back and compare before it is activated.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0, min_open=True, max=3600),
    metavar="S",
    help="Restart the chip, listen to its console so long, then confirm the image or roll back.",
)
@click.option("--expect", metavar="REGEX", help="With --watch: a line that says all is well.  [default: no crash]")
@click.option("--no-activate", is_flag=True, help="Write and verify; leave the boot choice as it is.")
@click.option("--skip-version-check", is_flag=True, help="Accept the version that runs.")
@click.option("--skip-project-check", is_flag=True, help="Accept another project.")
@click.option("--skip-secure-version-check", is_flag=True, help="Accept a smaller secure version.")
@output.json_option
def command(
    source: str,
    target: str,
    *,
    sha256: bytes | None,
    md5: bytes | None,
    size: int | None,
    transform: str,
    ca: str | None,
    cert: str | None,
    key: str | None,
    proxy: str | None,
    allow_http: bool,
    connect_timeout: float,
    stall_timeout: float,
    deadline: float | None,
    limit_rate: int | None,
    resume: str | None,
    read_back: bool,
    watch: float | None,
    expect: str | None,
    no_activate: bool,
    skip_version_check: bool,
    skip_project_check: bool,
    skip_secure_version_check: bool,
    as_json: bool,
) -> None:
    """Install the image SOURCE into TARGET.

    SOURCE is an https URL, a path, or - for standard input. TARGET is file:PATH, esp32-image:PATH or esp32-serial:PORT.
    Nothing is written before the image's header was checked, and nothing boots that was not verified.
    """
    if source.lower().startswith("http:") and not allow_http:
        raise click.UsageError("a plain http URL is not protected; use https, or say --allow-http")
    if (cert is None) != (key is None):
        raise click.UsageError("--cert and --key belong together")
    if expect is not None and watch is None:
        raise click.UsageError("--expect needs --watch")
    if watch is not None and no_activate:
        raise click.UsageError("--watch restarts into the image, which --no-activate leaves alone")
    if resume is not None and source == "-":
        raise click.UsageError("--resume needs a source that can be read again, not -")
    http = HttpOptions(
        ca_file=ca,
        client_cert_file=cert,
        client_key_file=key,
        proxy=proxy,
        allow_http=allow_http,
        connect_timeout_s=connect_timeout,
        stall_timeout_s=stall_timeout,
        deadline_s=deadline or 0,
        max_bytes_per_s=limit_rate or 0,
    )
    started = time.monotonic()
    slot: Slot | None = None
    seen: list[ImageHeader] = []
    installer: Installer | None = None
    try:
        with (
            open_target(target, watch_s=watch, expect=expect) as place,
            output.Progress("install", quiet=as_json) as progress,
        ):
            slot = place.next_slot()
            record = resume_file(resume, source, place.uri, slot.name) if resume else None
            policy = ImagePolicy(
                place,
                skip_project=skip_project_check,
                skip_version=skip_version_check,
                skip_secure_version=skip_secure_version_check,
            )

            def gate(header: ImageHeader) -> None:
                seen.append(header)
                policy(header)

            def show_phase(phase: Phase) -> None:
                if phase is Phase.RECEIVING and seen and seen[-1].description:
                    new = seen[-1].description
                    progress.note(f"install: {new.project_name} {new.version} into {slot.name if slot else target}")

            def attempt(point: ResumePoint | None) -> InstallResult:
                nonlocal installer
                options = InstallOptions(
                    sha256=sha256,
                    md5=md5,
                    size=size,
                    transform=transform,
                    activate=not no_activate,
                    read_back=read_back,
                    resume=point,
                )
                installer = Installer(
                    source,
                    place,
                    slot=slot,
                    options=options,
                    http=http,
                    header_gate=gate,
                    on_phase=show_phase,
                    on_progress=lambda now: progress.update(now.bytes_read, now.bytes_total),
                    on_checkpoint=record.save if record else None,
                )
                with errors.on_interrupt(installer.cancel):
                    installer.start()
                    return installer.result()

            point = record.load() if record else None
            try:
                result = attempt(point)
            except NotResumableError as exc:
                if point is None:
                    raise
                progress.note(f"install: cannot go on at {output.mib(point.offset)}, starting over: {exc.message}")
                result = attempt(None)
            if record:
                record.clear()
            text = summary(result, place, left_alone=no_activate and place.running_slot() is not None)
            if watch is not None:
                text += f"\n{confirm(place, result.slot)}"
    except (OtaError, OSError, KeyboardInterrupt) as exc:
        if as_json and errors.exit_code(exc) != errors.ExitCode.USAGE:
            refused = errors.exit_code(exc) == errors.ExitCode.REJECTED
            output.print_json(
                report(
                    "rejected" if refused else "failed",
                    slot=slot,
                    header=seen[-1] if seen else None,
                    result=None,
                    progress=installer.progress() if installer else None,
                    seconds=time.monotonic() - started,
                    error=exc,
                )
            )
        raise
    if as_json:
        output.print_json(
            report(
                "success",
                slot=slot,
                header=seen[-1] if seen else None,
                result=result,
                progress=None,
                seconds=0,
                error=None,
            )
        )
    else:
        output.say(text)
