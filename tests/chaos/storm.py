"""Many clients at once that keep asking while parts are killed, and the ledger of what became of every job.

The models are simulated: their answers are numbered words, so that a lost, doubled or reordered piece shows.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from broker import errors
from broker.lanes import JOB_LEASE_MS
from broker.lifecycle import ENDED, State
from broker.records import JobRecord
from broker.store import Store
from tests.support.clients import Told, ask
from tests.support.invariants import Snapshot, take, undone, violations
from tests.support.worker_world import policy, simulated, words

CLIENTS = 40
ENOUGH = CLIENTS // 4
"""Fewer that were served would be too few to judge by."""
SETTLE_S_MAX = 30.0
TOLD_S_MAX = JOB_LEASE_MS / 1000 + 2.0
"""A client whose answer is lost hears so within this, and the time that a part needs to start again."""

RESTART_S = 8.0
"""The longest pause of the supervisor before another start, and that start on a busy machine."""


def storm_policy(load_log: Path, *, hosts: tuple[str, ...] = (), **more: Any) -> str:
    """Two models, the second one the fallback of the first, with answers that take seconds and queues that fill.

    Each of `hosts` has a third one of its own: `big` and `small` are warm on one host at a time.
    """
    speeds = {"decodeTps": 40, "prefillTps": 2000, "coldStartMs": 150}
    models = {
        "big": simulated(
            maxConcurrent=8, maxQueue=16, coldStartBudgetMs=3000, fallback="small", memoryMb=1,
            options={**speeds, "loadLog": f"{load_log}-big"},
        ),
        "small": simulated(
            maxConcurrent=4, maxQueue=24, coldStartBudgetMs=20000, memoryMb=1,
            options={**speeds, "loadLog": f"{load_log}-small"},
        ),
    }  # fmt: skip
    for host in hosts:
        models[f"of-{host}"] = simulated(maxConcurrent=3, maxQueue=16, hosts=[host], memoryMb=1, options=speeds)
    return policy(models, **{"headerHoldMs": 1000, **more})


@dataclass
class Storm:
    """The clients, and everything that they were told."""

    urls: list[str]
    seed: int
    clients: int = CLIENTS
    longest: int = 60
    models: tuple[str, ...] = ("big", "big", "big", "big", "small")
    told: list[Told] = field(default_factory=list)
    stopped: bool = False
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    @asynccontextmanager
    async def raging(self) -> AsyncIterator[None]:
        """Lets the clients ask for the length of the block, and hears every answer out."""
        limits = httpx.Limits(max_connections=self.clients * 2)
        async with httpx.AsyncClient(timeout=90.0, limits=limits) as http, asyncio.TaskGroup() as tasks:
            for number in range(self.clients):
                tasks.create_task(self._client(http, number), name=f"client {number}")
            yield
            self.stopped = True

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(self.dice.random())
        while not self.stopped:
            told = await ask(http, self.urls[number % len(self.urls)], self._body(number))
            self.told.append(told)
            if not told.served:
                await asyncio.sleep(0.1 + 0.4 * self.dice.random())  # as a client that has some manners

    def _body(self, number: int) -> dict[str, Any]:
        return {
            "model": self.dice.choice(self.models),
            "messages": [{"role": "user", "content": f"client {number} says {self.dice.random()}"}],
            "max_tokens": self.dice.randint(5, self.longest),
            "stream": self.dice.random() < 0.6,
        }

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(told.outcome + (f" {told.code}" if told.code else "") for told in self.told)


@dataclass
class Ledger:
    """Looks at Redis now and then: what ended stays as it ended, and nothing that was accepted is lost."""

    store: Store
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    last: Snapshot | None = None
    redis_kills: list[float] = field(default_factory=list)
    """Instants of time.monotonic: from each on, leases are judged only after one whole lease of unbroken connection."""
    losses: list[float] = field(default_factory=list)
    """Instants (time.monotonic) up to which a killed Redis had acknowledged writes that it then came back without."""
    uncounted: list[tuple[float, float]] = field(default_factory=list)
    """From the last count before a kill of Redis to the first after it: what it acknowledged then was not counted."""

    async def look(self) -> Snapshot | None:
        """Takes a picture, compares it with the one before, and notes what has ended; None while Redis is away."""
        try:
            now = await take(self.store)
        except errors.BrokerUnavailable:
            return None
        if self.last is not None:
            self.found += undone(self.last, now)
        self.found += violations(now)
        self.jobs.update({job_id: job for job_id, job in now.jobs.items() if job.state in ENDED})
        self.last = now
        return now

    async def keep_counting(self, store: Store) -> None:
        """Counts in Redis as fast as it acknowledges each count, to know a Redis that forgot what it had acknowledged.

        Under `appendfsync everysec` it may: while the disk is busy with a sync it answers before it writes, for up to
        two seconds, and SIGKILL takes that with it. Nobody above it can know what was acknowledged.
        """
        count, at, life = 0, time.monotonic(), await life_of(store)
        while True:
            try:
                now = int(await store.command("INCR", "witness"))
                if now <= count:
                    self.losses.append(at)
                    self.last = None  # what it held before is no measure for what it holds now
                if time.monotonic() - at > RESTART_S_MIN and (life_now := await life_of(store)) != life:
                    self.uncounted.append((at, time.monotonic()))
                    life = life_now
                count, at = now, time.monotonic()
            except errors.BrokerUnavailable:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.002)

    def judged_from(self, told: Told) -> float:
        """From when on a client that has seen a part may expect to be told: its last piece, or the last kill of Redis
        since then."""
        kills = [at for at in self.redis_kills if told.content_at < at < told.ended_at]
        return max([told.content_at, *kills])

    def may_be_forgotten(self, told: Told) -> bool:
        """Whether an answer lived when Redis forgot what it had acknowledged, or had just ended; or ended when nobody
        counted: on a busy machine a killed Redis answers many others after its last answer to the witness."""
        counted = any(told.started_at <= at and at - FORGETS_S_MAX <= told.ended_at for at in self.losses)
        return counted or any(since <= told.ended_at <= until for since, until in self.uncounted)

    async def keep_looking(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def settled(self) -> Snapshot:
        """Waits until no job lives any more."""
        end = time.monotonic() + SETTLE_S_MAX
        while True:
            now = await self.look()
            living = [job for job in now.jobs.values() if job.live] if now is not None else None
            if now is not None and not living:
                return now
            assert time.monotonic() < end, f"still alive after {SETTLE_S_MAX:g} s: {living}"
            await asyncio.sleep(0.3)


async def life_of(store: Store) -> str:
    """Which start of Redis this is."""
    told = bytes(await store.command("INFO", "server")).decode()
    return next(line for line in told.splitlines() if line.startswith("run_id:"))


@asynccontextmanager
async def watched(redis_url: str, *, every_s: float = 1.0) -> AsyncIterator[Ledger]:
    """A ledger that looks every so often, with a witness beside it, for the length of the block."""
    async with AsyncExitStack() as open_stores:
        stores = [await Store.open(redis_url, name=name) for name in ("ledger", "witness")]
        for store in stores:
            open_stores.push_async_callback(store.close)
        ledger = Ledger(stores[0])
        tasks = [
            asyncio.create_task(ledger.keep_looking(every_s), name="ledger"),
            asyncio.create_task(ledger.keep_counting(stores[1]), name="witness"),
        ]
        try:
            yield ledger
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def judge(storm: Storm, ledger: Ledger, *, apis_live: bool) -> None:
    """What holds whatever was killed. Silence and a clean-looking end are never among what a client is told, and while
    its api lives nobody's connection is cut."""
    found = list(dict.fromkeys(ledger.found))
    for told in storm.told:
        found += wrong_with(told, ledger)
        if apis_live and told.cut:
            found.append(f"job {told.job_id} (stream={told.stream}): its client was cut off: {told.cut}")
    unseen = [job for job in ledger.jobs.values() if was_unseen(job)]
    done = sum(job.state is State.DONE for job in unseen)
    if done < 0.95 * len(unseen):
        found.append(f"{done} of {len(unseen)} unseen jobs ended done: {ends(ledger)}")
    assert not found, f"seed {storm.seed}, {dict(storm.outcomes)}\n" + "\n".join(found[:40])
    assert len(ledger.jobs) > CLIENTS and storm.outcomes["served"] > ENOUGH, storm.outcomes  # else: what was judged?


