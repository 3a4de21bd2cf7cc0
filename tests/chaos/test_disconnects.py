"""Clients that disconnect at any moment, by the thousand: afterwards nothing is left of them, and what they heard was
right to the byte. CHAOS_SEED repeats the plans of a run that failed."""

import asyncio
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.lifecycle import State
from broker.records import JobRecord
from broker.store import Store
from tests.chaos.leaving import Leaving, judge_jobs
from tests.chaos.standing import Standing, look, used_mb
from tests.chaos.storm import Ledger, ends, seed_of
from tests.support.gateway_process import House, started
from tests.support.heard import hear
from tests.support.invariants import left_over
from tests.support.live_api import live_api
from tests.support.redis_server import RedisServer
from tests.support.starvation import StarvationLog
from tests.support.telling_runtime import TellingLlama, TellingOllama
from tests.support.waiting import until
from tests.support.worker_world import policy, worker_world

pytestmark = pytest.mark.real

FIRST = 80
"""So many come first: whatever a process opens once, it has opened then."""
LOOK_EVERY_S = 1.5
REDIS_MB = 3
"""What the counters of the day and the indices of retries may take when every job is forgotten."""
SETTLE_S_MAX = 20.0
LEFT_S_MAX = 5.0
"""What is left behind stays so; a connection that is just being made does not."""
BAD_WORDS = (" ERROR ", " CRITICAL ", "Traceback", "Task was destroyed", "never retrieved", "was never awaited")

CLOSED_S_MAX = 2.5
"""A runtime has no work with a job that ended so long ago: a second is promised, the rest is a busy machine. Time for
which the machine let one of the processes wait for a core comes on top."""

Runtimes = tuple[TellingLlama | TellingOllama, ...]


@asynccontextmanager
async def telling() -> AsyncIterator[tuple[Runtimes, dict[str, dict[str, Any]]]]:
    """Three runtimes, and the models of a policy on them: two that talk, two that give vectors."""
    llama, vecs, ollama = TellingLlama(), TellingLlama(), TellingOllama("qwen:32b", "nomic")
    llama.slots = 6
    async with llama.running(), vecs.running(), ollama.running():
        many = {"keepWarm": True, "maxQueue": 64, "memoryMb": 1, "coldStartBudgetMs": 60_000, "settleMs": 400}
        vectors = {**many, "embeddings": True}
        yield (llama, vecs, ollama), {
            "llama": {"backend": "llama.cpp", "model": "w", "url": llama.url, "maxConcurrent": 6, **many},
            "vecs": {"backend": "llama.cpp", "model": "w", "url": vecs.url, "maxConcurrent": 4, **vectors},
            "qwen": {"backend": "ollama", "model": "qwen:32b", "url": ollama.url, "maxConcurrent": 6, **many},
            "nomic": {"backend": "ollama", "model": "nomic", "url": ollama.url, "maxConcurrent": 3, **vectors},
        }  # fmt: skip


@dataclass
class Scene:
    """A gateway over these runtimes, and a ledger of its jobs."""

    up: House
    store: Store
    runtimes: Runtimes
    ledger: Ledger
    starved: StarvationLog

    async def at_rest(self) -> Standing:
        """Waits for the end of every job and until every slot is free, and looks."""
        await self.ledger.settled()
        end = time.monotonic() + SETTLE_S_MAX
        while taken := [m for m in (await asyncio.to_thread(self.up.status))["models"] if _in_use(m)]:
            assert time.monotonic() < end, f"slots that nobody uses: {taken}"
            await asyncio.sleep(0.2)
        await until(lambda: not any(r.unended for r in self.runtimes), what="the runtimes have ended everything")
        ports = frozenset(int(runtime.url.rpartition(":")[2]) for runtime in self.runtimes)
        return await look(self.up, self.store, runtimes=ports)


def _in_use(model: dict[str, Any]) -> bool:
    return any(model[name] for name in ("waiting", "running", "slots_used", "slots_settling"))


async def storm(url: str, ledger: Ledger, seed: int, numbers: range) -> Leaving:
    """Lets these clients come and go, and the ledger look."""
    leaving = Leaving(url, ledger.store, seed)
    looking = asyncio.create_task(ledger.keep_looking(LOOK_EVERY_S), name="ledger")
    try:
        await leaving.run(numbers)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    return leaving


