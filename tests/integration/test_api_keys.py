"""Callers and their keys over real HTTP: made, listed, rotated, revoked; and what each key opens."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from broker.callers import Rights
from broker.keybook import KeyBook
from broker.lifecycle import State
from broker.store import Store
from tests.support.broker_world import fake_world
from tests.support.live_api import LiveApi, RawClient, Scene, chat_body, live_api, live_scene, until_true
from tests.support.starvation import Starvation
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

ROOT = "root:of-all"
REFUSED = {"code": "invalid_api_key", "message": "this key is not one of this gateway's"}


@pytest_asyncio.fixture
async def guarded(store: Store) -> AsyncIterator[Scene]:
    """A gateway with one key in its environment."""
    async with live_scene(store, keys=ROOT) as scene:
        yield scene


async def call(
    api: LiveApi, method: str, path: str, body: Any = None, *, key: str = "of-all", **headers: str
) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        given["authorization"] = f"Bearer {key}"
    async with httpx.AsyncClient(base_url=api.url, timeout=15, headers=given) as client:
        return await client.request(method, path, json=body)


async def chat(api: LiveApi, key: str, *, model: str = "big", **headers: str) -> httpx.Response:
    asked = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    return await call(api, "POST", "/v1/chat/completions", asked, key=key, **headers)


async def new(api: LiveApi, name: str, **rights: Any) -> str:
    answer = await call(api, "POST", "/v1/keys", {"name": name} | rights)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    key: str = answer.json()["key"]
    return key


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_new_key_opens_at_once(guarded: Scene) -> None:
    key = await new(guarded.api, "laptop-3")
    answer = await chat(guarded.api, key)
    assert answer.status_code == 200
    assert (await guarded.job(answer.headers["x-gateway-job"])).caller == "laptop-3"
    assert (await chat(guarded.api, "")).status_code == 401


async def test_a_revoked_key_opens_nothing_anywhere_within_a_second(guarded: Scene, store: Store) -> None:
    async with live_api(store, keys=ROOT) as second:
        key = await new(guarded.api, "laptop-3")

        async def known() -> bool:
            return (await call(second, "GET", "/v1/models", key=key)).status_code == 200

        async def gone() -> bool:
            return (await call(second, "GET", "/v1/models", key=key)).status_code == 401

        await within_a_second(known, "the other api knows the key")
        assert (await call(guarded.api, "DELETE", "/v1/keys/laptop-3")).json()["name"] == "laptop-3"
        assert (await call(guarded.api, "GET", "/v1/models", key=key)).status_code == 401
        await within_a_second(gone, "the other api refuses it")


async def test_who_watches_is_shown_nothing_more_once_its_key_is_gone(guarded: Scene) -> None:
    """Nor more than its rights allow, once these are fewer: an administrator's sight ends with the key."""
    key = await new(guarded.api, "ann", admin=True)
    seen, began_s = Starvation(os.getpid()), time.monotonic()
    async with (
        httpx.AsyncClient(base_url=guarded.api.url, timeout=15, headers={"authorization": f"Bearer {key}"}) as client,
        client.stream("GET", "/v1/status/events") as stream,
    ):
        lines = stream.aiter_lines()
        while not (await anext(lines)).startswith("data: "):
            pass
        assert (await call(guarded.api, "DELETE", "/v1/keys/ann")).status_code == 200
        began_s = time.monotonic()
        more = [line async for line in lines if line.startswith("data: ")]
    assert len(more) <= 1 and time.monotonic() - began_s <= 2 + seen.seconds, "and the stream ends as it should"


async def within_a_second(seen: Callable[[], Awaitable[bool]], what: str) -> None:
    """A second of a machine that lets this process run."""
    starved, began_s = Starvation(os.getpid()), time.monotonic()
    await until_true(seen, what=what)
    took_s = time.monotonic() - began_s
    assert took_s <= 1 + starved.seconds, f"{what} after {took_s:.2f} s"


async def test_a_rotated_key_ends_at_once_or_after_a_while(guarded: Scene) -> None:
    first = await new(guarded.api, "bot", lanes=["big"])
    rotated = await call(guarded.api, "POST", "/v1/keys/bot/rotate", {"keepOldS": 3_600})
    second = rotated.json()["key"]
    assert [(await chat(guarded.api, key)).status_code for key in (first, second)] == [200, 200]
    third = (await call(guarded.api, "POST", "/v1/keys/bot/rotate")).json()["key"]
    assert [(await chat(guarded.api, key)).status_code for key in (first, second, third)] == [401, 401, 200]
    assert error(await chat(guarded.api, third, model="small")) == (403, "lane_forbidden")


