# Targets of the engine: the flash of an ESP32 as a whole, in a flash image file or behind a serial line.


@cython.no_gc_clear  # __dealloc__ needs the flasher, whose line the C flash borrows
cdef class EspTarget:
    """An ESP32's flash: slots, boot choice, and sinks for its slots (``target/esp_target.h``).

    Slots go by name: ``ota_0`` .., ``factory``, ``test``. Methods may be called from any thread.

    Args:
        place: path of a flash image, a raw dump of the whole chip, taken exclusively unless ``read_only``; or a connected
            `Flasher`. What ran last on the chip it holds counts as running, and a restart is the chip's own.
        read_only: nothing may be changed; the file is not taken.
        table_offset: of the partition table, bytes.
        rollback: boot loader and app are built with app rollback.
        anti_rollback: they are built with secure version checks; means ``rollback`` too.
        secure_version: of the eFuses.
        running: name of the slot whose image runs; None, or one the table lacks: what would boot now.
        chip_id, chip_revision, efuse_block_revision: of the chip, which images are checked for; None: not checked.
        ignore_max_revision: the eFuse "disable wafer version major" is burnt.
        fault: what goes wrong with the flash, for tests.

    Raises:
        DeviceError, NotFoundError: the file cannot be opened, or is in use. SerialError: the link.
        ArgumentError: it is no flash image.
        FormatError: its partition table or otadata is not valid.
    """

    cdef ota_flash *flash
    cdef ota_esp_target *ptr
    cdef Fault fault
    cdef object lock   # of opening, using and closing; C has its own for what sinks do meanwhile
    cdef int sinks     # alive; what they borrow in C stays until the last one is gone
    cdef int active    # of those, with a pipeline that runs
    cdef bint closed
    cdef Flasher flasher # None: a file
    cdef readonly bint rollback
    """Whether it counts as built with app rollback."""

    def __cinit__(self):
        self.lock = _threading.Lock()
        self.closed = True

    def __init__(
        self,
        place,
        *,
        read_only=False,
        table_offset=0x8000,
        rollback=True,
        anti_rollback=False,
        secure_version=0,
        running=None,
        chip_id=None,
        chip_revision=None,
        efuse_block_revision=None,
        ignore_max_revision=False,
        Fault fault=None,
    ):
        cdef ota_esp_target_options options
        cdef ota_error error
        cdef ota_status status
        if self.ptr != NULL:
            raise _errors.StateError("the target is open already")
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        cdef Flasher flasher = place if isinstance(place, Flasher) else None
        encoded = b"" if flasher is not None else os.fsencode(place)
        cdef const char *raw_path = encoded
        cdef bint only_read = read_only
        options.table_offset = table_offset
        options.rules.chip_id = OTA_ESP_CHIP_ANY if chip_id is None else chip_id
        options.rules.chip_revision = OTA_ESP_UNSET if chip_revision is None else chip_revision
        options.rules.efuse_block_revision = OTA_ESP_UNSET if efuse_block_revision is None else efuse_block_revision
        options.rules.ignore_max_revision = ignore_max_revision
        options.rollback = rollback
        options.anti_rollback = anti_rollback
        options.secure_version = secure_version
        options.running = _slot_number(running)
        self.fault = fault
        cdef ota_fault *plan = fault_of(fault)
        self.rollback = rollback or anti_rollback
        if flasher is not None:
            with flasher.lock:
                flasher.need_open()
                status = ota_flash_serial_new(flasher.ptr, &self.flash, &error)
                if status == OTA_OK:
                    flasher.users += 1
                    self.flasher = flasher
            options.stopped = True
        else:
            with nogil:
                status = ota_port_flash_file_open(raw_path, only_read, plan, &self.flash, &error)
        check(status, &error)
        options.flash = self.flash
        with nogil:
            status = ota_esp_target_new(&options, &self.ptr, &error)
        if status < 0:
            self.release()
        check(status, &error)
        self.closed = False

    def __dealloc__(self):
        self.release()

    cdef void release(self) noexcept:
        ota_esp_target_free(&self.ptr)
        if self.flash != NULL:
            self.flash.ops.close(self.flash)
            self.flash = NULL
        if self.flasher is not None:
            self.flasher.end_use()
            self.flasher = None

    cdef int need_open(self) except -1:
        if self.closed:
            raise _errors.StateError("the target is closed")
        return 0

    def close(self):
        """Gives the file back. An installation that is still under way fails. Harmless when it is closed already."""
        with self.lock:
            self.closed = True
            if self.sinks == 0:
                self.release()
            elif self.flasher is not None:
                if self.active > 0:
                    self.flasher.cancel()
            elif self.flash != NULL:
                with nogil:
                    ota_port_flash_file_shut(self.flash)

    @property
    def is_installing(self):
        """Whether an installation into one of its slots is under way."""
        return self.active > 0

    # ---- what is there ------------------------------------------------------------------------------------------------

    @property
    def size(self):
        """Bytes of the flash."""
        with self.lock:
            self.need_open()
            return self.flash.size

    @property
    def counts(self):
        """Operations on the flash so far: reads, programs, erases, syncs, bytes_read, bytes_programmed, sectors_erased."""
        with self.lock:
            self.need_open()
            return {
                "reads": self.flash.reads,
                "programs": self.flash.programs,
                "erases": self.flash.erases,
                "syncs": self.flash.syncs,
                "bytes_read": self.flash.bytes_read,
                "bytes_programmed": self.flash.bytes_programmed,
                "sectors_erased": self.flash.sectors_erased,
            }

    def slots(self):
        """The slots.

        Returns:
            tuple[tuple[str, str, int, int], ...]: name, label, offset and size in bytes.
        """
        cdef size_t count = 0
        with self.lock:
            self.need_open()
            rows = ota_esp_target_slots(self.ptr, &count)
            return tuple(
                (rows[i].name.decode("ascii"), _esp_text(rows[i].label), rows[i].offset, rows[i].size)
                for i in range(count)
            )

    def partition_table(self):
        """The partition table, as `esp_format.PartitionTable`."""
        with self.lock:
            self.need_open()
            return _partition_table(ota_esp_target_table(self.ptr))

    @property
    def running(self):
        """Name of the slot whose image runs; None: nothing booted."""
        cdef int slot
        with self.lock:
            self.need_open()
            with nogil:
                slot = ota_esp_target_running(self.ptr)
            return _slot_name(slot)

    @property
    def secure_version(self):
        """The smallest secure version that is accepted; rises with `boot` and `mark_valid`."""
        cdef uint32_t version
        with self.lock:
            self.need_open()
            with nogil:
                version = ota_esp_target_secure_version(self.ptr)
            return version

    def next_slot(self):
        """Name of the slot an update goes to.

        Raises:
            NotFoundError: there is no OTA slot but the running one.
        """
        cdef ota_error error
        cdef ota_status status
        cdef int slot
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_next_slot(self.ptr, &slot, &error)
            check(status, &error)
            return _slot_name(slot)

    def describe(self, slot):
        """What an image says of itself, whole or not.

        Returns:
            tuple[esp_format.EspImageHeader, esp_format.AppDescriptor]

        Raises:
            ImageError, DataError, UnsupportedError: there is no app image.
        """
        cdef ota_esp_image_header header
        cdef ota_esp_app_descriptor descriptor
        cdef ota_error error
        cdef ota_status status
        cdef int number = _slot_number(slot)
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_describe(self.ptr, number, &header, &descriptor, &error)
            check(status, &error)
            return _image_header(&header), _app_descriptor(&descriptor)

    def verify(self, slot):
        """Reads a slot's image and checks all of it, as the boot loader does.

        Returns:
            int: bytes of the image.

        Raises:
            ImageError, DataError, RejectedError (chip), TooLargeError: what is wrong with it.
        """
        cdef ota_error error
        cdef ota_status status
        cdef uint64_t size = 0
        cdef int number = _slot_number(slot)
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_verify(self.ptr, number, &size, &error)
            check(status, &error)
            return size

    def entries(self):
        """Both otadata entries, as `esp_format.OtadataEntry`.

        Raises:
            NotFoundError: the table has no otadata partition.
        """
        cdef ota_esp_otadata_entry both[2]
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_entries(self.ptr, both, &error)
            check(status, &error)
            return _otadata_entry(&both[0]), _otadata_entry(&both[1])

    def state(self, slot):
        """State of a slot's entry, as a number.

        Raises:
            NotFoundError: it has none.
            UnsupportedError: it never has one (factory, test).
        """
        cdef ota_error error
        cdef ota_status status
        cdef uint32_t state = 0
        cdef int number = _slot_number(slot)
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_state(self.ptr, number, &state, &error)
            check(status, &error)
            return state

    def read(self, uint64_t offset, size_t size):
        """Bytes of the flash.

        Raises:
            ArgumentError: not inside the flash.
        """
        cdef ota_error error
        cdef ota_status status
        cdef char *buffer
        clear_error(&error)
        with self.lock:
            self.need_open()
            if size > self.flash.size:
                raise _errors.ArgumentError(f"{size} bytes are more than the flash of {self.flash.size} bytes has")
            out = _PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
            buffer = _PyBytes_AsString(out)  # nobody else has seen the object yet
            with nogil:
                status = self.flash.ops.read(self.flash, offset, buffer, size, &error)
            check(status, &error)
            return out

    # ---- changes ------------------------------------------------------------------------------------------------------

    def sink(self, slot, *, activate=True, rewrite_same=False):
        """A sink for a slot.

        Args:
            slot: its name.
            activate: commit verifies the image and makes the slot the next one to boot.
            rewrite_same: write sectors that hold the right bytes already too.

        Raises:
            SlotRunningError, PendingVerifyError, ArgumentError: it may not be written.
        """
        cdef ota_error error
        cdef ota_status status
        cdef int number = _slot_number(slot)
        cdef bint chosen = activate, again = rewrite_same
        cdef FlashSink sink = FlashSink.__new__(FlashSink)
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_sink_new(self.ptr, number, chosen, again, &sink.ptr, &error)
            check(status, &error)
            sink.target = self
            self.sinks += 1
        return sink

    def set_boot(self, slot):
        """Verifies the slot's image as it lies in flash and makes it the next one to boot.

        Raises:
            ImageError, DataError, RejectedError: its image; ArgumentError: no such slot, or the test slot.
        """
        cdef ota_error error
        cdef ota_status status
        cdef int number = _slot_number(slot)
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_set_boot(self.ptr, number, &error)
            check(status, &error)

    def mark_valid(self):
        """Confirms the running image.

        Raises:
            StateError: the active entry does not name the running slot.
        """
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_mark_valid(self.ptr, &error)
            check(status, &error)

    def retry(self):
        """Before a chip that a flasher holds is restarted: an image on trial gets its trial again."""
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_retry(self.ptr, &error)
            check(status, &error)

    def mark_invalid(self):
        """Marks the running image invalid, so that the next boot takes another one.

        Raises:
            RollbackError: there is none; nothing was changed.
            StateError: the active entry does not name the running slot.
        """
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_mark_invalid(self.ptr, &error)
            check(status, &error)

    def can_rollback(self):
        """Name of the slot that would boot if the running image were marked invalid.

        Raises:
            RollbackError: there is none.
            StateError: the active entry does not name the running slot.
        """
        cdef ota_error error
        cdef ota_status status
        cdef int to = OTA_ESP_SLOT_NONE
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_can_rollback(self.ptr, &to, &error)
            check(status, &error)
            return _slot_name(to)

    # ---- boot ---------------------------------------------------------------------------------------------------------

    def choose(self):
        """What the boot loader would do now, as `esp_format.BootDecision`. Changes nothing."""
        cdef ota_esp_boot_decision decision
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_choose(self.ptr, &decision, &error)
            check(status, &error)
            return _boot_decision(&decision)

    def boot(self):
        """A restart: the boot loader's choice with all it writes. The slot that boots is the running one from then on.

        Returns:
            esp_format.BootDecision
        """
        cdef ota_esp_boot_decision decision
        cdef ota_error error
        cdef ota_status status
        clear_error(&error)
        with self.lock:
            self.need_open()
            with nogil:
                status = ota_esp_target_boot(self.ptr, &decision, &error)
            check(status, &error)
            return _boot_decision(&decision)


