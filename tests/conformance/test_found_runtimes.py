"""`gateway up` without a policy, and with an Ollama: what is found is served, and what is made up says so."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.clients import ask, async_sdk, heard_out, sdk, text_of, user
from tests.support.fake_ollama import FakeOllama
from tests.support.gateway_process import House, house, tells_no_traceback
from tests.support.worker_world import words

pytestmark = pytest.mark.real

MODEL = "qwen2.5-coder:32b"


@asynccontextmanager
async def beside(data: Path, **settings: str) -> AsyncIterator[House]:
    """A gateway beside a server that runs in the test's own loop, which must go on meanwhile."""
    up = House(data, **settings)
    try:
        await asyncio.to_thread(up.until_said, "warmlane ")
        yield up
        assert await asyncio.to_thread(up.stop) == 0
    finally:
        await asyncio.to_thread(up.end)
    tells_no_traceback(up.output)


async def test_a_running_ollama_is_found_and_loaded_on_our_own_connection(tmp_path: Path) -> None:
    """No policy and nothing to set: its model is served. A client that loses its patience takes its request with it,
    and not the load."""
    async with FakeOllama(MODEL).running() as ollama:
        ollama.hold_loads()
        async with beside(tmp_path / "data", GATEWAY_OLLAMA_URL=ollama.url) as up:
            await asyncio.to_thread(up.ready)
            assert up.says("policy ", ollama.url), up.output
            assert not up.says("simulated"), up.output
            async with async_sdk(up.url, max_retries=0) as client:
                name = next(model.id for model in (await client.models.list()).data)
                assert name.startswith("qwen2.5-coder")
                body = {"model": name, "messages": user("hi"), "max_tokens": 5, "stream": True}
                async with httpx.AsyncClient(timeout=1.0) as hasty:
                    assert (await ask(hasty, up.url, body)).outcome == "cut"
                assert ollama.loads_started == [MODEL]
                asked = asyncio.create_task(client.chat.completions.create(**body))
                await asyncio.wait({asked}, timeout=0.5)
                assert not asked.done()
                ollama.release_loads()
                chunks = await heard_out(await asked)
                del asked
            assert text_of(chunks) == "ollama 1 2 3 4"
            assert {chunk.model for chunk in chunks} == {name}
            assert (ollama.loads_started, ollama.loads_aborted) == ([MODEL], [])
            load = next(sent for sent in ollama.generate_bodies if sent["model"] == MODEL)
            assert load["keep_alive"] == -1
            assert all(sent["model"] == MODEL for sent in ollama.chat_bodies)


def test_with_nothing_found_it_is_simulated_and_says_so(tmp_path: Path) -> None:
    """In the output, in the status and in every answer."""
    with house(tmp_path / "data") as up:
        assert up.says("policy ", "no Ollama, llama-server or vLLM was found here", "simulated model")
        assert up.says("models ", "simulated")
        with sdk(up.url) as client:
            answer = client.chat.completions.create(model="simulated", messages=user("hi"), max_tokens=3)
        assert answer.model == "simulated"
        assert answer.choices[0].message.content == words(3)
        assert words(3).startswith("simulated")
        notes = [line for line in up.command("status").stdout.splitlines() if line.startswith("note: ")]
        assert notes == [
            "note: simulated is simulated: its answers mean nothing",
            "note: this policy was made up by `gateway up`, since none was given",
        ]
        assert up.status()["made_up"]
        assert [model["simulated"] for model in up.status()["models"]] == [True]
