"""The rest of a broken answer fits behind what its client has: in every dialect, wherever it broke off."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import continuing
from broker.dialects import going_on, partial
from broker.dialects.partial import Partial
from broker.policies import Active
from broker.policy import Policy
from broker.records import JobRecord
from workers.answers import AnswerReader
from workers.asking import Asking
from workers.runtimes.base import Endpoint

JOB = "01JD0000000000000000000000"
ASK = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "Hi ", "stream_options": {"include_usage": True}},
    "/v1/messages": {"messages": ASK, "max_tokens": 50},
    "/v1/responses": {"input": "Hi", "tools": [{"type": "function", "name": "read", "parameters": {}}]},
    "/api/chat": {"messages": ASK},
    "/api/generate": {"prompt": "Hi"},
}
PIECES = ["The", " sky", ' is "', "blue", "\u2028", "é", "\n\n", "  x", " =", " 1", "\n"]
CHATS = [path for path in BODIES if path != "/v1/completions"]


def asking(path: str, *, knows_continue: bool = True, **more: Any) -> Asking:
    """How the job is asked; its reader tells no times."""
    body = json.dumps({"model": "coder", "stream": True} | BODIES[path] | more).encode()
    job = JobRecord(id=JOB, endpoint=path, model="coder", include_usage=True)
    return Asking(job, body, Endpoint("http://x", model="weights", knows_continue=knows_continue))


def chunk(path: str, piece: str | None, *, first: bool = False, finish: str | None = None, **more: Any) -> bytes:
    """What a runtime says; its chunks are called as its server numbers them."""
    if path == "/v1/completions":
        choice: dict[str, Any] = {"text": piece or ""}
    else:
        choice = {"delta": {"content": piece} if piece is not None else {}}
        if first:
            choice["delta"] = {"role": "assistant", "content": None}
    kind = "text_completion" if path == "/v1/completions" else "chat.completion.chunk"
    head = {"id": more.pop("id", "chatcmpl-1"), "object": kind, "created": more.pop("created", 7), "model": "weights"}
    return event(head | {"choices": [{"index": 0, **choice, "finish_reason": finish}]} | more)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def answer(path: str, pieces: list[str], *, told: int = 0, made: int | None = None, **names: Any) -> list[bytes]:
    """The chunks of a whole answer, or of the rest behind `told` pieces."""
    made = len(pieces) if made is None else made
    usage = {"prompt_tokens": 9 + told, "completion_tokens": made, "total_tokens": 9 + told + made}
    details = {"prompt_tokens_details": {"cached_tokens": 9 + told}}
    end = chunk(path, None, finish="stop", **names)
    said = [chunk(path, piece, **names) for piece in pieces]
    opening = [] if path == "/v1/completions" else [chunk(path, None, first=True, **names)]
    head = {"id": names.get("id", "chatcmpl-1"), "created": names.get("created", 7), "model": "weights"}
    figures = event({**head, "object": "x", "choices": [], "usage": {**usage, **details}})
    return [*opening, *said, end, figures, b"data: [DONE]\n\n"]


def read(reader: AnswerReader, *chunks: bytes, end: bool = True) -> bytes:
    out = b""
    for one in chunks:
        reader.feed(one)
        out += reader.take()
    if end:
        reader.end()
    return out + reader.take()


def plain(out: bytes) -> str:
    """Without what a clock tells, and without whose turn it was to begin an escape."""
    text = re.sub(r'"(\w+_at|\w+_duration)":("[^"]*"|\d+)', r'"\1":0', out.decode())
    lines = [
        json.loads(line) if line.startswith("{") else line for line in re.sub(r"(?m)^data: ", "", text).split("\n")
    ]
    return json.dumps(lines, indent=1)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("at", range(1, len(PIECES) + 1))
@pytest.mark.parametrize("echoes", [False, True])
def test_broken_off_anywhere_it_is_the_same_answer(path: str, at: int, echoes: bool) -> None:
    """Whatever the runtime calls itself the second time, and whether it repeats what was said or not."""
    whole = read(asking(path).reader(), *answer(path, PIECES))
    first = read(asking(path).reader(), *answer(path, PIECES)[: at + (path != "/v1/completions")], end=False)
    told = continuing._TOLD[path](first)
    assert told is not None and told.text == "".join(PIECES[:at]) and told.pieces == at

    asked = asking(path, knows_continue=not echoes)
    asked.go_on(told)
    text = "".join(PIECES)
    if path == "/v1/completions":
        begun, rest = told.text, PIECES[at:]
    else:  # the space at the end is made once more
        begun = told.asked
        gap = text[len(begun) : len(told.text)]
        rest = ([gap] if gap else []) + PIECES[at:]
    if echoes and path != "/v1/completions":
        rest = [begun + (rest or [""])[0], *rest[1:]]
    reader = asked.reader()
    again = answer(path, rest, told=at, made=len(PIECES) - at, id="chatcmpl-2", created=8)
    second = read(reader, *again)

    assert reader.succeeded and reader.usage == {
        "prompt_tokens": 9,
        "completion_tokens": len(PIECES),
        "cached_tokens": 9,
    }
    assert plain(first + second) == plain(whole)


@pytest.mark.parametrize(
    "value", ["[1]", "1e999", '"x"', "null", "{}", '{"choices":[]}', '{"a":{}}', "[" * 500 + "]" * 500]
)
@pytest.mark.parametrize("path", BODIES)
def test_what_a_runtime_should_not_have_said_is_no_text_to_go_on_from(path: str, value: str) -> None:
    """Each word of a log in turn of another kind: whoever judges a lost answer judges those of all others too."""
    log = read(asking(path).reader(), *answer(path, PIECES)[:4], end=False).decode()
    words = list(re.finditer(r'(?<=":)("[^"]*"|\d+|null|\[(?=])|\{)', log))
    assert len(words) > 5
    for word in words:
        continuing._TOLD[path]((log[: word.start()] + value + log[word.end() :]).encode())


@pytest.mark.parametrize("path", BODIES)
def test_what_the_runtime_is_asked(path: str) -> None:
    told = Partial(text="The sky \n", pieces=3)
    for knows, flags in ((True, {"continue_final_message": True, "add_generation_prompt": False}), (False, {})):
        limit = {"max_output_tokens": 10} if path == "/v1/responses" else {"max_tokens": 10}
        limit = {"options": {"num_predict": 10}} if path.startswith("/api/") else limit
        asked = asking(path, knows_continue=knows, **limit)
        asked.go_on(told)
        request = json.loads(asked.request(2))
        assert request["max_tokens"] == 7 and request["id_slot"] == 2 and request["stream"] is True
        if path == "/v1/completions":
            assert asked.path == path and request["prompt"] == "Hi The sky \n"
            continue
        assert asked.path == "/v1/chat/completions"
        assert request["messages"][-1] == {"role": "assistant", "content": "The sky"}
        assert request["messages"][-2]["content"] == "Hi"
        assert {key: request[key] for key in request.keys() & going_on._FLAGS.keys()} == flags


def test_the_limit_of_an_answer_never_falls_to_nothing() -> None:
    asked = asking("/v1/chat/completions", max_completion_tokens=3, max_tokens=None)
    asked.go_on(Partial(text="a b c", pieces=3))
    request = json.loads(asked.request(None))
    assert (request["max_completion_tokens"], request["max_tokens"]) == (1, None)


def test_of_nothing_but_space_the_answer_is_asked_for_anew() -> None:
    """There is nothing to go on from; the space that was told is not told twice."""
    asked = asking("/v1/chat/completions")
    asked.go_on(Partial(text="\n ", pieces=2, chunk_id="chatcmpl-1", created=7))
    assert json.loads(asked.request(None))["messages"] == ASK
    out = read(asked.reader(), *answer("/v1/chat/completions", ["\n", " \n", "Hi"], id="c2"))
    assert [c["choices"][0]["delta"] for c in chunks(out) if c["choices"]] == [{"content": "\n"}, {"content": "Hi"}, {}]
    assert {c["id"] for c in chunks(out)} == {"chatcmpl-1"}


def chunks(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in out.decode().split("\n\n") if line.startswith("data: {")]


def texts(out: bytes) -> list[str]:
    return [
        c["choices"][0]["delta"].get("content")
        for c in chunks(out)
        if c["choices"] and not c["choices"][0]["finish_reason"]
    ]


@pytest.mark.parametrize(
    ("told", "echoes", "says", "new"),
    [
        (Partial("ha", 1), False, ["ha", "ha"], ["ha", "ha"]),  # one token: more likely the next one than an echo
        (Partial("ha", 1), True, ["ha", "ha"], ["ha"]),
        (Partial("- - - ", 3), False, ["-", " -"], ["-", " -"]),  # a model that repeats itself, token by token
        (Partial("a b c", 3), False, ["a b c d", " a b c"], [" d", " a b c"]),
        (Partial("a b c", 3), False, ["a b c", " d"], [" d"]),
        (Partial("a b c", 3), False, ["", " a b", " c"], [" a b", " c"]),
        (Partial(" a b c \n", 4), False, ["a b c \n", "d"], ["d"]),  # the template cut both ends off
        (Partial(" a b c \n", 4), False, [" \n", "\n", "d"], ["\n", "d"]),
        (Partial(" a b c \n", 4), False, ["\n", "d"], ["\n", "d"]),
        (Partial("a b c ", 4), False, [" d"], ["d"]),
        (Partial("a b c ", 4), False, ["d"], ["d"]),
    ],
)
def test_what_was_told_is_not_told_twice(told: Partial, echoes: bool, says: list[str], new: list[str]) -> None:
    asked = asking("/v1/chat/completions", knows_continue=not echoes)
    asked.go_on(told)
    assert texts(read(asked.reader(), *answer("/v1/chat/completions", says))) == new


@given(
    text=st.text(st.sampled_from("ab \n\u2028é"), max_size=12),
    rest=st.lists(st.text(st.sampled_from("ab \n\u2028é"), max_size=4), max_size=5),
    cut=st.integers(1, 40),
)
def test_the_bytes_may_come_split_anywhere(text: str, rest: list[str], cut: int) -> None:
    whole = b"".join(answer("/v1/chat/completions", rest))
    told = Partial(text, len(text))
    outs = []
    for size in (len(whole), cut):
        asked = asking("/v1/chat/completions")
        asked.go_on(told)
        outs.append(read(asked.reader(), *(whole[at : at + size] for at in range(0, len(whole), size))))
    assert outs[0] == outs[1]
    said = "".join(texts(outs[0]))
    assert (told.asked + "".join(rest)).endswith(said) or not said


def test_a_new_turn_is_no_rest() -> None:
    """A runtime that begins to think has not understood: its client must not hear two answers as one."""
    asked = asking("/v1/chat/completions")
    asked.go_on(Partial("a b c", 3))
    reader = asked.reader()
    out = read(reader, event({"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}, "finish_reason": None}]}))
    assert out == b"" and not reader.succeeded and not reader.has_content
    assert reader.error == "the runtime began a new turn instead of going on"


def test_nothing_comes_before_something_new() -> None:
    """So an attempt that fails early leaves no mark, and the next one goes on from the same place."""
    asked = asking("/v1/chat/completions")
    asked.go_on(Partial("a b c ", 3))
    reader = asked.reader()
    progress = {"prompt_progress": {"processed": 3, "total": 9}}
    early = [chunk("/v1/chat/completions", None, first=True, **progress), chunk("/v1/chat/completions", "")]
    early += [b": ping\n\n", chunk("/v1/chat/completions", "a b c"), chunk("/v1/chat/completions", " ")]
    assert read(reader, *early, end=False) == b"" and not reader.has_content
    assert reader.prompt_read == (3, 9)
    reader.feed(chunk("/v1/chat/completions", "d", timings={"predicted_n": 1}))
    assert reader.has_content and texts(reader.take()) == ["d"] and reader.timings is None


def test_a_call_may_come_behind_the_text() -> None:
    asked = asking("/v1/chat/completions", tools=[TOOL])
    asked.go_on(Partial("Let me see.", 3, chunk_id="chatcmpl-1"))
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    said = event({"id": "other", "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]})
    reader = asked.reader()
    out = chunks(read(reader, said, chunk("/v1/chat/completions", None, finish="tool_calls"), b"data: [DONE]\n\n"))
    assert out[0]["choices"][0]["delta"] == {"tool_calls": [call]} and reader.succeeded


def test_a_runtimes_error_is_heard() -> None:
    for says in (event({"error": {"message": "slot failed"}}), b"proxy error: gone\n\n"):
        asked = asking("/v1/chat/completions")
        asked.go_on(Partial("a b c", 3))
        reader = asked.reader()
        read(reader, says)
        assert not reader.succeeded and reader.error in ("slot failed", "proxy error: gone")


CHAT_MORE = {
    "a thought": {"reasoning_content": "Hm"},
    "a call": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "read", "arguments": ""}}]},
    "a refusal": {"refusal": "No"},
}


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("more", CHAT_MORE)
@pytest.mark.parametrize("before", [True, False])
def test_more_than_text_is_not_gone_on_from(path: str, more: str, before: bool) -> None:
    """A thought, a call: before the text or behind it. What an Ollama's client or an Anthropic one has not been told of
    a call or a refusal is nothing but text, or nothing."""
    odd = event({"id": "c", "model": "w", "choices": [{"index": 0, "delta": CHAT_MORE[more], "finish_reason": None}]})
    parts = [odd, chunk(path, "a")] if before else [chunk(path, "a"), odd]
    log = read(asking(path).reader(), *parts, end=False)
    told = continuing._TOLD[path](log)
    untold = more == "a call" and path.startswith("/api/")
    as_text = more == "a refusal" and path in ("/api/chat", "/api/generate", "/v1/messages")
    assert (told is not None) == (untold or as_text)
    if told is not None:
        assert told.text == {"a call": "a", "a refusal": "Noa" if before else "aNo"}[more]


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("begin", ["<think>", "\n<think>\nHm", "[THINK]Hm", "<|channel|>analysis"])
def test_thoughts_in_the_text_are_thoughts(path: str, begin: str) -> None:
    log = read(asking(path).reader(), chunk(path, begin), chunk(path, "so"), end=False)
    assert continuing._TOLD[path](log) is None


@pytest.mark.parametrize("path", BODIES)
def test_a_finished_answer_is_not_gone_on_from(path: str) -> None:
    log = read(asking(path).reader(), *answer(path, PIECES))
    assert continuing._TOLD[path](log) is None


@pytest.mark.parametrize(
    "log",
    [
        b"data: {broken\n\n", b"data: []\n\n", b'data: {"choices":[{"index":1,"delta":{"content":"a"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":["a"]}}]}\n\n',
        b'data: {"error":{"message":"x"},"choices":[]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[]}}]}\n\n',
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_not_gone_on_from(log: bytes) -> None:
    assert partial.chat(log) is None


@pytest.mark.parametrize("path", BODIES)
def test_free_text_may_go_on(path: str) -> None:
    assert continuing.may_go_on(path, json.dumps({"model": "m"} | BODIES[path]).encode())


FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}, "name": "a", "schema": {}}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"response_format": FORM}),
        ("/v1/chat/completions", {"grammar": 'root ::= "a"'}),
        ("/v1/chat/completions", {"json_schema": {}, "guided_json": {"type": "object"}}),
        ("/v1/chat/completions", {"structured_outputs": {"choice": ["a"]}}),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "read"}}}),
        ("/v1/chat/completions", {"n": 2}),
        ("/v1/chat/completions", {"logprobs": True}),
        ("/v1/chat/completions", {"messages": [*ASK, {"role": "assistant", "content": "It"}]}),
        ("/v1/completions", {"prompt": ["Hi"]}),
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"suffix": "end"}),
        ("/v1/completions", {"echo": True}),
        ("/v1/completions", {"logprobs": 1}),
        ("/v1/completions", {"n": 2}),
        ("/v1/messages", {"output_config": {"format": FORM}}),
        ("/v1/messages", {"tools": [{"name": "read", "input_schema": {}}], "tool_choice": {"type": "any"}}),
        ("/v1/messages", {"messages": [*ASK, {"role": "assistant", "content": "It"}]}),
        ("/v1/responses", {"text": {"format": FORM}}),
        ("/api/chat", {"format": "json"}),
        ("/api/chat", {"format": {"type": "object"}}),
        ("/api/generate", {"raw": True}),
        ("/api/generate", {"suffix": "end"}),
        ("/api/chat", {"logprobs": True}),
        ("/v1/embeddings", {"input": "Hi"}),
    ],
)
def test_a_form_that_begins_anew_in_its_middle_may_not(path: str, more: dict[str, Any]) -> None:
    assert not continuing.may_go_on(path, json.dumps({"model": "m"} | BODIES.get(path, {}) | more).encode())


def test_a_body_that_nobody_can_read_may_not() -> None:
    for body in (b"", b"[]", b"{", b'{"messages":[1]}'):
        for path in BODIES:
            assert not continuing.may_go_on(path, body)


POLICY = """
models:
  a: {backend: llama.cpp, model: m, url: "http://x:1", onLoss: continue, coldStartBudgetMs: 700}
  b: {backend: ollama, model: m, onLoss: continue}
  c: {backend: vllm, model: m, url: "http://x:2"}
lanes:
  quick: {target: a, coldStartBudgetMs: 40}
"""


def test_how_long_an_answer_waits_to_be_gone_on_with() -> None:
    active = Active(policy=Policy.parse(POLICY), version=1, revision=1)

    def asked(lane: str, endpoint: str = "/v1/chat/completions") -> int | None:
        return continuing.within_ms(active, JobRecord(id="j", lane=lane, endpoint=endpoint))

    assert [asked(lane) for lane in ("a", "a.batch", "quick", "b", "c", "gone")] == [700, 700, 40, 25_000, None, None]
    assert asked("a", "/v1/completions") == 700
    assert asked("b", "/v1/completions") is None, "an Ollama puts a template around it"


def test_no_answer_goes_on_with_a_remote_model() -> None:
    """No policy says so, but one that changes meanwhile may find an answer begun."""
    policy = Policy.parse(POLICY)
    policy.models["a"] = policy.models["a"].model_copy(update={"trust": "remote"})
    active = Active(policy=policy, version=1, revision=1)
    assert continuing.within_ms(active, JobRecord(id="j", lane="a")) is None