cdef object _boot_decision(const ota_esp_boot_decision *decision):
    cdef char text[160]
    reasons = []
    for i in range(decision.step_count):
        ota_esp_boot_step_text(&decision.steps[i], text, sizeof(text))
        reasons.append((<bytes>text).decode("utf-8"))
    return _esp().BootDecision(
        _slot_name(decision.slot),
        decision.active if decision.active >= 0 else None,
        decision.first_use,
        _otadata_plan(&decision.plan, decision.after),
        tuple(reasons),
    )


@cython.no_gc_clear  # __dealloc__ needs the target, whose flash the C sink borrows
@cython.final
cdef class FlashSink(Sink):
    """A sink for a slot of an `EspTarget`, which makes it."""

    cdef EspTarget target

    def __init__(self):
        raise TypeError("EspTarget.sink makes these")

    cdef void count_use(self, int change) noexcept:
        self.target.active += change

    def __dealloc__(self):
        ota_sink_free(&self.ptr)
        if self.target is not None:
            self.target.sinks -= 1
            if self.target.closed and self.target.sinks == 0:
                self.target.release()


@cython.no_gc_clear  # __dealloc__ needs the targets, whose flash the C sink borrows
@cython.final
cdef class SerialSink(Sink):
    """One image for slots of one or many chips behind serial lines, written side by side (``sink/sink_serial.h``).

    A chip that fails concerns no other: the sink fails when all of them did. `results` says what became of each.

    Args:
        places: `EspTarget` over a `Flasher`, and the name of its slot, for each chip.
        activate: a chip that holds the image for certain makes it the next one to boot.
        skip_identical: leave a slot alone that holds the image already.
        skip_blank: erase runs of FF instead of sending them.
        sector_diff: find by MD5 what differs, and write that alone.
        pre_erase: erase while the image still arrives.
        level: of deflate, 1 to 9; 0: usual; -1: send plain bytes.
        jobs: chips that are written at the same time; 0: all.
        reconnects: how often a chip's lost link is taken up again; 0: usual.
        reopen_ms: how long to wait for a port that is gone; 0: usual.
        cache_dir: folder that keeps compressed streams by image; None: nowhere.

    Raises:
        ArgumentError: a target that is no chip behind a line, or too many.
        SlotRunningError, PendingVerifyError: a slot may not be written.
    """

    cdef list targets
    cdef tuple names

    def __init__(
        self,
        places,
        *,
        activate=True,
        skip_identical=True,
        skip_blank=True,
        sector_diff=True,
        pre_erase=True,
        level=0,
        jobs=0,
        reconnects=0,
        reopen_ms=0,
        cache_dir=None,
    ):
        cdef ota_sink_serial_options options
        cdef ota_sink_serial_device *devices
        cdef ota_esp_hooks hooks
        cdef ota_error error
        cdef ota_status status
        cdef EspTarget target
        cdef int number
        cdef size_t i = 0
        if self.targets is not None:
            raise _errors.StateError("the sink is made already")
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        places = tuple(places)
        self.targets = []
        self.names = tuple([target.flasher.name if target.flasher is not None else None for target, _ in places])
        if None in self.names:
            raise _errors.ArgumentError("a target is no chip behind a serial line", stage="target")
        encoded_names = [os.fsencode(name) for name in self.names]
        encoded_cache = None if cache_dir is None else os.fsencode(cache_dir)
        devices = <ota_sink_serial_device *>_calloc(len(places) or 1, sizeof(ota_sink_serial_device))
        if devices == NULL:
            raise MemoryError
        try:
            for target, slot in places:
                number = _slot_number(slot)
                with target.lock:
                    target.need_open()
                    with nogil:
                        status = ota_esp_target_get_hooks(target.ptr, number, &hooks, &error)
                    check(status, &error)
                    devices[i].name = encoded_names[i]
                    devices[i].flasher = target.flasher.ptr
                    devices[i].serial = target.flasher.serial
                    devices[i].flash = target.flash
                    devices[i].offset = hooks.offset
                    devices[i].size = hooks.size
                    devices[i].begin = hooks.begin
                    devices[i].commit = hooks.commit if activate else NULL
                    devices[i].end = hooks.end
                    devices[i].user = hooks.user
                    target.sinks += 1
                self.targets.append(target)
                i += 1
            options.devices = devices
            options.device_count = len(places)
            options.skip_identical = skip_identical
            options.skip_blank = skip_blank
            options.sector_diff = sector_diff
            options.pre_erase = pre_erase
            options.level = level
            options.jobs = jobs
            options.reconnects = reconnects
            options.reopen_ms = reopen_ms
            if encoded_cache is not None:
                options.cache_dir = encoded_cache
            check(ota_sink_serial_new(&options, &self.ptr, &error), &error)
        finally:
            _free(devices)

    cdef void count_use(self, int change) noexcept:
        for target in self.targets:
            (<EspTarget>target).active += change

    def __dealloc__(self):
        cdef EspTarget target
        ota_sink_free(&self.ptr)
        for each in self.targets or ():
            target = each
            target.sinks -= 1
            if target.closed and target.sinks == 0:
                target.release()

    def announce(self, *, sha256=None, md5=None):
        """Before the installation: digests of the image as announced, 32 and 16 bytes; None: not known. Wrong ones do no harm."""
        cdef const uint8_t *first = NULL
        cdef const uint8_t *second = NULL
        if sha256 is not None:
            first = digest_bytes("sha256", sha256, 32)
        if md5 is not None:
            second = digest_bytes("md5", md5, 16)
        ota_sink_serial_announce(self.ptr, first, second)

    def exclude(self, size_t index, error):
        """Before the installation: that chip takes no part, and this error (an OtaError) is what became of it."""
        cdef ota_error cause
        cdef size_t count = 0
        cdef const ota_status_info *rows = ota_status_table(&count)
        cdef ota_status status = OTA_ERR_REJECTED
        clear_error(&cause)
        text = str(error).encode("utf-8", "replace")
        name = error.status.encode("ascii")
        for i in range(count):
            if rows[i].status < 0 and <bytes>rows[i].name == name:
                status = rows[i].status
        ota_error_set(&cause, status, OTA_STAGE_HEADER, error.offset, error.device_code, "%s", <const char *>text)
        if not ota_sink_serial_exclude(self.ptr, index, &cause):
            raise _errors.StateError("too late, or no such chip", stage="sink")

    def results(self):
        """What became of each chip, in the order given; from any thread, also while they are written.

        Returns:
            tuple[dict[str, object], ...]: ``port``; ``error`` (an OtaError, or None); ``phase``; ``identical``, ``verified``,
            ``committed``; in bytes ``done``, ``size`` (None: not known), ``wire_out``, ``wire_in``, ``programmed``,
            ``skipped``, ``blank``, ``erased``, ``resumed_at``; ``commands``, ``retries``, ``probes``, ``reconnects``;
            ``phase_ms``, a dict by phase.
        """
        cdef ota_sink_serial_result row
        out = []
        for i, name in enumerate(self.names):
            ota_sink_serial_get_result(self.ptr, i, &row)
            out.append(
                {
                    "port": name,
                    "error": make_error(&row.error) if row.error.status < 0 else None,
                    "phase": ota_serial_phase_name(row.phase).decode("ascii"),
                    "identical": bool(row.identical),
                    "verified": bool(row.verified),
                    "committed": bool(row.committed),
                    "done": row.done,
                    "size": None if row.size == UINT64_MAX else row.size,
                    "wire_out": row.wire_out,
                    "wire_in": row.wire_in,
                    "commands": row.commands,
                    "retries": row.retries,
                    "programmed": row.programmed,
                    "skipped": row.skipped,
                    "blank": row.blank,
                    "erased": row.erased,
                    "probes": row.probes,
                    "reconnects": row.reconnects,
                    "resumed_at": row.resumed_at,
                    "phase_ms": {
                        ota_serial_phase_name(<ota_serial_phase>k).decode("ascii"): row.phase_ms[k]
                        for k in range(<int>OTA_SERIAL_PHASES)
                        if row.phase_ms[k] != 0
                    },
                }
            )
        return tuple(out)

    @property
    def store_counts(self):
        """What was done once for all chips: appended, compressed, stream_bytes, digested, streams, shared, cached."""
        cdef ota_image_store_counts c
        ota_sink_serial_get_store_counts(self.ptr, &c)
        return {
            "appended": c.appended,
            "compressed": c.compressed,
            "stream_bytes": c.stream_bytes,
            "digested": c.digested,
            "streams": c.streams,
            "shared": c.shared,
            "cached": bool(c.cached),
        }
