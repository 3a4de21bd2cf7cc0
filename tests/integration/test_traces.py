"""What a job's trace tells of everything that may happen to it, by whichever part saw it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker import jobs, traces
from broker.lifecycle import State
from broker.records import JobRecord
from tests.support.collector import Collector, Spans, collecting
from tests.support.fake_provider import FakeProvider
from tests.support.redis_server import RedisServer
from tests.support.scripted_runtime import ScriptedLlamaServer
from tests.support.worker_world import Ask, World, eventually, simulated, until, worker_world

pytestmark = pytest.mark.real

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


@pytest.fixture
def told() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


async def trace_of(told: Collector, ask: Ask) -> Spans:
    """The whole trace of a job that is over."""
    await until(lambda: any(span.served for span in told.of(ask.job_id)), what=f"the end of {ask.job_id} told")
    spans = told.of(ask.job_id)
    root, job = spans.root(), await ask.record()
    assert (root.start_ms, root.end_ms) == (job.submitted_at, job.ended_at)
    assert root.attributes["warmlane.outcome"] == job.state.value and root.error == job.error
    return spans


async def ours(world: World, model: str, **fields: object) -> Ask:
    return await world.submit(model, trace=traces.accepted(""), **fields)  # type: ignore[arg-type]


async def test_a_cold_start_from_admission_to_the_last_token(world: World, told: Collector) -> None:
    """The wait holds the wake, and the attempt the reading of the prompt and the answer, one after the other."""
    cold = simulated(keepWarm=False, coldStartBudgetMs=20_000, options={"coldStartMs": 300, "decodeTps": 100})
    await world.apply({"big": cold})
    await world.host()
    ask = await world.submit("big", tokens=20, trace=traces.accepted(f"00-{TRACE}-{PARENT}-01"))
    await ask.end()
    spans = await trace_of(told, ask)
    root = spans.root()
    assert (root.trace_id, root.parent_id, root.name) == (TRACE, PARENT, "chat big")
    assert spans.names == ["chat big", "wait", "wake", "attempt", "first token", "answer"]
    assert spans.outcomes == [("wait", "claimed"), ("attempt", "done"), ("chat big", "done")]
    by_name = {span.name: span for span in spans}
    assert by_name["wake"].parent_id == by_name["wait"].span_id
    assert by_name["wake"].end_ms - by_name["wake"].start_ms >= 250
    assert by_name["first token"].parent_id == by_name["answer"].parent_id == by_name["attempt"].span_id
    assert by_name["answer"].end_ms - by_name["answer"].start_ms >= 100
    assert root.attributes["gen_ai.usage.output_tokens"] == 20
    assert {"gen_ai.request.model", "gen_ai.response.model", "http.route", "warmlane.caller"} <= root.attributes.keys()

    warm = await ours(world, "big")
    await warm.end()
    assert "wake" not in (await trace_of(told, warm)).names, "it waited for no load"


async def test_a_promotion_ends_one_wait_and_begins_another(world: World, told: Collector) -> None:
    slow = simulated(keepWarm=False, coldStartBudgetMs=200, fallback="small", options={"coldStartMs": 60_000})
    await world.apply({"big": slow, "small": simulated(maxConcurrent=2)})
    await world.host()
    await world.until_model("small", "warm")
    await world.scheduler()
    ask = await ours(world, "big")
    await ask.end()
    spans = await trace_of(told, ask)
    assert spans.outcomes == [("wait", "promoted"), ("wait", "claimed"), ("attempt", "done"), ("chat big", "done")]
    first, second = sorted(spans.named("wait"), key=lambda span: span.start_ms)
    assert (first.attributes["warmlane.lane"], second.attributes["warmlane.lane"]) == ("big", "small")
    assert abs(second.start_ms - first.end_ms) < 1_000
    assert spans.root().attributes["gen_ai.response.model"] == "small"


async def test_batch_work_that_made_way_has_two_attempts(world: World, told: Collector) -> None:
    await world.apply({"big": simulated(maxConcurrent=1, coldStartBudgetMs=500, options={"decodeTps": 100})})
    await world.warm_host()
    batch = await ours(world, "big.batch", tokens=60, mode="async", stream=False)
    await batch.until_state(State.STREAMING)
    await (await ours(world, "big")).end()
    await batch.end()
    spans = await trace_of(told, batch)
    assert spans.outcomes == [
        ("wait", "claimed"),
        ("attempt", "stopped"),
        ("wait", "claimed"),
        ("attempt", "done"),
        ("chat big.batch", "done"),
    ]
    assert sorted(span.attributes["warmlane.attempt"] for span in spans.named("attempt")) == [1, 2]


async def test_a_job_whose_end_was_written_and_not_heard_of_is_told_as_it_was(
    world: World, told: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt takes it that somebody else has the job; the record says that it is done, by this attempt."""
    await world.apply({"big": simulated()})
    await world.warm_host()
    end = jobs.end

    async def unheard(*args: Any, **kwargs: Any) -> None:
        await end(*args, **kwargs)
        await end(*args, **kwargs)

    monkeypatch.setattr(jobs, "end", unheard)
    ask = await ours(world, "big")
    await ask.end()
    assert (await trace_of(told, ask)).outcomes == [("wait", "claimed"), ("attempt", "done"), ("chat big", "done")]


