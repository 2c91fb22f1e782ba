# Sources: where bytes come from (source/source.h).

import operator as _operator
import os as _os
from collections import namedtuple as _namedtuple

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

SourceInfo = _namedtuple("SourceInfo", ("size", "offset", "entity_tag"), module="rmaker_ota.ota_core")
SourceInfo.__doc__ = """What opening a source found out.

Attributes:
    size: total bytes of the whole object, whatever the offset; None: not told.
    offset: where the bytes really begin: the offset asked for, or 0 when it had to start over.
    entity_tag: strong HTTP entity tag as sent, with quotes; "": none.
"""


cdef bytes c_text(str name, object value):
    """UTF-8 of `value` for C; None stays None."""
    if value is None:
        return None
    cdef bytes text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(value)
    if b"\0" in text:
        raise _errors.ArgumentError(f"{name} contains a NUL character")
    return text


cdef bytes c_path(str name, object value):
    return None if value is None else c_text(name, _os.fsencode(value))


cdef inline const char *c_chars(bytes text) noexcept:
    """Borrowed from `text`, which must outlive the use."""
    return NULL if text is None else PyBytes_AS_STRING(text)


cdef uint64_t c_count(str name, object value, uint64_t most) except? 0xFFFFFFFFFFFFFFFF:
    cdef object number = _operator.index(value)
    if number < 0 or number > most:
        raise _errors.ArgumentError(f"{name} is {number}, expected 0 to {most}")
    return number


def public_url(url):
    """What may be shown of a URL: without user, password, query and fragment.

    Args:
        url (str): any text.

    Returns:
        str: at most 1023 characters, control and non-ASCII characters replaced by "?".
    """
    cdef char shown[1024]
    cdef bytes text = c_text("url", url)
    ota_http_public_url(c_chars(text), shown, sizeof(shown))
    return shown.decode("ascii")


cdef class Source:
    """Base of all sources; not made directly.

    One thread at a time opens, reads and closes, or hands the source to a pipeline; ``cancel`` and the counters may be
    used from any thread.
    """

    cdef ota_source *ptr
    cdef bint busy  # a call is inside C, or a pipeline uses it; guarded by the GIL

    def __cinit__(self):
        self.ptr = NULL

    def __dealloc__(self):
        ota_source_free(&self.ptr)

    cdef int begin_use(self) except -1:
        if self.ptr == NULL:
            raise _errors.StateError(f"{type(self).__name__} was not set up")
        if self.busy:
            raise _errors.StateError("the source is in use by another thread")
        self.busy = True
        return 0

    cdef void end_use(self) noexcept:
        self.busy = False

    @property
    def bytes_read(self):
        """int: bytes handed out since the source was made."""
        return 0 if self.ptr == NULL else self.ptr.bytes_read

    @property
    def requests(self):
        """int: HTTP requests sent, redirects included; of other sources how often it was opened."""
        return 0 if self.ptr == NULL else self.ptr.requests

    def open(self, offset=0):
        """Makes the bytes from `offset` on available.

        Args:
            offset (int): bytes from the start of the object; a source that cannot start there starts at 0.

        Returns:
            SourceInfo: what was found out.

        Raises:
            OtaError: stage "source"; the source is closed then.
        """
        cdef ota_source_info info
        cdef ota_error error
        cdef ota_status status
        cdef uint64_t at = c_count("offset", offset, OTA_SIZE_UNKNOWN - 1)
        clear_error(&error)
        self.begin_use()
        with nogil:
            status = self.ptr.ops.open(self.ptr, at, &info, &error)
        self.end_use()
        check(status, &error)
        return SourceInfo(
            None if info.size == OTA_SIZE_UNKNOWN else info.size, info.offset, info.entity_tag.decode("latin-1")
        )

    def read(self, size=65536):
        """Waits for data.

        Args:
            size (int): most bytes wanted, above 0.

        Returns:
            bytes: 1 to `size` bytes; b"" at the end of the complete object.

        Raises:
            OtaError: stage "source"; an early end is an error. The first error is repeated until the source is closed.
        """
        cdef ota_error error
        cdef ota_status status
        cdef size_t room = c_count("size", size, 1 << 40)
        cdef size_t len = 0
        cdef bytes data = PyBytes_FromStringAndSize(NULL, room)
        cdef char *buf = PyBytes_AS_STRING(data)
        clear_error(&error)
        self.begin_use()
        with nogil:
            status = self.ptr.ops.read(self.ptr, buf, room, &len, &error)
        self.end_use()
        check(status, &error)
        return data if len == room else data[:len]

    def cancel(self):
        """Makes a waiting and every later call raise CancelledError. Any thread, any time."""
        if self.ptr != NULL:
            with nogil:
                self.ptr.ops.cancel(self.ptr)

    def close(self):
        """Ends the use begun by ``open``, which may follow again."""
        if self.ptr == NULL:
            return
        self.begin_use()
        with nogil:
            self.ptr.ops.close(self.ptr)
        self.end_use()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


