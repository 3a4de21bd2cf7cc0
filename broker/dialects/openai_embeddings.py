"""Embeddings in the OpenAI dialect: what a request asks for, and whether the answer to it really holds vectors.

There is no stream: the answer is one JSON object, of which nothing goes out before all of it has been read. It may be
tens of megabytes of numbers, so it is not parsed: the vectors are stepped over, and what is left is read as JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.openai_stream import read_complaint
from broker.dialects.vectors import WholeAnswer
from broker.errors import BadRequest

PATH: Final = "/v1/embeddings"

BYTES_PER_TOKEN = 4

_KEY = b'"embedding"'
_colon = re.compile(rb"\s*:\s*").match
_find_model = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"').search


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What admission must know of a request for vectors."""

    model: str
    inputs: int
    prompt_tokens: int  # of all inputs; an estimate for text: bytes / 4
    longest_tokens: int  # of the longest input, which alone must fit the model's context


def read_embeddings(body: bytes) -> EmbeddingFacts:
    """Reads a request for vectors, or says in one sentence what is wrong with it. Unknown keys are the runtime's to
    judge."""
    request = {member.key: member.value for member in json_splice.read(body)}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    if request.get("stream") is not None and request["stream"] is not False:
        raise BadRequest("embeddings are not streamed; leave stream out", "stream")
    sizes = _sizes(request.get("input"))
    return EmbeddingFacts(model, len(sizes), sum(sizes), max(sizes))


def rewrite_embeddings(
    body: bytes, model: str, *, drops: frozenset[str] = frozenset(), extra: Mapping[str, object] | None = None
) -> bytes:
    """Names the runtime's model and leaves every other byte as the client sent it.

    `drops` are keys that the runtime must not see, because they would load the model again: `options`, which this
    dialect does not know, goes with them. `extra` is what the runtime must see.
    """
    kept = json_splice.without(body, drops | {"options"}) if drops else body
    return json_splice.splice(kept, {"model": model, **(extra or {})})


class EmbeddingReader(WholeAnswer):
    """Takes a runtime's bytes in and gives the client's bytes out, once all of them proved to be vectors.

    Success is a `data` list whose every entry has an embedding: neither a 200 nor a clean end is.
    """

    def __init__(self, served_as: str) -> None:
        super().__init__()
        self._served_as = served_as

    def end(self) -> None:
        """Tells that the runtime closed the answer; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        self._ended = True
        if self.complaint is not None:
            return
        body = bytes(self._body)
        self._body.clear()
        skeleton = _without_vectors(body)
        try:
            said: Any = json.loads(skeleton or body)
        except (ValueError, RecursionError):
            return self._fail("the runtime's answer is not JSON" if body else "the runtime's answer is empty")
        if not isinstance(said, dict) or said.get("error") or said.get("object") == "error":
            self.complaint = read_complaint(body)
            return None
        data = said.get("data")
        if not isinstance(data, list) or not data or not all(_has_vector(entry) for entry in data):
            return self._fail("the runtime answered without a vector")
        self._note_usage(said.get("usage"))
        self._answer = _renamed(body, skeleton, said, self._served_as)
        self.has_content = True
        return None

    def _note_usage(self, usage: object) -> None:
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(tokens, int):
            self.usage = {"prompt_tokens": tokens, "completion_tokens": 0}


def _without_vectors(body: bytes) -> bytes:
    """Gives the answer with `"vector"` in place of each vector that is one: numbers, or text in base64. Empty where the
    answer is cut short inside of one."""
    pieces: list[bytes] = []
    done = at = 0
    while (at := body.find(_KEY, at)) >= 0:
        at += len(_KEY)
        colon = _colon(body, at)
        if colon is None:
            continue  # the value of `"object": "embedding"`
        start = colon.end()
        first = body[start : start + 1]
        if first not in (b"[", b'"'):
            continue
        end = body.find(b"]" if first == b"[" else b'"', start + 1)
        if end < 0:
            return b""
        nested = first == b"[" and body.find(b"[", start + 1, end) >= 0
        if not nested and body[start + 1 : end].strip():
            pieces += body[done:start], b'"vector"'
            done = end + 1
        at = end + 1
    return b"".join([*pieces, body[done:]])


def _has_vector(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("embedding") == "vector"


def _renamed(body: bytes, skeleton: bytes, said: dict[str, Any], served_as: str) -> bytes:
    """Puts our model's name into the answer; a full scan of it only where its own name does not stand out."""
    name = json_splice.encode(served_as)
    found = None
    if isinstance(said.get("model"), str) and skeleton.count(b'"model"') == 1:
        found = _find_model(body)
    if found is None:
        return json_splice.splice(body, {"model": name}, finite=False)
    return body[: found.start()] + found.group(1) + name + body[found.end() :]


def _sizes(given: object) -> list[int]:
    """Gives the tokens of each input: of a text, of several, of one list of token numbers, or of several."""
    if isinstance(given, str):
        return [_tokens_of(given)]
    if not isinstance(given, list) or not given:
        raise BadRequest("input must be a text, a list of texts, or token numbers", "input")
    if all(type(item) is int for item in given):
        return [len(given)]
    sizes = []
    for index, item in enumerate(given):
        if isinstance(item, str):
            sizes.append(_tokens_of(item))
        elif isinstance(item, list):
            sizes.append(len(item))
        else:
            raise BadRequest(f"input[{index}] must be a text or a list of token numbers", f"input[{index}]")
    return sizes


def _tokens_of(text: str) -> int:
    size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    return size // BYTES_PER_TOKEN + 1
