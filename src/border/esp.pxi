# ESP formats: images, partition tables, otadata. The records are those of rmaker_ota.esp_format.

from libc.string cimport memcpy

cdef object _esp_records = None


cdef object _esp():
    """rmaker_ota.esp_format, imported when the first of its records is needed."""
    global _esp_records
    if _esp_records is None:
        from rmaker_ota import esp_format
        _esp_records = esp_format
    return _esp_records


cdef str _esp_text(const char *text):
    return (<bytes>text).decode("utf-8", "backslashreplace")


cdef const uint8_t *_esp_bytes(const uint8_t[::1] data) noexcept:
    """First byte of a buffer, also of an empty one."""
    return &data[0] if data.shape[0] > 0 else <const uint8_t *>b""


# ---- Chips ------------------------------------------------------------------------------------------------------------

def esp_chips():
    """All known chips, as `esp_format.Chip`."""
    cdef size_t count = 0
    cdef const ota_esp_chip *rows = ota_esp_chips(&count)
    chip = _esp().Chip
    return tuple(
        chip(
            rows[i].id,
            rows[i].name.decode("ascii"),
            rows[i].title.decode("ascii"),
            rows[i].bootloader_offset,
            tuple(
                (rows[i].mapped[k].low, rows[i].mapped[k].high)
                for k in range(2)
                if rows[i].mapped[k].low != rows[i].mapped[k].high
            ),
        )
        for i in range(count)
    )


def esp_chip_id(str name):
    """Chip id of a name such as ``esp32c3`` or ``ESP32-C3``.

    Raises:
        ArgumentError: no such chip.
    """
    cdef const ota_esp_chip *chip = ota_esp_chip_by_name(name.encode("utf-8", "replace"))
    if chip is NULL:
        raise _errors.ArgumentError(f"there is no chip called {name!r}")
    return chip.id


# ---- Images -----------------------------------------------------------------------------------------------------------

cdef object _image_header(const ota_esp_image_header *header):
    cdef const ota_esp_chip *chip = ota_esp_chip_by_id(header.chip_id)
    return _esp().EspImageHeader(
        header.segment_count,
        header.spi_mode,
        header.spi_speed,
        header.spi_size,
        header.entry_addr,
        header.wp_pin,
        (header.spi_pin_drv[0], header.spi_pin_drv[1], header.spi_pin_drv[2]),
        header.chip_id,
        header.min_chip_rev,
        header.min_chip_rev_full,
        header.max_chip_rev_full,
        header.hash_appended != 0,
        chip.name.decode("ascii") if chip is not NULL else None,
    )


cdef object _app_descriptor(const ota_esp_app_descriptor *descriptor):
    return _esp().AppDescriptor(
        _esp_text(descriptor.version),
        _esp_text(descriptor.project_name),
        descriptor.secure_version,
        _esp_text(descriptor.time),
        _esp_text(descriptor.date),
        _esp_text(descriptor.idf_version),
        (<const char *>descriptor.elf_sha256)[:32],
        descriptor.min_efuse_block_rev_full,
        descriptor.max_efuse_block_rev_full,
        descriptor.mmu_page_size_log2,
        descriptor.spi_flash_mode,
    )


cdef object _bootloader_descriptor(const ota_esp_bootloader_descriptor *descriptor):
    return _esp().BootloaderDescriptor(
        descriptor.version,
        descriptor.secure_version,
        _esp_text(descriptor.idf_version),
        _esp_text(descriptor.date_time),
    )


def parse_image_header(const uint8_t[::1] data):
    """The header in the first 24 bytes of an image.

    Raises:
        DataError: fewer than 24 bytes.
        ImageError: no image, or a header no device accepts.
        UnsupportedError: a compressed image in its wrapper.
    """
    cdef ota_esp_image_header header
    cdef ota_error error
    clear_error(&error)
    check(ota_esp_image_header_parse(_esp_bytes(data), data.shape[0], &header, &error), &error)
    return _image_header(&header)


