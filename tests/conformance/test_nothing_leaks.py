"""What clients say and who they are stays where it belongs: in the request, in the answer's frames, and nowhere else.

A storm of marked prompts, keys, sessions and idempotency keys goes through success, refusal, retry, failure and the
kill of a worker, with every process at `DEBUG`. Then everything that anybody could read is searched for the marks.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker.store import Store
from tests.support.collector import receiver
from tests.support.gateway_process import House, house
from tests.support.scripted_runtime import ScriptedLlamaServer
from tests.support.worker_world import eventually, policy, simulated
from workers.runtimes.http_server import Exchange

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

PROMPT, KEY, WRONG, SESSION, IDEM = (f"zebra-{word}" for word in ("prompt", "key", "wrong", "session", "idem"))
HOT = "/v1/chat/completions"


class Parrot(ScriptedLlamaServer):
    """A runtime that repeats the prompt in its errors, as llama-server does when it cannot read one."""

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.path != "/apply-template":
            return await super()._handle(exchange)
        await exchange.begin("application/json")
        await exchange.write(b"\xff" + exchange.body)
        await exchange.end()

    async def _chat(self, exchange: Exchange) -> None:
        said = str(exchange.json()["messages"][-1]["content"])
        error = {"error": {"message": f"Failed to parse input: {said}", "type": "server_error", "code": 500}}
        for status in (400, 500):
            if f"answer {status}" in said:
                return await exchange.answer(error, status=status)
        if "fail late" in said:
            await exchange.begin("text/event-stream")
            await exchange.write(b"data: " + json.dumps(error).encode() + b"\n\n")
            return await exchange.end()
        await super()._chat(exchange)


def chat(said: str, *, model: str = "parrot", **more: Any) -> bytes:
    messages = [{"role": "user", "content": f"{PROMPT} {said}"}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 3, **more}).encode()


async def storm(up: House) -> list[tuple[int, str]]:
    """Sends everything; gives statuses and the bodies of the errors that are our own words."""
    key = {"authorization": f"Bearer {KEY}"}
    sdk = {"x-stainless-lang": "python", "x-stainless-retry-count": "0"}
    told: list[tuple[int, str]] = []

    async def ask(path: str, body: bytes, *, ours: bool = True, **headers: str) -> httpx.Response:
        sent = key | {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await http.post(path, content=body, headers=sent)
        told.append((answer.status_code, answer.text if answer.status_code >= 400 and ours else ""))
        return answer

    anthropic = json.loads(chat("hello")) | {"metadata": {"user_id": SESSION}}
    async with httpx.AsyncClient(base_url=up.url, timeout=30) as http:
        for stream in (True, False):
            assert (await ask(HOT, chat("hello", stream=stream), **sdk)).status_code == 200
            assert (await ask(HOT, chat("hello", stream=stream, prompt_cache_key=SESSION), **sdk)).status_code == 200
            assert (await ask(HOT, chat("hello", stream=stream), x_session_affinity=SESSION)).status_code == 200
        assert (await ask("/v1/messages", json.dumps(anthropic).encode(), **sdk)).status_code == 200
        assert (
            await ask("/v1/responses", json.dumps({"model": "parrot", "input": PROMPT}).encode())
        ).status_code == 200
        assert (await ask("/api/chat", chat("hello"))).status_code == 200
        assert (await ask(HOT, chat("hello"), idempotency_key=IDEM)).status_code == 200
        assert (await ask(HOT, chat("hello"), idempotency_key=IDEM)).status_code == 200
        assert (await ask(HOT, chat("another"), idempotency_key=IDEM)).status_code == 422
        refused = [
            chat("hello", model="nobody"),
            chat("hello")[:-1],
            chat("hello", max_tokens=PROMPT),
            chat("hello", stream=PROMPT),
            json.dumps({"model": "parrot", "messages": [PROMPT]}).encode(),
            json.dumps({"model": "parrot", "messages": PROMPT}).encode(),
            b"\xff" + chat("hello"),
            chat("x " * 5_000, model="tiny"),
            chat("hello", x=json.loads("[" * 250 + f'"{PROMPT}"' + "]" * 250)),
        ]
        for body in refused:
            for path in (HOT, "/v1/messages", "/api/chat"):
                await ask(path, body)
        asked = {"model": "parrot", "input": [{"type": PROMPT}]}
        assert (await ask("/v1/responses", json.dumps(asked).encode())).status_code == 400
        for headers in ({"x_slo_ttft_ms": PROMPT}, {"x_gateway_on_disconnect": PROMPT}, {"idempotency_key": "x" * 300}):
            assert (await ask(HOT, chat("hello"), **headers)).status_code == 400
        for secret in (WRONG, KEY + "x"):
            answer = await http.post(HOT, content=chat("hello"), headers={"authorization": f"Bearer {secret}"})
            told.append((answer.status_code, answer.text))
        answer = await http.get("/v1/models", headers={"x-api-key": WRONG})
        told.append((answer.status_code, answer.text))
        for fault in ("answer 400", "answer 500", "fail late"):
            assert (await ask(HOT, chat(fault), ours=False)).status_code >= 400

        async def is_counted() -> bool:
            assert (await ask("/v1/messages/count_tokens", chat("hello"))).status_code == 200
            return up.says("event=count_failed")

        await eventually(is_counted, what="a runtime was asked to count, and the api knew that it could")
        await killed(up, http, key)
        told.append((0, (await http.get("/metrics", headers=key)).text))
        told.append((0, (await http.get("/v1/status", headers=key)).text))
    return told


async def killed(up: House, http: httpx.AsyncClient, key: dict[str, str]) -> None:
    """The worker dies while an answer streams."""
    async with http.stream(
        "POST", HOT, content=chat("long", model="slow", stream=True, max_tokens=500), headers=key
    ) as a:
        pieces = a.aiter_bytes()
        await anext(pieces)
        await asyncio.to_thread(up.kill_part, "worker")
        async for _ in pieces:
            pass


async def values(store: Store) -> dict[str, str]:
    """Everything that Redis holds, by the name of its key."""
    read = {
        "list": ("LRANGE", "0", "-1"),
        "string": ("GET",),
        "hash": ("HGETALL",),
        "stream": ("XRANGE", "-", "+"),
        "zset": ("ZRANGE", "0", "-1"),
    }
    found = {}
    for name in await store.command("KEYS", "*"):
        kind = (await store.command("TYPE", name)).decode()
        if kind == "none":  # gone since: arq's keys come and go each second
            continue
        verb, *more = read[kind]
        found[name.decode()] = repr(await store.command(verb, name, *more))
    return found


def read_files(folder: Path) -> dict[str, str]:
    """Everything on the disk but what Redis itself writes there."""
    return {
        str(file): file.read_text(errors="replace")
        for file in folder.rglob("*")
        if file.is_file() and "redis" not in file.relative_to(folder).parts
    }


async def test_no_prompt_key_or_session_is_where_it_does_not_belong(tmp_path: Path) -> None:
    models = {
        "slow": simulated(maxConcurrent=2, memoryMb=1, options={"decodeTps": 20}),
        "tiny": simulated(contextTokens=100, memoryMb=1),
    }
    async with Parrot().running() as parrot:
        models["parrot"] = {"backend": "llama.cpp", "model": "weights", "url": parrot.url, "keepWarm": True}
        settings = {"GATEWAY_LOG_LEVEL": "DEBUG", "GATEWAY_KEYS": f"ann:{KEY}"}
        with receiver() as collector:
            settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
            with house(tmp_path / "data", policy=policy(models, maxLosses=1), **settings) as up:
                for name in models:
                    await asyncio.to_thread(up.until_state, name, "warm")
                told = await storm(up)
                store = await Store.open(up.redis_url, name="test")
                try:
                    redis = await values(store)
                finally:
                    await store.close()
                logs = up.output
                files = read_files(tmp_path)
        outcomes = {span.attributes["warmlane.outcome"] for span in collector.spans if span.served}
    assert "DEBUG" in logs and "event=fail" in logs and "event=count_failed" in logs and len(files) > 2
    assert [line for line in logs.splitlines() if "zebra" in line] == []
    assert [file for file, text in files.items() if "zebra" in text] == []
    assert [body for _, body in told if "zebra" in body] == []
    assert {"done", "failed", "refused", "attached"} <= outcomes
    assert [body for body in collector.raw if b"zebra" in body] == []
    assert {422, 400, 401, 404} <= {status for status, _ in told}
    assert [name for name in redis if "zebra" in name] == []
    holds = {
        name.split(":")[1] if name.count(":") < 3 else name.rpartition(":")[2]
        for name, v in redis.items()
        if PROMPT in v
    }
    assert holds <= {"request", "frames", "job"}, holds
    assert all(
        "Failed to parse" in v for n, v in redis.items() if PROMPT in v and n.count(":") == 2
    )  # a runtime's words
    assert not [name for name, value in redis.items() if KEY in value or WRONG in value or IDEM in value]
