"""Webhooks over HTTP: secrets that are shown once, to each only its own deliveries, sending again, what is counted."""

from typing import Any

import httpx
import pytest

from api.errors import wrong
from broker import jobs, lanes, webhook_secrets, webhooks
from broker.errors import AddressRefused
from broker.records import JobRecord
from broker.store import Store
from tests.support.live_api import Scene, live_scene

pytestmark = pytest.mark.timeout(60)

BOSS = {"authorization": "Bearer boss-secret"}
URL = "https://ci.example.com/hook"


async def ask(scene: Scene, method: str, path: str, caller: str = "ann", **more: Any) -> httpx.Response:
    headers = BOSS if caller == "boss" else scene.api.bearer(caller)
    async with httpx.AsyncClient(base_url=scene.api.url, timeout=15, headers=headers) as http:
        return await http.request(method, path, **more)


async def ended(scene: Scene, caller: str, job_id: str) -> str:
    """A job of this caller's with a webhook, which has been cancelled; gives the delivery's id."""
    gateway = scene.api.gateway
    lane = gateway.book.active.lane("big")
    assert lane is not None
    record = JobRecord(id=job_id, caller=caller, mode="async", webhook=URL, asked="big")
    await lanes.submit(gateway.store, gateway.book.active, gateway.fleet, record, lane, b"{}", wanted=False)
    await jobs.cancel(gateway.store, job_id)
    await webhooks.gather(gateway.store, limit=9)
    return (await webhooks.listed(gateway.store, caller=caller))[0].id


async def test_secrets_are_shown_once_and_to_their_caller_only(store: Store) -> None:
    async with live_scene(store, keys="boss:boss-secret") as scene:
        await scene.api.name("ann", "bob")
        made = await ask(scene, "POST", "/v1/webhooks/secrets")
        assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
        first = made.json()
        assert first["caller"] == "ann" and first["secret"].startswith("whsec_")
        again = await ask(scene, "POST", "/v1/webhooks/secrets")
        assert again.status_code == 409 and "webhook secret rotate" in again.json()["error"]["message"]
        for wrong in ({"overlapS": -1}, {"rotate": "yes"}, {"overlap": 1}):
            assert (await ask(scene, "POST", "/v1/webhooks/secrets", json=wrong)).status_code == 400
        second = (await ask(scene, "POST", "/v1/webhooks/secrets", json={"rotate": True, "overlapS": 60})).json()

        listed = await ask(scene, "GET", "/v1/webhooks/secrets")
        assert [one["id"] for one in listed.json()["data"]] == [second["id"], first["id"]]
        assert [one["ends_at"] > 0 for one in listed.json()["data"]] == [False, True]
        assert first["secret"] not in listed.text and second["secret"] not in listed.text
        for other in ("bob", "boss"):
            assert (await ask(scene, "GET", "/v1/webhooks/secrets", other)).json()["data"] == []
            assert (await ask(scene, "DELETE", f"/v1/webhooks/secrets/{first['id']}", other)).status_code == 409
        gone = await ask(scene, "DELETE", f"/v1/webhooks/secrets/{first['id']}")
        assert gone.json() == {"caller": "ann", "revoked": first["id"]}
        assert [one.secret for one in await webhook_secrets.listed(store, "ann")] == [second["secret"]]


