"""Redis away for a while: answers under way survive byte for byte, and nobody is judged before they could speak."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from broker import errors
from broker.lifecycle import State
from broker.store import Store
from broker.wire import LATE_LOOK_S, LOOK_EVERY_S, Wire
from tests.chaos.parts import Parts, parts
from tests.chaos.storm import Ledger, ends, watched
from tests.support.clients import Told, ask, user
from tests.support.redis_server import RedisServer, start_server
from tests.support.worker_world import policy, simulated, words

pytestmark = pytest.mark.real

CALM = policy(
    {"calm": simulated(maxConcurrent=8, maxQueue=32, memoryMb=1, options={"decodeTps": 20, "prefillTps": 2000})},
    headerHoldMs=1000,
)


async def stopped(house: Parts, seconds: float) -> None:
    """Redis hangs: connections stay open and nothing answers."""
    os.kill(house.redis.pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    os.kill(house.redis.pid, signal.SIGCONT)


async def killed(house: Parts, seconds: float) -> None:
    """Redis is gone: connections are refused until it is there again with its data."""
    house.redis.kill()
    await asyncio.sleep(seconds)
    await asyncio.to_thread(house.redis.start)


def body(tokens: int, *, stream: bool) -> dict[str, object]:
    return {"model": "calm", "messages": user("go on"), "max_tokens": tokens, "stream": stream}


@asynccontextmanager
async def outage_house(directory: Path) -> AsyncIterator[tuple[Parts, Ledger]]:
    async with parts(directory, CALM, "api1", "scheduler1", "worker1") as house:
        await house.until_warm("calm")
        async with watched(house.redis.url) as ledger:
            yield house, ledger


async def survive(house: Parts, ledger: Ledger, *, seconds: float, how: object) -> None:
    """Six answers run and as many requests come in while Redis is away; all of them are served whole."""
    tokens = int((seconds + 4) * 20)
    async with httpx.AsyncClient(timeout=90.0) as http, asyncio.TaskGroup() as tasks:
        early = [tasks.create_task(ask(http, house.url, body(tokens, stream=i % 2 == 0))) for i in range(6)]
        await asyncio.sleep(2.0)
        away = tasks.create_task(how(house, seconds))  # type: ignore[operator]
        await asyncio.sleep(0.5)
        late = [tasks.create_task(ask(http, house.url, body(10, stream=i % 2 == 0))) for i in range(4)]
    await away
    await ledger.settled()
    began = [task.result() for task in early]
    whole(began)
    for told in began:
        job = ledger.jobs[told.job_id]
        assert (job.attempt, job.losses) == (1, 0), "it was judged while nobody could renew"
    came = [task.result() for task in late]
    refused = [told for told in came if told.outcome == "refused"]
    assert all(told.code == "broker_unavailable" and told.retry_after for told in refused), refused
    whole([told for told in came if told not in refused])
    if seconds < 4:
        assert not refused, refused
    assert not ledger.found, ledger.found
    assert set(ends(ledger)) == {"done"}, ends(ledger)


def whole(told: list[Told]) -> None:
    """Every word, once and in order."""
    for one in told:
        assert one.served, one
        assert one.text == words(one.asked["max_tokens"]), one.text


async def hangs_for_three_seconds(directory: Path) -> None:
    """Shorter than anybody's patience: also those who come meanwhile are served."""
    async with outage_house(directory) as (house, ledger):
        await survive(house, ledger, seconds=3.0, how=stopped)


async def is_away_for_longer_than_a_lease(directory: Path) -> None:
    """Twelve seconds: every lease has ended when it comes back, and still nobody has been lost."""
    async with outage_house(directory) as (house, ledger):
        await survive(house, ledger, seconds=12.0, how=killed)


async def hides_the_death_of_a_worker(directory: Path) -> None:
    """Patience with the living ends one lease after Redis came back: the dead one's clients are told then."""
    async with outage_house(directory) as (house, ledger), httpx.AsyncClient(timeout=90.0) as http:
        reading = asyncio.create_task(ask(http, house.url, body(2000, stream=True)), name="reader")
        await asyncio.sleep(1.5)
        house.redis.kill()
        house.kill("worker1")
        await asyncio.sleep(1.0)
        await asyncio.to_thread(house.redis.start)
        back_at = time.monotonic()
        told = await asyncio.wait_for(reading, 30)
        assert (told.outcome, told.code) == ("told", "worker_lost"), told
        assert told.saw_some
        assert 9.0 < told.ended_at - back_at < 14.0
        await ledger.settled()
        assert [job.state for job in ledger.jobs.values()] == [State.FAILED]
        assert not ledger.found, ledger.found


async def test_redis_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Three gateways, three outages, side by side because most of it is waiting."""
    async with asyncio.TaskGroup() as tasks:
        for scene in (hangs_for_three_seconds, is_away_for_longer_than_a_lease, hides_the_death_of_a_worker):
            (directory := tmp_path / scene.__name__).mkdir()
            tasks.create_task(scene(directory), name=scene.__name__)


async def test_a_redis_that_hangs_is_not_left_with_connections() -> None:
    """Each try to reach it connects, since the kernel answers for it; what comes of none of them is closed again."""
    redis = start_server()
    try:
        os.kill(redis.pid, signal.SIGSTOP)
        for _ in range(2):
            wire = Wire(redis.url, name="patient")
            with pytest.raises(errors.BrokerUnavailable, match=r"does not answer at .*: timed out"):
                await wire.open()
            await wire.close()
        os.kill(redis.pid, signal.SIGCONT)
        store = await Store.open(redis.url, name="looks")
        try:
            for _ in range(3):  # by the first answer it has heard of everything that came before
                clients = await store.command("CLIENT", "LIST")
            assert b"name=patient" not in clients
        finally:
            await store.close()
    finally:
        redis.close()


async def test_a_process_that_slept_does_not_take_redis_for_dead(redis_server: RedisServer) -> None:
    """A machine that was suspended, or a loop that somebody held up: the command has not even left by then."""
    loop = asyncio.get_running_loop()
    wire = Wire(redis_server.url, name="sleeper", reply_timeout_s=0.2)
    await wire.open()
    asked = asyncio.create_task(wire.call("PING"))
    await asyncio.sleep(0)
    wakes_at = loop.time() + LOOK_EVERY_S + 2 * LATE_LOOK_S
    while loop.time() < wakes_at:
        pass
    assert await asked == b"PONG" and wire.alive
    await wire.close()


@pytest.mark.long
@pytest.mark.parametrize(("how", "seconds"), [(stopped, 12.0), (killed, 3.0), (stopped, 25.0), (killed, 25.0)])
async def test_other_outages(how: object, seconds: float, tmp_path: Path) -> None:
    async with outage_house(tmp_path) as (house, ledger):
        await survive(house, ledger, seconds=seconds, how=how)
