"""An image over MQTT, AWS IoT file streams: messages both ways, and the transfer as a state machine (section 5).

No clock, no socket, no thread. What arrives is hostile: `parse_block` and `parse_request` take one map or object
within the limits below and raise nothing but `StreamMessageError`; `parse_rejection` never raises.

How a transfer is run
    `StreamTransfer.handle(input)` returns actions, performed in order. `Subscribe` and `Publish` are questions: the
    matching `SubscribeResult` or `PublishResult` is handed in before the next action is performed. ::

        Begin        -> Subscribe, Subscribe, Publish (block 0, 289 bytes), StartTimer     fresh start
        Message      -> StopTimer, Ready(0, header)                                        the header is here
        Accepted     -> Publish (first batches), StartTimer                                it may be installed
        Message ...  -> Ready(offset, data) ..., Checkpoint ..., Publish ...               in order, without gaps
        Taken        -> Publish ...                                                        room for more
                     -> Complete
        Close        -> Unsubscribe, Unsubscribe                                           at the end of every attempt

    A resumed transfer asks for no header, only waits for `Accepted`, and hands out bytes from the exact offset it was
    told. `Failed` drops what is left of the list its cause came from. After it and after `Complete` everything but
    `Close` is ignored, after `Close` everything.

Bytes handed out are those of the file, each exactly once and in order: a push source takes them as they come. The
header is read twice, as the reference does, and the second reading must agree with the first: what was checked is
what is written. Blocks that come early wait in a buffer of at most `StreamOptions.buffer_size` bytes. Whoever takes
longer over the bytes than the network says how much of them may lie about (``backlog``) and tells with `Taken` when
they are gone: no more batches are asked for meanwhile, and no time runs while none is.
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
import logging
import re
from collections.abc import Mapping

from rmaker_ota.rainmaker.workflow import MISSING_STREAM, Stage
from rmaker_ota.records import dataclass

logger = logging.getLogger("rmaker_ota.rainmaker.streams")

FILE_ID = 1  # the only file of a stream
HEADER_SIZE = 24 + 8 + 256  # image header, segment header, app descriptor
HEADER_REQUEST = HEADER_SIZE + 1  # what the reference asks for
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 256, 131_072
MAX_REQUEST_SIZE = 131_072  # bytes asked for at once
MAX_MESSAGE = 4 * MAX_BLOCK_SIZE // 3 + 4096  # bytes of a message that is looked at; base64 is the longer flavour
MAX_ITEMS = 256  # values in a message, nested ones and keys included
MAX_DEPTH = 8  # nested maps and arrays
MAX_BITMAP = 12_288  # bytes, exclusive: what AWS allows
MAX_TEXT = 200  # characters kept of what a server says

_UINT64 = range(2**64)
_NO_TEXT = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\uffff]")


class Flavour(enum.StrEnum):
    """How messages are written; also the last level of every topic."""

    CBOR = "cbor"
    JSON = "json"


class StreamMessageError(ValueError):
    """A message that is not what it should be; says why."""


@dataclass(frozen=True, slots=True)
class StreamTopics:
    """Topic names of one stream of one node.

    Raises:
        ValueError: an id is empty or would change the shape of a topic (``/``, ``+``, ``#``, NUL).
    """

    node_id: str
    stream_id: str
    flavour: Flavour = Flavour.CBOR

    def __post_init__(self) -> None:
        for name in ("node_id", "stream_id"):
            value = getattr(self, name)
            if not value or any(char in value for char in "/+#\0"):
                raise ValueError(f"{name} is {value!r}, expected one topic level")

    def _topic(self, suffix: str) -> str:
        return f"$aws/things/{self.node_id}/streams/{self.stream_id}/{suffix}/{self.flavour}"

    @property
    def get(self) -> str:
        return self._topic("get")

    @property
    def data(self) -> str:
        return self._topic("data")

    @property
    def rejected(self) -> str:
        return self._topic("rejected")

    @property
    def describe(self) -> str:
        return self._topic("describe")

    @property
    def description(self) -> str:
        return self._topic("description")


# ---- Messages ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """GetStream. ``offset`` and ``count`` in blocks; bit i of ``bitmap``, least significant first in each byte, is
    block ``offset`` + i; None: all of them."""

    block_size: int
    offset: int = 0
    count: int | None = 1
    bitmap: bytes | None = None
    file_id: int = FILE_ID
    version: int | None = None
    token: str | None = None

    def encode(self, flavour: Flavour = Flavour.CBOR) -> bytes:
        """The message; CBOR byte for byte as the reference writes it (keys in the order f, l, o, b, n)."""
        fields: dict[str, object] = {"f": self.file_id, "l": self.block_size, "o": self.offset}
        if self.bitmap is not None:
            fields["b"] = self.bitmap if flavour is Flavour.CBOR else "0x" + self.bitmap.hex()
        if self.count is not None:
            fields["n"] = self.count
        if self.version is not None:
            fields["s"] = self.version
        if self.token is not None:
            fields["c"] = self.token
        return encode_message(fields, flavour)


@dataclass(frozen=True, slots=True)
class Block:
    """A Data message: ``number`` counts blocks of the size asked for, ``size`` is what the server says of it."""

    file_id: int
    number: int
    size: int
    data: bytes

    def encode(self, flavour: Flavour = Flavour.CBOR, token: str | None = None) -> bytes:
        fields: dict[str, object] = {} if token is None else {"c": token}
        fields |= {"f": self.file_id, "l": self.size, "i": self.number}
        fields["p"] = self.data if flavour is Flavour.CBOR else base64.b64encode(self.data).decode("ascii")
        return encode_message(fields, flavour)


@dataclass(frozen=True, slots=True)
class Rejection:
    """What a server answers in place of blocks; either may be empty. Safe to be shown and reported."""

    code: str
    text: str

    def __bool__(self) -> bool:
        return bool(self.code or self.text)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.code, self.text) if part) or "no reason given"


def encode_message(fields: Mapping[str, object], flavour: Flavour) -> bytes:
    """One map or object, its keys in the order given."""
    if flavour is Flavour.JSON:
        return json.dumps(fields, separators=(",", ":")).encode("ascii")
    import cbor2

    return cbor2.dumps(dict(fields))


def _cbor_head(payload: bytes, at: int) -> tuple[int, int | None, int]:
    """Major type, argument (None: indefinite length) and where what follows begins."""
    first = payload[at]
    major, info = first >> 5, first & 31
    if info < 24:
        return major, info, at + 1
    if info < 28:
        end = at + 1 + (1 << (info - 24))
        if end > len(payload):
            raise StreamMessageError("cut off")
        return major, int.from_bytes(payload[at + 1 : end], "big"), end
    if info == 31 and major in (2, 3, 4, 5, 7):
        return major, None, at + 1
    raise StreamMessageError(f"no CBOR: 0x{first:02x} at {at}")


class _CborScan:
    """Finds where each value of a message ends without decoding anything; bounds number and depth of values."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._items = 0

    def head(self, at: int) -> tuple[int, int | None, int]:
        if at >= len(self._payload):
            raise StreamMessageError("cut off")
        self._items += 1
        if self._items > MAX_ITEMS:
            raise StreamMessageError(f"more than {MAX_ITEMS} values")
        return _cbor_head(self._payload, at)

    def is_break(self, at: int) -> bool:
        return self._payload[at : at + 1] == b"\xff"

    def skip(self, at: int, depth: int = 1) -> int:
        """Where the value that begins at ``at`` ends."""
        if depth > MAX_DEPTH:
            raise StreamMessageError(f"more than {MAX_DEPTH} levels")
        major, argument, at = self.head(at)
        if major in (2, 3):
            if argument is None:  # chunks, each of the same type and of definite length
                while not self.is_break(at):
                    chunk, length, at = self.head(at)
                    if chunk != major or length is None:
                        raise StreamMessageError("chunk of another type")
                    at = self._bytes(at, length)
                return at + 1
            return self._bytes(at, argument)
        if major in (4, 5):
            if argument is None:
                count = 0
                while not self.is_break(at):
                    at = self.skip(at, depth + 1)
                    count += 1
                if major == 5 and count % 2:
                    raise StreamMessageError("key without value")
                return at + 1
            for _ in range(argument * (major - 3)):  # ends at MAX_ITEMS or the end of the message
                at = self.skip(at, depth + 1)
            return at
        if major == 6:
            return self.skip(at, depth + 1)
        if major == 7 and argument is None:
            raise StreamMessageError("break without beginning")
        return at

    def _bytes(self, at: int, length: int) -> int:
        if length > len(self._payload) - at:
            raise StreamMessageError("cut off")
        return at + length


def _cbor_members(payload: bytes) -> dict[str, object]:
    """The members of a CBOR map whose values are integers, strings or byte strings; all others are passed over.

    Maps and strings of indefinite length are taken (RFC 8949, 3.2), tags and duplicate keys are not.
    """
    import cbor2

    scan = _CborScan(payload)
    major, count, at = scan.head(0)
    if major != 5:
        raise StreamMessageError("not a map")
    members: dict[str, object] = {}
    seen: set[str] = set()
    left = count
    try:
        while left != 0 if left is not None else not scan.is_break(at):
            end = scan.skip(at)
            key = cbor2.loads(payload[at:end]) if payload[at] >> 5 == 3 else None
            value_end = scan.skip(end)
            if isinstance(key, str):
                if key in seen:
                    raise StreamMessageError(f"key {key[:20]!r} twice")
                seen.add(key)
                if payload[end] >> 5 <= 3:
                    members[key] = cbor2.loads(payload[end:value_end])
            at = value_end
            if left is not None:
                left -= 1
    except cbor2.CBORDecodeError as error:
        raise StreamMessageError(f"no CBOR: {error}") from None
    if count is None:
        at += 1
    if at != len(payload):
        raise StreamMessageError("bytes behind the map")
    return members


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise StreamMessageError("a key twice")
    return members


def _no_number(text: str) -> object:
    raise StreamMessageError(f"{text[:20]} is no whole number")


def _whole_number(text: str) -> int:
    if len(text) > 20:
        raise StreamMessageError("a number of more than 20 digits")
    return int(text)


def _json_members(payload: bytes) -> dict[str, object]:
    try:
        text = payload.decode("utf-8")
        if text.count("[") + text.count("{") > MAX_DEPTH or text.count(",") > MAX_ITEMS:
            raise StreamMessageError("too many or too deep values")
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_number,
            parse_float=_no_number,
            parse_int=_whole_number,
        )
    except StreamMessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise StreamMessageError(f"no JSON: {str(error)[:MAX_TEXT]}") from None
    if not isinstance(value, dict):
        raise StreamMessageError("not an object")
    return value


