"""A job and those who wait for it, over real HTTP: hang-ups, retries with a key, DELETE, followers."""

import json
from typing import Any

import httpx
import pytest

from broker import errors, jobs
from broker.lifecycle import State
from tests.support.live_api import SDK, RawClient, Scene, until_true
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

# --- hang-ups ----------------------------------------------------------------------------------------------------


async def test_a_hang_up_while_it_waits_frees_the_place(scene: Scene) -> None:
    """A queued job of a client without a retry is cancelled at once."""
    await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat("hello")
    job = await scene.only_job()
    client.close()
    ended = await scene.until_state(job.id, State.CANCELLED, timeout_s=1)
    assert ended.error_message == "its client hung up"
    assert await scene.store.command("XLEN", scene.store.keys.lane("big")) == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", ["wait", "pause"])
async def test_a_hang_up_while_it_runs_ends_it(scene: Scene, said: str, stream: bool) -> None:
    """A claimed or streaming job is cancelled within a second, and its worker's next write is refused."""
    client = await RawClient.open(scene.api)
    await client.chat(said, stream=stream)
    await until(lambda: scene.worker.seen, what="the claim")
    if said == "pause":
        await scene.until_state("", State.STREAMING)
    client.close()
    await scene.until_state(scene.worker.seen[0].id, State.CANCELLED, timeout_s=1)
    scene.go.set()
    await until(lambda: scene.worker.refusals, what="a refused write")
    assert scene.worker.refusals == ["already_ended"]


async def test_a_client_that_may_retry_is_waited_for(scene: Scene) -> None:
    """With an SDK's headers the job outlives the hang-up by the grace, and not longer."""
    client = await RawClient.open(scene.api)
    await client.chat("wait", **SDK)
    await until(lambda: scene.worker.seen, what="the claim")
    client.close()
    job_id = scene.worker.seen[0].id

    async def left() -> bool:
        return not await scene.store.command("EXISTS", scene.store.keys.readers(job_id))

    async def settled() -> bool:
        try:
            await jobs.cancel(scene.store, job_id, only="abandoned")
        except errors.NotDue:
            return False
        return True

    await until_true(left, what="the reader is gone", timeout_s=2)
    job = await scene.job(job_id)
    assert job.live and 0 < job.abandon_at - await scene.store.now_ms() <= 700
    await until_true(settled, what="the end of the grace", timeout_s=3)
    assert (await scene.job(job_id)).state is State.CANCELLED


async def test_once_some_of_it_was_read_nobody_waits_for_a_retry(scene: Scene) -> None:
    """A retry would begin anew: what was half read is of no use to it."""
    client = await RawClient.open(scene.api)
    await client.chat("pause", **SDK)
    await client.head()
    await client.until_said(b"Hello")
    client.close()
    await scene.until_state("", State.CANCELLED, timeout_s=1)


async def test_a_job_that_is_to_be_kept_goes_on_without_its_client(scene: Scene) -> None:
    """X-Gateway-On-Disconnect: keep makes the answer available to whoever follows the job."""
    client = await RawClient.open(scene.api)
    await client.chat("pause", x_gateway_on_disconnect="keep")
    await client.head()
    job_id = client.headers["x-gateway-job"]
    await client.until_said(b"Hello")
    client.close()
    scene.go.set()
    assert (await scene.until_state(job_id, State.DONE)).abandon_at == 0


async def test_a_lease_is_renewed_by_one_task_for_all(scene: Scene) -> None:
    """Readers keep their lease while their clients wait, however long that is."""
    clients = [await RawClient.open(scene.api) for _ in range(2)]
    for client in clients:
        await client.chat("wait")
    await until(lambda: len(scene.worker.seen) == 2, what="both claims")
    before = [(await scene.job(job.id)).abandon_at for job in scene.worker.seen]
    await scene.api.gateway.readers.renew()
    after = [(await scene.job(job.id)).abandon_at for job in scene.worker.seen]
    assert all(b < a for b, a in zip(before, after, strict=True))
    for client in clients:
        client.close()
    for job in scene.worker.seen:
        await scene.until_state(job.id, State.CANCELLED)


# --- retries with a key ------------------------------------------------------------------------------------------


async def test_an_idempotency_key_leads_to_the_same_job(scene: Scene) -> None:
    """The second request replays the first one's answer; another body under the key is refused."""
    first, second, third = [await RawClient.open(scene.api) for _ in range(3)]
    await first.chat("pause", idempotency_key="k1")
    await first.head()
    await first.until_said(b"Hello")
    await second.chat("pause", idempotency_key="k1")
    assert await second.head() == 200
    assert second.headers["x-gateway-job"] == first.headers["x-gateway-job"]
    await second.until_said(b"Hello")
    await third.chat("hello", idempotency_key="k1")
    assert await third.head() == 422
    first.close()  # the other one still reads, so the job goes on
    scene.go.set()
    assert (await second.body()).endswith(b"data: [DONE]\n\n")
    assert len(scene.worker.seen) == 1
    for client in (second, third):
        client.close()


