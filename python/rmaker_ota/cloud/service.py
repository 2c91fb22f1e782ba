"""The job service as a whole: opens everything, runs it, and closes it again, whatever happens in between.

`CloudService` belongs to one asyncio loop; `ServiceThread` gives it a thread with a loop for callers that have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmaker_ota.cloud.config import CloudConfig
from rmaker_ota.cloud.images import ImageStore
from rmaker_ota.cloud.jobs import JobService
from rmaker_ota.cloud.links import Links, load_secret, write_private
from rmaker_ota.cloud.mqtt import MqttLink
from rmaker_ota.cloud.store import HistoryEntry, Store
from rmaker_ota.cloud.streams import StreamServer
from rmaker_ota.errors import ConfigError, DeviceError, StateError, UnsupportedError

if TYPE_CHECKING:
    from aiohttp import web

    from rmaker_ota.cloud.http import TransferObserver

logger = logging.getLogger("rmaker_ota.cloud")

SHUTDOWN_S = 1.0  # how long downloads that run may go on after the end was asked for


def require_aiohttp() -> None:
    """Raises UnsupportedError, with the command that helps, when aiohttp is not installed."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise UnsupportedError("the job service needs aiohttp: pip install 'rmaker-ota[cloud]'") from None


class CloudService:
    """Images, jobs, broker connection and admin API of one configuration.

    Args:
        config: what to run.
        clock: Unix seconds.
        on_change: called with every entry of a job's history, from any thread; must not block.
        on_transfer: called when an answer with image bytes begins and has ended, on the loop; must not block.
        on_ready: called when images are served and, for the first time, the broker is connected; from any thread.

    Attributes:
        url: base of image URLs.
        address: host and port of the image server, once it was started.

    Raises:
        UnsupportedError: aiohttp is not installed.
    """

    def __init__(
        self,
        config: CloudConfig,
        *,
        clock: Callable[[], float] = time.time,
        on_change: Callable[[HistoryEntry], None] | None = None,
        on_transfer: TransferObserver | None = None,
        on_ready: Callable[[], object] | None = None,
    ) -> None:
        require_aiohttp()
        self._config = config
        self._clock = clock
        self._on_change = on_change
        self._on_transfer = on_transfer
        self._on_ready = on_ready
        self._closers: contextlib.AsyncExitStack | None = None
        self.store: Store
        self.images: ImageStore
        self.jobs: JobService
        self.mqtt: MqttLink
        self.url = ""
        self.address = ("", 0)

    async def start(self) -> None:
        """Starts everything. When it returns, images are served and the broker is being connected.

        Raises:
            ConfigError: a file or address the configuration names cannot be used.
            StateError: another service uses the data directory.
            StoreError: the database cannot be used.
            DeviceError: the data directory cannot be used.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._closers = stack.pop_all()

    async def stop(self) -> None:
        """Ends everything, in reverse order. Calling it again is harmless."""
        closers, self._closers = self._closers, None
        if closers is not None:
            await closers.aclose()

    async def __aenter__(self) -> CloudService:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        from rmaker_ota.cloud.http import AdminServer, Changes, ImageServer

        config, loop = self._config, asyncio.get_running_loop()
        data = config.service.data_dir
        try:
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.callback(os.close, _lock(data))
            secret = load_secret(data / "url.key")
            token = _load_token(data / "admin.token") if config.admin.port else None
            self.store = Store(data / "jobs.sqlite")
            stack.callback(self.store.close)
            self.images = ImageStore(data / "images", self.store, clock=self._clock)
        except OSError as error:
            raise DeviceError(f"{data}: {error.strerror}", device_code=error.errno or 0) from error
        links = Links(secret, ttl_s=config.http.url_ttl_s, clock=self._clock)
        changes = Changes(loop)

        def changed(entry: HistoryEntry) -> None:
            changes.notify(entry)
            if self._on_change is not None:
                self._on_change(entry)

        self.jobs = JobService(
            self.store,
            self.images,
            links,
            publish=self._publish,
            clock=self._clock,
            on_change=changed,
            streams=config.mqtt.streams,
        )
        self.mqtt = MqttLink(
            config.mqtt,
            {
                "otafetch": self.jobs.on_fetch,
                "otastatus": self.jobs.on_status,
                "config": self.jobs.on_config,
                "params/local": self.jobs.on_params,
                "params/local/init": self.jobs.on_params_init,
            },
            on_ready=self._broker_ready,
            streams=StreamServer(self.store, self.images).handle if config.mqtt.streams else None,
        )

        image_server = ImageServer(
            self.images, links, stall_timeout_s=config.http.stall_timeout_s, on_transfer=self._on_transfer
        )
        tls = _server_tls(config)
        listener = _listen(config.http.host, config.http.port, "[http] port")
        stack.callback(listener.close)
        self.address = listener.getsockname()[:2]
        self.url = links.base = config.http.url or _url("https" if tls else "http", listener)
        await _serve(stack, image_server.app, listener, tls)

        admin = AdminServer(self.store, self.images, self.jobs, changes, token=token, status=self.status)
        if config.admin.socket is not None:
            admin_listener = _listen_unix(config.admin.socket)
            stack.callback(config.admin.socket.unlink, missing_ok=True)
        else:
            admin_listener = _listen("127.0.0.1", config.admin.port, "[admin] port")
        stack.callback(admin_listener.close)
        await _serve(stack, admin.app, admin_listener, None)

        stack.callback(self.mqtt.stop)
        self.mqtt.start()

    def status(self) -> dict[str, Any]:
        """What the service says of itself, for ``/v1/status``."""
        mqtt = self._config.mqtt
        return {
            "url": self.url,
            "mqtt": {"host": mqtt.host, "port": mqtt.port, "connected": self.mqtt.ready.is_set(), **self.mqtt.counts()},
            "data_dir": str(self._config.service.data_dir),
        }

    def _publish(self, topic: str, payload: bytes) -> bool:
        return self.mqtt.publish(topic, payload)

    def _broker_ready(self) -> None:
        sent = self.jobs.push_unsent()
        if sent:
            logger.info("%d waiting jobs sent", sent)
        on_ready, self._on_ready = self._on_ready, None
        if on_ready is not None:
            on_ready()


async def serve(
    config: CloudConfig,
    *,
    on_listening: Callable[[CloudService], object] | None = None,
    on_ready: Callable[[CloudService], object] | None = None,
) -> signal.Signals:
    """Runs the service until SIGINT or SIGTERM; returns which one it was. Raises what `CloudService.start` raises."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number)

    service = CloudService(config, on_ready=lambda: on_ready(service) if on_ready else None)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        async with service:
            if on_listening is not None:
                on_listening(service)
            return await stopped
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class ServiceThread:
    """The service on a thread of its own: ``with ServiceThread(config) as service: service.jobs.create(...)``.

    Args:
        wait_ready_s: how long `start` waits for the broker; 0: it does not.
        observers: the ``clock``, ``on_change``, ``on_transfer`` of `CloudService`.
    """

    def __init__(self, config: CloudConfig, *, wait_ready_s: float = 0, **observers: Any) -> None:
        self._wait_ready_s = wait_ready_s
        self._ready = threading.Event()
        self._service = CloudService(config, on_ready=self._ready.set, **observers)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="cloud", daemon=True)

    def start(self) -> CloudService:
        """Starts and returns the service.

        Raises what `CloudService.start` raises, and StateError when the broker was not reached in time.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        if self._wait_ready_s and not self._ready.wait(self._wait_ready_s):
            self.stop()
            raise StateError(f"no connection to the broker within {self._wait_ready_s} s")
        return self._service

    def stop(self) -> None:
        """Ends the service and waits until it has ended. Calling it again is harmless."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> CloudService:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self._service.start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._started.set()
        try:
            await self._stop.wait()
        finally:
            await self._service.stop()


