"""A model that is kept warm by the clock, with a real worker and hours around a clock that the test sets."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import pytest_asyncio

from broker.hosts import NOT_FOR_BATCH
from broker.lifecycle import State
from tests.support.redis_server import RedisServer
from tests.support.waiting import until
from tests.support.worker_world import World, simulated, worker_world
from workers.host import Host

pytestmark = pytest.mark.real
HOUR_MS = 3_600_000


def nine_on_a_monday() -> int:
    """09:00 in Berlin on the Monday after the clocks go forward next year: after every instant that Redis tells."""
    berlin = ZoneInfo("Europe/Berlin")
    day = datetime(datetime.now(UTC).year + 1, 3, 31, 9, tzinfo=berlin)
    while day.weekday() != 6:
        day -= timedelta(days=1)
    return round((day + timedelta(days=1)).timestamp() * 1000)


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_a_model_is_warm_in_its_hours_and_only_on_demand_outside_them(world: World) -> None:
    await world.apply({"big": simulated(activeHours="Mon-Fri 08:00-19:00 Europe/Berlin", idleUnloadMs=300)})
    nine = nine_on_a_monday()
    clock = {"now": nine - 2 * HOUR_MS}

    async def now_ms() -> int:
        return clock["now"]

    host = await world.host()
    waker = host.residents.wakers["big"]
    waker._demand._now_ms = now_ms
    await world.until_model("big", "cold")

    clock["now"] = nine
    waker.kick()
    await world.until_model("big", "warm")
    used = await (await world.submit("big")).end()
    assert used.served_by == "big@gpu1"

    clock["now"] = nine + 11 * HOUR_MS
    told = await world.until_model("big", "cold")
    assert told.reason == "idle"

    asked = await (await world.submit("big")).end()
    assert asked.state is State.DONE, "it is woken like any other"
    told = await world.until_model("big", "cold")
    assert told.reason == "idle"

    clock["now"] = nine + 23 * HOUR_MS  # Tuesday
    await world.until_model("big", "warm")


async def known(host: Host, lane: str) -> None:
    """Waits until the worker knows of a job that waits in the lane."""
    picture = host.residents._picture
    await until(lambda: picture.anyone_waits([lane]), what=f"a job in {lane}")


async def test_batch_work_waits_for_a_model_that_it_may_not_wake(world: World) -> None:
    """It says so, and is served as soon as somebody else has it warm."""
    await world.apply({"big": simulated(keepWarm=False, wakeForBatch=False)})
    host = await world.host()
    batch = await world.submit("big", priority="batch", mode="async")
    await known(host, "big.batch")
    assert not host.residents._waited_for("big")
    await world.fleet.look()
    view = world.fleet.view("big.batch")
    assert (view.availability, view.reason) == ("cold", NOT_FOR_BATCH)
    assert world.fleet.picture.waiting["big.batch"] == 1
    assert world.fleet.view("big").reason == "" and world.fleet.picture.facts["big"].wanted_until == 0

    asked = await (await world.submit("big")).end()
    assert asked.state is State.DONE
    assert (await batch.end()).state is State.DONE


async def test_batch_work_wakes_it_outside_of_its_hours_only(world: World) -> None:
    """What came by day wakes it in the evening."""
    hours = "Mon-Fri 08:00-19:00 Europe/Berlin"
    await world.apply({"big": simulated(keepWarm=False, wakeForBatch="outsideHours", activeHours=hours)})
    clock = {"now": nine_on_a_monday()}
    host = await world.host()
    for fleet in (host.residents._fleet, world.fleet):
        fleet.now_ms = lambda: clock["now"]  # type: ignore[method-assign]
    batch = await world.submit("big", priority="batch", mode="async")
    await known(host, "big.batch")
    assert not host.residents._waited_for("big")
    await world.fleet.look()
    assert world.fleet.picture.facts["big"].wanted_until == 0

    clock["now"] += 11 * HOUR_MS
    assert (await batch.end()).state is State.DONE
