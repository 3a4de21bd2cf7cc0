"""Reading a generation for a client of the Ollama dialect, from an Ollama and from a chat stream."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.dialects import json_splice, ollama_fold, openai
from broker.dialects.ollama_request import Shape
from broker.dialects.ollama_stream import FromChat, NativeReader
from broker.dialects.sse import MAX_EVENT_BYTES
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.ollama import native_lines as lines
from tests.unit.dialects.runtime_streams import DONE, call, event, llama, ollama, vllm

GOLDEN = Path(__file__).parent / "golden"
AT_NS = 1_790_000_000_123_456_789
CHATS = {case: stream for case, stream in streams.WELL_ENDED.items() if case != "two_choices"}
"""The dialect knows no second choice."""


def from_chat(shape: Shape = "chat", *, waited_ns: int = 0) -> FromChat:
    return FromChat("deep-coder", shape=shape, waited_ns=waited_ns, now_ns=lambda: AT_NS)


def read(reader: Any, stream: bytes, *, step: int = 0) -> bytes:
    """Feeds a stream in pieces of `step` bytes and takes after each one."""
    taken = b""
    for start in range(0, len(stream), step or len(stream) or 1):
        reader.feed(stream[start : start + (step or len(stream))])
        taken += reader.take()
    reader.end()
    return taken + reader.take()


def told(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.split(b"\n") if line.strip()]


def outcome(reader: Any) -> tuple[object, ...]:
    return reader.succeeded, reader.error, reader.usage, reader.timings, reader.has_content


# From an Ollama.


@pytest.mark.parametrize("case", lines.WELL_ENDED)
def test_an_ollamas_lines_reach_the_client_with_nothing_changed_but_the_model(case: str) -> None:
    stream = lines.WELL_ENDED[case]
    reader = NativeReader("deep-coder")
    taken = read(reader, stream)
    expected = b"".join(
        json_splice.splice(line, {"model": "deep-coder"}) + b"\n" for line in stream.split(b"\n") if line.strip()
    )
    assert taken == expected
    assert reader.succeeded and reader.error is None
    assert reader.usage == {"prompt_tokens": 26, "completion_tokens": 298}


@pytest.mark.parametrize("case", lines.WELL_ENDED | lines.BADLY_ENDED)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 251])
def test_the_split_of_an_ollamas_bytes_changes_nothing(case: str, step: int) -> None:
    stream = (lines.WELL_ENDED | lines.BADLY_ENDED)[case]
    whole, pieces = NativeReader("deep-coder"), NativeReader("deep-coder")
    assert read(whole, stream) == read(pieces, stream, step=step)
    assert outcome(whole) == outcome(pieces)


@pytest.mark.parametrize("case", lines.BADLY_ENDED)
def test_an_ollama_that_does_not_say_that_it_is_done_and_why_has_failed(case: str) -> None:
    reader = NativeReader("deep-coder")
    taken = read(reader, lines.BADLY_ENDED[case])
    assert not reader.succeeded and reader.error
    assert b'"done":true' not in taken


def test_the_words_of_an_error_line_are_kept() -> None:
    reader = NativeReader("deep-coder")
    read(reader, lines.BADLY_ENDED["error line"])
    assert reader.error == "an error was encountered while running the model"


def test_an_error_ends_the_reading_at_once() -> None:
    """The runtime may keep the connection open after it."""
    reader = NativeReader("deep-coder")
    reader.feed(lines.BADLY_ENDED["error line"])
    assert reader.complaint is not None and not reader.succeeded


def test_an_error_after_done_is_an_error() -> None:
    reader = NativeReader("deep-coder")
    taken = read(reader, lines.WELL_ENDED["text"] + lines.native({"error": "late"}))
    assert reader.error == "late" and not reader.succeeded
    assert b'"done":true' not in taken


def test_nothing_follows_done() -> None:
    reader = NativeReader("deep-coder")
    taken = read(reader, lines.WELL_ENDED["text"] + lines.chat({"content": "late"}) + lines.chat_end())
    assert taken == read(NativeReader("deep-coder"), lines.WELL_ENDED["text"]) and reader.succeeded


def test_nothing_comes_out_before_the_first_content() -> None:
    reader = NativeReader("deep-coder")
    reader.feed(lines.chat({}) * 3)
    assert reader.take() == b"" and not reader.has_content
    reader.feed(lines.chat({"thinking": "a"}))
    assert len(told(reader.take())) == 4 and reader.has_content


@pytest.mark.parametrize("message", [{"content": "a"}, {"thinking": "a"}, {"tool_calls": [lines.TOOL_CALL]}])
def test_text_thinking_and_calls_of_an_ollama_are_content(message: dict[str, Any]) -> None:
    reader = NativeReader("deep-coder")
    reader.feed(lines.chat(message))
    assert reader.has_content


def test_a_line_without_an_end_does_not_fill_the_memory() -> None:
    reader = NativeReader("deep-coder")
    for _ in range(9):
        reader.feed(b"x" * (1 << 20))
    assert reader.error == "the runtime sent a line that is too long"


def test_endless_lines_without_content_do_not_fill_the_memory() -> None:
    reader = NativeReader("deep-coder")
    empty = lines.chat({"role": "assistant" + " " * 100_000})
    for _ in range(MAX_EVENT_BYTES // len(empty) + 2):
        reader.feed(empty)
    assert reader.error == "the runtime sent too much before its first content"


messages = st.one_of(
    st.fixed_dictionaries({"content": st.text(max_size=12)}),
    st.fixed_dictionaries({"thinking": st.text(max_size=12)}),
    st.fixed_dictionaries(
        {
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"function": st.fixed_dictionaries({"name": st.just("f"), "arguments": st.dictionaries(
                        st.sampled_from(["model", "error", "done", "a"]), st.text(max_size=4), max_size=3)})}
                ),
                min_size=1,
                max_size=2,
            )
        }
    ),
)  # fmt: skip


@given(sent=st.lists(messages, max_size=8), cuts=st.lists(st.integers(0, 2000), max_size=8))
@settings(deadline=None)
def test_whatever_an_ollama_says_arrives(sent: list[dict[str, Any]], cuts: list[int]) -> None:
    """The byte check lets no line pass that a parser would not have, and renames nothing but the model."""
    stream = b"".join(lines.chat(message) for message in sent) + lines.chat_end()
    reader = NativeReader("deep-coder")
    taken, start = b"", 0
    for cut in [*sorted(cuts), len(stream)]:
        reader.feed(stream[start:cut])
        taken += reader.take()
        start = max(start, cut)
    reader.end()
    taken += reader.take()
    assert told(taken) == [line | {"model": "deep-coder"} for line in told(stream)]


# From a chat stream.


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("shape", ["chat", "generate"])
def test_a_chat_stream_becomes_these_lines(case: str, shape: Shape) -> None:
    """WARMLANE_RECORD=1 writes the golden files anew; read the difference before you keep it."""
    taken = read(from_chat(shape, waited_ns=2_000_000), CHATS[case])
    golden = GOLDEN / f"{case}.{shape}.ndjson"
    if os.environ.get("WARMLANE_RECORD"):
        golden.write_bytes(taken)
    assert taken == golden.read_bytes()


@pytest.mark.parametrize("case", CHATS | streams.BADLY_ENDED)
@pytest.mark.parametrize("step", [1, 2, 7, 64, 251])
def test_the_split_of_a_chat_stream_changes_nothing(case: str, step: int) -> None:
    stream = (CHATS | streams.BADLY_ENDED)[case]
    whole, pieces = from_chat(), from_chat()
    assert read(whole, stream) == read(pieces, stream, step=step)
    assert outcome(whole) == outcome(pieces)


@pytest.mark.parametrize("case", CHATS)
def test_no_text_call_or_usage_of_a_chat_stream_is_lost(case: str) -> None:
    reader = from_chat()
    answer = json.loads(ollama_fold.fold(read(reader, CHATS[case])))
    chat = openai.ChatReader("deep-coder", include_usage=True)
    message = openai.fold_chat(read(chat, CHATS[case]))["choices"][0]["message"]
    assert answer["message"]["content"] == (message["content"] or "")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    assert answer["message"].get("thinking", "") == reasoning
    calls = [call["function"] for call in message.get("tool_calls") or []]
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in answer["message"].get("tool_calls", [])] == [
        (c["name"], json.loads(c["arguments"])) for c in calls
    ]
    assert answer["done"] is True and answer["model"] == "deep-coder"
    assert answer.get("prompt_eval_count") == (chat.usage or {}).get("prompt_tokens")
    assert answer.get("eval_count") == (chat.usage or {}).get("completion_tokens")


@pytest.mark.parametrize("case", streams.BADLY_ENDED)
def test_a_chat_stream_that_ends_badly_is_never_done(case: str) -> None:
    reader = from_chat()
    taken = read(reader, streams.BADLY_ENDED[case])
    assert not reader.succeeded and reader.error
    assert b'"done":true' not in taken


def test_nothing_is_done_before_the_end() -> None:
    """The usage comes after the finish reason, and the last line carries it."""
    reader = from_chat()
    reader.feed(ollama({"content": "a"}) + ollama({"content": ""}, "stop"))
    assert b'"done":true' not in reader.take()
    reader.feed(streams.usage_chunk("m") + DONE)
    assert reader.take() == b""
    reader.end()
    assert told(reader.take())[-1]["eval_count"] == 7


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("content_filter", "content_filter")],
)
def test_why_it_ended(finish: str, reason: str) -> None:
    assert told(read(from_chat(), llama({"content": "a"}) + llama({}, finish)))[-1]["done_reason"] == reason


def test_the_beginning_of_a_call_is_a_first_token_and_its_end_is_told_whole() -> None:
    reader = from_chat()
    reader.feed(llama(call(0, id="c0", name="read", arguments='{"a"')))
    begun = told(reader.take())
    assert reader.has_content and len(begun) == 1 and begun[0]["message"] == {"role": "assistant", "content": ""}
    reader.feed(llama(call(0, arguments=":1}")))
    assert reader.take() == b""
    reader.feed(llama({}, "tool_calls"))
    (line,) = told(reader.take())
    assert line["message"]["tool_calls"] == [
        {"id": "c0", "function": {"index": 0, "name": "read", "arguments": {"a": 1}}}
    ]


@pytest.mark.parametrize("arguments", ['{"path": "/tmp', "[1]", '{"a": NaN}'])
def test_a_call_that_was_cut_off_is_no_call(arguments: str) -> None:
    """A client would run the tool with what it has."""
    stream = llama(call(0, id="c0", name="delete", arguments=arguments)) + llama({}, "length")
    answer = json.loads(ollama_fold.fold(read(from_chat(), stream)))
    assert "tool_calls" not in answer["message"]
    assert arguments in answer["message"]["content"] and '"delete"' in answer["message"]["content"]


@pytest.mark.parametrize(("arguments", "told"), [("[1]", "[1]}"), ('{"a": NaN}', '{"a": NaN}}'), ('{"a": ', '{"a": ')])
def test_a_call_that_is_told_as_text_is_closed_unless_it_was_cut_off(arguments: str, told: str) -> None:
    stream = llama(call(0, id="c0", name="read", arguments=arguments)) + llama({}, "stop")
    answer = json.loads(ollama_fold.fold(read(from_chat(), stream)))
    assert answer["message"]["content"] == '{"name":"read","arguments":' + told


def test_a_call_without_arguments_is_a_call() -> None:
    stream = llama(call(0, id="c0", name="now", arguments="")) + llama({}, "tool_calls")
    answer = json.loads(ollama_fold.fold(read(from_chat(), stream)))
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == {}


def test_arguments_that_came_in_turns_find_their_call() -> None:
    stream = (
        llama(call(0, id="a", name="f", arguments='{"x":'))
        + llama(call(1, id="b", name="g", arguments='{"y":'))
        + llama(call(0, arguments="1}"))
        + llama(call(1, arguments="2}"))
        + llama({}, "tool_calls")
    )
    calls = json.loads(ollama_fold.fold(read(from_chat(), stream)))["message"]["tool_calls"]
    assert [c["function"]["arguments"] for c in calls] == [{"x": 1}, {"y": 2}]
    assert [c["function"]["index"] for c in calls] == [0, 1]


def test_reasoning_under_two_names_is_told_once() -> None:
    stream = vllm({"reasoning": "Hm", "reasoning_content": "Hm"}) + vllm({"content": "a"}, "stop")
    assert told(read(from_chat(), stream))[0]["message"]["thinking"] == "Hm"


def test_lines_are_plain_ascii() -> None:
    """The Python client takes U+2028, U+0085 and their kin for the end of a line."""
    stream = llama({"content": "a\u2028b\u0085c\x1cü"}) + llama({}, "stop")
    taken = read(from_chat(), stream)
    assert taken.isascii() and len(taken.decode().splitlines()) == 2
    assert told(taken)[0]["message"]["content"] == "a\u2028b\u0085c\x1cü"


def test_half_of_an_emoji_gets_through() -> None:
    stream = llama({"content": "\ud83d"}) + llama({"content": "\ude42"}) + llama({}, "stop")
    assert [line["message"]["content"] for line in told(read(from_chat(), stream))] == ["\ud83d", "\ude42", ""]


def test_a_logprob_without_bound_is_a_number() -> None:
    entry = b'{"token":"a","logprob":-Infinity,"top_logprobs":[]}'
    chunk = llama({"content": "a"}).replace(b'"index":0', b'"index":0,"logprobs":{"content":[' + entry + b"]}")
    (line, _) = told(read(from_chat(), chunk + llama({}, "stop")))
    assert line["logprobs"] == [{"token": "a", "logprob": -9999.0}]


@pytest.mark.parametrize("choice", [{"index": 0, "delta": [1]}, {"index": 0, "delta": {"tool_calls": [7]}}, 5])
def test_a_chunk_that_is_none_is_a_failure_and_no_crash(choice: Any) -> None:
    reader = from_chat()
    read(reader, llama({"content": "a"}) + event({"model": "tiny", "choices": [choice]}) + llama({}, "stop"))
    assert reader.has_content and (reader.succeeded or reader.error)


def test_durations_are_the_runtimes_own_where_it_tells_them() -> None:
    timings = {"prompt_n": 10, "prompt_ms": 12.5, "predicted_n": 3, "predicted_ms": 30.25, "cache_n": 5}
    last = told(read(from_chat(waited_ns=7), llama({"content": "a"}) + llama({}, "stop", timings=timings)))[-1]
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (12_500_000, 30_250_000)
    assert (last["prompt_eval_count"], last["eval_count"], last["load_duration"]) == (15, 3, 7)


def test_durations_are_what_was_seen_where_the_runtime_tells_none() -> None:
    clock = iter(range(0, 1000, 10))
    reader = FromChat("m", shape="generate", now_ns=lambda: next(clock))
    last = told(read(reader, vllm({"content": "a"}) + vllm({"content": "b"}) + vllm({}, "stop")))[-1]
    assert last["prompt_eval_duration"] > 0 and last["eval_duration"] > 0
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"]


pieces = st.one_of(
    st.text(max_size=8).map(lambda text: llama({"content": text})),
    st.text(max_size=8).map(lambda text: ollama({"content": "", "reasoning": text})),
    st.integers(0, 2).map(lambda n: vllm(call(n, arguments=" "))),
)


@given(sent=st.lists(pieces, max_size=8), step=st.integers(1, 400))
@settings(deadline=None)
def test_every_text_arrives_however_it_was_split(sent: list[bytes], step: int) -> None:
    stream = b"".join(sent) + llama({}, "stop")
    reader, chat = from_chat(), openai.ChatReader("deep-coder", include_usage=False)
    answer = json.loads(ollama_fold.fold(read(reader, stream, step=step)))["message"]
    message = openai.fold_chat(read(chat, stream))["choices"][0]["message"]
    assert answer.get("thinking", "") == (message.get("reasoning") or "")
    calls = len(message.get("tool_calls") or [])
    assert answer["content"].startswith(message["content"] or "")
    assert answer["content"].count('"arguments":') >= calls  # they have no name, so they are told as text


plain = st.text(st.characters(min_codepoint=0, max_codepoint=0x17F), min_size=1, max_size=6)


@given(
    texts=st.lists(plain, max_size=6),
    key=st.sampled_from(["content", "reasoning", "reasoning_content"]),
    shape=st.sampled_from(["chat", "generate"]),
    runtime=st.sampled_from([llama, vllm, ollama]),
)
@settings(deadline=None)
def test_each_piece_of_text_is_a_line_of_its_own(texts: list[str], key: str, shape: Shape, runtime: Any) -> None:
    """Also where the bytes go over without being parsed."""
    stream = b"".join(runtime({key: text}) for text in texts) + runtime({}, "stop")
    said = [line.get("message", line) for line in told(read(from_chat(shape), stream))]
    name = "thinking" if key != "content" else "content" if shape == "chat" else "response"
    assert [line.get(name) for line in said][:-1] == texts
    assert len(said) == len(texts) + 1


def test_a_broken_text_is_a_failure_in_a_running_answer() -> None:
    for broken in (b'"\n"', b'"\\x"', b'"\\u12"'):
        stream = llama({"content": "a"}) + llama({"content": "b"}).replace(b'"b"', broken) + llama({}, "stop")
        reader = from_chat()
        read(reader, stream)
        assert not reader.succeeded, broken


# Folded.


@pytest.mark.parametrize("case", lines.WELL_ENDED)
def test_a_folded_answer_is_its_last_line_with_all_that_was_said(case: str) -> None:
    every = told(lines.WELL_ENDED[case])
    answer = json.loads(ollama_fold.fold(lines.WELL_ENDED[case]))
    assert answer["done"] is True and answer["eval_count"] == 298 and list(answer) >= list(every[-1])
    for key in ("content", "thinking"):
        said = "".join(line.get("message", {}).get(key, "") for line in every)
        assert answer.get("message", {}).get(key, "") == said
    assert answer.get("response", "") == "".join(line.get("response", "") for line in every)
    calls = [call for line in every for call in line.get("message", {}).get("tool_calls", [])]
    assert answer.get("message", {}).get("tool_calls", []) == calls
    assert answer.get("logprobs", []) == [entry for line in every for entry in line.get("logprobs", [])]


@pytest.mark.parametrize("case", lines.BADLY_ENDED)
def test_what_is_not_whole_is_not_folded(case: str) -> None:
    with pytest.raises(ValueError):
        ollama_fold.fold(lines.BADLY_ENDED[case])
