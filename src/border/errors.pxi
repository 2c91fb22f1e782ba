# Errors cross here, once: a status and its details become an exception of rmaker_ota.errors.

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memcpy, memset

from ota_c cimport *

from rmaker_ota import errors as _errors

cdef extern from *:
    const char *OTA_VERSION  # of the build: setup.py

VERSION = OTA_VERSION.decode("ascii")


def status_table():
    """The C table of statuses.

    Returns:
        list[tuple[str, int, int, str]]: name, number, esp_err_t, text of each status, in the order of the table.
    """
    cdef size_t count = 0
    cdef const ota_status_info *rows = ota_status_table(&count)
    return [
        (rows[i].name.decode("ascii"), rows[i].status, rows[i].esp_err, rows[i].text.decode("utf-8"))
        for i in range(count)
    ]


cdef object make_error(const ota_error *error):
    """The exception for a recorded error."""
    name = ota_status_name(error.status).decode("ascii")
    return _errors.error_class(name)(
        error.text.decode("utf-8", "replace"),
        status=name,
        esp_err=ota_status_esp_err(error.status),
        stage=ota_stage_name(error.stage).decode("ascii"),
        offset=error.offset,
        device_code=error.device_code,
    )


cdef int check(ota_status status, const ota_error *error) except -1:
    """Raises for an error status; every call into C that can fail goes through here."""
    if status < 0:
        raise make_error(error)
    return 0


cdef inline void clear_error(ota_error *error) noexcept nogil:
    memset(error, 0, sizeof(ota_error))
