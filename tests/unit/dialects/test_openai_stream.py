"""Reading runtimes' chat streams: what the client gets, and what we know when they end."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.dialects import json_splice, openai, sse
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.runtime_streams import BADLY_ENDED, GOLDEN, WELL_ENDED, event, llama, ollama, vllm

EVERY_STREAM = WELL_ENDED | BADLY_ENDED


def reader(*, include_usage: bool = True, n: int = 1, served_as: str = "deep-coder") -> openai.ChatReader:
    return openai.ChatReader(served_as, include_usage, n)


def read(stream: bytes, *, step: int = 0, **settings: Any) -> tuple[bytes, openai.ChatReader]:
    """Feeds a stream in pieces of `step` bytes and takes after each one."""
    chat = reader(**settings)
    taken = b""
    for start in range(0, len(stream), step or len(stream) or 1):
        chat.feed(stream[start : start + (step or len(stream))])
        taken += chat.take()
    chat.end()
    return taken + chat.take(), chat


def outcome(chat: openai.ChatReader) -> tuple[object, ...]:
    return chat.succeeded, chat.error, chat.finish_reasons, chat.usage, chat.timings, chat.has_content


def chunks(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.split(b"\n\n") if line.startswith(b"data: {")]


def n_of(case: str) -> int:
    return 2 if case == "two_choices" else 1


@pytest.mark.parametrize("case", [case for case in WELL_ENDED if case != "two_choices"])
def test_a_good_stream_reaches_the_client_with_nothing_changed_but_the_model(case: str) -> None:
    stream = WELL_ENDED[case]
    taken, chat = read(stream, n=n_of(case))
    expected = b"".join(
        b"data: " + json_splice.splice(part[6:], {"model": "deep-coder"}) + b"\n\n"
        for part in stream.split(b"\n\n")
        if part.startswith(b"data: {")
    )
    assert taken == expected
    assert chat.succeeded and chat.error is None
    assert b"[DONE]" not in taken


@pytest.mark.parametrize("case", EVERY_STREAM)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 251, 1000])
def test_the_split_of_the_bytes_changes_nothing(case: str, step: int) -> None:
    whole, chat = read(EVERY_STREAM[case], n=n_of(case), include_usage=False)
    pieces, other = read(EVERY_STREAM[case], n=n_of(case), include_usage=False, step=step)
    assert pieces == whole
    assert outcome(other) == outcome(chat)


PARTS = [
    ollama({"content": "x"}),
    ollama({"content": 'ü\u2028 "model":"qwen2.5-coder:32b" \\'}),
    ollama({"content": ""}),
    ollama({"reasoning": "hm", "content": ""}),
    ollama({"content": "end"}, "stop"),
    llama({"content": "y"}),
    llama({"content": "z"}, provider={"model": "tiny", "finish_reason": None}),
    llama({}, "stop"),
    llama({"content": "e"}, error={"message": "late"}),
    b'data: {"provider":{"model":"tiny"},' + llama({"content": "r"})[7:],
    vllm({"content": "s"}, "stop"),
    llama({"content": "t"}, timings={"cache_n": 1, "prompt_n": 2, "predicted_n": 3}),
    llama({"content": "u"}, usage={"prompt_tokens": 3, "completion_tokens": 4}),
    llama({"content": "0"}, usage=None),
    llama({"role": "assistant", "content": None}, prompt_progress={"processed": 1, "total": 2}),
    event({"model": "tiny", "choices": [{"index": 0, "delta": {"content": "w"}, "finish_reason": None}]}, spaced=True),
    streams.usage_chunk("qwen2.5-coder:32b"),
    event({"object": "other", "model": "tiny"}),
    event({"model": "tiny", "choices": [{"delta": {"content": "error"}, "finish_reason": None}], "error": None}),
    event({"error": {"message": "boom", "type": "server_error"}}),
    b'data:{"choices":[{"delta":{"content":"n"},"finish_reason":null}],"model":"tiny"}\n\n',
    b'data: {"choices":[{"delta":{"content":"p"},\ndata: "finish_reason":null}],"model":"tiny"}\n\n',
    b'event: message\ndata: {"choices":[{"delta":{"content":"q"},"finish_reason":null}],"model":"tiny"} \n\n',
    b'data: {"choices":[{"delta":{"content":"i"},"p":[-Infinity],"finish_reason":null}],"model":"tiny"}\n\n',
    b": ping\n\n",
    b"\n",
    b"id: 7\nretry: 5\n\n",
    b"proxy error: gone\n\n",
    b"data: {broken\n\n",
    b"data: [DONE]\n\n",
]
parts = st.sampled_from(PARTS)


@pytest.mark.parametrize("runtime", [ollama, llama, vllm])
def test_the_byte_check_and_the_parser_agree_on_every_pair_of_events(runtime: Any) -> None:
    """A running stream takes both events in one look; read byte by byte, each is judged alone."""
    for first, second in itertools.product(PARTS, repeat=2):
        blob = runtime({"content": "warm"}) + first + second
        together = reader(include_usage=False)
        together.feed(runtime({"content": "warm"}))
        taken = together.take()
        together.feed(first + second)
        together.end()
        taken += together.take()
        alone, single = read(blob, include_usage=False, step=1)
        assert taken == alone, (first, second)
        assert outcome(together) == outcome(single), (first, second)


@given(
    sent=st.lists(parts, max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    lines=st.sampled_from([b"\n", b"\r\n", b"\r"]),
)
@settings(max_examples=250, deadline=None)
def test_any_mix_of_events_reads_the_same_however_it_is_split(sent: list[bytes], cuts: list[int], lines: bytes) -> None:
    """The byte check and the parser must agree on every event, or the split would show."""
    plain = b"".join(sent)
    stream = plain.replace(b"\n", lines)
    whole, chat = read(plain, include_usage=False)
    one_by_one, single = read(stream, include_usage=False, step=1)
    split = reader(include_usage=False)
    taken = b""
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
        split.feed(stream[start:end])
        taken += split.take()
    split.end()
    taken += split.take()
    assert whole == one_by_one == taken
    assert outcome(chat) == outcome(single) == outcome(split)


@given(st.lists(st.binary(max_size=80) | parts, max_size=8))
@settings(max_examples=150, deadline=None)
def test_no_bytes_can_raise(pieces: list[bytes]) -> None:
    chat = reader()
    for piece in pieces:
        chat.feed(piece)
        chat.take()
    chat.end()
    assert chat.succeeded is (chat.error is None)


def test_nothing_comes_out_before_the_first_content() -> None:
    """A job that fails or is promoted before its first token must leave no frame behind."""
    chat = reader()
    chat.feed(llama({"role": "assistant", "content": None}) + b":\n\n" + llama({"content": ""}))
    assert chat.take() == b"" and not chat.has_content
    chat.feed(llama({"content": "x"}))
    assert [c["choices"][0]["delta"] for c in chunks(chat.take())] == [
        {"role": "assistant", "content": None},
        {"content": ""},
        {"content": "x"},
    ]
    assert chat.take() == b""


def test_progress_of_the_prompt_is_no_first_token_and_no_clients_business() -> None:
    """We ask llama-server for it; each chunk of it repeats the role."""
    role = {"role": "assistant", "content": None}
    figures = [{"total": 1337, "cache": 0, "processed": done, "time_ms": done} for done in (0, 256, 1337)]
    chat = reader()
    for figure in figures:
        chat.feed(llama(role, prompt_progress=figure))
        assert not chat.has_content and chat.prompt_read == (figure["processed"], 1337)
    chat.feed(llama(role) + llama({"content": "x"}) + llama({}, "stop"))
    told = chunks(chat.take())
    assert [c["choices"][0]["delta"] for c in told] == [role, {"content": "x"}, {}]
    assert not any("prompt_progress" in c for c in told)
    chat = reader()
    chat.feed(llama(role, prompt_progress={"total": "many"}))
    assert chat.prompt_read is None


def test_the_second_choice_tells_no_progress_either() -> None:
    """It is made behind the first, whose text the client has by then."""
    first, second = llama({"content": "a"}) + llama({}, "stop"), llama({"content": "b"}) + llama({}, "stop")
    progress = llama({"role": "assistant", "content": None}, prompt_progress={"total": 9, "processed": 3})
    second, progress = (part.replace(b'"index":0', b'"index":1') for part in (second, progress))
    taken, chat = read(first + progress + second, n=2)
    assert chat.succeeded and chat.prompt_read == (3, 9)
    assert taken == read(first + second, n=2)[0]


def test_a_failure_before_the_first_content_leaves_nothing() -> None:
    taken, chat = read(llama({"role": "assistant", "content": None}) + event({"error": {"message": "out of memory"}}))
    assert taken == b"" and chat.error == "out of memory" and not chat.succeeded


@pytest.mark.parametrize(
    "delta",
    [
        {"content": " "},
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"thinking": "a"},
        {"refusal": "no"},
        {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f"}},
    ],
)
def test_every_kind_of_content_is_a_first_token(delta: dict[str, Any]) -> None:
    chat = reader()
    chat.feed(llama({"role": "assistant", "content": None, "tool_calls": []}))
    assert not chat.has_content
    chat.feed(llama(delta))
    assert chat.has_content and chat.take()


def test_a_generation_without_content_is_a_success() -> None:
    taken, chat = read(streams.recorded("empty"))
    assert chat.succeeded and not chat.has_content
    assert chunks(taken)[1]["choices"][0]["finish_reason"] == "stop"
    chat = reader()
    chat.feed(llama({"role": "assistant", "content": None}) + llama({}, "stop"))
    assert chat.take() == b""  # an error may still follow, and then the job may start again
    chat.end()
    assert len(chunks(chat.take())) == 2


def test_text_that_looks_like_our_byte_checks_is_left_alone() -> None:
    """The model may write any JSON as text; only bare quotes make a key."""
    said = '{"model":"tiny","finish_reason":"stop","error":{},"usage":{"a":1}}'
    many = llama({"content": "a"}) + llama({"content": said}) * 3 + llama({"content": "model"}) + llama({}, "stop")
    taken, chat = read(many)
    got = chunks(taken)
    assert [c["choices"][0]["delta"].get("content") for c in got] == ["a", said, said, said, "model", None]
    assert {c["model"] for c in got} == {"deep-coder"}
    assert chat.succeeded


def test_a_nested_model_name_is_not_ours() -> None:
    """The count of names in a blob gives it away, and the event is cut by the parser instead."""
    stream = llama({"content": "a"}) + llama({"content": "b"}, provider={"model": "tiny"}) * 2 + llama({}, "stop")
    taken, _ = read(stream)
    assert [(c["model"], c.get("provider")) for c in chunks(taken)][1] == ("deep-coder", {"model": "tiny"})
    first = b'data: {"provider":{"model":"tiny"},' + llama({"content": "b"})[7:]
    got = chunks(read(first * 2)[0])
    assert [(c["model"], c["provider"]) for c in got] == [("deep-coder", {"model": "tiny"})] * 2


def test_an_event_in_several_lines_leaves_in_one() -> None:
    chunk = json.dumps(json.loads(llama({"content": "a"})[6:]), indent=1).encode()
    stream = b"event: message\n" + b"".join(b"data:" + line + b"\n" for line in chunk.split(b"\n")) + b"\n"
    taken, _ = read(stream * 2)
    assert taken.count(b"\n") == 4 and taken.startswith(b"data: {")
    assert [c["choices"][0]["delta"]["content"] for c in chunks(taken)] == ["a", "a"]


def test_an_end_beside_running_text_is_not_overlooked() -> None:
    """A blob may hold as many open finish reasons as events, and yet one of its events is the end."""
    running = llama({"content": "b"}, provider={"finish_reason": None})
    chat = reader()
    chat.feed(llama({"content": "a"}))
    chat.feed(running + llama({}, "stop"))
    assert chat.finish_reasons == {0: "stop"}
    chat.feed(llama({"content": "c"}, error={"message": "late"}))
    assert chat.error == "late"


def test_a_runtime_that_names_no_model_gets_ours_added() -> None:
    chunk = event({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
    taken, _ = read(chunk * 2)
    assert [c["model"] for c in chunks(taken)] == ["deep-coder"] * 2


def test_a_name_with_awkward_characters_survives_both_ways() -> None:
    chunk = event({"model": 'a"\\ü', "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
    taken, _ = read(chunk * 3, served_as='b"\\é')
    assert [c["model"] for c in chunks(taken)] == ['b"\\é'] * 3


def test_the_usage_chunk_is_hidden_from_those_who_did_not_ask() -> None:
    for case in ("usage", "logprobs", "unicode", "empty"):
        shown, _ = read(streams.recorded(case), include_usage=True)
        hidden, chat = read(streams.recorded(case), include_usage=False)
        assert chunks(shown)[-1]["choices"] == [] and chunks(hidden) == chunks(shown)[:-1]
        assert chat.usage and chat.usage.keys() == {"prompt_tokens", "completion_tokens", "cached_tokens"}


def test_cached_tokens_are_found_in_either_place() -> None:
    _, told = read(streams.OLLAMA_TOOLS)
    assert told.usage == {"prompt_tokens": 31, "completion_tokens": 7, "cached_tokens": 24}
    _, timed = read(streams.LLAMA_TOOLS)
    assert timed.usage == {"prompt_tokens": 100, "completion_tokens": 21, "cached_tokens": 90}
    assert timed.timings == {"cache_n": 90, "prompt_n": 10, "predicted_n": 21}
    both = llama({"content": "a"}, "stop") + llama({}, usage={"prompt_tokens": 9}, choices=[], timings={"cache_n": 4})
    assert read(both)[1].usage == {"prompt_tokens": 9, "cached_tokens": 4}


def test_timings_are_those_of_the_end() -> None:
    """A server may send them with every token; after a loss they must not pass for the whole."""
    running = llama({"content": "a"}, timings={"cache_n": 0, "prompt_n": 5, "predicted_n": 1})
    assert read(running * 2)[1].timings is None
    assert read(streams.recorded("timings"))[1].usage == {
        "prompt_tokens": 53,
        "completion_tokens": 5,
        "cached_tokens": 0,
    }


def test_usage_told_along_the_way_is_kept() -> None:
    """vLLM's continuous usage is all that is known of a generation that broke off."""
    figures = {"prompt_tokens": 3, "completion_tokens": 4}
    _, chat = read(llama({"content": "a"}) + llama({"content": "b"}, usage=figures))
    assert chat.usage == figures


