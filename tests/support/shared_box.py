"""A box that callers share, in virtual time: admission, the verbs, the picture, the slots and the dispatcher are the
real ones; only the runtime is not. It reads and writes tokens at given speeds, keeps the prompts of sessions in its
slots, and everything that it computes for a caller is booked.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from broker import admission, errors, jobs
from broker.jobs import Holding
from broker.records import Claimed, JobRecord, ModelOnHost, Waiting
from broker.store import Store
from tests.support.broker_world import START, World, fake_world
from tests.support.jump_loop import passes, run_in_virtual_time
from workers import dispatcher
from workers.attempt import Ended
from workers.dispatcher import Dispatcher
from workers.picture import LanePicture
from workers.slots import Slots

MODEL = "big"
ON_THE_WAY_S = 0.003
"""How long the end of an answer takes to reach its client, and as long its next request to reach the worker."""

JITTER_S = 0.2
"""A client that is told to come back in so many seconds comes at most so much later."""

SETTLES_S = 0.3
BEAT_EVERY_S = 2.0


@dataclass(frozen=True)
class Asked:
    """What a request wants. Tokens."""

    prompt: int
    answer: int
    session: str = ""


@dataclass
class Client:
    """One caller: how many requests it has on the way at once, and what each of these asks, turn by turn."""

    name: str
    at_once: int
    ask: Callable[["Client", random.Random, int, int], Asked]
    lane: str = MODEL
    begins_s: float = 0.0
    ends_s: float = float("inf")
    tries: list[list[float]] = field(default_factory=list)  # of each request, when it was tried, until it was let in
    jobs: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


class Box:
    """The machine, its one model, and everybody who asks."""

    def __init__(self, world: World, *, slots: int, seed: int, prefill_tps: float, decode_tps: float) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.prefill_tps, self.decode_tps = prefill_tps, decode_tps
        self.cached: dict[int, tuple[str, int]] = {}  # slot -> session, tokens
        self.booked: list[tuple[str, float, float, int]] = []  # caller, from, to, tokens computed
        self.first_token_s: dict[str, float] = {}  # job -> when
        self.asked: dict[str, Asked] = {}
        self.callers: dict[str, str] = {}
        self.ends: dict[str, asyncio.Event] = {}
        self.picture = LanePicture()
        self.waker = _Waker(self, slots)
        self.dispatcher: Dispatcher
        self.put_backs: Counter[str] = Counter()  # job -> times
        self.waiting: list[tuple[float, int]] = []  # when, jobs that waited in the model's own lane
        self._heard: dict[str, str] = {}

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self, clients: list[Client], seconds: float, *beside: Coroutine[Any, Any, None]) -> None:
        """Lets the clients ask for so long, and something else go on beside them."""
        self.picture.follow(self.world.book.active.lanes())
        await self._tell()
        async with asyncio.TaskGroup() as tasks:
            self.dispatcher = Dispatcher(
                self.world.store, self.world.book, self.world.fleet, self.picture, {MODEL: self.waker},
                SimpleNamespace(look=lambda: None, started=lambda _name: None),
                host="gpu1", boot="boot1", tasks=tasks,
            )  # type: ignore[arg-type, dict-item]  # fmt: skip
            running = [tasks.create_task(self._beat())]
            running += [tasks.create_task(self._flood(c, n)) for c in clients for n in range(c.at_once)]
            running += [tasks.create_task(work) for work in beside]
            await passes(seconds)
            self.dispatcher.stopped = True
            for task in running:
                task.cancel()
            self.dispatcher.abandon()
        self.dispatcher.close()

    async def submit(self, client: Client, asked: Asked, **fields: Any) -> str:
        """Asks once, as the api would; raises what admission refuses with."""
        job_id = self.world.new_id()
        self.asked[job_id], self.callers[job_id], self.ends[job_id] = asked, client.name, asyncio.Event()
        estimate = round(asked.prompt * self.rng.uniform(0.8, 1.2))
        known: dict[str, Any] = {"stream": True, "keep_ms": 10**9, "session": asked.session}
        record = JobRecord(id=job_id, asked=client.lane, caller=client.name, tokens=estimate, **known | fields)
        await admission.admit(
            self.world.store, self.world.book, self.world.fleet, record, b"{}", reader=f"test/{job_id}"
        )
        client.jobs.append(job_id)
        await self.hear()
        return job_id

    async def hear(self) -> None:
        """Hears of new entries, as the worker's tails do."""
        for lane in (MODEL, f"{MODEL}.batch"):
            first = f"({self._heard[lane]}" if lane in self._heard else "-"
            entries = await self.world.store.command("XRANGE", self.world.store.keys.lane(lane), first, "+") or []
            for entry, values in entries:
                self._heard[lane] = entry.decode()
                self.picture.add(Waiting.from_entry(lane, entry, values))
        self.dispatcher.dispatch()

    async def until_let_in(self, client: Client, asked: Asked, **fields: Any) -> str:
        """Asks again whenever it is told to."""
        tries: list[float] = []
        client.tries.append(tries)
        while True:
            tries.append(self.now)
            try:
                return await self.submit(client, asked, **fields)
            except (errors.LaneFull, errors.CallerShare, errors.CallerLimit) as refused:
                client.refused[refused.code] += 1
                await passes(refused.retry_after_s + self.rng.uniform(0, JITTER_S))

    def service(self, caller: str, start: float, end: float) -> float:
        """Tokens computed for a caller in a span of time."""
        return sum(
            tokens * max(0.0, min(end, to) - max(start, at)) / (to - at)
            for who, at, to, tokens in self.booked
            if who == caller and at < end and start < to
        )

    def busy(self, start: float, end: float) -> float:
        """The share of the slots' time in which something was computed."""
        worked = sum(max(0.0, min(end, to) - max(start, at)) for _, at, to, _ in self.booked)
        return worked / (end - start) / self.waker.slots.total

    def mean_service_s(self) -> float:
        """How long a job held a slot."""
        return sum(to - at for _, at, to, _ in self.booked) / len(self.first_token_s)

    def most_waiting(self, since_s: float) -> int:
        """The most jobs that waited at once since an instant, as the beats saw it."""
        return max(waiting for at, waiting in self.waiting if at >= since_s)

    def worst_minute(self, one: str, other: str, start: float, end: float, *, step_s: float = 5.0) -> float:
        """The smaller service over the larger, in the minute between two instants where that is least."""
        worst, at = 1.0, start
        while at + 60 <= end:
            a, b = self.service(one, at, at + 60), self.service(other, at, at + 60)
            worst, at = min(worst, min(a, b) / max(a, b, 1)), at + step_s
        return worst

    async def _flood(self, client: Client, number: int) -> None:
        await passes(client.begins_s + number * 0.01)
        for turn in itertools.count():
            if self.now >= client.ends_s:
                return
            job_id = await self.until_let_in(client, client.ask(client, self.rng, number, turn))
            await self.ends[job_id].wait()
            await passes(ON_THE_WAY_S)

    async def _beat(self) -> None:
        while True:
            await passes(BEAT_EVERY_S)
            await self.dispatcher.tell_learned()
            await self._tell()

    async def _tell(self) -> None:
        slots = self.waker.slots
        told = ModelOnHost(
            state="warm",
            slots_total=slots.total,
            slots_used=len(slots.using),
            slots_settling=len(slots.settling),
        )
        await self.world.tell("gpu1", {MODEL: told})
        self.waiting.append((self.now, self.world.fleet.picture.waiting[MODEL]))


