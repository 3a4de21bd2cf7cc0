"""What `gateway up` finds on this machine, and the policy that it writes for it."""

from typing import Any

import httpx
import pytest

from api import discover
from api.discover import FoundModel, FoundRuntime, make_policy
from broker.policy import Policy

OLLAMA = "http://ollama"
LLAMA = "http://llama"
VLLM = "http://vllm"


async def found(answers: dict[str, tuple[int, Any]]) -> list[FoundRuntime | None]:
    """Asks all runtimes; an address without an answer refuses the connection."""

    def answer(request: httpx.Request) -> httpx.Response:
        if (given := answers.get(str(request.url))) is None:
            raise httpx.ConnectError("nobody there")
        status, body = given
        return httpx.Response(status, json=body) if not isinstance(body, str) else httpx.Response(status, text=body)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        return [
            await discover._ollama(client, OLLAMA),
            await discover._llama_server(client, LLAMA),
            await discover._vllm(client, VLLM),
        ]


async def test_ollama_offers_what_lies_on_this_machine() -> None:
    """Models that Ollama forwards to its cloud would carry prompts away without anybody's word."""
    tags = {
        "models": [
            {"name": "qwen2.5-coder:32b", "size": 19_000_000_000, "details": {"family": "qwen2"}},
            {"name": "gpt-oss:120b-cloud", "size": 384, "remote_host": "https://ollama.com:443"},
            {"name": "nomic-embed-text:latest", "size": 274_000_000, "details": {"family": "nomic-bert"}},
        ]
    }
    ollama, _, _ = await found(
        {f"{OLLAMA}/api/version": (200, {"version": "0.12.3"}), f"{OLLAMA}/api/tags": (200, tags)}
    )
    assert ollama is not None
    assert ollama.models == [
        FoundModel("qwen2.5-coder:32b", 19_000_000_000),
        FoundModel("nomic-embed-text:latest", 274_000_000, generates=False),
    ]


async def test_llama_server_is_told_from_other_programs_on_its_port() -> None:
    listed = {"data": [{"id": "/models/a.gguf", "owned_by": "llamacpp", "meta": {"size": 4_000}}]}
    health = (200, {"status": "ok"})
    _, llama, _ = await found({f"{LLAMA}/health": health, f"{LLAMA}/v1/models": (200, listed)})
    assert llama is not None
    assert llama.models == [FoundModel("/models/a.gguf", 4_000)]

    vllm = {"data": [{"id": "a", "owned_by": "vllm"}]}
    assert await found({f"{LLAMA}/health": health, f"{LLAMA}/v1/models": (200, vllm)}) == [None, None, None]
    assert await found({f"{LLAMA}/health": (200, "<html>fine</html>")}) == [None, None, None]
    assert await found({f"{LLAMA}/health": (200, ["ok"]), f"{OLLAMA}/api/version": (404, "")}) == [None, None, None]


async def test_a_llama_server_that_still_loads_is_found() -> None:
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    _, llama, _ = await found({f"{LLAMA}/health": (503, loading)})
    assert llama is not None
    assert llama.models == [FoundModel("llama-server")]


async def test_vllm_offers_its_model_and_none_of_its_adapters() -> None:
    """Many programs live on port 8000 too; vLLM signs its list. A LoRA adapter is served beside its model, by vLLM."""
    listed = {
        "data": [
            {"id": "Qwen/Coder", "owned_by": "vllm", "parent": None},
            {"id": "sql", "owned_by": "vllm", "parent": "Qwen/Coder"},
        ]
    }
    _, _, vllm = await found({f"{VLLM}/v1/models": (200, listed)})
    assert vllm == FoundRuntime("vllm", "vLLM", VLLM, [FoundModel("Qwen/Coder")])
    policy = Policy.parse(make_policy([vllm]).text)
    assert [(m.backend, m.url, m.model) for m in policy.models.values()] == [("vllm", VLLM, "Qwen/Coder")]
    other = {"data": [{"id": "a", "owned_by": "llamacpp"}]}
    assert await found({f"{VLLM}/v1/models": (200, other)}) == [None, None, None]


async def test_with_nothing_there_it_says_that_it_simulates() -> None:
    nowhere = "http://127.0.0.1:1"
    made = await discover.discover(
        {"GATEWAY_OLLAMA_URL": nowhere, "GATEWAY_LLAMA_SERVER_URL": nowhere, "GATEWAY_VLLM_URL": nowhere}
    )
    assert made.sentence == "no Ollama, llama-server or vLLM was found here, so answers come from a simulated model"
    policy = Policy.parse(made.text)
    assert {name: model.backend for name, model in policy.models.items()} == {"simulated": "simulated"}


def test_an_ollama_without_models_is_named() -> None:
    made = make_policy([FoundRuntime("ollama", "Ollama", OLLAMA)])
    assert made.sentence.startswith("Ollama at http://ollama has no model yet, so answers come from a simulated model")


def test_the_policy_keeps_the_first_warm_and_falls_back_to_the_smallest() -> None:
    made = make_policy(
        [
            FoundRuntime(
                "ollama",
                "Ollama",
                "http://127.0.0.1:11434",
                [
                    FoundModel("nomic-embed-text:latest", 1, generates=False),
                    FoundModel("Qwen2.5-Coder:32b", 20),
                    FoundModel("qwen2.5-coder:1.5b", 2),
                ],
            ),
            FoundRuntime("llama.cpp", "llama-server", "http://127.0.0.1:8080", [FoundModel("/m/Big Model.gguf", 30)]),
        ]
    )
    policy = Policy.parse(made.text)
    assert list(policy.models) == ["nomic-embed-text", "qwen2.5-coder-32b", "qwen2.5-coder-1.5b", "big-model"]
    assert [model.keep_warm for model in policy.models.values()] == [False, True, False, False]
    smallest = "qwen2.5-coder-1.5b"
    assert [model.fallback for model in policy.models.values()] == [None, smallest, None, smallest]
    assert policy.models["qwen2.5-coder-32b"].aliases == ["Qwen2.5-Coder:32b"]
    assert policy.models["big-model"].url == "http://127.0.0.1:8080"
    assert made.sentence == "made up from Ollama at http://127.0.0.1:11434, llama-server at http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a:latest", "a"], ["a", "a-2"]),
        (["hf.co/Org/Some_Model-GGUF:Q4_K_M"], ["hf.co-org-some-model-gguf-q4-k-m"]),
        (["/models/x.gguf", "C:\\x y.gguf"], ["x", "c-x-y"]),
        (["模型"], ["model"]),
    ],
)
def test_keys_are_plain_words_and_each_only_once(names: list[str], keys: list[str]) -> None:
    assert discover.keys_of(names) == keys
