"""Events of a node, for the application: numbers and data as in the firmware.

    with node.events.subscribe(lambda event: print(event.name, event.data)):
        ...

Callbacks run on a worker thread of their own, in the order of the events; what they raise is logged, and does not keep
other callbacks or later events from being delivered.
"""

from __future__ import annotations

import enum
import functools
import logging
import threading
from collections.abc import Callable
from types import TracebackType

from rmaker_ota.rainmaker.types import (
    COMMON_EVENT_BASE,
    OTA_EVENT_BASE,
    RMAKER_EVENT_BASE,
    CommonEvent,
    OtaEvent,
    RmakerEvent,
)
from rmaker_ota.rainmaker.worker import Worker
from rmaker_ota.records import dataclass

log = logging.getLogger(__name__)

_ENUMS: dict[str, type[enum.IntEnum]] = {
    OTA_EVENT_BASE: OtaEvent,
    COMMON_EVENT_BASE: CommonEvent,
    RMAKER_EVENT_BASE: RmakerEvent,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    ``base`` is a string such as ``"RMAKER_OTA_EVENT"``, ``id`` a member of that base's enum. ``data``: the report's
    text of an OTA event (None for STARTING and REQ_FOR_REBOOT), the seconds of REBOOT, the message number of
    MQTT_PUBLISHED, None otherwise.
    """

    base: str
    id: int
    data: str | int | None = None

    @property
    def name(self) -> str:
        """For people: ``"RMAKER_OTA_EVENT_STARTING"``."""
        kind = _ENUMS.get(self.base)
        try:
            return f"{self.base}_{self.id if kind is None else kind(self.id).name}"
        except ValueError:
            return f"{self.base}_{self.id}"


class Subscription:
    """Handle of `Events.subscribe`: ends it with `unsubscribe`, or with a ``with`` block."""

    def __init__(self, events: Events, callback: Callable[[Event], object], base: str | None) -> None:
        self._events = events
        self.callback = callback
        self.base = base

    def unsubscribe(self) -> None:
        """No further call is begun after this returns, unless it is made by the callback. Harmless when repeated."""
        self._events._remove(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unsubscribe()


class Events:
    """Delivers a node's events to whoever subscribed.

    Args:
        worker: runs the callbacks.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()

    def subscribe(self, callback: Callable[[Event], object], base: str | None = None) -> Subscription:
        """Calls a function with each event from now on.

        Args:
            callback: its return value is ignored.
            base: only events of that base; None: all.
        """
        subscription = Subscription(self, callback, base)
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def post(self, event: Event) -> None:
        """Hands an event on, without waiting."""
        log.debug("event %s %r", event.name, event.data)
        for subscription in self._subscriptions:
            if subscription.base not in (None, event.base):
                continue
            if not self._worker.submit(functools.partial(self._deliver, subscription, event)):
                log.error("event %s dropped: the callbacks are far behind, or the node ends", event.name)

    def _deliver(self, subscription: Subscription, event: Event) -> None:
        if subscription in self._subscriptions:
            subscription.callback(event)

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(each for each in self._subscriptions if each is not subscription)
