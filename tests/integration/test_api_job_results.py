"""What becomes of jobs that nobody waited for: their results, their lists, and the letters of those given up on."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from api import async_jobs
from broker import dead, errors, job_lists, jobs
from broker.callers import Rights
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.store import Store
from tests.integration.test_api_async_jobs import handed_in, http_of, order
from tests.support.broker_world import World
from tests.support.invariants import violated
from tests.support.live_api import POLICY, LiveApi, RawClient, Scene, live_scene, until_true
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)


@pytest_asyncio.fixture
async def http(scene: Scene) -> AsyncIterator[httpx.AsyncClient]:
    async with http_of(scene.api) as client:
        yield client


async def ended(scene: Scene, http: httpx.AsyncClient, said: str, state: State, **more: Any) -> dict[str, Any]:
    told = await handed_in(http, order(said, **more))
    await scene.until_state(told["id"], state)
    return told


# --- waiting for the end -----------------------------------------------------------------------------------------


async def test_a_wait_ends_with_the_job(scene: Scene, http: httpx.AsyncClient) -> None:
    """At once for one that has ended; while it waits it counts among its caller's requests, and leaves no reader."""
    told = await handed_in(http, order("pause"))
    waiting = asyncio.create_task(http.get(f"/v1/jobs/{told['id']}?wait=15s"), name="waits")
    gateway = scene.api.gateway
    await until(lambda: gateway.house._under_way.get("anonymous") == 1, what="the wait is counted")
    began = asyncio.get_running_loop().time()
    scene.go.set()
    answer = (await waiting).json()
    assert answer["state"] == "done" and asyncio.get_running_loop().time() - began < 2
    assert gateway.house._under_way == {}
    assert (await http.get(f"/v1/jobs/{told['id']}?wait=15s")).json()["state"] == "done"
    assert await violated(scene.store) == []


async def test_a_wait_ends_in_time(scene: Scene, http: httpx.AsyncClient) -> None:
    told = await handed_in(http, order("wait"))
    answer = (await http.get(f"/v1/jobs/{told['id']}?wait=200ms")).json()
    assert answer["state"] in ("queued", "claimed") and answer["id"] == told["id"]
    for wrong in ("61s", "soon", "30"):
        assert (await http.get(f"/v1/jobs/{told['id']}?wait={wrong}")).status_code == 400


async def test_who_hangs_up_waits_no_longer(scene: Scene, http: httpx.AsyncClient) -> None:
    """And the job does not hear of it."""
    told = await handed_in(http, order("wait"))
    client = await RawClient.open(scene.api)
    await client.send("GET", f"/v1/jobs/{told['id']}?wait=30s")
    readers, store = scene.store.keys.readers(told["id"]), scene.store
    await until_true(lambda: store.command("EXISTS", readers), what="it reads along")
    client.close()

    async def gone() -> bool:
        return not await store.command("EXISTS", readers)

    await until_true(gone, what="it has left")
    assert scene.api.gateway.house._under_way == {} and (await scene.job(told["id"])).live


# --- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_result_is_what_a_client_that_waited_would_have_got(
    scene: Scene, http: httpx.AsyncClient, stream: bool
) -> None:
    """Whole, also where a stream was asked for, and after it began again."""
    scene.go.set()
    told = await ended(scene, http, "restart", State.DONE, stream=stream)
    result = await http.get(told["links"]["result"])
    waited = await http.post("/v1/chat/completions", json=order("hello")["body"])
    assert result.status_code == 200 and result.headers["x-gateway-lane"] == "big.batch"
    assert result.json()["choices"] == waited.json()["choices"]
    assert result.headers["x-gateway-served-by"] == "big@gpu1"


