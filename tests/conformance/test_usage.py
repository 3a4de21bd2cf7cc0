"""`gateway usage` as clients and callers see it: what it tells is what the clients themselves have counted."""

import asyncio
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker.first_tokens import ERROR
from tests.support.clients import user
from tests.support.gateway_process import gateway
from tests.support.live_api import LiveApi, live_api
from tests.support.redis_server import RedisServer
from tests.support.worker_world import simulated, worker_world

pytestmark = pytest.mark.real

FAST = {"decodeTps": 2_000}
MODELS = {
    "big": simulated(memoryMb=50, maxConcurrent=2, maxQueue=4, options=FAST, fallback="small"),
    "small": simulated(memoryMb=50, maxConcurrent=2, maxQueue=1, options=FAST),
}
KEYS = "boss:boss-secret"


@dataclass(frozen=True)
class Heard:
    """What a client made of one request."""

    caller: str
    model: str
    status: int
    code: str
    usage: dict[str, int]
    first_token_ms: float


async def test_usage_is_what_the_clients_counted(redis_server: RedisServer, tmp_path: Path) -> None:
    """Two callers, more than fits, a model that nobody has: jobs, tokens, refusals, first tokens, to each its own."""
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        await world.apply(MODELS)
        await world.warm_host()
        async with live_api(await world._open("api"), keys=KEYS) as api:
            await api.name("ann", "ci")
            asked = [("ann", "big"), ("ci", "big"), ("ann", "small")] * 8 + [("ann", "none")] * 3
            heard = await _ask_all(api, asked)
            assert {one.status for one in heard} == {200, 404, 503}
            await api.gateway.refusals.write()
            mine = {caller: [one for one in heard if one.caller == caller] for caller in ("ann", "ci")}
            async with asyncio.TaskGroup() as tasks:  # each is a process of its own, and most of it is its start
                by_model = tasks.create_task(_usage(api, "ann", "--by", "model", "--json"), name="json")
                as_csv = tasks.create_task(_usage(api, "ci", "--by", "caller", "--csv"), name="csv")
                table = tasks.create_task(_usage(api, "ci"), name="table")
            for caller, told in (("ann", json.loads(by_model.result())), ("ci", await _told(api, "ci"))):
                _same(told, mine[caller])
    [row] = csv.DictReader(io.StringIO(as_csv.result()))
    served = sum(one.status == 200 for one in mine["ci"])
    assert (row["caller"], row["asked"], row["done"]) == ("ci", str(len(mine["ci"])), str(served))
    assert table.result().splitlines()[2].split()[:4] == ["ci", "big", str(len(mine["ci"])), str(served)]


def _same(found: dict[str, Any], mine: list[Heard]) -> None:
    total, served = found["total"], [one for one in mine if one.status == 200]
    refused = Counter(one.code for one in mine if one.status != 200)
    assert (total["asked"], total["done"]) == (len(mine), len(served))
    assert total["refused_by"] == dict(sorted(refused.items()))
    assert total["tokens_in"] == sum(one.usage["prompt_tokens"] for one in served)
    assert total["tokens_out"] == sum(one.usage["completion_tokens"] for one in served)
    assert total["judged"] == total["in_time"] == len(served)
    rows = {row["model"]: row for row in found["rows"]}
    for model in {one.model for one in mine} & MODELS.keys():
        of_it = [one.status for one in mine if one.model == model]
        assert (rows[model]["asked"], rows[model]["done"]) == (len(of_it), of_it.count(200))
    # the client's clock runs on both sides of the gateway's
    slowest = max(one.first_token_ms for one in served)
    assert 0 < total["first_token_p50_ms"] <= total["first_token_p99_ms"] <= slowest * (1 + ERROR) + 1
    assert 0 < total["running_ms"]


async def _ask_all(api: LiveApi, asked: list[tuple[str, str]]) -> list[Heard]:
    """All at once, each with an answer of another length."""
    async with httpx.AsyncClient(timeout=30) as http:

        async def one(number: int, caller: str, model: str) -> Heard:
            body = {"model": model, "messages": user("count"), "max_tokens": 20 + number, "stream": False}
            answer = await http.post(f"{api.url}/v1/chat/completions", json=body, headers=api.bearer(caller))
            first = float(answer.headers.get("x-gateway-first-token-ms", 0))
            told = answer.json()
            code = told.get("error", {}).get("code", "")
            return Heard(caller, model, answer.status_code, code, told.get("usage") or {}, first)

        return list(await asyncio.gather(*(one(number, *pair) for number, pair in enumerate(asked))))


async def _usage(api: LiveApi, caller: str, *words: str) -> str:
    settings = {"GATEWAY_URL": api.url, "GATEWAY_KEY": api.keys[caller]}
    ran = await asyncio.to_thread(gateway, "usage", "--since", "7d", *words, **settings)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


async def _told(api: LiveApi, caller: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as http:
        found = await http.get(f"{api.url}/v1/usage?by=model", headers=api.bearer(caller))
    told: dict[str, Any] = found.json()
    return told