def parse_app_descriptor(const uint8_t[::1] data):
    """The app descriptor in the first 288 bytes of an image. Nothing else of the image is looked at.

    Raises:
        DataError: fewer than 288 bytes.
        ImageError: there is none.
    """
    cdef ota_esp_app_descriptor descriptor
    cdef ota_error error
    cdef Py_ssize_t skip = min(data.shape[0], <Py_ssize_t>OTA_ESP_DESCRIPTOR_OFFSET)
    clear_error(&error)
    check(ota_esp_app_descriptor_parse(_esp_bytes(data) + skip, data.shape[0] - skip, &descriptor, &error), &error)
    return _app_descriptor(&descriptor)


cdef int _image_rules(dict given, ota_esp_image_rules *rules) except -1:
    kinds = {"app": OTA_ESP_IMAGE_APP, "bootloader": OTA_ESP_IMAGE_BOOTLOADER, "any": OTA_ESP_IMAGE_ANY}
    kind = given.pop("kind", "app")
    if kind not in kinds:
        raise _errors.ArgumentError(f"kind is {kind!r}, expected one of app, bootloader, any")
    rules.kind = kinds[kind]
    chip_id = given.pop("chip_id", None)
    revision = given.pop("chip_revision", None)
    block_revision = given.pop("efuse_block_revision", None)
    rules.chip_id = OTA_ESP_CHIP_ANY if chip_id is None else chip_id
    rules.chip_revision = OTA_ESP_UNSET if revision is None else revision
    rules.efuse_block_revision = OTA_ESP_UNSET if block_revision is None else block_revision
    rules.ignore_max_revision = given.pop("ignore_max_revision", False)
    rules.slot_size = given.pop("slot_size", 0)
    rules.spi_flash_mode = given.pop("spi_flash_mode", 0)
    rules.bytes_after_allowed = given.pop("bytes_after_allowed", True)
    if given:
        raise TypeError(f"unknown image rule {next(iter(given))!r}")
    return 0


cdef class ImageChecker:
    """Checks an ESP image as its bytes pass, in pieces of any size.

    Args:
        kind: "app" (an app descriptor is required), "bootloader" or "any".
        chip_id, chip_revision, efuse_block_revision: of the chip it is for; None: not checked.
        ignore_max_revision: the eFuse "disable wafer version major" is burnt.
        slot_size: bytes it must fit into; 0: not checked.
        spi_flash_mode: of the running app's descriptor; 0: not checked.
        bytes_after_allowed: bytes may follow the image.
    """

    cdef ota_esp_image_check _check

    def __cinit__(self, **rules):
        cdef ota_esp_image_rules wanted
        cdef ota_error error
        clear_error(&error)
        memset(&wanted, 0, sizeof(wanted))
        _image_rules(rules, &wanted)
        check(ota_esp_image_check_begin(&self._check, &wanted, &error), &error)

    def __dealloc__(self):
        ota_esp_image_check_end(&self._check)

    def update(self, const uint8_t[::1] data):
        """The next bytes; True when the image is complete and right.

        Raises:
            OtaError: what is wrong, as soon as it is seen, and again by every call from then on.
        """
        cdef ota_error error
        cdef ota_status status
        cdef const uint8_t *bytes_ = _esp_bytes(data)
        cdef size_t size = data.shape[0]
        clear_error(&error)
        with nogil:
            status = ota_esp_image_check_update(&self._check, bytes_, size, &error)
        check(status, &error)
        return status == OTA_DONE

    def finish(self):
        """The end of the input.

        Raises:
            DataError: the image was not complete.
            OtaError: what was wrong before.
        """
        cdef ota_error error
        clear_error(&error)
        check(ota_esp_image_check_finish(&self._check, &error), &error)

    def result(self):
        """What was found so far, as `esp_format.EspImage`."""
        cdef ota_esp_image_check *c = &self._check
        cdef bint summed = c.state in (OTA_ESP_IMAGE_STATE_HASH, OTA_ESP_IMAGE_STATE_COMPLETE) or c.error.status in (
            OTA_ERR_IMAGE_CHECKSUM, OTA_ERR_IMAGE_HASH
        )
        cdef bint hashed = c.has_header and c.header.hash_appended and (
            c.state == OTA_ESP_IMAGE_STATE_COMPLETE or c.error.status == OTA_ERR_IMAGE_HASH
        )
        records = _esp()
        return records.EspImage(
            _image_header(&c.header) if c.has_header else None,
            _app_descriptor(&c.descriptor) if c.has_descriptor else None,
            _bootloader_descriptor(&c.bootloader_descriptor) if c.has_bootloader_descriptor else None,
            tuple(
                records.Segment(
                    c.segments[i].header_offset,
                    c.segments[i].data_offset,
                    c.segments[i].load_addr,
                    c.segments[i].size,
                    c.segments[i].mapped,
                )
                for i in range(c.segment_count)
            ),
            c.image_size,
            c.checksum_stored if summed else None,
            c.checksum_computed if summed else None,
            (<const char *>c.hash_stored)[:32] if hashed else None,
            (<const char *>c.hash_computed)[:32] if hashed else None,
            c.bytes_after,
            make_error(&c.error) if c.error.status < 0 else None,
        )


