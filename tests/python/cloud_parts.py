"""Parts the job service's tests share: a clock that stands still, images, a job service whose broker is a list."""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmaker_ota.cloud.ca import CertificateAuthority
from rmaker_ota.cloud.config import CloudConfig, parse_config
from rmaker_ota.cloud.images import ImageStore
from rmaker_ota.cloud.jobs import JobService
from rmaker_ota.cloud.links import Links
from rmaker_ota.cloud.store import HistoryEntry, Store

START = 1_767_225_600.0  # 2026-01-01


class Clock:
    """Unix seconds that pass only when told."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def esp_head(version: str = "2.0.0", project: str = "gw", *, chip_id: int = 5, secure_version: int = 7) -> bytes:
    """The first 288 bytes of an ESP app image."""
    header = struct.pack("<BBBBI", 0xE9, 1, 2, 0x20, 0x4037_0000) + b"\xee\0\0\0" + struct.pack("<H", chip_id)
    description = struct.pack("<II8x32s32s", 0xABCD5432, secure_version, version.encode(), project.encode())
    return (header.ljust(24, b"\0") + bytes(8) + description).ljust(288, b"\0")


def esp_image(size: int = 65536, **head: Any) -> bytes:
    """Bytes that begin like an ESP app image; nothing else of them is checked here."""
    return esp_head(**head) + bytes(i * 31 & 0xFF for i in range(size - 288))


@dataclass
class Cloud:
    """A job service on a database in memory. ``sent`` holds what it published; ``online`` is whether it can."""

    directory: Path
    clock: Clock = field(default_factory=Clock)
    online: bool = True
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    seen: list[HistoryEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(":memory:")
        self.images = ImageStore(self.directory / "images", self.store, clock=self.clock)
        self.links = Links(b"k" * 32, ttl_s=3600, clock=self.clock)
        self.links.base = "https://ota.test:8443"
        self.jobs = JobService(
            self.store, self.images, self.links, publish=self._publish, clock=self.clock, on_change=self.seen.append
        )

    def add_image(self, content: bytes | None = None) -> str:
        with self.images.begin("app.bin") as writer:
            writer.write(esp_image() if content is None else content)
            return writer.commit().sha256

    def fetch(self, node: str = "N1", version: str = "1.0.0") -> bool:
        self.clock.now += 1
        return self.jobs.on_fetch(node, json.dumps({"node_id": node, "fw_version": version}).encode())

    def report(self, job: str, status: str, info: str = "", node: str = "N1", ts: int | None = None) -> str:
        """Sends a report; returns what became of it and where the node stands: ``"applied in-progress"``."""
        self.clock.now += 1
        fields = {"ota_job_id": job, "status": status, "additional_info": info, "ts": ts or int(self.clock.now)}
        entry = self.jobs.on_status(node, json.dumps(fields).encode())
        return "dropped" if entry is None else f"{entry.verdict} {entry.state}"

    def configured(self, *services: dict[str, Any], node: str = "N1") -> None:
        """A node says which services it has."""
        fields = {"node_id": node, "info": {"fw_version": "1.0.0"}, "devices": [], "services": list(services)}
        assert self.jobs.on_config(node, json.dumps(fields).encode())

    def params(self, node: str = "N1", **values: object) -> str:
        """A report of the OTA service's parameters; returns what became of it."""
        self.clock.now += 1
        entry = self.jobs.on_params(node, json.dumps({"OTA": values}).encode())
        return "nothing" if entry is None else f"{entry.verdict} {entry.state}"

    def starts(self, status: str = "", info: str = "", node: str = "N1") -> bool:
        """A node's initial report; returns whether a job was offered."""
        self.clock.now += 1
        values = {"Lamp": {"Power": True}, "OTA": {"Status": status, "Info": info, "URL": ""}}
        return self.jobs.on_params_init(node, json.dumps(values).encode())

    def state(self, job: str, node: str = "N1") -> str:
        row = self.store.job_node(job, node)
        assert row is not None
        return row.state.value

    def _publish(self, topic: str, payload: bytes) -> bool:
        if self.online:
            self.sent.append((topic, json.loads(payload)))
            self.raw.append(payload)
        return self.online


def free_port() -> int:
    """A loopback TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def service_config(directory: Path, *, more: str = "", mqtt: str = "") -> CloudConfig:
    """Settings of a service on loopback with certificates of its own; without ``mqtt`` its broker is not there."""
    if not (directory / "ca.crt").exists():
        authority = CertificateAuthority.create(directory)
        authority.issue_server(["localhost", "127.0.0.1"], directory / "server.crt", directory / "server.key")
    text = f"""
        [http]
        port = 0
        cert = "server.crt"
        key = "server.key"
        url_ttl_s = 3600
        [mqtt]
        {mqtt or f'host = "127.0.0.1"{chr(10)}port = {free_port()}{chr(10)}allow_plain = true'}
        {more}
    """
    return parse_config(text, path=directory / "cloud.toml")
