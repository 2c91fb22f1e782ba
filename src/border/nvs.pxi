# NVS partitions. The records are those of rmaker_ota.nvs.

cdef object _nvs_records = None

# Name in Python: number in flash, size of a number in bytes (0: not a number), signed.
_NVS_TYPES = {
    "u8": (OTA_ESP_NVS_U8, 1, False),
    "i8": (OTA_ESP_NVS_I8, 1, True),
    "u16": (OTA_ESP_NVS_U16, 2, False),
    "i16": (OTA_ESP_NVS_I16, 2, True),
    "u32": (OTA_ESP_NVS_U32, 4, False),
    "i32": (OTA_ESP_NVS_I32, 4, True),
    "u64": (OTA_ESP_NVS_U64, 8, False),
    "i64": (OTA_ESP_NVS_I64, 8, True),
    "float": (OTA_ESP_NVS_FLOAT, 4, True),
    "double": (OTA_ESP_NVS_DOUBLE, 8, True),
    "str": (OTA_ESP_NVS_STRING, 0, False),
    "blob": (OTA_ESP_NVS_BLOB, 0, False),
}
_NVS_TYPE_NAMES = {row[0]: name for name, row in _NVS_TYPES.items()}
_NVS_PAGE_STATES = ("empty", "active", "full", "freeing", "corrupt")


cdef object _nvs():
    """rmaker_ota.nvs, imported when the first of its records is needed."""
    global _nvs_records
    if _nvs_records is None:
        from rmaker_ota import nvs
        _nvs_records = nvs
    return _nvs_records


cdef bytes _nvs_utf8(object text, str what):
    if not isinstance(text, str):
        raise TypeError(f"an NVS {what} is a str, not {type(text).__name__}")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise _errors.ArgumentError(f"an NVS {what} cannot be written as UTF-8: {exc}") from exc


cdef bytes _nvs_name(object name, str what):
    """A namespace or key as C wants it."""
    encoded = _nvs_utf8(name, what)
    if b"\0" in encoded:
        raise _errors.ArgumentError(f"an NVS {what} holds no NUL: {name!r}")
    return encoded


cdef str _nvs_text(const char *text):
    return (<bytes>text).decode("utf-8", "surrogateescape")


cdef int _nvs_type_number(object name) except -1:
    row = _NVS_TYPES.get(name)
    if row is None:
        raise _errors.ArgumentError(f"NVS type {name!r} is not one of {', '.join(_NVS_TYPES)}")
    return row[0]


cdef bytes _nvs_encode(str type_name, object value):
    """The bytes of a value; the caller has looked the type up."""
    _, size, signed = _NVS_TYPES[type_name]
    if type_name == "str":
        return _nvs_utf8(value, "string")
    if type_name == "blob":
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"an NVS blob is bytes, not {type(value).__name__}")
        return bytes(value)
    if type_name in ("float", "double"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"an NVS {type_name} is a float, not {type(value).__name__}")
        import struct
        try:
            return struct.pack("<f" if type_name == "float" else "<d", value)
        except (OverflowError, struct.error) as exc:
            raise _errors.ArgumentError(f"{value!r} does not fit into an NVS {type_name}") from exc
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"an NVS {type_name} is an int, not {type(value).__name__}")
    try:
        return value.to_bytes(size, "little", signed=signed)
    except OverflowError as exc:
        raise _errors.ArgumentError(f"{value} does not fit into an NVS {type_name}") from exc


cdef object _nvs_decode(const ota_esp_nvs_item *item):
    """Name of the type and value of an item."""
    cdef bytes raw = (<const char *>item.value)[:item.len]
    name = _NVS_TYPE_NAMES.get(item.type)
    if name is None:
        return f"0x{item.type:02x}", raw
    _, size, signed = _NVS_TYPES[name]
    if name == "blob":
        return name, raw
    if name == "str":
        return name, raw.decode("utf-8", "surrogateescape")
    if name in ("float", "double"):
        import struct
        return name, struct.unpack("<f" if name == "float" else "<d", raw)[0]
    return name, int.from_bytes(raw, "little", signed=signed)


def parse_nvs_keys(const uint8_t[::1] data):
    """The 64 key bytes (eky, tky) in a ``data/nvs_keys`` partition.

    Raises:
        FormatError: too short, empty, or its CRC is wrong.
    """
    cdef ota_esp_nvs_keys keys
    cdef ota_error error
    clear_error(&error)
    check(ota_esp_nvs_keys_parse(_esp_bytes(data), data.shape[0], &keys, &error), &error)
    return (<const char *>keys.bytes)[:OTA_ESP_NVS_KEYS_SIZE]


