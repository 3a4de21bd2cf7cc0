"""Whether a model can do a job: one table, asked at admission and at promotion alike."""

import json
from typing import Any

import pytest

from broker import errors
from broker.capabilities import cannot_do
from broker.policy import Model, Policy
from broker.records import JobRecord

CHAT, VECTORS = "/v1/chat/completions", "/v1/embeddings"


def model(**keys: Any) -> Model:
    return Policy.parse(json.dumps({"models": {"m": {"backend": "simulated", "model": "x", **keys}}})).models["m"]


@pytest.mark.parametrize(
    ("job", "keys", "refusal"),
    [
        ({"endpoint": CHAT}, {}, None),
        ({"endpoint": VECTORS}, {}, errors.WrongEndpoint),
        ({"endpoint": CHAT}, {"embeddings": True}, errors.WrongEndpoint),
        ({"endpoint": VECTORS}, {"embeddings": True}, None),
        ({"endpoint": "/api/embed"}, {"embeddings": True}, None),
        ({"endpoint": CHAT, "tokens": 90, "max_tokens": 10}, {"contextTokens": 100}, None),
        ({"endpoint": CHAT, "tokens": 90, "max_tokens": 11}, {"contextTokens": 100}, errors.ContextTooLong),
        ({"endpoint": VECTORS, "tokens": 900, "longest": 100}, {"embeddings": True, "contextTokens": 100}, None),
        (
            {"endpoint": VECTORS, "tokens": 900, "longest": 101},
            {"embeddings": True, "contextTokens": 100},
            errors.ContextTooLong,
        ),
        ({"endpoint": "/v1/messages", "needs": "files tools"}, {}, errors.WrongEndpoint),
        ({"endpoint": "/v1/messages", "needs": "files"}, {"backend": "vllm", "url": "http://127.0.0.1:1"}, None),
        ({"endpoint": "/v1/messages", "needs": "tools images"}, {}, None),
    ],
)
def test_what_a_model_cannot_do(
    job: dict[str, Any], keys: dict[str, Any], refusal: type[errors.Refused] | None
) -> None:
    found = cannot_do(JobRecord(id="j", **job), "m", model(**keys))

    assert type(found) is (refusal or type(None))


@pytest.mark.parametrize(("tokens", "max_tokens", "fits"), [(90, 10_000, True), (134, 0, True), (135, 0, False)])
def test_what_surely_is_too_long(tokens: int, max_tokens: int, fits: bool) -> None:
    """No answer has to be as long as it may be, and a prompt has three quarters of its estimate at least."""
    found = cannot_do(
        JobRecord(id="j", tokens=tokens, max_tokens=max_tokens), "m", model(contextTokens=100), surely=True
    )
    assert (found is None) is fits
    assert fits or str(found) == f"prompt (about {tokens} tokens) is too long: m has 100 tokens of context"


def test_a_refusal_says_what_would_help() -> None:
    long = cannot_do(JobRecord(id="j", tokens=90, max_tokens=20), "m", model(contextTokens=100))
    assert str(long) == "prompt (about 90 tokens) and answer (20) need 110 tokens of context; m has 100"
