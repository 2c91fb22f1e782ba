"""``rmaker-ota serve``: the job service, and making what it needs."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

import click

from rmaker_ota.cli.agent import notify
from rmaker_ota.cli.errors import ExitCode
from rmaker_ota.cli.output import json_option, print_json, say

DEFAULT_CONFIG = "cloud.toml"
CONFIG_VARIABLE = "RMAKER_OTA_CLOUD_CONFIG"

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    envvar=CONFIG_VARIABLE,
    show_default=True,
    show_envvar=True,
    help="Configuration of the job service.",
)


@click.group(invoke_without_command=True)
@config_option
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@json_option
@click.pass_context
def command(ctx: click.Context, config_path: Path, verbose: bool, as_json: bool) -> int:
    """Run the job service until it is stopped.

    `serve init DIR` makes certificates and a configuration to start with. With --json one line says when it listens and
    one when the broker is connected. SIGTERM ends it with exit code 0. systemd units may use Type=notify.
    """
    if ctx.invoked_subcommand is not None:
        return ExitCode.DONE
    from rmaker_ota.cloud.config import load_config
    from rmaker_ota.cloud.service import CloudService, serve

    config = load_config(config_path)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("rmaker_ota").setLevel(logging.DEBUG if verbose else logging.INFO)

    def listening(service: CloudService) -> None:
        notify("READY=1")
        if as_json:
            print_json({"event": "listening", **service.status()})
        else:
            say(f"serving images at {service.url}, jobs at {config.admin.socket or f'port {config.admin.port}'}")

    def ready(service: CloudService) -> None:
        if as_json:
            print_json({"event": "ready", **service.status()})
        else:
            say(f"connected to broker {config.mqtt.host}:{config.mqtt.port}")

    try:
        stopped_by = asyncio.run(serve(config, on_listening=listening, on_ready=ready))
    finally:
        notify("STOPPING=1")
    return ExitCode.INTERRUPTED if stopped_by is signal.SIGINT else ExitCode.DONE


@command.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "names",
    multiple=True,
    metavar="NAME",
    help="Host name or address nodes use for this machine; may be repeated, the first is used in URLs. Without it "
    "everything stays on loopback.",
)
@click.option("--node", "nodes", multiple=True, metavar="ID", help="Make credentials for this node; may be repeated.")
@click.option(
    "--listen", metavar="ADDRESS", help="Address to listen on (default: 0.0.0.0 with --host, else 127.0.0.1)."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8443, show_default=True, help="HTTPS port of images.")
@click.option("--mqtt-port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="Port of the broker.")
@click.option("--url", default="", help="Base of image URLs, when a proxy stands before this machine.")
@json_option
def init(
    directory: Path,
    names: tuple[str, ...],
    nodes: tuple[str, ...],
    listen: str | None,
    port: int,
    mqtt_port: int,
    url: str,
    as_json: bool,
) -> None:
    """Make a development CA, certificates, configurations and node credentials in DIRECTORY."""
    from rmaker_ota.cloud import setup

    layout = setup.Layout(
        names=names or setup.LOOPBACK,
        listen=listen or ("0.0.0.0" if names else "127.0.0.1"),
        https_port=port,
        mqtt_port=mqtt_port,
        url=url,
    )
    setup.create(directory, layout, nodes)
    if as_json:
        print_json(
            {
                "directory": str(directory.absolute()),
                "config": str(directory.absolute() / "cloud.toml"),
                "nodes": [{"node": node, "directory": str(directory.absolute() / "nodes" / node)} for node in nodes],
            }
        )
        return
    say(f"made {directory}/cloud.toml, certificates and mosquitto.conf; next:")
    say(f"    mosquitto -c {directory}/mosquitto.conf")
    say(f"    rmaker-ota serve --config {directory}/cloud.toml")
    for node in nodes:
        say(f"    rmaker-ota agent --config {directory}/nodes/{node}/node.toml      # after setting its target")


@command.command("add-node")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("node_ids", nargs=-1, required=True, metavar="ID...")
@json_option
def add_node(directory: Path, node_ids: tuple[str, ...], as_json: bool) -> None:
    """Make credentials for more nodes of the installation in DIRECTORY."""
    from rmaker_ota.cloud import setup
    from rmaker_ota.cloud.config import load_config

    config = load_config(directory / "cloud.toml")
    made = [setup.add_node(directory, node, mqtt_port=config.mqtt.port) for node in node_ids]
    if as_json:
        print_json({"nodes": [{"node": each.node_id, "directory": str(each.directory.absolute())} for each in made]})
        return
    for each in made:
        say(f"{each.node_id}: {each.directory}")
