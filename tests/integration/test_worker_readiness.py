"""What a worker makes of its runtimes: what it calls warm, and what happens to jobs when one breaks."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from broker import errors
from broker.lifecycle import State
from broker.records import ModelFacts
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, words, worker_world
from workers import quarantine, readiness, upkeep

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def facts(world: World, model: str) -> ModelFacts:
    return ModelFacts.from_hash(await world.store.hash(world.store.keys.model(model)))


async def dead_letters(world: World) -> list[str]:
    entries = await world.store.command("XRANGE", world.store.keys.dead, "-", "+")
    return [dict(zip(values[::2], values[1::2], strict=True))[b"job"].decode() for _, values in entries]


@pytest.mark.parametrize("fault", ["ready_but_mute", "never_first_token"])
async def test_a_server_that_answers_but_makes_no_token_is_never_warm(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Port and /health prove nothing: jobs wait or go elsewhere until a first token was seen."""
    monkeypatch.setattr(readiness, "PROBE_LEAST_S", 0.2)
    monkeypatch.setattr(quarantine, "FIRST_S", 1.0)
    await world.apply(
        {
            "big": simulated(
                firstTokenBudgetMs=50, coldStartBudgetMs=60_000, fallback="small", options={"coldStartMs": 500}
            ),
            "small": simulated(),
        }
    )
    await world.scheduler()
    host = await world.host()
    await world.until_model("big", "waking")
    await world.until_model("small", "warm")
    ask = await world.submit("big")
    assert ask.lane == "big"
    breaking = asyncio.create_task(keep_broken(world, "big", **{fault: True}))
    told = await world.until_model("big", "quarantined")

    assert "no token within 0.2 s" in told.reason
    record = await ask.end()
    assert (record.served_by, record.promotions) == ("small@gpu1", 1)
    assert (await world.submit("big")).lane == "small"

    async def failed_twice() -> bool:
        return (await facts(world, "big")).failures == 2

    await eventually(failed_twice, what="a second wake fails too")
    now = await world.store.now_ms()
    assert (await facts(world, "big")).quarantined_until - now > 1000, "the pause did not grow"
    assert host.residents.wakers["big"].readiness.first_token_ms == 0.0
    assert (await world.model("big")).first_token_ms == 0.0
    breaking.cancel()
    await asyncio.gather(breaking, return_exceptions=True)


async def keep_broken(world: World, model: str, **faults: object) -> None:
    """Breaks every new server of a model while it loads."""

    async def never() -> bool:
        with contextlib.suppress(OSError, IndexError, httpx.HTTPError):
            await world.runtime(model).break_with(**faults)
        return False

    await eventually(never, what="stopped", timeout_s=60)