def parse_members(payload: bytes, flavour: Flavour) -> dict[str, object]:
    """The members of a message, unchecked but bounded.

    Raises:
        StreamMessageError: too long, malformed, too deep, a key twice, or something behind it.
    """
    if len(payload) > MAX_MESSAGE:
        raise StreamMessageError(f"{len(payload)} bytes")
    return _cbor_members(payload) if flavour is Flavour.CBOR else _json_members(payload)


def _number(members: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = members.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value not in _UINT64:
        raise StreamMessageError(f"{key} is missing or no unsigned integer")
    return value


def parse_block(payload: bytes, flavour: Flavour = Flavour.CBOR) -> Block:
    """Reads a Data message.

    Raises:
        StreamMessageError: it is none.
    """
    members = parse_members(payload, flavour)
    data = members.get("p")
    if flavour is Flavour.JSON and isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise StreamMessageError("p is no base64") from None
    if not isinstance(data, bytes):
        raise StreamMessageError("p is missing or no byte string")
    return Block(_number(members, "f"), _number(members, "i"), _number(members, "l"), data)


def parse_request(payload: bytes, flavour: Flavour = Flavour.CBOR) -> BlockRequest:
    """Reads a GetStream message: its form, not whether its numbers are within a server's limits.

    Raises:
        StreamMessageError: it is none.
    """
    members = parse_members(payload, flavour)
    bitmap, token = members.get("b"), members.get("c")
    if flavour is Flavour.JSON and isinstance(bitmap, str):
        try:
            bitmap = bytes.fromhex(bitmap.removeprefix("0x"))
        except ValueError:
            raise StreamMessageError("b is no hexadecimal") from None
    if bitmap is not None and not isinstance(bitmap, bytes):
        raise StreamMessageError("b is no bitmap")
    if token is not None and (not isinstance(token, str) or len(token.encode("utf-8", "replace")) > 64):
        raise StreamMessageError("c is no text of at most 64 bytes")
    if "n" not in members and bitmap is None:
        raise StreamMessageError("neither n nor b")
    return BlockRequest(
        block_size=_number(members, "l"),
        offset=_number(members, "o", 0),
        count=_number(members, "n") if "n" in members else None,
        bitmap=bitmap,
        file_id=_number(members, "f"),
        version=_number(members, "s") if "s" in members else None,
        token=token,
    )


def parse_rejection(payload: bytes, flavour: Flavour = Flavour.CBOR) -> Rejection:
    """Reads an error message, in its present form (``o``, ``m``) or the older one (``code``, ``message``).

    JSON is taken in either flavour: who cannot read a request may not know in which one it was meant.
    """
    try:
        members = parse_members(payload, Flavour.JSON if payload[:1] == b"{" else flavour)
    except StreamMessageError as error:
        return Rejection("", f"unreadable message ({error})"[:MAX_TEXT])

    def text(*keys: str) -> str:
        for key in keys:
            value = members.get(key)
            if isinstance(value, str):
                return _NO_TEXT.sub("?", value[:MAX_TEXT])
        return ""

    return Rejection(text("o", "code"), text("m", "message"))


# ---- Settings of a transfer -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Options of section 7, by their names in the configuration file, and ``window``: batches asked for at once.

    With one batch, as the reference, a transfer costs a round trip for each batch; with more, requests stay in flight.

    Raises:
        ValueError: a number is outside its range; the message names option, value and range.
    """

    mqtt_ota_block_size: int = 4096  # bytes
    mqtt_ota_blocks_per_request: int = 16
    mqtt_ota_max_retries: int = 3  # time-outs in a row that are tolerated
    mqtt_ota_block_wait_s: int = 10
    window: int = 1
    flavour: Flavour = Flavour.CBOR

    def __post_init__(self) -> None:
        for name, (low, high) in STREAM_OPTION_RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} to {high}")
        if self.batch_size > MAX_REQUEST_SIZE:
            raise ValueError(
                f"mqtt_ota_block_size times mqtt_ota_blocks_per_request is {self.batch_size},"
                f" expected at most {MAX_REQUEST_SIZE}"
            )

    @property
    def batch_size(self) -> int:
        """Bytes of one batch."""
        return self.mqtt_ota_block_size * self.mqtt_ota_blocks_per_request

    @property
    def buffer_size(self) -> int:
        """Most bytes of blocks that are kept because an earlier one is missing."""
        return self.window * self.batch_size - self.mqtt_ota_block_size


# Bounds of the numbers, both included.
STREAM_OPTION_RANGES: dict[str, tuple[int, int]] = {
    "mqtt_ota_block_size": (MIN_BLOCK_SIZE, MAX_BLOCK_SIZE),
    "mqtt_ota_blocks_per_request": (1, 512),
    "mqtt_ota_max_retries": (1, 255),
    "mqtt_ota_block_wait_s": (5, 300),
    "window": (1, 16),
}


# ---- Inputs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Starts the transfer; the MQTT session is up. ``offset``: bytes of the file that are there already."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class SubscribeResult:
    """Answer to `Subscribe`."""

    topic: str
    accepted: bool


@dataclass(frozen=True, slots=True)
class PublishResult:
    """Answer to `Publish`; refused also when the publish budget is used up."""

    accepted: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """The header, of a resumed transfer the one on the slot, was looked at and the image may be installed."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes before ``offset`` that were handed out need no more memory."""

    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """A message on any topic; those of other topics are ignored."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The timer started under this number ran out; an older number is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The MQTT session is down."""


@dataclass(frozen=True, slots=True)
class Close:
    """The attempt is over, whichever way."""


Input = Begin | SubscribeResult | PublishResult | Accepted | Taken | Message | TimerFired | Disconnected | Close


# ---- Actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subscribe:
    """QoS 1. Answered with `SubscribeResult`."""

    topic: str


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    topic: str


@dataclass(frozen=True, slots=True)
class Publish:
    """QoS 1. Answered with `PublishResult`."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Starts the transfer's only timer, or starts it again; it fires once."""

    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StopTimer:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    """The next bytes of the file; ``offset`` is where the ones before ended."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All before ``offset`` (bytes) was handed out; worth keeping once it is durable. After every batch."""

    offset: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Complete:
    """Every byte of the file was handed out."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed; ``detail`` says why in words, ``rejection`` what the server said (Q41)."""

    stage: Stage
    detail: str
    rejection: Rejection | None = None


Action = Subscribe | Unsubscribe | Publish | StartTimer | StopTimer | Ready | Checkpoint | Complete | Failed


# ---- The machine ------------------------------------------------------------------------------------------------


class _State(enum.Enum):
    NEW = enum.auto()
    SUBSCRIBING = enum.auto()
    HEADER = enum.auto()  # asked for the header
    GATE = enum.auto()  # handed it out, nobody said yes or no yet
    BODY = enum.auto()
    OVER = enum.auto()  # Complete or Failed
    CLOSED = enum.auto()


class _Batch:
    """Blocks asked for together. ``answers``: how many repetitions of blocks that are here still restart the wait."""

    __slots__ = ("answers", "count", "missing", "offset")

    def __init__(self, offset: int, count: int) -> None:
        self.offset = offset
        self.count = count
        self.missing = set(range(offset, offset + count))
        self.answers = 0


class StreamTransfer:
    """One attempt to fetch one file. One thread at a time calls `handle`.

    Args:
        node_id, stream_id: of the stream.
        size: announced size of the file in bytes.
        backlog: bytes handed out and not `Taken` beyond which nothing more is asked for; None: no bound, no `Taken`.

    Raises:
        ValueError: the stream id or the size is missing or cannot be meant; the text is what to report.
    """

    def __init__(
        self,
        node_id: str,
        stream_id: str | None,
        size: int,
        options: StreamOptions | None = None,
        *,
        backlog: int | None = None,
    ) -> None:
        if not stream_id or size <= 0:
            raise ValueError(MISSING_STREAM)
        self._options = options or StreamOptions()
        self.topics = StreamTopics(node_id, stream_id, self._options.flavour)
        self._size = size
        self._block_size = self._options.mqtt_ota_block_size
        self._blocks = -(-size // self._block_size)
        self._state = _State.NEW
        self._header = b""
        self._backlog = backlog
        self._offset = 0  # bytes handed out
        self._taken = 0  # of those
        self._next = 0  # the block that is handed out next
        self._phase = 0  # batches begin at blocks with this remainder
        self._request = 0  # the first block that was not asked for yet
        self._batches: list[_Batch] = []  # in order; the first one is never empty
        self._early: dict[int, bytes] = {}
        self._buffered = 0
        self._timeouts = 0  # in a row
        self._timer = 0
        self._subscribed = False
        self._misfit: str | None = None  # a block of a length its place cannot have

    @property
    def buffered(self) -> int:
        """Bytes of blocks that wait for an earlier one; at most `StreamOptions.buffer_size`."""
        return self._buffered

    @property
    def offset(self) -> int:
        """Bytes of the file handed out so far, what was there at the beginning included."""
        return self._offset

    def handle(self, event: Input) -> list[Action]:
        """One input; what is to be done now, in this order."""
        state = self._state
        if state is _State.CLOSED:
            return []
        match event:
            case Close():
                return self._close()
            case Begin() if state is _State.NEW:
                return self._begin(event.offset)
            case SubscribeResult() if state is _State.SUBSCRIBING:
                return self._subscribe_result(event)
            case Accepted() if state is _State.GATE:
                self._state = _State.BODY
                return self._go_on([])
            case Taken():
                return self._on_taken(event.offset)
            case Message() if state in (_State.HEADER, _State.GATE, _State.BODY):
                return self._message(event)
            case TimerFired() if event.number == self._timer and state in (_State.HEADER, _State.BODY):
                return self._timed_out()
            case PublishResult() if not event.accepted and state in (_State.HEADER, _State.BODY):
                return self._fail(self._stage(), "a block request could not be published")
            case Disconnected() if state not in (_State.NEW, _State.OVER):
                return self._fail(self._stage(), "MQTT connection lost")
        return []

    def _stage(self) -> Stage:
        return {_State.SUBSCRIBING: Stage.BEGIN, _State.HEADER: Stage.DESCRIPTION}.get(self._state, Stage.TRANSFER)

    # -- beginning and end

    def _begin(self, offset: int) -> list[Action]:
        if 0 < offset < self._size:  # anything else starts afresh, header included (Q39)
            self._offset = self._taken = offset
            self._next = self._request = offset // self._block_size
            self._phase = self._next % self._options.mqtt_ota_blocks_per_request
        self._state = _State.SUBSCRIBING
        return [Subscribe(self.topics.rejected), Subscribe(self.topics.data)]

    def _subscribe_result(self, event: SubscribeResult) -> list[Action]:
        if event.topic != self.topics.data:  # without the other one a rejection shows as a time-out
            return []
        if not event.accepted:
            return self._fail(Stage.BEGIN, "subscription to the data topic refused")
        self._subscribed = True
        if self._offset > 0:
            self._state = _State.GATE
            return []
        self._state = _State.HEADER
        return [self._publish(BlockRequest(HEADER_REQUEST)), self._start_timer()]

    def _close(self) -> list[Action]:
        actions: list[Action] = []
        if self._state in (_State.HEADER, _State.BODY):
            actions.append(StopTimer())
        if self._subscribed:  # as the reference: an attempt that could not begin leaves its other subscription
            actions += [Unsubscribe(self.topics.rejected), Unsubscribe(self.topics.data)]
        self._end(_State.CLOSED)
        return actions

    def _end(self, state: _State) -> None:
        self._state = state
        self._batches.clear()
        self._early.clear()
        self._buffered = 0

    def _fail(self, stage: Stage, detail: str, rejection: Rejection | None = None) -> list[Action]:
        self._end(_State.OVER)
        return [StopTimer(), Failed(stage, detail, rejection)]

    # -- asking

    def _start_timer(self) -> StartTimer:
        self._timer += 1
        return StartTimer(self._timer, self._options.mqtt_ota_block_wait_s)

    def _publish(self, request: BlockRequest) -> Publish:
        return Publish(self.topics.get, request.encode(self._options.flavour))

    def _ask(self, batch: _Batch) -> Publish:
        """Asks for what is missing of a batch."""
        bits = bytearray(-(-batch.count // 8))
        for number in batch.missing:
            at = number - batch.offset
            bits[at >> 3] |= 1 << (at & 7)
        batch.answers = len(batch.missing)
        return self._publish(BlockRequest(self._block_size, batch.offset, batch.count, bytes(bits)))

    def _ask_again(self) -> list[Action]:
        """One more round for every batch that waits; the attempt fails when there were too many without a block."""
        self._timeouts += 1
        if self._timeouts > self._options.mqtt_ota_max_retries:
            if self._misfit is not None:  # the file ended early: what is behind its end cannot come (Q26)
                return self._fail(Stage.INCOMPLETE, self._misfit)
            return self._fail(Stage.TRANSFER, f"no block came in {self._timeouts} rounds")
        return [*(self._ask(batch) for batch in self._batches if batch.missing), self._start_timer()]

    def _go_on(self, actions: list[Action]) -> list[Action]:
        """Asks for as many batches as the window holds; ends the transfer when nothing is left to ask for."""
        per_request = self._options.mqtt_ota_blocks_per_request
        limit = (self._batches[0].offset if self._batches else self._request) + self._options.window * per_request
        while self._request + per_request <= limit and self._may_ask():
            count = min(per_request, self._blocks - self._request)  # the first batch as well (Q33)
            batch = _Batch(self._request, count)
            self._batches.append(batch)
            self._request += count
            actions.append(self._ask(batch))
        if self._batches:
            return [*actions, self._start_timer()]
        if self._misfit is not None:
            return [*actions, *self._fail(Stage.INCOMPLETE, self._misfit)]
        if self._request < self._blocks:
            return [*actions, StopTimer()]  # until more is taken
        self._end(_State.OVER)
        return [*actions, StopTimer(), Complete()]

    def _may_ask(self) -> bool:
        is_behind = self._backlog is not None and self._offset - self._taken > self._backlog
        return self._request < self._blocks and self._misfit is None and not is_behind

    def _on_taken(self, offset: int) -> list[Action]:
        before, self._taken = self._may_ask(), max(self._taken, min(offset, self._offset))
        if self._state is _State.BODY and not before and self._may_ask():
            return self._go_on([])
        return []

    def _timed_out(self) -> list[Action]:
        if self._state is _State.HEADER:
            return self._fail(Stage.DESCRIPTION, "the header did not come")
        return self._ask_again()

    # -- answers

    def _message(self, event: Message) -> list[Action]:
        if event.topic == self.topics.rejected:
            rejection = parse_rejection(event.payload, self._options.flavour)
            logger.warning("stream %s rejected: %s", self.topics.stream_id, rejection)
            return self._fail(self._stage(), str(rejection), rejection)
        if event.topic != self.topics.data or self._state is _State.GATE:
            return []
        try:
            block = parse_block(event.payload, self._options.flavour)
        except StreamMessageError as error:
            logger.info("stream %s: message ignored: %s", self.topics.stream_id, error)
            return []
        return self._header_block(block) if self._state is _State.HEADER else self._body_block(block)

    def _header_block(self, block: Block) -> list[Action]:
        if block.number != 0 or len(block.data) > max(self._block_size, HEADER_REQUEST):  # Q45
            return []
        header = block.data[: min(HEADER_REQUEST, self._size)]
        if len(header) < min(HEADER_SIZE, self._size):
            return self._fail(Stage.DESCRIPTION, f"the header has {len(header)} bytes only")
        self._header = header
        self._offset = len(header)
        self._state = _State.GATE
        return [StopTimer(), Ready(0, header)]

    def _body_block(self, block: Block) -> list[Action]:
        number, data = block.number, block.data
        batch = next((b for b in self._batches if b.offset <= number < b.offset + b.count), None)
        if batch is None or len(data) > self._block_size:
            return []
        if number not in batch.missing:  # here already, yet an answer
            if not batch.missing or batch.answers == 0:
                return []
            batch.answers -= 1  # so that repetitions cannot put off the time-out for ever
            return [self._start_timer()]
        expected = min(self._block_size, self._size - number * self._block_size)
        if number == 0 and len(data) < expected and (data == self._header or block.size == HEADER_REQUEST):
            return []  # the answer to the header request once more
        if number == 0 and self._header and data[: len(self._header)] != self._header[: len(data)]:
            return self._fail(Stage.TRANSFER, "block 0 is not the one whose header was checked")
        batch.missing.remove(number)
        self._timeouts = 0
        if len(data) != expected:
            self._misfit = self._misfit or f"block {number} has {len(data)} bytes, expected {expected}"
        actions: list[Action] = []
        if self._misfit is None:
            self._early[number] = data
            self._buffered += len(data)
            self._hand_out(actions)
        while self._batches and not self._batches[0].missing:
            self._batches.pop(0)
        if batch.missing:
            return [*actions, self._start_timer()]
        return self._go_on(actions)

    def _hand_out(self, actions: list[Action]) -> None:
        while (data := self._early.pop(self._next, None)) is not None:
            start = self._next * self._block_size
            self._buffered -= len(data)
            self._next += 1
            if start < self._offset:  # header, or the part of a block a resumed transfer has
                data = data[self._offset - start :]
            if data:
                actions.append(Ready(self._offset, data))
                self._offset += len(data)
            if self._next % self._options.mqtt_ota_blocks_per_request == self._phase or self._next == self._blocks:
                actions.append(Checkpoint(self._offset, self._block_size))
