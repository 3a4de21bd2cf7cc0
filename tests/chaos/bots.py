"""CI bots that hand jobs over, walk away and come back for them, and the place where their webhooks arrive."""

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from standardwebhooks import Webhook, WebhookVerificationError

from tests.support.worker_world import words

AGAIN_S = 0.2
"""A bot whose request was refused, cut off or not heard sends it again after this, with the same key."""

GIVE_UP_S = 900.0
ENDED = frozenset({"done", "failed", "cancelled", "expired"})


@dataclass
class Handed:
    """One job as its bot knows it."""

    key: str
    tokens: int
    job_ids: list[str] = field(default_factory=list)  # more than one where Redis forgot what it had acknowledged
    state: str = ""
    error: Any = None
    text: str = ""
    accepted_at: float = 0.0
    forgotten_at: list[float] = field(default_factory=list)


@dataclass
class Bots:
    """Some bots that submit as fast as they may, each its own jobs."""

    urls: list[str]
    webhook: str
    seed: int
    bots: int
    each: int
    models: tuple[str, ...] = ("big", "small")
    jobs: list[Handed] = field(default_factory=list)
    submitting: int = 0

    async def run(self) -> None:
        """Submits everything, and waits until each job has ended and its answer is fetched."""
        limits = httpx.Limits(max_connections=self.bots * 8)
        async with httpx.AsyncClient(timeout=60.0, limits=limits) as http, asyncio.TaskGroup() as tasks:
            for number in range(self.bots):
                tasks.create_task(self._bot(http, number), name=f"bot {number}")

    async def _bot(self, http: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(self.seed * 1000 + number)
        own = [Handed(f"bot{number}-job{n}", dice.randint(1, 8)) for n in range(self.each)]
        self.jobs += own
        self.submitting += 1
        for job in own:
            await self._hand_over(http, job, dice)
        self.submitting -= 1
        at_once = asyncio.Semaphore(4)
        async with asyncio.TaskGroup() as tasks:
            for job in own:
                await at_once.acquire()
                task = tasks.create_task(self._fetch(http, job, dice), name=job.key)
                task.add_done_callback(lambda _: at_once.release())

    async def _hand_over(self, http: httpx.AsyncClient, job: Handed, dice: random.Random) -> None:
        asked = {
            "endpoint": "/v1/chat/completions",
            "body": {
                "model": dice.choice(self.models),
                "messages": [{"role": "user", "content": job.key}],
                "max_tokens": job.tokens,
            },
            "webhook": self.webhook,
            "metadata": {"key": job.key},
        }
        told = await self._ask(http, "POST", "/v1/jobs", dice, json=asked, headers={"Idempotency-Key": job.key})
        assert told.status_code == 202, f"{job.key}: {told.status_code} {told.text}"
        job.job_ids.append(told.json()["id"])
        job.accepted_at = time.monotonic()

    async def _fetch(self, http: httpx.AsyncClient, job: Handed, dice: random.Random) -> None:
        while True:
            path = f"/v1/jobs/{job.job_ids[-1]}"
            told = await self._ask(http, "GET", f"{path}?wait=20s", dice)
            if told.status_code == 200 and told.json()["state"] in ENDED:
                job.state, job.error = told.json()["state"], told.json()["error"]
                if job.state != "done":
                    return
                told = await self._ask(http, "GET", f"{path}/result", dice)
                if told.status_code == 200:
                    job.text = told.json()["choices"][0]["message"]["content"]
                    return
            if told.status_code == 404:
                job.forgotten_at.append(time.monotonic())
                await self._hand_over(http, job, dice)

    async def _ask(
        self, http: httpx.AsyncClient, method: str, path: str, dice: random.Random, **more: Any
    ) -> httpx.Response:
        """Asks until it is heard: a refusal of the moment and a part that was killed are waited out."""
        end = time.monotonic() + GIVE_UP_S
        while True:
            try:
                told = await http.request(method, dice.choice(self.urls) + path, **more)
                if told.status_code not in (429, 500, 502, 503):
                    return told
                why = f"{told.status_code} {told.text}"
                assert told.status_code != 500, why
            except httpx.TransportError as e:
                why = repr(e)
            assert time.monotonic() < end, f"{method} {path}: {why}"
            await asyncio.sleep(AGAIN_S * (0.5 + dice.random()))

    def wrong(self, *, may_be_forgotten: bool) -> list[str]:
        """What the bots may complain about."""
        found = []
        for job in self.jobs:
            name = f"{job.key} ({' '.join(job.job_ids)})"
            if job.state != "done":
                found.append(f"{name} ended {job.state or 'never'}: {job.error}")
            elif job.text != words(job.tokens):
                found.append(f"{name} was answered {job.text!r} for {words(job.tokens)!r}")
            if job.forgotten_at and not may_be_forgotten:
                found.append(f"{name} was accepted and then unknown")
        return found


@dataclass
class Mailbox:
    """Where webhooks arrive. It is as unreliable as the endpoints of people: now and then it answers 500, or late."""

    secret: str
    dice: random.Random
    moody: float = 0.05
    url: str = ""
    seen: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Job -> ids of the deliveries that were taken."""
    bodies: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Mailbox"]:
        """Listens on a free port of this machine for the length of the block."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        async with server:
            yield self

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = [line.partition(":") for line in head.split("\r\n")[1:] if line]
            headers = {name.strip().lower(): value.strip() for name, _, value in lines}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            status = self._take(headers, body)
            writer.write(f"HTTP/1.1 {status} .\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # its sender was killed
        finally:
            writer.close()

    def _take(self, headers: dict[str, str], body: bytes) -> int:
        try:
            Webhook(self.secret).verify(body, headers)
        except WebhookVerificationError as e:
            self.wrong.append(f"a delivery whose signature does not hold: {e}")
            return 400
        if self.dice.random() < self.moody:
            return 500
        job_id = json.loads(body)["data"]["id"]
        self.seen[job_id].append(headers["webhook-id"])
        self.bodies[job_id].append(body)
        return 204

    def complaints(self, job_ids: set[str]) -> list[str]:
        """What is wrong with what has come for these jobs."""
        found = list(self.wrong)
        for job_id in sorted(job_ids):
            ids = self.seen.get(job_id, [])
            if not ids:
                found.append(f"no webhook came for {job_id}")
            if len(set(ids)) > 1:
                found.append(f"the event of {job_id} came under several ids: {ids}")
            states = {json.loads(body)["data"]["state"] for body in self.bodies.get(job_id, [])}
            if ids and states != {"done"}:
                found.append(f"the webhooks of {job_id} say {states}")
        return found