async def test_nobody_waits_for_a_model_that_cannot_load(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is sent away at once, where there is nowhere to go it is refused; nothing is started over and over."""
    monkeypatch.setattr(quarantine, "FIRST_S", 60.0)
    load_log = tmp_path / "loads"
    await world.apply(
        {
            "big": simulated(
                keepWarm=False,
                coldStartBudgetMs=60_000,
                fallback="small",
                options={"coldStartMs": 300, "loadFails": -1, "loadLog": str(load_log)},
            ),
            "small": simulated(),
            "lonely": simulated(options={"loadFails": -1}),
        }
    )
    await world.scheduler()
    await world.host()
    await world.until_model("small", "warm")

    asks = await asyncio.gather(*(world.submit("big") for _ in range(5)))
    records = await asyncio.gather(*(ask.end() for ask in asks))

    assert {record.served_by for record in records} == {"small@gpu1"}
    assert max(record.promoted_at - record.submitted_at for record in records) < 10_000, "they waited for the deadline"
    told = await world.until_model("big", "quarantined")
    assert told.reason.startswith("model 'big' did not load: its server ended with exit code 1; its last log line")
    assert len(load_log.read_text().splitlines()) == 1
    await world.until_model("lonely", "quarantined")
    with pytest.raises(errors.ModelUnavailable) as refused:
        await world.submit("lonely")
    assert "did not load" in str(refused.value)


async def test_pauses_between_failing_loads_grow(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quarantine, "FIRST_S", 0.4)
    load_log = tmp_path / "loads"
    await world.apply({"big": simulated(options={"loadFails": -1, "loadLog": str(load_log)})})
    await world.host()

    def pauses() -> list[object]:
        told = [record for record in caplog.records if record.getMessage().startswith("event=quarantine model=big")]
        return [record.args[2] for record in told if isinstance(record.args, tuple)]

    await until(lambda: len(pauses()) >= 3, what="three failed loads")

    assert pauses()[:3] == pytest.approx([0.4, 2.4, 14.4])
    starts_ms = [int(line.split()[1]) for line in load_log.read_text().splitlines()]
    first, second = [after - before for before, after in itertools.pairwise(starts_ms[:3])]
    assert (first >= 400, second >= 2400) == (True, True), f"it was started again after {first} and {second} ms"


async def test_a_missing_gguf_is_named(world: World, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.gguf"
    await world.apply(
        {
            "big": {
                "backend": "llama.cpp",
                "model": str(missing),
                "keepWarm": True,
                "command": ["true", "-m", "{model}", "--port", "{port}"],
            }
        }
    )
    await world.host()
    told = await world.until_model("big", "quarantined")
    assert told.reason == f"model 'big': there is no GGUF file at {missing}"
    with pytest.raises(errors.ModelUnavailable) as refused:
        await world.submit("big")
    assert str(missing) in str(refused.value)


async def test_a_runtime_that_nobody_understands_is_set_aside_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that nobody foresaw ends neither the worker nor the other models, and its model may come back."""
    monkeypatch.setattr(quarantine, "FIRST_S", 60.0)
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.2)
    await world.apply({"big": simulated(), "small": simulated()})
    host = await world.warm_host()

    child = world.runtime("big").pid

    async def odd() -> str:
        raise KeyError("status")

    with monkeypatch.context() as for_now:
        for_now.setattr(host.residents.wakers["big"].runtime, "state", odd)
        told = await world.until_model("big", "quarantined")
        assert told.reason == "its runtime is not understood: KeyError: 'status'"
        with pytest.raises(errors.ModelUnavailable) as refused:
            await world.submit("big")
        assert "not understood" in str(refused.value)
        assert (await (await world.submit("small")).end()).served_by == "small@gpu1"

        async def memory_is_back() -> bool:
            return (await world.model("big")).memory_bytes == 0 and not psutil.pid_exists(child)

        await eventually(memory_is_back, what="what it held in memory is free for others")

    await world.store.command("HSET", world.store.keys.model("big"), "quarantined_until", "0")
    await world.until_model("big", "warm")
    assert (await (await world.submit("big")).end()).served_by == "big@gpu1"


async def test_a_changed_definition_ends_the_quarantine(world: World, tmp_path: Path) -> None:
    """Whoever repaired the policy need not wait for a pause that the broken one earned."""
    await world.apply({"big": simulated(options={"loadFails": -1})})
    await world.host()
    await world.until_model("big", "quarantined")
    await world.apply({"big": simulated()})
    await world.until_model("big", "warm", timeout_s=3)
    assert (await facts(world, "big")).failures == 0


