# The engine: one installation as an object. Decides nothing: what Python wants to judge (the header) it is asked by callback.

PHASES = ("connecting", "header", "receiving", "received", "verifying", "committing", "done")
TRANSFORMS = ("auto", "none", "gzip", "zlib", "zstd", "xz")


cdef class Pipeline:
    """One run of the engine (``engine/pipeline.h``): source -> transform -> verifiers -> sink.

    Args:
        source: where the bytes come from.
        sink: where the image goes.
        transform: "auto" (by magic number), "none", "gzip", "zlib", "zstd" or "xz".
        file_sha256, file_md5: digests of the file as served, bytes of 32 and 16; None: not known.
        compute_sha256, compute_md5: compute the digest although nobody announced one.
        file_size: bytes of the file as announced; None: not known.
        image_rules: keyword arguments of the ESP image verifier (``ota_image_rules``); None: not an ESP image.
        max_image_size: bytes the image may have after a transform; 0: the sink's capacity.
        header_size: bytes the gate wants, 1 to 4096.
        header_required: a shorter image is an error in stage "header".
        read_back: read the image from the medium after the sync and compare its SHA-256.
        single_thread: all stages on the calling thread.
        chunk_count, chunk_size: of the ring; bytes, a multiple of 4096.
        tick_ms: milliseconds between two calls of ``on_tick``.
        checkpoint_bytes, checkpoint_ms: how often ``on_checkpoint`` is called at most; 0: not by bytes, not by time.
        resume_offset, resume_sha256: bytes on the slot from an earlier run, and their digest.

    ``run`` may be called once. ``cancel`` and ``progress`` may be called from any thread at any time.
    """

    cdef ota_pipeline *ptr
    cdef Source source
    cdef Sink sink
    cdef ota_verify *file_sha256
    cdef ota_verify *image_sha256
    cdef ota_verify *file_md5
    cdef ota_verify *image
    cdef object raised
    cdef object on_header
    cdef object on_phase
    cdef object on_checkpoint
    cdef object on_tick
    cdef bint ran

    def __init__(
        self,
        Source source not None,
        Sink sink not None,
        *,
        transform="auto",
        file_sha256=None,
        file_md5=None,
        compute_sha256=True,
        compute_md5=False,
        file_size=None,
        image_rules=None,
        max_image_size=0,
        header_size=288,
        header_required=False,
        read_back=False,
        single_thread=False,
        chunk_count=8,
        chunk_size=1 << 20,
        tick_ms=100,
        checkpoint_bytes=0,
        checkpoint_ms=0,
        resume_offset=0,
        resume_sha256=None,
    ):
        cdef ota_pipeline_options options
        cdef ota_image_rules rules
        cdef ota_error error
        cdef const uint8_t *expected
        memset(&options, 0, sizeof(options))
        clear_error(&error)
        if transform not in TRANSFORMS:
            raise _errors.ArgumentError(f"transform is {transform!r}, expected one of {', '.join(TRANSFORMS)}")
        self.source = source
        self.sink = sink
        need_sha256 = (
            compute_sha256 or read_back or resume_offset != 0 or checkpoint_bytes != 0 or checkpoint_ms != 0
        )
        if file_sha256 is not None or need_sha256:
            expected = digest_bytes("sha256", file_sha256, 32)
            check(ota_verify_digest_new(OTA_DIGEST_SHA256, expected, &self.file_sha256, &error), &error)
        if need_sha256:
            check(ota_verify_digest_new(OTA_DIGEST_SHA256, NULL, &self.image_sha256, &error), &error)
        if file_md5 is not None or compute_md5:
            expected = digest_bytes("md5", file_md5, 16)
            check(ota_verify_digest_new(OTA_DIGEST_MD5, expected, &self.file_md5, &error), &error)
            options.file[0] = self.file_md5
        if image_rules is not None:
            rules = make_image_rules(image_rules)
            check(ota_verify_image_new(&rules, &self.image, &error), &error)
            options.image[0] = self.image
        options.source = source.ptr
        options.sink = sink.ptr
        options.transform = TRANSFORMS.index(transform)
        options.max_image_size = max_image_size
        options.file_sha256 = self.file_sha256
        options.image_sha256 = self.image_sha256
        options.file_size = UINT64_MAX if file_size is None else file_size
        options.header_size = header_size
        options.header_required = header_required
        options.read_back = read_back
        options.single_thread = single_thread
        options.chunk_count = chunk_count
        options.chunk_size = chunk_size
        options.tick_ms = tick_ms
        options.checkpoint_bytes = checkpoint_bytes
        options.checkpoint_ms = checkpoint_ms
        options.resume_offset = resume_offset
        if resume_offset != 0:
            memcpy(options.resume_sha256, digest_bytes("resume_sha256", resume_sha256, 32), 32)
        check(ota_pipeline_new(&options, &self.ptr, &error), &error)

    def __dealloc__(self):
        ota_pipeline_free(&self.ptr)
        ota_verify_free(&self.file_sha256)
        ota_verify_free(&self.image_sha256)
        ota_verify_free(&self.file_md5)
        ota_verify_free(&self.image)

    def run(self, *, on_header=None, on_phase=None, on_checkpoint=None, on_tick=None):
        """Runs to the end on this thread; the callbacks are called on it too.

        Args:
            on_header: ``(header: bytes, size: int | None, offset: int, entity_tag: str)``; returning accepts, raising refuses.
            on_phase: ``(phase: str)``, one of PHASES.
            on_checkpoint: ``(offset: int, sha256: bytes, entity_tag: str)``: so many bytes are on the medium for good.
            on_tick: called without arguments about every ``tick_ms``; signals are handled there in any case.

        Raises:
            OtaError: the first failure of any stage, or exactly what a callback raised.
        """
        cdef ota_pipeline_callbacks callbacks
        cdef ota_error error
        cdef ota_status status
        if self.ran:
            raise _errors.StateError("a pipeline runs once")
        self.source.begin_use()
        self.ran = True
        memset(&callbacks, 0, sizeof(callbacks))
        clear_error(&error)
        self.on_header = on_header
        self.on_phase = on_phase
        self.on_checkpoint = on_checkpoint
        self.on_tick = on_tick
        callbacks.user = <void *>self
        callbacks.tick = tick_callback  # signals are handled there
        if on_header is not None:
            callbacks.header = header_callback
        if on_phase is not None:
            callbacks.phase = phase_callback
        if on_checkpoint is not None:
            callbacks.checkpoint = checkpoint_callback
        self.sink.count_use(1)
        with nogil:
            status = ota_pipeline_run(self.ptr, &callbacks, &error)
        self.sink.count_use(-1)
        self.source.end_use()
        self.on_header = self.on_phase = self.on_checkpoint = self.on_tick = None
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised
        check(status, &error)

    def cancel(self):
        """Ends the run with CancelledError, unless it has begun to commit. Any thread, any time."""
        ota_pipeline_cancel(self.ptr)

    def progress(self):
        """Where the run is.

        Returns:
            tuple[str, int, int | None, int]: phase; bytes of the file read; size of the file; bytes of the image the sink took.
            The bytes a resume took over count as read and taken.
        """
        cdef ota_progress p
        ota_pipeline_progress(self.ptr, &p)
        return PHASES[p.phase], p.position, (None if p.size == UINT64_MAX else p.size), p.image_bytes

    def counts(self):
        """Counters of the run: image_size, file_size, resumed_from, copies, chunks, checkpoints, waits_reader, waits_verifier,
        waits_writer, transform."""
        cdef ota_run_counts c
        ota_pipeline_counts(self.ptr, &c)
        return {
            "image_size": c.image_size,
            "file_size": c.file_size,
            "resumed_from": c.resumed_from,
            "copies": c.copies,
            "chunks": c.chunks,
            "checkpoints": c.checkpoints,
            "waits_reader": c.waits_reader,
            "waits_verifier": c.waits_verifier,
            "waits_writer": c.waits_writer,
            "transform": TRANSFORMS[c.transform],
        }

    @property
    def sha256(self):
        """SHA-256 of the file as served, once the run is done; None: not computed."""
        return digest_value(self.file_sha256)

    @property
    def md5(self):
        """MD5 of the file as served, once the run is done; None: not computed."""
        return digest_value(self.file_md5)


