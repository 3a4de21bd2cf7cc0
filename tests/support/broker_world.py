"""A small gateway without its processes: one store, one policy, hosts that say what the test wants them to say.

Every verb is called as the api, a worker or the scheduler would call it. `world.now` is the clock of the verbs; keys
that expire follow the server's own.
"""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import fakeredis
import pytest

from broker import errors, hosts, jobs, lanes
from broker.due import Due
from broker.frames import Hub, replay
from broker.hosts import Fleet
from broker.jobs import GoOn, Holding
from broker.policies import PolicyBook
from broker.records import Frame, HostRecord, JobRecord, ModelOnHost, Waiting
from broker.store import Store
from broker.trust import door
from tests.support.invariants import Snapshot, take, violations

START = 1_790_000_000_000
LONG_MS = 10**9

POLICY = """
models:
  big:
    backend: simulated
    model: weights-big
    maxConcurrent: 2
    maxQueue: 3
    coldStartBudgetMs: 2000
    maxWaitMs: 20000
    fallback: small
  small:
    backend: simulated
    model: weights-small
    maxConcurrent: 1
    maxQueue: 2
    coldStartBudgetMs: 1000
    maxWaitMs: 20000
    fallback: far
  far:
    backend: simulated
    model: weights-far
    maxQueue: 2
    trust: remote
lanes:
  side:
    target: small
    maxQueue: 1
    fallback: null
"""

_numbers = itertools.count(1)


async def a_later_version_applies(store: Store) -> None:
    """Makes a policy with a key that nobody here knows the active one."""
    key, later = store.keys.policy, "keyOfALaterVersion"
    text = (await store.command("HGET", key, "text")).decode()
    text = json.dumps({**json.loads(text), later: 1}) if text.startswith("{") else f"{text}\n{later}: 1\n"
    await store.command("HSET", key, "text", text, "digest", later)
    for name in ("version", "revision"):
        await store.command("HINCRBY", key, name, 1)


def fake_redis() -> Any:
    """A fakeredis client with a server of its own."""
    return fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(version=(7,)))


def new_namespace() -> str:
    """A namespace that no other test of this run uses."""
    return f"t{next(_numbers)}"