def test_an_error_in_the_stream_counts_although_done_follows() -> None:
    taken, chat = read(streams.VLLM_ERROR_THEN_DONE)
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks(taken)) == "Half an answer"
    assert chat.error == "EngineCore died" and not chat.succeeded
    assert chat.complaint == openai.RuntimeComplaint("EngineCore died", "InternalServerError", 500)


def test_a_stream_that_just_stops_has_failed() -> None:
    """Every SDK takes a silent end for success, so we must not."""
    taken, chat = read(streams.OLLAMA_SILENT_END + streams.DONE)
    assert len(chunks(taken)) == 2 and not chat.succeeded
    assert chat.error == "the runtime ended the stream without a finish reason"


def test_a_proxy_s_last_words_are_the_error() -> None:
    taken, chat = read(streams.PROXY_ERROR)
    assert chat.error == "proxy error: Failed to read connection"
    assert chunks(taken)[-1]["choices"][0]["delta"] == {"content": "Half"}
    inside = llama({"content": "a"}) + b'data: {"choices":[{"finproxy error: Failed to read connection'
    assert read(inside)[1].error == "the runtime sent an event that is not a JSON object"


@pytest.mark.parametrize(
    ("body", "message", "kind"),
    [
        (b'{"error":"model \'x\' not found"}', "model 'x' not found", ""),
        (
            b'{\n  "error": {\n "message": "Loading model", "type": "unavailable_error", "code": 503}\n}\n',
            "Loading model",
            "unavailable_error",
        ),
        (b'{"object":"error","message":"bad","type":"BadRequestError","code":400}', "bad", "BadRequestError"),
        (b'error: {"code":500,"message":"old llama","type":"server_error"}\n\n', "old llama", "server_error"),
        (b'event: error\ndata: {"message":"named"}\n\n', "named", ""),
        (b"Bad Gateway", "Bad Gateway", ""),
    ],
)
def test_an_error_that_is_no_event_is_still_read(body: bytes, message: str, kind: str) -> None:
    taken, chat = read(body)
    assert taken == b"" and chat.error == message
    assert chat.complaint and chat.complaint.kind == kind


