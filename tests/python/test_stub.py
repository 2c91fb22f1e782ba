"""The stub of the border names what the extension exports."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import rmaker_ota
from rmaker_ota import ota_core

STUB = Path(rmaker_ota.__file__).with_name("ota_core.pyi")


def stub() -> ast.Module:
    return ast.parse(STUB.read_text(encoding="utf-8"))


def declared(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def exported(names: dict[str, object]) -> set[str]:
    """Public names that are the extension's own, not modules or helpers it imported."""
    return {
        name
        for name, value in names.items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", None) in {None, ota_core.__name__}
    }


def test_the_stub_names_what_the_extension_exports() -> None:
    assert declared(stub().body) == exported(vars(ota_core))


def test_the_stub_names_the_methods_of_every_class() -> None:
    wrong = []
    for node in stub().body:
        if not isinstance(node, ast.ClassDef):
            continue
        real = {name for name in vars(getattr(ota_core, node.name)) if not name.startswith("_")}
        if (stubbed := {name for name in declared(node.body) if not name.startswith("_")}) != real:
            wrong.append(f"{node.name}: only in the stub {sorted(stubbed - real)}, missing {sorted(real - stubbed)}")
    assert not wrong


def test_everything_the_extension_exports_has_a_docstring() -> None:
    bare = [
        name
        for name in exported(vars(ota_core))
        if callable(getattr(ota_core, name)) and not (getattr(ota_core, name).__doc__ or "").strip()
    ]
    assert not bare
