"""asyncio: results, progress and events arrive on the loop; a cancellation ends the engine and the node, and waits."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from rmaker_ota import Device, Param, aio, ota_core
from rmaker_ota.errors import CancelledError, DigestError, NotFoundError, OtaError, RejectedError, StateError
from rmaker_ota.install import ImageHeader, InstallOptions, Phase, Progress
from rmaker_ota.rainmaker.node import Outcome
from rmaker_ota.rainmaker.types import RMAKER_EVENT_BASE
from rmaker_ota.targets.file import FileTarget
from tests.sim.node_world import WAIT_S, FakeInstallation, World

DATA = bytes(range(256)) * 4096  # 1 MiB
JOB = b'{"ota_job_id": "J1", "url": "https://fw.example.com/image.bin", "file_size": 65536}'
FAST = InstallOptions(progress_interval_s=0.001)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), WAIT_S))


class Endless:
    """A source that gives one MiB and then nothing, for ever; and a target that knows when the engine has left it."""

    def __init__(self, path: Path) -> None:
        self.source = ota_core.PushSource(2 * len(DATA), capacity=2 * len(DATA))
        self.source.write(DATA)
        self.target = FileTarget(path)
        self.installation = aio.Installation(self.source, self.target, options=FAST)

    async def until_it_receives(self) -> None:
        async for progress in self.installation:
            if progress.phase == Phase.RECEIVING and progress.bytes_read >= len(DATA):
                return

    def is_over(self) -> bool:
        """Whether no thread of an installation goes on; one that has told its result may be at its last line."""
        threads = [thread for thread in threading.enumerate() if thread.name == "rmaker-ota-install"]
        for thread in threads:
            thread.join(WAIT_S)
        return not any(thread.is_alive() for thread in threads)


# ---- Installations ---------------------------------------------------------------------------------------------------


def test_an_installation_is_a_coroutine(tmp_path: Path) -> None:
    async def test() -> None:
        shown: list[Progress] = []
        loop_thread = threading.current_thread()
        heard_on: set[threading.Thread] = set()

        def heard(progress: Progress) -> None:
            shown.append(progress)
            heard_on.add(threading.current_thread())

        result = await aio.install(DATA, f"file:{tmp_path / 'a'}", on_progress=heard)
        assert result.sha256 == hashlib.sha256(DATA).digest()
        assert (tmp_path / "a").read_bytes() == DATA
        assert (shown[-1].phase, shown[-1].bytes_read) == (Phase.DONE, len(DATA))
        assert heard_on == {loop_thread}
        assert (await aio.install(DATA, FileTarget(tmp_path / "b"))).image_size == len(DATA)

    run(test)


def test_progress_is_iterated_to_the_end_and_the_result_is_there(tmp_path: Path) -> None:
    async def test() -> None:
        installation = aio.Installation(DATA, FileTarget(tmp_path / "a"), options=FAST)
        shown = [progress async for progress in installation]
        counts = [progress.bytes_read for progress in shown]
        assert counts == sorted(counts)
        assert shown[-1].phase == Phase.DONE
        assert (await installation.result()).image_size == len(DATA)
        assert await installation.result() is await installation.result()
        assert [progress async for progress in installation] == []

    run(test)


def test_failures_arrive_as_they_are(tmp_path: Path) -> None:
    async def test() -> None:
        wrong = InstallOptions(sha256=bytes(32))
        with pytest.raises(DigestError):
            await aio.install(DATA, FileTarget(tmp_path / "a"), options=wrong)
        installation = aio.Installation(DATA, FileTarget(tmp_path / "a"), options=wrong)
        with pytest.raises(DigestError):
            async for _ in installation:
                pass
        with pytest.raises(NotFoundError):
            await aio.install(tmp_path / "none", FileTarget(tmp_path / "a"))
        with pytest.raises(OtaError):
            await aio.install(DATA, "nothing:like-this")

        refusal = RejectedError("not today")

        def refuses(_: ImageHeader) -> None:
            raise refusal

        with pytest.raises(RejectedError) as caught:
            await aio.install(DATA, FileTarget(tmp_path / "b"), header_gate=refuses)
        assert caught.value is refusal
        assert not (tmp_path / "b").exists()

        def stops(_: object) -> None:
            raise StopIteration

        with pytest.raises(RuntimeError, match="StopIteration"):
            await aio.install(DATA, FileTarget(tmp_path / "b"), header_gate=stops)

    run(test)


@pytest.mark.parametrize("how", ["result", "iterate", "context", "install"])
def test_a_cancelled_task_ends_the_engine_before_it_goes_on(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        world = Endless(tmp_path / "a")
        receiving = asyncio.Event()

        def heard(progress: Progress) -> None:
            if progress.bytes_read >= len(DATA):
                receiving.set()

        async def work() -> None:
            if how == "install":
                await aio.install(world.source, world.target, options=FAST, on_progress=heard)
                return
            async with world.installation:
                await world.until_it_receives()
                receiving.set()
                if how == "result":
                    await world.installation.result()
                elif how == "iterate":
                    async for _ in world.installation:
                        pass
                else:
                    await asyncio.Event().wait()

        task = asyncio.create_task(work())
        task.add_done_callback(lambda _: receiving.set())
        await receiving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.is_over()
        if how != "install":
            with pytest.raises(CancelledError):
                await world.installation.result()

    run(test)


def test_it_can_be_cancelled_by_hand_at_any_time(tmp_path: Path) -> None:
    async def test() -> None:
        world = Endless(tmp_path / "a")
        await world.until_it_receives()
        world.installation.cancel()
        with pytest.raises(CancelledError):
            await world.installation.result()
        assert world.is_over()
        early = aio.Installation(DATA, FileTarget(tmp_path / "b"))
        early.cancel()
        with pytest.raises(CancelledError):
            await early.result()

    run(test)


def test_what_the_listener_raises_ends_the_installation(tmp_path: Path) -> None:
    async def test() -> None:
        world = Endless(tmp_path / "a")

        def heard(progress: Progress) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await aio.install(world.source, world.target, options=FAST, on_progress=heard)
        assert world.is_over()

    run(test)


def test_many_run_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        worlds = [Endless(tmp_path / str(number)) for number in range(12)]  # more than a pool of this machine has
        for world in worlds:
            await world.until_it_receives()
        for world in worlds:
            world.source.write(DATA)
            world.source.end()
        results = await asyncio.gather(*(world.installation.result() for world in worlds))
        assert {result.image_size for result in results} == {2 * len(DATA)}

    run(test)


# ---- Nodes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.stop()


def test_events_come_in_order_until_the_node_ends(world: World) -> None:
    async def test() -> None:
        async with aio.Node(world.power_on()) as node:
            everything, some = node.events(), node.events(RMAKER_EVENT_BASE)
            await node.enable()
            with pytest.raises(OtaError):
                await node.enable()
            await node.start()
            await asyncio.to_thread(world.connect)
            names = [(await anext(some)).name for _ in range(3)]
            assert names == ["RMAKER_EVENT_INIT_DONE", "RMAKER_EVENT_CONFIG_REPORTED", "RMAKER_EVENT_STARTED"]
            with pytest.raises(StateError):
                await node.start()
            await node.stop()
            seen = [event.name async for event in everything]
            assert seen[:2] == ["RMAKER_EVENT_INIT_DONE", "RMAKER_COMMON_EVENT_MQTT_CONNECTED"]
            assert [event async for event in some] == []
            assert [event async for event in node.events()] == []
            assert await node.wait() == Outcome.STOPPED

    run(test)


def test_a_closed_stream_gives_what_it_holds_and_no_more(world: World) -> None:
    async def test() -> None:
        async with aio.Node(world.power_on()) as node:
            async with node.events() as events:
                await node.start()
                assert (await anext(events)).name == "RMAKER_EVENT_INIT_DONE"
            await asyncio.to_thread(world.connect)
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    run(test)


def test_a_reader_that_is_far_behind_costs_no_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with aio.Node(world.power_on()) as node:
            events = node.events()
            await node.start()
            await asyncio.to_thread(world.connect)
            await node.stop()
            assert [event.name async for event in events] == ["RMAKER_EVENT_INIT_DONE"]

    monkeypatch.setattr(aio, "MAX_EVENTS_WAITING", 1)
    run(test)
    assert len([record for record in caplog.records if "far behind" in record.message]) == 1


def test_a_cancelled_run_stops_the_node_and_cancels_its_download(world: World) -> None:
    async def test() -> None:
        downloading = threading.Event()

        def endless(installation: FakeInstallation) -> None:
            installation.header()
            downloading.set()
            installation.wait_for_cancel()

        world.scripts.append(endless)
        node = aio.Node(world.power_on())
        started = node.events(RMAKER_EVENT_BASE)
        await node.enable()
        task = asyncio.create_task(node.run())
        assert (await anext(started)).name == "RMAKER_EVENT_INIT_DONE"
        await asyncio.to_thread(world.transport.go_online)
        while (await anext(started)).name != "RMAKER_EVENT_STARTED":
            pass
        await asyncio.to_thread(world.node.settle)  # type: ignore[union-attr]
        assert world.transport.deliver("node/N1/otaurl", JOB)
        assert await asyncio.to_thread(downloading.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.installations[0].cancelled.is_set()
        assert world.chip.closed == 1
        assert await node.wait() == Outcome.STOPPED

    run(test)


def test_a_node_comes_from_a_configuration_and_its_errors_arrive(world: World, tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(OtaError, match="No such file"):
            await aio.Node.from_config(tmp_path / "none.toml")
        world.power_on()
        world.stop()
        stand_ins = {"target": world.chip, "state": world.store, "transport": world.transport, "clock": world.clock}
        async with await aio.Node.open(world.config(), **stand_ins) as node:
            assert node.sync.node_id == "N1"
        world.chip.order = []
        with pytest.raises(OtaError, match="nothing boots"):
            await aio.Node.open(world.config(), **stand_ins)

    run(test)


def test_a_device_of_the_application_is_reported_from_the_loop(world: World) -> None:
    async def test() -> None:
        power = Param("Power", "esp.param.power", False)
        async with aio.Node(world.power_on()) as node:
            node.add_device(Device("Lamp", "esp.device.lightbulb", [power]))
            events = node.events(RMAKER_EVENT_BASE)
            await node.start()
            world.transport.go_online()
            async for event in events:
                if event.name == "RMAKER_EVENT_STARTED":
                    break
            power.update(True)
            await node.report()
            topic = "$aws/rules/esp_set_params/node/N1/params/local"
            assert world.published(topic) == [{"Lamp": {"Power": True}}]

    run(test)
