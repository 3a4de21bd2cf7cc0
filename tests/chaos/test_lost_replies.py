"""A reply of Redis that is lost on its way: what was done is found to be done, and is not done again."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from broker import errors, jobs, lanes
from broker.lifecycle import State
from tests.support.redis_server import RedisServer
from tests.support.worker_world import simulated, words, worker_world

pytestmark = pytest.mark.real


def lose_first_reply(work: Callable[..., Awaitable[Any]]) -> tuple[Callable[..., Awaitable[Any]], list[object]]:
    """The same verb, whose first reply never arrives; what it did stays done."""
    lost: list[object] = []

    async def done_and_not_heard(*args: Any, **more: Any) -> Any:
        found = await work(*args, **more)
        if not lost:
            lost.append(found)
            raise errors.BrokerUnavailable("the connection to Redis was lost")
        return found

    return done_and_not_heard, lost


async def test_a_claim_that_was_made_without_our_hearing_of_it(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its client would wait for a lease to end, with a free slot beside it."""
    claim, lost = lose_first_reply(lanes.claim)
    monkeypatch.setattr(lanes, "claim", claim)
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1)})
        await world.host()
        await world.until_model("pretend", "warm")
        record = await (await world.submit("pretend", tokens=4)).end(timeout_s=3)
        assert lost
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        again = await world.submit("pretend", tokens=4)
        assert (await again.end(timeout_s=3)).state is State.DONE
        assert again.text == words(4)
        stats = await world.runtime("pretend").stats()
        assert stats["requests_finished"] <= 2 + 2  # two answers, and what the wake has asked for


@pytest.mark.parametrize("verb", ["first_token", "emit", "end"])
async def test_a_write_that_was_made_without_our_hearing_of_it(
    verb: str, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repeated, and the repeat changes nothing."""
    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply({"pretend": simulated(maxConcurrent=1, memoryMb=1, options={"decodeTps": 50})})
        host = await world.host()
        await world.until_model("pretend", "warm")
        store = host._store
        run, heard = store.run, []

        async def run_and_lose(name: str, *args: Any) -> Any:
            found = await run(name, *args)
            if name == verb and not heard:
                heard.append(found)
                raise errors.BrokerUnavailable("the connection to Redis was lost")
            return found

        monkeypatch.setattr(store, "run", run_and_lose)
        ask = await world.submit("pretend", tokens=6)
        record = await ask.end(timeout_s=5)
        assert heard
        assert (record.state, record.attempt, record.losses) == (State.DONE, 1, 0)
        assert ask.text == words(6)
        assert (await jobs.read(world.store, ask.job_id)).last_seq == ask.frames[-1].seq
