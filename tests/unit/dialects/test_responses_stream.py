"""Runtimes' chat streams as Responses events: in order, counted from 0, and with nothing lost."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.dialects.responses import responses_reader
from broker.dialects.responses_object import created_s
from broker.dialects.responses_stream import ResponsesReader, fold_responses
from broker.dialects.responses_voice import ResponsesVoice, failure_code
from tests.unit.dialects.runtime_streams import (
    BADLY_ENDED,
    GOLDEN,
    LLAMA_TOOLS,
    OLLAMA_REASONING,
    OLLAMA_TOOLS,
    VLLM_REASONING,
    WELL_ENDED,
    call,
    llama,
    recorded,
)

JOB = "01KB5ZK4W80000000000000000"
TOOLS = [
    {"type": "function", "name": "read", "parameters": {"type": "object"}},
    {"type": "function", "name": "list"},
    {"type": "custom", "name": "apply_patch"},
    {"type": "namespace", "name": "mcp__git__", "tools": [{"type": "function", "name": "log"}]},
]
EVENTS = GOLDEN.parent / "responses"
HANDMADE = {
    "custom": llama(call(0, id="c9", name="apply_patch", arguments='{"input":'))
    + llama(call(0, arguments='"*** \\"Begin\\""}'))
    + llama({}, "tool_calls"),
    "namespace": llama(call(0, id="c9", name="mcp__git__log", arguments="{}")) + llama({}, "tool_calls"),
    "words_then_call": llama({"content": "I look."})
    + llama(call(0, id="c1", name="read", arguments="{}"))
    + llama({}, "tool_calls"),
    "mixed_calls": llama(call(0, id="c1", name="read", arguments='{"a"'))
    + llama(call(1, id="c2", name="list", arguments='{"b"'))
    + llama(call(0, arguments=":1}"))
    + llama(call(1, arguments=":2}"))
    + llama({}, "tool_calls"),
    "refusal": llama({"refusal": "I will not."}) + llama({}, "stop"),
    "thoughts_cut_short": llama({"reasoning_content": "Let me"}) + llama({}, "length"),
}
GOOD = WELL_ENDED | HANDMADE


def reader(**fields: Any) -> ResponsesReader:
    body = json.dumps({"model": "m", "input": "Hello", "tools": TOOLS} | fields).encode()
    return responses_reader(body, served_as="deep-coder", job_id=JOB)


def read(stream: bytes, *cuts: int, **fields: Any) -> tuple[bytes, ResponsesReader]:
    """Feeds a stream cut at some offsets and takes after each piece."""
    made = reader(**fields)
    taken = b""
    places = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(places):
        made.feed(stream[start:end])
        taken += made.take()
    made.end()
    return taken + made.take(), made


def events(stream: bytes) -> list[dict[str, Any]]:
    found = []
    for piece in stream.split(b"\n\n"):
        if piece:
            name, data = (line for line in piece.split(b"\n") if not line.startswith(b":"))
            found.append(json.loads(data.removeprefix(b"data: ")))
            assert name == b"event: " + found[-1]["type"].encode()
    return found


def kinds(stream: bytes) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events(stream)]


@pytest.mark.parametrize("case", sorted(GOOD))
def test_every_event_is_counted_and_the_pieces_make_the_whole(case: str) -> None:
    """Clients put the answer together from the pieces, or take the last object: both must say the same."""
    stream, made = read(GOOD[case])
    assert made.succeeded and made.complaint is None
    found = events(stream)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    final = found[-1]
    assert final["type"] in ("response.completed", "response.incomplete")
    assert final["response"] == fold_responses(stream)
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    indexes = [event["output_index"] for event in found if event["type"] == "response.output_item.added"]
    assert indexes == list(range(len(done)))
    assert sorted(done, key=lambda item: int(item["id"].rsplit("_", 1)[1])) == final["response"]["output"]
    pieces: dict[int, str] = {}
    for event in found:
        if event["type"].endswith(".delta"):
            pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(final["response"]["output"]):
        assert pieces.get(index, "") == said(item)


def said(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    if item["type"] == "custom_tool_call":
        return str(item["input"])
    parts = item.get("content") or item["summary"]
    return "".join(part.get("text") or part.get("refusal") for part in parts)


@given(case=st.sampled_from(sorted(GOOD | BADLY_ENDED)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_however_the_bytes_are_split_the_events_are_the_same(case: str, data: st.DataObject) -> None:
    stream = (GOOD | BADLY_ENDED)[case]
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    split, one = read(stream, *cuts), read(stream)
    assert split[0] == one[0]
    assert (split[1].succeeded, split[1].error, split[1].usage) == (one[1].succeeded, one[1].error, one[1].usage)


@given(
    deltas=st.lists(
        st.one_of(
            st.builds(lambda text: {"content": text}, st.text(max_size=8)),
            st.builds(lambda text: {"reasoning_content": text}, st.text(max_size=8)),
            st.builds(lambda at, text: call(at, arguments=text), st.integers(0, 2), st.text(max_size=8)),
        ),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_no_text_thought_or_call_is_lost_in_any_order(deltas: list[dict[str, Any]]) -> None:
    """However a model mixes them, all that it said is in the answer."""
    named = [call(at, id=f"c{at}", name="read", arguments="") for at in range(3)]
    stream = b"".join(llama(delta) for delta in [*named, *deltas]) + llama({}, "stop")
    output = fold_responses(read(stream)[0])["output"]
    for kind, key in (("message", "content"), ("reasoning", "reasoning_content")):
        told = "".join(said(item) for item in output if item["type"] == kind)
        assert told == "".join(delta.get(key, "") for delta in deltas)
    for at in range(3):
        expected = "".join(
            fragment["function"]["arguments"]
            for delta in deltas
            for fragment in delta.get("tool_calls", ())
            if fragment["index"] == at
        )
        expected += "" if expected.strip() else "{}"
        assert [item["arguments"] for item in output if item.get("call_id") == f"c{at}"] == [expected]


@pytest.mark.parametrize("case", sorted(BADLY_ENDED))
def test_an_answer_that_breaks_off_is_never_called_finished(case: str) -> None:
    stream, made = read(BADLY_ENDED[case])
    assert not made.succeeded and made.error
    assert not {"completed", "incomplete", "failed"} & set(kinds(stream))
    with pytest.raises(ValueError, match="no end"):
        fold_responses(stream)


def test_nothing_comes_out_before_the_first_content() -> None:
    """A generation that fails early must be able to start again elsewhere."""
    made = reader()
    made.feed(llama({"role": "assistant", "content": None}))
    assert (made.take(), made.has_content) == (b"", False)
    made.feed(llama({"reasoning_content": "Hm"}))
    assert made.has_content and made.take().startswith(b"event: response.created\n")


def test_what_is_no_json_in_the_middle_of_an_answer_is_a_failure() -> None:
    good = llama({"content": "a"})
    bad = good.replace(b'{"content":"a"}', b'{"content":a}')
    _, made = read(good + good + bad + llama({}, "stop"))
    assert not made.succeeded and made.error == "the runtime sent an event that cannot be read"


def test_calls_keep_the_clients_names_and_kinds() -> None:
    [custom] = fold_responses(read(HANDMADE["custom"])[0])["output"]
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "apply_patch", '*** "Begin"')
    [spaced] = fold_responses(read(HANDMADE["namespace"])[0])["output"]
    assert (spaced["name"], spaced["namespace"]) == ("log", "mcp__git__")
    both = fold_responses(read(OLLAMA_TOOLS)[0])["output"]
    assert [(item["name"], item["call_id"]) for item in both] == [("read", "call_a"), ("list", "call_b")]
    one, two = fold_responses(read(LLAMA_TOOLS)[0])["output"]
    assert json.loads(one["arguments"]) == {"path": 'a "b".py'} and two["arguments"] == "{}"


@pytest.mark.parametrize(("reason", "told"), [("tool_calls", "{}"), ("length", "")])
def test_a_call_without_arguments_has_none_in_so_many_words(reason: str, told: str) -> None:
    """Clients parse them as JSON; a call that was cut off may end anywhere."""
    stream, _ = read(llama(call(0, id="c1", name="now", arguments="")) + llama({}, reason))
    deltas = [event["delta"] for event in events(stream) if event["type"].endswith("arguments.delta")]
    (done,) = (event["arguments"] for event in events(stream) if event["type"].endswith("arguments.done"))
    (item,) = fold_responses(stream)["output"]
    assert "".join(deltas) == done == item["arguments"] == told


def test_arguments_that_come_before_their_name_are_not_lost() -> None:
    late = llama(call(0, id="c1", arguments='{"a"')) + llama(call(0, name="read", arguments=":1}"))
    stream, _ = read(late + llama({}, "tool_calls"))
    deltas = [event["delta"] for event in events(stream) if event["type"].endswith("arguments.delta")]
    [item] = fold_responses(stream)["output"]
    assert "".join(deltas) == item["arguments"] == '{"a":1}' and item["name"] == "read"


def test_a_choice_that_nobody_asked_for_is_not_mixed_in() -> None:
    both = json.loads(llama({"content": "other"})[6:])
    both["choices"][0]["index"] = 1
    stream, _ = read(llama({"content": "one"}) + b"data: " + json.dumps(both).encode() + b"\n\n" + llama({}, "stop"))
    assert "other" not in stream.decode()


def test_thoughts_are_told_as_a_summary_where_the_client_asked_for_one() -> None:
    """Codex and the AI SDK show summaries only."""
    [thought, _] = fold_responses(read(VLLM_REASONING)[0])["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm."}] and thought["summary"] == []
    stream, _ = read(VLLM_REASONING, reasoning={"summary": "auto"})
    [thought, _] = fold_responses(stream)["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "Hmm."}]
    assert "reasoning_summary_text.delta" in kinds(stream) and "reasoning_text.delta" not in kinds(stream)


def test_the_object_tells_usage_and_why_it_was_cut_short() -> None:
    whole = fold_responses(read(OLLAMA_REASONING, metadata={"a": "b"})[0])
    assert whole["usage"] == {
        "input_tokens": 31,
        "input_tokens_details": {"cached_tokens": 24},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 38,
    }
    assert (whole["id"], whole["model"], whole["store"]) == (f"resp_{JOB}", "deep-coder", False)
    assert (whole["status"], whole["metadata"]) == ("completed", {"a": "b"})
    cut = fold_responses(read(recorded("length"))[0])
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["output"][0]["status"] == "incomplete"


def test_the_time_of_a_response_is_in_its_id() -> None:
    assert created_s("01ARZ3NDEKTSV4RRFFQ69G5FAV") == 1469922850
    assert created_s("batch_01ARZ3NDEKTSV4RRFFQ69G5FAV-1700") == 1469922850
    assert created_s("job-1") == 0


@pytest.mark.parametrize("case", ["llama_tools", "vllm_reasoning", "custom", "json_schema", "empty"])
def test_the_events_are_those_of_the_golden_file(case: str) -> None:
    """A change of a single byte of what clients see is seen here."""
    assert read(GOOD[case])[0] == (EVENTS / f"{case}.sse").read_bytes()


def voice() -> ResponsesVoice:
    return ResponsesVoice(b'{"model":"fast-edit"}', job_id=JOB, model="fast-edit")


def test_a_stream_without_a_wait_passes_untouched() -> None:
    stream, _ = read(VLLM_REASONING)
    assert voice().passing(stream) == stream


@given(beats=st.lists(st.integers(0, 3), min_size=1, max_size=8), case=st.sampled_from(sorted(GOOD)))
@settings(max_examples=100, deadline=None)
def test_numbers_go_on_across_heartbeats_and_the_end(beats: list[int], case: str) -> None:
    """One count from 0 and one opening, wherever the gateway said that the client still waits."""
    whole, _ = read(GOOD[case])
    # A worker writes its opening together with the first content, so the first part is three events.
    parts = [piece + b"\n\n" for piece in whole.split(b"\n\n") if piece]
    parts = [b"".join(parts[:3]), *parts[3:]]
    speaker, sent = voice(), b""
    for index, part in enumerate(parts):
        for _ in range(beats[index] if index < len(beats) else 0):
            sent += speaker.heartbeat("behind 2\nothers")
        sent += speaker.passing(part)
    sent += speaker.failed("worker_lost", "gone", status=503, retry_after_s=1)
    found = events(sent)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found].count("response.created") == 1
    assert found[0]["type"] == "response.created" and found[-1]["type"] == "response.failed"
    own = [event for event in found if "progress" not in event["type"] and event["type"] != "response.created"][:-1]
    assert [event | {"sequence_number": 0} for event in own] == [
        event | {"sequence_number": 0} for event in events(whole)[2:]
    ]


def test_text_that_looks_like_a_number_is_not_counted() -> None:
    stream, _ = read(llama({"content": '\ndata: {"type":"x","sequence_number":99'}) + llama({}, "stop"))
    speaker = voice()
    sent = speaker.heartbeat("behind 2\nothers") + speaker.passing(stream)
    assert events(sent)[-1]["response"]["output"][0]["content"][0]["text"].endswith('"sequence_number":99')


def test_a_failure_says_what_codex_acts_upon() -> None:
    """Codex waits as long as the message says, and repeats only what a repeat can cure."""
    [_, _, failed] = events(voice().failed("lane_full", "the lane is full", status=503, retry_after_s=7))
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {
        "code": "rate_limit_exceeded",
        "message": "the lane is full (try again in 7s)",
        "reason": "lane_full",
    }
    assert failure_code("context_length_exceeded", 400, None) == "context_length_exceeded"
    assert failure_code("cancelled", 499, None) == "invalid_prompt"
    assert failure_code("runtime_failed", 502, None) == "server_error"


# --- runs of text ------------------------------------------------------------------------------------------------

ODD = [
    llama({"content": "a"}, "stop"),
    llama({"content": "b", "refusal": "c"}),
    llama({"content": "d", "reasoning_content": "e"}),
    llama({"content": None, "reasoning": "f"}),
    llama({"content": {"text": "no string"}}),
    llama({"content": "g"}, usage={"completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 1}}),
    llama({"content": "h"}, choices=[{"finish_reason": None, "index": 1, "delta": {"content": "i"}}]),
    llama({"content": 'j","content":"k'}),
    llama({"content": "l"}, extra={"content": "m"}),
    llama(call(0, id="c1", name="read", arguments="{}")),
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content": "n"}}],"model":"tiny"}\n\n',
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"o" }}],"model":"tiny"}\n\n',
    llama({"content": "p"}).replace(b'"p"', b'"p\x01"'),
    llama({"content": "q"}).replace(b'"q"', b'"q\xff"'),
    llama({"content": "r"}).replace(b'"r"', b'"\\u0072\\/\\ud83d"'),
    llama({"content": "s"}).replace(b'"s"', b'"s",7'),
    llama({"content": "t"}).replace(b'"t"', b"12"),
]
WORDS = (
    st.sampled_from(["", " word", "\n", '"', "\\", "\x7f", "größer", "\u2028", "\U0001f642", "}}", '"content":"'])
    | st.text()
)
CHUNKS = st.lists(
    st.builds(lambda text, key: llama({key: text}), WORDS, st.sampled_from(["content", "content", "reasoning_content"]))
    | st.builds(lambda text: llama({"content": text}).replace(json.dumps(text).encode(), _raw(text)), WORDS)
    | st.sampled_from(ODD),
    max_size=12,
)


def _raw(text: str) -> bytes:
    """The string as C++ writes it: nothing escaped that need not be."""
    return json.dumps(text, ensure_ascii=False).encode(errors="replace")


def _twin(beside: str) -> bytes:
    """A chunk with a string of the same name beside the one that counts."""
    delta = '{"index":0,"delta":{"content":"x"},"finish_reason":null}'
    return f'data: {{"beside":{{"content":"{beside}"}},"choices":[{delta}],"model":"tiny"}}\n\n'.encode()


@given(CHUNKS, st.booleans())
@example([_twin("x"), _twin("y")], False)
@settings(max_examples=400, deadline=None)
def test_a_run_of_text_is_told_to_the_byte_as_one_by_one(chunks: list[bytes], summary: bool) -> None:
    """Most strings go over unparsed; whatever only looks alike is read as before."""
    more = {"reasoning": {"summary": "auto"}} if summary else {}
    stream = b"".join(chunks) + llama({}, "stop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResponsesReader, "_learn", lambda *_: None)
        slow, slowly = read(stream, **more)
    fast, reader = read(stream, **more)
    assert fast == slow and (reader.error, reader.usage) == (slowly.error, slowly.usage)
    assert read(stream, *range(0, len(stream), 41), **more)[0] == slow


def test_a_run_of_text_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it cheap: of a thousand chunks the first few are read, and those with something to escape."""
    parsed: list[dict[str, Any]] = []
    real = ResponsesReader._read_chunk

    def counted(self: ResponsesReader, chunk: dict[str, Any]) -> None:
        parsed.append(chunk)
        real(self, chunk)

    monkeypatch.setattr(ResponsesReader, "_read_chunk", counted)
    texts = [" word", "\n", " größer"] * 300
    taken, _ = read(b"".join(llama({"content": text}) for text in texts) + llama({}, "stop"))
    assert len(parsed) <= 3
    assert events(taken)[-1]["response"]["output"][0]["content"][0]["text"] == "".join(texts)
