"""Sessions and slots: a session goes back to the slot that has its prompt, and nobody starves for it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import dispatch
from broker.records import JobRecord, Waiting
from tests.support.llama_server import llama_command
from tests.support.redis_server import RedisServer
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import World, eventually, simulated, until, worker_world
from workers import upkeep
from workers.slots import ROW_MAX, Slots

pytestmark = pytest.mark.real

SESSIONS, TURNS = 6, 12
PREFIX_WORDS = 1200
AWAY_S = 1.0
WINDOW = 8
"""In so many turns of the model, each at most ROW_MAX jobs of one session in a row, every session has had one."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


def prefix(session: int) -> str:
    """A long prompt that differs from the others from its first word on."""
    first, second = "bdfgklmnpr"[session], "aeiou"[session % 5]
    return " ".join([first + second] * PREFIX_WORDS)


async def talk(world: World, session: int) -> list[JobRecord]:
    """One agent: its next turn comes as soon as the last has ended, with everything said so far before it."""
    said, records = prefix(session), []
    for turn in range(TURNS):
        said += f" turn {turn}"
        ask = await world.submit("coder", tokens=4, content=said, session=f"s{session}")
        records.append(await ask.end(timeout_s=120))
    return records


async def evaluated(world: World) -> int:
    """The prompt tokens that six agents at once cost the model."""
    talks = await asyncio.gather(*(talk(world, session) for session in range(SESSIONS)))
    usages = [json.loads(record.usage) for records in talks for record in records]
    assert len(usages) == SESSIONS * TURNS
    return sum(usage["prompt_tokens"] - usage["cached_tokens"] for usage in usages)


def in_order_of_arrival(choose: Callable[..., Waiting | None]) -> Callable[..., Waiting | None]:
    def fifo(waiting: Iterable[Waiting], **facts: Any) -> Waiting | None:
        for name in ("cached", "open_slots", "elsewhere"):
            facts.pop(name, None)
        return choose(waiting, **facts)

    return fifo


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sessions in the order in which they got a slot."""
    found: list[str] = []
    take = Slots.take

    def noted(slots: Slots, user: str, *, session: str = "", **more: Any) -> int:
        if session:
            found.append(session)
        return take(slots, user, session=session, **more)

    monkeypatch.setattr(Slots, "take", noted)
    return found


def longest_wait(served: list[str], session: str) -> int:
    """How many jobs got a slot from one of a session's to its next, or from the start to its first."""
    places = [-1, *(place for place, who in enumerate(served) if who == session)]
    return max(later - before for before, later in pairwise(places))


@pytest.mark.long
async def test_six_agents_on_two_slots_cost_at_most_half_of_what_they_cost_in_order_of_arrival(
    world: World, tmp_path: Path, served: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real llama.cpp server; only the order differs. And in any eight turns of the model each agent has one."""
    model = {
        "backend": "llama.cpp",
        "model": str(write_tiny_gguf(tmp_path / "tiny.gguf")),
        "command": llama_command(),
        "maxConcurrent": 2,
        "maxQueue": 20,
        "contextTokens": 4096,
        "keepWarm": True,
    }
    await world.apply({"coder": model})
    await world.host()
    await world.until_model("coder", "warm", timeout_s=60)
    sessions_first = await evaluated(world)

    waits = {session: longest_wait(served, session) for session in set(served)}
    assert len(waits) == SESSIONS and max(waits.values()) <= WINDOW * ROW_MAX, waits

    await world.leave()
    with monkeypatch.context() as for_now:
        for_now.setattr(dispatch, "choose", in_order_of_arrival(dispatch.choose))
        await world.host()
        await world.until_model("coder", "warm", timeout_s=60)
        by_arrival = await evaluated(world)

    with capsys.disabled():
        share = sessions_first / by_arrival
        print(f"\nprompt tokens evaluated: sessions first {sessions_first}, by arrival {by_arrival}, {share:.2f} of it")
    assert sessions_first * 2 <= by_arrival


async def test_a_slot_of_a_simulated_model_is_named_too_and_told(world: World) -> None:
    """What is cached where can be read in Redis, and goes when the model is loaded anew."""
    await world.apply({"big": simulated(maxConcurrent=2, contextTokens=9000)})
    await world.warm_host()
    for session in ("s1", "s2", "s1"):
        await (await world.submit("big", content=session * 50, session=session)).end()

    async def told() -> bool:
        table = (await world.model("big")).cached()
        return {slot: session for slot, (session, _) in table.items()} == {0: "s1", 1: "s2"} and table[0][1] > 0

    await eventually(told, what="the host tells whose prompt each slot has")


async def test_a_session_goes_back_to_the_host_that_has_its_prompt(world: World) -> None:
    """Both hosts are idle and warm; whoever hears of the job first would else take it."""
    await world.apply({"big": simulated(maxConcurrent=2, contextTokens=9000, replicas=2)})
    for name in ("gpu1", "gpu2"):
        await world.host(name)
    for name in ("gpu1", "gpu2"):
        await world.until_model("big", "warm", host=name)
    first = await (await world.submit("big", session="s1")).end()

    async def known() -> bool:
        told = (await world.model("big", first.owner)).cached()
        return "s1" in {session for session, _ in told.values()}

    await eventually(known, what="the host tells whose prompt it has")
    for host in world.hosts.values():
        await host.residents._fleet.look()
    later = [await (await world.submit("big", session="s1")).end() for _ in range(8)]
    assert {record.served_by for record in later} == {first.served_by}


async def test_a_probe_takes_the_slot_of_nobody_who_may_come_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself a llama-server puts a probe where a prompt begins like it, which with one chat template all do.
    The session there would have its whole prompt read again; another has long been away."""
    monkeypatch.setattr(upkeep, "PROBE_IDLE_EVERY_S", 0.3)
    monkeypatch.setattr(upkeep, "CACHED_PROMPT_S", AWAY_S)
    model = {"backend": "llama.cpp", "model": str(write_tiny_gguf(tmp_path / "tiny.gguf")), "command": llama_command()}
    await world.apply({"coder": {**model, "maxConcurrent": 2, "contextTokens": 4096, "keepWarm": True}})
    host = await world.host()
    await world.until_model("coder", "warm", timeout_s=60)
    coder = host.residents.wakers["coder"]
    await (await world.submit("coder", tokens=4, content="no " + prefix(1), session="away")).end(timeout_s=60)
    left_at = coder._idle_since_s
    await until(lambda: asyncio.get_running_loop().time() > left_at + AWAY_S, what="it is long away")
    said = "Hi " + prefix(1)
    await (await world.submit("coder", tokens=4, content=said, session="stays")).end(timeout_s=60)
    before = coder.upkeep._probed_at
    await until(lambda: coder.upkeep._probed_at > before + 0.3 and coder.slots.idle, what="it has been probed")

    again = await (await world.submit("coder", tokens=4, content=said + " now", session="stays")).end(timeout_s=60)
    usage = json.loads(again.usage)
    assert usage["cached_tokens"] > 0.9 * usage["prompt_tokens"]