@pytest.mark.parametrize(
    ("message", "gone"),
    [
        ("model 'qwen:7b' not found", True),
        ('model "qwen:7b" not found, try pulling it first', True),
        ("The model `Qwen/Qwen3` does not exist.", True),
        ("model is not loaded", True),
        ("this model does not support images", False),
        ("the chat template of the model was not found to support tools", False),
        ("tool 'model' was not found", False),
    ],
)
def test_a_runtime_without_the_model_is_recognised(message: str, gone: bool) -> None:
    assert openai.RuntimeComplaint(message, "", 404).model_gone is gone


def test_a_context_overflow_is_recognised() -> None:
    complaint = openai.read_complaint((GOLDEN / "overflow.error.json").read_bytes())
    assert complaint.context_overflow and complaint.status == 400
    assert complaint.kind == "exceed_context_size_error"
    assert openai.read_complaint(
        b'{"error":{"message":"This model\'s maximum context length is 4 tokens"}}'
    ).context_overflow
    assert not openai.read_complaint(b'{"error":{"message":"out of memory","code":"oom"}}').context_overflow
    assert len(openai.read_complaint(b"prompt " * 9999).message) <= 300


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_finish_reason_that_tells_of_failure_is_one(reason: str) -> None:
    _, chat = read(vllm({"content": "a"}) + vllm({}, reason))
    assert not chat.succeeded and chat.error and reason in chat.error


