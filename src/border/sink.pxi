# Sinks and fault plans. A sink is made here or by a target, and owned by its object.

cdef class Fault:
    """A plan for what goes wrong with the file or flash it is given to (``ota_fault`` of port/port.h).

    Args:
        ops: which operations are counted, a sum of READ, WRITE, SYNC, ERASE, OPEN, LINES, BAUD; 0: all.
        after: so many counted operations succeed first.
        count: so many fail then; 0: none. Ignored with ``power_cut``.
        errnum: errno the failing ones report; 0: EIO.
        reaches: count only operations whose last byte lies beyond this offset; 0: every one.
        power_cut: operation number ``after`` (from 0) is cut; it and everything after it fails.
        torn_len: bytes of the cut or failing write, program or erase that still reach the medium.
    """

    READ = OTA_FAULT_READ
    WRITE = OTA_FAULT_WRITE
    SYNC = OTA_FAULT_SYNC
    ERASE = OTA_FAULT_ERASE
    OPEN = OTA_FAULT_OPEN
    LINES = OTA_FAULT_LINES
    BAUD = OTA_FAULT_BAUD

    cdef ota_fault plan

    def __init__(self, *, ops=0, after=0, count=0, errnum=0, reaches=0, power_cut=False, torn_len=0):
        self.plan.ops = ops
        self.plan.after = after
        self.plan.count = count
        self.plan.errnum = errnum
        self.plan.reaches = reaches
        self.plan.power_cut = power_cut
        self.plan.torn_len = torn_len

    @property
    def seen(self):
        """Counted operations so far, failed ones included."""
        return self.plan.seen

    @property
    def lost(self):
        """Whether the power is gone."""
        return bool(self.plan.lost)


cdef ota_fault *fault_of(Fault fault):
    return &fault.plan if fault is not None else NULL


cdef class Sink:
    """Where an image goes. Used by one installation; see ``rmaker_ota.install``."""

    cdef ota_sink *ptr
    cdef object keep_alive  # what the C sink borrows: a target, a fault plan, callbacks

    def __dealloc__(self):
        if self.ptr != NULL:
            ota_sink_free(&self.ptr)

    cdef void count_use(self, int change) noexcept:
        """Told that a pipeline begins (1) or ends (-1) to use it."""

    @property
    def capacity(self):
        """Bytes an image may have at most; None: no limit that is known before the sink is opened."""
        return None if self.ptr.capacity == UINT64_MAX else self.ptr.capacity

    @property
    def resume_size(self):
        """Offsets an installation can be resumed at are multiples of this, in bytes."""
        return self.ptr.resume_size

    @property
    def counts(self):
        """What the sink did so far: bytes_written, bytes_skipped, reads, writes, syncs, erases, sectors_erased, copies,
        direct (written around the page cache)."""
        cdef ota_sink_counts *c = &self.ptr.counts
        return {
            "bytes_written": c.bytes_written,
            "bytes_skipped": c.bytes_skipped,
            "reads": c.reads,
            "writes": c.writes,
            "syncs": c.syncs,
            "erases": c.erases,
            "sectors_erased": c.sectors_erased,
            "copies": c.copies,
            "direct": bool(c.direct),
        }


cdef class FileSink(Sink):
    """A raw slot: a regular file, made when missing and cut to the image, or a block device, taken exclusively.

    Args:
        path: of the file or device.
        buffered: write through the page cache although direct writes are possible.
        max_size: bytes an image may have at most; 0: the device's capacity, no limit for a regular file.
        fault: what goes wrong, for tests.
    """

    def __init__(self, path, *, buffered=False, max_size=0, Fault fault=None):
        cdef ota_sink_file_options options
        cdef ota_error error
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        encoded = os.fsencode(path)
        options.path = encoded
        options.buffered = buffered
        options.max_size = max_size
        options.fault = fault_of(fault)
        self.keep_alive = fault
        check(ota_sink_file_new(&options, &self.ptr, &error), &error)
