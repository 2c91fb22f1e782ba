"""Images over MQTT: answers block requests of nodes as AWS IoT file streams do (protocol specification, section 5).

A stream is an image of an open job of the node that asks: a node reads nothing else, and nothing once its job is
finished. Who a node is, the topic says; that a client publishes under its own name only is the broker's business.

`StreamServer.handle` is given a message and yields the answers one by one, so that one block is in memory at a time.
It keeps no state between messages: any request may be repeated, lost or reordered.

Where AWS leaves a choice: with a bitmap and a number, at most that many of the blocks in the bitmap are sent; blocks
behind the end of the file are left out; what is beyond `MAX_DELIVERY` bytes is not sent and has to be asked for again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from rmaker_ota.cloud.images import ImageStore, stream_id
from rmaker_ota.cloud.jobs import printable
from rmaker_ota.cloud.store import Image, Store
from rmaker_ota.rainmaker.streams import (
    FILE_ID,
    MAX_BITMAP,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    Block,
    BlockRequest,
    Flavour,
    StreamMessageError,
    encode_message,
    parse_members,
    parse_request,
)

logger = logging.getLogger("rmaker_ota.cloud.streams")

STREAM_VERSION = 1  # an image never changes
MAX_OFFSET = 98_304  # blocks; also the most blocks of one request
MAX_DELIVERY = 128 * 1024  # bytes of blocks sent for one request
MAX_REQUEST = 32 * 1024  # bytes of a request that is looked at: a bitmap as hexadecimal digits, and some more

Answer = tuple[str, bytes]  # topic, payload


class StreamError(Exception):
    """A request that is answered with an error; ``code`` is one of AWS's."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def parse_topic(topic: str) -> tuple[str, str, str, Flavour] | None:
    """Node id, stream id, ``get`` or ``describe``, and flavour of a topic nodes ask on; None for any other."""
    levels = topic.split("/")
    if len(levels) != 7 or levels[:2] != ["$aws", "things"] or levels[3] != "streams":
        return None
    if not levels[2] or levels[5] not in ("get", "describe") or levels[6] not in list(Flavour):
        return None
    return levels[2], levels[4], levels[5], Flavour(levels[6])


def check_request(request: BlockRequest, size: int) -> list[int]:
    """The numbers of the blocks to send, rising, all inside a file of ``size`` bytes.

    Raises:
        StreamError: a number is outside the limits of the service.
    """
    if not MIN_BLOCK_SIZE <= request.block_size <= MAX_BLOCK_SIZE:
        raise StreamError("BlockSizeOutOfBounds", f"block size {request.block_size}")
    blocks = -(-size // request.block_size)
    if request.offset > MAX_OFFSET or request.offset >= blocks:
        raise StreamError("OffsetOutOfBounds", f"offset {request.offset} of {blocks} blocks")
    if request.count is not None and not 1 <= request.count <= MAX_OFFSET:
        raise StreamError("BlockCountLimitExceeded", f"{request.count} blocks")
    if request.bitmap is not None and len(request.bitmap) >= MAX_BITMAP:
        raise StreamError("BlockBitmapLimitExceeded", f"bitmap of {len(request.bitmap)} bytes")
    most = MAX_DELIVERY // request.block_size
    if request.count is not None:
        most = min(most, request.count)
    numbers: list[int] = []
    bits = -1 if request.bitmap is None else int.from_bytes(request.bitmap, "little")
    number = request.offset
    while bits and number < blocks and len(numbers) < most:
        skip = (bits & -bits).bit_length() - 1  # to the next block that is wanted
        number += skip
        if number < blocks:
            numbers.append(number)
        bits >>= skip + 1
        number += 1
    return numbers


class StreamServer:
    """Answers requests for blocks and descriptions of streams. May be used from any thread.

    Args:
        store: whose jobs are open.
        images: the files.
    """

    def __init__(self, store: Store, images: ImageStore) -> None:
        self._store = store
        self._images = images

    def handle(self, topic: str, payload: bytes) -> Iterator[Answer]:
        """The answers to a message; none when the topic is not one nodes ask on. Raises nothing over the message."""
        parsed = parse_topic(topic)
        if parsed is None:
            return
        node, stream, verb, flavour = parsed
        base = f"$aws/things/{node}/streams/{stream}"
        token: str | None = None
        try:
            if len(payload) > MAX_REQUEST:
                raise StreamError("InvalidRequest", f"{len(payload)} bytes, at most {MAX_REQUEST} are read")
            try:
                members = parse_members(payload, flavour)
            except StreamMessageError as error:
                raise StreamError("InvalidCbor" if flavour is Flavour.CBOR else "InvalidJson", str(error)) from None
            if isinstance(found := members.get("c"), str) and len(found.encode("utf-8", "replace")) <= 64:
                token = found.encode("utf-8", "replace").decode("utf-8")
            if verb == "describe":
                yield f"{base}/description/{flavour}", self._describe(node, stream, token, flavour)
                return
            try:
                request = parse_request(payload, flavour)
            except StreamMessageError as error:
                raise StreamError("InvalidRequest", str(error)) from None
            for block in self._blocks(self._find(node, stream), request):
                yield f"{base}/data/{flavour}", block.encode(flavour, token)
        except StreamError as error:
            logger.info("stream request of node %s rejected: %s: %s", printable(node), error.code, error)
            fields = {"o": error.code, "m": printable(str(error), 200)}
            if token is not None:
                fields["c"] = token
            yield f"{base}/rejected/{flavour}", encode_message(fields, flavour)

    def _find(self, node: str, stream: str) -> Image:
        for job, _ in self._store.open_jobs(node):
            if stream_id(job.image) == stream:
                return self._images.require(job.image)
        raise StreamError("ResourceNotFound", "no such stream for this node")

    def _describe(self, node: str, stream: str, token: str | None, flavour: Flavour) -> bytes:
        image = self._find(node, stream)
        fields: dict[str, object] = {} if token is None else {"c": token}
        fields |= {"s": STREAM_VERSION, "d": image.name, "r": [{"f": FILE_ID, "z": image.size}]}
        return encode_message(fields, flavour)

    def _blocks(self, image: Image, request: BlockRequest) -> Iterator[Block]:
        if request.file_id != FILE_ID:
            raise StreamError("ResourceNotFound", f"no file {request.file_id} in this stream")
        if request.version not in (None, STREAM_VERSION):
            raise StreamError("VersionMismatch", f"the stream has version {STREAM_VERSION}")
        numbers = check_request(request, image.size)
        size = request.block_size
        try:
            with self._images.path(image.sha256).open("rb", buffering=0) as file:
                for number in numbers:
                    data = os.pread(file.fileno(), size, number * size)
                    if len(data) != min(size, image.size - number * size):
                        raise StreamError("InternalError", "the image cannot be read")
                    yield Block(FILE_ID, number, size, data)
        except OSError as error:
            logger.error("image %s cannot be read: %s", image.sha256, error)
            raise StreamError("InternalError", "the image cannot be read") from None
