"""Recorded traces: loading, and refusing what the runner does not know.

A key or a step nobody here knows would silently change what a scenario means, so it is an error (`UnknownInput`)
and the trace counts as not replayed. Format: README.md beside the traces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_TOP = {"format", "name", "category", "description", "config", "config_per_boot", "inputs", "trace", "ending", "final"}
_CONFIG = {
    "protocol",
    "workflow",
    "rollback_enable",
    "auto_reboot",
    "autofetch",
    "autofetch_period_hours",
    "time_support",
    "progress_support",
    "progress_interval",
    "max_retries",
    "retry_delay_minutes",
    "rollback_wait_s",
    "rollback_report_failed",
    "http_resumption",
    "http_rx_buffer_size",
    "cert_bundle",
    "skip_version_check",
    "skip_project_name_check",
    "skip_secure_version_check",
    "basic_ingest",
    "mqtt_block_size",
    "mqtt_blocks_per_request",
    "mqtt_max_retries",
    "mqtt_block_wait_s",
    "test_rollback",
    "test_rollback_count",
}
_INPUTS = {
    "clock",
    "timezone",
    "node",
    "device",
    "slots",
    "boot_loader_rollback",
    "images",
    "nvs",
    "storage_unavailable",
    "boots",
    "mqtt",
    "https_server",
    "https_server_default",
    "stream_server",
    "flash_fault",
    "power_loss_on",
}
_IMAGE = {
    "version",
    "project_name",
    "size",
    "chip_id",
    "secure_version",
    "min_chip_rev",
    "max_chip_rev",
    "spi_flash_mode",
    "bad_magic",
    "bad_desc_magic",
    "bad_checksum",
    "bad_sha",
    "padding",
}
_SERVER = {
    "connect",
    "errno",
    "connect_ms",
    "image",
    "status",
    "body",
    "location",
    "no_response",
    "ignore_range",
    "chunked",
    "chunk",
    "no_content_length",
    "content_length",
    "body_bytes",
    "stop_after",
    "how",
    "stall_after",
    "stalls",
    "power_loss_after",
    "corrupt_byte_at",
    "ms_per_read",
}
_STREAM_RULE = {"when", "do", "count"}
_STREAM_WHEN = {"header", "offset", "nth"}
_STREAM_DO = {
    "silent",
    "reject",
    "drop",
    "also",
    "duplicate",
    "order",
    "reverse",
    "bad",
    "gap_ms",
    "together",
    "disconnect_after",
    "reconnect_in",
    "power_loss_after",
}
_DAMAGES = {"short", "long", "corrupt", "wrong_file_id", "not_a_map", "truncated", "text_payload"}
_STEPS = {
    "enable": {"type", "ota_config"},
    "start": set[str](),
    "mqtt_connect": set[str](),
    "mqtt_disconnect": set[str](),
    "message": {"topic", "payload", "payload_hex"},
    "advance": {"seconds"},
    "set_clock": {"epoch"},
    "at": {"seconds", "step"},
    "api": {"call"},
    "reboot": set[str](),
    "power_cycle": set[str](),
    "work_queue_full": {"count"},
    "no_node_info": set[str](),
}
_CALLS = {
    "fetch": set[str](),
    "fetch_with_delay": {"seconds"},
    "mark_valid": set[str](),
    "mark_invalid": set[str](),
    "enable_default": set[str](),
    "report_status": {"handle", "status", "info"},
}
_RULES = {"topic_ends_with", "action", "count", "ms"}
_PUBLISH_ACTIONS = {"ack", "delay", "no_puback", "ack_before_return", "no_msg_id", "fail"}


class UnknownInput(Exception):
    """The trace asks for something the runner cannot do; the text says what."""


@dataclass(frozen=True)
class Trace:
    """One scenario. ``configs`` has one entry for each boot, the last one standing for all further boots."""

    name: str
    description: str
    configs: tuple[Json, ...]
    inputs: Json
    records: tuple[Json, ...]
    ending: str
    final: Json

    @property
    def config(self) -> Json:
        return self.configs[0]

    @property
    def stopped(self) -> bool:
        """Whether the reference did not continue (crash, livelock, endless wait)."""
        return self.ending != "completed"


def load(path: Path) -> Trace:
    """Reads a trace file.

    Raises:
        UnknownInput: there is something in it that the runner does not know.
        ValueError: it is no trace.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    return parse(document)


