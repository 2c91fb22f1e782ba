"""A TCP proxy on loopback that takes its time: whatever comes in goes on so many seconds later, in both directions.

Only time is added; as much may be on its way as both ends like, so this is a long line and not a narrow one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

PIECE = 64 * 1024


class DelayProxy:
    """Args:
    upstream: host and port it leads to.
    one_way_s: seconds each byte takes; a round trip takes two of them.
    """

    def __init__(self, upstream: tuple[str, int], one_way_s: float) -> None:
        self._upstream = upstream
        self._one_way_s = one_way_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._join, sock=self._listener, limit=PIECE)
        await self._stopped.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            try:
                ways = [self._pass_on(reader, up_writer), self._pass_on(up_reader, writer)]
                tasks = [asyncio.ensure_future(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                up_writer.transport.abort()
        writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for end in (reader, writer):
            transport = getattr(end, "transport", None)
            if transport is not None:
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take_in() -> None:
            while piece := await reader.read(PIECE):
                waiting.put_nowait((self._loop.time() + self._one_way_s, piece))
            waiting.put_nowait((self._loop.time() + self._one_way_s, b""))

        coming = asyncio.ensure_future(take_in())
        try:
            while True:
                due, piece = await waiting.get()
                await asyncio.sleep(due - self._loop.time())
                if not piece:
                    return
                writer.write(piece)
                await writer.drain()
        finally:
            coming.cancel()