async def test_a_key_ends_when_it_was_to(guarded: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await new(guarded.api, "guest", expiresInS=60)
    assert (await chat(guarded.api, key)).status_code == 200
    now = time.time()
    monkeypatch.setattr("broker.keybook.time.time", lambda: now + 61)
    answer = await chat(guarded.api, key)
    assert answer.status_code == 401
    assert {name: answer.json()["error"][name] for name in REFUSED} == REFUSED


async def test_a_key_is_for_its_lanes(guarded: Scene) -> None:
    """By any name that leads there; what else there is is not even listed."""
    key = await new(guarded.api, "bot", lanes=["fast-edit"])
    assert (await chat(guarded.api, key, model="fast-edit")).status_code == 200
    assert (await chat(guarded.api, key, model="big", x_gateway_lane="fast-edit")).status_code == 200
    answer = await chat(guarded.api, key, model="big")
    assert error(answer) == (403, "lane_forbidden")
    assert answer.json()["error"]["message"] == "the key of bot is for fast-edit, not for 'big'"
    listed = (await call(guarded.api, "GET", "/v1/models", key=key)).json()["data"]
    assert [model["id"] for model in listed] == ["fast-edit"]
    assert error(await call(guarded.api, "GET", "/v1/models/big", key=key)) == (404, "model_not_found")
    tags = (await call(guarded.api, "GET", "/api/tags", key=key)).json()["models"]
    assert [model["name"] for model in tags] == ["fast-edit"]
    count = {"model": "big", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    refused = await call(guarded.api, "POST", "/v1/messages/count_tokens", count, key=key)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


async def test_batch_work_stays_batch_work(guarded: Scene) -> None:
    key = await new(guarded.api, "bot", priority="batch")
    job = await guarded.job((await chat(guarded.api, key)).headers["x-gateway-job"])
    assert (job.lane, job.priority) == ("big.batch", "batch")


@pytest.mark.parametrize(
    ("rights", "asks", "zone", "exits"),
    [
        ({}, "true", "local", ""),
        ({"remote": True}, "true", "remote", ""),
        ({"remote": True}, "", "local", ""),
        ({"remote": True, "remoteLanes": ["far", "big"]}, "", "remote", "big big.batch far far.batch"),
        ({"remote": True, "remoteLanes": ["far"]}, "true", "remote", ""),
        ({"remote": True, "remoteLanes": ["far"]}, "false", "local", ""),
        ({"remoteLanes": ["far"]}, "true", "local", ""),
    ],
)
async def test_who_may_leave_the_machine(
    guarded: Scene, rights: dict[str, Any], asks: str, zone: str, exits: str
) -> None:
    key = await new(guarded.api, "bot", **rights)
    answer = await chat(guarded.api, key, **({"x_gateway_allow_remote": asks} if asks else {}))
    job = await guarded.job(answer.headers["x-gateway-job"])
    assert (job.zone, job.exits) == (zone, exits)


async def test_only_an_administrator_administers(guarded: Scene) -> None:
    key, admin = await new(guarded.api, "bot"), await new(guarded.api, "boss", admin=True)
    asked = [
        ("GET", "/v1/keys"), ("DELETE", "/v1/keys/boss"), ("POST", "/v1/keys/bot/rotate"), ("POST", "/v1/keys"),
        ("POST", "/v1/models/big/pin"), ("POST", "/v1/hosts/gpu1/drain"),
    ]  # fmt: skip
    for method, path in asked:
        body = {"name": "me", "admin": True} if path == "/v1/keys" and method == "POST" else None
        assert error(await call(guarded.api, method, path, body, key=key)) == (403, "admin_only"), path
    assert (await call(guarded.api, "POST", "/v1/models/big/pin", key=admin)).status_code == 200
    assert (await call(guarded.api, "GET", "/v1/keys", key=admin)).status_code == 200


async def test_a_job_is_its_callers_and_an_administrators(guarded: Scene) -> None:
    """For anybody else there is no such job, in the same words as for one that never was."""
    ann, bob = await new(guarded.api, "ann"), await new(guarded.api, "bob")
    asking = asyncio.create_task(
        call(guarded.api, "POST", "/v1/chat/completions", key=ann, body=_asked("wait")), name="a job that runs"
    )
    await until(lambda: guarded.worker.seen, what="the claim")
    job_id = guarded.worker.seen[0].id
    never = "01" + "Z" * 24
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        theirs = await call(guarded.api, method, f"/v1/jobs/{job_id}{path}", key=bob)
        nobodys = await call(guarded.api, method, f"/v1/jobs/{never}{path}", key=bob)
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace(job_id, "ID") == nobodys.text.replace(never, "ID")
    assert (await call(guarded.api, "GET", f"/v1/jobs/{job_id}", key=ann)).json()["state"] == "claimed"
    assert (await call(guarded.api, "DELETE", f"/v1/jobs/{job_id}")).json()["state"] == "cancelled"
    guarded.go.set()
    assert (await asking).status_code == 499
    assert (await guarded.job(job_id)).state is State.CANCELLED


async def test_wrong_keys_are_answered_alike(guarded: Scene) -> None:
    """401 with one body, whatever is wrong with the key: nothing tells a revoked one from one that never was."""
    key = await new(guarded.api, "bot")
    await call(guarded.api, "DELETE", "/v1/keys/bot")
    told = set()
    for wrong in (key, key[:-1], key + "x", "wl_aaaaaaaa_" + "x" * 43, "nonsense", "x" * 5_000):
        answer = await chat(guarded.api, wrong)
        told.add((answer.status_code, answer.text))
    assert len(told) == 1 and next(iter(told))[0] == 401


async def test_the_first_key_is_an_administrators(store: Store) -> None:
    """Until then everybody on this machine may do everything; from then on nobody without a key."""
    async with live_api(store) as api:
        refused = await call(api, "POST", "/v1/keys", {"name": "bot"}, key="")
        assert error(refused) == (409, "wish_refused") and "--admin" in refused.json()["error"]["message"]
        made = await call(api, "POST", "/v1/keys", {"name": "boss", "admin": True}, key="")
        boss = made.json()["key"]
        assert (await call(api, "GET", "/v1/keys", key="")).status_code == 401
        await call(api, "POST", "/v1/keys", {"name": "bot"}, key=boss)
        last = await call(api, "DELETE", "/v1/keys/boss", key=boss)
        assert error(last) == (409, "wish_refused") and "last administrator" in last.json()["error"]["message"]
        assert (await call(api, "DELETE", "/v1/keys/bot", key=boss)).status_code == 200
        assert (await call(api, "DELETE", "/v1/keys/boss", key=boss)).status_code == 200
        assert (await call(api, "GET", "/v1/keys", key="")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"name": "a b"}, "a name is 1 to 64"),
        ({"name": "anonymous"}, "without a key"),
        ({"name": "root"}, "root has a key"),
        ({"name": "bot", "expiresInS": -1}, "greater than or equal to 0"),
        ({"name": "bot", "remotelanes": ["big"]}, "Extra inputs"),
        ({"name": "bot", "admin": "perhaps"}, "boolean"),
        ({}, "required"),
        ([], "object"),
    ],
)
async def test_a_bad_wish_makes_no_key(guarded: Scene, body: Any, words: str) -> None:
    answer = await call(guarded.api, "POST", "/v1/keys", body)
    assert answer.status_code in (400, 409) and words in answer.json()["error"]["message"]
    assert [caller["name"] for caller in (await call(guarded.api, "GET", "/v1/keys")).json()["data"]] == ["root"]


