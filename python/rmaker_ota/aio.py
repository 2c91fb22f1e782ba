"""Installations and nodes for asyncio: coroutines, and async iterators of progress and events.

    result = await aio.install("https://example.com/fw.bin", "esp32-image:chip.bin", on_progress=print)

    async with aio.Installation(url, target) as installation:
        async for progress in installation:
            ...
        result = await installation.result()

    async with await aio.Node.from_config("node.toml") as node:
        events = node.events()
        await node.enable()
        await node.start()
        async for event in events:          # until the node ends
            ...

A thin face over `rmaker_ota.Installer` and `rmaker_ota.Node`, which do the work on threads of their own; the event loop
never waits. Whoever is cancelled while waiting for an installation or for the end of a node cancels that too, and hears
of it when it is over, so that a target may be closed then. Objects belong to the event loop they were made on.

`asyncio.CancelledError` says that the waiting task was cancelled, `rmaker_ota.CancelledError` that ``cancel`` was
called.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rmaker_ota.install import HttpOptions, Installer, InstallOptions
from rmaker_ota.rainmaker.types import OtaType

if TYPE_CHECKING:
    from rmaker_ota import ota_core
    from rmaker_ota.config import NodeConfig
    from rmaker_ota.install import ImageHeader, InstallResult, Phase, Progress, ResumePoint
    from rmaker_ota.rainmaker.application import OtaConfig
    from rmaker_ota.rainmaker.events import Event, Subscription
    from rmaker_ota.rainmaker.node import Node as SyncNode
    from rmaker_ota.rainmaker.node import Outcome
    from rmaker_ota.rainmaker.ota import Ota
    from rmaker_ota.rainmaker.params import Device
    from rmaker_ota.targets.base import Slot, Target

log = logging.getLogger(__name__)

MAX_EVENTS_WAITING = 1024  # of one iterator; later ones are dropped

T = TypeVar("T")


class _Work(Generic[T]):
    """A function on a thread of its own: not one of the loop's few, which would be taken for as long as it runs.

    Args:
        name: of the thread.
        function: what it does.
        cancel: makes ``function`` end soon; any thread.
    """

    def __init__(self, name: str, function: Callable[[], T], cancel: Callable[[], object] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._function = function
        self._cancel = cancel
        self.done: asyncio.Future[T] = self._loop.create_future()
        self.done.add_done_callback(lambda done: done.exception())  # nobody has to ask
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def begin(self) -> None:
        """Starts the thread; apart from the making, so that the function finds this object where its owner keeps it."""
        self._thread.start()

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Calls something on the loop, unless that has been closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            value = self._function()
        except BaseException as exc:
            # A future takes no StopIteration.
            error = RuntimeError("a callback raised StopIteration") if isinstance(exc, StopIteration) else exc
            error.__cause__ = exc if error is not exc else exc.__cause__
            self.post(self.done.set_exception, error)
        else:
            self.post(self.done.set_result, value)

    async def wait(self) -> T:
        """The result. Cancelled, it cancels the work, and raises when that is over."""
        cancelled: asyncio.CancelledError | None = None
        while not self.done.done():
            try:
                await asyncio.wait([self.done])
            except asyncio.CancelledError as exc:
                cancelled = exc
                self._cancel()
        if cancelled is not None:
            raise cancelled
        return self.done.result()

    async def wait_quietly(self) -> None:
        """Waits for the end, whatever it is. Only a cancellation of the waiting task is raised."""
        try:
            await self.wait()
        except BaseException as exc:
            if not self.done.done() or self.done.exception() is not exc:
                raise


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """A short call that may block."""
    work = _Work("rmaker-aio", functools.partial(function, *args))
    work.begin()
    return await work.wait()


# ---- Installations ---------------------------------------------------------------------------------------------------


class Installation:
    """One installation; an async iterator of its progress, and a context that does not leave it running.

    Args:
        source, target, slot, options, http: as `rmaker_ota.install` takes them.
        header_gate, on_phase, on_checkpoint: likewise; called on the thread of the installation, which waits for them.

    It begins with the first thing asked of it. The iterator shows the newest progress: what a slow reader missed is
    left out. It ends with the installation, by raising what ended that.
    """

    def __init__(
        self,
        source: ota_core.Source | str | os.PathLike[str] | bytes | int,
        target: Target | str,
        *,
        slot: Slot | None = None,
        options: InstallOptions = InstallOptions(),
        http: HttpOptions = HttpOptions(),
        header_gate: Callable[[ImageHeader], None] | None = None,
        on_phase: Callable[[Phase], None] | None = None,
        on_checkpoint: Callable[[ResumePoint], None] | None = None,
    ) -> None:
        self._target = target
        self._make = functools.partial(
            Installer,
            source,
            slot=slot,
            options=options,
            http=http,
            header_gate=header_gate,
            on_phase=on_phase,
            on_progress=self._heard,
            on_checkpoint=on_checkpoint,
        )
        self._lock = threading.Lock()
        self._installer: Installer | None = None
        self._cancelled = False
        self._work: _Work[InstallResult] | None = None
        self._news = asyncio.Event()
        self._latest: Progress | None = None

    def start(self) -> None:
        """Begins, unless it has begun."""
        if self._work is None:
            self._work = _Work("rmaker-ota-install", self._run, self.cancel)
            self._work.done.add_done_callback(lambda _: self._news.set())
            self._work.begin()

    async def result(self) -> InstallResult:
        """Waits for the end.

        Raises:
            OtaError: the first failure of any stage; the slot in use is untouched.
            BaseException: exactly what a callback raised.
        """
        return await self._begun().wait()

    def cancel(self) -> None:
        """Ends it with `rmaker_ota.CancelledError` unless it has begun to commit. Any thread, any time."""
        with self._lock:
            self._cancelled = True
            if self._installer is not None:
                self._installer.cancel()

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self

    async def __anext__(self) -> Progress:
        work = self._begun()
        while self._latest is None:
            if work.done.done():
                work.done.result()
                raise StopAsyncIteration
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self.cancel()
                await work.wait_quietly()
                raise
        latest, self._latest = self._latest, None
        return latest

    async def __aenter__(self) -> Installation:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        work = self._begun()
        if not work.done.done():
            self.cancel()
            await work.wait_quietly()

    def _begun(self) -> _Work[InstallResult]:
        self.start()
        assert self._work is not None
        return self._work

    # -- on the thread of the installation

    def _run(self) -> InstallResult:
        if not isinstance(self._target, str):
            return self._install(self._target)
        from rmaker_ota.targets import open_target

        with open_target(self._target) as opened:
            return self._install(opened)

    def _install(self, target: Target) -> InstallResult:
        installer = self._make(target)
        with self._lock:
            self._installer = installer
            if self._cancelled:
                installer.cancel()
        return installer.run()

    def _heard(self, progress: Progress) -> None:
        assert self._work is not None
        self._work.post(self._take, progress)

    def _take(self, progress: Progress) -> None:
        self._latest = progress
        self._news.set()


async def install(
    source: ota_core.Source | str | os.PathLike[str] | bytes | int,
    target: Target | str,
    *,
    on_progress: Callable[[Progress], object] | None = None,
    **more: Any,
) -> InstallResult:
    """Installs one image into one target.

    Args:
        on_progress: called on the event loop; what it raises ends the installation.
        more: as `Installation` takes it.

    Raises:
        OtaError: the first failure of any stage; the slot in use is untouched.
    """
    async with Installation(source, target, **more) as installation:
        if on_progress is not None:
            async for progress in installation:
                on_progress(progress)
        return await installation.result()


# ---- Nodes -----------------------------------------------------------------------------------------------------------


class EventStream:
    """The events of a node from the moment it was made, until the node ends or the stream is closed."""

    def __init__(self, node: Node, base: str | None) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._is_closed = False
        self._is_dropping = False
        self._subscription: Subscription = node.sync.events.subscribe(self._heard, base)

    def close(self) -> None:
        """Ends the stream behind what it holds. Harmless when repeated."""
        self._subscription.unsubscribe()
        self._is_closed = True
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _heard(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        if len(self._events) >= MAX_EVENTS_WAITING:
            if not self._is_dropping:
                log.error("event %s and more dropped: whoever reads the events is far behind", event.name)
            self._is_dropping = True
            return
        self._is_dropping = False
        self._events.append(event)
        self._news.set()


class Node:
    """A node, seen from an event loop. Leaving its context stops it.

    Args:
        node: the node itself, which is `sync` here; it may be used beside this, from threads.
    """

    def __init__(self, node: SyncNode) -> None:
        self.sync = node
        self._streams: list[EventStream] = []
        self._end: _Work[Outcome] = _Work("rmaker-aio-wait", node.wait, self._stop_in_background)
        self._end.done.add_done_callback(lambda _: self._close_streams())
        self._end.begin()

    @classmethod
    async def open(cls, config: NodeConfig, **stand_ins: Any) -> Node:
        """Makes the node, which is its power-on. Arguments and errors as of `rmaker_ota.Node`."""
        from rmaker_ota.rainmaker.node import Node as SyncNode

        return cls(await _in_thread(functools.partial(SyncNode, config, **stand_ins)))

    @classmethod
    async def from_config(cls, path: str | os.PathLike[str], **stand_ins: Any) -> Node:
        """The same, as a configuration file says."""
        from rmaker_ota.config import load_config

        return await cls.open(await _in_thread(load_config, path), **stand_ins)

    def events(self, base: str | None = None) -> EventStream:
        """The events from now on; ``base``: only those of that base."""
        stream = EventStream(self, base)
        self._streams = [each for each in self._streams if not each._is_closed]
        self._streams.append(stream)
        if self._end.done.done():
            stream.close()
        return stream

    def add_device(self, device: Device) -> None:
        """Gives the node a device or a service; its write callback runs on a thread of the node. Raises ArgumentError.

        `Param.report` may block for a moment: call it with `asyncio.to_thread`, or use `report`.
        """
        self.sync.add_device(device)

    async def report(self) -> None:
        """Reports every parameter that was updated. Raises as `rmaker_ota.Node.report` does."""
        await _in_thread(self.sync.report)

    async def enable(self, config: OtaConfig | None = None, type: int = OtaType.USING_TOPICS) -> Ota:
        """Switches OTA on. The callbacks in ``config`` run on the node's worker thread. Errors as of `rmaker_ota.Ota`.

        The methods of what is returned may block for a moment: call them with `asyncio.to_thread`.
        """
        from rmaker_ota.rainmaker.ota import Ota

        return await _in_thread(Ota, self.sync, config, type)

    async def start(self) -> None:
        """Connects, and returns. Raises as `rmaker_ota.Node.start` does."""
        await _in_thread(self.sync.start)

    async def wait(self) -> Outcome:
        """Waits for the end of the node. Cancelled, it stops the node first.

        Raises:
            OtaError: what ended it.
        """
        return await self._end.wait()

    async def run(self) -> Outcome:
        """Starts the node and waits for its end. Cancelled, it stops the node first."""
        try:
            await self.start()
        except asyncio.CancelledError:
            await self.stop()
            raise
        return await self.wait()

    async def stop(self) -> None:
        """Ends the node in order; returns when it has ended."""
        await _in_thread(self.sync.stop)
        await self._end.wait_quietly()

    async def __aenter__(self) -> Node:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _stop_in_background(self) -> None:
        threading.Thread(target=self.sync.stop, name="rmaker-aio-stop", daemon=True).start()

    def _close_streams(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams.clear()


__all__ = ["EventStream", "Installation", "Node", "install"]
