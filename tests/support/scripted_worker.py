"""A worker that does what a test says: it uses the broker as the real one does, in the test's own process.

What happens to a job is a script, a coroutine function that is given a `Turn`; the script named in the request's last
message (`"say hello"` runs `say`) decides, so that one worker serves many kinds of answer at once.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from broker import errors, hosts, jobs, lanes
from broker.hosts import Fleet
from broker.jobs import Holding
from broker.policies import PolicyBook
from broker.records import HostRecord, JobRecord, ModelOnHost
from broker.store import Store

LOOK_EVERY_S = 0.01
LEASE_MS = 60_000

Script = Callable[["Turn"], Awaitable[None]]


def chunk(model: str, text: str | None = None, *, finish: str | None = None, usage: bool = False) -> bytes:
    """One chat chunk as a worker passes it on."""
    delta: dict[str, Any] = {"content": text} if text is not None else {}
    said: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    if usage:
        said["usage"] = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Turn:
    """One attempt at a job, as its script sees it."""

    worker: "ScriptedWorker"
    record: JobRecord
    body: bytes
    held: Holding
    seq: int = 0

    @property
    def store(self) -> Store:
        return self.worker.store

    async def say(self, text: str) -> None:
        """Sends one piece of text; the first one is the first token."""
        self.seq += 1
        data = chunk(self.record.model, text)
        if self.seq == 1:
            await jobs.first_token(self.store, self.held, data)
        else:
            await jobs.emit(self.store, self.held, self.seq, data)

    async def finish(self) -> None:
        """Ends the job well."""
        await jobs.end(
            self.store,
            self.held,
            "finish",
            seq=self.seq + 1,
            data=chunk(self.record.model, finish="stop", usage=True),
            served_by=f"{self.record.model}@{self.worker.name}",
            usage={"prompt_tokens": 3, "completion_tokens": 2},
        )

    async def fail(self, error: errors.BrokerError) -> None:
        """Ends the job badly."""
        await jobs.end(self.store, self.held, "fail", error=error)

    async def give_back(self) -> None:
        """Puts the job back into its lane, as after a lost runtime."""
        error = errors.RuntimeFailed("the runtime went away")
        await jobs.release(self.store, self.held, loss=True, max_losses=3, error=error)


async def hello(turn: Turn) -> None:
    """The plain case: two pieces and an end."""
    await turn.say("Hello")
    await turn.say(" world")
    await turn.finish()


@dataclass
class ScriptedWorker:
    """Claims every job of its models while slots are free, and runs its script."""

    store: Store
    book: PolicyBook
    name: str = "gpu1"
    scripts: dict[str, Script] = field(default_factory=lambda: {"hello": hello})
    models: dict[str, ModelOnHost] = field(default_factory=dict)
    seen: list[JobRecord] = field(default_factory=list)  # what was claimed, in order
    refusals: list[str] = field(default_factory=list)  # codes with which writes of scripts were refused

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.store, self.book)
        self._turns: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedWorker"]:
        """Works until the block ends; what it holds is dropped without a word, as by a kill."""
        await self.beat()
        task = asyncio.create_task(self._work(), name="scripted worker")
        try:
            yield self
        finally:
            mine = {task, *self._turns}
            for one in mine:
                one.cancel()
            await asyncio.wait(mine)
            failed = [one.exception() for one in mine if not one.cancelled() and one.exception()]
            assert not failed, failed

    async def beat(self, **states: str) -> None:
        """Tells what state the models are in: warm with two slots unless said otherwise."""
        for model in self.book.active.models():
            state = states.get(model, "warm")
            self.models[model] = ModelOnHost(
                state=state, slots_total=2 if state == "warm" else 0, first_token_ms=12, runtime="simulated",
                memory_bytes=3 << 30, footprint_bytes=4 << 30,
                reason="" if state == "warm" else f"the test says {state}",
            )  # fmt: skip
        record = HostRecord(
            name=self.name, boot="boot1", memory_total=16 << 30, memory_used=6 << 30, memory_headroom=10 << 30
        )
        await hosts.beat(self.store, record, self.models, lease_ms=600_000)

    async def _work(self) -> None:
        while True:
            try:
                await self._look()
            except errors.BrokerUnavailable:
                pass  # as the real one: it goes on when Redis is back
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> None:
        for lane in self.book.active.lanes().values():
            if self.models.get(lane.model, ModelOnHost()).state == "warm":
                async for waiting in lanes.waiting_entries(self.store, lane.name, limit=64):
                    if self._free(lane.model):
                        await self._claim(waiting)

    def _free(self, model: str) -> bool:
        return sum(task.get_name() == model for task in self._turns) < self.models[model].slots_total

    async def _claim(self, waiting: Any) -> None:
        try:
            claimed = await lanes.claim(
                self.store, self.book.active, waiting, host=self.name, boot="boot1", lease_ms=LEASE_MS
            )
        except (errors.Lost, errors.BadTransition, errors.Refused):
            return
        held = Holding(waiting.job, waiting.lane, claimed.attempt, "boot1")
        self.seen.append(claimed.record)
        turn = Turn(self, claimed.record, claimed.body, held)
        task = asyncio.create_task(self._run(turn), name=claimed.record.model)
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)

    async def _run(self, turn: Turn) -> None:
        said = json.loads(turn.body)["messages"][-1]["content"]
        script = self.scripts.get(said.split()[0], hello)
        try:
            await script(turn)
        except errors.Lost as refused:
            self.refusals.append(refused.code)