cdef class Nvs:
    """A copy of an NVS partition, opened as firmware opens it at start.

    Changes are made to the copy and listed as flash operations (`operations`); carried out in order on the medium, a power
    cut between or inside any of them leaves the old or the new value. Repairs of what an earlier cut left come first.

    Args:
        data: the whole partition, a number of 4096-byte pages. Copied.
        keys: 64 key bytes, or a whole ``nvs_keys`` partition; None: not encrypted.
        purge: overwrite erased entries with zeros, as ESP-IDF 6.1 and later do.

    Raises:
        ArgumentError: another size, or keys AES-256-XTS does not take.
        FormatError: a page of a newer format (``device_code`` 0x1110), or an ``nvs_keys`` partition that is none.
    """

    cdef ota_esp_nvs *_nvs

    def __cinit__(self, const uint8_t[::1] data, object keys=None, *, bint purge=False):
        cdef ota_esp_nvs_options options
        cdef ota_esp_nvs_keys key_bytes
        cdef ota_error error
        cdef bytes raw
        clear_error(&error)
        options.keys = NULL
        options.purge = purge
        if keys is not None:
            raw = bytes(keys) if len(keys) == OTA_ESP_NVS_KEYS_SIZE else parse_nvs_keys(keys)
            memcpy(key_bytes.bytes, <const char *>raw, OTA_ESP_NVS_KEYS_SIZE)
            options.keys = &key_bytes
        check(ota_esp_nvs_open(_esp_bytes(data), data.shape[0], &options, &self._nvs, &error), &error)

    def __dealloc__(self):
        ota_esp_nvs_free(&self._nvs)

    @property
    def pages(self):
        """Pages as they were found, before repairs (tuple of `rmaker_ota.nvs.NvsPage`)."""
        cdef ota_esp_nvs_page page
        cdef size_t i
        found = []
        for i in range(ota_esp_nvs_page_count(self._nvs)):
            page = ota_esp_nvs_page_at(self._nvs, i)
            found.append(_nvs().NvsPage(_NVS_PAGE_STATES[<int>page.state], page.seq, page.version, page.written))
        return tuple(found)

    @property
    def namespaces(self):
        """Index of each namespace by name (dict[str, int])."""
        cdef ota_esp_nvs_namespace namespace
        cdef size_t i
        found = {}
        for i in range(ota_esp_nvs_namespace_count(self._nvs)):
            namespace = ota_esp_nvs_namespace_at(self._nvs, i)
            found.setdefault(_nvs_text(namespace.name), namespace.index)
        return found

    @property
    def damaged(self):
        """Items that could not be read (int): wrong CRC or impossible length. All of them where the key is wrong."""
        return ota_esp_nvs_damaged(self._nvs)

    @property
    def repair_count(self):
        """How many of the operations repair what was found (int)."""
        return ota_esp_nvs_repair_count(self._nvs)

    @property
    def image(self):
        """The partition after all operations (bytes)."""
        cdef size_t size = 0
        cdef const uint8_t *data = ota_esp_nvs_image(self._nvs, &size)
        return (<const char *>data)[:size]

    def items(self):
        """All live items of all namespaces (list of `rmaker_ota.nvs.NvsItem`), oldest page first."""
        cdef ota_esp_nvs_item item
        cdef size_t i
        found = []
        for i in range(ota_esp_nvs_item_count(self._nvs)):
            item = ota_esp_nvs_item_at(self._nvs, i)
            type_name, value = _nvs_decode(&item)
            namespace = None if item.namespace_name is NULL else _nvs_text(item.namespace_name)
            found.append(_nvs().NvsItem(namespace, _nvs_text(item.key), type_name, value))
        return found

    def get(self, namespace, key, type=None):
        """The value of a key.

        Args:
            type: its type; None: whatever it has.

        Raises:
            NotFoundError: no such item.
        """
        cdef ota_esp_nvs_item item
        cdef ota_error error
        cdef bytes c_namespace = _nvs_name(namespace, "namespace"), c_key = _nvs_name(key, "key")
        cdef int number = OTA_ESP_NVS_ANY if type is None else _nvs_type_number(type)
        clear_error(&error)
        check(ota_esp_nvs_get(self._nvs, c_namespace, c_key, <uint8_t>number, &item, &error), &error)
        return _nvs_decode(&item)[1]

    def set(self, namespace, key, type, value):
        """Stores a value, whatever type the key had before. The same value of the same type: nothing to do.

        Raises:
            ArgumentError: a name longer than 15 bytes, a value that does not fit its type, a string above 3999 bytes.
            TypeError: a value of another kind.
            FormatError: no room (``ERR_NVS_FULL``), or the partition cannot be written (``ERR_NVS``): fewer than three pages,
                no free page, missing or wrong keys. Nothing has changed then.
        """
        cdef ota_error error
        cdef bytes c_namespace = _nvs_name(namespace, "namespace"), c_key = _nvs_name(key, "key")
        cdef int number = _nvs_type_number(type)
        cdef bytes raw = _nvs_encode(type, value)
        clear_error(&error)
        check(
            ota_esp_nvs_set(
                self._nvs, c_namespace, c_key, <uint8_t>number, <const uint8_t *><const char *>raw, len(raw), &error
            ),
            &error,
        )

    def erase(self, namespace, key=None):
        """Erases a key, or with None every key of the namespace.

        Raises:
            NotFoundError: there is none.
            FormatError: as for `set`.
        """
        cdef ota_error error
        cdef bytes c_namespace = _nvs_name(namespace, "namespace")
        cdef bytes c_key = b"" if key is None else _nvs_name(key, "key")
        cdef const char *key_or_null = NULL if key is None else <const char *>c_key
        clear_error(&error)
        check(ota_esp_nvs_erase(self._nvs, c_namespace, key_or_null, &error), &error)

    def operations(self, size_t start=0):
        """The flash operations so far (list of `rmaker_ota.nvs.NvsOp`), from number ``start`` on; repairs are the first."""
        cdef ota_esp_nvs_op op
        cdef size_t i
        found = []
        for i in range(start, ota_esp_nvs_op_count(self._nvs)):
            op = ota_esp_nvs_op_at(self._nvs, i)
            if op.kind == OTA_ESP_NVS_ERASE:
                found.append(_nvs().NvsOp("erase", op.offset, b"\xff" * op.len))
            else:
                found.append(_nvs().NvsOp("program", op.offset, (<const char *>op.data)[:op.len]))
        return found