def parse_image(const uint8_t[::1] data, **rules):
    """Checks a whole image and says what it is and what is wrong with it.

    Args:
        data: the image, bytes behind it included.
        rules: those of `ImageChecker`; kind is "any" when not given.

    Returns:
        EspImage: whose ``error`` is None for a right image. Nothing is raised for a wrong one.
    """
    rules.setdefault("kind", "any")
    checker = ImageChecker(**rules)
    try:
        checker.update(data)
        checker.finish()
    except _errors.OtaError:
        pass  # it is in the result
    return checker.result()


# ---- Partition table --------------------------------------------------------------------------------------------------

cdef object _partition(const ota_esp_partition *row):
    return _esp().Partition(
        _esp_text(row.label), row.type, row.subtype, row.offset, row.size, row.flags, (<const char *>row.label)[:16]
    )


cdef object _partition_table(const ota_esp_partition_table *table):
    return _esp().PartitionTable(
        tuple(_partition(&table.rows[i]) for i in range(table.count)),
        table.has_md5,
        (<const char *>table.md5)[:16] if table.has_md5 and table.end_offset else None,
        table.end_offset if table.end_offset else None,
    )


cdef int _load_partition_table(object record, ota_esp_partition_table *table) except -1:
    memset(table, 0, sizeof(table[0]))
    cdef bytes label
    cdef Py_ssize_t i
    cdef ota_esp_partition *row
    if len(record.partitions) > OTA_ESP_PARTITION_ROWS_MAX:
        raise _errors.ArgumentError(f"{len(record.partitions)} partitions are too many for a table")
    for i, partition in enumerate(record.partitions):
        row = &table.rows[i]
        label = partition.raw_label or partition.label.encode("utf-8")
        if len(label) > 16:
            raise _errors.ArgumentError(f"the label {partition.label!r} has more than 16 bytes")
        for name, most in (("type", 0xFF), ("subtype", 0xFF), ("offset", 0xFFFFFFFF), ("size", 0xFFFFFFFF),
                           ("flags", 0xFFFFFFFF)):
            if not 0 <= getattr(partition, name) <= most:
                raise _errors.ArgumentError(f"{name} of partition {partition.label!r} is {getattr(partition, name)}")
        memcpy(row.label, <const char *>label, len(label))
        row.type = partition.type
        row.subtype = partition.subtype
        row.offset = partition.offset
        row.size = partition.size
        row.flags = partition.flags
        table.count += 1
    table.has_md5 = record.has_md5
    return 0


