"""What a worker learns of a model's speed while it serves, and that reading a prompt does not count as slowness."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from broker import hosts
from broker.records import ModelFacts
from tests.support.redis_server import RedisServer
from tests.support.worker_world import World, eventually, simulated, until, worker_world

pytestmark = pytest.mark.real


@pytest_asyncio.fixture
async def world(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(hosts, "BEAT_EVERY_S", 0.3)  # what was learned is told with the beat
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        yield world


async def test_rates_are_learned_and_told_and_reading_is_not_slowness(world: World) -> None:
    """Three prompts of 480 tokens at 1,000 a second: each first token is over the budget, and none is slow."""
    options = {"prefillTps": 1000, "decodeTps": 200}
    await world.apply({"big": simulated(contextTokens=9000, firstTokenBudgetMs=420, options=options)})
    await world.warm_host()
    for letter in "abc":
        record = await (await world.submit("big", tokens=20, content=letter * 1_900, session=letter)).end()
        assert record.first_token_at - record.claimed_at > 420

    async def facts() -> ModelFacts | None:
        found = ModelFacts.from_hash(await world.store.hash(world.store.keys.model("big")))
        return found if found.prefill_tps else None

    found = await eventually(facts, what="the worker tells what it learned")
    assert found.prefill_tps == pytest.approx(1_000, rel=0.01)
    assert 100 < found.decode_tps < 300

    async def last_told() -> bool:
        # the record estimates no prompt here; the answer is in the cache too
        return (await world.model("big")).estimates() == {"c": 20}

    await eventually(last_told, what="the worker tells what the last one left in the cache")
    told = await world.model("big")
    assert told.state == "warm"
    assert 0 < told.first_token_ewma_ms < 420


async def test_what_was_learned_of_other_weights_is_forgotten(world: World) -> None:
    """Of the same name the policy may have a faster model by now: no mean of the two is true of either."""

    async def learned(after: ModelFacts, letters: str) -> ModelFacts:
        for letter in letters:
            await (await world.submit("big", tokens=20, content=letter * 1_900, session=letter)).end()

        async def facts() -> ModelFacts | None:
            found = ModelFacts.from_hash(await world.store.hash(world.store.keys.model("big")))
            return found if found.prefill_tps and found.rates_of != after.rates_of else None

        return await eventually(facts, what="the worker tells what it learned")

    await world.apply({"big": simulated(options={"prefillTps": 1000, "decodeTps": 200})})
    host = await world.warm_host()
    before = await learned(ModelFacts(), "ab")
    assert before.prefill_tps == pytest.approx(1_000, rel=0.01)

    await world.apply({"big": simulated(options={"prefillTps": 3000, "decodeTps": 600})})
    await until(lambda: host.residents.wakers["big"].model.options["decodeTps"] == 600, what="it is another one")
    after = await learned(before, "c")
    assert after.prefill_tps == pytest.approx(3_000, rel=0.05)
    assert after.service_ms < 0.7 * before.service_ms
