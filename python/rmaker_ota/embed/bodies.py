"""What the functions of ``esp_rmaker_ota.h`` and ``rmaker_ota_host.h`` do: `Bodies` has a method for each.

C strings and structures become the Python API's, and back. No exception leaves this module: it becomes an
``esp_err_t``, the calling thread's last error, and an entry of the log. What a callback is given lives until the
callback returns; nothing else of a caller's memory is kept but ``priv`` and the pointers to its functions.

Loaded by host.c, which hands over cffi's module: there is no way to import it.
"""

from __future__ import annotations

import functools
import logging
import os
import ssl  # noqa: F401 - here and now: see at_exit in host.c
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from rmaker_ota import esp_rmaker_ota as api
from rmaker_ota import ota_core  # noqa: F401 - likewise
from rmaker_ota.config import load_config
from rmaker_ota.errors import OtaError
from rmaker_ota.esp_err import EspErr, esp_err_name
from rmaker_ota.rainmaker.application import OtaConfig, OtaDiagPriv, OtaHandle
from rmaker_ota.rainmaker.events import Event
from rmaker_ota.rainmaker.node import Node, Outcome, default_node
from rmaker_ota.rainmaker.types import COMMON_EVENT_BASE, OTA_EVENT_BASE, RMAKER_EVENT_BASE, CommonEvent, OtaData
from rmaker_ota.rainmaker.worker import Worker

log = logging.getLogger(__name__)

INT_MAX = 2**31 - 1
LOG_CAPACITY = 1000  # entries that wait for a log callback
LOG_FLUSH_S = 2.0
LEVELS = {0: logging.CRITICAL + 1, 1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}
ANY_EVENT = -1

# What a number alone does not say.
REASONS: dict[tuple[str, int], str] = {
    ("esp_rmaker_ota_enable", EspErr.INVALID_ARG): "no such type",
    ("esp_rmaker_ota_enable", EspErr.FAIL): "OTA is on already, or the node has ended",
    ("esp_rmaker_ota_enable_default", EspErr.FAIL): "OTA is on already, or the node has ended",
    ("esp_rmaker_ota_report_status", EspErr.FAIL): "no handle, OTA is not on, or the report was not published",
    ("esp_rmaker_ota_report_status", EspErr.INVALID_STATE): "there is no job to report for",
    ("esp_rmaker_ota_default_cb", EspErr.FAIL): "the job failed, was rejected or is delayed, or cannot be begun",
    ("esp_rmaker_ota_https_cb", EspErr.FAIL): "the job failed, was rejected or is delayed, or cannot be begun",
    ("esp_rmaker_ota_mqtt_cb", EspErr.FAIL): "the job failed, was rejected or is delayed, or cannot be begun",
    ("esp_rmaker_ota_fetch", EspErr.INVALID_STATE): "MQTT is not connected",
    ("esp_rmaker_ota_fetch", EspErr.FAIL): "the request was not published",
    ("esp_rmaker_ota_fetch_with_delay", EspErr.INVALID_ARG): "a negative time",
    ("esp_rmaker_ota_mark_valid", EspErr.INVALID_STATE): "there is no image to confirm",
    ("esp_rmaker_ota_mark_valid", EspErr.INVALID_ARG): "OTA is not on",
    ("esp_rmaker_ota_mark_invalid", EspErr.INVALID_STATE): "the running image is confirmed",
    ("esp_rmaker_ota_mark_invalid", EspErr.OTA_ROLLBACK_FAILED): "there is no other image to run",
}
NO_NODE = "there is no open node"


class _Refused(OtaError):
    """A call that makes no sense; not worth an entry in the log."""


def _refuse(code: EspErr, why: str) -> NoReturn:
    raise _Refused(why, esp_err=code)


@dataclass(eq=False)
class _Registration:
    """An event handler: see ``rmaker_ota_event_handler_register``."""

    base: str | None
    event_id: int
    handler: Any  # a C function
    arg: Any
    calls: int = 0  # that run now

    def wants(self, event: Event) -> bool:
        return self.base in (None, event.base) and self.event_id in (ANY_EVENT, event.id)


