"""A reply of Redis that is lost on its way: what was done is found to be done, and is not done again."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import errors, jobs
from broker.lifecycle import State
from broker.store import Store
from tests.support.clients import ask, user
from tests.support.invariants import take, violations
from tests.support.live_api import live_api
from tests.support.redis_server import RedisServer
from tests.support.worker_world import simulated, words, worker_world

pytestmark = pytest.mark.real


def lose_first_reply(store: Store, verb: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Has the first reply to a verb never arrive, although the verb was done; gives what it would have said."""
    run, lost = store.run, []

    async def done_and_not_heard(name: str, *args: Any) -> Any:
        found = await run(name, *args)
        if name == verb and not lost:
            lost.append(found)
            raise errors.BrokerUnavailable("the connection to Redis was lost")
        return found

    monkeypatch.setattr(store, "run", done_and_not_heard)
    return lost


async def test_a_claim_that_was_made_without_our_hearing_of_it(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its client would wait for a lease to end, with a free slot beside it."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1)})
        lost = lose_first_reply((await world.host())._store, "claim", monkeypatch)
        await world.until_model("pretend", "warm")
        record = await (await world.submit("pretend", tokens=4)).end(timeout_s=3)
        assert lost
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        again = await world.submit("pretend", tokens=4)
        assert (await again.end(timeout_s=3)).state is State.DONE
        assert again.text == words(4)
        stats = await world.runtime("pretend").stats()
        assert stats["requests_finished"] <= 2 + 2  # two answers, and what the wake has asked for


async def test_a_submit_that_was_made_without_our_hearing_of_it(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The api asks again with the same id: one job, one answer."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1)})
        await world.host()
        await world.until_model("pretend", "warm")
        store = await Store.open(world.url, namespace=world.namespace, name="api")
        lost = lose_first_reply(store, "submit", monkeypatch)
        try:
            async with live_api(store) as api, httpx.AsyncClient(timeout=10) as http:
                told = await ask(http, api.url, {"model": "pretend", "messages": user("hi"), "max_tokens": 4})
        finally:
            await store.close()
        assert lost
        assert told.text == words(4)
        picture = await take(world.store)
        assert [job.attempt for job in picture.jobs.values()] == [1]
        assert not violations(picture)


@pytest.mark.parametrize("verb", ["first_token", "emit", "end"])
async def test_a_write_that_was_made_without_our_hearing_of_it(
    verb: str, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repeated, and the repeat changes nothing."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1, options={"decodeTps": 50})})
        host = await world.host()
        await world.until_model("pretend", "warm")
        lost = lose_first_reply(host._store, verb, monkeypatch)
        asked = await world.submit("pretend", tokens=6)
        record = await asked.end(timeout_s=5)
        assert lost
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        assert asked.text == words(6)
        assert (await jobs.read(world.store, asked.job_id)).last_seq == asked.frames[-1].seq