async def test_what_waits_ends_with_its_key_and_what_runs_goes_on() -> None:
    """Also what starts later; and nobody else's."""
    async with fake_world() as world:
        await world.apply()
        await world.warm(big=1)
        book = KeyBook(world.store)
        await book.new("boss", Rights(admin=True), by="test")
        await book.new("bot", Rights(), by="test")
        runs, waits = [await world.submit(caller="bot") for _ in range(2)]
        later = await world.submit("big.batch", caller="bot", not_before=world.now + 60_000)
        others = await world.submit(caller="ann")
        await world.claim(runs)
        await book.revoke("bot", by="boss")
        states = [(await world.job(job)).state for job in (runs, waits, later, others)]
        assert states == [State.CLAIMED, State.CANCELLED, State.CANCELLED, State.QUEUED]
        assert (await world.job(waits)).error_message == "its key was revoked"
        await world.healthy()


async def test_a_key_shows_no_more_than_its_own(guarded: Scene) -> None:
    """Names that it may not ask for, and what others used, are not told: not by a hint, a list, nor the metrics."""
    fenced, ann = await new(guarded.api, "fenced", lanes=["small"]), await new(guarded.api, "ann")
    assert (await chat(guarded.api, ann)).status_code == 200
    for path in ("/v1/chat/completions", "/api/show"):
        asked = {"model": "bigg", "messages": [{"role": "user", "content": "hello"}]}
        told = await call(guarded.api, "POST", path, asked, key=fenced)
        assert told.status_code == 404 and "did you mean" not in told.text
    page = (await call(guarded.api, "GET", "/metrics", key=fenced)).text
    assert 'caller="ann"' not in page
    assert 'caller="ann"' in (await call(guarded.api, "GET", "/metrics")).text


