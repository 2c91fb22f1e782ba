"""``rmaker-ota inspect FILE-or-TARGET``: what lies there, and which slot boots next and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rmaker_ota.cli import output
from rmaker_ota.cli.errors import ExitCode
from rmaker_ota.credentials import read_keys
from rmaker_ota.inspect import KINDS, inspect


def image_lines(found: dict[str, Any]) -> Iterator[str]:
    header, app, boot = found["header"], found["app"], found["bootloader"]
    if app:
        yield f"app           {app['project']} {app['version']}, secure version {app['secure_version']}"
        yield f"built         {app['built'] or 'reproducibly'}, ESP-IDF {app['idf_version']}"
    if boot:
        yield f"boot loader   version {boot['version']}, ESP-IDF {boot['idf_version']}, {boot['built'] or ''}"
    if header:
        newest = f" to {header['max_revision']}" if header["max_revision"] else " and above"
        yield f"chip          {header['chip'] or header['chip_id']}, revision {header['min_revision']}{newest}"
    yield f"image         {found['image_size']} bytes, {found['bytes_after']} behind it"
    for number, segment in enumerate(found["segments"]):
        place = "mapped" if segment["mapped"] else "RAM" if segment["load_addr"] else "padding"
        where = f"at {segment['offset']:#08x}, {segment['size']:>8} bytes -> {segment['load_addr']:#010x}"
        yield f"segment {number:<5} {where} {place}"
    for name, title in (("checksum", "checksum"), ("sha256", "SHA-256")):
        pair = found[name]
        if pair:
            value = f"{pair['stored']:#04x}" if isinstance(pair["stored"], int) else pair["stored"]
            yield f"{title:<13} {value} {'right' if pair['right'] else 'WRONG'}"


def table_lines(found: dict[str, Any]) -> Iterator[str]:
    if not found["partitions"]:
        return
    yield f"{'label':<16} {'type':<10} {'subtype':<12} {'offset':>10} {'size':>10}"
    for row in found["partitions"]:
        flags = " ".join(flag for flag in ("encrypted", "readonly") if row[flag])
        kind = f"{row['label']:<16} {row['type']:<10} {row['subtype']:<12}"
        yield f"{kind} {row['offset']:>#10x} {row['size']:>#10x} {flags}".rstrip()


def otadata_lines(found: dict[str, Any]) -> Iterator[str]:
    for number, entry in enumerate(found["entries"]):
        if entry["seq"] is None:
            yield f"otadata {number}     never written"
            continue
        damage = "" if entry["crc_right"] else ", CRC wrong"
        counts = "" if entry["counts"] else ", does not count"
        yield f"otadata {number}     sequence {entry['seq']} -> {entry['slot']}, {entry['state']}{damage}{counts}"


def chip_line(chip: dict[str, Any]) -> str:
    revision = f" revision {chip['chip_revision']}" if chip["chip_revision"] is not None else ""
    guard = "anti-rollback" if chip["anti_rollback"] else "rollback" if chip["rollback"] else "no rollback"
    runs = f"{chip['running']} runs" if chip["running"] else "switched off"
    return (
        f"chip          {chip['chip'] or 'unknown'}{revision}, secure version {chip['secure_version']}, {guard}; {runs}"
    )


def flash_lines(found: dict[str, Any]) -> Iterator[str]:
    if found["chip"]:
        yield chip_line(found["chip"])
    if found["bootloader"]:
        boot = found["bootloader"]
        damage = f": {boot['error']['message']}" if boot["error"] else ""
        yield f"boot loader   {boot['chip']}, {boot['image_size']} bytes at {boot['offset']:#x}{damage}"
    yield from table_lines(found)
    for slot in found["slots"]:
        app = slot["app"]
        what = f"{app['project']} {app['version']}, secure version {app['secure_version']}" if app else "no app"
        if slot["empty"]:
            what = "empty"
        elif slot["error"]:
            what += f"; does not boot: {slot['error']['message']}"
        yield f"{slot['slot']:<13} {what}"
    if found["otadata"]:
        yield from otadata_lines(found["otadata"])
    for part in found["nvs"]:
        yield from nvs_lines(part)
    if found["boot"]:
        yield f"boots next    {found['boot']['slot'] or 'nothing'}"
        for reason in found["boot"]["reasons"]:
            yield f"              {reason}"


def nvs_lines(found: dict[str, Any]) -> Iterator[str]:
    label = f" {found['label']}" if "label" in found else ""
    damaged = f", {found['damaged']} damaged" if found["damaged"] else ""
    encrypted = ", encrypted" if found["encrypted"] else ""
    yield f"NVS{label}: {found['pages']} pages, {len(found['items'])} items{damaged}{encrypted}"
    if found["credentials"]:
        yield from credentials_lines(found["credentials"])
    for item in found["items"]:
        yield f"  {item['namespace']}/{item['key']} ({item['type']}) = {item['value']}"


def credentials_lines(found: dict[str, Any]) -> Iterator[str]:
    for key, title in (("node_id", "node id"), ("mqtt_host", "MQTT host"), ("mqtt_cred_host", "credential host")):
        if found[key]:
            yield f"  {title:<17} {found[key]}"
    certificate, private_key = found["certificate"], found["private_key"]
    if certificate:
        name = f"{certificate['common_name']}, " if certificate["common_name"] else ""
        yield f"  certificate       {name}SHA-256 {certificate['sha256'] or 'none: not PEM'}"
    if private_key:
        yield f"  private key       {private_key['kind'] or 'not PEM'}, {private_key['size']} bytes, not shown"


def serial_lines(found: dict[str, Any]) -> Iterator[str]:
    chip, stub = found["chip"], found["stub"]
    revision = f" {chip['revision']}" if chip["revision"] else ""
    yield f"chip          {chip['title']}{revision}, MAC {chip['mac'] or 'unreadable'}"
    size = f"{found['size'] >> 10} KiB" + ("" if chip["flash_size_known"] else " assumed")
    yield f"flash         {size}" + (f", id {chip['flash_id']:06x}" if chip["flash_id"] else "")
    yield f"line          {chip['link']}" + (f", {chip['baud']} baud" if chip["baud"] else "")
    if stub["used"]:
        release = f" of release {stub['release']}" if stub["release"] else ""
        ran = ", left running by an earlier session" if stub["was_running"] else ""
        yield f"stub          {stub['used']}{release}, from {stub['origin']}{ran}"
    else:
        yield f"stub          none, the boot ROM alone; stubs: {stub['origin']}"
    for note in stub["notes"]:
        yield f"              {note}"
    for key, text in (
        ("secure_boot", "secure boot"),
        ("flash_encrypted", "flash encryption"),
        ("secure_download", "secure download mode"),
    ):
        if chip[key]:
            yield f"security      {text}"
    yield from table_lines(found)
    for slot in found["slots"]:
        app = slot["app"]
        what = f"{app['project']} {app['version']}, secure version {app['secure_version']}" if app else "no app"
        yield f"{slot['slot']:<13} {what}{'; runs' if slot['runs'] else ''}"
    if found["otadata"]:
        yield from otadata_lines(found["otadata"])
    if found["boot"]:
        yield f"boots next    {found['boot']['slot'] or 'nothing'}"
        for reason in found["boot"]["reasons"]:
            yield f"              {reason}"


LINES = {
    "chip": serial_lines,
    "image": image_lines,
    "partition-table": table_lines,
    "otadata": otadata_lines,
    "nvs": nvs_lines,
    "flash": flash_lines,
}


@click.command("inspect")
@click.argument("where", metavar="FILE-or-TARGET")
@click.option("--kind", type=click.Choice(KINDS), help="What it is.  [default: found out]")
@click.option(
    "--nvs-keys",
    "keys_path",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Keys of encrypted NVS partitions: a dump of nvs_keys, the 64 bytes alone, or an HMAC key of 32 bytes.",
)
@output.json_option
def command(where: str, *, kind: str | None, keys_path: Path | None, as_json: bool) -> int:
    """Show what lies in FILE-or-TARGET. Nothing is changed; a chip at esp32-serial:PORT is restarted.

    An app or boot loader image: descriptor, segments, checksum and hash. A partition table, otadata, an NVS partition
    (secrets masked, a node's credentials named), or a whole flash image: all of these, and which slot boots next and
    why. The exit code is 1 when something in it is damaged.
    """
    found = inspect(where, kind=kind, nvs_keys=None if keys_path is None else read_keys(keys_path))
    damage = found.get("error")
    if as_json:
        output.print_json(found)
    else:
        output.say(f"{found['path']}: {found['kind']}, {found['size']} bytes")
        for line in LINES[found["kind"]](found):
            output.say(line)
        if damage:
            output.say(f"damaged       {damage['message']} ({damage['name']}, at byte {damage['offset']})")
    return ExitCode.FAILED if damage else ExitCode.DONE
