"""What clients of the Ollama dialect ask about models: which there are, which are loaded, what one of them can do.

The policy and the hosts know less than an Ollama does of its own files. What nobody here knows is left empty, never
guessed: a family, a quantization, a template.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.dialects import json_splice
from broker.errors import BadRequest

VERSION: Final = "0.33.0"
"""The Ollama whose API this is: clients compare it with the oldest that they work with."""

ARCHITECTURE: Final = "warmlane"
_UNKNOWN_TIME: Final = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class Shown:
    """One name that a client may ask for, and the model behind it."""

    name: str
    digest: str
    size_bytes: int  # what it occupies where it was loaded, 0 = nobody knows
    file_format: str  # "gguf", or "" where it is the runtime's business
    embeddings: bool
    context_tokens: int | None
    backend: str


def digest(definition: Mapping[str, Any]) -> str:
    """Names what a name stands for: the same for all names of a model, another once its definition changes."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def tags(models: Iterable[Shown]) -> dict[str, Any]:
    """Answers /api/tags."""
    return {"models": [{**_entry(model), "modified_at": _UNKNOWN_TIME} for model in models]}


def running(models: Iterable[tuple[Shown, int, str]]) -> dict[str, Any]:
    """Answers /api/ps; each model with the bytes that it holds in memory, and until when at the latest it stays."""
    told = []
    for model, size_bytes, expires_at in models:
        entry = {**_entry(model), "size": size_bytes, "size_vram": size_bytes, "expires_at": expires_at}
        told.append({**entry, "context_length": model.context_tokens or 0})
    return {"models": told}


def show(model: Shown) -> dict[str, Any]:
    """Answers /api/show."""
    info: dict[str, object] = {"general.architecture": ARCHITECTURE, "general.basename": model.name}
    if model.context_tokens is not None:
        info[f"{ARCHITECTURE}.context_length"] = model.context_tokens
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "details": _details(model),
        "model_info": info,
        "capabilities": ["embedding"] if model.embeddings else ["completion", "tools"],
        "modified_at": _UNKNOWN_TIME,
    }


def asked_to_show(body: bytes) -> str:
    """Reads which model an /api/show request is about; older clients call it `name`."""
    request = {member.key: member.value for member in json_splice.read(body)}
    name = request.get("model") or request.get("name")
    if not isinstance(name, str):
        raise BadRequest("model must be the name of a model", "model")
    return name


def _entry(model: Shown) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "size": model.size_bytes,
        "digest": model.digest,
        "details": _details(model),
    }


def _details(model: Shown) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": model.file_format,
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": "",
    }
