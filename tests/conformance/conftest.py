"""A gateway for the tests of this folder: real processes, a real llama.cpp, and pretended models that misbehave."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway_process import House, house
from tests.support.llama_server import llama_command
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import policy, simulated

Llama = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real weights that load in a moment."""
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture(scope="session")
def llama(tiny_gguf: Path) -> Llama:
    """Makes a policy entry for the real llama.cpp; words of `llama_command` delay its load or log it."""

    def entry(
        *, load_delay_ms: int = 0, load_log: Path | None = None, pooling: str = "", **keys: Any
    ) -> dict[str, Any]:
        command = llama_command(load_delay_ms=load_delay_ms, load_log=load_log, pooling=pooling)
        known = {"backend": "llama.cpp", "model": str(tiny_gguf), "command": command, "contextTokens": 1024}
        return {**known, "memoryMb": 64, "keepWarm": True, **keys}

    return entry


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[House]:
    """One gateway for the tests that leave it as they found it. The weights of one of its models are not there."""
    missing = tmp_path_factory.getbasetemp() / "missing.gguf"
    models = {
        "tiny": llama(maxConcurrent=2, maxQueue=8, aliases=["gpt-4o"]),
        "pretend": simulated(maxConcurrent=5, maxQueue=8, memoryMb=1, options={"decodeTps": 100}),
        "narrow": simulated(maxConcurrent=1, maxQueue=1, memoryMb=1, options={"decodeTps": 50}),
        "thoughtful": simulated(maxConcurrent=4, memoryMb=1, options={"prefillTps": 15}),
        "gone": llama(keepWarm=True) | {"model": str(missing)},
    }
    routing = [{"match": {"lane": "fast-edit"}, "target": "pretend"}]
    text = policy(models, routing=routing, headerHoldMs=300)
    with house(tmp_path_factory.mktemp("house") / "data", policy=text) as up:
        for name in models.keys() - {"gone"}:
            up.until_state(name, "warm")
        yield up