class Bodies:
    """The functions of the headers.

    Args:
        ffi, lib: cffi's module.
        is_ours: this Python runs for the library alone, so its log is ours too.
    """

    def __init__(self, ffi: Any, lib: Any, is_ours: bool) -> None:
        self._ffi = ffi
        self._lib = lib
        self._lifecycle = threading.Lock()
        self._node: Node | None = None  # opened and not stopped
        self._watcher: threading.Thread | None = None
        self._is_exiting = False
        self._attached: Node | None = None  # whose events are handed on
        self._big = threading.local()  # .filesize: of the job this thread's callback is for, where an int does not do
        self._bases = {
            OTA_EVENT_BASE: lib.RMAKER_OTA_EVENT,
            COMMON_EVENT_BASE: lib.RMAKER_COMMON_EVENT,
            RMAKER_EVENT_BASE: lib.RMAKER_EVENT,
        }
        self._changed = threading.Condition()  # of the two that follow
        self._registrations: tuple[_Registration, ...] = ()
        self._delivering: set[int] = set()  # threads inside a handler
        self._log = _Log(ffi, lib)
        if is_ours:
            self._log.set(logging.WARNING, None, None)

    # -- esp_rmaker_ota.h

    def esp_rmaker_ota_enable(self, config: Any, ota_type: int) -> int:
        node = default_node()
        if node is None:
            _refuse(EspErr.INVALID_STATE, NO_NODE)
        self._attach(node)
        null = self._ffi.NULL
        if config == null:
            return api.esp_rmaker_ota_enable(None, ota_type)
        ota_cb = None if config.ota_cb == null else functools.partial(self._run_job, config.ota_cb, config.priv)
        ota_diag = None if config.ota_diag == null else functools.partial(self._run_diag, config.ota_diag)
        mine = OtaConfig(ota_cb, ota_diag, self._text(config.server_cert), config.priv)
        return api.esp_rmaker_ota_enable(mine, ota_type)

    def esp_rmaker_ota_enable_default(self) -> int:
        return self.esp_rmaker_ota_enable(self._ffi.NULL, api.OTA_USING_TOPICS)

    def esp_rmaker_ota_report_status(self, handle: Any, status: int, info: Any) -> int:
        return api.esp_rmaker_ota_report_status(self._handle(handle), status, self._text(info))

    def esp_rmaker_ota_default_cb(self, handle: Any, data: Any) -> int:
        return api.esp_rmaker_ota_default_cb(self._handle(handle), self._data(data))

    def esp_rmaker_ota_https_cb(self, handle: Any, data: Any) -> int:
        return api.esp_rmaker_ota_https_cb(self._handle(handle), self._data(data))

    def esp_rmaker_ota_mqtt_cb(self, handle: Any, data: Any) -> int:
        return api.esp_rmaker_ota_mqtt_cb(self._handle(handle), self._data(data))

    def esp_rmaker_ota_fetch(self) -> int:
        return api.esp_rmaker_ota_fetch()

    def esp_rmaker_ota_fetch_with_delay(self, seconds: int) -> int:
        return api.esp_rmaker_ota_fetch_with_delay(seconds)

    def esp_rmaker_ota_mark_valid(self) -> int:
        return api.esp_rmaker_ota_mark_valid()

    def esp_rmaker_ota_mark_invalid(self) -> int:
        return api.esp_rmaker_ota_mark_invalid()

    # -- rmaker_ota_host.h

    def rmaker_ota_open(self, config_file: Any) -> int:
        if config_file == self._ffi.NULL:
            _refuse(EspErr.INVALID_ARG, "config_file is NULL")
        with self._lifecycle:
            if self._node is not None:
                _refuse(EspErr.INVALID_STATE, f"node {self._node.node_id} is open")
            config = load_config(os.fsdecode(self._ffi.string(config_file)))
            restarter = self._exec if config.restart.mode == "process" else None
            node = Node(config, restarter=restarter)
            self._node = node
            self._attach(node)
            self._lib.rmaker_ota_c_opened()
            self._watcher = threading.Thread(target=self._watch, args=(node,), name="rmaker-host", daemon=True)
            self._watcher.start()
        return EspErr.OK

    def rmaker_ota_start(self) -> int:
        self._open_node().start()
        return EspErr.OK

    def rmaker_ota_stop(self) -> int:
        node, watcher = self._node, self._watcher
        if node is None:
            _refuse(EspErr.INVALID_STATE, NO_NODE)
        node.stop()
        if watcher is not None:
            watcher.join(LOG_FLUSH_S)
        with self._lifecycle:
            if self._node is node:
                self._node = self._watcher = self._attached = None
        self._log.flush()
        return EspErr.OK

    def rmaker_ota_restart(self) -> int:
        if self._node is not None:
            self.rmaker_ota_stop()
        self._exec("asked for by the program")
        raise AssertionError("exec returned")

    def rmaker_ota_info(self, info: Any) -> int:
        if info == self._ffi.NULL:
            _refuse(EspErr.INVALID_ARG, "info is NULL")
        node = self._open_node()
        boot = node.boot
        texts = {
            "node_id": node.node_id,
            "project": boot.project_name,
            "version": boot.version,
            "slot": boot.running_slot or "",
        }
        for name, text in texts.items():
            field = getattr(info, name)
            raw = text.encode()[: len(field) - 1].decode(errors="ignore").encode()
            self._ffi.memmove(field, raw.ljust(len(field), b"\0"), len(field))
        info.connected = node.is_connected
        return EspErr.OK

    def rmaker_ota_event_handler_register(self, base: Any, event_id: int, handler: Any, arg: Any) -> int:
        if handler == self._ffi.NULL:
            _refuse(EspErr.INVALID_ARG, "handler is NULL")
        with self._changed:
            self._registrations += (_Registration(self._text(base), event_id, handler, arg),)
        return EspErr.OK

    def rmaker_ota_event_handler_unregister(self, base: Any, event_id: int, handler: Any) -> int:
        wanted = (self._text(base), event_id, handler)
        with self._changed:
            for found in self._registrations:
                if (found.base, found.event_id, found.handler) == wanted:
                    break
            else:
                _refuse(EspErr.NOT_FOUND, "no such registration")
            self._registrations = tuple(each for each in self._registrations if each is not found)
            if threading.get_ident() not in self._delivering:
                self._changed.wait_for(lambda: found.calls == 0)
        return EspErr.OK

    def rmaker_ota_set_log(self, level: int, callback: Any, arg: Any) -> int:
        if level not in LEVELS:
            _refuse(EspErr.INVALID_ARG, f"no such level: {level}")
        self._log.set(LEVELS[level], None if callback == self._ffi.NULL else callback, arg)
        return EspErr.OK

    # -- the end

    def at_exit(self) -> None:
        """The program exits: as `rmaker_ota_stop`, but nobody is told: a main() that then returns exits once more."""
        self._is_exiting = True
        if self._node is not None:
            self.rmaker_ota_stop()
        self._log.flush()

    def _exec(self, reason: str) -> None:
        """Starts the program anew. For `Node`, a restarter.

        Raises:
            OtaError: it cannot be started.
        """
        log.info("starting this program anew: %s", reason)
        self._log.flush()
        number = self._lib.rmaker_ota_c_exec()
        raise OtaError(f"this program cannot be started anew: {os.strerror(number)}")

    def _watch(self, node: Node) -> None:
        """Waits for the end of a node and tells C of it."""
        text = ""
        try:
            end = self._lib.RMAKER_OTA_END_STOPPED
            if node.wait() is Outcome.RESTART:
                end = self._lib.RMAKER_OTA_END_RESTART
        except Exception as error:
            end, text = self._lib.RMAKER_OTA_END_FAILED, str(error)
        if not self._is_exiting:
            self._lib.rmaker_ota_c_ended(end, text.encode(errors="replace"))

    def _open_node(self) -> Node:
        node = self._node
        if node is None:
            _refuse(EspErr.INVALID_STATE, NO_NODE)
        return node

    # -- callbacks of the application, on the node's threads

    def _run_job(self, ota_cb: Any, priv: Any, handle: OtaHandle, data: OtaData) -> None:
        kept = []  # until it returns

        def text(value: str | None) -> Any:
            if value is None:
                return self._ffi.NULL
            kept.append(self._ffi.new("char[]", value.encode(errors="replace")))
            return kept[-1]

        job = self._ffi.new(
            "esp_rmaker_ota_data_t *",
            {
                "url": text(data.url),
                "stream_id": text(data.stream_id),
                "filesize": data.filesize if 0 <= data.filesize <= INT_MAX else 0,
                "fw_version": text(data.fw_version),
                "file_md5": text(data.file_md5),
                "ota_job_id": text(data.ota_job_id),
                "server_cert": text(data.server_cert),
                "priv": self._ffi.cast("char *", priv),
                "metadata": text(data.metadata),
            },
        )
        self._big.filesize = data.filesize if data.filesize > INT_MAX else 0
        ota_cb(self._ffi.cast("void *", handle.number), job)

    def _run_diag(self, ota_diag: Any, about: OtaDiagPriv, priv: Any) -> int:
        c_about = self._ffi.new("esp_rmaker_ota_diag_priv_t *", {"state": about.state, "rmaker_ota": about.rmaker_ota})
        return int(ota_diag(c_about, priv))

    def _attach(self, node: Node) -> None:
        with self._changed:
            if self._attached is node:
                return
            self._attached = node
        node.events.subscribe(self._deliver)

    def _deliver(self, event: Event) -> None:
        data, size = self._event_data(event)
        base = self._bases[event.base]
        me = threading.get_ident()
        for registration in self._registrations:
            with self._changed:
                if not registration.wants(event) or registration not in self._registrations:
                    continue
                registration.calls += 1
                self._delivering.add(me)
            try:
                registration.handler(registration.arg, base, event.id, data, size)
            finally:
                with self._changed:
                    registration.calls -= 1
                    self._delivering.discard(me)
                    self._changed.notify_all()

    def _event_data(self, event: Event) -> tuple[Any, int]:
        """What an event carries in C: specification, section 1.2."""
        ffi, data = self._ffi, event.data
        if isinstance(data, str):
            raw = data.encode(errors="replace")
            return ffi.new("char[]", raw), len(raw) + 1
        if isinstance(data, int):
            kind = "int8_t" if (event.base, event.id) == (COMMON_EVENT_BASE, CommonEvent.REBOOT) else "int"
            return ffi.new(f"{kind} *", data), ffi.sizeof(kind)
        return ffi.NULL, 0

    # -- from C

    def _text(self, pointer: Any) -> str | None:
        if pointer == self._ffi.NULL:
            return None
        raw: bytes = self._ffi.string(pointer)
        return raw.decode(errors="replace")

    def _handle(self, pointer: Any) -> OtaHandle | None:
        number = int(self._ffi.cast("uintptr_t", pointer))
        node = default_node()
        return None if number == 0 or node is None else OtaHandle(node, number)

    def _data(self, pointer: Any) -> OtaData:
        if pointer == self._ffi.NULL:
            _refuse(EspErr.INVALID_ARG, "ota_data is NULL")
        return OtaData(
            url=self._text(pointer.url),
            stream_id=self._text(pointer.stream_id),
            filesize=pointer.filesize or getattr(self._big, "filesize", 0),
            fw_version=self._text(pointer.fw_version),
            file_md5=self._text(pointer.file_md5),
            ota_job_id=self._text(pointer.ota_job_id),
            server_cert=self._text(pointer.server_cert),
            priv=pointer.priv,
            metadata=self._text(pointer.metadata),
        )


