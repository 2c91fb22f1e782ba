"""Listing of NVS items: printable, ready for JSON, without secrets."""

from __future__ import annotations

import json
import math

from rmaker_ota.nvs import NvsItem, describe, is_secret, shown_value


def test_secrets_are_never_shown() -> None:
    for key, value in [
        ("client_key", b"-----BEGIN"),
        ("random", bytes(64)),
        ("sta.pswd", "hunter2"),
        ("sta.pmk", b"k"),
    ]:
        shown = shown_value(NvsItem("rmaker_creds", key, "blob", value))
        assert shown == f"({len(value)} {'byte' if len(value) == 1 else 'bytes'}, not shown)"
    for key in ("node_id", "mqtt_host", "client_cert", "ota_written", "rmaker_ota_id", "ota_file_md5"):
        assert not is_secret(key)


def test_everything_else_is_printable_and_json() -> None:
    items = [
        NvsItem("rmaker_ota", "ota_written", "u16", 640),
        NvsItem("rmaker_ota", "rmaker_ota_id", "blob", b"job"),
        NvsItem("a", "big", "blob", bytes(1000)),
        NvsItem("a", "float", "float", 0.5),
        NvsItem(None, "b\udcff", "str", "line\n\x1b[31m\udc80é"),
        NvsItem("a", "odd", "0x77", b"\0" * 8),
    ]
    listed = json.loads(json.dumps(describe(items), ensure_ascii=False).encode())
    assert [entry["value"] for entry in listed] == [
        640,
        "6a6f62",
        "00" * 32 + "... (1000 bytes)",
        0.5,
        "line\\n\\x1b[31m\\udc80é",
        "00" * 8,
    ]
    assert listed[4]["namespace"] is None
    assert listed[4]["key"] == "b\\udcff"
    assert math.isfinite(listed[3]["value"])