async def test_a_live_job_has_no_result_yet(scene: Scene, http: httpx.AsyncClient) -> None:
    told = await handed_in(http, order("wait"))
    answer = await http.get(told["links"]["result"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ended")


@pytest.mark.parametrize(
    ("said", "status", "code"), [("break_early", 502, "runtime_failed"), ("refuse", 422, "runtime_refused")]
)
async def test_a_failed_job_tells_its_own_error(
    scene: Scene, http: httpx.AsyncClient, said: str, status: int, code: str
) -> None:
    """With its own status, in the dialect of its endpoint."""
    told = await ended(scene, http, said, State.FAILED)
    answer = await http.get(told["links"]["result"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    body = {"model": "big", "max_tokens": 9, "messages": [{"role": "user", "content": said}]}
    told = await handed_in(http, {"endpoint": "/v1/messages", "body": body})
    await scene.until_state(told["id"], State.FAILED)
    answer = await http.get(told["links"]["result"])
    assert (answer.json()["type"], answer.json()["error"]["code"]) == ("error", code)


async def test_a_cancelled_job_says_so(scene: Scene, http: httpx.AsyncClient) -> None:
    told = await handed_in(http, order("wait"))
    await http.delete(told["links"]["cancel"])
    answer = await http.get(told["links"]["result"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (499, "cancelled")


# --- lists -------------------------------------------------------------------------------------------------------


def ids(page: dict[str, Any]) -> list[str]:
    return [job["id"] for job in page["data"]]


async def test_jobs_are_listed_newest_first_page_by_page(scene: Scene, http: httpx.AsyncClient) -> None:
    """Those that nobody waits for; what a client waits for is its own business."""
    made = [(await handed_in(http, order("wait", metadata={"n": str(n)})))["id"] for n in range(5)]
    await http.post("/v1/chat/completions", json=order("hello")["body"] | {"model": "small"})
    newest = sorted(made, reverse=True)
    first = (await http.get("/v1/jobs?limit=2")).json()
    assert (ids(first), first["next"]) == (newest[:2], newest[1])
    rest = (await http.get(f"/v1/jobs?after={first['next']}")).json()
    assert (ids(rest), rest["next"]) == (newest[2:], "")


async def test_a_list_is_filtered_by_what_records_say(
    scene: Scene, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a filter lets few through: a page that looked at enough says where to go on."""
    done = (await ended(scene, http, "hello", State.DONE, metadata={"pr": "7", "repo": "a"}))["id"]
    small = (await handed_in(http, order("wait", model="small", metadata={"pr": "7"})))["id"]
    await scene.until_state(small, State.CLAIMED)
    for query, expected in (
        ("state=done", [done]), ("model=small", [small]), ("lane=big.batch", [done]), ("lane=big", []),
        ("metadata[pr]=7", [small, done]), ("metadata[pr]=7&metadata[repo]=a", [done]), ("metadata[pr]=8", []),
        ("metadata[pr]=7&state=claimed", [small]),
    ):  # fmt: skip
        assert set(ids((await http.get(f"/v1/jobs?{query}")).json())) == set(expected), query
    for wrong in ("state=gone", "limit=0", "limit=101", "after=a:b", "limit=some"):
        assert (await http.get(f"/v1/jobs?{wrong}")).status_code == 400
    longest = "k" * async_jobs.METADATA_KEY_CHARACTERS_MAX
    assert (await http.get(f"/v1/jobs?metadata[{longest}]=7")).json()["data"] == []
    monkeypatch.setattr(job_lists, "PAGE_MAX", 1)
    monkeypatch.setattr(job_lists, "LOOKED_AT_MAX", 1)
    page = (await http.get("/v1/jobs?metadata[pr]=8&limit=1")).json()
    assert page["data"] == [] and page["next"] in (done, small)


async def test_a_slip_in_a_filters_name_does_not_list_everything(scene: Scene, http: httpx.AsyncClient) -> None:
    """Nor is any other question answered that was not asked."""
    too_long = f"metadata[{'k' * (async_jobs.METADATA_KEY_CHARACTERS_MAX + 1)}]"
    job_id = (await handed_in(http, order("wait")))["id"]
    asked = [("/v1/jobs", slip) for slip in ("stat", "metadata", "metadata[]", "state[pr]", "State", too_long)]
    others = ("/v1/dead", "/v1/audit", "/v1/usage", "/v1/tune", "/v1/webhooks/deliveries", f"/v1/jobs/{job_id}")
    for path, slip in (*asked, *((path, "sinse") for path in others)):
        answer = await http.get(path, params={slip: "1"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", slip), path
    stat = (await http.get("/v1/jobs?stat=done")).json()["error"]["message"]
    assert stat == "unknown parameter 'stat', did you mean 'state'?"


async def test_each_sees_its_own_and_an_administrator_everybodys(fake_store: Store) -> None:
    await PolicyBook(fake_store).apply(POLICY)
    async with live_scene(fake_store, keys="root:secret") as scene:
        api: LiveApi = scene.api
        await api.name("ann", "bob")
        made = {}
        for who in ("ann", "bob"):
            async with http_of(api, **api.bearer(who)) as http:
                made[who] = (await handed_in(http, order("break_early")))["id"]
                await scene.until_state(made[who], State.FAILED)
        async with http_of(api, **api.bearer("ann")) as http:
            assert ids((await http.get("/v1/jobs")).json()) == [made["ann"]]
            assert [one["job"] for one in (await http.get("/v1/dead")).json()["data"]] == [made["ann"]]
            for path in ("/v1/jobs?caller=bob", "/v1/dead?caller=bob"):
                assert (await http.get(path)).json()["error"]["code"] == "admin_only"
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry")):
                answer = await http.request(method, f"/v1/dead/{made['bob']}{path}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "letter_not_found")
            assert (await http.post(f"/v1/jobs/{made['bob']}/retry")).status_code == 404
        async with http_of(api, authorization="Bearer secret") as http:
            assert set(ids((await http.get("/v1/jobs")).json())) == set(made.values())
            assert ids((await http.get("/v1/jobs?caller=bob")).json()) == [made["bob"]]
            assert [one["caller"] for one in (await http.get("/v1/dead")).json()["data"]] == ["bob", "ann"]
            assert [one["caller"] for one in (await http.get("/v1/dead?caller=ann")).json()["data"]] == ["ann"]
            again = (await http.post(f"/v1/dead/{made['bob']}/retry")).json()
            assert (again["caller"], again["retry_of"]) == ("bob", made["bob"])
            await api.gateway.keys.revoke("ann", by="root")
            answer = await http.post(f"/v1/dead/{made['ann']}/retry")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "caller_not_found")


async def test_an_administrators_retry_has_its_callers_rights(fake_store: Store) -> None:
    async with live_scene(fake_store, keys="root:secret") as scene:
        await scene.api.name("bot", rights=Rights(max_waiting=1))
        async with http_of(scene.api, **scene.api.bearer("bot")) as http:
            died = await ended(scene, http, "break_early", State.FAILED)
            await scene.beat(big="cold")
            await handed_in(http, order("hello"))
        async with http_of(scene.api, authorization="Bearer secret") as http:
            answer = await http.post(f"/v1/jobs/{died['id']}/retry")
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "caller_limit")


async def test_a_list_forgets_what_is_forgotten(world: World) -> None:
    """With the next jobs of its caller, or when somebody lists it; and it goes itself a day after the last of them."""
    asked: dict[str, Any] = {"mode": "async", "caller": "ci", "keep_ms": 1_000}
    made = [await world.submit(**asked) for _ in range(3)]
    listed, keys = world.store.keys.jobs("ci"), world.store.keys
    await world.store.command("DEL", *(keys.job(made[0]), keys.request(made[0])))
    await world.store.command("ZREM", keys.due, made[0])
    made.append(await world.submit("small", **asked))
    members = [member.decode() for member in await world.store.command("ZRANGE", listed, 0, -1)]
    assert members == made[1:]
    left_ms = await world.store.command("PTTL", listed)
    assert 0 < left_ms - 20_000 - 1_000 <= 86_400_000
    await world.store.command("DEL", keys.job(made[1]))
    page = await job_lists.page(world.store, ["ci", "nobody"], fits=lambda job: True)
    assert [job.id for job in page.jobs] == made[:1:-1]
    assert await world.store.command("ZCARD", listed) == 2


# --- dead letters ------------------------------------------------------------------------------------------------


async def test_a_job_that_is_given_up_on_leaves_a_letter(scene: Scene, http: httpx.AsyncClient) -> None:
    """Also for what a waiting client would have been told: a runtime's refusal, a wait in vain. Never its words."""
    failed = await ended(scene, http, "refuse", State.FAILED)
    await scene.beat(hasty="waking")
    waits = await handed_in(http, order("hello", model="hasty", expiresAfter="1s"))

    async def dies() -> bool:
        return (await scene.api.gateway.due.look(waits["id"])).outcome == "expired"

    await until_true(dies, what="it expires")
    page = (await http.get("/v1/dead")).json()
    told = [(letter["job"], letter["state"], letter["code"], letter["message"]) for letter in page["data"]]
    assert told[1] == (failed["id"], "failed", "runtime_refused", "the runtime refused the request")
    assert told[0][:3] == (waits["id"], "expired", "cold_start_deadline") and len(told) == 2
    assert "temperature" not in json.dumps(page)
    by_id = (await http.get(f"/v1/dead/{page['data'][0]['id']}")).json()
    assert by_id == (await http.get(f"/v1/dead/{waits['id']}")).json() == page["data"][0]


async def test_a_cancelled_job_is_nobodys_letter(scene: Scene, http: httpx.AsyncClient) -> None:
    told = await handed_in(http, order("wait"))
    await http.delete(told["links"]["cancel"])
    assert (await http.get("/v1/dead")).json()["data"] == []
    assert (await http.get(f"/v1/dead/{told['id']}")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/dead/{}/retry", "/v1/jobs/{}/retry"])
async def test_whoever_tries_it_again_takes_the_letter(scene: Scene, http: httpx.AsyncClient, path: str) -> None:
    died = await ended(scene, http, "break_early", State.FAILED)
    again = await http.post(path.format(died["id"]))
    assert again.status_code == 202 and again.json()["retry_of"] == died["id"]
    await scene.until_state(again.json()["id"], State.FAILED)
    letters = (await http.get("/v1/dead")).json()["data"]
    assert [letter["job"] for letter in letters] == [again.json()["id"]]


async def test_a_letter_outlives_its_job(scene: Scene, http: httpx.AsyncClient) -> None:
    """Then there is nothing to try again, and it can be let go."""
    died = await ended(scene, http, "break_early", State.FAILED)
    [letter] = (await http.get("/v1/dead")).json()["data"]
    keys = scene.store.keys
    await scene.store.command("DEL", keys.job(died["id"]), keys.request(died["id"]), keys.frames(died["id"]))
    answer = await http.post(f"/v1/dead/{letter['id']}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_retryable")
    assert (await http.delete(f"/v1/dead/{letter['id']}")).json() == letter
    assert (await http.delete(f"/v1/dead/{letter['id']}")).status_code == 404
    assert (await http.get("/v1/dead?after=nonsense")).status_code == 400


async def test_letters_are_read_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for few among many is told where to go on."""
    world.real_time()
    await world.warm(big=9)
    for number in range(6):
        job_id = await world.submit(mode="async", caller="ann" if number < 2 else "bob")
        await lost(world, job_id)
    first = await dead.page(world.store, limit=4)
    assert [letter.caller for letter in first.letters] == ["bob"] * 4 and first.next == first.letters[-1].id
    rest = await dead.page(world.store, after=first.next)
    assert [letter.caller for letter in rest.letters] == ["ann"] * 2 and rest.next == ""
    monkeypatch.setattr(dead, "_CHUNK", 3)
    monkeypatch.setattr(dead, "LOOKED_AT_MAX", 3)
    none = await dead.page(world.store, caller="ann")
    assert none.letters == [] and none.next
    assert len((await dead.page(world.store, caller="ann", after=none.next)).letters) == 2


async def lost(world: World, job_id: str) -> None:
    await jobs.end(world.store, await world.claim(job_id), "fail", error=errors.RuntimeFailed("broke: it said zebra"))
