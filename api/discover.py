"""Finds the runtimes that already run on this machine, and writes a policy for them.

Only models whose weights are here are taken: Ollama also lists models that it forwards to its cloud, and a prompt
never leaves the machine because nobody wrote a policy.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

OLLAMA_URL = "http://127.0.0.1:11434"
LLAMA_SERVER_URL = "http://127.0.0.1:8080"
VLLM_URL = "http://127.0.0.1:8000"
ANSWER_S_MAX = 0.5
MODELS_MAX = 20
"""More models than this aren't taken from one runtime: write a policy and choose."""

KEY_CHARS = 100
NAME_CHARS = 256

SIMULATED = """\
# Made up by `gateway up`: no runtime was found here, so a simulated one plays the part.
models:
  simulated:
    backend: simulated
    model: simulated
    keepWarm: true
    maxConcurrent: 2
    maxQueue: 8
"""


@dataclass(frozen=True)
class FoundModel:
    """A model that a runtime offers."""

    name: str
    size_bytes: int = 0
    generates: bool = True
    """False for an embedding model, which can't stand in for one that writes text."""


@dataclass(frozen=True)
class FoundRuntime:
    """A runtime that answered, with what it offers in its own order."""

    backend: str
    title: str
    url: str
    models: list[FoundModel] = field(default_factory=list)


@dataclass(frozen=True)
class MadeUpPolicy:
    """A policy file's text, and a sentence for the person about where it comes from."""

    text: str
    sentence: str


async def discover(environ: Mapping[str, str]) -> MadeUpPolicy:
    """Makes a policy of what runs on this machine."""
    return make_policy(await look_around(environ))


async def look_around(environ: Mapping[str, str]) -> list[FoundRuntime]:
    """Asks the usual ports; GATEWAY_OLLAMA_URL, GATEWAY_LLAMA_SERVER_URL and GATEWAY_VLLM_URL point it elsewhere."""
    ollama_url = environ.get("GATEWAY_OLLAMA_URL") or OLLAMA_URL
    llama_server_url = environ.get("GATEWAY_LLAMA_SERVER_URL") or LLAMA_SERVER_URL
    vllm_url = environ.get("GATEWAY_VLLM_URL") or VLLM_URL
    # Found by a plain connection: a proxy of the environment has nothing to do with runtimes on this machine.
    async with httpx.AsyncClient(timeout=ANSWER_S_MAX, trust_env=False) as client:
        answers = await asyncio.gather(
            _ollama(client, ollama_url), _llama_server(client, llama_server_url), _vllm(client, vllm_url)
        )
    return [runtime for runtime in answers if runtime is not None]


def make_policy(found: list[FoundRuntime]) -> MadeUpPolicy:
    """Writes the policy: the first model is kept warm, the smallest one helps the others out."""
    offered = [(runtime, model) for runtime in found for model in runtime.models if is_usable(model.name)]
    if not offered:
        empty = " and ".join(f"{runtime.title} at {runtime.url} has no model yet" for runtime in found)
        why = empty or "no Ollama, llama-server or vLLM was found here"
        return MadeUpPolicy(SIMULATED, f"{why}, so answers come from a simulated model")
    names = [model.name for _, model in offered]
    keys = keys_of(names)
    aliases = aliases_of(names, keys)
    writers = [index for index, (_, model) in enumerate(offered) if model.generates]
    smallest = min(writers, key=lambda index: offered[index][1].size_bytes, default=None)
    warm = writers[0] if writers else 0
    where = ", ".join(f"{runtime.title} at {runtime.url}" for runtime in found if runtime.models)
    lines = [f"# Made up by `gateway up` from what runs here: {where}.", "models:"]
    for index, (runtime, model) in enumerate(offered):
        lines += [
            f"  {quoted(keys[index])}:",
            f"    backend: {runtime.backend}",
            f"    model: {quoted(model.name)}",
            f"    url: {quoted(runtime.url)}",
            f"    keepWarm: {'true' if index == warm else 'false'}",
        ]
        if aliases[index]:
            lines.append(f"    aliases: [{quoted(aliases[index])}]")
        if index in writers and smallest is not None and index != smallest:
            lines.append(f"    fallback: {quoted(keys[smallest])}")
    return MadeUpPolicy("\n".join(lines) + "\n", f"made up from {where}")


