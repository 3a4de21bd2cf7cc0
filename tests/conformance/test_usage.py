"""`gateway usage` against a whole gateway: what it tells is what the clients themselves have counted."""

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
from tests.support.gateway_process import House, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

MODELS = {
    "big": simulated(memoryMb=50, maxConcurrent=2, maxQueue=4, options={"decodeTps": 400}, fallback="small"),
    "small": simulated(memoryMb=50, maxConcurrent=2, maxQueue=1, options={"decodeTps": 400}),
}


@dataclass(frozen=True)
class Heard:
    """What a client made of one request."""

    caller: str
    model: str
    status: int
    usage: dict[str, int]
    first_token_ms: float


def test_usage_is_what_the_clients_counted(tmp_path: Path) -> None:
    """Two callers, more than fits, a model that nobody has: jobs, tokens, refusals, first tokens, to each its own."""
    keys = "ann:ann-secret,ci:ci-secret"
    with house(tmp_path / "data", policy=policy(MODELS), GATEWAY_KEYS=keys, GATEWAY_KEY="ann-secret") as up:
        block_until(lambda: _states(up) == {"warm"}, what="both models are warm")
        asked = [("ann", "big"), ("ci", "big"), ("ann", "small")] * 8 + [("ann", "none")] * 3
        heard = asyncio.run(_ask_all(up, asked))
        assert {one.status for one in heard} == {200, 404, 503}
        for caller in ("ann", "ci"):
            mine = [one for one in heard if one.caller == caller]
            block_until(lambda: _told(up, caller)["total"]["asked"] == len(mine), what="refusals are written")  # noqa: B023
            _same(_told(up, caller, "--by", "model"), mine)
            [row] = csv.DictReader(io.StringIO(_usage(up, caller, "--csv")))
            served = sum(one.status == 200 for one in mine)
            assert (row["caller"], row["asked"], row["done"]) == (caller, str(len(mine)), str(served))
            assert _usage(up, caller).splitlines()[2].split()[:3] == [caller, str(len(mine)), str(served)]
        others = up.command("usage", "--caller", "ci", GATEWAY_KEY="ann-secret")
        assert (others.returncode, others.stdout) == (1, "") and "its own caller, ann" in others.stderr


def _same(found: dict[str, Any], mine: list[Heard]) -> None:
    total, served = found["total"], [one for one in mine if one.status == 200]
    refused = Counter({404: "model_not_found", 503: "lane_full"}[one.status] for one in mine if one.status != 200)
    assert (total["done"], total["refused_by"]) == (len(served), dict(sorted(refused.items())))
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


async def _ask_all(up: House, asked: list[tuple[str, str]]) -> list[Heard]:
    """All at once, each with an answer of another length."""
    async with httpx.AsyncClient(timeout=30) as http:

        async def one(number: int, caller: str, model: str) -> Heard:
            body = {"model": model, "messages": user("count"), "max_tokens": 20 + number, "stream": False}
            headers = {"authorization": f"Bearer {caller}-secret"}
            answer = await http.post(f"{up.url}/v1/chat/completions", json=body, headers=headers)
            first = float(answer.headers.get("x-gateway-first-token-ms", 0))
            return Heard(caller, model, answer.status_code, answer.json().get("usage") or {}, first)

        return list(await asyncio.gather(*(one(number, *pair) for number, pair in enumerate(asked))))


def _usage(up: House, caller: str, *words: str) -> str:
    ran = up.command("usage", "--since", "1d", *words, GATEWAY_KEY=f"{caller}-secret")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _told(up: House, caller: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_usage(up, caller, "--json", *words))
    return found


def _states(up: House) -> set[str]:
    headers = {"authorization": "Bearer ann-secret"}
    return {str(model["state"]) for model in httpx.get(f"{up.url}/v1/status", headers=headers).json()["models"]}
