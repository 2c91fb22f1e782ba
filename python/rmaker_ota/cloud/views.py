"""What the records of the job service look like as JSON. Times are Unix seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rmaker_ota.cloud.store import HistoryEntry, Image, Job, JobNode, NodeInfo, json_value


def image(image: Image) -> dict[str, Any]:
    return {
        "sha256": image.sha256,
        "md5": image.md5,
        "size": image.size,
        "name": image.name,
        "project": image.project,
        "version": image.version,
        "secure_version": image.secure_version,
        "chip_id": image.chip_id,
        "imported_at": image.imported_at,
    }


def job(job: Job, image: Image, nodes: Sequence[JobNode]) -> dict[str, Any]:
    """``counts``: number of nodes by state. ``finished``: no node will be offered it again."""
    return {
        "id": job.id,
        "mode": job.mode.value,
        "workflow": job.workflow.value,
        "version": job.version,
        "metadata": json_value(job.metadata),
        "created_at": job.created_at,
        "finished": all(node.state.finished for node in nodes),
        "counts": dict(Counter(node.state.value for node in nodes)),
        "image": {"sha256": image.sha256, "md5": image.md5, "size": image.size, "name": image.name},
        "nodes": [
            {
                "node": node.node,
                "state": node.state.value,
                "info": node.info,
                "updated_at": node.updated_at,
                "offers": node.offers,
            }
            for node in nodes
        ],
    }


def entry(entry: HistoryEntry) -> dict[str, Any]:
    return {
        "job": entry.job,
        "node": entry.node,
        "at": entry.at,
        "origin": entry.origin,
        "status": entry.status,
        "info": entry.info,
        "node_ts": entry.node_ts,
        "verdict": entry.verdict.value,
        "state": entry.state.value,
    }


def node(node: NodeInfo) -> dict[str, Any]:
    return {
        "node": node.id,
        "fw_version": node.fw_version,
        "network_id": node.network_id,
        "seen_at": node.seen_at,
        "config_at": node.config_at,
        "config": json_value(node.config),
    }
