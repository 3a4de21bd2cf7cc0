"""Nobody wants the answer any more: the runtime must hear of it within a second, whatever state the job is in."""

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import jobs, lanes, store
from broker.lifecycle import State
from broker.records import Claimed
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedLlamaServer
from tests.support.worker_world import Runtime, World, eventually, simulated, until, worker_world
from workers import dispatcher, upkeep
from workers.host import Host

pytestmark = pytest.mark.real
NOTICED_MS = 1000


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def aborted(runtime: Runtime, count: int = 1) -> list[dict[str, Any]]:
    """Waits until the runtime has seen so many closed requests."""

    async def check() -> list[dict[str, Any]]:
        stats = await runtime.stats()
        return stats["aborts"] if len(stats["aborts"]) >= count else []

    return await eventually(check, what="the runtime sees that the request was closed", timeout_s=3)


async def test_a_waiting_job_leaves_without_a_trace_at_the_runtime(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1)})
    await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(stall_after_tokens=1, times=1)
    held = await world.submit("big", tokens=9)
    await held.until_state(State.STREAMING)
    waits = await world.submit("big")

    assert await jobs.cancel(world.store, waits.job_id) == "queued"
    assert (await waits.end()).state is State.CANCELLED
    await jobs.cancel(world.store, held.job_id)
    after = await world.submit("big")
    assert (await after.end()).state is State.DONE
    assert (await runtime.stats())["requests_started"] == 2 + 1, "probe of the wake, the held one, the last one"


@pytest.mark.parametrize(
    ("fault", "state", "step"),
    [
        ({"first_token_delay_ms": 20_000}, State.CLAIMED, "prefill"),
        ({"stall_after_tokens": 2}, State.STREAMING, "decoding"),
    ],
)
async def test_a_held_job_closes_its_request_and_its_slot_settles(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: dict[str, float], state: State, step: str
) -> None:
    """The slot counts as free only when the runtime itself says that nothing runs in it."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.4)
    await world.apply({"big": simulated(maxConcurrent=1)})
    host = await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(**fault, times=1)
    ask = await world.submit("big", tokens=9)
    await ask.until_state(state)
    waits = await world.submit("big")
    claims_while_settling = []
    slots = host.residents.wakers["big"].slots
    settled = slots.settled

    def spy(busy: int, *, asked_s: float) -> bool:
        claims_while_settling.append((len(slots.settling), slots.free, len(slots.using)))
        return settled(busy, asked_s=asked_s)

    monkeypatch.setattr(slots, "settled", spy)
    began = time.monotonic() * 1000
    assert await jobs.cancel(world.store, ask.job_id) == state.value

    found = (await aborted(runtime))[0]
    assert found["at_monotonic_ms"] - began < NOTICED_MS
    assert found["step"] == step
    record = await ask.end()
    assert (record.state, ask.said["code"]) == (State.CANCELLED, "cancelled")
    assert (await waits.end()).state is State.DONE
    assert claims_while_settling[0] == (1, 0, 0), "a job was claimed for a slot that had not settled"
    assert slots.idle


@pytest.fixture
def rare_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed so rarely that no attempt learns of a cancel by that."""
    monkeypatch.setattr(dispatcher, "RENEW_EVERY_S", 60.0)


