"""What an api does when its Redis goes away, when it is stopped itself, and with a client that takes nothing."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from functools import partial

import httpx
import pytest
import pytest_asyncio

from api import exchange as exchange_module
from api import letting_in
from api import stream as stream_module
from api import visit as visit_module
from broker import errors, jobs, readers
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store
from tests.support.broker_world import new_namespace
from tests.support.live_api import POLICY, SDK, RawClient, Scene, live_api, live_scene, scripts, until_true
from tests.support.redis_server import RedisServer, start_server
from tests.support.scripted_worker import ScriptedWorker
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

# --- Redis goes away ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may kill."""
    server = start_server()
    yield server
    server.close()


@pytest_asyncio.fixture
async def frail(own_server: RedisServer) -> AsyncIterator[Scene]:
    """A scene on that server."""
    store = await Store.open(own_server.url, namespace=new_namespace(), name="test-api")
    async with live_scene(store) as scene:
        yield scene
    await store.close()


@pytest.mark.real
@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_redis_that_comes_back_is_waited_for(own_server: RedisServer, frail: Scene) -> None:
    """Who streams hears heartbeats and then the rest, once and in order; who comes meanwhile waits at the door."""
    reading, coming = [await RawClient.open(frail.api) for _ in range(2)]
    await reading.chat("pause")
    await reading.head()
    got = await reading.until_said(b"Hello")
    own_server.kill()
    got += await reading.until_said(b"Redis does not answer")
    async with httpx.AsyncClient(base_url=frail.api.url) as client:
        alive, ready = await client.get("/healthz"), await client.get("/readyz")
        page = (await client.get("/metrics")).text
    assert (alive.status_code, alive.json()["redis"], ready.status_code) == (200, "away", 503)
    assert "gateway_redis_up 0.0" in page
    await coming.chat("hello", model="small")
    own_server.start()
    await frail.worker.beat()
    frail.go.set()
    got += await reading.body()
    assert got.endswith(b"data: [DONE]\n\n")
    assert [got.count(b'"content":"Hello"'), got.count(b'"content":" world"')] == [1, 1]
    assert await coming.head() == 200
    await coming.body()


@pytest.mark.real
async def test_a_job_that_redis_lost_is_handed_in_again(own_server: RedisServer, frail: Scene) -> None:
    """A killed Redis may lose what it had not yet written; whoever still waits gets an answer all the same, once."""
    waiting = await RawClient.open(frail.api)
    await waiting.chat("wait", model="small")
    lost = await frail.only_job()
    own_server.kill()
    shutil.rmtree(own_server.directory / "appendonlydir")
    own_server.start()
    await until_true(partial(_applied, frail.worker.book), what="the policy is there again")
    await frail.worker.beat()
    found = await until_true(partial(_another, frail, lost.id), what="the job is handed in again", timeout_s=15)
    assert found.id != lost.id
    frail.go.set()
    assert await waiting.head() == 200
    got = await waiting.body()
    assert got.count(b'"content":"Hello"') == 1
    assert got.endswith(b"data: [DONE]\n\n")
    with pytest.raises(errors.NoSuchJob):
        await frail.job(lost.id)


async def _applied(book: PolicyBook) -> bool:
    try:
        return await book.apply(POLICY) > 0
    except errors.BrokerUnavailable:
        return False


async def _another(scene: Scene, lost: str) -> JobRecord | None:
    for job_id in await scene.store.command("ZRANGE", scene.store.keys.due, 0, -1):
        if job_id.decode() != lost:
            return await scene.job(job_id.decode())
    return None


@pytest.mark.real
async def test_a_redis_that_stays_away_is_a_503(
    own_server: RedisServer, frail: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever: a new request gets a status, a stream an error inside it, never a clean-looking end."""
    monkeypatch.setattr(letting_in, "DOOR_OUTAGE_S", 0.3)
    monkeypatch.setattr(visit_module, "OUTAGE_LIMIT_S", 0.5)
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.1)
    reading, coming = [await RawClient.open(frail.api) for _ in range(2)]
    await reading.chat("pause")
    await reading.head()
    await reading.until_said(b"Hello")
    own_server.kill()
    rest = await reading.body()
    assert b'"code":"broker_unavailable"' in rest and b"[DONE]" not in rest
    await coming.chat("hello")
    assert await coming.head() == 503
    assert json.loads(await coming.body())["error"]["code"] == "broker_unavailable"


# --- the process -------------------------------------------------------------------------------------------------


async def test_a_stopping_api_tells_its_clients_and_cancels_nothing(store: Store) -> None:
    """Who has part of an answer hears so in the stream, who waits gets a 503, and a kept job goes on."""
    book = PolicyBook(store)
    await book.apply(POLICY)
    worker = ScriptedWorker(store, book)
    async with worker.running():
        async with live_api(store) as running:
            scene = Scene(store, running, worker)
            worker.scripts = scripts(scene)
            reading, waiting = [await RawClient.open(running) for _ in range(2)]
            await reading.chat("pause", x_gateway_on_disconnect="keep")
            await reading.head()
            await reading.until_said(b"Hello")
            await waiting.chat("wait", stream=False, **SDK)
            await until(lambda: len(worker.seen) == 2, what="both claims")
            running.server.should_exit = True
            rest = await reading.body()
            assert b'"code":"broker_unavailable"' in rest and b"[DONE]" not in rest
            assert await waiting.head() == 503
        kept, left = [await jobs.read(store, job.id) for job in worker.seen]
        assert kept.live and left.live and left.abandon_at > 0
        scene.go.set()
        assert (await scene.until_state(kept.id, State.DONE)).stream
        reading.close()
        waiting.close()


async def test_a_stalled_client_is_cut_off(scene: Scene) -> None:
    """A client that takes nothing any more does not hold its job for ever."""
    client = await RawClient.open(scene.api)
    client.reader._limit = 1  # type: ignore[attr-defined]  # the loop stops reading almost at once
    await client.chat("deluge")
    await until(
        lambda: any(e.sending_since for e in scene.api.gateway.exchanges), what="a send that waits", timeout_s=20
    )
    for exchange in list(scene.api.gateway.exchanges):
        exchange.interrupt(exchange_module.Stalled)
    await until(lambda: not scene.api.gateway.exchanges, what="the end of the exchange")
    assert (await scene.until_state("", State.CANCELLED, State.DONE)).state in (State.CANCELLED, State.DONE)
    client.close()


async def test_settling_looks_only_at_what_is_overdue(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The api is not a second scheduler: it looks at its own jobs, a while after their instant."""
    looked: list[str] = []

    async def look(job_id: str) -> None:
        looked.append(job_id)

    monkeypatch.setattr(scene.api.gateway.readers, "_look", look)
    client = await RawClient.open(scene.api)
    await client.chat("wait")
    job = await scene.only_job()
    await scene.until_state(job.id, State.CLAIMED)  # a claim sets the instant anew
    await scene.api.gateway.readers.settle()
    assert looked == []
    now = await scene.store.now_ms()
    await scene.store.command("ZADD", scene.store.keys.due, now - readers.OVERDUE_MS - 5, job.id)
    await scene.api.gateway.readers.settle()
    assert looked == [job.id]
    client.close()
    await scene.until_state(job.id, State.CANCELLED)
