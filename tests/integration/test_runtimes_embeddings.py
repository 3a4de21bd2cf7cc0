"""Models of vectors on each runtime: the first vector is their first token, and what keeps it away has a remedy."""

import json
from pathlib import Path

import pytest

from broker.policy import Policy
from tests.integration.test_runtimes import BOUND_S, break_with, llama, runtime_of, simulated
from tests.support.fake_ollama import GIB, FakeOllama
from tests.support.llama_server import llama_command
from tests.support.scripted_runtime import ScriptedRouter, ScriptedVllm
from tests.support.tiny_gguf import write_tiny_gguf
from workers.runtimes.base import ProbeFailed, client_for
from workers.runtimes.llama_server import LlamaServer

EMBED = "nomic-embed-text:latest"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


async def test_llama_cpp_gives_vectors(tmp_path: Path, gguf_file: Path) -> None:
    keys = llama(gguf_file, command=llama_command(pooling="mean"), embeddings=True)
    async with runtime_of(tmp_path, **keys) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        assert 0 < await runtime.probe(timeout_s=BOUND_S) < BOUND_S * 1000
        assert await runtime.busy_slots() == 0


@pytest.mark.parametrize(
    ("pooling", "remedy"),
    [("", "its command needs --embeddings"), ("none", "its command needs --pooling mean, cls or last")],
)
async def test_llama_cpp_that_gives_no_vectors_says_what_it_lacks(
    tmp_path: Path, gguf_file: Path, pooling: str, remedy: str
) -> None:
    """Without --embeddings it answers 501, and 400 where the GGUF names no pooling: neither says who can mend it."""
    keys = llama(gguf_file, command=llama_command(pooling=pooling), embeddings=True)
    async with runtime_of(tmp_path, **keys) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        with pytest.raises(ProbeFailed) as caught:
            await runtime.probe(timeout_s=BOUND_S)
    assert remedy in caught.value.sentence
    assert caught.value.sentence.startswith("model 'm' gives no vectors: ")


@pytest.mark.parametrize(("context", "batch"), [(None, "2048"), (512, "512")])
def test_our_own_llama_server_takes_a_whole_input_in_one_batch(tmp_path: Path, context: int | None, batch: str) -> None:
    """With the small batches of our chat command, every input over 256 tokens fails."""
    keys = {"backend": "llama.cpp", "model": "/weights.gguf", "embeddings": True, "maxConcurrent": 4}
    policy = {"models": {"m": keys | ({"contextTokens": context} if context else {})}}
    runtime = LlamaServer("m", Policy.parse(json.dumps(policy)).models["m"], state_dir=tmp_path)
    command = runtime._command(8080)

    assert command[:5] == ["llama-server", "-m", "/weights.gguf", "--port", "8080"]
    assert "--embeddings" in command and "--pooling" not in command
    assert command[command.index("-ub") + 1] == command[command.index("-b") + 1] == batch
    assert command[command.index("-c") + 1] == str(4 * (context or 0))


async def test_ollama_loads_a_model_that_only_embeds(tmp_path: Path) -> None:
    """It refuses to generate, which is how any other model is loaded; it is unloaded like any other."""
    async with FakeOllama(EMBED).running() as fake:
        fake.only_embeds.add(EMBED)
        keys = {"backend": "ollama", "model": "nomic-embed-text", "url": fake.url, "embeddings": True}
        async with runtime_of(tmp_path, **keys) as runtime:
            with pytest.raises(ProbeFailed, match="not loaded"):
                await runtime.probe(timeout_s=BOUND_S)
            await runtime.load(timeout_s=BOUND_S)
            assert fake.loaded == {EMBED: -1}
            assert fake.embed_bodies == [{"model": "nomic-embed-text", "input": "", "keep_alive": -1}]
            assert await runtime.memory_bytes() == 2 * GIB
            assert await runtime.probe(timeout_s=BOUND_S) > 0
            assert fake.embed_bodies[-1] == {"model": "nomic-embed-text", "input": "Hi"}, "a probe keeps nothing alive"
            await runtime.unload()
            assert fake.loaded == {}


async def test_a_router_and_a_vllm_are_asked_for_a_vector_too(tmp_path: Path) -> None:
    """A model of vectors answers no chat; neither is asked while it is away, which would load it or wait for ever."""
    async with ScriptedRouter("weights").running() as router, ScriptedVllm().running() as server:
        for fake, backend in ((router, "llama.cpp"), (server, "vllm")):
            keys = {"backend": backend, "model": "weights", "url": fake.url, "embeddings": True}
            async with runtime_of(tmp_path, **keys) as runtime:
                await runtime.state()
                await runtime.load(timeout_s=BOUND_S)
                assert await runtime.probe(timeout_s=BOUND_S) > 0
                assert fake.embed_bodies == [{"model": "weights", "input": "Hi"}]
                await runtime.unload()
                with pytest.raises(ProbeFailed):
                    await runtime.probe(timeout_s=BOUND_S)
                assert len(fake.embed_bodies) == 1 and fake.chat_bodies == []


async def test_a_simulated_model_gives_vectors_or_501(tmp_path: Path) -> None:
    async with runtime_of(tmp_path / "a", **simulated(prefillTps=1000) | {"embeddings": True}) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.probe(timeout_s=BOUND_S) > 0
        async with client_for(runtime.endpoint().base_url) as client:
            url = f"{runtime.endpoint().base_url}/v1/embeddings"
            one, two = [(await client.post(url, json={"input": ["a", "b"]})).json() for _ in range(2)]
        assert one["simulated"] is True and one["data"] == two["data"]
        assert one["data"][0]["embedding"] != one["data"][1]["embedding"]
        await break_with(runtime, error_in_stream=0, times=1)
        with pytest.raises(ProbeFailed, match="no vector: simulated fault"):
            await runtime.probe(timeout_s=BOUND_S)
        await break_with(runtime, never_first_token=True, times=1)
        with pytest.raises(ProbeFailed, match=r"within 0\.2 s"):
            await runtime.probe(timeout_s=0.2)
    async with runtime_of(tmp_path / "b", **simulated(embeddings=False) | {"embeddings": True}) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        with pytest.raises(ProbeFailed, match="gives no vectors: its command needs --embeddings"):
            await runtime.probe(timeout_s=BOUND_S)