@asynccontextmanager
async def scene(directory: Path, keep_ms: int) -> AsyncIterator[Scene]:
    async with telling() as (runtimes, models):
        text = policy(models, headerHoldMs=120, disconnectGraceMs=1200, keepMs=keep_ms)
        async with started(directory / "data", text) as up:
            store = await Store.open(up.redis_url, name="test")
            try:
                await asyncio.to_thread(lambda: [up.until_state(name, "warm") for name in models])
                starved = StarvationLog(os.getpid(), *(process.pid for process in up.family()))
                keeping = asyncio.create_task(starved.keep(), name="starvation")
                try:
                    yield Scene(up, store, runtimes, Ledger(store), starved)
                finally:
                    keeping.cancel()
            finally:
                await store.close()


async def run(directory: Path, clients: int, *, keep_ms: int, name: str) -> None:
    """Some clients first, then all of them: at rest afterwards, the gateway is as it was in between."""
    seed = seed_of(name)
    async with scene(directory, keep_ms) as here:
        first = await storm(here.up.url, here.ledger, seed, range(FIRST))
        before = await here.at_rest()
        before_mb = await used_mb(here.store)
        began = time.monotonic()
        leaving = await storm(here.up.url, here.ledger, seed, range(FIRST, FIRST + clients))
        took_s = time.monotonic() - began
        after = await here.at_rest()
        looked_until = time.monotonic() + LEFT_S_MAX
        while after.left_behind(before) and time.monotonic() < looked_until:  # a probe may have been under way
            await asyncio.sleep(0.2)
            after = await here.at_rest()
        jobs = list(here.ledger.jobs.values())
        judged, retries = judge_jobs(leaving, jobs)
        print(f"{took_s:.0f} s, {leaving.figures()}; {dict(retries)}")
        print(f"{len(jobs)} jobs {ends(here.ledger)}, cancelled while {dict(cancelled_while(jobs))}")
        print(
            *(f"{part}: {was.rss_mb:.0f} MB, then {after.parts[part].rss_mb:.0f}" for part, was in before.parts.items())
        )
        found = [*first.wrong, *leaving.wrong, *judged, *here.ledger.found, *made(here.runtimes, jobs, here.starved)]
        found += after.left_behind(before)
        found += [line for line in here.up.lines if any(word in line for word in BAD_WORDS)]
        assert not found, f"seed {seed}: {len(found)}\n" + "\n".join(found[:40])
        worth_it(leaving, jobs, retries)
        await keys_go(here.ledger, keep_ms)
        assert await used_mb(here.store) < before_mb + REDIS_MB


def made(runtimes: Runtimes, jobs: list[JobRecord], starved: StarvationLog) -> list[str]:
    """Nothing but DELETE and leaving ended a job early, and no answer was made more often than it was claimed."""
    found = [
        f"job {job.id} ended {job.state} {job.error}" for job in jobs if job.state not in (State.DONE, State.CANCELLED)
    ]
    claims, done = Counter[str](), Counter[str]()
    for job in jobs:
        claims[job.session] += job.attempt
        done[job.session] += job.state is State.DONE
    begun = sum((runtime.begun for runtime in runtimes), Counter[str]())
    whole = sum((runtime.whole for runtime in runtimes), Counter[str]())
    found += [
        f"{tag} was begun {count} times more than claimed" for tag, count in (begun - claims).items() if tag != "probe"
    ]
    over: dict[str, int] = {}
    for job in jobs:
        over[job.session] = max(over.get(job.session, 0), job.ended_at)
    for runtime in runtimes:
        for tag, at_s in runtime.ended_at_s.items():
            ended_s = over.get(tag, 0) / 1000
            if ended_s and at_s - ended_s > CLOSED_S_MAX + starved.between(ended_s, at_s):
                found.append(f"{tag} was made for {at_s - ended_s:.1f} s after its job's end")
    return found + [f"{tag} is done {count} times more than it was made" for tag, count in (done - whole).items()]


def cancelled_while(jobs: list[JobRecord]) -> Counter[str]:
    """How far the jobs were that ended early."""
    return Counter(
        "streaming" if job.first_token_at else "claimed" if job.attempt else "queued"
        for job in jobs
        if job.state is State.CANCELLED
    )


def worth_it(leaving: Leaving, jobs: list[JobRecord], retries: Counter[str]) -> None:
    """The run has met every moment that it is for: else it would prove less than it says."""
    assert min(cancelled_while(jobs)[state] for state in ("queued", "claimed", "streaming")) > 0, cancelled_while(jobs)
    figures = leaving.figures()
    assert all(figures[what] for what in ("served", "left", "heartbeats", "resumed")), figures
    assert retries["came back"] > 0.5 * retries["retries"], retries


