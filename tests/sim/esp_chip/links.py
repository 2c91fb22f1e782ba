"""Where the chip's port is: a pseudo terminal or a TCP server. Neither blocks the chip."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import select
import socket
import struct
import tty
from abc import ABC, abstractmethod
from pathlib import Path

_TCGETS2 = 0x802C542A
_TERMIOS2 = struct.Struct("@4IB19s2I")


class Link(ABC):
    """A host's port on one end, the chip on the other."""

    @property
    @abstractmethod
    def port(self) -> str:
        """What a host opens."""

    @abstractmethod
    def poll_fd(self) -> int | None:
        """What becomes readable when the host sends, or comes. None: nobody is there, look again soon."""

    @abstractmethod
    def is_open(self) -> bool:
        """Whether a host has the port open."""

    @abstractmethod
    def read(self) -> bytes:
        """What the host sent; nothing: nothing yet."""

    @abstractmethod
    def write(self, data: bytes) -> int:
        """Bytes that went out at once."""

    @abstractmethod
    def write_fd(self) -> int | None: ...

    @abstractmethod
    def host_baud(self) -> int | None:
        """What the host set its port to; None: the port has no baud rate."""

    @abstractmethod
    def unplug(self) -> None:
        """The port disappears; a host that has it open gets an error or end of file."""

    @abstractmethod
    def plug(self) -> None:
        """It comes back, under a new name where the kind of port has names."""

    def close(self) -> None:
        self.unplug()


class PtyLink(Link):
    """A raw pseudo terminal.

    Args:
        link: a symbolic link that always leads to the port while it exists, as those below /dev/serial/by-id do.
    """

    def __init__(self, link: Path | None = None) -> None:
        self._link = link
        self._master = -1
        self._port = ""
        self.plug()

    @property
    def port(self) -> str:
        return self._port

    def plug(self) -> None:
        if self._master >= 0:
            return
        master, slave = pty.openpty()
        if os.ttyname(slave) == self._port:  # the number is free again: take the next
            old = (master, slave)
            master, slave = pty.openpty()
            for fd in old:
                os.close(fd)
        self._master = master
        tty.setraw(slave)
        self._port = os.ttyname(slave)
        os.set_blocking(self._master, False)
        os.close(slave)
        if self._link is not None:
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(self._port)

    def unplug(self) -> None:
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
            if self._link is not None:
                self._link.unlink(missing_ok=True)

    def is_open(self) -> bool:
        if self._master < 0:
            return False
        poller = select.poll()
        poller.register(self._master, select.POLLIN)
        events = poller.poll(0)
        return not events or not events[0][1] & select.POLLHUP or bool(events[0][1] & select.POLLIN)

    def poll_fd(self) -> int | None:
        return self._master if self.is_open() else None

    def write_fd(self) -> int | None:
        return self._master if self.is_open() else None

    def read(self) -> bytes:
        try:
            return os.read(self._master, 65536)
        except OSError as exc:
            if exc.errno in (errno.EIO, errno.EAGAIN, errno.EBADF):  # EIO: the host closed it
                return b""
            raise

    def write(self, data: bytes) -> int:
        try:
            return os.write(self._master, data)
        except OSError as exc:
            if exc.errno in (errno.EIO, errno.EAGAIN, errno.EBADF):
                return 0
            raise

    def host_baud(self) -> int | None:
        if self._master < 0:
            return None
        with contextlib.suppress(OSError):
            speed: int = _TERMIOS2.unpack(fcntl.ioctl(self._master, _TCGETS2, bytes(_TERMIOS2.size)))[7]
            return speed or None
        return None


class TcpLink(Link):
    """A TCP server for one host at a time: ``socket://HOST:PORT``."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self._host = host
        self._number = port
        self._server: socket.socket | None = None
        self._client: socket.socket | None = None
        self.plug()

    @property
    def port(self) -> str:
        return f"socket://{self._host}:{self._number}"

    def plug(self) -> None:
        if self._server is not None:
            return
        self._server = socket.create_server((self._host, self._number))
        self._server.setblocking(False)
        self._number = self._server.getsockname()[1]

    def unplug(self) -> None:
        self._drop_client()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _accept(self) -> None:
        if self._client is None and self._server is not None:
            with contextlib.suppress(BlockingIOError):
                self._client, _ = self._server.accept()
                self._client.setblocking(False)
                self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def is_open(self) -> bool:
        self._accept()
        return self._client is not None

    def poll_fd(self) -> int | None:
        self._accept()
        if self._client is not None:
            return self._client.fileno()
        return None if self._server is None else self._server.fileno()

    def write_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    def read(self) -> bytes:
        self._accept()
        if self._client is None:
            return b""
        try:
            data = self._client.recv(65536)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._drop_client()
        return data

    def write(self, data: bytes) -> int:
        if self._client is None:
            return 0
        try:
            return self._client.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._drop_client()
            return 0

    def host_baud(self) -> int | None:
        return None


class DirectLink(Link):
    """No port at all: a host in the same thread calls `Chip.deliver` and takes what came.

    Attributes:
        baud: of the host.
    """

    def __init__(self) -> None:
        self.baud = 115200
        self._plugged = True
        self._waiting = bytearray()

    @property
    def port(self) -> str:
        return "direct"

    def take(self) -> bytes:
        """What the chip sent since the last time."""
        data = bytes(self._waiting)
        self._waiting.clear()
        return data

    def poll_fd(self) -> int | None:
        return None

    def write_fd(self) -> int | None:
        return None

    def is_open(self) -> bool:
        return self._plugged

    def read(self) -> bytes:
        return b""

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def host_baud(self) -> int | None:
        return self.baud

    def unplug(self) -> None:
        self._plugged = False

    def plug(self) -> None:
        self._plugged = True
