"""Endpoints of webhooks: one that is a function, for tests on a virtual clock, and one on a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any
from unittest import mock

import standardwebhooks

from broker import webhook_secrets
from broker.trust.addresses import Target
from tests.support.broker_world import World
from workers.courier import Courier
from workers.webhooks import Answer

URL = "https://ci.example.com/hook?token=abc"
PUBLIC = "93.184.215.14"


@dataclass
class Came:
    """A request that an endpoint got."""

    at: int  # the clock of the world, in ms
    headers: dict[str, str]
    body: str
    target: Target
    addresses: list[str]

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def job(self) -> str:
        found: str = self.said["data"]["id"]
        return found

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class Endpoint:
    """Takes what is sent, or answers as `answers` says; `names`: to what hosts resolve, the last answer for good."""

    world: World
    answers: Callable[[Came], Answer] = lambda _: Answer(200)
    came: list[Came] = field(default_factory=list)
    taken: list[Came] = field(default_factory=list)
    names: dict[str, list[list[str]]] = field(default_factory=dict)

    async def __call__(self, target: Target, addresses: list[str], headers: dict[str, str], body: str) -> Answer:
        came = Came(self.world.now, headers, body, target, addresses)
        self.came.append(came)
        answer = self.answers(came)
        if answer.taken:
            self.taken.append(came)
        return answer

    async def resolve(self, host: str, _port: int) -> list[str]:
        told = self.names.get(host, [[PUBLIC]])
        found = told.pop(0) if len(told) > 1 else told[0]
        if not found:
            raise OSError("no such host")
        return found

    def courier(self, seed: int = 7) -> Courier:
        """One scheduler's courier."""
        return Courier(self.world.store, self.world.book, self, resolver=self.resolve, chance=Random(seed))


async def secret_of(world: World, caller: str = "anonymous") -> str:
    """Makes the caller's first secret."""
    return (await webhook_secrets.make(world.store, caller)).secret


def verified(secret: str, headers: dict[str, str], body: str, *, at_ms: int = 0) -> Any:
    """What a receiver makes of a request, with the library that receivers use; raises where the signature is none.

    `at_ms`: the receiver's clock, 0 = the real one."""
    webhook = standardwebhooks.Webhook(secret)
    if not at_ms:
        return webhook.verify(body, headers)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls.fromtimestamp(at_ms / 1000, tz or UTC)

    with mock.patch("standardwebhooks.webhooks.datetime", Clock):
        return webhook.verify(body, headers)


@dataclass
class Receiver:
    """A web server that a test looks into."""

    port: int = 0
    heads: list[str] = field(default_factory=list)
    requests: list[tuple[dict[str, str], str]] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)  # what it says next; then always 204
    open: bool = False  # answers are not ended, its client has to
    hold: asyncio.Event = field(default_factory=asyncio.Event)  # answers wait for it
    holding: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line.partition(": ") for line in head.split("\r\n")[1:] if line]
            headers = {name.lower(): value for name, _, value in lines}
            body = await reader.readexactly(int(headers["content-length"]))
            self.heads.append(head.split("\r\n")[0])
            self.requests.append((headers, body.decode()))
            self.holding.set()
            await self.hold.wait()
            writer.write(self.answers.pop(0) if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n")
            await writer.drain()
            if self.open:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other end was killed
        finally:
            writer.close()


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver on a port of its own."""
    found = Receiver()
    found.hold.set()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    async with server:
        yield found