cdef class HttpSource(Source):
    """One object by HTTP(S) GET.

    Args:
        url (str): https://..., or http://... with `allow_http`.
        ca_file (str | os.PathLike | None): PEM bundle to trust, and nothing beside it; None: the system's.
        ca_pem (str | bytes | None): PEM text to trust in place of `ca_file`.
        client_cert_file, client_key_file (str | os.PathLike | None): PEM. Not used any more after a redirect to another host.
        proxy (str | None): as libcurl takes it; None: from the environment; "": none.
        user_agent (str | None): None: "rmaker-ota/<version>".
        entity_tag (str | None): strong entity tag of what is there already, for If-Range when resuming.
        connect_to (str | None): "HOST:PORT:CONNECT-TO-HOST:CONNECT-TO-PORT" as libcurl takes it.
        allow_http (bool): plain http is refused unless set, and never followed to from https.
        skip_common_name_check (bool): check the certificate, but not the host name in it.
        connect_timeout_ms (int): for name, TCP, proxy and TLS together; 0: 5000.
        stall_timeout_ms (int): longest wait of the reader without a byte; 0: 60000.
        deadline_ms (int): for everything from ``open`` on; 0: none.
        max_bytes_per_s (int): bandwidth limit; 0: none.
        max_redirects (int): 0: 10.
        receive_buffer (int): bytes taken from the connection at once, 1024 at least; 0: 256 KiB.

    Raises:
        ArgumentError: ERR_HTTP_URL: not an https (or http) URL; ERR_ARGUMENT: a key without a certificate.
        DownloadError: ERR_HTTP_INSECURE: plain http without `allow_http`.
    """

    def __init__(
        self,
        url,
        *,
        ca_file=None,
        ca_pem=None,
        client_cert_file=None,
        client_key_file=None,
        proxy=None,
        user_agent=None,
        entity_tag=None,
        connect_to=None,
        allow_http=False,
        skip_common_name_check=False,
        connect_timeout_ms=0,
        stall_timeout_ms=0,
        deadline_ms=0,
        max_bytes_per_s=0,
        max_redirects=0,
        receive_buffer=0,
    ):
        cdef ota_http_options options
        cdef ota_error error
        cdef ota_status status
        cdef bytes url_text = c_text("url", url)
        cdef bytes ca_file_text = c_path("ca_file", ca_file)
        cdef bytes ca_pem_text = c_text("ca_pem", ca_pem)
        cdef bytes cert_text = c_path("client_cert_file", client_cert_file)
        cdef bytes key_text = c_path("client_key_file", client_key_file)
        cdef bytes proxy_text = c_text("proxy", proxy)
        cdef bytes agent_text = c_text("user_agent", user_agent)
        cdef bytes tag_text = c_text("entity_tag", entity_tag)
        cdef bytes connect_text = c_text("connect_to", connect_to)
        if self.ptr != NULL:
            raise _errors.StateError("already set up")
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        options.url = c_chars(url_text)
        options.ca_file = c_chars(ca_file_text)
        options.ca_pem = c_chars(ca_pem_text)
        options.client_cert_file = c_chars(cert_text)
        options.client_key_file = c_chars(key_text)
        options.proxy = c_chars(proxy_text)
        options.user_agent = c_chars(agent_text)
        options.entity_tag = c_chars(tag_text)
        options.connect_to = c_chars(connect_text)
        options.allow_http = bool(allow_http)
        options.skip_common_name_check = bool(skip_common_name_check)
        options.connect_timeout_ms = c_count("connect_timeout_ms", connect_timeout_ms, 0x7FFFFFFF)
        options.stall_timeout_ms = c_count("stall_timeout_ms", stall_timeout_ms, 0xFFFFFFFF)
        options.deadline_ms = c_count("deadline_ms", deadline_ms, OTA_SIZE_UNKNOWN)
        options.max_bytes_per_s = c_count("max_bytes_per_s", max_bytes_per_s, OTA_SIZE_UNKNOWN)
        options.max_redirects = c_count("max_redirects", max_redirects, 0xFFFFFFFF)
        options.receive_buffer = c_count("receive_buffer", receive_buffer, 1 << 24)
        with nogil:
            status = ota_source_http_new(&options, &self.ptr, &error)
        check(status, &error)


cdef class FileSource(Source):
    """A local file, block device or FIFO.

    Args:
        path (str | os.PathLike): it is opened by ``open``.

    Raises:
        ArgumentError: the path is empty.
    """

    def __init__(self, path):
        cdef ota_error error
        cdef bytes text = c_path("path", path)
        if self.ptr != NULL:
            raise _errors.StateError("already set up")
        clear_error(&error)
        check(ota_source_file_new(c_chars(text), &self.ptr, &error), &error)