def heard_by(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the worker hears on its control channel, as it hears it."""
    heard: list[bytes] = []
    told = host.dispatcher.told

    def spy(message: bytes) -> None:
        told(message)
        heard.append(message)

    monkeypatch.setattr(host.dispatcher, "told", spy)
    return heard


@pytest.mark.usefixtures("rare_renewals")
async def test_a_cancel_may_overtake_the_reply_to_the_claim(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They travel on two connections: the worker hears that a job is cancelled which it does not know it holds."""
    await world.apply({"big": simulated(maxConcurrent=1)})
    host = await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(first_token_delay_ms=60_000)
    heard = heard_by(host, monkeypatch)
    claim = lanes.claim

    async def overtaken(*args: Any, **more: Any) -> Claimed:
        claimed = await claim(*args, **more)
        await jobs.cancel(world.store, claimed.record.id)
        await until(lambda: heard, what="the worker is told")
        return claimed

    with monkeypatch.context() as for_now:
        for_now.setattr(lanes, "claim", overtaken)
        ask = await world.submit("big")
        assert (await ask.end()).state is State.CANCELLED
        await until(lambda: not host.dispatcher.busy, what="the attempt stops")

    assert [message.split()[1] for message in heard] == [ask.job_id.encode()]
    await runtime.break_with(first_token_delay_ms=0)
    assert (await (await world.submit("big")).end()).state is State.DONE, "its slot is free again"


@pytest.mark.usefixtures("rare_renewals")
async def test_a_cancel_that_nobody_heard_is_found_when_the_worker_listens_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published while a connection is down is gone, and the next renewal of the lease is seconds away."""
    monkeypatch.setattr(store, "RETRY_PAUSE_S", 1.0)  # long enough to say the cancel in
    await world.apply({"big": simulated(maxConcurrent=1)})
    host = await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(stall_after_tokens=1)
    ask = await world.submit("big", tokens=9)
    await ask.until_state(State.STREAMING)
    heard = heard_by(host, monkeypatch)

    await cut_connection(world, "worker-gpu1-ears")
    assert await jobs.cancel(world.store, ask.job_id) == "streaming"

    await until(lambda: not host.dispatcher.busy, what="the attempt stops")
    assert (await aborted(runtime))[0]["step"] == "decoding"
    assert heard == []


async def cut_connection(world: World, name: str) -> None:
    """Has Redis close the one connection of this name."""
    clients = (await world.store.command("CLIENT", "LIST")).decode().splitlines()
    [number] = [client.split()[0].removeprefix("id=") for client in clients if f" name={name} " in client]
    assert await world.store.command("CLIENT", "KILL", "ID", number) == 1


async def test_a_hang_up_of_the_last_reader_cancels_the_job(world: World) -> None:
    """Its reader detaches and no retry may attach: what runs for nobody is stopped."""
    await world.apply({"big": simulated(maxConcurrent=1)})
    await world.scheduler()
    await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(stall_after_tokens=1)
    ask = await world.submit("big", tokens=9, grace_ms=0)
    await ask.until_state(State.STREAMING)
    began = time.monotonic() * 1000

    await jobs.detach(world.store, ask.job_id, reader=f"test/{ask.job_id}")

    assert (await aborted(runtime))[0]["at_monotonic_ms"] - began < NOTICED_MS
    assert (await ask.end()).state is State.CANCELLED


async def test_many_cancelled_at_once_free_all_their_slots(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.4)
    await world.apply({"big": simulated(maxConcurrent=4, maxQueue=20)})
    host = await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(stall_after_tokens=1, times=4)
    held = [await world.submit("big", tokens=9) for _ in range(4)]
    for ask in held:
        await ask.until_state(State.STREAMING)
    more = [await world.submit("big") for _ in range(6)]
    await asyncio.gather(*(jobs.cancel(world.store, ask.job_id) for ask in held))

    assert {(await ask.end()).state for ask in more} == {State.DONE}
    await until(lambda: host.residents.wakers["big"].slots.idle, what="all slots are free again")
    stats = await runtime.stats()
    assert (stats["max_active"], stats["max_waiting"]) == (4, 0), "a request waited inside the runtime"


async def test_a_llama_server_is_not_asked_about_its_slots_too_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question puts off the moment in which it looks for closed connections, whatever we have to ask it for."""
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.4)
    async with ScriptedLlamaServer().running() as server:
        model = {"backend": "llama.cpp", "model": "weights", "url": server.url, "maxConcurrent": 2}
        await world.apply({"big": model})
        host = await world.host()
        assert (await (await world.submit("big")).end()).state is State.DONE
        big = host.residents.wakers["big"]
        server.mute, server.lingering = True, 1
        ask = await world.submit("big")
        await until(lambda: server.active, what="it generates")
        await jobs.cancel(world.store, ask.job_id)
        asked: list[float] = []

        def asked_often() -> bool:
            big.upkeep._ask_at = 0.0
            big.kick()
            asked[:] = [call.at_s for call in server.calls if call.path == "/slots"]
            return len(asked) >= 5

        await until(asked_often, what="its slots were asked about again and again")
        gaps = [after - before for before, after in pairwise(asked)]
        assert sum(gaps) / len(gaps) >= 0.3, "one may come late, and the next one soon after it"
        assert len(big.slots.settling) == 1