async def test_a_slow_model_is_left_to_batch_until_it_is_fast_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slow first tokens make it degraded: people go to the fallback, batch stays; one good probe heals."""
    monkeypatch.setattr(upkeep, "PROBE_IDLE_EVERY_S", 0.3)
    monkeypatch.setattr(upkeep, "PROBE_DEGRADED_EVERY_S", 0.3)
    await world.apply(
        {
            "big": simulated(maxConcurrent=2, firstTokenBudgetMs=150, coldStartBudgetMs=60_000, fallback="small"),
            "small": simulated(),
        }
    )
    await world.scheduler()
    await world.warm_host()
    slow = world.runtime("big")
    await slow.break_with(first_token_delay_ms=250)
    told = await world.until_model("big", "degraded")
    assert told.reason.startswith("first token after 2") and told.reason.endswith("budget 150 ms")

    person = await world.submit("big")
    batch = await world.submit("big.batch")
    assert person.lane == "small"
    assert (await person.end()).served_by == "small@gpu1"
    assert (await batch.end()).served_by == "big@gpu1"
    await slow.break_with(first_token_delay_ms=0)
    await world.until_model("big", "warm")
    assert (await (await world.submit("big")).end()).served_by == "big@gpu1"


async def test_a_slow_probe_gives_its_slot_to_a_user(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has one slot, and its probe would take half a minute."""
    monkeypatch.setattr(upkeep, "PROBE_IDLE_EVERY_S", 0.2)
    await world.apply({"big": simulated(maxConcurrent=1, firstTokenBudgetMs=20_000)})
    host = await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=30_000, times=1)
    slots = host.residents.wakers["big"].slots
    await until(lambda: "probe" in slots.using, what="a probe")

    record = await (await world.submit("big")).end()

    assert record.state is State.DONE
    assert record.claimed_at - record.submitted_at < 10_000
    assert (await world.model("big")).state == "warm", "a probe that was ended says nothing"


async def test_people_who_wait_are_promoted_when_their_model_becomes_slow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were admitted while it was warm, and all its slots are busy: nobody waits out a long deadline."""
    await world.apply(
        {
            "big": simulated(maxConcurrent=1, firstTokenBudgetMs=100, coldStartBudgetMs=60_000, fallback="small"),
            "small": simulated(),
        }
    )
    await world.scheduler()
    await world.warm_host()
    await world.runtime("big").break_with(first_token_delay_ms=300)
    asks = [await world.submit("big") for _ in range(6)]
    records = await asyncio.gather(*(ask.end() for ask in asks))
    served = [record.served_by for record in records]
    assert served[:2] == ["big@gpu1"] * 2
    assert served[-1] == "small@gpu1"
    assert (await world.model("big")).state == "degraded"


async def test_a_killed_runtime_is_woken_again_on_demand(world: World, tmp_path: Path) -> None:
    load_log = tmp_path / "loads"
    await world.apply({"big": simulated(keepWarm=False, options={"loadLog": str(load_log)})})
    await world.host()
    assert (await (await world.submit("big")).end()).state is State.DONE
    await world.store.command("HSET", world.store.keys.model("big"), "wanted_until", "0")
    runtime = world.runtime("big")
    runtime.kill()
    told = await world.until_model("big", "cold")
    assert told.reason == "the runtime is absent"
    assert len(load_log.read_text().splitlines()) == 1

    ask = await world.submit("big")

    assert (await ask.end()).attempt == 1
    assert len(load_log.read_text().splitlines()) == 2


async def test_a_runtime_killed_in_the_middle_of_answers(world: World) -> None:
    """Who has seen part of an answer is told in-band; who has seen nothing gets a whole one from another attempt, and
    doesn't burn his tries on a server that is gone."""
    await world.apply({"big": simulated(maxConcurrent=2, maxQueue=9)})
    host = await world.warm_host()
    seen, unseen = await world.seen_and_unseen("big")
    waiting = await world.submit("big")

    world.runtime("big").kill()

    record = await seen.end()
    assert (record.state, record.error) == (State.FAILED, "runtime_failed")
    assert seen.said["status"] == 502 and seen.text.startswith("simulated")
    record = await unseen.end()
    assert (record.state, record.attempt, record.losses) == (State.DONE, 2, 1)
    assert (unseen.text, unseen.restarts) == (words(9), 1)
    assert (await waiting.end()).state is State.DONE
    assert (await waiting.record()).losses == 0
    assert await dead_letters(world) == [seen.job_id]
    assert host.residents.wakers["big"].slots.idle


