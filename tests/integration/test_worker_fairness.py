"""Fair shares once for real: a real Redis, a real worker, a simulated runtime with small service times."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from ulid import ULID

from broker import admission, errors
from broker.records import JobRecord
from tests.support.redis_server import RedisServer
from tests.support.worker_world import Ask, World, simulated, worker_world

pytestmark = pytest.mark.real

FLOOD_S = 2.5
LATE_S = 1.2


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


class Caller:
    """One caller that floods the lane with requests of one size, some at once, and keeps to what a refusal says."""

    def __init__(self, world: World, name: str, *, words: int, tokens: int) -> None:
        self.name = name
        self.served: list[JobRecord] = []
        self.tries: list[int] = []  # of each job that was let in
        self._world = world
        self._words = words
        self._tokens = tokens

    async def flood(self, at_once: int, until: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(self._ask_on(until))

    def tokens(self, since_ms: int, until_ms: int) -> int:
        """What was computed for it, of jobs that ended in this time."""
        usages = [json.loads(job.usage) for job in self.served if since_ms <= job.ended_at < until_ms]
        return sum(u["prompt_tokens"] - u.get("cached_tokens", 0) + u["completion_tokens"] for u in usages)

    async def _ask_on(self, until: float) -> None:
        while time.monotonic() < until:
            ask = await self._until_let_in(until)
            if ask is not None:
                self.served.append(await ask.end())

    async def _until_let_in(self, until: float) -> Ask | None:
        tries = 0
        while time.monotonic() < until:
            tries += 1
            try:
                prompt = f"{ULID()} " + "word " * self._words  # in no cache
                ask = await self._world.submit("big", content=prompt, tokens=self._tokens, caller=self.name)
            except (errors.LaneFull, errors.CallerShare) as refused:
                await asyncio.sleep(min(refused.retry_after_s, max(0.0, until - time.monotonic())))
                continue
            self.tries.append(tries)
            return ask
        return None


async def test_two_who_flood_a_lane_and_a_third_who_comes_late(world: World) -> None:
    """Small jobs and large ones are served alike, in tokens; who comes late is in by its second try and served soon."""
    options = {"decodeTps": 1_000, "prefillTps": 20_000}
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=12, options=options)})
    await world.warm_host()
    small = Caller(world, "ann", words=20, tokens=10)
    large = Caller(world, "bob", words=200, tokens=60)
    late = Caller(world, "cay", words=20, tokens=10)
    began = time.monotonic()

    async def comes_late() -> None:
        await asyncio.sleep(LATE_S)
        await late.flood(1, began + FLOOD_S)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(small.flood(3, began + FLOOD_S))
        tasks.create_task(large.flood(5, began + FLOOD_S))
        tasks.create_task(comes_late())

    jobs = sorted([*small.served, *large.served], key=lambda job: job.claimed_at)
    since, until = jobs[0].claimed_at + 300, late.served[0].submitted_at
    had = small.tokens(since, until), large.tokens(since, until)
    assert min(had) >= 0.8 * max(had), had
    assert late.tries[0] <= 2
    first, service_ms = late.served[0], max(job.ended_at - job.claimed_at for job in jobs)
    assert first.first_token_at - first.submitted_at <= 2 * service_ms


async def queued(world: World) -> None:
    """One more batch job that nobody reads."""
    job = JobRecord(id=str(ULID()), asked="big.batch", caller="bot", mode="async")
    body = json.dumps({"model": "big", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}).encode()
    await admission.admit(world.store, world.book, world.fleet, job, body)


async def test_a_bot_that_queued_thousands_delays_a_first_token_by_one_job_at_most(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1, options={"decodeTps": 100})})
    await world.warm_host()
    batch = {"mode": "async", "stream": False, "caller": "bot"}
    running = await world.submit("big.batch", tokens=40, **batch)
    for _ in range(10):
        await asyncio.gather(*(queued(world) for _ in range(500)))
    assert await world.waiting("big.batch") >= 4_900
    service_ms = (done := await running.end()).ended_at - done.claimed_at

    for _ in range(4):
        record = await (await world.submit("big", tokens=2)).end()
        assert record.first_token_at - record.submitted_at <= service_ms + 100