class _Waker:
    """What a dispatcher must know of its model."""

    def __init__(self, box: Box, slots: int) -> None:
        self.name = MODEL
        self.state = "warm"
        self.model = box.world.book.active.models()[MODEL]
        self.slots = Slots(slots)
        self.runtime = SimpleNamespace(endpoint=lambda: box)
        self.warmth = SimpleNamespace(active=lambda _now_ms: False)
        self.readiness = SimpleNamespace(first_token_ewma_ms=0.0)
        self.upkeep = SimpleNamespace(
            give_way=lambda: None, suspect=lambda: None, note_first_token=lambda *_a, **_k: None
        )
        self.woken_ms = (0, 0)
        self._box = box

    willing = True

    @property
    def claimable(self) -> bool:
        return self.slots.free > 0

    def kick(self) -> None:
        pass

    def refused(self, refusal: object) -> None:
        raise AssertionError(refusal)

    def released(self, user: str, *, clean: bool, **how: Any) -> None:
        self.slots.give_back(user, clean=clean, now_s=self._box.now, **how)
        if not clean:
            asyncio.get_running_loop().call_later(SETTLES_S, self._settled)

    def _settled(self) -> None:
        self.slots.settled(len(self.slots.using))
        self._box.dispatcher.dispatch()


class _Attempt:
    """One attempt at one job: reads what no cache holds of its prompt, then writes."""

    def __init__(
        self, store: Store, _client: object, claimed: Claimed, box: Box, _limits: object, *, slot: int, **_more: object
    ) -> None:
        self.job = claimed.record
        self.held = Holding(self.job.id, self.job.lane, claimed.attempt, self.job.boot)
        self.delivered = False
        self._store, self._box, self._slot = store, box, slot
        self._stopped = asyncio.Event()

    def stop(self, why: errors.BrokerError | None = None) -> None:
        """Only put-backs stop anything here: the job waits again already, as the tails would tell."""
        self._box.put_backs[self.job.id] += 1
        self._stopped.set()

    async def run(self) -> Ended:
        box, began, asked = self._box, self._box.now, self._box.asked[self.job.id]
        session, there = box.cached.pop(self._slot, ("", 0))
        there = min(there, asked.prompt) if session and session == asked.session else 0
        box.cached[self._slot] = asked.session, there
        try:
            await self._compute(asked.prompt - there, box.prefill_tps)
            box.cached[self._slot] = asked.session, asked.prompt
            await jobs.first_token(self._store, self.held, b"one")
            self.delivered = True
            box.first_token_s[self.job.id] = box.now
            first_token_s = box.now - began
            await self._compute(asked.answer, box.decode_tps)
            box.cached[self._slot] = asked.session, asked.prompt + asked.answer
            usage = {"prompt_tokens": asked.prompt, "cached_tokens": there, "completion_tokens": asked.answer}
            await jobs.end(self._store, self.held, "finish", seq=1, usage=usage)
        except errors.Lost:
            await box.hear()
            return Ended("stopped", clean=False)
        box.ends[self.job.id].set()
        return Ended(
            "done", clean=True, first_token_ms=first_token_s * 1000, total_ms=(box.now - began) * 1000, usage=usage
        )

    async def _compute(self, tokens: int, tps: float) -> None:
        """Books what was computed, also when it is stopped half-way."""
        began, takes_s = self._box.now, tokens / tps
        timer = asyncio.get_running_loop().call_later(takes_s, self._stopped.set)
        await self._stopped.wait()
        timer.cancel()
        took = self._box.now - began
        if took > 0:
            self._box.booked.append(
                (self._box.callers[self.job.id], began, self._box.now, round(tokens * took / takes_s))
            )
        if took < takes_s - 1e-6:
            raise errors.StaleAttempt("told to stop")
        self._stopped.clear()


