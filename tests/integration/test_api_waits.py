"""What a client can see of its wait while it lasts: in the heartbeats, and at its job."""

import asyncio
import math
from typing import Any

import httpx
import openai
import pytest

from api.exchange import Exchange
from api.visit import Visit, Wishes
from broker import waits
from broker.lifecycle import State
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import POLICY, RawClient, Scene, live_scene, until_true
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)


@pytest.fixture
def fresh_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "PLACES_AGE_S", -1.0)


async def one_more(scene: Scene) -> tuple[RawClient, str]:
    """Lets a job into the lane `big`; gives its client and its id."""
    due = scene.store.keys.due
    before = set(await scene.store.command("ZRANGE", due, 0, -1))
    client = await RawClient.open(scene.api)
    await client.chat("wait")

    async def came() -> set[bytes]:
        return set(await scene.store.command("ZRANGE", due, 0, -1)) - before

    (job,) = await until_true(came, what="one more job")
    return client, job.decode()


async def until_wait(scene: Scene, job_id: str, **told: Any) -> dict[str, Any]:
    """Waits until the job is shown with such a wait; gives the whole of it."""
    async with httpx.AsyncClient(base_url=scene.api.url) as http:

        async def so() -> Any:
            wait = (await http.get(f"/v1/jobs/{job_id}")).json()["wait"]
            return wait if wait is not None and wait.items() >= told.items() else None

        found: dict[str, Any] = await until_true(so, what=f"a wait with {told}")
        return found


@pytest.mark.usefixtures("quick_heartbeats", "fresh_places")
async def test_a_wait_is_seen_as_it_goes_on(scene: Scene) -> None:
    """Cold, waking, warm; those before it leave, by cancel and by claim; no time is told that nobody measured."""
    await scene.beat(big="cold")
    first, _ = await one_more(scene)
    second, _ = await one_more(scene)
    last, last_id = await one_more(scene)
    cold = await until_wait(scene, last_id, ahead=2, model_state="cold")
    assert cold == {
        "lane": "big", "ahead": 2, "model": "big", "model_state": "cold", "reason": "", "first_token_in_ms": None,
    }  # fmt: skip
    assert await last.head() == 200
    await last.until_said(b": warmlane waiting in lane big behind 2, big is cold\n")
    await scene.beat(big="waking")
    await until_wait(scene, last_id, ahead=2, model_state="waking", reason="the test says waking")
    await last.until_said(b"behind 2, big is waking (the test says waking)\n")
    first.close()
    await until_wait(scene, last_id, ahead=1)
    await last.until_said(b"behind 1, big is waking")
    await scene.beat()
    await until(lambda: len(scene.worker.seen) == 2, what="both slots taken")
    extra, extra_id = await one_more(scene)
    await until_wait(scene, extra_id, ahead=0, model_state="warm", first_token_in_ms=None)
    assert await extra.head() == 200
    await extra.until_said(b"behind 0, big is warm\n")
    scene.go.set()
    assert (await extra.body()).endswith(b"data: [DONE]\n\n")
    await scene.until_state(extra_id, State.DONE)
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        assert (await http.get(f"/v1/jobs/{extra_id}")).json()["wait"] is None
    for client in (second, last, extra):
        client.close()


@pytest.mark.usefixtures("quick_heartbeats", "fresh_places")
async def test_a_time_is_told_once_it_was_measured(scene: Scene) -> None:
    """A cold model has no slots to tell of: its second job is thought to have its turn after the first."""
    await scene.store.command("HSET", scene.store.keys.model("big"), "load_ms", 8_000)
    await scene.beat(big="cold")
    first, first_id = await one_more(scene)
    second, second_id = await one_more(scene)
    assert (await until_wait(scene, first_id, ahead=0))["first_token_in_ms"] == 8_000
    assert (await until_wait(scene, second_id, ahead=1))["first_token_in_ms"] is None
    await scene.store.command("HSET", scene.store.keys.model("big"), "service_ms", 2_000)
    await scene.beat(big="cold")
    assert (await until_wait(scene, second_id, ahead=1))["first_token_in_ms"] == 10_000
    assert await second.head() == 200
    await second.until_said(b"behind 1, big is cold, about 10 s to the first token\n")
    first.close()
    second.close()


async def test_a_cancelled_job_waits_no_more(scene: Scene) -> None:
    await scene.beat(big="cold")
    client, job_id = await one_more(scene)
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        told = (await http.delete(f"/v1/jobs/{job_id}")).json()
    assert (told["state"], told["wait"]) == ("cancelled", None)
    client.close()


# --- the patience of SDKs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_an_sdk_with_little_patience_hears_of_its_wait_in_time(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its read timeout is shorter than our hold and than the pause between two heartbeats; it counts anew with each
    byte, so that what comes within it is enough. It neither gives up nor asks twice."""
    notes: list[str] = []
    real_note = Visit.note

    async def noted(visit: Visit) -> str:
        notes.append(await real_note(visit))
        return notes[-1]

    monkeypatch.setattr(Visit, "note", noted)
    store = Store.fake(fake_redis(), namespace=new_namespace())
    async with live_scene(store, policy=POLICY.replace("headerHoldMs: 400", "headerHoldMs: 5000")) as scene:
        await scene.beat(big="waking", small="waking")
        async with scene.client(timeout=1.5) as client:
            asked: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "hello"}]}
            answer = asyncio.create_task(said(client, stream=stream, **asked))
            await until(lambda: len(notes) == 2 or answer.done(), what="two heartbeats")
            await scene.beat()
            assert await asyncio.wait_for(answer, 5) == "Hello world"
        assert len(scene.worker.seen) == 1
    await store.close()


async def said(client: openai.AsyncOpenAI, *, stream: bool, **asked: Any) -> str:
    answer: Any = await client.chat.completions.create(**asked, stream=stream)
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


@pytest.mark.parametrize(
    ("headers", "hold_s"),
    [
        ({}, math.inf),
        ({"x-stainless-read-timeout": "600"}, 480),
        ({"x-stainless-read-timeout": "5"}, 4),
        ({"x-stainless-timeout": "5"}, 4),  # Node's
        ({"x-stainless-timeout": "0"}, math.inf),  # Node's of less than a second
        ({"x-stainless-timeout": "NOT_GIVEN", "x-stainless-read-timeout": "2.5"}, 2),  # Anthropic's for Python
        ({"x-stainless-read-timeout": "0.01"}, 0.5),  # nobody is served at any price
    ],
)
async def test_how_long_a_client_is_to_hear_nothing(headers: dict[str, str], hold_s: float) -> None:
    exchange = Exchange(
        {"method": "POST", "path": "/", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]},
        *(None, None),  # type: ignore[arg-type]
    )
    assert Wishes.of(exchange).patience_s == hold_s
