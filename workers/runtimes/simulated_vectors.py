"""The vectors of the simulated server: numbers that depend on nothing but the input, and mean nothing."""

import base64
import hashlib
import json
import struct
from typing import Any

DIMENSIONS = 8
DIMENSIONS_MAX = 4096


def read_inputs(body: Any) -> list[str]:
    """Gives each input of a request as text, token numbers written out; raises ValueError with a sentence."""
    given = body.get("input") if isinstance(body, dict) else None
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise ValueError("'input' must be a text, a list of texts, or token numbers")
    if all(isinstance(item, int) for item in given):
        return [json.dumps(given)]
    return [item if isinstance(item, str) else json.dumps(item) for item in given]


def answer(body: dict[str, Any], inputs: list[str], *, model: str, prompt_tokens: int) -> dict[str, Any]:
    """Builds the answer, with its vectors in base64 where the request asks for it."""
    wanted = body.get("dimensions")
    dimensions = min(wanted, DIMENSIONS_MAX) if isinstance(wanted, int) and wanted > 0 else DIMENSIONS
    in_base64 = body.get("encoding_format") == "base64"
    vectors = [_vector(text, dimensions) for text in inputs]
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if in_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage, "simulated": True}


def _vector(text: str, dimensions: int) -> list[float]:
    noise = hashlib.shake_128(text.encode(errors="replace")).digest(dimensions * 2)
    return [round(number / 65536, 6) for number in struct.unpack(f"<{dimensions}h", noise)]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
