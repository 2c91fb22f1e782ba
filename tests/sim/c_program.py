"""A C program of this library as a node on a virtual chip: `Agent`, with a compiled program in its place."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.sim.agent import WAIT_S, Agent
from tests.sim.mosquitto import Mosquitto


class CProgram(Agent):
    """Runs ``PROGRAM node.toml [ARGUMENT...]`` with no more of an environment than it is given.

    Args:
        program: the executable; or a wrapper and its arguments, then the executable.
        wait_s: patience of `wait_log`.
    """

    def __init__(
        self,
        program: Path | Sequence[str | Path],
        directory: Path,
        broker: Mosquitto,
        *,
        wait_s: float = WAIT_S,
        **options: Any,
    ) -> None:
        super().__init__(directory, broker, **options)
        self._program = [program] if isinstance(program, Path) else list(program)
        self._wait_s = wait_s

    def start(  # type: ignore[override]
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Standard output and error are the log."""
        assert self.process is None
        self.process = subprocess.Popen(
            [*map(os.fspath, self._program), str(self.config), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.directory,
            env=dict(environment or {}),
        )
        self.process.stderr = self.process.stdout  # where the log is read from
        self._reader = threading.Thread(target=self._read_log, args=(self.process,), daemon=True)
        self._reader.start()

    def wait_until(self, is_so: Callable[[str], bool]) -> None:
        with self._log_grew:
            if not self._log_grew.wait_for(lambda: is_so("".join(self._log)), self._wait_s):
                raise TimeoutError("not logged; log:\n" + "".join(self._log))
