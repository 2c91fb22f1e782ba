"""What all tests need to be true of the process they run in."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, and no failure because the machine is busy.
settings.register_profile("project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    """A job in the background of a shell ignores SIGINT, and hands that on to every program it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
