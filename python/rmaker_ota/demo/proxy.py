"""A TCP proxy on loopback that passes everything on, and cuts one connection when it is told to.

It sees TLS records only; to both sides a cut looks like a line that went dead in the middle: the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

BLOCK = 16 * 1024


class Proxy:
    """The proxy, on a thread of its own. ``port`` is where it listens; `forward_to` says where it leads."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._upstream: tuple[str, int] | None = None
        self._cut_after: int | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="proxy")

    def forward_to(self, host: str, port: int) -> None:
        """Where connections made from now on lead."""
        self._upstream = (host, port)

    def cut_after(self, count: int) -> None:
        """The next connection on which so many bytes come down ends there."""
        self._cut_after = count

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every connection and the proxy. Calling it again is harmless."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
        self._listener.close()
        if not self._loop.is_closed():
            self._loop.close()

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def _serve(self) -> None:
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        await self._stopped.wait()
        self._loop.remove_reader(self._listener)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it went away again
        task = asyncio.ensure_future(self._join(connection))
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            connection.close()  # also if the task never ran

        task.add_done_callback(ended)

    async def _join(self, connection: socket.socket) -> None:
        if self._upstream is None:
            return
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            try:
                up = asyncio.ensure_future(self._pass_on(reader, up_writer))
                down = asyncio.ensure_future(self._pass_down(up_reader, writer))
                try:
                    await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in (up, down):
                        each.cancel()
                    await asyncio.gather(up, down, return_exceptions=True)
            finally:
                up_writer.transport.abort()
        except OSError:
            pass  # the other side is not there: as if this one were not either
        finally:
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(BLOCK):
            writer.write(block)
            await writer.drain()

    async def _pass_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while block := await reader.read(BLOCK):
            cut_after = self._cut_after
            if cut_after is not None and passed + len(block) >= cut_after:
                self._cut_after = None
                block = block[: cut_after - passed]
                writer.write(block)
                await writer.drain()
                return
            writer.write(block)
            await writer.drain()
            passed += len(block)
