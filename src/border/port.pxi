# The port room, as far as Python looks into it: what is behind the ttys.

from libc.errno cimport ENOENT as _ENOENT
from libc.stdlib cimport free as _free


cdef str _sysfs_text(const char *text):
    return (<bytes>text).decode("utf-8", "replace")


def list_ttys(sysfs_root="/sys"):
    """All ttys with a device behind them, sorted by name; opens none.

    Args:
        sysfs_root: another folder than ``/sys``, for tests.

    Returns:
        tuple[tuple[str, str, str, str, str, str, int, int, int], ...]: name, driver, USB plug, serial, manufacturer,
        product, USB vendor, product id, USB interface (-1: not on USB).

    Raises:
        DeviceError: sysfs cannot be read. Where there is none, there are no ttys.
    """
    cdef ota_tty_info *rows = NULL
    cdef size_t count = 0
    cdef ota_error error
    encoded = os.fsencode(sysfs_root)
    cdef const char *root = encoded
    cdef int errnum
    clear_error(&error)
    with nogil:
        errnum = ota_port_tty_list(root, &rows, &count)
    if errnum == _ENOENT:
        return ()
    if errnum != 0:
        check(ota_error_set_errno(&error, OTA_STAGE_TARGET, 0, errnum, root), &error)
    try:
        return tuple(
            (
                _sysfs_text(rows[i].name),
                _sysfs_text(rows[i].driver),
                _sysfs_text(rows[i].usb_path),
                _sysfs_text(rows[i].serial),
                _sysfs_text(rows[i].manufacturer),
                _sysfs_text(rows[i].product),
                rows[i].vid,
                rows[i].pid,
                rows[i].interface,
            )
            for i in range(count)
        )
    finally:
        _free(rows)
