"""``rmaker-ota job``: jobs of a job service that runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rmaker_ota.cli.errors import ExitCode
from rmaker_ota.cli.output import Progress, is_terminal, json_option, mib, print_json, say
from rmaker_ota.cli.serve import config_option
from rmaker_ota.errors import UnsupportedError, VerifyError

if TYPE_CHECKING:
    from rmaker_ota.cloud.client import AdminClient

job_argument = click.argument("job_id", metavar="JOB")


@click.group()
def command() -> None:
    """Create, list, show and cancel jobs of the job service."""


@command.command()
@click.argument("image", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--node", "nodes", multiple=True, required=True, metavar="ID", help="Node to update; may be repeated.")
@click.option(
    "--force/--on-fetch", default=True, show_default=True, help="Push at once, or wait until the node asks for updates."
)
@click.option(
    "--workflow",
    type=click.Choice(["auto", "topics", "params"]),
    default="auto",
    show_default=True,
    help="How nodes get the job; auto: by params those whose configuration has the OTA service.",
)
@click.option("--version", help="Version to announce (default: the one in the image).")
@click.option("--raw", is_flag=True, help="Take a file that is no ESP app image: for raw slots.")
@click.option("--metadata", metavar="JSON", help="Object handed to the nodes, e.g. a download window.")
@click.option("--wait", is_flag=True, help="Show what happens until every node has finished.")
@json_option
@config_option
def create(
    image: Path,
    nodes: tuple[str, ...],
    force: bool,
    workflow: str,
    version: str | None,
    raw: bool,
    metadata: str | None,
    wait: bool,
    as_json: bool,
    config_path: Path,
) -> int:
    """Create a job that brings IMAGE to nodes.

    IMAGE is checked as a node would, so that no node is sent a file it can only refuse; --raw leaves that out.
    With --wait the exit code says how it ended: 0 success everywhere, 3 rejected by a node, 1 otherwise.
    """
    details = _metadata(metadata)
    client = _client(config_path)
    if not raw:
        _check_image(image)
    with Progress(f"importing {image.name}", quiet=as_json) as progress:
        kept = client.upload(image, on_progress=progress.update if image.stat().st_size > 8 << 20 else None)
    job = client.create_job(
        kept["sha256"],
        list(nodes),
        mode="force" if force else "on-fetch",
        version=version,
        metadata=details,
        workflow=workflow,
    )
    if not wait:
        if as_json:
            print_json(job)
        else:
            say(f"job {job['id']}: {_image(job)} for {', '.join(nodes)}")
        return ExitCode.DONE
    if not as_json:
        say(f"job {job['id']}: {_image(job)} for {', '.join(nodes)}")
    for entry in client.watch(job["id"]):
        if not as_json:
            say("  ".join(_entry(entry)).rstrip())
    job = client.job(job["id"])
    if as_json:
        print_json(job)
    states = {node["state"] for node in job["nodes"]}
    if states == {"success"}:
        return ExitCode.DONE
    return ExitCode.REJECTED if "rejected" in states else ExitCode.FAILED


@command.command("list")
@json_option
@config_option
def list_jobs(as_json: bool, config_path: Path) -> None:
    """List all jobs, the newest first."""
    jobs = _client(config_path).jobs()
    if as_json:
        print_json({"jobs": jobs})
        return
    rows = [
        (job["id"], _when(job["created_at"]), job["mode"], job["version"] or "-", _counts(job), job["image"]["name"])
        for job in jobs
    ]
    table(("job", "created", "mode", "version", "nodes", "image"), rows, empty="no jobs")


@command.command()
@job_argument
@json_option
@config_option
def show(job_id: str, as_json: bool, config_path: Path) -> None:
    """Show a job: where each node stands, and everything that happened."""
    job = _client(config_path).job(job_id)
    if as_json:
        print_json(job)
        return
    say(f"job {job['id']}, created {_when(job['created_at'])}, {job['mode']}")
    say(f"image {_image(job)}, sha256 {job['image']['sha256']}")
    if job["metadata"] is not None:
        say(f"metadata {json.dumps(job['metadata'], ensure_ascii=False)}")
    rows = [(n["node"], n["state"], _when(n["updated_at"]), str(n["offers"]), _safe(n["info"])) for n in job["nodes"]]
    say("")
    table(("node", "state", "since", "offers", "info"), rows)
    say("")
    table(("time", "node", "status", "info"), [_entry(entry) for entry in job["history"]])


@command.command()
@job_argument
@click.option("--node", "nodes", multiple=True, metavar="ID", help="Cancel for this node only; may be repeated.")
@json_option
@config_option
def cancel(job_id: str, nodes: tuple[str, ...], as_json: bool, config_path: Path) -> None:
    """Take a job back from the nodes that have not finished it. A node that already has it cannot be stopped."""
    cancelled = _client(config_path).cancel(job_id, list(nodes) or None)
    if as_json:
        print_json({"job": job_id, "cancelled": cancelled})
    else:
        say(f"cancelled for {', '.join(cancelled)}" if cancelled else "nothing to cancel: every node has finished")


@command.command("nodes")
@json_option
@config_option
def list_nodes(as_json: bool, config_path: Path) -> None:
    """List the nodes the service has heard of."""
    nodes = _client(config_path).nodes()
    if as_json:
        print_json({"nodes": nodes})
        return
    rows = [(node["node"], node["fw_version"] or "-", _when(node["seen_at"])) for node in nodes]
    table(("node", "version", "seen"), rows, empty="no nodes")


def _client(config_path: Path) -> AdminClient:
    from rmaker_ota.cloud.client import AdminClient
    from rmaker_ota.cloud.config import load_config

    return AdminClient(load_config(config_path))


def _check_image(path: Path) -> None:
    from rmaker_ota.cloud.images import check_image

    try:
        check_image(path)
    except (VerifyError, UnsupportedError) as error:
        raise click.BadParameter(
            f"{path} is no ESP app image: {error}; --raw takes it as it is", param_hint="IMAGE"
        ) from error


def _metadata(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--metadata") from error
    if not isinstance(value, dict):
        raise click.BadParameter("expected a JSON object", param_hint="--metadata")
    return value


def _image(job: dict[str, Any]) -> str:
    image = job["image"]
    version = f" {_safe(job['version'])}" if job["version"] else ""
    return f"{_safe(image['name'])}{version} ({mib(image['size'])})"


def _counts(job: dict[str, Any]) -> str:
    return ", ".join(f"{count} {state}" for state, count in job["counts"].items())


def _entry(entry: dict[str, Any]) -> tuple[str, str, str, str]:
    verdict = "" if entry["verdict"] == "applied" else f" ({entry['verdict']})"
    return _when(entry["at"]), entry["node"], _safe(entry["status"]) + verdict, _safe(entry["info"])


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _safe(text: str) -> str:
    """What a node sent, without control characters that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "") -> None:
    """Prints rows under their heads; ``empty`` when there are none."""
    if not rows:
        say(empty)
        return
    if is_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(*heads, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            shown.add_row(*map(Text, row))
        Console().print(shown)
        return
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