cdef class FdSource(Source):
    """An open descriptor, which stays the caller's and must stay open as long as this object is used.

    Args:
        fd (int | object with fileno()): a pipe, standard input, a file. Position 0 is where it stands now.

    Raises:
        DeviceError: not an open descriptor, or a directory.
    """

    cdef object owner

    def __init__(self, fd):
        cdef ota_error error
        if self.ptr != NULL:
            raise _errors.StateError("already set up")
        self.owner = fd
        cdef int number = fd if isinstance(fd, int) else fd.fileno()
        clear_error(&error)
        check(ota_source_fd_new(number, &self.ptr, &error), &error)


cdef class MemorySource(Source):
    """Bytes in memory.

    Args:
        data (bytes-like): contiguous; held, not copied.
    """

    cdef Py_buffer view
    cdef bint held

    def __init__(self, data):
        cdef ota_error error
        if self.ptr != NULL:
            raise _errors.StateError("already set up")
        PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        self.held = True
        clear_error(&error)
        check(ota_source_memory_new(self.view.buf, self.view.len, &self.ptr, &error), &error)

    def __dealloc__(self):
        ota_source_free(&self.ptr)
        if self.held:
            PyBuffer_Release(&self.view)


cdef class PushSource(Source):
    """Bytes handed in by one other thread through a bounded pipe.

    Args:
        size (int | None): bytes of the whole object; None: not known.
        capacity (int): bytes the pipe holds.
        offset (int): where the pushed bytes begin; ``open`` must ask for that offset, or for any when it is 0.
    """

    def __init__(self, size=None, capacity=1 << 20, offset=0):
        cdef ota_error error
        if self.ptr != NULL:
            raise _errors.StateError("already set up")
        cdef uint64_t total = OTA_SIZE_UNKNOWN if size is None else c_count("size", size, OTA_SIZE_UNKNOWN - 1)
        cdef size_t room = c_count("capacity", capacity, 1 << 40)
        cdef uint64_t at = c_count("offset", offset, OTA_SIZE_UNKNOWN - 1)
        clear_error(&error)
        check(ota_source_push_new(room, total, at, &self.ptr, &error), &error)

    cdef int require(self) except -1:
        if self.ptr == NULL:
            raise _errors.StateError("PushSource was not set up")
        return 0

    def write(self, data):
        """Hands in `data`; waits while the pipe is full.

        Args:
            data (bytes-like): contiguous.

        Raises:
            CancelledError: the reader is gone.
            StateError: after ``end`` or ``fail``.
            DigestError: ERR_SIZE: more than the announced size.
        """
        cdef ota_error error
        cdef ota_status status
        cdef Py_buffer view
        self.require()
        clear_error(&error)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        with nogil:
            status = ota_source_push_write(self.ptr, view.buf, view.len, &error)
        PyBuffer_Release(&view)
        check(status, &error)

    def drain(self):
        """Waits until the reader took everything and asked for more.

        Raises:
            CancelledError: the reader is gone.
        """
        cdef ota_error error
        cdef ota_status status
        self.require()
        clear_error(&error)
        with nogil:
            status = ota_source_push_drain(self.ptr, &error)
        check(status, &error)

    def end(self):
        """No more bytes follow. The first ``end`` or ``fail`` counts."""
        self.require()
        with nogil:
            ota_source_push_end(self.ptr)

    def fail(self, error, message=None, *, offset=0, device_code=0):
        """The reader gets an error once it has read what was written.

        Args:
            error (OtaError | BaseException | str): an OtaError is passed on with all its details; a status name such as
                "ERR_STALLED"; any other exception is passed on as ERR_CALLBACK with its text.
            message (str | None): text to a status name.
            offset (int): bytes from the start of the object.
            device_code (int): errno, HTTP status or a device's own code.

        Raises:
            ArgumentError: no status has that name.
        """
        cdef ota_error kept
        cdef bytes text
        self.require()
        clear_error(&kept)
        if isinstance(error, _errors.OtaError):
            name, message, offset, device_code = error.status, error.message, error.offset, error.device_code
        elif isinstance(error, BaseException):
            name, message = "ERR_CALLBACK", f"{type(error).__name__}: {error}"
        else:
            name = error
        numbers = {row[0]: row[1] for row in status_table()}
        if numbers.get(name, 0) >= 0:
            raise _errors.ArgumentError(f"{name!r} is not the name of an error status")
        text = (message or name).encode("utf-8", "replace").replace(b"\0", b"?")
        ota_error_set(
            &kept, numbers[name], OTA_STAGE_SOURCE, c_count("offset", offset, OTA_SIZE_UNKNOWN), device_code,
            "%s", c_chars(text),
        )
        with nogil:
            ota_source_push_fail(self.ptr, &kept)
