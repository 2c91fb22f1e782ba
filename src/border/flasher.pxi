# A chip behind a serial line. The records are those of rmaker_ota.flasher.chip.

import threading as _threading

cimport cython
from cpython.bytes cimport PyBytes_AsString as _PyBytes_AsString
from cpython.bytes cimport PyBytes_FromStringAndSize as _PyBytes_FromStringAndSize
from libc.errno cimport EIO as _EIO
from libc.stdlib cimport calloc as _calloc

cdef object _chip_records = None

_FLASHER_STATES = {
    OTA_FLASHER_OFF: "off",
    OTA_FLASHER_READY: "ready",
    OTA_FLASHER_BROKEN: "broken",
    OTA_FLASHER_GONE: "gone",
    OTA_FLASHER_STOPPED: "stopped",
}
_FLASHER_BEFORE = {
    "default-reset": OTA_FLASHER_DEFAULT_RESET,
    "classic-reset": OTA_FLASHER_CLASSIC_RESET,
    "usb-reset": OTA_FLASHER_USB_RESET,
    "no-reset": OTA_FLASHER_NO_RESET,
    "no-reset-no-sync": OTA_FLASHER_NO_RESET_NO_SYNC,
}
_FLASHER_AFTER = {
    "default-reset": OTA_FLASHER_AFTER_AUTO,
    "hard-reset": OTA_FLASHER_HARD_RESET,
    "watchdog-reset": OTA_FLASHER_WATCHDOG_RESET,
    "no-reset": OTA_FLASHER_STAY,
}
_FLASHER_LINKS = {
    "auto": OTA_FLASHER_LINK_AUTO,
    "uart": OTA_FLASHER_LINK_UART,
    "usb-jtag": OTA_FLASHER_LINK_USB_JTAG,
    "usb-otg": OTA_FLASHER_LINK_USB_OTG,
}
_FLASHER_LINK_NAMES = {number: name for name, number in _FLASHER_LINKS.items()}
_FLASHER_TRACES = {
    OTA_FLASHER_TRACE_SENT: "sent",
    OTA_FLASHER_TRACE_RECEIVED: "received",
    OTA_FLASHER_TRACE_NOTE: "note",
}

FLASHER_BEFORE = tuple(_FLASHER_BEFORE)
FLASHER_AFTER = tuple(_FLASHER_AFTER)
FLASHER_LINKS = tuple(_FLASHER_LINKS)

# Bytes of flash that one call into C reads or erases: between two of them signals are handled.
cdef enum:
    FLASHER_STEP = 256 * 1024


cdef object _chip():
    """rmaker_ota.flasher.chip, imported when the first of its records is needed."""
    global _chip_records
    if _chip_records is None:
        from rmaker_ota.flasher import chip
        _chip_records = chip
    return _chip_records


cdef int _choice(dict choices, object name, str what) except -1:
    number = choices.get(name)
    if number is None:
        raise _errors.ArgumentError(f"{what} is {name!r}, expected one of {', '.join(choices)}", stage="target")
    return number


cdef object _reset_choice(dict choices, object text, str what):
    """Number of a way to reset, and the custom sequence where it is one: those have a digit or W in them, and a |."""
    if isinstance(text, str) and ("|" in text or text[:1] in ("D", "R", "U", "W")):
        return None, text.encode("ascii", "replace")
    return _choice(choices, text, what), None