async def test_the_key_of_a_done_job_leads_to_its_answer(scene: Scene) -> None:
    """Whoever asks again after the end is told the same, byte for byte, and nothing is generated again."""
    first, again = [await RawClient.open(scene.api) for _ in range(2)]
    await first.chat("hello", idempotency_key="k1")
    await first.head()
    told = await first.body()
    await scene.until_state("", State.DONE)
    await again.chat("hello", idempotency_key="k1")
    assert await again.head() == 200
    assert again.headers["x-gateway-job"] == first.headers["x-gateway-job"]
    assert await again.body() == told
    assert len(scene.worker.seen) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_comes_back_is_told_of_the_job_and_not_of_the_replay(scene: Scene, stream: bool) -> None:
    """The lane that served it, and how long its first token took, whenever the answer is heard."""
    first, again = [await RawClient.open(scene.api) for _ in range(2)]
    await first.chat("wait", model="fast-edit", stream=stream, idempotency_key="k1")
    await until(lambda: scene.worker.seen, what="the claim")
    scene.go.set()
    assert await first.head() == 200
    await first.body()
    job = await scene.until_state("", State.DONE)
    await again.chat("wait", model="fast-edit", stream=stream, idempotency_key="k1")
    assert await again.head() == 200
    assert again.headers["x-gateway-lane"] == "small"
    assert again.headers["x-gateway-served-by"] == "small@gpu1"
    assert int(again.headers["x-gateway-first-token-ms"]) == job.first_token_at - job.submitted_at > 0
    await again.body()


@pytest.mark.parametrize("said", ["break_early", "wait"])
async def test_the_key_of_a_job_that_came_to_nothing_is_free_again(scene: Scene, said: str) -> None:
    """A failure or a cancel is not replayed to the retry: it is a job of its own."""
    first, again = [await RawClient.open(scene.api) for _ in range(2)]
    await first.chat(said, idempotency_key="k1")
    if said == "wait":
        await until(lambda: scene.worker.seen, what="the claim")
        await jobs.cancel(scene.store, scene.worker.seen[0].id)
    assert await first.head() == (499 if said == "wait" else 502)
    scene.go.set()
    await again.chat(said, idempotency_key="k1")
    assert await again.head() == (200 if said == "wait" else 502)
    await again.body()
    assert [job.attempt for job in scene.worker.seen] == [1, 1]
    assert len({job.id for job in scene.worker.seen}) == 2


# --- jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("said", ["queued", "wait", "pause"])
async def test_delete_ends_a_job_in_every_state(scene: Scene, said: str, stream: bool) -> None:
    """The record says cancelled, the client is told: by a status that no SDK repeats, or in its stream."""
    if said == "queued":
        await scene.beat(big="waking")
    client = await RawClient.open(scene.api)
    await client.chat(said, stream=stream)
    job = await scene.only_job()
    if said != "queued":
        await scene.until_state(job.id, State.STREAMING if said == "pause" else State.CLAIMED)
    in_band = said == "pause" and stream
    if in_band:
        await client.head()
        await client.until_said(b"Hello")
    async with httpx.AsyncClient(base_url=scene.api.url) as other:
        deleted = await other.delete(f"/v1/jobs/{job.id}")
        again = await other.delete(f"/v1/jobs/{job.id}")
        shown = await other.get(f"/v1/jobs/{job.id}")
    assert [r.json()["state"] for r in (deleted, again, shown)] == ["cancelled"] * 3
    if in_band:
        assert b'"code":"cancelled"' in await client.body()
    else:
        assert await client.head() == 499
        assert json.loads(await client.body())["error"]["code"] == "cancelled"
    client.close()


async def test_unknown_jobs_are_a_404(scene: Scene) -> None:
    """Ids that never were, or that are no ids at all."""
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        for job_id in ("01JZZZZZZZZZZZZZZZZZZZZZZZ", "a:request", "%2e%2e", "x" * 200):
            for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), path


def events(body: str) -> list[tuple[str, str, Any]]:
    """Reads server-sent events as (id, event, data), comments left out."""
    found = []
    for block in body.split("\n\n"):
        said = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if said:
            found.append((said.get("id", ""), said["event"], json.loads(said["data"])))
    return found


async def test_a_job_can_be_followed_and_resumed(scene: Scene) -> None:
    """Frames with their ids, the end, and after a broken connection exactly the rest."""
    asking = await RawClient.open(scene.api)
    await asking.chat("pause", x_gateway_on_disconnect="keep")
    await asking.head()
    path = f"/v1/jobs/{asking.headers['x-gateway-job']}/events"
    first = await RawClient.open(scene.api)
    await first.send("GET", path)
    assert await first.head() == 200
    early = events((await first.until_said(b"Hello")).decode())
    first.close()
    asking.close()
    scene.go.set()
    async with httpx.AsyncClient(base_url=scene.api.url) as client:
        whole = events((await client.get(path)).text)
        rest = events((await client.get(path, headers={"last-event-id": early[-1][0]})).text)
        over = await client.get(path, headers={"last-event-id": whole[-1][0]})
        bad = await client.get(path, headers={"last-event-id": "seven"})
    assert early + rest == whole
    assert [frame_id for frame_id, _, _ in whole] == ["1-1", "1-2", "1-3", "1-4"]
    assert [name for _, name, _ in whole] == ["frame", "frame", "frame", "end"]
    assert whole[-1][2]["kind"] == "done"
    assert (over.status_code, bad.status_code) == (204, 400)


async def test_a_follower_hears_that_the_answer_began_again(scene: Scene) -> None:
    """It may be told, because it does not make the answer seen."""
    asking = await RawClient.open(scene.api)
    await asking.chat("restart", stream=False)
    job = await scene.only_job()
    await scene.until_state(job.id, State.STREAMING)
    following = await RawClient.open(scene.api)
    await following.send("GET", f"/v1/jobs/{job.id}/events")
    await following.head()
    got = await following.until_said(b"never to be seen")
    scene.go.set()
    got += await following.body()
    names = [name for _, name, _ in events(got.decode())]
    assert names == ["frame", "restarted", "frame", "frame", "frame", "end"]
    assert not (await scene.job(job.id)).seen
    assert await asking.head() == 200
    for client in (asking, following):
        client.close()
