"""POST /v1/jobs over real HTTP: a job that nobody waits for, what it may ask for, and how it is tried again."""

import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from api import async_jobs
from api.gateway import Gateway
from broker import jobs
from broker.callers import Caller, Rights
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store
from broker.trust import resolver
from tests.support.invariants import violated
from tests.support.live_api import POLICY, LiveApi, Scene, live_api, live_scene

pytestmark = pytest.mark.timeout(40)

DAY_MS = 86_400_000
PUBLIC = "https://1.1.1.1/hook"


def order(said: str = "hello", *, model: str = "big", stream: bool = False, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": said}], "stream": stream}
    return {"body": body, **more}


def http_of(api: LiveApi, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=api.url, timeout=20, headers=headers)


@pytest_asyncio.fixture
async def http(scene: Scene) -> AsyncIterator[httpx.AsyncClient]:
    async with http_of(scene.api) as client:
        yield client


async def handed_in(http: httpx.AsyncClient, said: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = await http.post("/v1/jobs", json=said, headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert answer.status_code == 202, answer.text
    told: dict[str, Any] = answer.json()
    assert answer.headers["location"] == told["links"]["self"] == f"/v1/jobs/{told['id']}"
    return told


# --- handing in --------------------------------------------------------------------------------------------------


async def test_a_job_is_done_without_anybody_who_waits(scene: Scene, http: httpx.AsyncClient) -> None:
    """It enters the model's batch lane, and its record and request are kept as long as asynchronous ones are."""
    await http.post("/v1/webhooks/secrets")
    told = await handed_in(http, order(metadata={"commit": "abc"}, webhook=PUBLIC))
    assert (told["lane"], told["mode"], told["priority"]) == ("big.batch", "async", "batch")
    done = await scene.until_state(told["id"], State.DONE)
    keys = scene.store.keys
    for key in (keys.job(done.id), keys.request(done.id), keys.frames(done.id)):
        assert DAY_MS - 60_000 < await scene.store.command("PTTL", key) <= DAY_MS
    shown = (await http.get(f"/v1/jobs/{done.id}")).json()
    assert (shown["metadata"], shown["webhook"]) == ({"commit": "abc"}, PUBLIC)
    assert not shown["seen"] and await violated(scene.store) == []


async def test_a_webhook_that_could_never_be_told_is_refused_at_once(scene: Scene, http: httpx.AsyncClient) -> None:
    """Nobody is to learn a day later that nothing was signed, or that the policy lets nothing go there."""
    unsigned = await http.post("/v1/jobs", json=order(webhook=PUBLIC))
    assert (unsigned.status_code, unsigned.json()["error"]["param"]) == (400, "webhook")
    assert "gateway webhook secret new" in unsigned.json()["error"]["message"]
    await http.post("/v1/webhooks/secrets")
    inner = await http.post("/v1/jobs", json=order(webhook="http://10.20.0.7/hook"))
    assert (inner.status_code, inner.json()["error"]["code"]) == (400, "address_refused")
    assert "webhooks: { allow: ['10.20.0.7'] }" in inner.json()["error"]["message"]
    assert await scene.store.command("ZCARD", scene.store.keys.due) == 0


async def test_a_repeat_is_led_to_its_job_whatever_may_be_said_against_its_webhook_by_now(
    scene: Scene, http: httpx.AsyncClient
) -> None:
    """Whoever lost the 202 and hears a refusal would hand the work in elsewhere."""
    made = (await http.post("/v1/webhooks/secrets")).json()
    told = await handed_in(http, order("wait", webhook=PUBLIC), idempotency_key="k")
    await http.delete(f"/v1/webhooks/secrets/{made['id']}")
    assert (await handed_in(http, order("wait", webhook=PUBLIC), idempotency_key="k"))["id"] == told["id"]
    other = await http.post("/v1/jobs", json=order("hello", webhook=PUBLIC), headers={"idempotency-key": "k"})
    assert other.status_code == 422


async def test_a_name_that_is_not_resolved_in_time_is_looked_up_again_when_it_is_told(
    scene: Scene, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' silent names may hold every thread of the resolver: nobody is refused for that."""
    over = threading.Event()
    monkeypatch.setattr(resolver, "RESOLVE_S", 0.05)
    monkeypatch.setattr(resolver, "_addresses", lambda _host, _port: over.wait(20))
    await http.post("/v1/webhooks/secrets")
    for url in ("https://silent.example.com/", PUBLIC):
        await handed_in(http, order(webhook=url))
    assert await resolver.resolve("fe80::1%lo", 80) == ["fe80::1"]
    over.set()


async def test_the_body_reaches_the_runtime_as_it_was_written(scene: Scene, http: httpx.AsyncClient) -> None:
    """Spaces, order and odd numbers and all: a prompt cache downstream depends on it."""
    body = '{ "seed": 12345678901234567890,  "model":"big", "messages":[{"role":"user","content":"wait \\u00e9"}] }'
    answer = await http.post("/v1/jobs", content=f'{{"metadata":{{"ä":"ö"}}, "body": {body} }}')
    assert answer.status_code == 202
    assert await scene.store.command("GET", scene.store.keys.request(answer.json()["id"])) == body.encode()


async def test_it_may_start_later_and_give_up_sooner(scene: Scene, http: httpx.AsyncClient) -> None:
    """`expiresAfter` counts from its start."""
    now = await scene.store.now_ms()
    told = await handed_in(http, order(notBefore="10m", expiresAfter="2h"))
    assert told["state"] == "scheduled"
    assert 0 <= told["not_before"] - now - 600_000 < 5_000
    assert told["give_up_at"] - told["not_before"] == 7_200_000
    exact = await handed_in(http, order(notBefore=now // 1000 + 60))
    assert exact["not_before"] == (now // 1000 + 60) * 1000
    assert (await handed_in(http, order(notBefore="2020-01-01T00:00:00Z")))["not_before"] == 0


async def test_a_lane_and_a_priority_of_its_own(scene: Scene, http: httpx.AsyncClient) -> None:
    """Named in the body or in the header, the body first; an interactive job enters the lane itself."""
    told = await handed_in(http, order(lane="fast-edit"), x_gateway_lane="big")
    assert (told["asked"], told["lane"]) == ("fast-edit", "small.batch")
    told = await handed_in(http, order(priority="interactive"), x_gateway_lane="fast-edit", x_session_affinity="s7")
    assert (told["lane"], told["priority"], told["session"]) == ("small", "interactive", "s7")


async def test_any_endpoint_that_generates_can_be_wrapped(scene: Scene, http: httpx.AsyncClient) -> None:
    """Also in another dialect than OpenAI's."""
    body = {"model": "big", "max_tokens": 9, "messages": [{"role": "user", "content": "wait"}]}
    told = await handed_in(http, {"endpoint": "/v1/messages", "body": body})
    assert (await jobs.read(scene.store, told["id"])).endpoint == "/v1/messages"


async def test_a_repeated_key_gives_the_same_job(scene: Scene, http: httpx.AsyncClient) -> None:
    """While it lives, and once it is done; another order under the key is refused, also one with the same body."""
    first = await handed_in(http, order("wait"), idempotency_key="k")
    assert (await handed_in(http, order("wait"), idempotency_key="k"))["id"] == first["id"]
    for other in (order("hello"), order("wait", metadata={"a": "b"})):
        refused = await http.post("/v1/jobs", json=other, headers={"idempotency-key": "k"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_mismatch")
    scene.go.set()
    await scene.until_state(first["id"], State.DONE)
    again = await handed_in(http, order("wait"), idempotency_key="k")
    assert (again["id"], again["state"]) == (first["id"], "done")


async def test_a_failed_job_frees_its_key(scene: Scene, http: httpx.AsyncClient) -> None:
    first = await handed_in(http, order("break_early"), idempotency_key="k")
    await scene.until_state(first["id"], State.FAILED)
    assert (await handed_in(http, order("break_early"), idempotency_key="k"))["id"] != first["id"]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"body": "hello"}, "body"),
        ({}, "body"),
        (order(endpoint="/v1/models"), "endpoint"),
        (order(endpoint=7), "endpoint"),
        (order(prority="batch"), "prority"),
        (order(priority="urgent"), "priority"),
        (order(lane=7), "lane"),
        (order(webhook="ftp://example.com/x"), "webhook"),
        (order(webhook="https://"), "webhook"),
        (order(webhook="http://example.com:99999/"), "webhook"),
        (order(webhook="https://example.com/" + "x" * 2_048), "webhook"),
        (order(metadata={"a": 1}), "metadata"),
        (order(metadata={"a": "x" * 513}), "metadata"),
        (order(metadata={"x" * 65: ""}), "metadata"),
        (order(metadata={str(n): "" for n in range(17)}), "metadata"),
        (order(metadata=["a"]), "metadata"),
        (order(notBefore="soon"), "notBefore"),
        (order(notBefore="2026-11-30"), "notBefore"),
        (order(notBefore=True), "notBefore"),
        (order(notBefore="31d"), "notBefore"),
        (order(notBefore=1e300), "notBefore"),
        (order(expiresAfter="0s"), "expiresAfter"),
        (order(expiresAfter="31d"), "expiresAfter"),
        (order(expiresAfter="900ms"), "expiresAfter"),
        (order(expiresAfter=60), "expiresAfter"),
        (order(stream=7), "stream"),  # type: ignore[arg-type]
        ({"endpoint": "/api/chat", "body": {"model": "big", "messages": []}}, "body"),
    ],
)
async def test_a_wrong_order_is_refused_with_its_key(
    scene: Scene, http: httpx.AsyncClient, wrong: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/jobs", json=wrong)
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("invalid_request", param)
    assert await scene.store.command("ZCARD", scene.store.keys.due) == 0


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ('"metadata":{"a":"\\ud800"}', False), ('"metadata":{"\\ud800":"a"}', False), ('"lane":"\\ud800"', False),
        ('"lane":"big\\n"', False), ('"webhook":"https://x/\\ud800"', False), ('"\\ud800":1', False),
        ('"notBefore":1e400', False), ('"metadata":{"a":"\\u0000\\n ü"},"lane":null,"notBefore":null', True),
        ('"body":7,"body":{"model":"big","messages":[{"role":"user","content":"hello"}]}', True),
    ],
)  # fmt: skip
async def test_odd_texts(scene: Scene, http: httpx.AsyncClient, more: str, taken: bool) -> None:
    """Whatever is taken can be told again."""
    body = '{"model":"big","messages":[{"role":"user","content":"hello"}]}'
    answer = await http.post("/v1/jobs", content=f'{{"body":{body},{more}}}'.encode())
    assert answer.status_code == (202 if taken else 400), answer.text
    assert (await http.get("/v1/jobs")).status_code == 200
    if taken:
        assert (await http.get(answer.json()["links"]["self"])).json()["metadata"] == answer.json()["metadata"]


async def test_what_admission_refuses_is_told_and_counted(scene: Scene, http: httpx.AsyncClient) -> None:
    """An unknown name by what it was given as, a lane without a place, a model that nobody can serve."""
    for more, headers, code, param in (
        ({}, {}, "model_not_found", "model"),
        ({"lane": "nowhere"}, {"x-gateway-lane": "big"}, "lane_not_found", "lane"),
        ({}, {"x-gateway-lane": "nowhere"}, "lane_not_found", "X-Gateway-Lane"),
    ):
        answer = await http.post("/v1/jobs", json=order(model="nobody", **more), headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, code, param)
    await scene.beat(big="quarantined")
    answer = await http.post("/v1/jobs", json=order())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    await scene.api.gateway.refusals.write()
    usage = (await http.get("/v1/usage")).json()
    assert usage["total"]["refused_by"] == {"model_not_found": 1, "lane_not_found": 2, "model_unavailable": 1}


async def test_a_full_lane_is_told(store: Store) -> None:
    policy = POLICY + "lanes:\n  big.batch: { maxQueue: 0 }\n"
    async with live_scene(store, policy=policy) as scene, http_of(scene.api) as http:
        for _ in range(2):
            await handed_in(http, order("wait"))
        answer = await http.post("/v1/jobs", json=order("wait"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "lane_full")


async def test_more_that_start_later_than_may_are_told_when_one_starts(store: Store) -> None:
    """The lane is empty, and what may start at once is taken all the same, whatever the key lets wait."""
    policy = POLICY + "lanes:\n  big.batch: { maxQueue: 2 }\n"
    async with live_scene(store, policy=policy, keys="root:secret") as scene:
        await scene.api.name("bot", rights=Rights(max_waiting=2))
        async with http_of(scene.api, **scene.api.bearer("bot")) as http:
            for _ in range(2):
                await handed_in(http, order(notBefore="6m"))
            answer = await http.post("/v1/jobs", json=order(notBefore="6m"))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (429, "schedule_full", "30")
            assert "may start later in big.batch are scheduled; the first starts in 3" in error["message"]
            told = await handed_in(http, order())
            await scene.until_state(told["id"], State.DONE)


async def test_a_key_for_batch_work_asks_for_no_more(fake_store: Store) -> None:
    """And what a key opens counts for jobs as it does for requests."""
    await PolicyBook(fake_store).apply(POLICY)
    async with live_api(fake_store, keys="root:secret") as api:
        await api.name("bot", rights=Rights(priority="batch", lanes=("big",)))
        async with http_of(api, **api.bearer("bot")) as http:
            for wrong in (order(priority="interactive"), order(model="small"), order(lane="small")):
                answer = await http.post("/v1/jobs", json=wrong)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "lane_forbidden")
        async with http_of(api) as http:
            assert (await http.post("/v1/jobs", json=order())).status_code == 401


# --- following ---------------------------------------------------------------------------------------------------


async def test_a_follower_never_endangers_the_job(scene: Scene, http: httpx.AsyncClient) -> None:
    """It is given back after a follower has read of it, starts again, and the follower is told so."""
    told = await handed_in(http, order("restart", stream=True))
    async with http.stream("GET", told["links"]["events"]) as events:
        lines = []
        async for line in events.aiter_lines():
            lines.append(line)
            if "never to be seen" in line:
                scene.go.set()
    assert "event: restarted" in lines and lines.index("event: restarted") < lines.index("event: end")
    after = "".join(lines[lines.index("event: restarted") :])
    assert "never to be seen" not in after and '"kind":"done"' in after
    done = await scene.job(told["id"])
    assert (done.state, done.attempt, done.seen) == (State.DONE, 2, False)


async def test_a_follower_that_leaves_leaves_the_job_alone(scene: Scene, http: httpx.AsyncClient) -> None:
    """And comes back to where it was."""
    told = await handed_in(http, order("pause", stream=True))
    seen = ""
    async with http.stream("GET", told["links"]["events"]) as events:
        async for line in events.aiter_lines():
            seen = line.removeprefix("id: ") if line.startswith("id: ") else seen
            if "Hello" in line:
                break
    scene.go.set()
    await scene.until_state(told["id"], State.DONE)
    rest = await http.get(told["links"]["events"], headers={"last-event-id": seen})
    assert "Hello" not in rest.text and "world" in rest.text and "event: end" in rest.text


async def test_cancel_ends_it_in_any_state(scene: Scene, http: httpx.AsyncClient) -> None:
    for said, more in (("wait", {}), ("wait", {"notBefore": "1h"})):
        told = await handed_in(http, order(said, **more))
        assert (await http.delete(told["links"]["cancel"])).json()["state"] == "cancelled"


# --- trying again ------------------------------------------------------------------------------------------------


async def test_a_dead_job_is_tried_again_from_its_request(scene: Scene, http: httpx.AsyncClient) -> None:
    """The two name each other; asking twice gives the same one, until that has failed as well."""
    asked = order("wait_and_break", metadata={"a": "b"}, expiresAfter="1h")
    first = await handed_in(http, asked, x_session_affinity="s1")
    scene.go.set()
    await scene.until_state(first["id"], State.FAILED)
    scene.go.clear()
    again = (await http.post(f"/v1/jobs/{first['id']}/retry")).json()
    assert again["id"] != first["id"] and again["retry_of"] == first["id"]
    assert (again["metadata"], again["session"], again["lane"]) == ({"a": "b"}, "s1", "big.batch")
    assert again["give_up_at"] - again["submitted_at"] == 3_600_000
    assert (await http.get(first["links"]["self"])).json()["retried_as"] == again["id"]
    assert (await http.post(f"/v1/jobs/{first['id']}/retry")).json()["id"] == again["id"]
    scene.go.set()
    await scene.until_state(again["id"], State.FAILED)
    third = (await http.post(f"/v1/jobs/{first['id']}/retry")).json()
    assert third["id"] not in (first["id"], again["id"])
    request = scene.store.keys.request
    bodies = [await scene.store.command("GET", request(one["id"])) for one in (first, again, third)]
    assert bodies == [json.dumps(asked["body"], separators=(",", ":"), ensure_ascii=False).encode()] * 3


async def test_what_was_to_start_later_is_tried_again_no_sooner(scene: Scene, http: httpx.AsyncClient) -> None:
    """It was put off on purpose; a start that has passed meanwhile counts no more."""
    old = await handed_in(http, order(notBefore="1h", expiresAfter="2h"))
    await http.delete(f"/v1/jobs/{old['id']}")
    again = (await http.post(f"/v1/jobs/{old['id']}/retry")).json()
    assert (again["state"], again["not_before"], again["give_up_at"]) == (
        "scheduled",
        old["not_before"],
        old["give_up_at"],
    )
    await http.delete(f"/v1/jobs/{again['id']}")
    await scene.store.command("HSET", scene.store.keys.job(again["id"]), "not_before", old["submitted_at"] + 1)
    assert (await http.post(f"/v1/jobs/{old['id']}/retry")).json()["not_before"] == 0


async def test_a_request_is_tried_again_by_one_job_at_a_time(scene: Scene, http: httpx.AsyncClient) -> None:
    """Whichever of those that tried it is asked to: a script that tries again all that failed finds several."""
    tried = [(await handed_in(http, order("wait", notBefore="1h")))["id"]]
    for _ in range(3):
        await http.delete(f"/v1/jobs/{tried[-1]}")
        tried.append((await http.post(f"/v1/jobs/{tried[0]}/retry")).json()["id"])
    *ended, newest = tried
    assert len(set(tried)) == 4
    for job_id in ended:
        assert (await http.post(f"/v1/jobs/{job_id}/retry")).json()["id"] == newest
    assert (await http.get(f"/v1/jobs/{newest}")).json()["retry_of"] == ended[-1]


async def test_a_job_that_is_tried_again_may_leave_no_further(store: Store) -> None:
    """Its key may be open to other remote lanes by now, its request said nothing of them."""
    book = PolicyBook(store)
    await book.apply(POLICY)
    api = SimpleNamespace(book=book, store=store)
    was = JobRecord(id="was", caller="ann", asked="big", mode="async", state=State.FAILED, zone="remote", exits="a b")
    await store.command("SET", store.keys.request("was"), json.dumps(order()["body"]))
    taken: list[JobRecord] = []

    async def let_in(_gateway: Any, job: JobRecord, _order: Any, **_more: Any) -> JobRecord:
        taken.append(job)
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_jobs, "let_in", let_in)
        for lanes in (("b", "c"), ("c",), ()):
            rights = Rights(remote=True, remote_lanes=lanes)
            await async_jobs.again(cast(Gateway, api), was, Caller("ann", rights))
    assert [(job.zone, job.exits) for job in taken] == [("remote", "b"), ("local", ""), ("local", "")]


async def test_only_the_dead_are_tried_again(scene: Scene, http: httpx.AsyncClient) -> None:
    """Neither what lives nor what is done, nor a job whose request was not kept."""
    live = await handed_in(http, order("wait"))
    done = await handed_in(http, order("hello"))
    await scene.until_state(done["id"], State.DONE)
    body = order("break_early")["body"]
    whole = await http.post("/v1/chat/completions", json=body)
    for job_id in (live["id"], done["id"], whole.headers["x-gateway-job"]):
        answer = await http.post(f"/v1/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_retryable")
    assert (await http.post("/v1/jobs/nobody/retry")).status_code == 404