@cython.final
cdef class Flasher:
    """The flash of an ESP32 behind a serial port (``flasher/flasher.h``). Takes the port; sends nothing before `connect`.

    One thing at a time; `cancel` may be called from any thread meanwhile.

    Args:
        port: path of a tty or pseudo terminal, or ``socket://host:port``.
        baud: rate after detection, bits per second; 0: stay at 115200.
        chip: the chip it has to be; None: whatever is there.
        before, after: how the boot loader is entered and left: a name of FLASHER_BEFORE, FLASHER_AFTER, or a sequence
            such as ``D0|R1|W0.1|D1|R0|W0.05|D0``.
        link: of FLASHER_LINKS; "auto": by the USB ids of the port.
        connect_attempts: below 0: for ever.
        reuse_baud: look for a stub that still runs at this rate before any reset; 0: do not.
        stubs: `rmaker_ota.flasher.stubs.Stub`, to choose from.
        facts: `rmaker_ota.flasher.chip.ChipFacts` of an earlier session; None: nothing is known.
        flash_size: bytes; 0: ask the flash chip.
        allow_encrypted: write although flash encryption is on.
        slow: every time-out for work is multiplied by this.
        keep_lines: leave the control lines alone when the port is opened.
        fault: what goes wrong with the port, for tests.
        on_lines: ``(dtr: bool, rts: bool)``, drives the chip's pins in place of the port's control lines, as a gateway
            does by GPIO: only (True, False) pulls the boot pin low, only (False, True) holds the chip in reset.
        on_trace: ``(kind: str, data: bytes)``, "sent", "received" and "note".
        sysfs_root, dev_root: other folders than ``/sys`` and ``/dev``, for tests.

    Raises:
        NotFoundError, DeviceError: the port is not there, in use, or not permitted.
        ArgumentError: something in the arguments.
    """

    cdef ota_serial *serial
    cdef ota_flasher *ptr
    cdef ota_flasher_stub *stubs
    cdef object lock       # of using and closing; what frees holds the GIL too, so cancel needs none
    cdef object on_trace
    cdef object on_lines
    cdef object raised     # by one of them
    cdef list keep_alive   # what C borrows
    cdef Fault fault
    cdef int users         # targets over it that are alive
    cdef bint closed

    def __cinit__(self):
        self.lock = _threading.RLock()
        self.keep_alive = []

    def __init__(
        self,
        port,
        *,
        baud=0,
        chip=None,
        before="default-reset",
        after="default-reset",
        link="auto",
        connect_attempts=7,
        reuse_baud=0,
        stubs=(),
        facts=None,
        flash_size=0,
        allow_encrypted=False,
        slow=1,
        keep_lines=False,
        Fault fault=None,
        on_lines=None,
        on_trace=None,
        sysfs_root=None,
        dev_root=None,
    ):
        cdef ota_serial_options line
        cdef ota_flasher_options options
        cdef ota_error error
        cdef ota_status status
        cdef size_t i = 0
        if self.serial != NULL:
            raise _errors.StateError("the port is open already")
        memset(&line, 0, sizeof(line))
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        encoded = os.fsencode(port)
        roots = [None if root is None else os.fsencode(root) for root in (sysfs_root, dev_root)]
        cdef const char *raw_port = encoded
        if b"\0" in encoded:
            raise _errors.ArgumentError("a port holds no NUL character", stage="target")
        line.keep_lines = keep_lines
        line.fault = fault_of(fault)
        if roots[0] is not None:
            line.sysfs_root = roots[0]
        if roots[1] is not None:
            line.dev_root = roots[1]
        self.fault = fault
        self.on_trace = on_trace
        self.on_lines = on_lines
        if on_lines is not None:
            line.set_lines = lines_callback
            line.lines_user = <void *>self

        name = None if chip is None else chip.encode("utf-8", "replace")
        if name is not None:
            options.chip = name
        number, sequence = _reset_choice(_FLASHER_BEFORE, before, "before")
        options.before = OTA_FLASHER_CUSTOM_RESET if number is None else number
        if number is None:
            options.before_sequence = sequence
        number, last_sequence = _reset_choice(_FLASHER_AFTER, after, "after")
        options.after = OTA_FLASHER_AFTER_CUSTOM if number is None else number
        if number is None:
            options.after_sequence = last_sequence
        options.link = _choice(_FLASHER_LINKS, link, "link")
        options.baud = baud
        options.connect_attempts = connect_attempts
        options.reuse_baud = reuse_baud
        options.flash_size = flash_size
        options.allow_encrypted = allow_encrypted
        options.slow = slow
        if facts is not None:
            options.facts.is_known = True
            options.facts.chip_id = facts.chip_id
            memcpy(options.facts.mac, digest_bytes("mac", facts.mac, 6), 6)
            options.facts.revision = OTA_FLASHER_UNKNOWN if facts.revision is None else facts.revision
            options.facts.flash_id = facts.flash_id
            options.facts.flash_size = facts.flash_size
            options.facts.baud = facts.baud
            options.facts.rom_clock = facts.rom_clock
        stubs = tuple(stubs)
        if stubs:
            self.stubs = <ota_flasher_stub *>_calloc(len(stubs), sizeof(ota_flasher_stub))
            if self.stubs == NULL:
                raise MemoryError
        for stub in stubs:
            self.keep_stub(&self.stubs[i], stub)
            i += 1
        options.stubs = self.stubs
        options.stub_count = len(stubs)
        if on_trace is not None:
            options.trace = trace_callback
            options.trace_user = <void *>self

        with nogil:
            status = ota_port_serial_open(raw_port, &line, &self.serial, &error)
        check(status, &error)
        options.serial = self.serial
        status = ota_flasher_new(&options, &self.ptr, &error)
        if status < 0:
            self.release()
        check(status, &error)

    cdef int keep_stub(self, ota_flasher_stub *row, object stub) except -1:
        name = stub.name.encode("ascii")
        text = bytes(stub.text)
        data = bytes(stub.data)
        self.keep_alive += [name, text, data]
        row.name = name
        row.entry = stub.entry
        row.text_start = stub.text_start
        row.text = <const uint8_t *><const char *>text
        row.text_len = len(text)
        row.data_start = stub.data_start
        row.data = <const uint8_t *><const char *>data
        row.data_len = len(data)
        return 0

    def __dealloc__(self):
        self.release()
        _free(self.stubs)

    cdef void release(self) noexcept:
        ota_flasher_free(&self.ptr)
        if self.serial != NULL:
            self.serial.ops.close(self.serial)
            self.serial = NULL

    cdef int need_open(self) except -1:
        if self.closed or self.ptr == NULL:
            raise _errors.StateError("the port is closed")
        return 0

    cdef int finish(self, ota_status status, ota_error *error) except -1:
        """Raises what a callback raised, else what C says."""
        if self.raised is not None:
            raised, self.raised = self.raised, None
            with nogil:
                ota_flasher_rearm(self.ptr)
            raise raised
        return check(status, error)

    cdef void end_use(self) noexcept:
        """A target over it is gone."""
        self.users -= 1
        if self.users == 0 and self.closed:
            self.release()

    def close(self):
        """Gives the port back; the chip stays as it is. Where a target still uses it, as soon as that is gone.

        Harmless when it is closed already.
        """
        with self.lock:
            self.closed = True
            if self.users == 0:
                self.release()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # ---- what is there ------------------------------------------------------------------------------------------------

    @property
    def name(self):
        """Where the port is now; changes when the device comes back under another name."""
        with self.lock:
            self.need_open()
            return os.fsdecode(<bytes>self.serial.name)

    @property
    def has_lines(self):
        """Whether the line has DTR and RTS, which reset the chip."""
        with self.lock:
            self.need_open()
            return bool(self.serial.has_lines)

    @property
    def state(self):
        """``off``, ``ready``, ``broken``, ``gone`` or ``stopped`` (``ota_flasher_state``)."""
        with self.lock:
            self.need_open()
            return _FLASHER_STATES[ota_flasher_get_state(self.ptr)]

    @property
    def counts(self):
        """Counters of flasher and line since the port was opened."""
        cdef ota_flasher_counts c
        with self.lock:
            self.need_open()
            c = ota_flasher_get_counts(self.ptr)
            return {
                "commands": c.commands,
                "frames_in": c.frames_in,
                "damaged": c.damaged,
                "bytes_out": c.bytes_out,
                "bytes_in": c.bytes_in,
                "retries": c.retries,
                "resets": c.resets,
                "step_downs": c.step_downs,
                "connects": c.connects,
                "stub_uploads": c.stub_uploads,
                "md5_bytes": c.md5_bytes,
                "read_bytes": c.read_bytes,
                "erased_bytes": c.erased_bytes,
                "written_bytes": c.written_bytes,
                "line_changes": self.serial.line_changes,
                "baud_changes": self.serial.baud_changes,
                "reopens": self.serial.reopens,
            }

    @property
    def info(self):
        """The chip, as `rmaker_ota.flasher.chip.ChipInfo`; None before the first `connect`."""
        cdef const ota_flasher_info *row
        with self.lock:
            self.need_open()
            row = ota_flasher_get_info(self.ptr)
            if row.chip == NULL:
                return None
            records = _chip()
            return records.ChipInfo(
                chip=row.chip.decode("ascii"),
                title=row.title.decode("ascii"),
                chip_id=row.chip_id,
                mac=":".join([f"{byte:02x}" for byte in row.mac[:6]]) if row.has_mac else None,
                revision=None if row.revision == OTA_FLASHER_UNKNOWN else row.revision,
                flash_id=row.flash_id,
                flash_size=row.flash_size,
                flash_size_known=bool(row.flash_size_known),
                stub=row.stub_name.decode("ascii") if row.is_stub else None,
                stub_was_running=bool(row.stub_was_running),
                baud=row.baud if row.baud != 0 else None,
                link=_FLASHER_LINK_NAMES[row.link],
                was_reset=bool(row.was_reset),
                secure_download=bool(row.secure_download),
                secure_boot=bool(row.secure_boot),
                flash_encrypted=bool(row.flash_encrypted),
                security_flags=row.security_flags,
                block_size=row.block_size,
                can_deflate=bool(row.can_deflate),
                can_verify=bool(row.can_verify),
                facts=_chip_facts(&row.facts),
            )

    def read_revision(self):
        """The chip's revision, major * 100 + minor, asked for where it is not known; None: it cannot be.

        Raises:
            UnsupportedError: secure download mode. SerialError: the link.
        """
        cdef ota_error error
        cdef ota_status status
        cdef uint32_t revision = 0
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_read_revision(self.ptr, &revision, &error)
            self.finish(status, &error)
            return None if revision == OTA_FLASHER_UNKNOWN else revision

    # ---- the session --------------------------------------------------------------------------------------------------

    def connect(self):
        """Enters the boot loader and makes everything ready.

        Raises:
            OtaError: nobody answers, it is another chip, ...
        """
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_connect(self.ptr, &error)
            self.finish(status, &error)

    def reopen(self, timeout_ms=5000):
        """Gives the port back and takes it again, under whatever name it has by then.

        Args:
            timeout_ms: how long to wait for it.
        """
        cdef ota_error error
        cdef ota_status status
        cdef uint32_t limit = timeout_ms
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_reopen(self.ptr, limit, &error)
            self.finish(status, &error)

    def reset(self, how="default-reset"):
        """Restarts the chip into its application.

        Args:
            how: a name of FLASHER_AFTER. "default-reset": as ``after`` said when the port was opened.
        """
        cdef ota_error error
        cdef ota_status status
        cdef ota_flasher_after after = _choice(_FLASHER_AFTER, how, "how")
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_reset(self.ptr, after, &error)
            self.finish(status, &error)

    def read_console(self, size=4096, timeout_ms=100):
        """Bytes a restarted chip sends.

        Args:
            size: at most so many.
            timeout_ms: how long to wait for the first one.

        Returns:
            bytes: empty when none came.
        """
        cdef ota_error error
        cdef ota_status status
        cdef size_t got = 0, limit = size
        cdef uint32_t wait_ms = timeout_ms
        cdef char *buffer
        clear_error(&error)
        with self.lock:
            self.need_open()
            out = _PyBytes_FromStringAndSize(NULL, size)
            buffer = _PyBytes_AsString(out)
            with nogil:
                status = ota_flasher_read_console(self.ptr, buffer, limit, wait_ms, &got, &error)
            self.finish(status, &error)
            PyErr_CheckSignals()
            return out[:got]

    def set_baud(self, uint32_t baud):
        """Changes the rate of the line alone, for a console that has another one than 115200.

        Raises:
            DeviceError: the driver does not do it.
        """
        cdef ota_error error
        cdef int errnum
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                errnum = self.serial.ops.set_baud(self.serial, baud)
            if errnum != 0:
                check(ota_error_set_errno(&error, OTA_STAGE_TARGET, 0, errnum, "the rate of the line"), &error)

    def cancel(self):
        """From any thread: what waits now and all later calls end with CancelledError, until `rearm`."""
        if self.ptr != NULL:
            ota_flasher_cancel(self.ptr)

    def rearm(self):
        """Forgets cancels, so that the chip can be reset or connected again."""
        with self.lock:
            self.need_open()
            ota_flasher_rearm(self.ptr)

    # ---- flash --------------------------------------------------------------------------------------------------------

    def read(self, uint64_t offset, size_t size, *, on_progress=None):
        """Bytes of the flash.

        Args:
            on_progress: ``(bytes so far)``.

        Raises:
            ArgumentError: not inside the flash. UnsupportedError: secure download mode.
        """
        cdef ota_error error
        cdef ota_status status
        cdef size_t done = 0, part
        cdef char *buffer
        clear_error(&error)
        with self.lock:
            self.need_open()
            if size > ota_flasher_get_info(self.ptr).flash_size:
                raise _errors.ArgumentError(f"{size} bytes are more than the flash has", stage="target", offset=offset)
            out = _PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
            buffer = _PyBytes_AsString(out)  # nobody else has seen the object yet
            while True:
                part = size - done if size - done < FLASHER_STEP else FLASHER_STEP
                with nogil:
                    status = ota_flasher_read(self.ptr, offset + done, buffer + done, part, &error)
                self.finish(status, &error)
                done += part
                PyErr_CheckSignals()
                if on_progress is not None:
                    on_progress(done)
                if done >= size:
                    return out

    def erase(self, uint64_t offset, uint64_t size):
        """Erases sectors; ``offset`` and ``size`` are multiples of 4096."""
        cdef ota_error error
        cdef ota_status status
        cdef uint64_t done = 0, part
        clear_error(&error)
        with self.lock:
            self.need_open()
            while True:
                part = size - done if size - done < 4 * FLASHER_STEP else 4 * FLASHER_STEP
                with nogil:
                    status = ota_flasher_erase(self.ptr, offset + done, part, &error)
                self.finish(status, &error)
                done += part
                PyErr_CheckSignals()
                if done >= size:
                    return

    def md5(self, uint64_t offset, uint64_t size):
        """MD5 of what lies in flash, computed by the chip: 16 bytes."""
        cdef ota_error error
        cdef ota_status status
        cdef uint8_t digest[16]
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_md5(self.ptr, offset, size, digest, &error)
            self.finish(status, &error)
            return (<const char *>digest)[:16]

    def write(self, offset, size, pieces, *, deflated=False, encrypt=False, wire_size=0, on_progress=None):
        """Writes content, in one session from begin to end. Whether it is right only `md5` can tell.

        Args:
            offset: in flash, a multiple of 4096.
            size: exact bytes of the content.
            pieces: ``(data, content bytes that are complete with it)``, in order; the data is the content itself, or a
                zlib stream of it.
            deflated: it is that stream.
            encrypt: the chip encrypts what it writes.
            wire_size: bytes of the stream; 0: not known. The boot ROM wants to know it.
            on_progress: ``(bytes of content so far)``.
        """
        cdef ota_error error
        cdef ota_status status
        cdef ota_flasher_write write
        cdef const uint8_t[::1] view
        cdef const uint8_t *data
        cdef size_t part
        cdef uint64_t inflated, done = 0
        memset(&write, 0, sizeof(write))
        write.offset = offset
        write.size = size
        write.deflated = deflated
        write.encrypt = encrypt
        write.wire_bound = wire_size
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_flasher_write_begin(self.ptr, &write, &error)
            self.finish(status, &error)
            try:
                for piece, complete in pieces:
                    part = len(piece)
                    if part == 0:
                        continue
                    view = piece
                    data = &view[0]
                    inflated = complete
                    with nogil:
                        status = ota_flasher_write_data(self.ptr, data, part, inflated, &error)
                    self.finish(status, &error)
                    done += inflated if write.deflated else part
                    PyErr_CheckSignals()
                    if on_progress is not None:
                        on_progress(done)
                with nogil:
                    status = ota_flasher_write_end(self.ptr, &error)
                self.finish(status, &error)
            except BaseException:
                ota_flasher_write_abort(self.ptr)
                raise


cdef object _chip_facts(const ota_flasher_facts *row):
    if not row.is_known:
        return None
    return _chip().ChipFacts(
        chip_id=row.chip_id,
        mac=(<const char *>row.mac)[:6],
        revision=None if row.revision == OTA_FLASHER_UNKNOWN else row.revision,
        flash_id=row.flash_id,
        flash_size=row.flash_size,
        baud=row.baud,
        rom_clock=row.rom_clock,
    )


cdef void trace_callback(void *user, ota_flasher_trace what, const void *data, size_t size) noexcept with gil:
    cdef Flasher self = <Flasher>user
    if self.raised is not None:
        return
    try:
        self.on_trace(_FLASHER_TRACES[what], (<const char *>data)[:size])
    except BaseException as exc:
        self.raised = exc
        ota_flasher_cancel(self.ptr)


cdef int lines_callback(void *user, c_bool dtr, c_bool rts) noexcept with gil:
    cdef Flasher self = <Flasher>user
    try:
        self.on_lines(bool(dtr), bool(rts))
        return 0
    except BaseException as exc:
        if self.raised is None:
            self.raised = exc
        return _EIO
