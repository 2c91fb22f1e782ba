"""Parts of the demo: the proxy that cuts, the verdict about a scenario."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from rmaker_ota.cloud import broker
from rmaker_ota.cloud.store import NodeState
from rmaker_ota.demo import world
from rmaker_ota.demo.proxy import Proxy
from rmaker_ota.demo.show import Silent
from rmaker_ota.errors import NotFoundError
from rmaker_ota.targets.create import create_flash_image

CONTENT = bytes(i & 0xFF for i in range(100_000))


@pytest.fixture
def upstream() -> Iterator[tuple[str, int]]:
    """A server that sends `CONTENT` to whoever says a line, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if connection.recv(100):
                        connection.sendall(CONTENT)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def read_all(port: int) -> bytes:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as connection:
        connection.sendall(b"please\n")
        found = b""
        while block := connection.recv(65536):
            found += block
        return found


@pytest.mark.parametrize("count", [1, 16 * 1024, 50_001, len(CONTENT) - 1])
def test_the_proxy_cuts_one_connection_where_it_is_told_and_no_other(upstream: tuple[str, int], count: int) -> None:
    with Proxy() as proxy:
        proxy.forward_to(*upstream)
        assert read_all(proxy.port) == CONTENT
        proxy.cut_after(count)
        assert read_all(proxy.port) == CONTENT[:count]
        assert read_all(proxy.port) == CONTENT


def test_the_proxy_ends_with_connections_open_and_without_an_upstream(upstream: tuple[str, int]) -> None:
    proxy = Proxy()
    proxy.start()
    with suppress(ConnectionResetError):
        assert read_all(proxy.port) == b""
    proxy.forward_to(*upstream)
    with closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=20)) as connection:
        proxy.stop()
        proxy.stop()
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_the_verdict_is_about_what_runs_not_only_about_what_was_reported(tmp_path: Path) -> None:
    demo = world.Demo(tmp_path, Silent())
    create_flash_image(demo._flash, world._firmware("1.0.0"), chip=world.CHIP, flash_size=world.FLASH_SIZE)
    outcome = world.Outcome(world.SCENARIOS[0], state=NodeState.SUCCESS)
    demo._judge(outcome, [world._Request(200, 0, 0.0)])
    assert not outcome.ok
    assert outcome.problems[0] == "version 1.0.0 runs, not 2.0.0"


def test_a_download_that_was_not_resumed_is_no_success(tmp_path: Path) -> None:
    demo = world.Demo(tmp_path, Silent())
    create_flash_image(demo._flash, world._firmware("3.0.0"), chip=world.CHIP, flash_size=world.FLASH_SIZE)
    for requests in ([world._Request(200, 0, 0.0)], [world._Request(200, 0, 0.0), world._Request(200, 0, 1.0)]):
        outcome = world.Outcome(world.SCENARIOS[2], state=NodeState.SUCCESS, reports=[("failed", "x")])
        demo._judge(outcome, requests)
        assert "the download was not resumed once" in outcome.problems[-1]


def test_a_missing_mosquitto_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(broker, "DIRECTORIES", str(tmp_path))
    with pytest.raises(NotFoundError, match="sudo apt-get install -y mosquitto"):
        world.Demo(tmp_path / "demo", Silent()).run()
    assert not (tmp_path / "demo").exists()
