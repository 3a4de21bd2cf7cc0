"""One gateway that every client asks, a wire that counts their attempts, and the clients themselves."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.clients import environments
from tests.conformance.clients.table import CLIENTS, Client, Driver
from tests.conformance.conftest import Llama
from tests.support.gateway_process import House, house
from tests.support.scripted_answers import ScriptedAnswers
from tests.support.wire import Beside, Wire
from tests.support.worker_world import policy, simulated

COLD_STARTS = {"cold-chat": 1500, "cold-stream": 1500, "impatient": 3500, "long": 20_000}
"""Words of models, each client's own, and how many ms they load for."""

Drive = Callable[[Client], Driver]


@pytest.fixture(scope="session")
def beside() -> Iterator[Beside]:
    """Where doubles and wires run while the tests block."""
    loop = Beside()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory, llama: Llama, beside: Beside) -> Iterator[House]:
    """Real weights, vectors, a model that thinks and calls tools, two that can be broken, and cold ones."""
    with beside.serving(ScriptedAnswers().running()) as thinker:
        models = {
            "tiny": llama(maxConcurrent=2, maxQueue=8, contextTokens=8192, aliases=["coder"]),
            "embed-small": llama(pooling="mean", embeddings=True, maxConcurrent=2, maxQueue=8),
            "thinker": {"backend": "llama.cpp", "model": "weights", "url": thinker.url, "keepWarm": True},
            "pretend": simulated(maxConcurrent=4, maxQueue=8, memoryMb=1, options={"decodeTps": 100}),
            "narrow": simulated(maxConcurrent=1, maxQueue=1, memoryMb=1, options={"decodeTps": 50}),
        }
        warm = list(models)
        for name in ["control", *(client.name for client in CLIENTS)]:
            for word, cold_ms in COLD_STARTS.items():
                options = {"coldStartMs": cold_ms, "decodeTps": 100}
                known = {"keepWarm": False, "memoryMb": 1, "coldStartBudgetMs": 60_000, "contextTokens": 8192}
                models[f"{word}-{name}"] = simulated(**known, options=options)
        text = policy(models, headerHoldMs=300)
        with house(tmp_path_factory.mktemp("clients") / "data", policy=text) as up:
            for name in warm:
                up.until_state(name, "warm")
            yield up


@pytest.fixture
def wire(up: House, beside: Beside) -> Iterator[Wire]:
    """The way to the gateway, on which a client's attempts are counted."""
    with beside.serving(Wire(up.url).running()) as wire:
        yield wire


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """Gives a client at work. In CI one that cannot be installed fails the test; elsewhere it may be skipped."""
    running: dict[str, Driver] = {}

    def start(client: Client) -> Driver:
        if client.name not in running:
            try:
                running[client.name] = Driver(client, tmp_path_factory.mktemp(client.name))
            except environments.Unavailable as problem:
                if os.environ.get("CI"):
                    pytest.fail(str(problem))
                pytest.skip(str(problem))
        return running[client.name]

    yield start
    for driver in running.values():
        driver.close()
