"""The udev rules: what every line has to look like, and that error messages name the file there is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "packaging" / "60-rmaker-ota-serial.rules"

# udev(7): a rule is a list of key, operator, value in quotes. Matches use == and !=, the others assign.
RULE = re.compile(r'([A-Z]+(?:\{[A-Za-z_]+\})?)(==|!=|\+=|:=|=)"([^"]*)"')
MATCHES = {"ACTION", "SUBSYSTEM", "SUBSYSTEMS", "ATTR", "ATTRS", "ENV"}
ASSIGNS = {"ENV", "GROUP", "MODE", "TAG", "SYMLINK", "IMPORT", "GOTO", "LABEL"}


def rules() -> list[list[tuple[str, str, str]]]:
    parsed = []
    for line in RULES.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pairs = [part.strip() for part in re.findall(r'(?:[^,"]|"[^"]*")+', line)]
        matched = [RULE.fullmatch(pair) for pair in pairs]
        assert all(matched), line
        parsed.append([match.groups() for match in matched if match is not None])
    return parsed  # type: ignore[return-value]


def test_every_rule_has_keys_and_operators_of_udev() -> None:
    assert len(rules()) > 8
    for rule in rules():
        for key, operator, value in rule:
            allowed = MATCHES if operator in {"==", "!="} else ASSIGNS
            assert key.partition("{")[0] in allowed, (key, operator)
            assert value or operator == "=="


def test_every_goto_leads_forward_to_a_label() -> None:
    labels = {value: i for i, rule in enumerate(rules()) for key, _, value in rule if key == "LABEL"}
    jumps = [(i, value) for i, rule in enumerate(rules()) for key, _, value in rule if key == "GOTO"]
    assert jumps
    for i, label in jumps:
        assert labels[label] > i


def test_the_chips_own_ports_are_kept_from_the_modem_manager() -> None:
    devices = [rule for rule in rules() if ("ATTR{idVendor}", "==", "303a") in rule]
    assert [("ENV{ID_MM_DEVICE_IGNORE}", "=", "1") in rule for rule in devices] == [True]


def test_the_error_for_a_missing_permission_names_this_file() -> None:
    assert RULES.name in (ROOT / "src" / "csrc" / "port" / "port_posix_serial.c").read_text(encoding="utf-8")