def parse_partition_table(const uint8_t[::1] data, *, uint64_t flash_size=0):
    """Reads a partition table as a boot loader does.

    Args:
        data: the table from its first byte; what follows the end marker does not matter.
        flash_size: bytes every partition must lie in; 0: not checked.

    Raises:
        FormatError: names row and field; ``offset`` is that of the row.
    """
    cdef ota_esp_partition_table table
    cdef ota_error error
    clear_error(&error)
    check(ota_esp_partition_table_parse(_esp_bytes(data), data.shape[0], flash_size, &table, &error), &error)
    return _partition_table(&table)


def build_partition_table(table):
    """The 0xC00 bytes of a table.

    Raises:
        FormatError: too many partitions, or none.
        ArgumentError: a number or label does not fit its field.
    """
    cdef ota_esp_partition_table rows
    cdef ota_error error
    cdef uint8_t out[0xC00]
    clear_error(&error)
    _load_partition_table(table, &rows)
    check(ota_esp_partition_table_build(&rows, out, &error), &error)
    return (<const char *>out)[:sizeof(out)]


cdef const char *_lookup_variable(void *user, const char *name) noexcept:
    value = (<dict>user).get(<bytes>name)
    if value is None:
        return NULL
    return <const char *>(<bytes>value)


cdef int _csv_options(dict given, dict variables, ota_esp_csv_options *options) except -1:
    memset(options, 0, sizeof(options[0]))
    primary = given.pop("bootloader_offset", None)
    recovery = given.pop("recovery_bootloader_offset", None)
    options.table_offset = given.pop("table_offset", 0x8000)
    options.flash_size = given.pop("flash_size", 0)
    options.bootloader_offset = OTA_ESP_UNSET if primary is None else primary
    options.recovery_bootloader_offset = OTA_ESP_UNSET if recovery is None else recovery
    options.secure_boot_v1 = given.pop("secure_boot_v1", False)
    if given:
        raise TypeError(f"unknown partition table option {next(iter(given))!r}")
    options.lookup = _lookup_variable
    options.user = <void *>variables
    return 0


def partition_table_from_csv(text, *, variables=None, **options):
    """Reads the CSV a partition table is made from, with all checks of ESP-IDF's generator.

    Args:
        text: str or bytes.
        variables: values of ``$NAME`` and ``${NAME}``.
        options: ``table_offset`` (0x8000), ``flash_size`` (0: not checked), ``bootloader_offset`` and
            ``recovery_bootloader_offset`` (for rows of type bootloader), ``secure_boot_v1``.

    Raises:
        FormatError: names line and field; ``offset`` is that of the line in the text.
    """
    cdef ota_esp_partition_table table
    cdef ota_esp_csv_options wanted
    cdef ota_error error
    clear_error(&error)
    cdef bytes raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    cdef dict values = {
        name.encode("utf-8"): value.encode("utf-8").replace(b"\0", b"") for name, value in (variables or {}).items()
    }
    _csv_options(options, values, &wanted)
    check(ota_esp_partition_table_from_csv(<const char *>raw, len(raw), &wanted, &table, &error), &error)
    return _partition_table(&table)


def check_partition_table(table, **options):
    """The checks of ESP-IDF's generator on a table: alignment, names, overlaps, otadata, NVS.

    Args:
        options: as of `partition_table_from_csv`.

    Raises:
        FormatError: names partition and field.
    """
    cdef ota_esp_partition_table rows
    cdef ota_esp_csv_options wanted
    cdef ota_error error
    clear_error(&error)
    cdef dict values = {}
    _load_partition_table(table, &rows)
    _csv_options(options, values, &wanted)
    check(ota_esp_partition_table_check(&rows, &wanted, &error), &error)


def partition_table_to_csv(table):
    """The table as the CSV ESP-IDF's generator writes."""
    cdef ota_esp_partition_table rows
    _load_partition_table(table, &rows)
    cdef size_t size = ota_esp_partition_table_to_csv(&rows, NULL, 0)
    out = bytearray(size + 1)
    ota_esp_partition_table_to_csv(&rows, <char *>out, size + 1)
    return out[:size].decode("utf-8", "backslashreplace")


