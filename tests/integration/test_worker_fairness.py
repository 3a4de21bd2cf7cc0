"""Fair shares once for real: a real Redis, a real worker, a simulated runtime with small service times."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from ulid import ULID

from broker import admission, errors, jobs
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.redis_server import RedisServer
from tests.support.worker_world import Ask, World, eventually, simulated, until, worker_world

pytestmark = pytest.mark.real

ENOUGH = 14
"""So many of the large jobs that one of them is a small part of what was computed."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_who_hangs_up_before_the_end_has_spent_the_tokens(world: World) -> None:
    """Else nobody's day would ever be over that cancels each answer at its last word."""
    await world.apply({"big": simulated(options={"decodeTps": 100})})
    await world.warm_host()
    ask = await world.submit("big", tokens=500, caller="ann")
    await ask.until_state(State.STREAMING)
    await jobs.cancel(world.store, ask.job_id)

    async def spent() -> bool:
        day = datetime.fromtimestamp(await world.store.now_ms() / 1000, UTC)
        return int(await world.store.command("GET", world.store.keys.spent("ann", f"{day:%Y-%m-%d}")) or 0) > 0

    await eventually(spent, what="it is charged")


class Caller:
    """One caller that floods the lane with requests of one size, some at once, and keeps to what a refusal says."""

    def __init__(self, world: World, name: str, *, words: int, tokens: int, over: asyncio.Event) -> None:
        self.name = name
        self.served: list[JobRecord] = []
        self.tries: list[int] = []  # of each job that was let in
        self._world = world
        self._words = words
        self._tokens = tokens
        self._over = over

    async def flood(self, at_once: int) -> None:
        """Until it is over."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(self._ask_on())

    def tokens(self, since_ms: int, until_ms: int) -> int:
        """What was computed for it, of jobs that ended in this time."""
        usages = [json.loads(job.usage) for job in self.served if since_ms <= job.ended_at < until_ms]
        return sum(u["prompt_tokens"] - u.get("cached_tokens", 0) + u["completion_tokens"] for u in usages)

    async def _ask_on(self) -> None:
        while not self._over.is_set():
            ask = await self._until_let_in()
            if ask is not None:
                self.served.append(await ask.end())

    async def _until_let_in(self) -> Ask | None:
        tries = 0
        while not self._over.is_set():
            tries += 1
            try:
                prompt = f"{ULID()} " + "word " * self._words  # in no cache
                ask = await self._world.submit("big", content=prompt, tokens=self._tokens, caller=self.name)
            except (errors.LaneFull, errors.CallerShare) as refused:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), refused.retry_after_s)
                continue
            self.tries.append(tries)
            return ask
        return None


async def test_two_who_flood_a_lane_and_a_third_who_comes_late(world: World) -> None:
    """Small jobs and large ones are served alike, in tokens; who comes late is in by its second try and served soon."""
    options = {"decodeTps": 1_000, "prefillTps": 20_000}
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=12, options=options)})
    await world.warm_host()
    over = asyncio.Event()
    small = Caller(world, "ann", words=20, tokens=10, over=over)
    large = Caller(world, "bob", words=200, tokens=60, over=over)
    late = Caller(world, "cay", words=20, tokens=10, over=over)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(small.flood(3))
        tasks.create_task(large.flood(5))
        await until(lambda: len(large.served) >= ENOUGH, what="both had their share", timeout_s=20)
        tasks.create_task(late.flood(1))
        await until(lambda: len(late.served) >= 1, what="the late one is served", timeout_s=20)
        over.set()

    jobs = sorted([*small.served, *large.served], key=lambda job: job.ended_at)
    had = [caller.tokens(large.served[1].ended_at, late.served[0].submitted_at) for caller in (small, large)]
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
    for _ in range(50):  # more at once hold this loop up for so long that the worker on it takes its runtime for gone
        await asyncio.gather(*(queued(world) for _ in range(100)))
    assert await world.waiting("big.batch") >= 4_900
    service_ms = (done := await running.end()).ended_at - done.claimed_at

    for _ in range(4):
        record = await (await world.submit("big", tokens=2)).end()
        assert record.first_token_at - record.submitted_at <= service_ms + 100