cdef const uint8_t *digest_bytes(name, value, size_t size) except? NULL:
    # borrowed: the caller holds `value` until C has copied it
    if value is None:
        return NULL
    if not isinstance(value, bytes) or len(value) != size:
        raise _errors.ArgumentError(f"{name} has to be {size} bytes")
    return <const uint8_t *>(<bytes>value)


cdef object digest_value(const ota_verify *verify):
    cdef uint8_t value[32]
    cdef size_t size = 0
    if verify == NULL or ota_verify_digest_value(verify, value, &size) < 0:
        return None
    return (<const char *>value)[:size]


cdef ota_image_rules make_image_rules(dict given) except *:
    cdef ota_image_rules rules
    memset(&rules, 0, sizeof(rules))
    known = {
        "chip_id": OTA_ESP_CHIP_ANY,
        "chip_revision": OTA_ESP_CHIP_ANY,
        "efuse_block_revision": OTA_ESP_CHIP_ANY,
        "ignore_max_revision": False,
        "slot_size": 0,
        "spi_flash_mode": 0,
        "bytes_after_allowed": True,
    }
    for name, value in given.items():
        if name not in known:
            raise _errors.ArgumentError(f"image rule {name!r} is not known, expected one of {', '.join(known)}")
        if value is not None:
            known[name] = value
    rules.chip_id = known["chip_id"]
    rules.chip_revision = known["chip_revision"]
    rules.efuse_block_revision = known["efuse_block_revision"]
    rules.ignore_max_revision = known["ignore_max_revision"]
    rules.slot_size = known["slot_size"]
    rules.spi_flash_mode = known["spi_flash_mode"]
    rules.bytes_after_allowed = known["bytes_after_allowed"]
    return rules