def partition_names(uint8_t type, uint8_t subtype):
    """Names of a type and subtype as the CSV has them: ``("app", "ota_0")``; numbers where there is no name."""
    cdef char name[24]
    cdef char subname[24]
    ota_esp_partition_type_name(type, name)
    ota_esp_partition_subtype_name(type, subtype, subname)
    return (<bytes>name).decode("ascii"), (<bytes>subname).decode("ascii")


def partition_layout(table):
    """The partitions that booting and updating are about.

    Raises:
        FormatError: boot loader and app would not agree about the table, or the chip could not boot with it.
    """
    cdef ota_esp_partition_table rows
    cdef ota_esp_layout layout
    cdef ota_error error
    clear_error(&error)
    _load_partition_table(table, &rows)
    check(ota_esp_layout_find(&rows, &layout, &error), &error)
    return _esp().PartitionLayout(
        _partition(layout.otadata) if layout.otadata is not NULL else None,
        _partition(layout.factory) if layout.factory is not NULL else None,
        _partition(layout.test) if layout.test is not NULL else None,
        tuple(_partition(layout.slots[i]) for i in range(layout.slot_count)),
    )


# ---- otadata ----------------------------------------------------------------------------------------------------------

cdef object _otadata_entry(const ota_esp_otadata_entry *entry):
    return _esp().OtadataEntry(entry.seq, entry.state, entry.crc, (<const char *>entry.label)[:20])


cdef int _load_otadata_entry(object record, ota_esp_otadata_entry *entry) except -1:
    cdef bytes label = record.label
    if len(label) != sizeof(entry.label):
        raise _errors.ArgumentError(f"the label of an otadata entry has 20 bytes, here are {len(label)}")
    entry.seq = record.seq
    entry.state = record.state
    entry.crc = record.crc
    memcpy(entry.label, <const char *>label, sizeof(entry.label))
    return 0


cdef int _load_otadata(object records, ota_esp_otadata_entry entries[2]) except -1:
    first, second = records
    _load_otadata_entry(first, &entries[0])
    _load_otadata_entry(second, &entries[1])
    return 0


cdef object _slot_name(int slot):
    return None if slot == OTA_ESP_SLOT_NONE else ota_esp_slot_name(slot).decode("ascii")


cdef int _slot_number(object name) except? -99:
    if name is None:
        return OTA_ESP_SLOT_NONE
    if name == "factory":
        return OTA_ESP_SLOT_FACTORY
    if name == "test":
        return OTA_ESP_SLOT_TEST
    head, _, number = name.partition("_")
    if head != "ota" or not number.isascii() or not number.isdigit() or int(number) > 15:
        raise _errors.ArgumentError(f"{name!r} is no slot: factory, test, or ota_0 to ota_15")
    return int(number)


def parse_otadata(const uint8_t[::1] data):
    """Both entries of an otadata partition (8192 bytes).

    Raises:
        FormatError: fewer bytes.
    """
    cdef ota_esp_otadata_entry entries[2]
    cdef ota_error error
    clear_error(&error)
    check(ota_esp_otadata_parse(_esp_bytes(data), data.shape[0], entries, &error), &error)
    return _otadata_entry(&entries[0]), _otadata_entry(&entries[1])


def build_otadata_entry(entry):
    """The 32 bytes of an entry."""
    cdef ota_esp_otadata_entry one
    cdef uint8_t out[32]
    _load_otadata_entry(entry, &one)
    ota_esp_otadata_entry_build(&one, out)
    return (<const char *>out)[:sizeof(out)]


def build_otadata(entries):
    """An otadata partition of 8192 bytes with two entries, 0xFF elsewhere."""
    first, second = entries
    fill = b"\xff" * (4096 - 32)
    return build_otadata_entry(first) + fill + build_otadata_entry(second) + fill


def make_otadata_entry(uint32_t seq, uint32_t state):
    """An entry with the right CRC, as firmware writes it."""
    cdef ota_esp_otadata_entry entry = ota_esp_otadata_entry_make(seq, state)
    return _otadata_entry(&entry)