async def test_nobody_can_rotate_or_revoke_what_is_not_there(guarded: Scene) -> None:
    await new(guarded.api, "laptop-3")
    for method, path in (("DELETE", "/v1/keys/laptop-4"), ("POST", "/v1/keys/laptop-4/rotate")):
        answer = await call(guarded.api, method, path)
        assert error(answer) == (404, "caller_not_found")
        assert "did you mean laptop-3" in answer.json()["error"]["message"]
    assert error(await call(guarded.api, "DELETE", "/v1/keys/root")) == (409, "wish_refused")


async def test_nobody_fills_our_memory_with_wishes(guarded: Scene) -> None:
    """Who may not change keys is told so before any body is read; from an administrator a small one is."""
    key = await new(guarded.api, "bot")
    for secret, status in ((key, 403), ("nonsense", 401), ("of-all", 413)):
        client = await RawClient.open(guarded.api)
        await client.send("POST", "/v1/keys", b" " * 70_000, authorization=f"Bearer {secret}")
        assert await client.head() == status


async def test_two_changes_at_once_are_both_made(store: Store) -> None:
    books = [KeyBook(store) for _ in range(2)]
    await books[0].new("root", Rights(admin=True), by="test")
    await asyncio.gather(*(books[n % 2].new(f"bot-{n}", Rights(), by="test") for n in range(4)))
    for book in books:
        await book.reload()
        assert sorted(book.names) == ["bot-0", "bot-1", "bot-2", "bot-3", "root"]


async def test_a_record_that_cannot_be_read_opens_nothing(guarded: Scene, store: Store) -> None:
    """Written by hand, or by another version: it is left out, loudly, and the others stay."""
    key, other = await new(guarded.api, "bot"), await new(guarded.api, "bob")
    await store.command("HSET", store.keys.callers, "caller:bot", '{"admin": "perhaps"}')
    await store.command("HINCRBY", store.keys.callers, "revision", 1)
    await guarded.api.gateway.keys.reload()
    assert (await chat(guarded.api, key)).status_code == 401
    assert (await chat(guarded.api, other)).status_code == 200


async def test_a_name_in_the_environment_too_shields_no_key(store: Store) -> None:
    """Whoever is locked out may well take the name that has a key already."""
    async with live_api(store, keys=ROOT) as api:
        await new(api, "ann")
    async with live_api(store, keys="ann:of-all") as api:
        key = (await call(api, "POST", "/v1/keys/ann/rotate")).json()["key"]
        assert (await call(api, "GET", "/v1/usage", key=key)).status_code == 200
        assert (await call(api, "DELETE", "/v1/keys/ann")).status_code == 200
        assert (await call(api, "GET", "/v1/usage", key=key)).status_code == 401
        assert error(await call(api, "DELETE", "/v1/keys/ann")) == (409, "wish_refused")


async def test_keys_that_are_lost_open_the_gateway_to_nobody(store: Store) -> None:
    """A Redis that comes back without its data, or with records that nobody can read, has revoked nothing."""
    async with live_api(store) as api:
        key = (await call(api, "POST", "/v1/keys", {"name": "boss", "admin": True}, key="")).json()["key"]
        kept = await store.hash(store.keys.callers)
        (key_field,) = [name.decode() for name in kept if name.startswith(b"key:")]
        for loss in (("DEL", store.keys.callers), ("HSET", store.keys.callers, key_field, "{}", "revision", 9)):
            await store.command(*loss)
            await api.gateway.keys.reload()
            assert [(await call(api, "GET", "/v1/keys", key=k)).status_code for k in ("", key)] == [401, 401], loss
            restored = [x for pair in kept.items() for x in pair]
            await store.command("HSET", store.keys.callers, *restored, "revision", 8)
            await api.gateway.keys.reload()
            assert (await call(api, "GET", "/v1/keys", key=key)).status_code == 200, loss


async def test_no_secret_is_in_redis(guarded: Scene, store: Store) -> None:
    key = await new(guarded.api, "bot")
    await chat(guarded.api, key)
    assert key.split("_", 2)[2].encode() not in b"".join((await store.hash(store.keys.callers)).values())


def _asked(said: str) -> Any:
    return json.loads(chat_body(said, stream=False))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
async def test_a_key_that_comes_twice_is_none(guarded: Scene, path: str, name: str) -> None:
    """The hot route and the others read the same one: neither."""
    word = {"authorization": "Bearer ", "x-api-key": ""}[name]
    for first, second in (("of-all", "wrong"), ("wrong", "of-all"), ("of-all", "of-all")):
        headers = [(name, f"{word}{first}"), (name, f"{word}{second}"), ("content-type", "application/json")]
        async with httpx.AsyncClient(base_url=guarded.api.url, headers=headers) as client:
            body = chat_body("hello", stream=False)
            answer = await (client.get(path) if path == "/v1/models" else client.post(path, content=body))
        assert error(answer) == (401, "invalid_api_key")
