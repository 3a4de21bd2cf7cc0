"""A retry that meets its first try's hang-up half-way: whichever comes first at Redis, it gets the whole answer."""

import asyncio
from typing import Any

import pytest

from api import visit
from broker import jobs
from broker.lifecycle import State
from broker.store import Store
from tests.support.live_api import SDK, RawClient, Scene, until_true
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)
KEY: Any = {"idempotency_key": "once"}


async def heard_some(scene: Scene, **headers: str) -> tuple[RawClient, str]:
    """A client that has heard a part of its answer, and its job."""
    client = await RawClient.open(scene.api)
    await client.chat("pause", **headers)
    await client.head()
    await client.until_said(b"Hello")
    return client, client.headers["x-gateway-job"]


@pytest.mark.parametrize("headers", [KEY, SDK], ids=["key", "sdk"])
async def test_a_retry_between_the_two_steps_of_a_hang_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, headers: Any
) -> None:
    """The first try has left and means to cancel what nobody reads; by then somebody does."""
    left, go_on = asyncio.Event(), asyncio.Event()
    detach = jobs.detach

    async def detach_slowly(store: Store, job_id: str, **more: Any) -> int:
        found = await detach(store, job_id, **more)
        left.set()
        await go_on.wait()
        return found

    client, job_id = await heard_some(scene, **headers)
    monkeypatch.setattr(visit.jobs, "detach", detach_slowly)
    client.close()
    await asyncio.wait_for(left.wait(), 5)
    again = await RawClient.open(scene.api)
    await again.chat("pause", **headers | ({"x_stainless_retry_count": "1"} if headers is SDK else {}))
    readers = scene.store.keys.readers(job_id)
    await until_true(lambda: scene.store.command("EXISTS", readers), what="the retry reads the job")
    go_on.set()
    await until(lambda: len(scene.api.gateway.exchanges) == 1, what="the first try has gone")
    scene.go.set()
    assert await again.head() == 200
    assert b" world" in await again.body()
    assert again.headers["x-gateway-job"] == job_id and len(scene.worker.seen) == 1


async def test_a_key_whose_job_ends_while_its_retry_is_on_the_way(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key led to a job that was cancelled before anybody could read it: it is free, and so this is a new job."""
    attach = jobs.attach

    async def attach_late(store: Store, job_id: str, **more: Any) -> tuple[str, int, int]:
        monkeypatch.setattr(visit.jobs, "attach", attach)
        client.close()
        await scene.until_state(job_id, State.CANCELLED)
        return await attach(store, job_id, **more)

    client, job_id = await heard_some(scene, **KEY)
    monkeypatch.setattr(visit.jobs, "attach", attach_late)
    again = await RawClient.open(scene.api)
    await again.chat("pause", **KEY)
    await until(lambda: len(scene.worker.seen) == 2, what="a claim of a second job")
    scene.go.set()
    assert await again.head() == 200
    assert b" world" in await again.body()
    assert again.headers["x-gateway-job"] != job_id
    again_id = again.headers["x-gateway-job"]
    assert (await scene.job(again_id)).state is State.DONE
