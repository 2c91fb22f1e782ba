"""`Ota`: the OTA service of one node, with methods that raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmaker_ota.rainmaker.application import OtaConfig, OtaHandle, raise_for
from rmaker_ota.rainmaker.types import OtaData, OtaType

if TYPE_CHECKING:
    from rmaker_ota.rainmaker.node import Node


class Ota:
    """Switches OTA on for a node, and drives it. The same as the ``esp_rmaker_ota_*`` functions, for any node.

    Args:
        node: whose jobs are taken. With the Topics workflow it may be started already, or be started later.
        config: callbacks and certificate; None: the built-in handler, no diagnostics.
        type: where jobs come from.

    Raises:
        ArgumentError: no such type.
        OtaError: OTA is on already.
    """

    def __init__(self, node: Node, config: OtaConfig | None = None, type: int = OtaType.USING_TOPICS) -> None:
        self.node = node
        raise_for(node.enable(config, type), "enable")

    def fetch(self) -> None:
        """Asks the cloud for a job. An answer comes as a job; without one nothing comes.

        Raises:
            StateError: not connected; it is tried again by itself.
            OtaError: not sent; likewise.
        """
        raise_for(self.node.fetch(), "fetch")

    def fetch_with_delay(self, seconds: int) -> None:
        """Asks in so many seconds; 0: at once.

        Raises:
            ArgumentError: a negative number.
        """
        raise_for(self.node.fetch_with_delay(seconds), "fetch_with_delay")

    def report_status(self, status: int, info: str | None = None, handle: OtaHandle | None = None) -> None:
        """Reports a status of the job at hand, or of the last one, and posts the matching event.

        Args:
            status: an `OtaStatus`.
            info: a sentence for people.
            handle: as given to the callback; None: not inside one.

        Raises:
            StateError: there is no job to report for.
            OtaError: not published.
        """
        raise_for(self.node.report_status(handle or OtaHandle(self.node, 0), status, info), "report_status")

    def default_cb(self, handle: OtaHandle, data: OtaData) -> None:
        """The built-in handler: downloads, installs, arranges the restart. Returns when that is done.

        Raises:
            OtaError: failed, rejected or delayed; it has been reported already.
        """
        raise_for(self.node.default_callback(handle, data), "default_cb")

    def https_cb(self, handle: OtaHandle, data: OtaData) -> None:
        """The same over HTTPS, whatever ``ota_transport`` says."""
        raise_for(self.node.default_callback(handle, data, "https"), "https_cb")

    def mqtt_cb(self, handle: OtaHandle, data: OtaData) -> None:
        """The same over MQTT, whatever ``ota_transport`` says."""
        raise_for(self.node.default_callback(handle, data, "mqtt"), "mqtt_cb")

    def mark_valid(self) -> None:
        """Confirms the running image.

        Raises:
            StateError: there is nothing to confirm.
            OtaError: the target refused.
        """
        raise_for(self.node.mark_valid(), "mark_valid")

    def mark_invalid(self) -> None:
        """Refuses the running image and restarts the node into the one before.

        Raises:
            StateError: the running image is confirmed already.
            OtaError: there is no other image to run.
        """
        raise_for(self.node.mark_invalid(), "mark_invalid")
