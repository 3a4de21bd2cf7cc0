"""`gateway policy explain`: the same words that admission would say, and nothing that it would do."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from api import cli_policy
from broker.callers import Rights
from broker.keybook import KeyBook
from broker.store import Store
from tests.support.broker_world import World, fake_world
from tests.support.invariants import take
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

POLICY = """
models:
  near: { backend: simulated, model: x, fallback: far, maxQueue: 0 }
  far: { backend: openai, model: y, url: https://api.example.com, trust: remote }
remote: { allow: [systemPrompts], redact: [{ name: customer, pattern: ACME }] }
"""
LEAVE = ("--header", "X-Gateway-Allow-Remote=true")


class Asked:
    """`gateway policy explain` against a fake Redis."""

    def __init__(self, world: World, gateway: Gateway, directory: Path) -> None:
        self.world = world
        self._gateway = gateway
        self._file = directory / "request.json"

    async def __call__(self, request: dict[str, Any] | bytes, *words: str) -> tuple[int, str, str]:
        self._file.write_bytes(request if isinstance(request, bytes) else json.dumps(request).encode())
        before = await take(self.world.store)
        ran = await asyncio.to_thread(self._gateway, "policy", "explain", str(self._file), *words)
        assert not before.marks(await take(self.world.store)), "a dry run leaves no mark"
        return ran.code, ran.out, ran.err


@pytest.fixture
async def asked(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    async with fake_world() as world:
        world.real_time()
        await world.apply(POLICY)
        await world.warm(near=1, far=1)
        loop, real = asyncio.get_running_loop(), asyncio.run

        async def opened(*_args: object, **_more: object) -> Store:
            return world.store

        async def stays_open() -> None: ...

        def run(work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(30)

        monkeypatch.setattr(cli_policy.Store, "open", opened)
        monkeypatch.setattr(world.store, "close", stays_open)
        monkeypatch.setattr(cli_policy.asyncio, "run", run)
        monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://127.0.0.1:1")
        try:
            yield Asked(world, gateway, tmp_path)
        finally:
            monkeypatch.setattr(asyncio, "run", real)
            monkeypatch.undo()


def chat(*messages: tuple[str, str], model: str = "near") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": role, "content": content} for role, content in messages]}


async def test_each_lane_gets_a_sentence(asked: Asked) -> None:
    code, out, err = await asked(chat(("system", "be kind"), ("user", "hi ACME")), *LEAVE)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "asks for lane near",
        "may use near (local): near is warm",
        "may use far (remote): far is warm, and the request passes maxBytes, secrets, systemPrompts",
        "it holds 109 bytes; systemPrompts: messages[0].content; redacted: customer x1",
    ]


async def test_all_that_keeps_a_request_in_is_said_at_once(asked: Asked) -> None:
    """Its consent and its content: whoever gives the first should know of the second."""
    code, out, _ = await asked(chat(("tool", "42"), ("user", "hi")))
    assert code == 0
    assert out.splitlines()[2] == (
        "may not use far (remote): far is a remote model, and the request does not allow that it leaves "
        "(X-Gateway-Allow-Remote: true); far is a remote model, and this request may not leave: it holds tool output, "
        "which the policy does not let out (remote.allow): messages[0].content"
    )
    code, out, _ = await asked(chat(("tool", "42"), ("user", "hi")), "--json", *LEAVE)
    told = json.loads(out)
    assert [(word["lane"], word["may"], word["code"]) for word in told["lanes"]] == [
        ("near", True, ""),
        ("far", False, "trust_zone"),
    ]


async def test_another_dialect_is_read_by_its_own_route(asked: Asked) -> None:
    request = {"model": "far", "max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]}
    code, out, _ = await asked(request, "--endpoint", "/v1/messages", *LEAVE)
    assert code == 0 and "it holds an image, which the policy does not let out" in out


async def test_what_cannot_be_explained_is_a_sentence(asked: Asked) -> None:
    for words, request, said in (
        (("--endpoint", "/v1/chat"), chat(("user", "hi")), "is no endpoint of the gateway"),
        (("--header", "X-Gateway-Allow-Remote"), chat(("user", "hi")), "--header takes NAME=VALUE"),
        ((), chat(("user", "hi"), model="nobody"), "no model, alias or lane is called 'nobody'"),
        ((), b"{", "the body is not valid JSON"),
        (("--endpoint", "/api/chat"), {"model": "near"}, "it enters no lane"),
    ):
        code, out, err = await asked(request, *words)
        assert code != 0 and out == "" and said in err, err


async def test_where_there_are_keys_it_must_know_whose(asked: Asked) -> None:
    """What a caller's key allows decides; nobody is taken for somebody who may everything."""
    book = KeyBook(asked.world.store)
    await book.new("boss", Rights(admin=True, remote=True), by="test")
    await book.new("bot", Rights(), by="test")
    request = {"model": "far", "messages": [{"role": "user", "content": "hello"}]}
    code, _, said = await asked(request, *LEAVE)
    assert code == 1 and "say whose the request would carry with --caller NAME" in said
    code, _, said = await asked(request, *LEAVE, "--caller", "bott")
    assert code == 1 and "did you mean bot?" in said
    assert "the key of bot lets nothing leave" in (await asked(request, *LEAVE, "--caller", "bot"))[1]
    assert "may use far" in (await asked(request, *LEAVE, "--caller", "boss"))[1]
