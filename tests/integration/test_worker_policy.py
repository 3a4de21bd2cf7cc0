"""A policy that changes while the worker is at work: nothing that waits or runs is dropped."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from broker import errors, hosts, store
from broker.lifecycle import State
from tests.support.broker_world import a_later_version_applies
from tests.support.redis_server import RedisServer
from tests.support.worker_world import Ask, World, eventually, simulated, until, words, worker_world
from workers import chores

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def keys_of(world: World, model: str) -> set[str]:
    names = world.store.keys
    patterns = [names.lane(model), names.lane(model + ".batch"), names.model(model), names.wake_epoch(model)]
    return {key for pattern in patterns async for key in world.store.scan(pattern)}


async def test_a_new_model_is_served_within_a_second(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lane is not in the blocking read that is under way: its first job must not wait for that to end."""
    monkeypatch.setattr(store, "BLOCK_MS", 6000)
    await world.apply({"old": simulated()})
    await world.warm_host()

    began = time.monotonic()
    await world.apply({"old": simulated(), "new": simulated()})
    await world.until_model("new", "warm", "waking", "cold", timeout_s=1)
    known_s = time.monotonic() - began
    await world.until_model("new", "warm")
    asked = time.monotonic()
    ask = await world.submit("new")
    record = await ask.end()

    assert record.served_by == "new@gpu1"
    assert known_s < 1
    assert time.monotonic() - asked < 1
    told = await hosts.read(world.store, "gpu1")
    assert told is not None and told.policy_version == world.book.active.version


async def test_a_lowered_budget_drains_and_never_trims(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=6)})
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=500, times=1)
    asks = [await world.submit("big") for _ in range(7)]
    await world.apply({"big": simulated(maxConcurrent=1, maxQueue=2)})
    assert await world.waiting("big") == 6
    with pytest.raises(errors.LaneFull):
        await world.submit("big")

    records = await asyncio.gather(*(ask.end() for ask in asks))

    assert {(record.state, record.attempt) for record in records} == {(State.DONE, 1)}


async def test_a_removed_model_with_a_fallback_promotes_what_waits(world: World) -> None:
    small = simulated(maxConcurrent=2, maxQueue=20)
    await world.apply({"big": simulated(maxConcurrent=1, coldStartBudgetMs=60_000, fallback="small"), "small": small})
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=1500, times=1)
    held = await world.submit("big")
    await held.until_state(State.CLAIMED)
    asks = [await world.submit("big") for _ in range(4)]

    await world.apply({"small": small})

    with pytest.raises(errors.UnknownModel):
        await world.submit("big")
    records = await asyncio.gather(*(ask.end() for ask in asks))
    assert {(record.served_by, record.promotions) for record in records} == {("small@gpu1", 1)}
    assert (await held.end()).served_by == "big@gpu1", "what ran was dropped"
    await gone(world, "big")


async def test_a_removed_model_without_a_fallback_is_served_from_its_last_definition(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=1), "small": simulated()})
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=700, times=1)
    asks = [await world.submit("big") for _ in range(3)]

    await world.apply({"small": simulated()})
    records = await asyncio.gather(*(ask.end() for ask in asks))

    assert {record.served_by for record in records} == {"big@gpu1"}
    await gone(world, "big")


async def gone(world: World, model: str) -> None:
    """What a removed model leaves behind goes with the next chores, and its runtime with its worker's next look."""
    pid = world.runtime(model).pid
    await chores.sweep(world.store, world.book)
    await chores.forget(world.store, world.book)
    assert not world.book.active.retiring

    async def check() -> bool:
        return model not in world.hosts["gpu1"].residents.wakers and not psutil.pid_exists(pid)

    await eventually(check, what=f"the worker lets {model} go")
    await chores.forget(world.store, world.book)
    assert await keys_of(world, model) == set()


async def test_a_changed_runtime_is_reloaded_only_when_idle(world: World, tmp_path: Path) -> None:
    load_log = tmp_path / "loads"
    before: dict[str, Any] = {"decodeTps": 40, "loadLog": str(load_log)}
    await world.apply({"big": simulated(maxConcurrent=1, options=before)})
    await world.warm_host()
    ask = await world.submit("big", tokens=40)
    await ask.until_state(State.STREAMING)

    await world.apply({"big": simulated(maxConcurrent=2, options=before | {"answerTokens": 5})})
    record = await ask.end()

    assert (record.state, record.attempt, ask.text) == (State.DONE, 1, words(40))

    async def reloaded() -> bool:
        return (await world.model("big")).slots_total == 2 and (await world.model("big")).state == "warm"

    await eventually(reloaded, what="the model runs by its new definition")
    assert len(load_log.read_text().splitlines()) == 2
    await world.apply(
        {"big": simulated(maxConcurrent=2, maxQueue=3, minStayMs=7, options=before | {"answerTokens": 5})}
    )
    host = world.hosts["gpu1"]

    async def followed() -> bool:
        return host.residents.wakers["big"].model.min_stay_ms == 7

    await eventually(followed, what="a change that needs no reload is followed")
    assert (await world.model("big")).state == "warm"
    assert len(load_log.read_text().splitlines()) == 2


