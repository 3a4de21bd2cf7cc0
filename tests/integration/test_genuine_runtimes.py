"""The genuine programs, where somebody has them: LLAMA_SERVER_BIN names a llama-server, OLLAMA_BIN an ollama.

The doubles are built from what was read and measured of these; here it shows whether they are still right. (The tests
of `test_runtimes` that take the wheel's llama.cpp run the genuine one too when it is named.)
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from broker.policy import Policy
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import eventually
from workers.runtimes import runtime_for
from workers.runtimes.base import ProbeFailed, Runtime, client_for
from workers.runtimes.process import free_port

LLAMA_SERVER, OLLAMA = os.environ.get("LLAMA_SERVER_BIN"), os.environ.get("OLLAMA_BIN")
START_S = 60.0


@asynccontextmanager
async def program(log: Path, *words: str, url: str, ready: str, **environment: str) -> AsyncIterator[None]:
    """Runs a server while the block runs; it is up when `ready` is answered."""
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *words, env={**os.environ, **environment}, stdout=out, stderr=out
        )

    async def answers() -> bool:
        assert process.returncode is None, f"it ended; {log} says why"
        try:
            return (await client.get(url + ready)).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        async with client_for(url) as client:
            await eventually(answers, what=f"{words[0]} answers", timeout_s=START_S)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def runtime_at(url: str, state_dir: Path, backend: str, model: str) -> AsyncIterator[Runtime]:
    keys = {"backend": backend, "model": model, "url": url, "maxConcurrent": 1}
    runtime = runtime_for("m", Policy.parse(json.dumps({"models": {"m": keys}})).models["m"], state_dir=state_dir)
    try:
        yield runtime
    finally:
        await runtime.close()


async def loads_answers_and_unloads(runtime: Runtime) -> None:
    """What every runtime promises, whoever is behind it."""
    assert await runtime.state() == "absent"
    with pytest.raises(ProbeFailed):
        await runtime.probe(timeout_s=START_S)
    assert await runtime.state() == "absent", "neither a question nor a probe loads it"
    assert runtime.manageable
    await runtime.load(timeout_s=START_S)
    assert await runtime.state() == "loaded"
    assert (await runtime.memory_bytes() or 0) > 1 << 20
    assert await runtime.probe(timeout_s=START_S) > 0
    assert await runtime.busy_slots() in (0, None)
    await runtime.unload()
    assert await runtime.state() == "absent"


@pytest.mark.skipif(not LLAMA_SERVER, reason="LLAMA_SERVER_BIN names no llama-server")
async def test_the_genuine_router(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [str(LLAMA_SERVER), "--models-dir", str(tmp_path / "models"), "--host", "127.0.0.1", "--port", str(port)]
    async with program(tmp_path / "router.log", *words, url=url, ready="/models"):
        async with client_for(url) as client:
            name = next(m["id"] for m in (await client.get(f"{url}/models")).json()["data"] if "tiny" in m["id"])
        async with runtime_at(url, tmp_path, "llama.cpp", name) as runtime:
            await loads_answers_and_unloads(runtime)


@pytest.mark.skipif(not OLLAMA, reason="OLLAMA_BIN names no ollama")
async def test_the_genuine_ollama(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "Modelfile").write_text("FROM ./tiny.gguf\nPARAMETER num_ctx 2048\n")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(tmp_path / "models"), "HOME": str(tmp_path)
    }  # fmt: skip
    async with program(tmp_path / "ollama.log", str(OLLAMA), "serve", url=url, ready="/api/version", **environment):
        create = await asyncio.create_subprocess_exec(
            str(OLLAMA), "create", "tiny", "-f", "Modelfile", cwd=tmp_path, env={**os.environ, **environment}
        )
        assert await create.wait() == 0
        async with runtime_at(url, tmp_path, "ollama", "tiny") as runtime:
            await loads_answers_and_unloads(runtime)