@pytest.mark.parametrize("cause", ["broken runtime", "lost worker"])
async def test_what_was_lost_is_told_by_whoever_finds_it(world: World, told: Collector, cause: str) -> None:
    """The first attempt is lost with its runtime, or its worker is killed and can tell nothing; the second answers."""
    await world.apply({"big": simulated(maxConcurrent=1, options={"decodeTps": 100})}, maxLosses=1)
    if cause == "lost worker":
        worker = world.process("workers.host")
        await world.until_model("big", "warm")
        ask = await ours(world, "big", tokens=500, stream=False)
        await ask.until_state(State.STREAMING)
        worker.kill()
        await world.host()  # under the same name: its predecessor is dead, whatever its lease says
    else:
        await world.warm_host()
        await world.runtime("big").break_with(silent_end_after_tokens=2, times=1)
        ask = await ours(world, "big", tokens=9, stream=False)
    await ask.end()
    spans = await trace_of(told, ask)
    first, *_ = sorted(spans.named("attempt"), key=lambda span: span.start_ms)
    expected = {"lost worker": ("lost", "worker_lost"), "broken runtime": ("released", "runtime_failed")}
    assert (first.attributes["warmlane.outcome"], first.error) == expected[cause]
    assert first.attributes["warmlane.host"] == "gpu1" and spans.outcomes[-1] == ("chat big", "done")
    assert len(spans.named("attempt")) == 2


async def test_jobs_that_never_had_a_worker_have_traces_too(world: World, told: Collector) -> None:
    """One is cancelled while it waits, one before its start, one is given up on."""
    cold = simulated(keepWarm=False, maxQueue=9, maxWaitMs=300, options={"coldStartMs": 60_000})
    await world.apply({"big": cold})
    await world.host()
    await world.scheduler()
    now = await world.store.now_ms()
    waits = await ours(world, "big")
    starts_later = await ours(world, "big", mode="async", stream=False, not_before=now + 60_000)
    for ask in (waits, starts_later):
        await jobs.cancel(world.store, ask.job_id)
    gives_up = await ours(world, "big")
    await eventually(lambda: _ended(gives_up), what="given up on")
    assert (await trace_of(told, waits)).outcomes == [("wait", "cancelled"), ("chat big", "cancelled")]
    assert (await trace_of(told, starts_later)).outcomes == [("scheduled", "cancelled"), ("chat big", "cancelled")]
    assert (await trace_of(told, gives_up)).outcomes == [("wait", "expired"), ("chat big", "expired")]


async def test_a_job_that_starts_later_waits_in_two_ways(world: World, told: Collector) -> None:
    await world.apply({"big": simulated()})
    await world.warm_host()
    await world.scheduler()
    start = await world.store.now_ms() + 400
    ask = await ours(world, "big", mode="async", stream=False, not_before=start)
    await ask.end()
    spans = await trace_of(told, ask)
    assert spans.outcomes == [("scheduled", "started"), ("wait", "claimed"), ("attempt", "done"), ("chat big", "done")]
    assert spans.named("scheduled")[0].end_ms >= start


async def test_only_a_runtime_of_this_house_hears_of_the_trace(world: World, told: Collector) -> None:
    """It gets the attempt as its parent; a provider gets nothing, even where the client named a trace."""
    theirs = f"00-{TRACE}-{PARENT}-01"
    async with ScriptedLlamaServer().running() as runtime:
        await world.apply({"near": {"backend": "llama.cpp", "model": "m", "url": runtime.url, "keepWarm": True}})
        await world.warm_host()
        heard = len(runtime.headers)
        ask = await world.submit("near", trace=traces.accepted(theirs))
        await ask.end()
        (attempt,) = (await trace_of(told, ask)).named("attempt")
        assert [h["traceparent"] for h in runtime.headers[heard:]] == [f"00-{TRACE}-{attempt.span_id}-01"]
        assert not any("traceparent" in headers for headers in runtime.headers[:heard]), "a probe belongs to no job"
    async with FakeProvider().listening() as provider:
        far = {"backend": "openai", "model": "gpt-far", "url": provider.url, "trust": "remote", "keepWarm": True}
        await world.apply({"far": far})
        await world.until_model("far", "warm")
        ask = await world.submit("far", zone="remote", content="out", trace=traces.accepted(theirs))
        await ask.end()
        assert (await trace_of(told, ask)).outcomes[-1] == ("chat far", "done")
        assert provider.prompts == ["out"]
        assert not any("traceparent" in request.headers for request in provider.received)


async def _ended(ask: Ask) -> JobRecord | None:
    record = await ask.record()
    return None if record.live else record
