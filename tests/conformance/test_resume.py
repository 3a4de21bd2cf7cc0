"""A job that is followed over connections that keep breaking: every frame once, and in order."""

import asyncio
import random

import httpx
import pytest

from broker.frames import replay
from broker.store import Store
from tests.support.clients import Event, ask, follow, user
from tests.support.gateway_process import House
from tests.support.worker_world import words

pytestmark = pytest.mark.real

TOKENS = 150


async def test_every_frame_once_and_in_order(shared_house: House) -> None:
    """The reader hangs up again and again, while the answer is made and after it; what it has is the log."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    body = {"model": "pretend", "messages": user("go on"), "max_tokens": TOKENS, "stream": True}
    async with httpx.AsyncClient(timeout=30.0) as http:
        reading = asyncio.create_task(ask(http, shared_house.url, body, idempotency_key=f"resume-{seed}"))
        job_id = await id_of(http, shared_house, reading, f"resume-{seed}", body)
        events: list[Event] = []
        cuts = 0
        while not (events and events[-1].name == "end"):
            after = events[-1].id if events else ""
            events += await follow(http, shared_house.url, job_id, after=after, cut_after=dice.randint(1, 25))
            cuts += 1
            for _ in range(dice.randint(0, 3)):  # being away for the time of a few requests
                await http.get(f"{shared_house.url}/healthz")
        told = await reading
        assert told.text == words(TOKENS)
        from_inside = events[TOKENS // 3].id
        assert await follow(http, shared_house.url, job_id, after=from_inside) == events[TOKENS // 3 + 1 :]
        assert await follow(http, shared_house.url, job_id) == events
        assert await follow(http, shared_house.url, job_id, after=events[-1].id) == []
    assert cuts > 5
    assert "".join(event.data["data"] for event in events[:-1]) == await logged(shared_house, job_id)
    assert [event.id for event in events] == [f"1-{seq}" for seq in range(1, len(events) + 1)]
    assert events[-1].data["kind"] == "done"


async def id_of(
    http: httpx.AsyncClient, up: House, reading: asyncio.Task[object], key: str, body: dict[str, object]
) -> str:
    """The id of the job that runs under an Idempotency-Key: a second request with it is led to the same job."""
    assert not reading.done()
    await asyncio.sleep(0)
    async with http.stream(
        "POST", f"{up.url}/v1/chat/completions", json=body, headers={"idempotency-key": key}
    ) as response:
        return response.headers["x-gateway-job"]


async def logged(up: House, job_id: str) -> str:
    """The bytes of the job's log in Redis, the terminal frame left out."""
    store = await Store.open(up.redis_url, name="test")
    try:
        return b"".join([frame.data async for frame in replay(store, job_id) if not frame.terminal]).decode()
    finally:
        await store.close()