cdef ota_status keep_raised(Pipeline self, exc) noexcept:
    # the first exception wins over whatever the engine makes of it
    if self.raised is None:
        self.raised = exc
    return OTA_ERR_REJECTED if isinstance(exc, _errors.RejectedError) else OTA_ERR_CALLBACK


cdef ota_status header_callback(void *user, const ota_header *header) noexcept with gil:
    cdef Pipeline self = <Pipeline>user
    try:
        self.on_header(
            (<const char *>header.data)[: header.len],
            None if header.size == UINT64_MAX else header.size,
            header.offset,
            header.entity_tag.decode("utf-8", "replace"),
        )
        return OTA_OK
    except BaseException as exc:
        return keep_raised(self, exc)


cdef ota_status phase_callback(void *user, ota_phase phase) noexcept with gil:
    cdef Pipeline self = <Pipeline>user
    try:
        self.on_phase(PHASES[phase])
        return OTA_OK
    except BaseException as exc:
        return keep_raised(self, exc)


cdef ota_status checkpoint_callback(void *user, const ota_checkpoint *checkpoint) noexcept with gil:
    cdef Pipeline self = <Pipeline>user
    try:
        self.on_checkpoint(
            checkpoint.offset,
            (<const char *>checkpoint.sha256)[:32],
            checkpoint.entity_tag.decode("utf-8", "replace"),
        )
        return OTA_OK
    except BaseException as exc:
        return keep_raised(self, exc)


cdef ota_status tick_callback(void *user) noexcept with gil:
    cdef Pipeline self = <Pipeline>user
    try:
        PyErr_CheckSignals()
        if self.on_tick is not None:
            self.on_tick()
        return OTA_OK
    except BaseException as exc:
        return keep_raised(self, exc)
