"""A cold model that many ask for at once is loaded once, and stays loaded once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker.lifecycle import State
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, simulated, worker_world

pytestmark = pytest.mark.real

AFTER_S = 10.0
"""A second load would come late: a lock that ran out, a keep-warm wish of the other host, a picture that was old."""


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_sixty_at_once_on_two_hosts_are_one_load_also_ten_seconds_later(world: World, tmp_path: Path) -> None:
    load_log = tmp_path / "loads"
    options = {"coldStartMs": 1500, "loadLog": str(load_log)}
    await world.apply({"big": simulated(keepWarm=True, maxConcurrent=4, maxQueue=60, options=options)})
    workers = [world.process("workers.host", name) for name in ("gpu1", "gpu2")]
    for name in ("gpu1", "gpu2"):
        await world.until_host(name)
    asks = await asyncio.gather(*(world.submit("big") for _ in range(60)))
    records = await asyncio.gather(*(ask.end(timeout_s=30) for ask in asks))
    assert {record.state for record in records} == {State.DONE}
    assert len(load_log.read_text().splitlines()) == 1
    await asyncio.sleep(AFTER_S)
    assert (await (await world.submit("big")).end()).state is State.DONE
    assert len(load_log.read_text().splitlines()) == 1
    for worker in workers:
        worker.terminate()
    assert [await worker.exit() for worker in workers] == [0, 0]