# ---- Log -------------------------------------------------------------------------------------------------------------


class _Log:
    """Where the entries of ``rmaker_ota`` go: standard error, or a C function on a thread of its own."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi = ffi
        self._lib = lib
        self._lock = threading.Lock()
        self._root = logging.getLogger("rmaker_ota")
        self._handler: logging.Handler | None = None

    def set(self, level: int, callback: Any, arg: Any) -> None:
        handler: logging.Handler
        if callback is None:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        else:
            handler = _CallbackHandler(self._ffi, self._lib, callback, arg)
        with self._lock:
            before, self._handler = self._handler, handler
            self._root.addHandler(handler)
            self._root.setLevel(level)
            if before is not None:
                self._root.removeHandler(before)
        if isinstance(before, _CallbackHandler):
            before.stop()

    def flush(self) -> None:
        """Waits a moment for entries that have not been taken yet."""
        with self._lock:
            handler = self._handler
        if handler is not None:
            handler.flush()


class _CallbackHandler(logging.Handler):
    """Hands entries to a C function, without waiting for it."""

    def __init__(self, ffi: Any, lib: Any, callback: Any, arg: Any) -> None:
        super().__init__()
        self._ffi = ffi
        self._levels = (
            (logging.ERROR, lib.RMAKER_OTA_LOG_ERROR),
            (logging.WARNING, lib.RMAKER_OTA_LOG_WARN),
            (logging.INFO, lib.RMAKER_OTA_LOG_INFO),
        )
        self._lowest = lib.RMAKER_OTA_LOG_DEBUG
        self._callback = callback
        self._arg = arg
        self._dropped = 0
        self._worker = Worker("rmaker-log", capacity=LOG_CAPACITY)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        # With the handler's lock held.
        if self._dropped and self._submit(logging.WARNING, record.name, f"{self._dropped} entries were dropped"):
            self._dropped = 0
        if not self._submit(record.levelno, record.name, self.format(record)):
            self._dropped += 1

    def _submit(self, level: int, name: str, text: str) -> bool:
        c_level = next((each for least, each in self._levels if level >= least), self._lowest)
        tag, line = (self._ffi.new("char[]", each.encode(errors="replace")) for each in (name, text))
        return self._worker.submit(functools.partial(self._callback, self._arg, c_level, tag, line))

    def flush(self) -> None:
        if self._worker.is_current():
            return
        reached = threading.Event()
        if self._worker.submit(reached.set, always=True):
            reached.wait(LOG_FLUSH_S)

    def stop(self) -> None:
        self.flush()
        self._worker.stop(LOG_FLUSH_S)


# ---- Into C ----------------------------------------------------------------------------------------------------------


def _guard(set_error: Callable[[bytes], None], name: str, body: Callable[..., int]) -> Callable[..., int]:
    """A body that ends with an ``esp_err_t`` whatever happens."""

    @functools.wraps(body)
    def guarded(*args: Any) -> int:
        try:
            code = int(body(*args))
            if code == EspErr.OK:
                return code
            no_node = code == EspErr.INVALID_STATE and default_node() is None
            why = NO_NODE if no_node else REASONS.get((name, code), "")
        except _Refused as error:
            code, why = error.esp_err, error.message
        except OtaError as error:
            log.error("%s: %s", name, error)
            code, why = error.esp_err or EspErr.FAIL, str(error)
        except BaseException as error:
            log.exception("%s", name)
            code, why = EspErr.FAIL, f"{type(error).__name__}: {error}"
        set_error(f"{name}: {esp_err_name(code)}{': ' if why else ''}{why}".encode(errors="replace"))
        return code

    return guarded


def define(ffi: Any, lib: Any, is_ours: int) -> None:
    """Makes the functions of the library work. Called once, by host.c."""
    bodies = Bodies(ffi, lib, bool(is_ours))

    def set_error(text: bytes) -> None:
        lib.rmaker_ota_c_set_error(text)

    for name in BODIES:
        body = _guard(set_error, name, getattr(bodies, name))
        ffi.def_extern(name=f"rmaker_ota_py_{name}", error=EspErr.FAIL)(body)
    ffi.def_extern(name="rmaker_ota_py_at_exit")(bodies.at_exit)


BODIES = tuple(name for name in vars(Bodies) if name.startswith(("esp_rmaker_ota_", "rmaker_ota_")))