async def _ollama(client: httpx.AsyncClient, url: str) -> FoundRuntime | None:
    if "version" not in await _json(client, f"{url}/api/version"):
        return None
    runtime = FoundRuntime("ollama", "Ollama", url)
    for entry in _entries(await _json(client, f"{url}/api/tags"), "models"):
        name = entry.get("name")
        if not isinstance(name, str) or entry.get("remote_host") or entry.get("remote_model"):
            continue
        size = entry.get("size")
        runtime.models.append(FoundModel(name, size if isinstance(size, int) else 0, generates=_generates(name, entry)))
    return runtime


async def _llama_server(client: httpx.AsyncClient, url: str) -> FoundRuntime | None:
    health = await _json(client, f"{url}/health")
    if _is_loading(health):
        return FoundRuntime("llama.cpp", "llama-server", url, [FoundModel("llama-server")])
    if health.get("status") != "ok":
        return None
    entries = _entries(await _json(client, f"{url}/v1/models"), "data")
    # Many programs live on port 8080 and answer /health; llama-server signs its list of models.
    ours = [entry for entry in entries if entry.get("owned_by") == "llamacpp" and isinstance(entry.get("id"), str)]
    models = []
    for entry in ours:
        meta = entry.get("meta")
        size = meta.get("size") if isinstance(meta, dict) else None
        models.append(FoundModel(entry["id"], size if isinstance(size, int) else 0))
    return FoundRuntime("llama.cpp", "llama-server", url, models) if models else None


async def _vllm(client: httpx.AsyncClient, url: str) -> FoundRuntime | None:
    entries = _entries(await _json(client, f"{url}/v1/models"), "data")
    # Port 8000 is anybody's; vLLM signs its list. What has a parent is an adapter of the model.
    ours = [e for e in entries if e.get("owned_by") == "vllm" and isinstance(e.get("id"), str) and not e.get("parent")]
    return FoundRuntime("vllm", "vLLM", url, [FoundModel(entry["id"]) for entry in ours]) if ours else None


async def _json(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """Gives the object that the address answers, or an empty one for any other answer and for none."""
    try:
        found = (await client.get(url)).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _entries(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = answer.get(key)
    return [entry for entry in entries if isinstance(entry, dict)][:MODELS_MAX] if isinstance(entries, list) else []


def _is_loading(health: dict[str, Any]) -> bool:
    """llama-server answers everything with this while it loads, and doesn't tell the model's name yet."""
    error = health.get("error")
    return isinstance(error, dict) and error.get("message") == "Loading model"


def _generates(name: str, entry: dict[str, Any]) -> bool:
    details = entry.get("details")
    family = str(details.get("family", "")) if isinstance(details, dict) else ""
    return "bert" not in family.lower() and "embed" not in name.lower()


def keys_of(names: list[str]) -> list[str]:
    """Policy keys for model names: a file's stem, small letters, digits, dots and dashes, no two the same."""
    keys: list[str] = []
    for name in names:
        stem = re.sub(r"\.gguf$", "", name.rsplit("/", 1)[-1] if name.endswith(".gguf") else name, flags=re.IGNORECASE)
        key = base = _plain(stem.removesuffix(":latest"))
        number = 2
        while key in keys:
            key, number = f"{base}-{number}", number + 1
        keys.append(key)
    return keys


def _plain(stem: str) -> str:
    plain = re.sub(r"[^a-z0-9.]+", "-", stem.lower())[:KEY_CHARS].strip("-.")
    while plain.endswith(".batch"):  # that would be the name of a batch lane
        plain = plain.removesuffix(".batch").strip("-.")
    return plain or "model"


def is_usable(name: str) -> bool:
    """Whether a policy can hold a model of this name: what nobody can type or print is left alone."""
    return name.isprintable() and name == name.strip() and 0 < len(name) <= NAME_CHARS


def aliases_of(names: list[str], keys: list[str]) -> list[str]:
    """The names under which clients know the models, "" where that is the key, or another model's name already."""
    taken = {*keys, *(f"{key}.batch" for key in keys)}
    aliases = []
    for name in names:
        aliases.append("" if name in taken else name)
        taken.add(name)
    return aliases


def quoted(text: str) -> str:
    """A JSON string is a YAML string too, whatever is in it."""
    return json.dumps(text)
