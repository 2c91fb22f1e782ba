"""Images: import, digests, app descriptor, interruption; and the URLs that open them."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from rmaker_ota.cloud.images import UNFINISHED, ImageStore, describe_head
from rmaker_ota.cloud.links import LinkCheck, Links, load_secret
from rmaker_ota.cloud.store import Store
from rmaker_ota.errors import ArgumentError, NotFoundError, StateError
from tests.python.cloud_parts import START, Clock, esp_head, esp_image


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", Store(":memory:"), clock=Clock())


def test_import_computes_everything_whatever_the_slices(images: ImageStore, tmp_path: Path) -> None:
    content = esp_image(5000, version="3.1.4", project="lamp", chip_id=13, secure_version=2)
    source = tmp_path / "lamp.bin"
    source.write_bytes(content)
    image = images.import_file(source)
    assert images.path(image.sha256).read_bytes() == content
    assert (image.size, image.name, image.imported_at) == (5000, "lamp.bin", START)
    assert image.sha256 == hashlib.sha256(content).hexdigest()
    assert image.md5 == hashlib.md5(content).hexdigest()
    assert (image.project, image.version, image.secure_version, image.chip_id) == ("lamp", "3.1.4", 2, 13)
    for step in (1, 7, 288, 4999):
        with images.begin("again") as writer:
            for at in range(0, len(content), step):
                writer.write(content[at : at + step])
            assert writer.commit() == image


def test_what_is_no_esp_image_is_kept_without_a_description(images: ImageStore) -> None:
    for content in (b"x", b"\x1f\x8b" + bytes(1000), esp_image(300)[:287], b"\xe9" + bytes(999)):
        with images.begin("other") as writer:
            writer.write(content)
            image = writer.commit()
        assert (image.size, image.project, image.version, image.chip_id) == (len(content), None, None, None)


def test_an_empty_image_is_refused(images: ImageStore) -> None:
    with images.begin("none.bin") as writer, pytest.raises(ArgumentError, match=r"none\.bin: the image is empty"):
        writer.commit()


def test_an_import_that_is_not_committed_leaves_nothing(images: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), images.begin("app.bin") as writer:
        writer.write(b"abc")
        raise RuntimeError
    assert list((tmp_path / "images").iterdir()) == []


def test_what_a_killed_import_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / (UNFINISHED + "abc")).write_bytes(b"half an image")
    (directory / "0.bin").write_bytes(b"an image")
    ImageStore(directory, Store(":memory:"))
    assert list(directory.iterdir()) == [directory / "0.bin"]


def test_unknown_images_are_named(images: ImageStore) -> None:
    with pytest.raises(NotFoundError, match="abc"):
        images.require("abc")


def test_descriptor_strings_end_at_the_first_nul_and_need_none() -> None:
    head = bytearray(esp_head(version="v" * 32, project="p"))
    description = describe_head(bytes(head))
    assert description is not None
    assert (description.version, description.project_name) == ("v" * 32, "p")
    head[48] = 0xFF
    description = describe_head(bytes(head))
    assert description is not None
    assert description.version == "\\xff" + "v" * 31


class TestLinks:
    SHA256 = "ab" * 32

    @staticmethod
    def parts(url: str) -> tuple[str, str, str]:
        path, _, query = url.removeprefix("https://h").partition("?")
        expires, signature = query.split("&")
        return path, expires.removeprefix("expires="), signature.removeprefix("sig=")

    def make(self, clock: Clock) -> Links:
        links = Links(b"s" * 32, ttl_s=100, clock=clock)
        links.base = "https://h"
        return links

    def test_a_url_is_good_until_it_expires(self) -> None:
        clock = Clock()
        links = self.make(clock)
        parts = self.parts(links.image_url(self.SHA256))
        assert parts[:2] == (f"/images/{self.SHA256}", str(int(START) + 100))
        assert links.check(*parts) is LinkCheck.GOOD
        clock.now += 99.9
        assert links.check(*parts) is LinkCheck.GOOD
        clock.now += 0.1
        assert links.check(*parts) is LinkCheck.EXPIRED

    def test_every_change_of_any_character_is_noticed(self) -> None:
        links = self.make(Clock())
        parts = self.parts(links.image_url(self.SHA256))
        for field in range(3):
            for at in range(len(parts[field])):
                changed = list(parts)
                text = changed[field]
                changed[field] = text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]
                assert links.check(*changed) is LinkCheck.FORGED

    @pytest.mark.parametrize("expires", ["", "-1", "1e9", " 1", "\u0661", "9" * 13, "\ud800", "ä"])
    def test_strange_times_are_forged(self, expires: str) -> None:
        links = self.make(Clock())
        assert links.check("/images/x", expires, links._sign("/images/x", expires)) is LinkCheck.FORGED
        assert links.check("/images/x", expires, expires) is LinkCheck.FORGED

    def test_another_secret_makes_other_urls(self) -> None:
        clock = Clock()
        other = Links(b"t" * 32, ttl_s=100, clock=clock)
        assert other.check(*self.parts(self.make(clock).image_url(self.SHA256))) is LinkCheck.FORGED

    def test_the_secret_is_made_once_private_and_long_enough(self, tmp_path: Path) -> None:
        path = tmp_path / "url.key"
        secret = load_secret(path)
        assert len(secret) == 32
        assert load_secret(path) == secret
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.write_bytes(b"short")
        with pytest.raises(StateError, match=r"url\.key: damaged"):
            load_secret(path)
