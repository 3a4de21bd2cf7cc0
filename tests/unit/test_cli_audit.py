"""`gateway audit`, from the stream to the line on the screen."""

import asyncio
import json
import random

import httpx
import pytest

from broker.policies import PolicyBook
from broker.store import Store
from broker.trust import audit
from tests.support.broker_world import fake_world
from tests.support.described import Book
from tests.support.live_api import LiveApi, live_api
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]


async def note(store: Store, at_ms: int, **fields: object) -> None:
    told = {
        "at": at_ms, "caller": "ann", "job": "j1", "attempt": 1, "lane": "far", "model": "far", "rules": "abc",
        "provider": "api.example.com", "host": "gpu1",
        "left": json.dumps({"bytes": 70, "passed": ["maxBytes", "secrets"], "redacted": {"customer": 2}}),
    } | fields  # fmt: skip
    flat = [str(word) for pair in told.items() for word in pair]
    await store.command("XADD", store.keys.audit, f"{at_ms}-{random.randrange(10**6)}", *flat)


async def ask(api: LiveApi, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setenv("GATEWAY_URL", api.url)
    ran = await asyncio.to_thread(gateway, "audit", *words)
    return ran.code, ran.out, ran.err


async def test_the_records_are_read_page_by_page(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PAGE", 2)
    async with fake_world() as world:
        world.real_time()
        await PolicyBook(world.store).apply("models: {a: {backend: simulated, model: x}}")
        async with live_api(world.store) as api:
            assert await ask(api, gateway, monkeypatch) == (0, "nothing left the machine in that time\n", "")
            now = await world.store.now_ms()
            for age_ms in (8 * audit.DAY_MS, 3_000, 2_000, 1_000):
                await note(world.store, now - age_ms, job=f"j{age_ms}")
            code, out, err = await ask(api, gateway, monkeypatch)
            assert (code, err) == (0, "")
            lines = out.splitlines()
            assert [line.split("  ")[2] for line in lines] == ["j3000/1", "j2000/1", "j1000/1"]
            assert lines[0].endswith(
                "ann  j3000/1  far -> api.example.com  70 bytes  passed maxBytes, secrets  redacted customer x2"
            )
            code, out, _ = await ask(api, gateway, monkeypatch, "--since", "9d", "--json")
            told = json.loads(out)
            assert len(told) == 4 and told[-1]["redacted"] == {"customer": 2}
            async with httpx.AsyncClient(base_url=api.url) as http:
                page = await http.get("/v1/audit")
                assert len(page.json()["records"]) == 2 and page.json()["next"]
                Book((await http.get("/openapi.json")).json()).judge("get", "/v1/audit", page)
            code, out, err = await ask(api, gateway, monkeypatch, "--since", "soon")
            assert (code, out) == (2, "") and "'soon' is no length of time" in err


async def test_records_go_when_their_time_is_over() -> None:
    async with fake_world() as world:
        world.real_time()
        now = await world.store.now_ms()
        for age_ms in (8 * audit.DAY_MS, 6 * audit.DAY_MS):
            await note(world.store, now - age_ms)
        assert await audit.trim(world.store, days=7) == 1
        [left] = await audit.read(world.store, since_ms=9 * audit.DAY_MS)
        assert now - left.at == 6 * audit.DAY_MS