async def test_what_needs_no_reload_holds_at_once(world: World) -> None:
    """A limit that protects from a stuck answer must not wait until the stuck answer is over."""
    await world.apply({"big": simulated(maxConcurrent=2, stallTimeoutMs=60_000)})
    await world.warm_host()
    await world.runtime("big").break_with(stall_after_tokens=1)
    stuck = await world.submit("big", tokens=9)
    await stuck.until_state(State.STREAMING)
    await world.apply({"big": simulated(maxConcurrent=2, stallTimeoutMs=300)})
    host = world.hosts["gpu1"]

    async def followed() -> bool:
        return host.residents.wakers["big"].model.stall_timeout_ms == 300

    await eventually(followed, what="the new limit", timeout_s=2)
    assert (await (await world.submit("big", tokens=9)).end()).error_message == "the runtime was silent for 0.3 s"
    assert (await stuck.record()).state is State.STREAMING


async def test_a_model_that_is_removed_twice_before_it_is_idle_goes_once(world: World) -> None:
    keeps = {"small": simulated()}
    await world.apply(keeps | {"big": simulated(maxConcurrent=1)})
    host = await world.warm_host()
    with_it = world.book.active
    await world.apply(keeps)
    await until(lambda: host._book.active.version == world.book.active.version, what="the host follows")
    without = replace(world.book.active, retiring={})
    host.residents.wakers["big"].slots.take("somebody")
    for active in (without, with_it, without):
        host.residents.follow(active)
    host.residents.wakers["big"].slots.give_back("somebody", clean=True, now_s=0)

    await until(lambda: "big" not in host.residents.wakers, what="it is gone")

    assert (await (await world.submit("small")).end()).state is State.DONE
    await until(
        lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "let go big"], what="nobody waits for it"
    )
    assert (await (await world.submit("small")).end()).state is State.DONE


async def test_thirty_applies_a_second_drop_nothing(world: World) -> None:
    """Budgets change, and a model comes and goes, while forty clients ask for answers: six times each, and on until
    the policy has changed twenty times, however slow the machine."""
    await world.apply(definitions(0))
    await world.scheduler()
    await world.warm_host()
    done = asyncio.Event()
    asks: list[Ask] = []
    changes = 0

    async def change() -> None:
        nonlocal changes
        while not done.is_set():
            changes += 1
            await world.apply(definitions(changes))
            try:
                await asyncio.wait_for(done.wait(), 1 / 30)
            except TimeoutError:
                continue

    async def client(model: str) -> None:
        rounds = 0
        while rounds < 6 or changes < 20:
            rounds += 1
            try:
                ask = await world.submit(model, tokens=8)
            except (errors.LaneFull, errors.UnknownModel, errors.ModelUnavailable):
                seen = changes
                await until(lambda: changes > seen, what="the policy's next change")  # noqa: B023
                continue
            asks.append(ask)
            await ask.end(20)

    changing = asyncio.create_task(change())
    await asyncio.gather(*(client(model) for model in ["big"] * 15 + ["small"] * 15 + ["fleeting"] * 10))
    done.set()
    await changing
    records = [await ask.record() for ask in asks]

    assert changes >= 20
    assert len(asks) > 100
    assert {record.state for record in records} == {State.DONE}
    assert {ask.text for ask in asks} == {words(8)}
    assert {record.losses for record in records} == {0}
    await world.apply(definitions(0))
    await world.until_model("fleeting", "warm")
    assert (await (await world.submit("fleeting")).end()).served_by == "fleeting@gpu1"


def definitions(number: int) -> dict[str, dict[str, Any]]:
    options = {"decodeTps": 150}
    models = {
        "big": simulated(maxConcurrent=4, maxQueue=20 + number % 7, fallback="small", options=options),
        "small": simulated(maxConcurrent=4, maxQueue=40 + number % 5, options=options),
    }
    if number % 4 != 3:
        models["fleeting"] = simulated(maxConcurrent=2, maxQueue=20, fallback="small")
    return models


async def unread(world: World, version: int) -> None:
    async def check() -> bool:
        told = await hosts.read(world.store, "gpu1")
        return told is not None and told.policy_unread == version

    await eventually(check, what=f"gpu1 tells {version} as the policy that it cannot read")


async def beats(world: World) -> None:
    """Waits until gpu1 has told of itself anew, a whole time after this."""
    since = await world.store.now_ms() + 1_000

    async def check() -> bool:
        told = await hosts.read(world.store, "gpu1")
        return told is not None and told.beat_at > since

    await eventually(check, what="gpu1 tells of itself")


async def test_a_worker_that_cannot_read_the_active_policy_claims_nothing_until_it_can(world: World) -> None:
    """A newer part applied it: what runs here goes on, what waits is another host's, and the host says why."""
    await world.apply({"big": simulated(maxConcurrent=2), "idle": simulated(keepWarm=False)})
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=1500, times=1)
    runs = await world.submit("big")
    await runs.until_state(State.CLAIMED)

    await a_later_version_applies(world.store)
    await unread(world, 2)
    world.book._active = replace(world.book.active, version=2)  # as a newer part reads it
    waits = [await world.submit(model) for model in ("big", "idle")]
    assert (await runs.end()).state is State.DONE
    await beats(world)
    assert [(await ask.record()).state for ask in waits] == [State.QUEUED] * 2
    await world.fleet.look()
    assert world.fleet.view("big").availability == "unavailable"
    assert (await world.model("idle")).state == "cold"

    await world.book.rollback(1)
    records = await asyncio.gather(*(ask.end() for ask in waits))
    assert {record.state for record in records} == {State.DONE}
    await unread(world, 0)


async def test_a_worker_that_starts_beside_such_a_policy_stays_and_serves_the_next(world: World) -> None:
    await world.apply({"big": simulated()})
    await a_later_version_applies(world.store)
    starts = asyncio.create_task(world.host(), name="starts")
    await unread(world, 2)
    await world.scheduler()
    await world.book.rollback(1)
    await starts
    assert (await (await world.submit("big")).end()).state is State.DONE
