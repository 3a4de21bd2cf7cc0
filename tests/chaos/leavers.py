"""Clients that leave: what each of them does is drawn from the seed and its number, and what it heard is kept.

They speak over bare sockets, on every endpoint that generates, and go at any moment there is: within the head or the
body of their request, right behind it, while they wait, at the first byte, in the middle of the answer; with a FIN, a
RST or by closing one half. Some cancel by DELETE, some follow the job and resume, some try again, some stay.
"""

import asyncio
import json
import random
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from tests.support.heard import STREAMING, VECTORS
from tests.support.telling_runtime import Told, vector

WAYS = {
    "stay": 16, "in the head": 6, "in the body": 6, "behind it": 8, "while it waits": 14, "at the first byte": 7,
    "in the answer": 14, "half": 5, "delete": 8, "follow": 10, "try again": 18, "twice": 4,
}  # fmt: skip
"""How often each is drawn."""

LEAVES_FOR_GOOD = ("behind it", "while it waits", "at the first byte", "half", "delete", "follow")
"""What can be done to an answer that takes long: if it went on, its end would come long after the client had left."""

ANSWER_S_MAX = 60.0
RETRY_AFTER_S = (0.0, 0.0, 0.02, 0.3)


@dataclass(frozen=True)
class Plan:
    """What one client does. `at` = how far it gets before it leaves: 0..1 of its head, body, time or answer."""

    told: Told
    path: str
    stream: bool
    body: bytes
    headers: dict[str, str]
    way: str
    at: float
    rst: bool
    dice: random.Random = field(compare=False)

    @classmethod
    def drawn(cls, seed: int, number: int) -> "Plan":
        """The plan of a client, the same one each time."""
        dice = random.Random(f"{seed}/{number}")
        way = dice.choices(list(WAYS), weights=list(WAYS.values()))[0]
        path = dice.choices([*STREAMING, *VECTORS], weights=[3, 2, 3, 3, 2, 2, 1, 1, 1])[0]
        told = Told(f"t{number}", dice.choice((1, 2, 5, 12, 30, 60)), dice.choice((0, 1, 4, 12, 30)))
        stream = path in STREAMING and dice.random() < 0.65
        headers = {"x-session-affinity": told.tag}
        if way == "try again" or dice.random() < 0.4:
            headers |= dice.choice(({"idempotency-key": f"key-{seed}-{number}"}, {"x-stainless-retry-count": "0"}))
        if way == "follow" or dice.random() < 0.15:
            headers |= {"x-gateway-on-disconnect": dice.choice(("keep", "cancel"))}
        if way == "try again" and dice.random() < 0.9:
            headers.pop("x-gateway-on-disconnect", "")
        often = 0.5 if way == "follow" else 0.15
        if way in LEAVES_FOR_GOOD and headers.get("x-gateway-on-disconnect") != "keep" and dice.random() < often:
            told = Told(told.tag, 100, 45)
        body = json.dumps(_request(path, told, stream, dice)).encode()
        return cls(told, path, stream, body, headers, way, dice.random(), dice.random() < 0.5, dice)

    @property
    def expected(self) -> str:
        """The text that the whole answer has."""
        if self.path not in VECTORS:
            return self.told.text
        given = json.loads(self.body).get("input") or json.loads(self.body)["prompt"]
        return json.dumps([vector(text) for text in ([given] if isinstance(given, str) else given)])

    @property
    def lasts_s(self) -> float:
        """How long its answer takes at least."""
        return self.told.pieces * self.told.ms / 1000


def _request(path: str, told: Told, stream: bool, dice: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": told.prompt}]
    model = dice.choice(("nomic", "vecs") if path in VECTORS else ("llama", "qwen"))
    asked: dict[str, Any] = {"model": model}
    if path in STREAMING:
        asked["stream"] = stream
    match path:
        case "/v1/chat/completions":
            options = {"stream_options": {"include_usage": True}} if stream and dice.random() < 0.5 else {}
            return {**asked, "messages": messages, **options}
        case "/api/chat":
            return {**asked, "messages": messages}
        case "/v1/completions" | "/api/generate" | "/api/embeddings":
            return {**asked, "prompt": told.prompt}
        case "/v1/responses":
            return {**asked, "input": told.prompt}
        case "/v1/messages":
            return {**asked, "messages": messages, "max_tokens": 1000}
        case "/v1/embeddings":
            form = {"encoding_format": "base64"} if dice.random() < 0.5 else {}
            return {**asked, "input": [told.prompt, "and", "so on"], **form}
        case _:
            return {**asked, "input": dice.choice((told.prompt, [told.prompt, "and"]))}


@dataclass
class Answer:
    """What came over one connection; `whole` = by HTTP's own framing, `left` = the client went first."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    left: bool = False
    wrong: str = ""
    messages: int = 0

    @property
    def job_id(self) -> str:
        return self.headers.get("x-gateway-job", "")

    # httptools' side
    def on_message_begin(self) -> None:
        self.messages += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.whole = True


@dataclass(frozen=True)
class Leave:
    """When a client leaves: so many seconds after its request, or once so many bytes of an answer's body are there."""

    after_s: float = ANSWER_S_MAX
    after_bytes: int = 1 << 30


STAY = Leave()


class Call:
    """One connection to a gateway, and one request after the other on it; `heard` is the answer to the last one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.heard = Answer()
        self._parser = httptools.HttpResponseParser(self.heard)

    @classmethod
    async def to(cls, url: str) -> "Call":
        there = urlsplit(url)
        return cls(*await asyncio.open_connection(there.hostname, there.port))

    async def send(self, data: bytes) -> None:
        """Sends a request, or the beginning of one."""
        self.heard = Answer()
        self._parser = httptools.HttpResponseParser(self.heard)
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, leave: Leave = STAY) -> Answer:
        """Reads the answer to its end, or until the client wants to leave."""
        answer = self.heard
        try:
            async with asyncio.timeout(leave.after_s):
                while not (answer.whole or len(answer.body) >= leave.after_bytes):
                    data = await self._reader.read(1 << 16)
                    if not data:
                        return answer
                    self._parser.feed_data(data)
                    answer.status = answer.status or self._parser.get_status_code()
        except TimeoutError:
            if leave.after_s >= ANSWER_S_MAX:
                answer.wrong = f"nothing more came for {leave.after_s:g} s"
        except OSError as problem:
            answer.wrong = f"the connection broke: {problem}"
        except httptools.HttpParserError as problem:
            answer.wrong = f"no HTTP: {problem}"
        answer.left = not answer.whole
        return answer

    def half_close(self) -> None:
        """Says that nothing more will be asked; the answer can still be read."""
        if not self._writer.transport.is_closing():
            self._writer.write_eof()

    def leave(self, *, rst: bool) -> None:
        """Closes, with a RST or with a FIN."""
        found = self._writer.get_extra_info("socket")
        if rst and found is not None and found.fileno() >= 0:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


def request(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> bytes:
    """A request in bytes."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    if body:
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


async def ask(url: str, method: str, path: str) -> Answer:
    """One request on a connection of its own, heard out."""
    call = await Call.to(url)
    try:
        await call.send(request(method, path))
        return await call.answer()
    finally:
        call.leave(rst=False)
