"""Twin of a service for file streams over MQTT, in virtual time: it answers a request as the trace says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rmaker_ota.rainmaker.streams import Block, BlockRequest, Flavour, encode_message, parse_request

Json = dict[str, Any]

GAP_S = 0.05  # between blocks, and before the first one


@dataclass(frozen=True)
class Delivery:
    """Something that reaches the node ``after`` so many seconds: a message on ``data`` or ``rejected``, the end of the
    connection (``back`` seconds without one), or of the power."""

    after: float
    kind: str  # "data", "rejected", "disconnect", "power"
    payload: bytes = b""
    back: float | None = None


class StreamServer:
    """Args:
    inputs: of the trace; its ``stream_server``.
    contents: the file of an image.
    """

    def __init__(self, inputs: Json, contents: Callable[[str], bytes]) -> None:
        server = inputs.get("stream_server") or {}
        self.image = server.get("image", "new")
        self._rules = [dict(rule) for rule in server.get("rules") or []]
        self._contents = contents
        self._requests = 0

    def answer(self, payload: bytes) -> list[Delivery]:
        request = parse_request(payload, Flavour.CBOR)
        self._requests += 1
        do = self._behaviour(request)
        if do.get("silent"):
            return []
        if "reject" in do:
            return [Delivery(GAP_S, "rejected", str(do["reject"]).encode())]
        gap = do.get("gap_ms", GAP_S * 1000) / 1000
        together = do.get("together", 1)
        numbers = self._numbers(request, do)
        sent = [
            Delivery(gap * (index // together + 1), "data", self._message(request, number, do))
            for index, number in enumerate(numbers)
        ]
        for key, kind in (("disconnect_after", "disconnect"), ("power_loss_after", "power")):
            if key in do:
                count = do[key]
                sent = [*sent[:count], Delivery(gap * (count // together + 1), kind, back=do.get("reconnect_in"))]
        return sent

    def _behaviour(self, request: BlockRequest) -> Json:
        for rule in self._rules:
            when = rule.get("when", {})
            fits = (
                when.get("header", request.bitmap is None) is (request.bitmap is None)
                and ("offset" not in when or (request.bitmap is not None and when["offset"] == request.offset))
                and when.get("nth", self._requests) == self._requests
            )
            if fits and rule.get("count", 1) > 0:
                if "count" in rule:
                    rule["count"] -= 1
                do: Json = rule["do"]
                return do
        return {}

    def _numbers(self, request: BlockRequest, do: Json) -> list[int]:
        """The blocks to send: those asked for that are there, in rising order unless something else is said."""
        blocks = -(-len(self._contents(self.image)) // request.block_size)
        count = request.count or 0
        bits = -1 if request.bitmap is None else int.from_bytes(request.bitmap, "little")
        numbers = [request.offset + i for i in range(count) if bits >> i & 1 and request.offset + i < blocks]
        if "order" in do:
            numbers = [
                *(number for number in do["order"] if number in numbers),
                *(number for number in numbers if number not in do["order"]),
            ]
        if do.get("reverse"):
            numbers.reverse()
        numbers = [number for number in numbers if number not in do.get("drop", [])]
        numbers = [each for number in numbers for each in [number] * (1 + (number in do.get("duplicate", [])))]
        return [*numbers, *do.get("also", [])]

    def _message(self, request: BlockRequest, number: int, do: Json) -> bytes:
        size = request.block_size
        data = self._contents(self.image)[number * size : (number + 1) * size]
        bad = do.get("bad", {})
        kind = bad.get("kind") if bad.get("block") == number else None
        match kind:
            case None:
                return Block(1, number, size, data).encode()
            case "short":
                return Block(1, number, size, data[: len(data) // 2]).encode()
            case "long":
                return Block(1, number, size, data + bytes(16)).encode()
            case "corrupt":
                return Block(1, number, size, bytes([data[0] ^ 0xFF]) + data[1:]).encode()
            case "wrong_file_id":
                return Block(2, number, size, data).encode()
            case "not_a_map":
                return b"\x84" + Block(1, number, size, data).encode()[1:]
            case "truncated":
                return Block(1, number, size, data).encode()[: len(data) // 2]
            case "text_payload":
                return encode_message({"f": 1, "i": number, "l": size, "p": "x" * len(data)}, Flavour.CBOR)
        raise ValueError(f"kind of damage {kind}")
