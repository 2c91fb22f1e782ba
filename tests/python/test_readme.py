"""What README.md and CONTRIBUTING.md show works: commands and their options, the configuration, the Python examples."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest

import rmaker_ota
from rmaker_ota.cli import COMMANDS, cli
from rmaker_ota.config import load_config
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets.base import BootState
from rmaker_ota.targets.create import create_flash_image
from tests.sim.https_server import authority
from tests.sim.node_world import World, good

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The indented blocks of a document."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("    ") or (not line and found[-1]):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [textwrap.dedent("\n".join(lines)).strip() + "\n" for lines in found if lines]


def block_with(text: str) -> str:
    matching = [block for block in blocks(README) if text in block]
    assert len(matching) == 1, f"{len(matching)} blocks with {text!r}"
    return matching[0]


def command_lines() -> list[list[str]]:
    lines = "\n".join(blocks(README)).replace("\\\n", " ").splitlines()
    return [shlex.split(line.rstrip(" &"), comments=True) for line in lines if line.startswith("rmaker-ota ")]


def test_every_command_line_of_the_readme_names_options_there_are() -> None:
    assert len(command_lines()) >= 8
    for _, *words in command_lines():
        command: click.Command = cli
        while words and isinstance(command, click.Group) and not words[0].startswith("-"):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None
            command = found
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            assert not word.startswith("--") or word in known, f"{command.name} has no {word}"


def test_the_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `([^|]+?)` *\|", README, re.MULTILINE) + re.findall(r", `(mark-invalid)", README)
    assert {row.split()[0] for row in rows} >= set(COMMANDS) - {"job"}
    assert "`job create`" in README


@pytest.mark.parametrize("document", [README, CONTRIBUTING])
def test_every_target_of_make_that_is_named_exists(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)|^    make ([a-z]+)", document, re.MULTILINE))
    targets = {first or second for first, second in named}
    assert targets
    assert targets <= rules


def test_the_configuration_is_accepted(tmp_path: Path) -> None:
    leaf = authority().client
    (tmp_path / "ca.pem").write_bytes(authority().ca_pem)
    (tmp_path / "node.pem").write_bytes(leaf.cert_chain_pems[0].bytes())
    (tmp_path / "node.key").write_bytes(leaf.private_key_pem.bytes())
    path = tmp_path / "node.toml"
    path.write_text(block_with("[restart]"))
    config = load_config(path)
    assert config.node.id == "gateway-17"
    assert config.target.uri == f"esp32-image:{tmp_path}/chip.bin"


def test_the_install_example_installs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    create_flash_image("chip.bin", build_image(version="1.0.0"))
    Path("app.bin").write_bytes(build_image(version="2.0.0", size=100_000))
    example = block_with("rmaker_ota.install(").replace("https://updates.example.org/app.bin", "app.bin")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ota_1 2.0.0 100000 ")


def test_the_node_example_names_what_there_is() -> None:
    tree = ast.parse(block_with("ota.Node.from_config"))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ota"
    }
    assert len(names) >= 6
    for name in names:
        assert hasattr(rmaker_ota, name), name
    assert rmaker_ota.OtaConfig(ota_cb=lambda handle, data: 0).ota_cb is not None
    assert callable(rmaker_ota.Node.run)


def test_the_example_of_a_device_works(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    try:
        node = world.power_on()
        exec(compile(block_with("node.add_device("), "README.md", "exec"), {"node": node})
        node.start()
        world.connect()
        assert world.transport.deliver("node/N1/params/remote", '{"Lamp":{"Power":true}}')
        world.settle()
        topic = "$aws/rules/esp_set_params/node/N1/params/local"
        assert world.published(topic) == [{"Lamp": {"Power": True}}]
    finally:
        world.stop()
    assert capsys.readouterr().out == "Lamp Power True\n"


def test_the_port_of_a_firmwares_code_does_what_the_original_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Both callbacks, over a refusal, an update, its diagnostics and a verdict that comes later."""
    code = compile(block_with("def site_ota_cb"), "README.md", "exec")
    works = [True]
    names: dict[str, Any] = {"sensors_work": lambda: works[0]}
    exec(code, names)
    world = World()
    try:
        world.power_on().start()
        names["site_ota_start"]()
        world.connect()
        world.deliver_job(file_size=1048577)
        assert world.statuses() == [("rejected", "Too large for this site")]
        world.scripts += [good("1.0.0"), good("2.0.0")]
        world.deliver_job("J2", fw_version="1.0.0")
        assert world.statuses()[-1] == ("rejected", "Same version received")
        assert capsys.readouterr().out == "Job J2 brings 1.0.0\nNot installed: ESP_FAIL\n"
        world.deliver_job("J3", fw_version="2.0.0")
        world.advance(10)
        assert world.restart_reasons == ["new firmware"]

        world.power_on().start()
        names["site_ota_start"]()
        world.connect()
        assert world.chip.states["ota_1"] == BootState.PENDING_VERIFY
        assert names["esp_rmaker_ota_mark_valid"]() == names["ESP_OK"]
        world.settle()
        assert world.statuses() == [("success", "OTA Upgrade finished and verified successfully")]

        works[0] = False
        world.scripts.append(good("3.0.0"))
        world.deliver_job("J4", fw_version="3.0.0")
        world.advance(10)
        world.power_on().start()
        with contextlib.suppress(AssertionError):  # the node has ended by then
            names["site_ota_start"]()
        world.settle()
        assert world.restart_reasons[2:] == ["rollback"]
    finally:
        world.stop()


def test_the_port_is_line_by_line() -> None:
    def calls(text: str) -> list[str]:
        """What is called and named of the interface, in order, types of C left out."""
        found = re.findall(r"\b(?:esp_(?:rmaker_ota|err)_\w+|ESP_(?:OK|FAIL)|OTA_\w+)\b", text)
        return [name for name in found if not name.endswith("_t")]

    assert "esp_rmaker_ota_report_status" in calls(block_with("def site_ota_cb"))
    python, original = calls(block_with("def site_ota_cb")), calls(block_with("static esp_err_t site_ota_cb"))
    assert sorted(python) == sorted([*original, "ESP_OK"])  # ESP_ERROR_CHECK compares by itself


def test_the_original_compiles(tmp_path: Path) -> None:
    source = tmp_path / "site.c"
    source.write_text(
        "#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <stdlib.h>\n"
        '#include "esp_rmaker_ota.h"\n'
        '#define TAG "site"\n'
        '#define ESP_LOGI(tag, format, ...) printf("%s: " format "\\n", tag, __VA_ARGS__)\n'
        "#define ESP_LOGE ESP_LOGI\n#define ESP_ERROR_CHECK(err) do { if ((err) != ESP_OK) abort(); } while (0)\n"
        "bool sensors_work(void);\nvoid site_ota_start(void);\n" + block_with("static esp_err_t site_ota_cb")
    )
    headers = ROOT / "python" / "rmaker_ota" / "embed"
    command = [
        "gcc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Werror",
        "-fsyntax-only",
        f"-I{headers}",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_of_debian_packages_is_where_the_readme_says() -> None:
    for path in re.findall(r"\b((?:packaging|python|src|tests|scripts)/[\w./]+\.\w+)", README):
        assert (ROOT / path).exists(), path
