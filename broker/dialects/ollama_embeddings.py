"""Vectors in the Ollama dialect: /api/embed and the older /api/embeddings, from an Ollama or a /v1/embeddings.

An answer may be tens of megabytes of numbers. They are not read as numbers: what lies between the brackets goes on byte
for byte, unless the client wants its vectors shorter than the model makes them.
"""

import json
import math
import re
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker.dialects import json_splice
from broker.dialects.openai_stream import read_complaint
from broker.dialects.vectors import WholeAnswer
from broker.errors import BadRequest

BYTES_PER_TOKEN = 4
KEEP_FOR_EVER: Final = -1

_VECTOR: Final = rb"\[([\s0-9.eE+,-]+)\]"
_find_vectors = re.compile(rb'"embedding"\s*:\s*' + _VECTOR).finditer
_find_rows = re.compile(_VECTOR).finditer
_find_model = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"').search


@dataclass(frozen=True, slots=True)
class AskedVectors:
    """A request for vectors that has been read."""

    model: str
    prompt_tokens: int
    longest_tokens: int
    empty: bool  # no input: the client wants the model loaded, and gets no vector
    legacy: bool  # /api/embeddings: one text, one vector
    dimensions: int
    inputs: list[str] = field(repr=False)


def read_embed(body: bytes) -> AskedVectors:
    """Reads an /api/embed request, or says in one sentence what is wrong with it."""
    request = _scan(body)
    given = request.get("input")
    inputs = [] if given is None or given == "" else [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise BadRequest("input must be a text or a list of texts", "input")
    dimensions = request.get("dimensions") or 0
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 0:
        raise BadRequest("dimensions must be a whole number above 0", "dimensions")
    return _asked(request["model"], inputs, legacy=False, dimensions=dimensions)


def read_embeddings(body: bytes) -> AskedVectors:
    """Reads an /api/embeddings request, the older one, which takes one text."""
    request = _scan(body)
    prompt = request.get("prompt")
    if not isinstance(prompt, str | None):
        raise BadRequest("prompt must be a text", "prompt")
    return _asked(request["model"], [prompt] if prompt else [], legacy=True, dimensions=0)


def nothing(asked: AskedVectors) -> bytes:
    """Answers a request without input, as an Ollama does."""
    return json_splice.encode({"embedding": []} if asked.legacy else {"model": asked.model, "embeddings": []})


def rewrite(
    body: bytes, model: str, *, drops: Container[str] = frozenset(), extra: Mapping[str, object] | None = None
) -> bytes:
    """Makes the request of an Ollama out of it. No option matters to a vector; those that would load the model again
    go, and the others with them."""
    kept = json_splice.without(body, {"options"})
    kept = json_splice.without(kept, drops)
    return json_splice.splice(kept, {"model": model, "keep_alive": KEEP_FOR_EVER, **(extra or {})})


def to_openai(
    asked: AskedVectors, model: str, *, drops: Container[str] = frozenset(), extra: Mapping[str, object] | None = None
) -> bytes:
    """Makes an OpenAI request of it. `dimensions` stay here: many models refuse them, and an Ollama cuts by itself."""
    wanted = {"model": model, "input": asked.inputs, "encoding_format": "float"}
    return json_splice.encode({key: value for key, value in wanted.items() if key not in drops} | dict(extra or {}))


class VectorReader(WholeAnswer):
    """Takes a runtime's bytes in and gives the client's out, once all of them proved to be vectors.

    Success is as many vectors as inputs: neither a 200 nor a clean end is.
    """

    def __init__(
        self,
        served_as: str,
        *,
        asked: AskedVectors,
        native: bool,
        waited_ns: int = 0,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        super().__init__()
        self._served_as = served_as
        self._asked = asked
        self._native = native
        self._waited_ns = waited_ns
        self._now_ns = now_ns
        self._began = now_ns()

    def end(self) -> None:
        """Tells that the runtime closed the answer; afterwards it has either succeeded or an error."""
        if self._ended:
            return
        self._ended = True
        body = bytes(self._body)
        self._body.clear()
        if self.complaint is not None:
            return
        try:
            vectors, rest = self._vectors(body)
            said = json.loads(rest)
        except (ValueError, RecursionError):
            return self._fail("the runtime's answer is not JSON" if body else "the runtime's answer is empty")
        if not isinstance(said, dict) or said.get("error") or said.get("object") == "error":
            self.complaint = read_complaint(body)
            return
        found = self._in_order(said, vectors)
        if found is None or len(found) != len(self._asked.inputs):
            return self._fail("the runtime answered without a vector for each input")
        usage = said.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else said.get("prompt_eval_count")
        if isinstance(tokens, int):
            self.usage = {"prompt_tokens": tokens, "completion_tokens": 0}
        try:
            self._answer = self._renamed(body, rest, said) if self._native else self._written(found)
        except ValueError:
            return self._fail("the runtime's answer holds a vector that is none")
        self.has_content = True

    def _vectors(self, body: bytes) -> tuple[list[bytes], bytes]:
        """Gives the insides of the vectors, and the answer with each one's number in its place."""
        vectors: list[bytes] = []
        rest: list[bytes] = []
        done = 0
        for found in (_find_rows if self._native and not self._asked.legacy else _find_vectors)(body):
            start = found.start(1) - 1
            rest += body[done:start], str(len(vectors)).encode()
            vectors.append(found.group(1))
            done = found.end()
        return vectors, b"".join([*rest, body[done:]])

    def _in_order(self, said: dict[str, Any], vectors: list[bytes]) -> list[bytes] | None:
        numbers: Any
        if self._native:
            numbers = [said.get("embedding")] if self._asked.legacy else said.get("embeddings")
        else:
            data = said.get("data")
            if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
                return None
            numbers = [entry.get("embedding") for entry in sorted(data, key=_place)]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < len(vectors) for n in numbers):
            return None
        return [vectors[n] for n in numbers]

    def _renamed(self, body: bytes, rest: bytes, said: dict[str, Any]) -> bytes:
        """Puts our model's name into an answer; a full scan of it only where its own name does not stand out."""
        if "model" not in said:  # the older endpoint says none
            return body
        name = json_splice.encode(self._served_as)
        found = _find_model(body) if rest.count(b'"model"') == 1 else None
        if found is None:
            return json_splice.splice(body, {"model": name}, finite=False)
        return body[: found.start()] + found.group(1) + name + body[found.end() :]

    def _written(self, vectors: list[bytes]) -> bytes:
        if self._asked.legacy:
            return b'{"embedding":[' + vectors[0] + b"]}"
        if self._asked.dimensions:
            vectors = [_shortened(vector, self._asked.dimensions) for vector in vectors]
        figures: dict[str, object] = {
            "total_duration": self._waited_ns + max(0, self._now_ns() - self._began),
            "load_duration": self._waited_ns,
        }
        if self.usage is not None:
            figures["prompt_eval_count"] = self.usage["prompt_tokens"]
        rows = b"],[".join(vectors)
        head = b'{"model":' + json_splice.encode(self._served_as) + b',"embeddings":[[' + rows + b"]],"
        return head + json_splice.encode(figures)[1:]


def _place(entry: dict[str, Any]) -> int:
    index = entry.get("index")
    return index if isinstance(index, int) else 0


def _shortened(vector: bytes, dimensions: int) -> bytes:
    """Cuts a vector and gives it length 1 again, as an Ollama does; raises ValueError where it is none."""
    numbers = json.loads(b"[" + vector + b"]")
    if len(numbers) <= dimensions:
        return vector
    kept = numbers[:dimensions]
    length = math.sqrt(math.fsum(number * number for number in kept)) or 1.0
    return json_splice.encode([number / length for number in kept])[1:-1]


def _scan(body: bytes) -> dict[str, Any]:
    request = {member.key: member.value for member in json_splice.read(body)}
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", "model")
    return request


def _asked(model: str, inputs: list[str], *, legacy: bool, dimensions: int) -> AskedVectors:
    sizes = [len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN + 1 for text in inputs]
    return AskedVectors(
        model=model,
        prompt_tokens=sum(sizes),
        longest_tokens=max(sizes, default=0),
        empty=not inputs,
        legacy=legacy,
        dimensions=dimensions,
        inputs=inputs,
    )