def is_trace(document: object) -> bool:
    return isinstance(document, dict) and {"config", "inputs", "trace", "final"} <= set(document)


def parse(document: Json) -> Trace:
    if document.get("format") != 1:
        raise UnknownInput(f"format {document.get('format')}")
    _known("trace", document, _TOP)
    configs = tuple(document.get("config_per_boot") or [document["config"]])
    configs = tuple({**document["config"], **config} for config in configs)
    for config in configs:
        _known("config", config, _CONFIG)
    return Trace(
        name=document["name"],
        description=document.get("description", ""),
        configs=configs,
        inputs=document["inputs"],
        records=tuple(document["trace"]),
        ending=document.get("ending", "completed"),
        final=document["final"],
    )


def check_inputs(trace: Trace) -> None:
    """Raises UnknownInput for an input that the world would not act on."""
    inputs = trace.inputs
    _known("inputs", inputs, _INPUTS)
    for image in inputs.get("images", {}).values():
        _known("image", image, _IMAGE)
    for behaviour in [*(inputs.get("https_server") or []), inputs.get("https_server_default") or {}]:
        _known("https_server", behaviour, _SERVER)
    stream = inputs.get("stream_server") or {}
    _known("stream_server", stream, {"image", "rules"})
    for rule in stream.get("rules") or []:
        _known("stream rule", rule, _STREAM_RULE)
        _known("stream rule when", rule.get("when", {}), _STREAM_WHEN)
        _known("stream rule do", rule["do"], _STREAM_DO)
        bad = rule["do"].get("bad", {})
        _known("stream rule bad", bad, {"block", "kind"})
        if bad and bad["kind"] not in _DAMAGES:
            raise UnknownInput(f"kind of damage {bad['kind']}")
    mqtt = inputs.get("mqtt", {})
    _known("mqtt", mqtt, {"publish_rules", "subscribe_rules"})
    for rule in mqtt.get("publish_rules", []):
        _known("publish rule", rule, _RULES)
        if rule.get("action", "ack") not in _PUBLISH_ACTIONS:
            raise UnknownInput(f"publish rule action {rule['action']}")
    for rule in mqtt.get("subscribe_rules", []):
        _known("subscribe rule", rule, _RULES)
        if rule.get("action") != "fail":
            raise UnknownInput(f"subscribe rule action {rule.get('action')}")
    _known("node", inputs.get("node", {}), {"node_id", "network_id", "fw_version"})
    _known("device", inputs.get("device", {}), {"chip_id", "chip_revision", "efuse_secure_version"})
    _known("slots", inputs.get("slots", {}), {"slots", "boot_entries"})
    _known("flash_fault", inputs.get("flash_fault", {}) or {}, {"op", "at", "count"})
    for steps in inputs["boots"]:
        for step in steps:
            _check_step(step)


def _check_step(step: Json) -> None:
    do = step.get("do")
    if do not in _STEPS:
        raise UnknownInput(f"step {do}")
    _known(f"step {do}", step, _STEPS[do] | {"do"})
    if do == "at":
        _check_step(step["step"])
    if do == "api":
        _check_call(step["call"])
    if do == "enable" and step.get("ota_config"):
        config = step["ota_config"]
        _known("ota_config", config, {"ota_cb", "ota_diag", "server_cert", "priv"})
        if config.get("ota_cb"):
            _check_callback(config["ota_cb"])
        if config.get("ota_diag"):
            _known("ota_diag", config["ota_diag"], {"INIT", "POST_MQTT"})
            for answer in config["ota_diag"].values():
                if isinstance(answer, dict):
                    _check_callback(answer)


def _check_callback(callback: Json) -> None:
    _known("callback", callback, {"actions", "return"})
    for action in callback.get("actions", []):
        _known("callback action", action, {"report", "call_default", "wait_seconds", "api"})
        if "report" in action:
            _known("report", action["report"], {"status", "info"})
        if "api" in action:
            _check_call(action["api"])


def _check_call(call: Json) -> None:
    name = call.get("name")
    if name not in _CALLS:
        raise UnknownInput(f"api call {name}")
    _known(f"api call {name}", call, _CALLS[name] | {"name"})


def _known(what: str, found: Json, known: set[str]) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise UnknownInput(f"{what}: {', '.join(unknown)}")
