"""One download attempt over MQTT: `StreamTransfer` on one side, an `Attempt` with its engine on the other.

The node's loop owns it: messages, timers and the connection come in there, and the transfer decides. A thread of its
own carries what the transfer hands out into the engine, since a slot may take its time and the loop may not wait; what
lies between the two is bounded by the transfer's backlog. The engine starts when the transfer is subscribed, so that
an attempt without a connection touches nothing.

Like an `Attempt` it ends with exactly one `AttemptFinished` or `AttemptFailed`, or with none when it is cancelled.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Protocol

from rmaker_ota.errors import CancelledError, OtaError
from rmaker_ota.rainmaker import streams
from rmaker_ota.rainmaker.attempt import (
    SECTOR,
    SOURCE_FAILED,
    Attempt,
    InstallationFactory,
    SourceFailure,
    make_installation,
)
from rmaker_ota.rainmaker.workflow import (
    AttemptCheckpoint,
    AttemptFailed,
    AttemptFinished,
    AttemptReceived,
    Input,
    Stage,
    StartAttempt,
)
from rmaker_ota.records import dataclass

if TYPE_CHECKING:
    from rmaker_ota import ota_core
    from rmaker_ota.config import OtaSection
    from rmaker_ota.install import Progress
    from rmaker_ota.rainmaker.transport import Transport
    from rmaker_ota.targets.base import Target

log = logging.getLogger(__name__)

CONNECTION_WAIT_S = 60.0  # specification, section 5.4
CONNECTION_POLL_S = 0.5  # the reference looks so often, and goes on at these moments
BACKLOG_BATCHES = 2  # between transfer and engine; one more would not be faster, one less waits for each other
MIN_PIPE = 64 << 10  # bytes between that thread and the engine


class LoopLike(Protocol):
    """What is needed of `rmaker_ota.rainmaker.loop.Loop`. An attempt counts as work begun elsewhere while its end is
    under way, not while it waits for the network."""

    def monotonic(self) -> float: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def start_timer(self, key: Hashable, seconds: float, item: object) -> None: ...

    def stop_timer(self, key: Hashable) -> bool: ...


@dataclass(frozen=True, slots=True)
class StreamInput:
    """For `StreamAttempt.handle`, on the loop: ``event`` None: it is time to look for the connection."""

    attempt: int
    event: streams.Input | None


def stream_options(options: OtaSection) -> streams.StreamOptions:
    """The options of a transfer as configured.

    Raises:
        ValueError: they do not go together; says which.
    """
    return streams.StreamOptions(
        mqtt_ota_block_size=options.mqtt_ota_block_size,
        mqtt_ota_blocks_per_request=options.mqtt_ota_blocks_per_request,
        mqtt_ota_max_retries=options.mqtt_ota_max_retries,
        mqtt_ota_block_wait_s=options.mqtt_ota_block_wait_s,
        window=options.mqtt_ota_window,
        flavour=streams.Flavour(options.mqtt_ota_flavour),
    )


class StreamAttempt:
    """One attempt. Its methods are called on the loop's thread, but for `cancel` and `progress`.

    Args:
        action: what to do; with a stream id.
        target: where to.
        options: of download and installation.
        node_id: whose stream it is.
        transport: to subscribe and publish.
        loop: whose timers are the transfer's; what they bring is a `StreamInput`.
        post: takes, on any thread, what the workflow is to hear, and `StreamInput`.
        make: makes the installation; None: the real one.

    Raises:
        ValueError: there can be no such stream; says why.
    """

    def __init__(
        self,
        action: StartAttempt,
        target: Target,
        options: OtaSection,
        post: Callable[[object], object],
        *,
        node_id: str,
        transport: Transport,
        loop: LoopLike,
        make: InstallationFactory | None = None,
    ) -> None:
        self._action = action
        self._target = target
        self._options = options
        self._post = post
        self._transport = transport
        self._loop = loop
        self._waits_since: float | None = None
        self._make = make
        self._lock = threading.Lock()
        self._over = False
        self._cancelled = False
        self._begun = False
        self._ending = False
        self._has_ended = False
        self._attempt: Attempt | None = None
        self._failure: SourceFailure | None = None
        self._subscribed: list[str] = []
        self._carried: queue.SimpleQueue[streams.Ready | OtaError | None] = queue.SimpleQueue()
        own = stream_options(options)
        self._transfer = streams.StreamTransfer(
            node_id, action.stream_id, action.size, own, backlog=BACKLOG_BATCHES * own.batch_size
        )
        self._batch_size = own.batch_size
        topics = self._transfer.topics
        self.topics = frozenset((topics.rejected, topics.data))
        # Received and not looked at: twice what was asked for, as text, so that a server that repeats is not a loss.
        self.most_bytes = 3 * own.window * own.batch_size + 2 * streams.MAX_MESSAGE

    @property
    def number(self) -> int:
        """The workflow's number of this attempt."""
        return self._action.attempt

    def start(self) -> None:
        """Begins, or waits for the connection (section 5.4, step 2)."""
        if self._transport.is_connected:
            self._begin()
        else:
            log.info("waiting for the MQTT connection")
            self._waits_since = self._loop.monotonic()
            self._look_in(CONNECTION_WAIT_S)

    def connected(self) -> None:
        if self._begun or self._over or self._waits_since is None:
            return
        rest = -self._waited_s() % CONNECTION_POLL_S
        if min(rest, CONNECTION_POLL_S - rest) < 1e-6:
            self._begin()
        else:  # one timer for the moment that counts, none for those before
            self._look_in(rest)

    def _waited_s(self) -> float:
        return 0.0 if self._waits_since is None else self._loop.monotonic() - self._waits_since

    def _look_in(self, seconds: float) -> None:
        self._loop.start_timer("stream", seconds, StreamInput(self.number, None))

    def _look(self) -> None:
        rest = CONNECTION_WAIT_S - self._waited_s()
        if self._transport.is_connected:
            self._begin()
        elif rest > 1e-6:  # it was there, and is gone again
            self._look_in(rest)
        else:
            self._fail_unstarted(SourceFailure(Stage.OFFLINE, "no MQTT connection"))

    def _begin(self) -> None:
        self._begun = True
        self._loop.stop_timer("stream")
        resume = self._action.resume
        self._feed(streams.Begin(0 if resume is None else resume.offset))
        if not self._over and self._failure is None:
            self._start_engine()

    def disconnected(self) -> None:
        self._feed(streams.Disconnected())

    def message(self, topic: str, payload: bytes) -> None:
        self._feed(streams.Message(topic, payload))

    def handle(self, item: StreamInput) -> None:
        """What was posted for it; that of another attempt is ignored."""
        if item.attempt != self.number or self._over:
            return
        if item.event is not None:
            self._feed(item.event)
        elif not self._begun:
            self._look()

    def decide(self, refusal: str | None) -> None:
        """Answers the header gate: None accepts."""
        if self._attempt is None:
            return
        self._attempt.decide(refusal)
        if refusal is None and self._action.size <= self._target.next_slot().size:  # else the engine says so
            self._feed(streams.Accepted())

    def before(self, event: object) -> None:
        """The workflow is about to hear this. A failed attempt gives back its subscriptions before it is reported."""
        if isinstance(event, AttemptFinished | AttemptFailed) and event.attempt == self.number:
            self.close()

    def after(self, event: object) -> None:
        """The workflow heard this. A complete file is reported before the subscriptions go, and verified after."""
        if isinstance(event, AttemptReceived) and event.attempt == self.number:
            self.close()

    def close(self) -> None:
        """Nothing more is to come: gives back subscriptions and timer."""
        if self._over:
            return
        self._feed(streams.Close())
        self._over = True
        self._loop.stop_timer("stream")
        self._carried.put(None)

    def cancel(self, timeout_s: float) -> bool:
        """Ends the attempt, which posts nothing any more. Any thread.

        Returns:
            Whether its threads have ended in the time given.
        """
        with self._lock:
            self._cancelled = True
            attempt = self._attempt
        for topic in list(self._subscribed):  # a session that is kept would go on to get blocks nobody wants
            self._transport.unsubscribe(topic)
        self._carried.put(None)
        if attempt is not None:
            return attempt.cancel(timeout_s)
        return True

    def progress(self) -> Progress | None:
        """Counters of the installation; None before it has begun. Any thread."""
        attempt = self._attempt
        return None if attempt is None else attempt.progress()

    # -- the transfer

    def _feed(self, event: streams.Input) -> None:
        pending = deque(self._transfer.handle(event))
        while pending and not self._over:
            answer = self._perform(pending.popleft())
            if answer is not None:
                pending.extendleft(reversed(self._transfer.handle(answer)))

    def _perform(self, action: streams.Action) -> streams.Input | None:
        match action:
            case streams.Subscribe(topic):
                return streams.SubscribeResult(topic, self._subscribe(topic))
            case streams.Unsubscribe(topic):
                self._unsubscribe(topic)
            case streams.Publish(topic, payload):
                return streams.PublishResult(self._publish(topic, payload))
            case streams.StartTimer(number, seconds):
                self._loop.start_timer("stream", seconds, StreamInput(self.number, streams.TimerFired(number)))
            case streams.StopTimer():
                self._loop.stop_timer("stream")
            case streams.Ready():
                self._carried.put(action)
            case streams.Complete():
                self._end_engine(None)
            case streams.Failed(stage, detail, rejection):
                self._fail(stage, detail, rejection)
            case streams.Checkpoint(offset):
                log.debug("%d bytes are here", offset)  # the engine tells when they are durable
        return None

    def _subscribe(self, topic: str) -> bool:
        try:
            self._transport.subscribe(topic)
        except OtaError as error:
            log.error("%s", error)
            return False
        self._subscribed.append(topic)
        return True

    def _unsubscribe(self, topic: str) -> None:
        self._transport.unsubscribe(topic)
        if topic in self._subscribed:
            self._subscribed.remove(topic)

    def _publish(self, topic: str, payload: bytes) -> bool:
        try:
            self._transport.publish(topic, payload)
        except OtaError as error:
            log.warning("blocks not asked for: %s", error)
            return False
        return True

    def _fail(self, stage: Stage, detail: str, rejection: streams.Rejection | None) -> None:
        log.warning("stream %s: %s", self._action.stream_id, detail)
        self._failure = SourceFailure(stage, str(rejection) if rejection else "")
        if self._attempt is None:
            self._fail_unstarted(self._failure)
        else:
            self._end_engine(OtaError(detail, status=SOURCE_FAILED, stage="source"))

    def _fail_unstarted(self, failure: SourceFailure) -> None:
        self._failure = failure
        if not self._cancelled:
            self._post(AttemptFailed(self.number, failure.stage, answered=False, said=failure.said))

    # -- the engine

    def _end_engine(self, error: OtaError | None) -> None:
        """Everything was handed out, or nothing more comes."""
        with self._lock:
            if not self._has_ended and not self._ending:
                self._ending = True
                self._loop.begin()
        self._carried.put(error)

    def _tell(self, event: Input) -> None:
        """Positions are kept at the end of batches alone (section 5.5), where those are whole sectors."""
        if isinstance(event, AttemptCheckpoint) and self._batch_size % SECTOR == 0:
            resume = self._action.resume
            if (event.point.offset - (0 if resume is None else resume.offset)) % self._batch_size != 0:
                return
        self._post(event)

    def _engine_ended(self) -> None:
        with self._lock:
            self._has_ended = True
            if self._ending:
                self._loop.end()

    def _start_engine(self) -> None:
        from rmaker_ota import ota_core  # loaded with the first job

        resume = self._action.resume
        size = self._action.size
        offset = resume.offset if resume is not None and 0 < resume.offset < size else 0
        source = ota_core.PushSource(size=size, capacity=max(MIN_PIPE, self._batch_size), offset=offset)
        attempt = Attempt(
            self._action,
            self._target,
            self._options,
            self._tell,
            make=self._make or self._make_installation(source),
            ended=self._engine_ended,
            source_failure=lambda: self._failure,
        )
        with self._lock:
            if self._cancelled:
                return
            self._attempt = attempt
        self._start_carrier(source)
        attempt.start()

    def _make_installation(self, source: ota_core.PushSource) -> InstallationFactory:
        return functools.partial(make_installation, source=source, batch_size=self._batch_size)

    def _start_carrier(self, source: ota_core.PushSource) -> None:
        threading.Thread(target=self._carry, args=(source,), name=f"rmaker-stream-{self.number}", daemon=True).start()

    def _carry(self, source: ota_core.PushSource) -> None:
        """The thread: bytes from the transfer into the engine."""
        try:
            while (item := self._carried.get()) is not None:
                if isinstance(item, OtaError):
                    source.fail(item)
                    return
                source.write(item.data)
                self._post(StreamInput(self.number, streams.Taken(item.offset + len(item.data))))
            source.end()
        except CancelledError:
            log.debug("the engine wants no more")
