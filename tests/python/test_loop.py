"""The node's loop with its timers, and the worker of callbacks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rmaker_ota.rainmaker.events import Event, Events
from rmaker_ota.rainmaker.loop import Loop, SystemClock, VirtualClock
from rmaker_ota.rainmaker.worker import CAPACITY, Worker

WAIT_S = 10.0


class Recorder:
    """A loop whose items are kept with the moment they were handled at."""

    def __init__(self) -> None:
        self.clock = VirtualClock(unix=1000.0)
        self.seen: list[tuple[float, object]] = []
        self.loop = Loop(self.handle, self.clock)

    def handle(self, item: object) -> None:
        if isinstance(item, Exception):
            raise item
        self.seen.append((self.clock.monotonic(), item))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.loop.stop()


def test_items_are_handled_in_order_and_a_failing_one_stops_nothing(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    for item in (1, ZeroDivisionError("in a handler"), 2):
        assert recorder.loop.post(item)
    recorder.loop.settle()
    assert recorder.seen == [(0.0, 1), (0.0, 2)]
    assert "in a handler" in caplog.text


def test_timers_fire_in_order_each_at_its_own_moment(recorder: Recorder) -> None:
    recorder.loop.post("start")
    recorder.loop.start_timer("b", 20.0, "b")
    recorder.loop.start_timer("a", 10.0, "a")
    recorder.loop.start_timer("tick", 7.5, "tick", repeat=True)
    recorder.loop.start_timer("never", 5.0, "never")
    assert recorder.loop.stop_timer("never")
    assert not recorder.loop.stop_timer("never")
    recorder.loop.start_timer("b", 12.0, "b again")
    recorder.clock.advance(23.0)
    assert recorder.seen == [
        (0.0, "start"),
        (7.5, "tick"),
        (10.0, "a"),
        (12.0, "b again"),
        (15.0, "tick"),
        (22.5, "tick"),
    ]
    assert recorder.clock.monotonic() == 23.0
    assert recorder.clock.unix() == 1023.0


def test_a_timer_that_is_due_at_once_fires_without_time_passing(recorder: Recorder) -> None:
    recorder.loop.post("start")
    recorder.loop.start_timer("now", 0.0, "now")
    recorder.clock.advance(0.0)
    assert recorder.seen == [(0.0, "start"), (0.0, "now")]


def test_the_wall_clock_may_jump(recorder: Recorder) -> None:
    recorder.clock.set_unix(5e9)
    recorder.clock.advance(1.0)
    assert recorder.clock.unix() == 5e9 + 1
    assert recorder.clock.monotonic() == 1.0


def test_a_stopped_loop_takes_nothing_and_fires_nothing(recorder: Recorder) -> None:
    recorder.loop.post("start")
    recorder.loop.start_timer("later", 1.0, "later")
    recorder.loop.settle()
    recorder.loop.stop()
    assert not recorder.loop.post("more")
    recorder.clock.advance(10.0)
    assert recorder.seen == [(0.0, "start")]


def test_settling_does_not_wait_for_ever(recorder: Recorder) -> None:
    recorder.loop.post("start")
    recorder.loop.begin()
    with pytest.raises(TimeoutError, match="still busy"):
        recorder.loop.settle(0.01)
    recorder.loop.end()
    recorder.loop.settle()


def test_the_clock_of_the_machine_fires_timers_too() -> None:
    fired = threading.Event()
    loop = Loop(lambda item: fired.set() if item == "due" else None, SystemClock())
    loop.post("start")
    loop.start_timer("t", 0.01, "due")
    assert fired.wait(WAIT_S)
    loop.stop()


def test_a_worker_holds_so_many_and_no_more() -> None:
    worker = Worker("w")
    running, gate = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        running.set()
        gate.wait(WAIT_S)

    assert worker.submit(first)
    assert running.wait(WAIT_S)
    assert all(worker.submit(lambda number=number: done.append(number)) for number in range(CAPACITY))  # type: ignore[misc]
    assert not worker.submit(lambda: done.append(99))
    finished = threading.Event()
    assert worker.submit(finished.set, always=True)
    gate.set()
    assert finished.wait(WAIT_S)
    assert done == list(range(CAPACITY))
    assert worker.stop(WAIT_S)
    assert not worker.submit(finished.set)


def test_a_worker_that_is_stopped_drops_what_waits() -> None:
    begun: list[None] = []
    ended: list[None] = []
    worker = Worker("w", begin=lambda: begun.append(None), end=lambda: ended.append(None))
    running, gate = threading.Event(), threading.Event()

    def first() -> None:
        running.set()
        gate.wait(WAIT_S)

    worker.submit(first)
    worker.submit(gate.clear)
    assert running.wait(WAIT_S)
    assert not worker.stop(0.01)
    gate.set()
    assert worker.stop(WAIT_S)
    assert gate.is_set()
    assert len(begun) == len(ended) == 2


def test_events_behind_a_callback_that_does_not_return_are_dropped_aloud(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker("events", capacity=2)
    events = Events(worker)
    running, gate = threading.Event(), threading.Event()
    seen: list[int] = []

    def callback(event: Event) -> None:
        running.set()
        gate.wait(WAIT_S)
        seen.append(event.id)

    events.subscribe(callback)
    events.post(Event("RMAKER_OTA_EVENT", 0))
    assert running.wait(WAIT_S)
    for number in (1, 2, 3):
        events.post(Event("RMAKER_OTA_EVENT", number))
    assert "RMAKER_OTA_EVENT_SUCCESSFUL dropped" in caplog.text
    drained = threading.Event()
    worker.submit(drained.set, always=True)
    gate.set()
    assert drained.wait(WAIT_S)
    assert seen == [0, 1, 2]
    worker.stop(WAIT_S)


def test_events_of_unknown_kinds_have_names_too() -> None:
    assert Event("RMAKER_OTA_EVENT", 1).name == "RMAKER_OTA_EVENT_STARTING"
    assert Event("RMAKER_OTA_EVENT", 77).name == "RMAKER_OTA_EVENT_77"
    assert Event("MINE", 3).name == "MINE_3"


def test_a_timer_longer_than_python_can_wait_stops_nothing() -> None:
    seen: list[object] = []
    handled = threading.Event()

    def handle(item: object) -> None:
        seen.append(item)
        handled.set()

    loop = Loop(handle, SystemClock())
    try:
        loop.start_timer("year 33658", 10**12, "late")
        for item in ("first", "second"):  # the loop waits for the timer in between
            handled.clear()
            loop.post(item)
            assert handled.wait(WAIT_S)
        loop.settle()
        assert seen == ["first", "second"]
    finally:
        loop.stop()