class World:
    """What a test holds in its hands."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.book = PolicyBook(store)
        self.fleet = Fleet(store, self.book)
        self.due = Due(store, self.book, self.fleet)
        self.now = START
        self._ids = itertools.count(1)
        store.clock = lambda: self.now

    def real_time(self) -> None:
        """Lets the server's clock decide from here on."""
        self.store.clock = None

    def new_id(self) -> str:
        return f"job{next(self._ids):04d}"

    async def apply(self, text: str = POLICY) -> int:
        version = await self.book.apply(text, by="test")
        await self.fleet.look()
        return version

    async def warm(self, host: str = "gpu1", *, boot: str = "boot1", **slots: int) -> None:
        """Says that models are warm on a host with so many slots; `far=0` says that the model is cold there."""
        told = {name: ModelOnHost(state="warm" if n else "cold", slots_total=n) for name, n in slots.items()}
        await self.tell(host, told, boot=boot)

    async def tell(self, host: str, models: dict[str, ModelOnHost], *, boot: str = "boot1", **fields: Any) -> None:
        """One heartbeat of a host, long enough for the whole test, and a look at it."""
        record = HostRecord(name=host, boot=boot, beat_at=self.now, **fields)
        await hosts.beat(self.store, record, models, lease_ms=LONG_MS)
        await self.fleet.look()

    async def submit(
        self, lane: str = "big", *, body: bytes = b'{"model":"big"}', reader: str = "", key: str = "",
        promote_within_ms: int | None = None, give_up_within_ms: int | None = None, instead_of: str = "",
        **fields: Any,
    ) -> str:  # fmt: skip
        """Puts a job straight into a lane, perhaps instead of the one that it asked for; gives the id of the job that
        answers it."""
        record = JobRecord(**{"id": self.new_id(), "asked": lane, "keep_ms": LONG_MS} | fields)
        into = self.book.active.lane(lane)
        assert into is not None, lane
        if record.zone == "remote":
            record = replace(record, judged=self.rules(lane))
        done = await lanes.submit(
            self.store, self.book.active, self.fleet, record, into, body, reader=reader, idempotency_key=key,
            promote_within_ms=promote_within_ms, give_up_within_ms=give_up_within_ms,
            asked=self.book.active.lane(instead_of),
        )  # fmt: skip
        return done.job_id

    def rules(self, lane: str) -> str:
        """The digest under which a job may leave by this lane now, "" where the lane leads nowhere."""
        into = self.book.active.lane(lane)
        assert into is not None, lane
        trust, rules, _ = door.asked_at_claim(self.book.active, into, None)
        return rules if trust == "remote" else ""

    async def fill(self, lane: str, **fields: Any) -> list[str]:
        """Submits until the lane is full."""
        taken = []
        while True:
            try:
                taken.append(await self.submit(lane, **fields))
            except errors.LaneFull:
                return taken

    async def job(self, job_id: str) -> JobRecord:
        return await jobs.read(self.store, job_id)

    async def waiting(self, job_id: str) -> Waiting:
        """The entry of a job as a worker sees it."""
        job = await self.job(job_id)
        return Waiting(job=job_id, lane=job.lane, entry=job.entry)

    async def claim(
        self, job_id: str, *, host: str = "gpu1", boot: str = "boot1", lease_ms: int = 10_000, woke_at: int = 0
    ) -> Holding:
        waiting = await self.waiting(job_id)
        got = await lanes.claim(
            self.store, self.book.active, waiting, host=host, boot=boot, lease_ms=lease_ms, woke_at=woke_at
        )
        return Holding(job_id, waiting.lane, got.attempt, boot)

    async def stream(self, job_id: str, *frames: bytes, **claim: Any) -> Holding:
        """Claims a job and gives it a first token, and the other frames."""
        held = await self.claim(job_id, **claim)
        first, *rest = frames or (b"one",)
        await jobs.first_token(self.store, held, first)
        for seq, data in enumerate(rest, start=2):
            await jobs.emit(self.store, held, seq, data)
        return held

    async def log(self, job_id: str) -> list[Frame]:
        return [frame async for frame in replay(self.store, job_id)]

    async def promote(self, job_id: str, to: str) -> None:
        lane = self.book.active.lane(to)
        assert lane is not None, to
        await lanes.promote(self.store, self.book.active, self.fleet, await self.job(job_id), lane)

    async def recover(self, job_id: str, *, max_losses: int = 3, go_on: GoOn | None = None) -> bool:
        return await lanes.recover(self.store, await self.job(job_id), max_losses=max_losses, go_on=go_on)

    async def healthy(self) -> Snapshot:
        """Fails with the sentences that do not hold; gives the picture."""
        s = await take(self.store)
        found = violations(s)
        assert not found, "\n".join(found)
        return s

    @asynccontextmanager
    async def refused(self, error: type[errors.BrokerError]) -> AsyncIterator[pytest.ExceptionInfo[errors.BrokerError]]:
        """What happens inside must raise exactly this error and leave no mark in Redis."""
        before = await take(self.store)
        with pytest.raises(error) as caught:
            yield caught
        assert type(caught.value) is error
        after = await take(self.store)
        marks = [f"{n}: {before.keys.get(n)} -> {after.keys.get(n)}" for n in before.marks(after)]
        assert not marks, f"refused with {caught.value.code} and left a mark:\n" + "\n".join(marks)


def stale(held: Holding, attempt: int) -> Holding:
    """The hold of an earlier attempt."""
    return replace(held, attempt=attempt)


@asynccontextmanager
async def fake_world() -> AsyncIterator[World]:
    """A world on fakeredis."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    try:
        yield World(store)
    finally:
        await store.close()


@asynccontextmanager
async def real_world(url: str, namespace: str | None = None) -> AsyncIterator[World]:
    """A world on a real server, in a namespace of its own."""
    store = await Store.open(url, namespace=namespace or new_namespace(), name="test")
    try:
        yield World(store)
    finally:
        await store.close()


def policy_with(*changes: tuple[str, str]) -> str:
    """The test policy with pieces of its text replaced; a piece that is not there is a mistake of the test."""
    text = POLICY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


async def turns(count: int) -> None:
    """Lets the other tasks run, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until_gone(world: World, still_there: Callable[[Snapshot], object]) -> None:
    """Waits, two seconds at most, for keys to expire by the server's own clock."""
    async with asyncio.timeout(2):
        while still_there(await take(world.store)):  # noqa: ASYNC110  # nobody announces that a key has expired
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Has something run beside the test, and ends it with the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def heard_on(world: World, channel: str) -> AsyncIterator[asyncio.Queue[bytes]]:
    """Hears one channel, as a worker or an api process would."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    opened = asyncio.Event()
    async with running(world.store.listen([channel], lambda _, message: heard.put_nowait(message), opened.set)):
        async with asyncio.timeout(5):
            await opened.wait()
        yield heard


@asynccontextmanager
async def hub_of(world: World, name: str = "api1") -> AsyncIterator[Hub]:
    """A listening hub."""
    hub = Hub(world.store, name=name)
    async with running(hub.run()):
        async with asyncio.timeout(5):
            await hub.listening.wait()
        yield hub
