"""One thread that owns a node's state: it takes what others leave for it, and wakes for timers.

Everything that happens to a node is an item: posted by another thread, or due at some moment. Items are handled one at
a time, in order, on the loop's thread. With nothing to do it sleeps until the next timer, or for ever.

The clock is given. With a `VirtualClock` time stands still until a test moves it, and moving it is exact: timers fire
in order, each at its own moment, and everything they cause is finished before the next one.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger(__name__)

SETTLE_TIMEOUT_S = 30.0


class Clock(Protocol):
    """Where time comes from. ``monotonic`` and ``unix`` in seconds."""

    def monotonic(self) -> float: ...

    def unix(self) -> float: ...

    def wait(self, changed: threading.Condition, until: float | None) -> None:
        """Waits, with the condition held, until it is notified or ``monotonic`` reaches a moment."""


class SystemClock:
    """The time of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    def wait(self, changed: threading.Condition, until: float | None) -> None:
        # Longer than Python can wait is as long as it can; the loop then looks at the clock again.
        changed.wait(None if until is None else min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))


class VirtualClock:
    """Time that moves only when `advance` says so.

    Args:
        unix: seconds since 1970 UTC at the start; ``monotonic`` starts at 0.
    """

    def __init__(self, unix: float = 1767225600.0) -> None:
        self._monotonic = 0.0
        self._offset = unix
        self._loops: list[Loop] = []

    def monotonic(self) -> float:
        return self._monotonic

    def unix(self) -> float:
        return self._offset + self._monotonic

    def set_unix(self, unix: float) -> None:
        """Sets the wall clock; ``monotonic`` does not jump."""
        self._offset = unix - self._monotonic

    def wait(self, changed: threading.Condition, until: float | None) -> None:
        changed.wait()

    def attach(self, loop: Loop) -> None:
        self._loops.append(loop)

    def advance(self, seconds: float) -> None:
        """Moves time on, and returns when everything due has been done.

        Raises:
            TimeoutError: something that was started does not come to an end.
        """
        target = self._monotonic + seconds
        while True:
            for loop in list(self._loops):
                loop.settle()
            due = min((each for loop in self._loops if (each := loop.next_due()) is not None), default=None)
            if due is None or due > target:
                self._monotonic = target
                return
            self._monotonic = max(self._monotonic, due)
            for loop in list(self._loops):
                loop.wake()


@dataclass(frozen=True)
class _Timer:
    number: int
    item: object
    repeat_s: float | None


class Loop:
    """Handles items on a thread of its own.

    Args:
        handle: called with each item, on the loop's thread; what it raises is logged.
        clock: whose time timers follow.
        name: of the thread.
    """

    def __init__(self, handle: Callable[[object], None], clock: Clock, name: str = "rmaker-node") -> None:
        self._handle = handle
        self._clock = clock
        self._changed = threading.Condition()
        self._inbox: deque[object] = deque()
        self._timers: dict[Hashable, _Timer] = {}
        self._heap: list[tuple[float, int, Hashable]] = []  # entries of stopped timers stay until they come up
        self._numbers = itertools.count()
        self._busy = 0  # items not handled yet, and work begun elsewhere with `begin`
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False
        if isinstance(clock, VirtualClock):
            clock.attach(self)

    # -- any thread

    def post(self, item: object) -> bool:
        """Leaves an item for the loop; False once it has stopped."""
        with self._changed:
            if self._stopping:
                return False
            if not self._started:
                self._started = True
                self._thread.start()
            self._inbox.append(item)
            self._busy += 1
            self._changed.notify_all()
            return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the loop after the item it is at; the others are dropped. Waits for that unless called by the loop."""
        with self._changed:
            self._stopping = True
            self._busy -= len(self._inbox)
            self._inbox.clear()
            self._timers.clear()
            self._changed.notify_all()
        if self._started and not self.is_current():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.error("the node's thread does not end: it waits for something")

    def is_current(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.current_thread() is self._thread

    def begin(self) -> None:
        """Something was started elsewhere whose end will be posted: `settle` waits for its `end`."""
        with self._changed:
            self._busy += 1

    def end(self) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def settle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Waits until there is nothing to do but to wait for time or for others.

        Raises:
            TimeoutError: it does not come to that.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._started and (self._busy > 0 or self._is_due()):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"node is still busy after {timeout_s} s")

    def next_due(self) -> float | None:
        """Moment of the next timer, in ``clock.monotonic`` seconds."""
        with self._changed:
            return self._next_due()

    def wake(self) -> None:
        """Makes the loop look at the clock again."""
        with self._changed:
            self._changed.notify_all()

    def monotonic(self) -> float:
        """Seconds of the clock that timers follow."""
        return self._clock.monotonic()

    def start_timer(self, key: Hashable, seconds: float, item: object, *, repeat: bool = False) -> None:
        """Handles an item in so many seconds; a running timer of that key is replaced."""
        with self._changed:
            timer = _Timer(next(self._numbers), item, seconds if repeat else None)
            self._timers[key] = timer
            heapq.heappush(self._heap, (self._clock.monotonic() + seconds, timer.number, key))
            self._changed.notify_all()

    def stop_timer(self, key: Hashable) -> bool:
        """Stops a timer; returns whether one ran."""
        with self._changed:
            return self._timers.pop(key, None) is not None

    # -- inner; the condition is held

    def _next_due(self) -> float | None:
        while self._heap:
            due, number, key = self._heap[0]
            timer = self._timers.get(key)
            if timer is not None and timer.number == number:
                return due
            heapq.heappop(self._heap)
        return None

    def _is_due(self) -> bool:
        due = self._next_due()
        return due is not None and due <= self._clock.monotonic()

    def _take_due(self) -> object:
        due, _, key = heapq.heappop(self._heap)
        timer = self._timers.pop(key)
        if timer.repeat_s is not None and timer.repeat_s > 0:
            self._timers[key] = timer
            heapq.heappush(self._heap, (due + timer.repeat_s, timer.number, key))
        self._busy += 1
        return timer.item

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._inbox and not self._is_due():
                    self._clock.wait(self._changed, self._next_due())
                if self._stopping:
                    return
                item = self._inbox.popleft() if self._inbox else self._take_due()
            try:
                self._handle(item)
            except Exception:
                log.exception("node: cannot handle %s", type(item).__name__)
            finally:
                self.end()
