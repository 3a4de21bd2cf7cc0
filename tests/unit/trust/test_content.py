"""What a request holds, in each dialect, and what the rules say to it."""

import json
from typing import Any

import pytest

from broker.policy import Policy
from broker.policy.content import ENDPOINTS
from broker.policy.remote import Redaction, Remote, RemoteOfModel
from broker.trust.content import HOLDS, examine, redacted
from broker.trust.files import FENCE_LINES, file_in
from broker.trust.verdict import digest_of, passed, rules_of, why_not
from tests.support.made_up_secrets import base64_of

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, OLLAMA, GENERATE = "/v1/responses", "/v1/messages", "/api/chat", "/api/generate"


def kinds(endpoint: str, request: dict[str, Any]) -> set[str]:
    told = examine(endpoint, json.dumps(request).encode(), Remote())
    assert not told.secrets
    return set(told.kinds)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "far", "messages": list(messages), **more}


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def part(kind: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "see"}, {"type": kind, **more}]


PDF = "data:application/pdf;base64," + "JVBERi0xLjQK/wD/AA=="
TEXT = "data:text/plain;base64," + base64_of("hello")
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

TABLE: list[tuple[str, dict[str, Any], set[str]]] = [
    (CHAT, chat(says("user", "hi"), says("assistant", "ho"), tools=[{"type": "function"}], seed=1), set()),
    (CHAT, chat(says("system", "be kind")), {"systemPrompts"}),
    (CHAT, chat(says("developer", part("text", text="be kind"))), {"systemPrompts"}),
    (CHAT, chat(says("tool", "42", tool_call_id="c")), {"toolOutput"}),
    (CHAT, chat(says("function", "42", name="f")), {"toolOutput"}),
    (CHAT, chat(says("assistant", None, tool_calls=[CALL])), {"toolOutput"}),
    (CHAT, chat(says("user", part("image_url", image_url={"url": "https://x/y.png"}))), {"images"}),
    (CHAT, chat(says("tool", part("image_url", image_url={"url": "x"}))), {"images", "toolOutput"}),
    (CHAT, chat(says("user", part("file", file={"file_data": TEXT, "filename": "a.txt"}))), {"fileContext"}),
    (CHAT, chat(says("user", part("file", file={"file_data": PDF}))), {"fileContext", "unreadable"}),
    (CHAT, chat(says("user", part("file", file={"file_id": "file-1"}))), {"fileContext", "unreadable"}),
    (CHAT, chat(says("user", part("input_audio", input_audio={}))), {"unreadable"}),
    (CHAT, chat(says("user", part("hologram"))), {"unreadable"}),
    (CHAT, chat(says("oracle", "hi")), {"unreadable"}),
    (CHAT, chat(says("user", "hi"), prediction={"type": "content", "content": "old"}), {"fileContext"}),
    (CHAT, chat(says("user", "hi"), documents=[{"text": "x"}]), {"fileContext"}),
    (CHAT, chat(says("user", "hi"), cache_prompt=True, mode="fast"), set()),
    (CHAT, chat(says("user", "hi"), attachments=["x" * 300]), {"unreadable"}),
    (CHAT, chat(says("user", "hi", extra={"y": "x" * 300})), {"unreadable"}),
    (COMPLETIONS, {"model": "m", "prompt": "Once"}, set()),
    (COMPLETIONS, {"model": "m", "prompt": "def f(", "suffix": "\n"}, {"fileContext"}),
    (COMPLETIONS, {"model": "m", "prompt": "<|fim_prefix|>def f(<|fim_suffix|>"}, {"fileContext"}),
    (COMPLETIONS, {"model": "m", "prompt": [1, 2, 3]}, {"unreadable"}),
    (COMPLETIONS, {"model": "m", "prompt": ["a", "b"]}, set()),
    (EMBEDDINGS, {"model": "m", "input": ["a", "b"]}, {"fileContext"}),
    (EMBEDDINGS, {"model": "m", "input": [1, 2]}, {"unreadable"}),
    (RESPONSES, {"model": "m", "input": "hi"}, set()),
    (RESPONSES, {"model": "m", "input": "hi", "instructions": "be kind"}, {"systemPrompts"}),
    (RESPONSES, {"input": [says("developer", [{"type": "input_text", "text": "be kind"}])]}, {"systemPrompts"}),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, {"toolOutput"}),
    (RESPONSES, {"input": [{"type": "custom_tool_call_output", "output": "42"}]}, {"toolOutput"}),
    (RESPONSES, {"input": [says("user", [{"type": "input_image", "image_url": "x"}])]}, {"images"}),
    (RESPONSES, {"input": [says("user", [{"type": "input_file", "file_data": TEXT}])]}, {"fileContext"}),
    (RESPONSES, {"input": [says("user", [{"type": "input_file", "file_id": "f"}])]}, {"fileContext", "unreadable"}),
    (RESPONSES, {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}]}, set()),
    (RESPONSES, {"input": [{"type": "compaction", "encrypted_content": "x"}]}, {"unreadable"}),
    (MESSAGES, chat(says("user", "hi")), set()),
    (MESSAGES, chat(says("user", "hi"), system=[{"type": "text", "text": "be kind"}]), {"systemPrompts"}),
    (MESSAGES, chat(says("assistant", [{"type": "tool_use", "id": "t", "name": "f", "input": {}}])), {"toolOutput"}),
    (MESSAGES, chat(says("user", [{"type": "tool_result", "tool_use_id": "t", "content": "42"}])), {"toolOutput"}),
    (MESSAGES, chat(says("user", [{"type": "image", "source": {"type": "base64"}}])), {"images"}),
    (MESSAGES, chat(says("user", [{"type": "document", "source": {"type": "text", "data": "x"}}])), {"fileContext"}),
    (MESSAGES, chat(says("user", [{"type": "document", "source": {"type": "url"}}])), {"fileContext", "unreadable"}),
    (MESSAGES, chat(says("assistant", [{"type": "thinking", "thinking": "hm", "signature": "s"}])), set()),
    (MESSAGES, chat(says("assistant", [{"type": "redacted_thinking", "data": "s"}])), {"unreadable"}),
    (MESSAGES, chat(says("user", "hi"), mcp_servers=[{"url": "https://x"}]), {"unreadable"}),
    (OLLAMA, chat(says("user", "hi")), set()),
    (OLLAMA, chat(says("system", "be kind"), says("tool", "42")), {"systemPrompts", "toolOutput"}),
    (OLLAMA, chat(says("user", "hi", images=["AAAA"])), {"images"}),
    (OLLAMA, chat(says("assistant", "", tool_calls=[{"function": {"name": "f"}}])), {"toolOutput"}),
    (GENERATE, {"model": "m", "prompt": "hi"}, set()),
    (GENERATE, {"model": "m", "prompt": "hi", "system": "be kind"}, {"systemPrompts"}),
    (GENERATE, {"model": "m", "prompt": "def f(", "suffix": ")"}, {"fileContext"}),
    (GENERATE, {"model": "m", "prompt": "hi", "context": [1]}, {"unreadable"}),
    (GENERATE, {"model": "m", "prompt": "hi", "images": ["AAAA"]}, {"images"}),
    ("/api/embed", {"model": "m", "input": ["a"]}, {"fileContext"}),
    ("/api/embeddings", {"model": "m", "prompt": "a"}, {"fileContext"}),
    ("/v9/new", {"model": "m", "prompt": "a"}, {"unreadable"}),
]


