"""`rmaker_ota.install` and its options, as a program calls it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota.errors import ArgumentError, DeviceError, DigestError, NotResumableError
from rmaker_ota.install import HttpOptions, InstallOptions, ResumePoint, install
from tests.sim import https_server as sim

IMAGE = bytes(range(256)) * 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", -1),
        ("size", 1 << 63),
        ("size", "5"),
        ("max_image_size", -1),
        ("header_size", -1),
        ("buffer_size", 1 << 40),
        ("buffer_count", -1),
        ("checkpoint_bytes", -1),
    ],
)
def test_a_number_the_engine_cannot_take_is_named(tmp_path: Path, name: str, value: Any) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ArgumentError, match=f"{name} is {value!r}"):
        install(IMAGE, f"file:{tmp_path}/slot", options=InstallOptions(**wrong))
    assert list(tmp_path.iterdir()) == []


def test_wrong_numbers_of_resume_and_http_are_named(tmp_path: Path) -> None:
    target = f"file:{tmp_path}/slot"
    with pytest.raises(ArgumentError, match="resume offset is -4096"):
        install(IMAGE, target, options=InstallOptions(resume=ResumePoint(-4096, bytes(32))))
    with pytest.raises(ArgumentError, match="max_redirects is -1"):
        install(IMAGE, target, http=HttpOptions(max_redirects=-1))


@pytest.mark.parametrize("is_announced", [True, False])
def test_without_entity_tag_and_digest_a_changed_file_is_never_half_taken(tmp_path: Path, is_announced: bool) -> None:
    slot = tmp_path / "slot"
    slot.write_bytes(IMAGE)
    point = ResumePoint(4096, hashlib.sha256(IMAGE[:4096]).digest())
    options = InstallOptions(sha256=hashlib.sha256(IMAGE).digest() if is_announced else None, resume=point)
    with sim.HttpsServer([sim.serve(IMAGE[::-1], etag=None)]) as server:
        http = HttpOptions(ca_pem=sim.authority().ca_pem.decode())
        with pytest.raises(DigestError if is_announced else NotResumableError):
            install(server.url(), f"file:{slot}", options=options, http=http)
    assert len(server.ranges) == is_announced
    assert is_announced or slot.read_bytes() == IMAGE


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("losetup") is None, reason="makes a loop device")
def test_a_read_only_device_is_told_as_one(tmp_path: Path) -> None:
    medium = tmp_path / "medium"
    medium.write_bytes(bytes(1 << 20))
    made = subprocess.run(
        ["losetup", "--read-only", "--find", "--show", medium], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        with pytest.raises(DeviceError, match="Read-only") as caught:
            install(IMAGE, f"file:{device}")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert caught.value.device_code == errno.EROFS