async def test_deliveries_are_shown_to_each_only_its_own(store: Store) -> None:
    async with live_scene(store, keys="boss:boss-secret") as scene:
        await scene.api.name("ann", "bob")
        mine = [await ended(scene, "ann", f"A{number}") for number in range(3)]
        his = await ended(scene, "bob", "B0")
        path = "/v1/webhooks/deliveries"
        found = (await ask(scene, "GET", path)).json()
        assert {one["id"] for one in found["data"]} == set(mine) and found["has_more"] is False
        assert {(one["state"], one["url"], one["type"]) for one in found["data"]} == {("pending", URL, "job.cancelled")}
        assert "body" not in found["data"][0]
        assert len((await ask(scene, "GET", path, "boss")).json()["data"]) == 4
        page = (await ask(scene, "GET", path + "?limit=2")).json()
        rest = (await ask(scene, "GET", f"{path}?limit=2&after={page['data'][-1]['id']}")).json()
        assert [one["id"] for one in page["data"] + rest["data"]] == [one["id"] for one in found["data"]]
        assert (page["has_more"], rest["has_more"]) == (True, False)
        for wrong, status in (("?limit=0", 400), ("?limit=201", 400), ("?limit=many", 400), (f"?after={his}", 404)):
            assert (await ask(scene, "GET", path + wrong)).status_code == status, wrong
        again = await ask(scene, "POST", f"{path}/{his}/redeliver")
        assert (again.status_code, again.json()["error"]["code"]) == (404, "delivery_not_found")
        for caller in ("bob", "boss"):
            sent = await ask(scene, "POST", f"{path}/{his}/redeliver", caller)
            assert sent.status_code == 202 and sent.json()["id"] == his


async def test_attempts_are_told_and_counted(store: Store) -> None:
    async with live_scene(store, keys="boss:boss-secret") as scene:
        await scene.api.name("ann")
        await ended(scene, "ann", "A0")
        (place,) = await webhooks.due(store, limit=9)
        (taken,) = await webhooks.take(store, place, most=9, failures_max=5, horizon_ms=9)
        told = webhooks.Try(1_790_000_000_000, 503, 12, "it answered 503")
        await webhooks.note(store, taken, "failed", told, retry_after_ms=60_000)
        (found,) = (await ask(scene, "GET", "/v1/webhooks/deliveries")).json()["data"]
        assert found["attempts"] == [{"at": 1_790_000_000_000, "status": 503, "ms": 12, "error": "it answered 503"}]
        assert (found["state"], found["tries"]) == ("pending", 1) and found["next_at"] > 0
        assert found["left_alone_until"] == 0
        await store.command("XADD", store.keys.outbox, "*", "id", "msg_x")
        page = (await ask(scene, "GET", "/metrics", "boss")).text
        assert 'gateway_webhook_attempts_total{outcome="failed"} 1.0' in page
        assert 'gateway_webhook_attempts_total{outcome="delivered"} 0.0' in page
        assert "gateway_outbox_length 1.0" in page


async def test_a_delivery_says_until_when_its_endpoint_is_left_alone(store: Store) -> None:
    """Its next attempt is due before that, and does not come."""
    async with live_scene(store, keys="boss:boss-secret") as scene:
        await scene.api.name("ann", "bob")
        await ended(scene, "ann", "A0")
        await ended(scene, "bob", "B0")
        for place in await webhooks.due(store, limit=9):
            (taken,) = await webhooks.take(store, place, most=9, failures_max=5, horizon_ms=9)
            told, anns = webhooks.Try(1_790_000_000_000, 503, 12, "it answered 503"), taken.delivery.caller == "ann"
            await webhooks.note(
                store, taken, "failed", told, retry_after_ms=5_000, breaks=True, open_for_ms=300_000 if anns else 0
            )
        now = await store.now_ms()
        data = (await ask(scene, "GET", "/v1/webhooks/deliveries", "boss")).json()["data"]
        until = {one["caller"]: one["left_alone_until"] for one in data}
        assert now + 290_000 < until["ann"] <= now + 300_000 and until["bob"] == 0
        assert all(one["next_at"] <= now + 5_000 for one in data)
        again = await ask(scene, "POST", f"/v1/webhooks/deliveries/{data[-1]['id']}/redeliver", "boss")
        assert again.json()["left_alone_until"] == 0, "by hand it goes at once"


def test_a_refused_address_is_told_with_the_line_that_opens_it() -> None:
    """As the api tells it, whichever endpoint asks."""
    told = wrong(AddressRefused("ci.internal", "private"))
    assert (told.status, told.code, told.param) == (400, "address_refused", "webhook")
    assert "`webhooks: { allow: ['ci.internal'] }`" in told.message