def wrong_with(told: Told, ledger: Ledger) -> list[str]:
    """Says what one client may complain about."""
    name = f"client of job {told.job_id or '?'} (stream={told.stream})"
    whole = words(told.asked["max_tokens"])
    found = []
    if told.outcome == "silent" or (told.done and not told.finish):
        found.append(f"{name} got an end that says nothing: {told.text[-40:]!r}")
    if told.served and told.text != whole:
        found.append(f"{name} was served something else: {_difference(told.text, whole)}")
    if not told.served and not whole.startswith(told.text):
        found.append(f"{name} heard pieces out of order before its failure: {_difference(told.text, whole)}")
    if told.error and told.code not in HONEST:
        found.append(f"{name} was told {told.error}")
    if told.outcome == "refused" and told.status == 503 and not told.retry_after:
        found.append(f"{name} was refused without a time")
    if told.stream and told.saw_some and not told.served:
        silent_s = told.ended_at - ledger.judged_from(told)
        if silent_s > TOLD_S_MAX + RESTART_S:
            found.append(f"{name} was left in silence for {silent_s:.1f} s")
    if ledger.may_be_forgotten(told):
        return found  # what the client was told holds; what Redis says of the job is what it remembers
    if told.job_id and told.job_id not in ledger.jobs:
        found.append(f"{name}: its job is not known as ended")
    if told.served and told.job_id and told.job_id in ledger.jobs and ledger.jobs[told.job_id].state is not State.DONE:
        found.append(f"{name} was served, its job ended {ledger.jobs[told.job_id].state}")
    return found


RESTART_S_MIN = 0.05
"""A Redis that was killed is never back within this."""

FORGETS_S_MAX = 3.0
"""How far back a killed Redis may forget: two seconds that it waits for the disk, and the second of a sync."""

HONEST = {"lane_full", "worker_lost", "model_unavailable", "runtime_failed", "broker_unavailable"}
"""What a client may be told while parts die. An `expired` or `cancelled` nobody has asked for."""


def was_unseen(job: JobRecord) -> bool:
    """Whether nobody had seen any of it and somebody still wanted it when it ended."""
    abandoned = job.state is State.CANCELLED
    return not abandoned and not (job.seen and job.first_token_at)


def ends(ledger: Ledger) -> dict[str, int]:
    """How the jobs ended, in words."""
    return dict(Counter(f"{job.state} {job.error}".strip() for job in ledger.jobs.values()))


def loads(load_log: Path, model: str) -> int:
    """How often a model's runtime was started, by its own log."""
    return len(Path(f"{load_log}-{model}").read_text().splitlines())


def seed_of(name: str) -> int:
    """A seed for a test; CHAOS_SEED repeats one that failed."""
    given = os.environ.get("CHAOS_SEED")
    seed = int(given) if given else random.SystemRandom().randrange(10**6)
    print(json.dumps({"chaos": name, "seed": seed}))
    return seed


def _difference(text: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), min(len(text), len(whole)))
    return f"at {at}: {text[max(0, at - 12) : at + 12]!r} for {whole[max(0, at - 12) : at + 12]!r}"
