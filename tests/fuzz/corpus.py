"""Which inputs a fuzz entry starts from."""

from __future__ import annotations

from pathlib import Path

from tests.csrc.csrc_build import DATA, BuildError, read_needs

CORPUS = Path(__file__).with_name("corpus")


def corpus_files(entry: Path) -> list[Path]:
    """The files a fuzz entry starts from.

    They are those of ``tests/data`` that match the patterns after ``corpus:`` in the entry's first comments, and all in
    ``tests/fuzz/corpus/NAME``, where inputs that once failed are kept.

    Raises:
        BuildError: a pattern matches nothing.
    """
    files = []
    for pattern in read_needs(entry).corpus:
        found = sorted(path for path in DATA.glob(pattern) if path.is_file())
        if not found:
            raise BuildError(f"{entry.name}: corpus: nothing in tests/data matches {pattern}")
        files += found
    kept = CORPUS / entry.stem
    return files + (sorted(kept.iterdir()) if kept.is_dir() else [])
