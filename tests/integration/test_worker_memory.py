"""Two models that do not fit together: who goes, who stays, and what the others hear."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import errors, hosts, jobs, operator
from broker.lifecycle import State
from broker.policy import Model
from broker.records import ModelFacts, ModelOnHost
from tests.support.fake_ollama import FakeOllama
from tests.support.redis_server import RedisServer
from tests.support.worker_world import BOUND_S, ROOT, World, eventually, simulated, until, words, worker_world
from workers import residents, room, waker
from workers.learned import LearnedHere
from workers.memory import HostMemory
from workers.meter import Meter
from workers.nvml import GpuReading
from workers.runtimes import ollama
from workers.runtimes.llama_server import LlamaServer

pytestmark = pytest.mark.real
LIMIT_MB = 1000
LOAD_S = 0.5


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waker, "NO_ROOM_PAUSE_S", 0.3)
    monkeypatch.setattr(residents, "WATCH_EVERY_S", 0.2)


async def resident(world: World) -> set[str]:
    """Which models are in memory; fails when they are too many."""
    found = {name: one.memory_bytes for name, one in world.hosts["gpu1"].residents.wakers.items()}
    running = [name for name, one in world.hosts["gpu1"].residents.wakers.items() if one.runtime._child.running]  # type: ignore[attr-defined]
    assert sum(found.values()) <= LIMIT_MB << 20, found
    assert len(running) <= 1, f"{running} run at once"
    return {name for name, size in found.items() if size}


async def waits_for(world: World, name: str, holder: str) -> None:
    """Waits until a model says whose memory it waits for."""

    async def told() -> bool:
        model = await world.model(name)
        return (model.state, model.reason) == ("cold", f"waits for the memory of {holder}")

    await eventually(told, what=f"{name} waits for {holder}")


async def another_look(one: waker.Waker) -> None:
    """Waits until a model without room has looked for it once more."""
    before = one._no_room_until_s
    await until(lambda: one._no_room_until_s > before, what=f"{one.name} looks for room again")


async def test_an_idle_model_goes_after_its_minimum_stay(world: World) -> None:
    """Not before: who has just been loaded is not thrown out for the next one."""
    stay_ms = 1500
    await world.apply(
        {
            "first": simulated(keepWarm=False, memoryMb=700, minStayMs=stay_ms),
            "second": simulated(keepWarm=False, memoryMb=600, minStayMs=stay_ms),
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    first = await (await world.submit("first")).end()
    warm_at = (await world.model("first")).since

    ask = await world.submit("second")
    await waits_for(world, "second", "first")
    assert await resident(world) == {"first"}
    another = await world.submit("second")  # it is not refused: its turn comes

    record = await ask.end()

    assert (first.state, record.state, (await another.end()).state) == (State.DONE, State.DONE, State.DONE)
    assert record.claimed_at - warm_at >= stay_ms
    assert await resident(world) == {"second"}


async def test_a_busy_model_never_goes(world: World) -> None:
    await world.apply(
        {
            "first": simulated(keepWarm=False, memoryMb=700, minStayMs=0, options={"decodeTps": 20}),
            "second": simulated(keepWarm=False, memoryMb=600, minStayMs=0),
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    runs = await world.submit("first", tokens=40)
    await runs.until_state(State.STREAMING)
    waits = await world.submit("second")
    await waits_for(world, "second", "first")
    assert await resident(world) == {"first"}

    records = await asyncio.gather(runs.end(), waits.end())

    assert runs.text == words(40)
    assert records[1].claimed_at >= records[0].ended_at
    assert await resident(world) == {"second"}


async def test_nobody_goes_for_a_model_whose_file_is_missing(world: World, tmp_path: Path) -> None:
    """Its load fails for certain: it is set aside at once, before anybody makes room for it."""
    missing = {"backend": "llama.cpp", "model": str(tmp_path / "nowhere.gguf"), "memoryMb": 700, "fallback": "first"}
    await world.apply({"first": simulated(memoryMb=600, minStayMs=0), "missing": missing})
    await world.scheduler()
    await world.host(memory_mb=LIMIT_MB)
    warm_since = (await world.until_model("first", "warm")).since

    record = await (await world.submit("missing")).end()

    told = await world.until_model("missing", "quarantined")
    assert "there is no GGUF file at" in told.reason
    assert record.served_by == "first@gpu1"
    assert (await world.model("first")).since == warm_since, "it was evicted"


async def test_two_that_wake_at_once_do_not_both_take_the_same_room(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Each alone would fit: the room that one load was given is not free for the other while it loads. That one waits
    for its turn, and sends nobody away."""
    caplog.set_level(logging.INFO)
    await world.apply(
        {
            name: simulated(keepWarm=False, memoryMb=600, minStayMs=0, options={"coldStartMs": 500})
            for name in ("first", "second")
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    asks = await asyncio.gather(*(world.submit(name) for name in ("first", "second")))
    ends = [asyncio.create_task(ask.end()) for ask in asks]

    async def over() -> bool:
        await resident(world)
        return all(task.done() for task in ends)

    await eventually(over, what="both were served, one after the other")
    assert {task.result().state for task in ends} == {State.DONE}
    assert "to=quarantined" not in caplog.text


async def test_a_model_that_is_in_memory_and_not_yet_called_warm_still_holds_its_room(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What its load showed is noted in between, and that may take a moment: the other one still waits for its turn."""
    caplog.set_level(logging.INFO)
    noted, go_on, note = asyncio.Event(), asyncio.Event(), residents.Residents._loaded

    async def slowly(here: residents.Residents, name: str, load_ms: float, footprint_bytes: int) -> None:
        noted.set()
        await asyncio.wait_for(go_on.wait(), BOUND_S)
        await note(here, name, load_ms, footprint_bytes)

    monkeypatch.setattr(residents.Residents, "_loaded", slowly)
    await world.apply({name: simulated(keepWarm=False, memoryMb=600, minStayMs=0) for name in ("first", "second")})
    host = await world.host(memory_mb=LIMIT_MB)
    ask = await world.submit("first")
    await asyncio.wait_for(noted.wait(), BOUND_S)
    other = await world.submit("second")
    await waits_for(world, "second", "first")
    for _ in range(3):
        one = host.residents.wakers["second"]
        one.kick()
        await until(lambda one=one: not one._kick.is_set(), what="it has looked")  # type: ignore[misc]
        assert (one.state, one.reason) == ("cold", "waits for the memory of first")
    go_on.set()

    assert {(await one.end()).state for one in (ask, other)} == {State.DONE}
    assert "to=quarantined" not in caplog.text


async def test_models_that_are_only_kept_warm_do_not_evict_each_other(world: World) -> None:
    """Otherwise they would swap for ever, with nobody asking. A request decides; without one the first stays."""
    await world.apply({name: simulated(memoryMb=600, minStayMs=100) for name in ("first", "second")})
    host = await world.host(memory_mb=LIMIT_MB)

    async def settled() -> bool:
        states = {(await world.model(name)).state for name in ("first", "second")}
        reasons = {(await world.model(name)).reason for name in ("first", "second")}
        return states == {"warm", "cold"} and any("no idle model that is wanted less" in reason for reason in reasons)

    await eventually(settled, what="one is warm, one says why not")
    [stays] = await resident(world)
    [other] = {"first", "second"} - {stays}
    warm_since = (await world.model(stays)).since

    for _ in range(3):
        await another_look(host.residents.wakers[other])
        assert (await world.model(stays)).since == warm_since
    record = await (await world.submit(other)).end()

    assert record.served_by == f"{other}@gpu1"
    assert await resident(world) == {other}


async def test_who_was_asked_for_last_stays_when_nobody_waits(world: World) -> None:
    """Both were asked for within the last minute, so both are wanted: without this they would swap all that time."""
    await world.apply({name: simulated(keepWarm=False, memoryMb=600, minStayMs=50) for name in ("first", "second")})
    host = await world.host(memory_mb=LIMIT_MB)
    assert (await (await world.submit("first")).end()).served_by == "first@gpu1"
    assert (await (await world.submit("second")).end()).served_by == "second@gpu1"
    warm_since = (await world.model("second")).since

    for _ in range(3):
        await another_look(host.residents.wakers["first"])
        assert (await world.model("second")).since == warm_since
        assert await resident(world) == {"second"}
    words = "first needs 600 MB and 400 MB are free; no idle model that is wanted less can make room"
    told = await world.model("first")
    assert (told.state, told.reason) == ("cold", words)
    assert (await (await world.submit("first")).end()).served_by == "first@gpu1", "who waits decides"


async def test_a_model_that_looks_for_room_in_vain_stays_cold_without_a_word(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It was called waking every five seconds, under a wake lock with a new epoch each time, and said so in three
    lines."""
    caplog.set_level(logging.INFO)
    await world.apply({name: simulated(keepWarm=False, memoryMb=600, minStayMs=50) for name in ("first", "second")})
    first = (await world.host(memory_mb=LIMIT_MB)).residents.wakers["first"]
    await (await world.submit("first")).end()
    await (await world.submit("second")).end()
    epoch = await world.store.command("GET", world.store.keys.wake_epoch("first"))
    caplog.clear()

    for _ in range(3):
        await another_look(first)

    assert await world.store.command("GET", world.store.keys.wake_epoch("first")) == epoch
    said = [r.getMessage() for r in caplog.records if "model=first" in r.getMessage()]
    assert len(said) <= 1 and all("event=no_room" in line for line in said), said


@pytest.mark.parametrize("back", [False, True], ids=["memory is short", "memory came back"])
async def test_a_reason_that_memory_is_short_goes_with_the_wish_for_it(world: World, *, back: bool) -> None:
    """The page and `gateway status` said it for minutes, of a model that nobody asked for any more."""
    await world.apply({name: simulated(keepWarm=False, memoryMb=600, minStayMs=50) for name in ("first", "second")})
    first = (await world.host(memory_mb=LIMIT_MB)).residents.wakers["first"]
    await (await world.submit("first")).end()
    await (await world.submit("second")).end()
    await eventually(lambda: says_short(world, "first"), what="first says that memory is short")
    await world.store.command("HSET", world.store.keys.model("first"), "wanted_until", 0)
    if back:
        await operator.unload(world.store, world.book.active, world.fleet, "second")

    await eventually(lambda: reason_is(world, "first", ""), what="first says nothing any more")
    assert (first.state, first.room_at) == ("cold", 0)


async def says_short(world: World, model: str) -> bool:
    return "400 MB are free" in (await world.model(model)).reason


async def test_a_reason_why_it_is_cold_outlives_the_wish_for_it(world: World) -> None:
    """Only what a model waits for is over when nobody wants it any more."""
    await world.apply({name: simulated(keepWarm=False, memoryMb=600, minStayMs=50) for name in ("first", "second")})
    first = (await world.host(memory_mb=LIMIT_MB)).residents.wakers["first"]
    await (await world.submit("first")).end()
    await world.store.command("HSET", world.store.keys.model("first"), "wanted_until", 0)
    await (await world.submit("second")).end()
    first.kick()
    await until(lambda: not first._kick.is_set(), what="it has looked")

    assert (first.state, first.reason) == ("cold", "made room for second")


async def test_whose_memory_it_waits_for_is_not_said_when_its_job_has_gone(world: World) -> None:
    await world.apply(
        {
            "first": simulated(keepWarm=False, memoryMb=700, minStayMs=60_000),
            "second": simulated(keepWarm=False, memoryMb=600),
        }
    )
    second = (await world.host(memory_mb=LIMIT_MB)).residents.wakers["second"]
    await (await world.submit("first")).end()
    ask = await world.submit("second")
    await waits_for(world, "second", "first")
    await jobs.cancel(world.store, ask.job_id)
    await world.store.command("HSET", world.store.keys.model("second"), "wanted_until", 0)

    await eventually(lambda: reason_is(world, "second", ""), what="second waits for nobody", timeout_s=20)
    assert second.room_at == 0


async def test_a_kept_warm_model_comes_back_when_nobody_wants_the_other(world: World) -> None:
    await world.apply(
        {
            "kept": simulated(memoryMb=600, minStayMs=100),
            "guest": simulated(keepWarm=False, memoryMb=600, minStayMs=100),
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    await world.until_model("kept", "warm")
    assert (await (await world.submit("guest")).end()).served_by == "guest@gpu1"
    assert await resident(world) == {"guest"}
    await world.store.command("HSET", world.store.keys.model("guest"), "wanted_until", "0")

    await world.until_model("kept", "warm")

    assert await resident(world) == {"kept"}


async def test_a_kept_warm_model_does_not_come_back_while_the_other_is_in_use(world: World) -> None:
    """Nor before its minimum stay is over; a long answer is use, however long ago it was asked for."""
    await world.apply(
        {
            "kept": simulated(memoryMb=600, minStayMs=0),
            "guest": simulated(keepWarm=False, memoryMb=600, minStayMs=0, options={"decodeTps": 20}),
        }
    )
    host = await world.host(memory_mb=LIMIT_MB)
    await world.until_model("kept", "warm")
    ask = await world.submit("guest", tokens=50)
    await ask.until_state(State.STREAMING)
    await world.store.command("HSET", world.store.keys.model("guest"), "wanted_until", "0")

    for _ in range(2):
        await another_look(host.residents.wakers["kept"])
        assert (await ask.record()).state is State.STREAMING
        assert await resident(world) == {"guest"}
    record = await ask.end()
    back = await world.until_model("kept", "warm")

    assert (record.state, ask.text) == (State.DONE, words(50))
    assert back.since >= record.ended_at


async def test_of_two_that_are_kept_warm_the_one_that_is_worth_more_comes_back(world: World) -> None:
    await world.apply(
        {
            "coder": simulated(memoryMb=600, minStayMs=50, weight=3),
            "helper": simulated(memoryMb=600, minStayMs=50),
        }
    )
    host = await world.host(memory_mb=LIMIT_MB)
    await world.until_model("coder", "warm", timeout_s=20)
    assert (await (await world.submit("helper")).end()).served_by == "helper@gpu1"
    await world.store.command("HSET", world.store.keys.model("helper"), "wanted_until", "0")

    told = await world.until_model("coder", "warm")
    for _ in range(3):
        await another_look(host.residents.wakers["helper"])
        assert (await world.model("coder")).since == told.since, "the other took its memory again"


async def test_a_model_larger_than_the_machine_says_so(world: World) -> None:
    """It is no failure of the model, and its requests enter the fallback lane without waiting for anything."""
    await world.apply(
        {
            "huge": simulated(keepWarm=False, memoryMb=5000, coldStartBudgetMs=60_000, fallback="small"),
            "alone": simulated(keepWarm=False, memoryMb=4000),
            "small": simulated(memoryMb=100),
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    await world.until_model("small", "warm")
    await until_unfit(world, "huge")
    words = "huge needs 5000 MB; 900 MB are free and the other models could leave 100 MB, of 1000 MB in all"
    await eventually(lambda: reason_is(world, "huge", words), what="the reason names what is there now")
    await world.fleet.look()
    ask = await world.submit("huge")
    record = await ask.end()

    assert (ask.lane, record.served_by, record.promotions) == ("small", "small@gpu1", 0)
    assert (await world.model("huge")).state == "cold"
    facts = await world.store.hash(world.store.keys.model("huge"))
    assert facts.get(b"failures", b"0") == facts.get(b"quarantined_until", b"0") == b"0"
    with pytest.raises(errors.ModelUnavailable, match="alone needs 4000 MB; 900 MB are free"):
        await world.submit("alone")


async def reason_is(world: World, model: str, words: str) -> bool:
    return (await world.model(model)).reason == words


async def until_unfit(world: World, model: str, *, unfit: bool = True) -> ModelOnHost:
    """Waits until the host says that a model cannot fit (or can), and everybody here knows."""

    async def check() -> ModelOnHost | None:
        told = await world.model(model)
        return told if told.unfit is unfit else None

    told = await eventually(check, what=f"unfit of {model} is {unfit}")
    await world.fleet.look()
    return told


class Shared(Meter):
    """A machine of so many MB, on which somebody else takes and gives memory."""

    def __init__(self, total_mb: int) -> None:
        super().__init__(total_mb)
        self.foreign_mb = 0

    def limited(self, occupied: int) -> HostMemory:
        return HostMemory(self.limit_mb << 20, occupied + (self.foreign_mb << 20))  # type: ignore[operator]


async def test_a_model_fits_again_when_somebody_else_gives_memory_back(world: World) -> None:
    """What our own models hold does not make it unfit: they may go. Its waiting requests are served when it fits."""
    await world.apply(
        {
            "big": simulated(keepWarm=False, memoryMb=600, minStayMs=0, fallback="other"),
            "other": simulated(memoryMb=300, minStayMs=0),
        }
    )
    host = await world.host(memory_mb=LIMIT_MB)
    shared = host.residents.footprints._meter = Shared(LIMIT_MB)
    await world.until_model("other", "warm")
    assert not (await world.model("big")).unfit, "other is kept warm, but who waits decides"
    shared.foreign_mb = 500
    told = await until_unfit(world, "big")
    assert told.reason == "big needs 600 MB; 200 MB are free and the other models could leave 300 MB, of 1000 MB in all"
    assert (await (await world.submit("big")).end()).served_by == "other@gpu1"
    shared.foreign_mb = 380
    await until_unfit(world, "big")  # it would fit by a hair: asked again, it says the same
    shared.foreign_mb = 0
    await until_unfit(world, "big", unfit=False)

    assert (await (await world.submit("big")).end()).served_by == "big@gpu1"


async def test_what_a_load_showed_outlives_the_worker(world: World) -> None:
    """Nothing is told of the model but a file of some MB; its first load shows what it takes. After a change of its
    definition that no longer holds."""
    model = {"keepWarm": True, "options": {"memoryMb": 600}}
    await world.apply({"big": simulated(**model)})
    host = await world.host(memory_mb=LIMIT_MB)
    big = host.residents.wakers["big"]
    await host.residents.footprints.inquire(big)
    assert big.memory_bytes or 0 < host.residents.footprints.need(big) < 64 << 20
    told = await world.until_model("big", "warm")
    assert (told.footprint_bytes, told.memory_bytes) == (600 << 20, 600 << 20)
    assert 0 < told.load_ms < 60_000
    await world.leave()

    again = await world.host(memory_mb=500)
    told = await until_unfit(world, "big")
    assert told.reason.startswith("big needs 600 MB; 500 MB are free")
    assert (told.footprint_bytes, again.residents.wakers["big"].memory_bytes) == (600 << 20, 0)
    await world.leave()
    await world.host("gpu2", memory_mb=500)
    assert (await eventually(lambda: told_by(world, "gpu2"), what="gpu2 knows it from gpu1")).unfit
    await world.apply({"big": simulated(**model | {"options": {"memoryMb": 400}})})
    assert (await world.until_model("big", "warm", host="gpu2")).footprint_bytes == 400 << 20


async def told_by(world: World, host: str) -> ModelOnHost | None:
    told = await world.model("big", host)
    return told if told.unfit else None


async def test_a_model_on_another_machine_takes_none_of_this_hosts_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Ollama tells 2 GB; here there is one. It loads all the same, nobody goes for it, and it goes for nobody."""
    monkeypatch.setattr(ollama, "is_local", lambda url: False)
    async with FakeOllama("qwen:32b").running() as server:
        away = {"backend": "ollama", "model": "qwen:32b", "url": server.url, "keepWarm": True, "minStayMs": 0}
        await world.apply({"away": away, "here": simulated(keepWarm=False, memoryMb=700)})
        host = await world.host(memory_mb=LIMIT_MB)
        told = await world.until_model("away", "warm")
        assert (told.memory_bytes, told.unfit, host.residents.footprints.memory().used) == (0, False, 0)
        assert (await (await world.submit("here")).end()).served_by == "here@gpu1"
        assert host.residents.footprints.memory().used == 700 << 20
        assert (await world.model("away")).state == "warm"


async def test_where_a_runtime_cannot_tell_the_policys_figure_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a vLLM that tells nothing would be free, and nobody could ask for its memory."""

    async def tells_nothing(self: ollama.Ollama, *, of_gpus: bool = False) -> None:
        return None

    monkeypatch.setattr(ollama.Ollama, "memory_bytes", tells_nothing)
    async with FakeOllama("qwen:32b").running() as server:
        mute = {"backend": "ollama", "model": "qwen:32b", "url": server.url, "memoryMb": 600, "minStayMs": 0}
        await world.apply({"mute": mute, "other": simulated(keepWarm=False, memoryMb=700)})
        host = await world.host(memory_mb=LIMIT_MB)
        assert (await (await world.submit("mute")).end()).served_by == "mute@gpu1"
        assert host.residents.footprints.memory().used == 600 << 20
        assert (await (await world.submit("other")).end()).served_by == "other@gpu1"
        assert host.residents.footprints.memory().used == 700 << 20, "mute went for it"


async def test_a_model_that_goes_by_itself_or_is_just_loaded_is_not_unloaded_for_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was chosen to go while it was idle; until its turn to go came it had begun to leave, or was woken anew. A
    second unload would end under its next wake, and one in the last moment of a wake leaves a model that is warm and
    not there."""
    steps: list[str] = []
    last_moment, goes, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    unload, note_load = LlamaServer.unload, LearnedHere.note_load

    async def slow_unload(self: LlamaServer) -> None:
        steps.append("unload")
        goes.set()
        await go_on.wait()
        await unload(self)

    async def slow_note(self: LearnedHere, name: str, model: Model, **learned: Any) -> None:
        last_moment.set()
        await go_on.wait()
        await note_load(self, name, model, **learned)

    monkeypatch.setattr(LlamaServer, "unload", slow_unload)
    monkeypatch.setattr(LearnedHere, "note_load", slow_note)
    await world.apply({"big": simulated(memoryMb=600)})
    host = await world.host(memory_mb=LIMIT_MB)
    await asyncio.wait_for(last_moment.wait(), BOUND_S)
    assert not await asyncio.wait_for(host.residents._unload("big", "other"), BOUND_S)
    go_on.set()
    await world.until_model("big", "warm")
    assert steps == []

    go_on.clear()
    leaves = asyncio.create_task(host.residents.wakers["big"].unload_by_hand())
    await asyncio.wait_for(goes.wait(), BOUND_S)
    assert await asyncio.wait_for(host.residents._unload("big", "other"), BOUND_S)
    go_on.set()
    await leaves
    assert steps == ["unload"]


async def test_a_model_that_is_found_in_memory_teaches_nothing_of_loads(world: World) -> None:
    """An Ollama keeps its models while our worker restarts. Were the second wake a load, the model would be predicted
    to come back within milliseconds from then on, and nobody who waits for it would be promoted in time."""
    async with FakeOllama("qwen:32b").running() as server:
        await world.apply({"big": {"backend": "ollama", "model": "qwen:32b", "url": server.url, "keepWarm": True}})
        server.hold_loads()
        await world.host("gpu1")
        await asyncio.wait_for(server.load_seen.wait(), BOUND_S)
        asyncio.get_running_loop().call_later(LOAD_S, server.release_loads)
        first = await world.until_model("big", "warm")
        await world.leave("gpu1")
        assert first.load_ms >= LOAD_S * 900

        for host in ("gpu1", "gpu2"):
            await world.host(host)
            again = await world.until_model("big", "warm", host=host)
            assert again.load_ms == (first.load_ms if host == "gpu1" else 0)
            await world.fleet.look()
            assert world.fleet.picture.facts["big"].load_ms == first.load_ms
            await world.leave(host)
        assert server.loads_started == ["qwen:32b"]


async def test_a_model_that_loads_while_redis_goes_away_is_warm_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in memory, whoever could write that down. Called cold, nobody would ever unload it again: if nobody asks
    for it any more, its memory would be lost to all others."""
    note_load, away = LearnedHere.note_load, asyncio.Event()

    async def nobody_hears(self: LearnedHere, name: str, model: Model, **learned: Any) -> None:
        if name == "big" and not away.is_set():
            away.set()
            await jobs.cancel(world.store, ask.job_id)
            await hosts.learn(world.store, "big", wanted_until=0)
            await host._fleet.look()  # else what was known before the outage would still count
            for job in list(host._picture.waiting(["big"])):
                host._picture.spend(job)
            raise errors.BrokerUnavailable("redis is away for a moment")
        await note_load(self, name, model, **learned)

    monkeypatch.setattr(LearnedHere, "note_load", nobody_hears)
    await world.apply(
        {
            "big": simulated(keepWarm=False, memoryMb=700, minStayMs=0),
            "other": simulated(keepWarm=False, memoryMb=600, minStayMs=0),
        }
    )
    host = await world.host(memory_mb=LIMIT_MB)
    ask = await world.submit("big")
    await asyncio.wait_for(away.wait(), BOUND_S)
    await world.until_model("big", "warm")
    assert (await (await world.submit("other")).end()).served_by == "other@gpu1"
    assert await resident(world) == {"other"}


async def test_a_redis_that_is_away_as_a_wake_begins_is_no_failure_of_the_model(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier life has learned cannot be read just then: it is tried again, and nobody is set aside for it."""
    recall, hold, quarantine = LearnedHere.recall, residents.Residents._room_for, waker.Waker._set_aside
    wakes: list[waker.Waker] = []
    set_aside: list[str] = []

    async def away(self: LearnedHere, name: str) -> None:
        if len(wakes) == 1 and wakes[0].state == "waking":
            raise errors.BrokerUnavailable("redis is away for a moment")
        await recall(self, name)

    def begins(self: residents.Residents, name: str, demanded: bool) -> Any:
        wakes.append(self.wakers[name])
        return hold(self, name, demanded)

    async def noted(self: waker.Waker, words: str, *, tried: bool = True) -> None:
        set_aside.append(words)
        await quarantine(self, words, tried=tried)

    monkeypatch.setattr(LearnedHere, "recall", away)
    monkeypatch.setattr(residents.Residents, "_room_for", begins)
    monkeypatch.setattr(waker.Waker, "_set_aside", noted)
    await world.apply({"big": simulated(memoryMb=100)})
    await world.host(memory_mb=LIMIT_MB)
    await world.until_model("big", "warm")
    assert len(wakes) > 1 and set_aside == []


@pytest.mark.parametrize(("total_gb", "held_gb"), [(24, 22), (0, 31)])
async def test_of_a_model_that_lies_in_both_memories_the_part_counts_that_is_in_ours(
    world: World, monkeypatch: pytest.MonkeyPatch, total_gb: int, held_gb: int
) -> None:
    """An Ollama puts what the GPUs have no room for into the system's memory. Were all of it said to be on the GPUs,
    the model could never be loaded a second time: 31 GB do not fit into 24."""
    monkeypatch.setattr(Meter, "gpus", lambda self: GpuReading(total=total_gb << 30, used=1 << 30))
    async with FakeOllama("qwen:32b").running() as server:
        server.ps_size, server.ps_vram = 31 << 30, 22 << 30
        await world.apply({"big": {"backend": "ollama", "model": "qwen:32b", "url": server.url, "keepWarm": True}})
        await world.host()
        told = await world.until_model("big", "warm")
        assert (told.memory_bytes, told.footprint_bytes) == (held_gb << 30, held_gb << 30)


RUNS_OUT = """
import os, sys
if os.path.exists(sys.argv[1]):
    sys.exit("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory")
os.execv(sys.executable, [sys.executable, "-P", "-m", "workers.runtimes.simulated_server", *sys.argv[2:]])
"""


async def test_a_load_that_runs_out_of_memory_makes_all_the_room_there_is_and_tries_once_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prediction was too low, so nobody had to go at first. The card is full for as long as `idle` lives."""
    monkeypatch.setattr(room, "ROOM_STILL_S", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "runs_out.py"
    script.write_text(RUNS_OUT)
    pidfile = world.state_dir() / "idle.pid"
    command = [sys.executable, str(script), str(pidfile), "--port", "{port}", "--model", "pretend"]
    await world.apply(
        {
            "idle": simulated(keepWarm=False, memoryMb=300, minStayMs=0),
            "low": {"backend": "llama.cpp", "model": "x", "command": command, "memoryMb": 10, "minStayMs": 0},
        }
    )
    await world.host(memory_mb=LIMIT_MB)
    assert (await (await world.submit("idle")).end()).served_by == "idle@gpu1"
    record = await (await world.submit("low")).end()

    assert (record.served_by, record.state) == ("low@gpu1", State.DONE)
    facts = await world.store.hash(world.store.keys.model("low"))
    assert facts.get(b"failures", b"0") == b"0", "not even quarantined for a moment"


ALWAYS_OUT = """
import pathlib, sys
pathlib.Path(sys.argv[1]).touch()
sys.exit("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory")
"""


async def test_a_load_that_runs_out_of_memory_and_then_finds_no_room_has_failed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the memory meanwhile. It was tried, so it counts among the five in an hour, and is not asked
    again every few seconds like one for which there was no room from the start."""
    tried = tmp_path / "tried"
    script = tmp_path / "always_out.py"
    script.write_text(ALWAYS_OUT)

    def limited(self: Meter, occupied: int) -> HostMemory:
        return HostMemory(LIMIT_MB << 20, (LIMIT_MB << 20) if tried.exists() else occupied, source="limit")

    monkeypatch.setattr(Meter, "limited", limited)
    monkeypatch.setattr(room, "ROOM_STILL_S", 0.3)
    monkeypatch.setattr(residents, "WATCH_EVERY_S", 60.0)  # else it is soon called unfit as well
    command = [sys.executable, str(script), str(tried), "--port", "{port}"]
    low = {"backend": "llama.cpp", "model": "x", "command": command, "memoryMb": 10}
    await world.apply({"low": low})
    await world.host(memory_mb=LIMIT_MB)
    await world.submit("low")

    async def failed() -> ModelFacts | None:
        facts = ModelFacts.from_hash(await world.store.hash(world.store.keys.model("low")))
        return facts if facts.failed_at else None

    facts = await eventually(failed, what="the load counts as failed")
    assert (facts.failures, len(json.loads(facts.failed_at))) == (1, 1)
    assert facts.failure.startswith("low needs 10 MB and 0 MB are free")