def test_every_choice_must_finish() -> None:
    _, chat = read(streams.recorded("two_choices"), n=2)
    assert chat.succeeded and chat.finish_reasons == {0: "length", 1: "length"}
    events = streams.recorded("two_choices").split(b"\n\n")
    cut = b"\n\n".join(part for part in events if b'"length","index":0' not in part)
    _, half = read(cut, n=2)
    assert half.finish_reasons == {1: "length"} and not half.succeeded


def test_a_choice_that_has_not_begun_is_waited_for() -> None:
    """A runtime may make them one after the other; the end of the first is not the end of the answer."""
    first, second = llama({"content": "a"}) + llama({}, "stop"), _second({"content": "b"}) + _second({}, "stop")
    chat = reader(n=2)
    chat.feed(first)
    assert chat.has_content and not chat.succeeded
    chat.feed(second)
    assert chat.succeeded
    assert not read(first, n=2)[1].succeeded  # the connection broke between the two


def test_a_runtime_that_makes_one_choice_only_says_so_itself() -> None:
    """Ollama ignores `n`."""
    _, chat = read(ollama({"content": "a"}, "stop") + streams.DONE, n=2)
    assert chat.succeeded and chat.finish_reasons == {0: "stop"}


def test_the_usage_of_several_choices_is_told_once_and_at_the_end() -> None:
    """llama.cpp tells that of each choice when it ends, in the middle of the others; clients keep the last."""
    stream = streams.recorded("two_choices")
    taken, chat = read(stream, n=2)
    *parts, last = chunks(taken)
    assert all(part["choices"] for part in parts) and last["choices"] == [] and last["model"] == "deep-coder"
    assert [(part["choices"][0]["index"], part["choices"][0]["delta"].get("content")) for part in parts] == [
        (part["choices"][0]["index"], part["choices"][0]["delta"].get("content"))
        for part in chunks(stream)
        if part["choices"]
    ]
    assert last["usage"] == {
        "prompt_tokens": 53,
        "completion_tokens": 12,
        "total_tokens": 65,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert chat.usage == {"prompt_tokens": 53, "completion_tokens": 12, "cached_tokens": 0}
    quiet, counted = read(stream, n=2, include_usage=False)
    assert chunks(quiet) == parts and counted.usage == chat.usage


def test_one_usage_of_all_choices_is_left_as_it_is() -> None:
    """vLLM's, which counts all of them already."""
    choices = vllm({"content": "a"}, "stop") + _second({"content": "b"}, "stop")
    taken, chat = read(choices + streams.usage_chunk("Qwen/Qwen3") + streams.DONE, n=2)
    assert taken.endswith(streams.usage_chunk("deep-coder"))
    assert chat.usage == {"prompt_tokens": 31, "completion_tokens": 7, "cached_tokens": 24}


def _second(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return llama({}, choices=[{"finish_reason": finish, "index": 1, "delta": delta}])


def test_a_last_event_without_its_blank_line_still_counts() -> None:
    taken, chat = read((llama({"content": "a"}) + llama({}, "stop"))[:-2])
    assert chat.succeeded and len(chunks(taken)) == 2


def test_an_event_over_the_limit_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 2000)
    short, long = llama({"content": "a"}), llama({"content": "b" * 2000})
    for step in (0, 1, 100):
        chat = openai.ChatReader("m", include_usage=False)
        chat._cutter = sse.EventCutter(max_event_bytes=2000)
        stream = short * 10 + long + short
        for start in range(0, len(stream), step or len(stream)):
            chat.feed(stream[start : start + (step or len(stream))])
        assert chat.error == "the runtime sent an event that is too long"
        assert len(chunks(chat.take())) == 10


def test_endless_empty_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 2000)
    _, chat = read(llama({"content": ""}) * 20, step=100)
    assert chat.error == "the runtime sent too much before its first content"
