"""An SDK that tries again by itself, over real HTTP: it gets the job that it left behind, and nobody else's."""

import asyncio

import pytest

from broker import jobs
from broker.lifecycle import State
from tests.support.live_api import SDK, RawClient, Scene, chat_body, until_true
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)
AGAIN = SDK | {"x_stainless_retry_count": "1"}


async def left_behind(scene: Scene, said: str = "wait", *, stream: bool = False) -> str:
    """A job whose client hung up before it heard anything; gives its id."""
    client = await RawClient.open(scene.api)
    await client.chat(said, stream=stream, **SDK)
    await until(lambda: scene.worker.seen, what="the claim")
    client.close()
    return await nobody_reads(scene)


async def nobody_reads(scene: Scene) -> str:
    job_id = scene.worker.seen[-1].id

    async def left() -> bool:
        return not await scene.store.command("EXISTS", scene.store.keys.readers(job_id))

    await until_true(left, what="the reader is gone", timeout_s=2)
    return job_id


@pytest.mark.parametrize("stream", [True, False])
async def test_a_retry_gets_the_job_that_was_left_behind(scene: Scene, stream: bool) -> None:
    """One generation at the worker, the whole answer at the client."""
    job_id = await left_behind(scene, stream=stream)
    again = await RawClient.open(scene.api)
    await again.chat("wait", stream=stream, **AGAIN)
    await until_true(
        lambda: scene.store.command("EXISTS", scene.store.keys.readers(job_id)), what="the retry reads the job"
    )
    scene.go.set()
    assert await again.head() == 200
    told = await again.body()
    assert again.headers["x-gateway-job"] == job_id
    assert b"Hello" in told and b"world" in told
    assert len(scene.worker.seen) == 1
    assert (await scene.until_state(job_id, State.DONE)).seen is stream


async def test_an_sdk_whose_own_timeout_ends_its_first_try(scene: Scene) -> None:
    """The real client: it gives up, tries again by itself, and is answered by what it had begun."""
    async with scene.client(max_retries=2, timeout=0.4) as client:
        asking = asyncio.create_task(
            client.chat.completions.create(model="big", messages=[{"role": "user", "content": "wait"}])
        )
        await until(lambda: scene.worker.seen, what="the claim")
        job_id = await nobody_reads(scene)
        scene.go.set()
        answer = await asyncio.wait_for(asking, 15)
    assert answer.choices[0].message.content == "Hello world"
    assert [job.id for job in scene.worker.seen] == [job_id]


async def test_an_answer_that_nobody_heard_is_fetched_once(scene: Scene) -> None:
    """The job ended within the grace: the next try gets its answer, the one after is a new request."""
    job_id = await left_behind(scene)
    scene.go.set()
    await scene.until_state(job_id, State.DONE)
    ids = []
    for _ in range(2):
        again = await RawClient.open(scene.api)
        await again.chat("wait", stream=False, **AGAIN)
        assert await again.head() == 200
        assert b"Hello world" in await again.body()
        ids.append(again.headers["x-gateway-job"])
    assert ids[0] == job_id and ids[1] != job_id
    assert len(scene.worker.seen) == 2


async def test_five_samples_stay_five(scene: Scene) -> None:
    """Identical requests at once, retries among them: each that has a reader of its own is a job of its own."""
    clients = [await RawClient.open(scene.api) for _ in range(3)]
    await clients[0].chat("wait", stream=False, **SDK)
    await until(lambda: scene.worker.seen, what="the claim")
    for client in clients[1:]:
        await client.chat("wait", stream=False, **AGAIN)

    async def three() -> bool:
        return bool(await scene.store.command("ZCARD", scene.store.keys.due) == 3)

    await until_true(three, what="three jobs")
    scene.go.set()
    for client in clients:
        assert await client.head() == 200
        assert b"Hello world" in await client.body()
    assert len({client.headers["x-gateway-job"] for client in clients}) == 3


async def test_two_retries_at_once_do_not_share_a_job(scene: Scene) -> None:
    """One takes up what was left behind, the other is a new job."""
    job_id = await left_behind(scene)
    both = [await RawClient.open(scene.api) for _ in range(2)]
    await asyncio.gather(*(client.chat("wait", stream=False, **AGAIN) for client in both))
    await until(lambda: len(scene.worker.seen) == 2, what="the second claim")
    scene.go.set()
    for client in both:
        assert await client.head() == 200
        await client.body()
    ids = [client.headers["x-gateway-job"] for client in both]
    assert job_id in ids and len(set(ids)) == 2


@pytest.mark.parametrize("other", ["body", "lane", "first"])
async def test_what_asks_for_something_else_is_a_new_job(scene: Scene, other: str) -> None:
    """Another body, another lane, or no retry at all."""
    job_id = await left_behind(scene)
    headers = AGAIN | {"body": {}, "lane": {"x_gateway_lane": "fast-edit"}, "first": SDK}[other]
    client = await RawClient.open(scene.api)
    body = chat_body("wait", stream=False, **({"seed": 2} if other == "body" else {}))
    await client.send("POST", "/v1/chat/completions", body, **headers)
    await until(lambda: len(scene.worker.seen) == 2, what="the second claim")
    scene.go.set()
    assert await client.head() == 200
    await client.body()
    assert client.headers["x-gateway-job"] != job_id


async def test_a_new_request_of_the_session_ends_what_it_left_behind(scene: Scene) -> None:
    """Whoever asks something else does not come back; a session's requests that are read go on."""
    clients = [await RawClient.open(scene.api) for _ in range(3)]
    await clients[0].chat("wait a", x_session_affinity="tab", **SDK)
    await until(lambda: scene.worker.seen, what="the claim")
    clients[0].close()
    job_id = await nobody_reads(scene)
    before = await scene.job(job_id)
    await clients[1].chat("wait b", x_session_affinity="other", **SDK)
    await until(lambda: len(scene.worker.seen) == 2, what="a claim of another session")
    assert (await scene.job(job_id)).abandon_at == before.abandon_at
    await clients[2].chat("hello", x_session_affinity="tab")

    async def over() -> bool:
        return (await scene.job(job_id)).abandon_at < before.abandon_at

    await until_true(over, what="the abandoned job's grace is over", timeout_s=1)
    await jobs.cancel(scene.store, job_id, only="abandoned")  # as the scheduler does, to which it is due now
    assert (await scene.job(job_id)).state is State.CANCELLED
    assert (await scene.job(scene.worker.seen[1].id)).live