def parse_nvs(const uint8_t[::1] data, keys=None):
    """All live items of an NVS partition, as firmware would read them at its next start.

    Args:
        data: the whole partition.
        keys: as for `Nvs`.

    Returns:
        list[rmaker_ota.nvs.NvsItem]: ``(namespace, key, type, value)``, oldest page first.

    Raises:
        ArgumentError, FormatError: as `Nvs`.
    """
    return Nvs(data, keys).items()


def nvs_get(const uint8_t[::1] data, namespace, key, type=None, *, keys=None):
    """One value of an NVS partition; see `Nvs.get`."""
    return Nvs(data, keys).get(namespace, key, type)


def nvs_set(const uint8_t[::1] data, namespace, key, type, value, *, keys=None, bint purge=False):
    """The flash operations that store a value (list of `rmaker_ota.nvs.NvsOp`); empty when it is there already.

    See `Nvs.set` for errors. Carry them out in order, each before the next, or use `nvs_apply` on a copy.
    """
    nvs = Nvs(data, keys, purge=purge)
    nvs.set(namespace, key, type, value)
    return nvs.operations() if ota_esp_nvs_op_count((<Nvs>nvs)._nvs) > nvs.repair_count else []


def nvs_erase(const uint8_t[::1] data, namespace, key=None, *, keys=None, bint purge=False):
    """The flash operations that erase a key, or a whole namespace; see `Nvs.erase`."""
    nvs = Nvs(data, keys, purge=purge)
    nvs.erase(namespace, key)
    return nvs.operations()


def nvs_apply(uint8_t[::1] partition, operations):
    """Carries operations out on a copy of the partition in memory, as flash would.

    Raises:
        ArgumentError: one does not fit into the partition.
        StateError: one would have to set bits without an erase: the copy is not what the operations were made for.
    """
    cdef ota_esp_nvs_op op
    cdef ota_error error
    cdef bytes data
    for kind, offset, raw in operations:
        data = bytes(raw)
        clear_error(&error)
        op.kind = OTA_ESP_NVS_ERASE if kind == "erase" else OTA_ESP_NVS_PROGRAM
        op.offset = offset
        op.len = len(data)
        op.data = <const uint8_t *><const char *>data
        check(ota_esp_nvs_apply(&partition[0] if partition.shape[0] > 0 else NULL, partition.shape[0], &op, &error), &error)