def blank_otadata_entry():
    """An erased entry."""
    return _esp().OtadataEntry(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)


def otadata_facts(entry, uint32_t slot_count):
    """What an entry means with so many OTA slots, as `esp_format.OtadataFacts`."""
    cdef ota_esp_otadata_entry one
    _load_otadata_entry(entry, &one)
    return _esp().OtadataFacts(
        _slot_name(ota_esp_otadata_slot(&one, slot_count)),
        ota_esp_otadata_state_name(one.state).decode("ascii"),
        ota_esp_otadata_crc_ok(&one),
        ota_esp_otadata_blank(&one),
        ota_esp_otadata_dead(&one),
        ota_esp_otadata_live(&one),
    )


cdef struct _slot_table:
    ota_esp_slot_facts facts[18]  # number + 2: test, factory, ota_0 .. ota_15


cdef ota_status _probe_table(void *user, int slot, c_bool full, ota_esp_slot_facts *facts,
                             ota_error *error) noexcept nogil:
    facts[0] = (<_slot_table *>user).facts[slot + 2]
    return OTA_OK


cdef int _boot_config(object record, _slot_table *table, ota_esp_boot_config *config) except -1:
    memset(config, 0, sizeof(config[0]))
    for i in range(18):
        table.facts[i].verifies = True
        table.facts[i].described = True
        table.facts[i].secure_version = 0
    for name, facts in record.slots.items():
        if name is None:
            raise _errors.ArgumentError("a slot without a name")
        number = _slot_number(name)
        table.facts[number + 2].verifies = facts.verifies
        table.facts[number + 2].described = facts.described
        table.facts[number + 2].secure_version = facts.secure_version
    config.slot_count = record.slot_count
    config.has_factory = record.has_factory
    config.has_test = record.has_test
    config.has_otadata = record.has_otadata
    config.rollback = record.rollback
    config.anti_rollback = record.anti_rollback
    config.secure_version = record.secure_version
    config.probe = _probe_table
    config.user = table
    return 0


cdef object _otadata_plan(const ota_esp_plan *plan, const ota_esp_otadata_entry *before):
    cdef ota_esp_otadata_entry after[2]
    after[0] = before[0]
    after[1] = before[1]
    ota_esp_plan_apply(plan, after)
    records = _esp()
    ops = tuple(
        records.OtadataOp("erase", plan.ops[i].sector)
        if plan.ops[i].kind == OTA_ESP_OP_ERASE
        else records.OtadataOp("program", plan.ops[i].sector, _otadata_entry(&plan.ops[i].entry))
        for i in range(plan.count)
    )
    return records.OtadataPlan(
        ops,
        (_otadata_entry(&after[0]), _otadata_entry(&after[1])),
        plan.secure_version if plan.raise_secure_version else None,
    )


def boot_decide(entries, config):
    """What a boot loader does at one power-on.

    Args:
        entries: both `OtadataEntry`.
        config: `BootConfig`.

    Returns:
        BootDecision

    Raises:
        ArgumentError: a configuration that cannot be.
    """
    cdef ota_esp_otadata_entry both[2]
    cdef _slot_table table
    cdef ota_esp_boot_config chip
    cdef ota_esp_boot_decision decision
    cdef ota_error error
    cdef char text[160]
    clear_error(&error)
    _load_otadata(entries, both)
    _boot_config(config, &table, &chip)
    check(ota_esp_boot_decide(both, &chip, &decision, &error), &error)
    reasons = []
    for i in range(decision.step_count):
        ota_esp_boot_step_text(&decision.steps[i], text, sizeof(text))
        reasons.append((<bytes>text).decode("utf-8"))
    return _esp().BootDecision(
        _slot_name(decision.slot),
        decision.active if decision.active >= 0 else None,
        decision.first_use,
        _otadata_plan(&decision.plan, both),
        tuple(reasons),
    )