async def _serve(
    stack: contextlib.AsyncExitStack, app: web.Application, listener: socket.socket, tls: ssl.SSLContext | None
) -> None:
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=tls).start()


def _server_tls(config: CloudConfig) -> ssl.SSLContext | None:
    http = config.http
    if http.cert is None:
        logger.warning("images are served without TLS (allow_http)")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(http.cert, http.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"[http] cert = {str(http.cert)!r}, [http] key = {str(http.key)!r}:"
            f" expected a PEM certificate chain and its private key: {error}"
        ) from error
    return context


def _listen(host: str, port: int, key: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"{key} = {port} on {host!r}: cannot listen there: {_reason(error)}") from error


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket():
            path.unlink()  # left by a service that was killed: the lock of the data directory is ours
        listener.bind(str(path))
        path.chmod(0o600)  # before it listens: nobody could connect until now
        return listener
    except OSError as error:
        listener.close()
        raise ConfigError(f"[admin] socket = {str(path)!r}: cannot listen there: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror or error)
    return os.strerror(error.errno)  # asyncio and socket put more words into error.strerror


def _url(scheme: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StateError(f"{directory}: another job service uses this data directory") from None
    return descriptor


def _load_token(path: Path) -> str:
    with contextlib.suppress(FileExistsError):
        write_private(path, secrets.token_urlsafe(32).encode() + b"\n")
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if len(token) < 32:
        raise StateError(f"{path}: damaged: remove it to get a new one")
    return token
