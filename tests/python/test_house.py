"""The house stands: one list of statuses, rooms that depend one way, a start that is quick."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from rmaker_ota import errors, ota_core

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "src" / "csrc"
PACKAGE = ROOT / "python" / "rmaker_ota"

# Which rooms a room may include headers of, beside its own.
LOWEST = {"base"}
LOW = {"base", "port"}
ALLOWED = {
    "base": set(),
    "port": LOWEST,
    "esp": LOW,
    "source": LOW,
    "transform": LOW,
    "verify": LOW | {"esp"},
    "sink": LOW | {"esp", "flasher"},
    "flasher": LOW,
    "target": LOW | {"esp", "sink", "flasher", "verify"},
    "engine": LOW | {"source", "transform", "verify", "sink"},
}
# What the engine may see of the four rooms: their interfaces.
INTERFACES = {"source/source.h", "transform/transform.h", "verify/verify.h", "sink/sink.h"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)


def c_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*.[ch]") if path.parent != CSRC / "include")


# ---- Statuses --------------------------------------------------------------------------------------------------------


def error_statuses() -> list[tuple[str, int]]:
    return [(name, esp_err) for name, number, esp_err, _ in ota_core.status_table() if number < 0]


def test_every_error_status_has_a_class() -> None:
    assert len(error_statuses()) > 40
    for name, _ in error_statuses():
        assert issubclass(errors.error_class(name), errors.OtaError), name


def test_every_class_is_for_a_status_of_the_table() -> None:
    assert set(errors._CLASSES) == {name for name, _ in error_statuses()}


def test_the_tree_in_the_docstring_names_every_class() -> None:
    classes = {
        cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.OtaError)
    }
    drawn = re.findall(r"(?:──|^    )\s*([A-Z]\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert set(drawn) == classes


def test_a_class_made_by_hand_reports_the_number_of_its_status() -> None:
    table = dict(error_statuses())
    for cls in {errors.error_class(name) for name in table}:
        assert cls.esp_err == table[cls.status], cls


def test_statuses_and_stages_are_where_callers_look() -> None:
    exc = errors.error_class("ERR_HTTP_STATUS")(
        "404", status="ERR_HTTP_STATUS", esp_err=-1, stage="source", offset=7, device_code=404
    )
    assert isinstance(exc, ConnectionError)
    assert (exc.status, exc.stage, exc.offset, exc.device_code, str(exc)) == (
        "ERR_HTTP_STATUS",
        "source",
        7,
        404,
        "404",
    )


# ---- Rooms -----------------------------------------------------------------------------------------------------------


def test_rooms_include_only_what_they_may() -> None:
    wrong = []
    for path in c_files():
        room = path.relative_to(CSRC).parts[0]
        for header in includes(path):
            other = header.split("/")[0] if "/" in header else room
            if other != room and other not in ALLOWED[room]:
                wrong.append(f"{path.relative_to(ROOT)} includes {header}")
    assert not wrong


def test_the_engine_sees_interfaces_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in (CSRC / "engine").glob("*.[ch]")
        for header in includes(path)
        if header.split("/")[0] in {"source", "transform", "verify", "sink"} and header not in INTERFACES
    ]
    assert not wrong


def test_every_include_is_a_file_named_from_the_root_of_the_engine() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {header}"
        for path in c_files()
        for header in includes(path)
        if not (CSRC / header).is_file() and not (CSRC / "include" / header).is_file()
    ]
    assert not wrong


def test_c_knows_nothing_of_python() -> None:
    wrong = [
        str(path) for path in c_files() if re.search(r"#\s*include\s*<Python\.h>", path.read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_python_layers_depend_one_way() -> None:
    """The command line is imported by nobody; targets and install know nothing of nodes and the job service."""
    below = {
        "cli": set(),
        "cloud": {"cli"},
        "rainmaker": {"cli", "cloud"},
        "targets": {"cli", "cloud", "rainmaker"},
        "install.py": {"cli", "cloud", "rainmaker"},
        "inspect.py": {"cli", "cloud", "rainmaker"},
        "errors.py": {"cli", "cloud", "rainmaker", "targets", "install", "inspect"},
    }
    wrong = []
    for name, forbidden in below.items():
        start = PACKAGE / name
        for path in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
            if not path.exists():
                continue
            for module in imported_modules(path):
                parts = module.split(".")
                if parts[0] == "rmaker_ota" and len(parts) > 1 and parts[1] in forbidden:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


# ---- Start-up --------------------------------------------------------------------------------------------------------


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_brings_nothing_heavy() -> None:
    heavy = {
        "paho",
        "cbor2",
        "cryptography",
        "rich",
        "click",
        "aiohttp",
        "asyncio",
        "cffi",
        "sqlite3",
        "ssl",
        "http",
        "urllib.request",
    }
    assert not heavy & modules_after("import rmaker_ota")


def test_the_package_imports_few_modules() -> None:
    """A count, not seconds: each module beyond those of the interpreter costs about half a millisecond."""
    extra = modules_after("import rmaker_ota") - modules_after("pass")
    assert len(extra) < 120, sorted(extra)


# ---- Words -----------------------------------------------------------------------------------------------------------

TEXT = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h", ".md", ".toml", ".txt", ".sh", ".in", ".cfg", ""}


def project_files() -> list[Path]:
    skip = {"rmaker_ota.egg-info", "build", "dist", "data", "corpus", "__pycache__"}
    top = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and path.name != ".git"]
    inside = [
        path
        for folder in ("src", "python", "tests", "benches", "scripts", "packaging", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in TEXT and not skip & set(path.relative_to(ROOT).parts)
    ]
    return sorted([*top, *inside])


def test_no_file_speaks_of_one_machine() -> None:
    """Paths of somebody's machine, marks of unfinished work, and letters that look like others have no place here."""
    forbidden = re.compile(r"(?<![\w.])/(?:work|home|root)/|\bTO" + r"DO\b|\bFIX" + r"ME\b|\bX" + r"XX\b")
    wrong = []
    for path in project_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if forbidden.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not [line for line in wrong if not line.startswith("tests/python/test_house.py")]


def test_text_files_end_with_one_newline_and_have_no_tabs_but_makefiles() -> None:
    wrong = []
    for path in project_files():
        text = path.read_text(encoding="utf-8")
        if text and (not text.endswith("\n") or text.endswith("\n\n") or "\r" in text):
            wrong.append(f"{path.relative_to(ROOT)}: end of file or line ends")
        if "\t" in text and path.name != "Makefile":
            wrong.append(f"{path.relative_to(ROOT)}: tab")
    assert not wrong


def test_links_of_the_documents_lead_somewhere() -> None:
    wrong = [
        f"{path.name}: {link}"
        for path in ROOT.glob("*.md")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
        if not (ROOT / link).exists()
    ]
    assert not wrong