def otadata_next_slot(uint32_t slot_count, running):
    """Name of the slot an update goes to; None without OTA slots. ``running`` is a slot's name or None."""
    return _slot_name(ota_esp_next_slot(slot_count, _slot_number(running)))


def otadata_slot_state(entries, uint32_t slot_count, slot):
    """State of an OTA slot (``STATE_`` constants).

    Raises:
        NotFoundError: no entry names it.
        UnsupportedError: not an OTA slot.
    """
    cdef ota_esp_otadata_entry both[2]
    cdef ota_error error
    cdef uint32_t state = 0
    clear_error(&error)
    _load_otadata(entries, both)
    check(ota_esp_slot_state(both, slot_count, _slot_number(slot), &state, &error), &error)
    return state


def otadata_last_invalid(entries, uint32_t slot_count):
    """Name of the slot that was rolled back last, or None."""
    cdef ota_esp_otadata_entry both[2]
    _load_otadata(entries, both)
    return _slot_name(ota_esp_last_invalid(both, slot_count))


def otadata_can_rollback(entries, config, running):
    """The slot that would boot if the running one were marked invalid.

    Raises:
        RollbackError: there is none.
        StateError: the active entry does not name the running slot.
    """
    cdef ota_esp_otadata_entry both[2]
    cdef _slot_table table
    cdef ota_esp_boot_config chip
    cdef ota_error error
    cdef int to = OTA_ESP_SLOT_NONE
    clear_error(&error)
    _load_otadata(entries, both)
    _boot_config(config, &table, &chip)
    check(ota_esp_can_rollback(both, &chip, _slot_number(running), &to, &error), &error)
    return _slot_name(to)


cdef enum _plan_kind:
    _PLAN_BEGIN
    _PLAN_SET_BOOT
    _PLAN_MARK_VALID
    _PLAN_MARK_INVALID


cdef object _make_plan(_plan_kind kind, entries, config, running, slot):
    cdef ota_esp_otadata_entry both[2]
    cdef _slot_table table
    cdef ota_esp_boot_config chip
    cdef ota_esp_plan plan
    cdef ota_error error
    cdef ota_status status = OTA_OK
    cdef int running_number = _slot_number(running)
    cdef int slot_number = _slot_number(slot)
    clear_error(&error)
    _load_otadata(entries, both)
    _boot_config(config, &table, &chip)
    if kind == _PLAN_BEGIN:
        status = ota_esp_plan_begin(both, &chip, running_number, slot_number, &plan, &error)
    elif kind == _PLAN_SET_BOOT:
        status = ota_esp_plan_set_boot(both, &chip, running_number, slot_number, &plan, &error)
    elif kind == _PLAN_MARK_VALID:
        status = ota_esp_plan_mark_valid(both, &chip, running_number, &plan, &error)
    else:
        status = ota_esp_plan_mark_invalid(both, &chip, running_number, &plan, &error)
    check(status, &error)
    return _otadata_plan(&plan, both)


def otadata_plan_begin(entries, config, running, slot):
    """Changes of otadata before the first byte of ``slot`` is erased.

    Raises:
        SlotRunningError, PendingVerifyError, ArgumentError
    """
    return _make_plan(_PLAN_BEGIN, entries, config, running, slot)


def otadata_plan_set_boot(entries, config, running, slot):
    """Changes of otadata that make ``slot`` the next one to boot.

    Raises:
        ArgumentError, NotFoundError, RejectedError (secure version)
    """
    return _make_plan(_PLAN_SET_BOOT, entries, config, running, slot)


def otadata_plan_mark_valid(entries, config, running):
    """Changes of otadata that confirm the running slot.

    Raises:
        StateError: the active entry does not name the running slot.
    """
    return _make_plan(_PLAN_MARK_VALID, entries, config, running, None)


def otadata_plan_mark_invalid(entries, config, running):
    """Changes of otadata after which the next boot takes the other image.

    Raises:
        RollbackError: there is none.
        StateError: the active entry does not name the running slot.
    """
    return _make_plan(_PLAN_MARK_INVALID, entries, config, running, None)