class _Compiled:
    """fakeredis' Lua, which compiles a verb once, not for each call."""

    def __init__(self, lua: Any) -> None:
        self._lua = lua
        self._chunks: dict[bytes, Any] = {}

    def execute(self, script: Any) -> Any:
        if script == "collectgarbage()":
            return None  # it would do so after each call
        chunk = self._chunks.get(script)
        if chunk is None:
            chunk = self._chunks[script] = self._lua.compile(script)
        return chunk()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lua, name)


def _compile_once(world: World) -> None:
    server = world.store.client.connection_pool.connection_kwargs["server"]
    server._lua_runtime = _Compiled(server._lua_runtime)


def play(
    work: Callable[[Box], Coroutine[Any, Any, None]], *, policy: str, slots: int, seed: int, seconds: float,
    prefill_tps: float = 1000, decode_tps: float = 50,
) -> Box:  # fmt: skip
    """Plays a story on a box of its own."""

    async def main() -> Box:
        async with fake_world() as world:
            loop = asyncio.get_running_loop()
            world.store.clock = lambda: START + int(loop.time() * 1000)
            await world.apply(policy)
            await world.warm(**{MODEL: slots})
            _compile_once(world)
            box = Box(world, slots=slots, seed=seed, prefill_tps=prefill_tps, decode_tps=decode_tps)
            await work(box)
            return box

    async def at_once(what: Callable[..., Any], *args: Any) -> Any:
        """Threads know no virtual time."""
        return what(*args)

    with mock.patch.object(dispatcher, "Attempt", _Attempt), mock.patch.object(asyncio, "to_thread", at_once):
        return run_in_virtual_time(main(), at_most_s=seconds)
