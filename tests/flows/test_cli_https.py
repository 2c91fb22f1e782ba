"""``rmaker-ota install`` as a process of its own, over HTTPS, into files and flash images."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota.esp_build import build_image
from rmaker_ota.targets import open_target
from rmaker_ota.targets.create import create_flash_image
from tests.sim.https_server import (
    HttpsServer,
    announces,
    answers,
    authority,
    closes_early,
    corrupts,
    redirects,
    serve,
    stalls,
)

OLD = build_image(size=100_000, version="1.0.0", project_name="product")
NEW = build_image(size=300_000, version="2.0.0", project_name="product")
BODY = random.Random(2).randbytes(20 << 20)


@pytest.fixture
def chip(tmp_path: Path) -> Path:
    """A chip that runs 1.0.0: switched on once, so that its boot loader has written what it writes at first use."""
    path = tmp_path / "chip.bin"
    create_flash_image(path, OLD)
    assert boots(path) == "1.0.0"
    return path


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority().ca_pem)
    return path


def start(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rmaker_ota", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: object) -> tuple[int, str, str]:
    with start(*args) as child:
        out, err = child.communicate(timeout=100)
    assert "Traceback" not in err
    return child.returncode, out, err


def install(*args: object) -> tuple[int, dict[str, Any], str]:
    code, out, err = run("install", *args, "--json")
    assert len(out.splitlines()) == 1
    return code, json.loads(out), err


def boots(chip: Path) -> str:
    """Version that a restart would start."""
    with open_target(f"esp32-image:{chip}") as target:
        slot = target.restart().slot
        assert slot is not None
        found = target.describe(slot)
        assert found is not None
        return found.version


def test_update_confirm_and_go_back_from_the_shell(chip: Path, ca: Path) -> None:
    where = f"esp32-image:{chip}"
    with HttpsServer([serve(NEW)]) as server:
        code, answer, _ = install(
            server.url("/app.bin"), where, "--ca", ca, "--sha256", hashlib.sha256(NEW).hexdigest()
        )
        assert (code, answer["status"], answer["slot"]) == (0, "success", "ota_1")
        assert (answer["project"], answer["version"], answer["bytes_read"]) == ("product", "2.0.0", len(NEW))

        code, out, _ = run("boot", where, "--json")
        assert (code, json.loads(out)["slot"], json.loads(out)["version"]) == (0, "ota_1", "2.0.0")

        code, refused, err = install(server.url("/app.bin"), where, "--ca", ca)
        assert (code, refused["status"]) == (1, "failed"), err
        assert refused["error"]["name"] == "ESP_ERR_OTA_ROLLBACK_INVALID_STATE"

        assert run("mark-valid", where)[:2] == (0, "ota_1: valid\n")
        code, refused, _ = install(server.url("/app.bin"), where, "--ca", ca)
        assert (code, refused["status"], refused["bytes_written"]) == (3, "rejected", 0)
        assert refused["error"]["stage"] == "header"

        code, out, _ = run("mark-invalid", where, "--json")
        assert (code, json.loads(out)) == (0, {"slot": "ota_1", "state": "invalid"})
        code, out, _ = run("boot", where)
        assert (code, out.splitlines()[-1]) == (0, "ota_0 boots: product 1.0.0")
        assert run("mark-invalid", where)[0] == 1


def test_an_unconfirmed_image_is_given_up_at_the_next_boot(chip: Path, tmp_path: Path) -> None:
    image = tmp_path / "new.bin"
    image.write_bytes(NEW)
    assert install(image, f"esp32-image:{chip}")[0] == 0
    assert [json.loads(run("boot", f"esp32-image:{chip}", "--json")[1])["slot"] for _ in range(3)] == [
        "ota_1",
        "ota_0",
        "ota_0",
    ]


def test_without_activation_the_old_image_boots(chip: Path, tmp_path: Path) -> None:
    image = tmp_path / "new.bin"
    image.write_bytes(NEW)
    code, out, _ = run("install", image, f"esp32-image:{chip}", "--no-activate")
    assert code == 0
    assert "not activated" in out
    assert boots(chip) == "1.0.0"


@pytest.mark.parametrize(
    ("image", "option"),
    [
        (build_image(size=200_000, version="2.0.0", project_name="other"), "--skip-project-check"),
        (build_image(size=200_000, version="1.0.0", project_name="product"), "--skip-version-check"),
    ],
)
def test_what_does_not_fit_is_rejected_unless_told_otherwise(
    chip: Path, tmp_path: Path, image: bytes, option: str
) -> None:
    path = tmp_path / "new.bin"
    path.write_bytes(image)
    before = chip.read_bytes()
    code, answer, _ = install(path, f"esp32-image:{chip}")
    assert (code, answer["status"]) == (3, "rejected")
    assert chip.read_bytes() == before
    assert install(path, f"esp32-image:{chip}", option)[0] == 0


def test_another_chip_is_rejected_before_anything_is_written(chip: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.bin"
    path.write_bytes(build_image(size=200_000, version="2.0.0", project_name="product", chip_id=9))
    before = chip.read_bytes()
    code, answer, err = install(path, f"esp32-image:{chip}")
    assert (code, answer["status"], answer["bytes_written"]) == (3, "rejected", 0)
    assert "ESP32-S3" in err
    assert chip.read_bytes() == before


def test_a_smaller_secure_version_is_rejected(tmp_path: Path) -> None:
    chip, image = tmp_path / "chip.bin", tmp_path / "new.bin"
    app = build_image(size=100_000, version="1.0.0", project_name="product", secure_version=2)
    create_flash_image(chip, app, anti_rollback=True, secure_version=2)
    image.write_bytes(build_image(size=200_000, version="2.0.0", project_name="product", secure_version=1))
    code, answer, _ = install(image, f"esp32-image:{chip}")
    assert (code, answer["status"], answer["error"]["name"]) == (3, "rejected", "ESP_ERR_OTA_SMALL_SEC_VER")


@pytest.mark.parametrize(
    ("behaviour", "stage"),
    [
        (answers(404), "source"),
        (answers(403), "source"),
        (answers(500), "source"),
        (closes_early(NEW, 0), "header"),
        (closes_early(NEW, 150_000), "source"),
        (announces(NEW, len(NEW) + 1), "source"),
        (corrupts(NEW, 200_000), "verify"),
        (serve(b"<html>sorry</html>" * 100), "header"),
        (serve(b"short"), "header"),
    ],
    ids=["404", "403", "500", "closed at once", "closed early", "announced too large", "corrupt", "html", "short"],
)
def test_whatever_the_server_does_the_old_image_boots(chip: Path, ca: Path, behaviour: Any, stage: str) -> None:
    with HttpsServer([behaviour]) as server:
        code, answer, err = install(server.url("/app.bin"), f"esp32-image:{chip}", "--ca", ca)
    assert (code, answer["status"], answer["error"]["stage"]) == (1, "failed", stage), err
    assert answer["error"]["message"] in err
    assert boots(chip) == "1.0.0"


@pytest.mark.parametrize("certificate", ["expired", "unknown_ca", "wrong_host"])
def test_a_certificate_that_is_not_right_is_refused(chip: Path, ca: Path, certificate: Any) -> None:
    with HttpsServer([serve(NEW)], certificate=certificate) as server:
        code, answer, _ = install(server.url("/app.bin"), f"esp32-image:{chip}", "--ca", ca)
        assert (code, answer["error"]["name"]) == (1, "ESP_ERR_HTTP_CONNECT")
        assert server.requests == []


def test_a_client_certificate_is_shown(chip: Path, ca: Path, tmp_path: Path) -> None:
    pair = tmp_path / "client.pem"
    leaf = authority().client
    pair.write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    with HttpsServer([serve(NEW)], client_certificate=True) as server:
        url = server.url("/app.bin")
        assert install(url, f"esp32-image:{chip}", "--ca", ca)[0] == 1
        assert install(url, f"esp32-image:{chip}", "--ca", ca, "--cert", pair, "--key", pair)[0] == 0
        assert "node" in server.client_subjects


def test_http_is_taken_only_when_asked_for_and_never_by_a_redirect(chip: Path, ca: Path) -> None:
    with HttpsServer([serve(NEW)], tls=False) as plain:
        code, out, err = run("install", plain.url("/app.bin"), f"esp32-image:{chip}", "--json")
        assert (code, out) == (2, "")
        assert "--allow-http" in err
        with HttpsServer([redirects(plain.url("/app.bin"))]) as server:
            code, answer, _ = install(server.url("/"), f"esp32-image:{chip}", "--ca", ca, "--allow-http")
            assert (code, answer["error"]["name"]) == (1, "ESP_ERR_HTTP_REDIRECT_DOWNGRADE")
        assert plain.requests == []
        assert install(plain.url("/app.bin"), f"esp32-image:{chip}", "--allow-http")[0] == 0


def test_a_download_that_was_cut_goes_on_where_it_was(tmp_path: Path, ca: Path) -> None:
    slot, record = tmp_path / "slot.bin", tmp_path / "resume.json"
    sha256 = hashlib.sha256(BODY).hexdigest()
    with HttpsServer([closes_early(BODY, 18 << 20), serve(BODY)]) as server:
        args = (server.url("/big.bin?token=secret"), f"file:{slot}", "--ca", ca, "--resume", record)
        code, answer, err = install(*args)
        assert (code, answer["error"]["stage"]) == (1, "source")
        assert "secret" not in err + json.dumps(answer) + record.read_text()
        code, answer, _ = install(*args, "--sha256", sha256)
        assert (code, answer["sha256"]) == (0, sha256)
        assert slot.read_bytes() == BODY
        asked = server.requests[-1].range
        assert asked is not None
        assert int(asked.removeprefix("bytes=").rstrip("-")) >= 8 << 20
        assert answer["bytes_read"] < len(BODY)
    assert not record.exists()


def test_a_slot_that_changed_in_between_is_written_from_the_start(tmp_path: Path, ca: Path) -> None:
    slot, record = tmp_path / "slot.bin", tmp_path / "resume.json"
    with HttpsServer([closes_early(BODY, 18 << 20), serve(BODY)]) as server:
        args = (server.url("/big.bin"), f"file:{slot}", "--ca", ca, "--resume", record)
        assert install(*args)[0] == 1
        with slot.open("r+b") as file:
            file.seek(1000)
            file.write(b"somebody else was here")
        code, out, _ = run("install", *args)
    assert code == 0
    assert "starting over" in out
    assert slot.read_bytes() == BODY


def test_another_file_on_the_server_is_taken_whole(tmp_path: Path, ca: Path) -> None:
    slot, record = tmp_path / "slot.bin", tmp_path / "resume.json"
    other = bytes(reversed(BODY))
    with HttpsServer([closes_early(BODY, 18 << 20), serve(other, '"v2"')]) as server:
        args = (server.url("/big.bin"), f"file:{slot}", "--ca", ca, "--resume", record)
        assert install(*args)[0] == 1
        assert install(*args)[0] == 0
    assert slot.read_bytes() == other


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_leaves_the_old_image(chip: Path, ca: Path, number: signal.Signals) -> None:
    with HttpsServer([stalls(NEW, 100_000)]) as server:
        with start("install", server.url("/app.bin"), f"esp32-image:{chip}", "--ca", ca, "--json") as child:
            server.wait_until_held()
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
        assert child.returncode == 130
        assert (json.loads(out)["status"], "Traceback" in err) == ("failed", False)
    assert boots(chip) == "1.0.0"


def test_a_stall_ends_after_its_time_out(chip: Path, ca: Path) -> None:
    with HttpsServer([stalls(NEW, 100_000)]) as server:
        code, answer, _ = install(server.url("/app.bin"), f"esp32-image:{chip}", "--ca", ca, "--stall-timeout", "0.2")
    assert (code, answer["error"]["name"]) == (1, "ESP_ERR_TIMEOUT")
    assert boots(chip) == "1.0.0"
