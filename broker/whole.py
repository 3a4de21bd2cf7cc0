"""One object of an answer's frames, for whoever did not ask for a stream: the answer as JSON, in OpenAI's dialect."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from broker.dialects import openai, openai_completions, openai_embeddings, responses
from broker.dialects.responses_stream import fold_responses


def _written(answer: Any) -> bytes:
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


def _written_of(fold: Callable[[Any], Any], stream: Any) -> bytes:
    try:
        return _written(fold(stream))
    except (AttributeError, LookupError, TypeError, RecursionError) as odd:  # a runtime may write anything into a chunk
        raise ValueError(f"the stream holds what no answer is made of: {type(odd).__name__}") from None


def chat(parts: Sequence[bytes]) -> bytes:
    """Folds a chat stream; raises ValueError where it is none."""
    return _written_of(openai.fold_chat, parts)


def completion(parts: Sequence[bytes]) -> bytes:
    """Folds a stream of completions; raises ValueError where it is none."""
    return _written_of(openai_completions.fold_completion, b"".join(parts))


def response(parts: Sequence[bytes]) -> bytes:
    """Folds a stream of responses; raises ValueError where it is none."""
    return _written_of(fold_responses, b"".join(parts))


def vectors(parts: Sequence[bytes]) -> bytes:
    """Vectors are one object already."""
    return b"".join(parts)


FOLDS: Final[Mapping[str, Callable[[Sequence[bytes]], bytes]]] = {
    openai.PATH: chat,
    openai_completions.PATH: completion,
    openai_embeddings.PATH: vectors,
    responses.PATH: response,
}
"""By the path that a job came by."""