async def keys_go(ledger: Ledger, keep_ms: int) -> None:
    """When the keep time is over no key is left of any job, but indices of retries, which end by themselves."""
    end = time.monotonic() + keep_ms / 1000 + 5
    while True:
        now = await ledger.look()
        assert now is not None and not ledger.found, ledger.found[:20]
        left = [name for name in left_over(now) if name.split(":")[1] in ("job", "readers", "idem")]
        if not left:
            return
        assert time.monotonic() < end, left[:20]
        await asyncio.sleep(0.5)


async def test_hundreds_of_clients_leave(tmp_path: Path) -> None:
    await run(tmp_path, 300, keep_ms=4_000, name="disconnects")


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_ten_thousand_clients_leave(tmp_path: Path) -> None:
    await run(tmp_path, 10_000, keep_ms=20_000, name="ten thousand disconnects")


async def test_nothing_is_left_inside(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Api, worker and scheduler in this process: the same tasks run afterwards, and nobody is remembered."""
    seed = seed_of("inside")
    async with telling() as (runtimes, models), worker_world(redis_server.socket_url, tmp_path) as world:
        await world.apply(models, headerHoldMs=120, disconnectGraceMs=1200, keepMs=4_000)
        await world.scheduler()
        host = await world.warm_host()
        async with live_api(await world._open("api")) as api:
            ledger = Ledger(world.store)
            await storm(api.url, ledger, seed, range(FIRST, FIRST + 20))
            await ledger.settled()
            await until(lambda: not api.server.server_state.connections, what="every connection is closed")
            before = await standing_tasks()
            starved = StarvationLog(os.getpid(), redis_server.pid)
            keeping = asyncio.create_task(starved.keep(), name="starvation")
            leaving = await storm(api.url, ledger, seed, range(FIRST))
            keeping.cancel()
            await ledger.settled()
            judged, _ = judge_jobs(leaving, list(ledger.jobs.values()))
            found = [*leaving.wrong, *judged, *ledger.found, *made(runtimes, list(ledger.jobs.values()), starved)]
            assert not found, f"seed {seed}\n" + "\n".join(found[:40])
            gateway = api.gateway
            held = {
                "exchanges": gateway.exchanges, "readers": gateway.hub._readers, "leases": gateway.readers._stays,
                "connections": api.server.server_state.connections, "requests": api.server.server_state.tasks,
                "attempts": host.dispatcher._serving,
            }  # fmt: skip
            await until(lambda: not any(held.values()), what=f"nobody is remembered: {held}")
            await until(lambda: tasks() == before, what=f"no other task runs than {dict(before)}, as {dict(tasks())}")
    broken = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not broken, broken
    assert sum(doubted(leaving)) > 5


def tasks() -> Counter[str]:
    """The tasks of this process by name, without those of the runtimes."""
    names = (re.sub(r"^Task-\d+$", "unnamed", task.get_name()) for task in asyncio.all_tasks())
    return Counter(name for name in names if not name.startswith("answer /"))


async def standing_tasks() -> Counter[str]:
    """Those that run for good: what a probe needs for a moment, a connection that is being made, is not there in every
    look."""
    found = tasks()
    for _ in range(10):
        await asyncio.sleep(0.02)
        found &= tasks()
    return found


def doubted(leaving: Leaving) -> Iterator[bool]:
    """Breaks each whole stream that was heard, and sees that the judge notices: a piece left out, one said twice."""
    for outcome in leaving.outcomes:
        plan = outcome.plan
        for answer in outcome.answers:
            if not (answer.whole and plan.stream and answer.status == 200 and plan.told.pieces > 2):
                continue
            if not hear(plan.path, answer.body, stream=True).whole:
                continue  # it was cancelled
            blocks = answer.body.split(end := b"\n" if plan.path.startswith("/api/") else b"\n\n")
            mark = plan.told.marks[plan.told.pieces // 2].encode()
            at = next(number for number, block in enumerate(blocks) if mark in block)
            for broken in ([*blocks[:at], *blocks[at + 1 :]], [*blocks[: at + 1], *blocks[at:]]):
                with noticed():
                    heard = hear(plan.path, end.join(broken), stream=True)
                    assert heard.text == plan.expected
                yield True


@contextmanager
def noticed() -> Iterator[None]:
    with pytest.raises(AssertionError):
        yield
