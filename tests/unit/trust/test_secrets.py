"""No secret of the corpus leaves, wherever in a request it stands; ordinary code with odd constants may.

The corpus is made up as the test runs (`made_up_secrets`). What is refused although it is no secret is measured over
Python's own library and over the packages that are installed beside the tests.
"""

import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.policy.remote import Remote
from broker.trust import content, secrets
from broker.trust.content import examine
from broker.trust.verdict import why_not
from tests.support.made_up_secrets import CARRIERS, KINDS, NAMED, base64_of

ALL: Any = ["systemPrompts", "toolOutput", "fileContext", "images"]
OPEN = Remote(allow=ALL, maxBytes=20 * 1024 * 1024)
FALSE_ALARMS_MAX = 0.005
"""Of the files of ordinary code: measured 0 of 740 (library), 3 of 1,050 (its tests), 5 of 3,000 (packages)."""


def user(text: str) -> dict[str, Any]:
    return {"model": "far", "messages": [{"role": "user", "content": text}]}


REQUESTS: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "prose": ("/v1/chat/completions", user),
    "system": ("/v1/chat/completions", lambda t: {"model": "m", "messages": [{"role": "system", "content": t}]}),
    "tool": (
        "/v1/chat/completions",
        lambda t: {
            "model": "m",
            "messages": [{"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": t}]}],
        },
    ),
    "arguments": (
        "/v1/chat/completions",
        lambda t: {
            "messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": json.dumps({"x": t})}}]}]
        },
    ),
    "definition": ("/v1/chat/completions", lambda t: user("hi") | {"tools": [{"function": {"description": t}}]}),
    "completion": ("/v1/completions", lambda t: {"model": "m", "prompt": ["a", t], "suffix": "b"}),
    "embedding": ("/v1/embeddings", lambda t: {"model": "m", "input": ["a", t]}),
    "instructions": ("/v1/responses", lambda t: {"model": "m", "instructions": t, "input": "hi"}),
    "output": ("/v1/responses", lambda t: {"input": [{"type": "function_call_output", "call_id": "c", "output": t}]}),
    "block": (
        "/v1/messages",
        lambda t: {
            "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": t}]}]
        },
    ),
    "document": (
        "/v1/messages",
        lambda t: {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "document", "source": {"type": "base64", "data": base64_of(t)}}],
                }
            ]
        },
    ),
    "ollama": ("/api/chat", lambda t: {"model": "m", "messages": [{"role": "user", "content": t}]}),
    "generate": ("/api/generate", lambda t: {"model": "m", "prompt": "hi", "suffix": t}),
    "embed": ("/api/embed", lambda t: {"model": "m", "input": t}),
}


def found_in(endpoint: str, request: dict[str, Any]) -> list[str]:
    body = json.dumps(request).encode()
    told = examine(endpoint, body, OPEN)
    assert bool(told.secrets) == any("secret" in words for words in why_not(told, OPEN))
    return [str(noted) for noted in told.secrets]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_secret_is_found_in_whatever_carries_it(carrier: str) -> None:
    """Each format three times, anew in each run's order but always the same ones: 30 that say what they are, and six
    that only their name gives away."""
    rng, missed = random.Random(carrier), []
    for kind, make in [*KINDS.items(), *NAMED.items()] * 3:
        secret = make(rng)
        text = CARRIERS[carrier](kind if kind in NAMED else "DEPLOY", secret)
        if not found_in("/v1/chat/completions", user(text)):
            missed.append((kind, text))
    assert missed == []


@pytest.mark.parametrize("place", REQUESTS)
def test_a_secret_is_found_wherever_in_a_request_it_stands(place: str) -> None:
    endpoint, request = REQUESTS[place]
    rng = random.Random(place)
    missed = [kind for kind, make in KINDS.items() if not found_in(endpoint, request(f"see {make(rng)} there"))]
    assert missed == []
    assert found_in(endpoint, request("see nothing there")) == []


@pytest.mark.parametrize("wrapped", ["base64", "escaped", "split by a key"])
def test_a_secret_is_found_through_what_clients_do_to_text(wrapped: str) -> None:
    """Base64 as Kubernetes and data URLs have it, JSON's escapes, a tool's arguments as an object."""
    rng = random.Random(wrapped)
    for kind, make in KINDS.items():
        secret = make(rng)
        if wrapped == "base64":
            assert found_in("/v1/chat/completions", user(f"data:\n  token: {base64_of(secret)}\n")), kind
        elif wrapped == "escaped":
            escaped = "".join(f"\\u{ord(c):04x}" for c in secret)
            body = b'{"model":"m","messages":[{"role":"user","content":"' + escaped.encode() + b'"}]}'
            assert examine("/v1/chat/completions", body, OPEN).secrets, kind
    if wrapped == "split by a key":
        for name, make in NAMED.items():
            call = {"type": "tool_use", "id": "t", "name": "set", "input": {name.lower(): make(rng)}}
            assert found_in("/v1/messages", {"messages": [{"role": "assistant", "content": [call]}]}), name


def test_what_is_told_of_a_secret_is_its_kind_and_place() -> None:
    rng = random.Random(1)
    secret = KINDS["github token"](rng)
    told = found_in("/v1/chat/completions", user(f"one\ntwo {secret}"))
    assert told == ["messages[0].content (line 2)"]
    words = why_not(examine("/v1/chat/completions", json.dumps(user(secret)).encode(), OPEN), OPEN)
    assert words == ["it seems to hold a secret: github-pat at messages[0].content (line 1)"]


def test_ordinary_code_is_seldom_taken_for_a_secret() -> None:
    """Checksums, tables, test vectors and all: what is in the files that everybody has."""
    files = sorted(code_files())
    alarms = [str(path) for path in files if secrets.scan(path.read_bytes())]
    assert len(files) > 1_500
    assert len(alarms) / len(files) <= FALSE_ALARMS_MAX, alarms


def code_files() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from (path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    yield from random.Random(0).sample(packages, min(1_000, len(packages)))


@pytest.mark.parametrize("why", [ImportError("no wheel"), TimeoutError("slow"), RuntimeError("broken")])
def test_what_was_not_scanned_is_not_called_clean(why: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the scanner is missing, nor where it takes too long or breaks."""

    class Broken:
        def scan(self, _text: bytes, timeout: float) -> list[Any]:
            raise why

    monkeypatch.setattr(secrets, "_made", Broken)
    with pytest.raises(secrets.CannotScan):
        examine("/v1/chat/completions", json.dumps(user("hi")).encode(), OPEN)


def test_a_body_over_the_bound_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_parsed", None)
    rules = Remote(allow=ALL, maxBytes=10)
    told = examine("/v1/chat/completions", b"{" + b" " * 10, rules)
    assert why_not(told, rules) == ["its body is longer (11 bytes) than may leave (remote.maxBytes 10)"]
