"""What README.md and CONTRIBUTING.md show works: commands and their options, the configuration, the Python examples."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path

import click
import pytest

import rmaker_ota
from rmaker_ota.cli import COMMANDS, cli
from rmaker_ota.config import load_config
from rmaker_ota.esp_build import build_image
from rmaker_ota.targets.create import create_flash_image
from tests.sim.https_server import authority
from tests.sim.node_world import World

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


def test_the_list_of_debian_packages_is_where_the_readme_says() -> None:
    for path in re.findall(r"\b((?:packaging|python|src|tests|scripts)/[\w./]+\.\w+)", README):
        assert (ROOT / path).exists(), path