@pytest.mark.parametrize(("endpoint", "request_", "expected"), TABLE)
def test_what_a_request_holds(endpoint: str, request_: dict[str, Any], expected: set[str]) -> None:
    assert kinds(endpoint, request_) == expected


def test_every_endpoint_has_one_who_knows_its_parts() -> None:
    assert set(HOLDS) == set(ENDPOINTS)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"model":"m","messages":[{"role":"user","content":"a","content":"b"}]}', "it names a key twice"),
        (b'{"model":"m","model":"n","messages":[]}', "it names a key twice"),
        (b'{"model":', "it is no JSON"),
        (b"[]", "it is no JSON object"),
        (b'{"a":' * 90_000 + b"1" + b"}" * 90_000, ""),
    ],
)
def test_a_body_that_two_readers_may_read_differently_is_unreadable(body: bytes, why: str) -> None:
    rules = Remote(maxBytes=2**20)
    told = examine(CHAT, body, rules)
    assert [noted.where for noted in told.of("unreadable")] == ["the body"]
    assert why in told.of("unreadable")[0].note and why_not(told, rules)


LONG = "\n".join(f"x{n} = {n}" for n in range(FENCE_LINES))


@pytest.mark.parametrize(
    "text",
    [
        "src/app.py\n```python\nx = 1\n```",
        "Here:\n\n**src/app.py**\n\n```\nx = 1\n```",
        "```python src/app.py\nx = 1\n```",
        '```js title="a.js"\nx\n```',
        "```12:20:src/app.py\nx = 1\n```",
        "```python\n# src/app.py\nx = 1\n```",
        "~~~\n// a/b.ts\nx\n~~~",
        f"```\n{LONG}\n```",
        '<file path="src/app.py">\nx = 1\n</file>',
        "<environment_details>\n# Open tabs\n</environment_details>",
        "<documents><document>x</document></documents>",
        "diff --git a/x b/x\n",
        "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-a\n+b",
        "*** Begin Patch\n*** Update File: a.py\n",
        "File: src/app.py\nx = 1",
        "\n".join(f"  {n} | line" for n in range(1, 7)) + "\n",
    ],
)
def test_a_file_in_a_message_is_seen(text: str) -> None:
    assert file_in(text)
    assert kinds(CHAT, chat(says("user", text))) == {"fileContext"}


@pytest.mark.parametrize(
    "text",
    [
        "Why is the sky blue?",
        "What does `x = 1` do?\n```python\nx = 1\n```\nThanks, e.g. for a word.",
        "1. one\n2. two\n3. three\n4. four\n5. five\n6. six\n",
        "Read my file, please.",
        "a < b and b > c, see https://example.com/a/b",
        "```sh\npip install warmlane\n```",
    ],
)
def test_a_question_is_no_file(text: str) -> None:
    assert file_in(text) == ""