async def test_a_suspected_runtime_is_asked_before_it_gets_another_job(world: World) -> None:
    """Else a job whose attempts fail at once would use them all up before anybody looks."""
    await world.apply({"big": simulated(maxConcurrent=2)})
    host = await world.warm_host()
    found = host.residents.wakers["big"]
    found.upkeep.suspect()
    assert not found.claimable
    assert (await (await world.submit("big")).end()).attempt == 1
    assert found.claimable and found.state == "warm"


async def test_a_refusal_of_the_runtime_is_the_requests_own_fault(world: World) -> None:
    await world.apply({"big": simulated()})
    await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(error_status=400)
    before = (await runtime.stats())["requests_started"]
    ask = await world.submit("big")
    record = await ask.end()

    assert (record.state, record.error, record.attempt) == (State.FAILED, "runtime_refused", 1)
    assert ask.said == {"code": "runtime_refused", "message": "simulated fault", "status": 400}
    assert (await runtime.stats())["requests_started"] == before + 1
    assert await dead_letters(world) == []


async def test_a_runtime_that_says_later_is_asked_again_but_not_for_ever(world: World) -> None:
    await world.apply({"big": simulated()}, maxLosses=2)
    await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(error_status=503, times=2)
    lucky = await (await world.submit("big")).end()
    assert (lucky.state, lucky.attempt, lucky.losses) == (State.DONE, 3, 2)

    await runtime.break_with(error_status=503)
    unlucky = await world.submit("big")
    record = await unlucky.end()

    assert (record.state, record.error, record.attempt, record.losses) == (State.FAILED, "runtime_failed", 3, 3)
    assert record.error_message == "the runtime answered 503: simulated fault"
    assert await dead_letters(world) == [unlucky.job_id]
    assert (await world.model("big")).state == "warm"


async def test_an_answer_without_a_finish_reason_is_no_success(world: World) -> None:
    """A clean end of the stream proves nothing: the client is told, or another attempt gives the whole answer."""
    await world.apply({"big": simulated()})
    await world.warm_host()
    runtime = world.runtime("big")
    for fault in ({"silent_end_after_tokens": 2}, {"error_in_stream": 2}):
        await runtime.break_with(**fault, times=1)
        seen = await world.submit("big", tokens=6)
        record = await seen.end()
        assert (record.state, record.error) == (State.FAILED, "runtime_failed"), fault
        assert seen.text == words(2)
        await runtime.break_with(**fault, times=1)
        unseen = await world.submit("big", tokens=6, stream=False)
        assert (await unseen.end()).attempt == 2, fault
        assert unseen.text == words(6)


async def test_silence_has_a_limit_before_and_after_the_first_token(world: World) -> None:
    await world.apply({"big": simulated(maxConcurrent=2, firstTokenTimeoutMs=600, stallTimeoutMs=700)})
    await world.warm_host()
    runtime = world.runtime("big")
    await runtime.break_with(never_first_token=True, times=1)
    mute = await world.submit("big")
    await mute.until_state(State.CLAIMED)
    await runtime.break_with(stall_after_tokens=2, times=1)
    stalled = await world.submit("big", tokens=9)

    record = await mute.end()
    assert (record.error, record.error_message) == ("runtime_failed", "no first token within 0.6 s")
    assert mute.said["status"] == 504
    record = await stalled.end()
    assert record.error_message == "the runtime was silent for 0.7 s"
    assert stalled.text == words(2)
    stats = await runtime.stats()
    assert stats["requests_aborted"] == 2


async def test_a_killed_worker_takes_its_runtime_along(world: World) -> None:
    """No orphan keeps the memory of a model that nobody manages."""
    await world.apply({"big": simulated()})
    worker = world.process("workers.host")
    await world.until_model("big", "warm")
    pid = world.runtime("big").pid
    assert psutil.pid_exists(pid)
    worker.kill()

    async def gone() -> bool:
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    await eventually(gone, what="the runtime ended with its worker", timeout_s=3)
