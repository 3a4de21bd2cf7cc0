"""`gateway tune`, from the counters in Redis to a policy file that `gateway policy check` takes."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import yaml

from broker import hosts, usage
from broker.figures import By
from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import fake_world
from tests.support.described import Book
from tests.support.live_api import LiveApi, live_api
from tests.support.scripted_worker import ScriptedWorker
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway
from tests.unit.test_tune import merged

__all__ = ["a_person_who_has_set_nothing", "gateway"]

POLICY = """
models:
  big: { backend: simulated, model: x, maxConcurrent: 2, maxQueue: 4, fallback: small }
  small: { backend: simulated, model: y }
"""


async def count(store: Store, by: By, figures: dict[str, int]) -> None:
    """Writes counters of today as the scripts do."""
    _, last = await usage.days(store, "1d", "")
    day = last.isoformat()
    words = [word for name, amount in figures.items() for word in (name, amount)]
    await store.command("HSET", store.keys.figures(day, by.spelled), *words)
    await store.command("HSET", store.keys.usage(day), by.spelled, 1)


async def ask(api: LiveApi, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setenv("GATEWAY_URL", api.url)
    ran = await asyncio.to_thread(gateway, *words)
    return ran.code, ran.out, ran.err


async def test_what_it_prints_goes_into_the_policy(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with fake_world() as world:
        world.real_time()
        store, book = world.store, PolicyBook(world.store)
        await book.apply(POLICY)
        worker = ScriptedWorker(store, book)
        async with live_api(store, keys="boss:secret") as api, worker.running():
            await api.gateway.fleet.look()
            await api.name("ann")
            monkeypatch.setenv("GATEWAY_KEY", "secret")
            code, out, err = await ask(api, gateway, monkeypatch, "tune")
            assert (code, err) == (0, "") and "# Nothing to propose." in out and yaml.safe_load(out) is None
            assert "Nobody asked for big in this time" in out

            await count(store, By("ann", "big", "big", "big"), {"done/in_time/448": 90, "done/late/9216": 9})
            await count(store, By("ci", "big", "big", "big"), {"refused/lane_full": 11})
            await hosts.learn(store, "big", service_ms=3_000.0, load_ms=11_000.0)
            code, out, err = await ask(api, gateway, monkeypatch, "tune", "--since", "1d")
            assert (code, err) == (0, "") and yaml.safe_load(out) == {"models": {"big": {"maxQueue": 8}}}
            assert "11 of 110 requests for big found no place" in out and "maxQueue: 8  # now 4" in out
            file = tmp_path / "policy.yaml"
            file.write_text(yaml.safe_dump(merged(POLICY, yaml.safe_load(out))))
            code, said, err = await ask(api, gateway, monkeypatch, "policy", "check", str(file))
            assert (code, err) == (0, "") and "fine, 2 models" in said

            code, out, _ = await ask(api, gateway, monkeypatch, "tune", "--json")
            told = json.loads(out)
            assert [one["key"] for one in told["proposals"]] == ["models.big.maxQueue"]
            assert (await book.reload()).version == told["policy_version"] == 1, "nothing is applied"

            async with httpx.AsyncClient(base_url=api.url, headers=SECRET) as http:
                document = Book((await http.get("/openapi.json")).json())
                document.judge("get", "/v1/tune", await http.get("/v1/tune"))

            monkeypatch.setenv("GATEWAY_KEY", api.keys["ann"])
            code, _, err = await ask(api, gateway, monkeypatch, "tune")
            assert code == 1 and "no administrator's rights" in err
            monkeypatch.setenv("GATEWAY_KEY", "secret")
            code, _, err = await ask(api, gateway, monkeypatch, "tune", "--since", "tomorrow")
            assert code == 1 and "since is a date" in err


SECRET = {"authorization": "Bearer secret"}