def test_the_rules_say_all_that_is_against_it() -> None:
    body = json.dumps(chat(says("system", "s"), says("tool", "t"), says("user", part("image_url")))).encode()
    told = examine(CHAT, body, Remote())
    assert why_not(told, Remote()) == [
        "it holds a system prompt, which the policy does not let out (remote.allow): messages[0].content",
        "it holds tool output, which the policy does not let out (remote.allow): messages[1].content",
        "it holds an image, which the policy does not let out (remote.allow): messages[2].content[1]",
    ]
    open_rules = Remote(allow=["systemPrompts", "toolOutput", "images"])
    assert why_not(told, open_rules) == []
    assert passed(told) == ["maxBytes", "secrets", "images", "systemPrompts", "toolOutput"]


def test_a_redaction_changes_the_copy_and_is_counted() -> None:
    """Strings only, and none that says what a part is; without a find the copy is the body, byte for byte."""
    rules = Remote(
        redact=[
            Redaction(name="customer", pattern=r"ACME|Initech", replacement=r"[customer \1]"),
            Redaction(name="never", pattern=r"user"),
        ]
    )
    body = b'{"model":"ACME", "messages": [ {"role":"user","content":"ACME and Initech, 1.50"} ], "seed": 12}'
    copy, counts = redacted(body, rules)
    assert json.loads(copy) == {
        "model": "ACME",
        "messages": [{"role": "user", "content": r"[customer \1] and [customer \1], 1.50"}],
        "seed": 12,
    }
    assert counts == {"customer": 2}
    told = examine(CHAT, body, rules)
    assert (told.size, told.redacted) == (len(copy), (("customer", 2),))
    plain = body.replace(b"ACME", b"we").replace(b"Initech", b"you")
    assert redacted(plain, rules) == (plain, {})


def test_what_a_redaction_took_away_is_judged_no_more() -> None:
    rules = Remote(redact=[Redaction(name="token", pattern=r"tok-\w+")])
    body = json.dumps(chat(says("user", "my api_key = tok-a8f3Kd93jQz1mm"))).encode()
    assert why_not(examine(CHAT, body, Remote()), Remote())
    assert why_not(examine(CHAT, body, rules), rules) == []


def policy(remote: str = "{}", model: str = "", url: str = "https://far.example") -> Policy:
    far = f"{{backend: openai, model: m, url: '{url}', trust: remote{model}}}"
    return Policy.parse(f"models:\n  far: {far}\nremote: {remote}")


def test_a_model_narrows_and_never_widens() -> None:
    wide = Remote(allow=["systemPrompts", "images"], maxBytes=100)
    far = policy(model=", remote: {allow: [images, toolOutput], maxBytes: 500}").models["far"]
    assert rules_of(wide, far) == Remote(allow=["images"], maxBytes=100)
    assert far.remote == RemoteOfModel(allow=["images", "toolOutput"], maxBytes=500)
    assert rules_of(wide, policy().models["far"]) == wide


def test_a_verdict_is_named_by_its_rules_and_by_where_it_leads() -> None:
    base = policy()
    digest = digest_of(base.remote, "far", base.models["far"])
    others = [policy("{allow: [images]}"), policy(model=", remote: {maxBytes: 9}"), policy(url="https://near.example")]
    assert len({digest, *(digest_of(p.remote, "far", p.models["far"]) for p in others)}) == 4
    same = Policy.parse(base.text + "\nmaxLosses: 9")
    assert digest_of(same.remote, "far", same.models["far"]) == digest


@pytest.mark.parametrize(
    ("remote", "sentence"),
    [
        ("{allow: [systemPrompt]}", "must be one of systemPrompts, toolOutput, fileContext, images"),
        ("{alow: []}", "unknown key 'alow', did you mean 'allow'?"),
        ("{redact: [{name: a, pattern: '('}]}", "remote.redact[0].pattern: is no regular expression"),
        ("{redact: [{name: a, pattern: 'x*'}]}", "so it would be found everywhere"),
        ("{redact: [{name: a, pattern: x}, {name: a, pattern: y}]}", "there are two redactions 'a'"),
        ("{maxBytes: much}", "must be a whole number of bytes, not 'much'"),
    ],
)
def test_what_is_wrong_in_remote_is_a_sentence(remote: str, sentence: str) -> None:
    with pytest.raises(Exception, match="line 3") as refused:
        policy(remote)
    assert sentence in str(refused.value)


def test_what_is_without_effect_is_a_warning() -> None:
    local = Policy.parse("models: {a: {backend: simulated, model: x}}\nremote: {allow: [images]}")
    assert local.warnings() == ["line 2: remote: has no effect, because no model is remote"]
    [warning] = policy(model=", remote: {allow: [images]}").warnings()
    assert "images does not leave for any model" in warning
    with pytest.raises(Exception, match="narrows what leaves, and this model is local"):
        Policy.parse("models: {a: {backend: simulated, model: x, remote: {allow: []}}}")
