"""What an application gives to a node and gets from it: the structs of the C API, and the handle of a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rmaker_ota.errors import ArgumentError, OtaError, StateError
from rmaker_ota.esp_err import EspErr, esp_err_name
from rmaker_ota.rainmaker.types import DiagState, OtaData
from rmaker_ota.records import dataclass

if TYPE_CHECKING:
    from rmaker_ota.rainmaker.node import Node


def raise_for(code: int, what: str) -> None:
    """Raises for an ``esp_err_t`` that is not OK.

    Raises:
        StateError, ArgumentError, OtaError: with ``esp_err``.
    """
    if code == EspErr.OK:
        return
    message = f"{what}: {esp_err_name(code)}"
    match code:
        case EspErr.INVALID_STATE:
            raise StateError(message, esp_err=code)
        case EspErr.INVALID_ARG:
            raise ArgumentError(message, esp_err=code)
    raise OtaError(message, esp_err=code)


@dataclass(frozen=True, slots=True)
class OtaDiagPriv:
    """``esp_rmaker_ota_diag_priv_t``. ``rmaker_ota``: the image under test was installed by this library."""

    state: DiagState
    rmaker_ota: bool


class OtaHandle:
    """``esp_rmaker_ota_handle_t``: the job a callback is called for. Valid while the node runs."""

    def __init__(self, node: Node, number: int) -> None:
        self._node = node
        self.number = number

    def report_status(self, status: int, info: str | None = None) -> None:
        """Reports a status of the job, and posts the matching event.

        Raises:
            OtaError: it was not published; ``esp_err`` says why.
        """
        raise_for(self._node.report_status(self, status, info), "report_status")

    def __repr__(self) -> str:
        return f"<OtaHandle {self.number}>"


OtaCallback = Callable[[OtaHandle, OtaData], object]
DiagCallback = Callable[[OtaDiagPriv, object], int]


@dataclass(frozen=True, slots=True)
class OtaConfig:
    """``esp_rmaker_ota_config_t``.

    Attributes:
        ota_cb: called with each job on the node's worker thread; None: the built-in handler. What it returns is
            ignored: it reports the status itself. What it raises is logged and reported as failed.
        ota_diag: asked whether a new image works, on the worker thread; None: it does. An exception counts as
            ``DiagStatus.FAIL``.
        server_cert: PEM text to trust for downloads where ``use_cert_bundle`` is off; None: ``[ota] server_cert`` of
            the configuration, else the default certificate.
        priv: handed to both callbacks.
    """

    ota_cb: OtaCallback | None = None
    ota_diag: DiagCallback | None = None
    server_cert: str | None = None
    priv: object = None
