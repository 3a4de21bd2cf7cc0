"""Reading a runtime's answer for a client of the Anthropic dialect, from its own events and from a chat stream."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.dialects import anthropic
from broker.dialects.anthropic_fold import fold_messages
from broker.dialects.anthropic_stream import PassingReader, TranslatingReader
from broker.dialects.openai_fold import fold_chat
from broker.dialects.openai_stream import read_complaint
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.runtime_streams import BADLY_ENDED, DONE, WELL_ENDED, call, llama, vllm

GOLDEN = Path(__file__).parent / "anthropic"
NATIVE = {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.sse"))}
CHATS = {case: stream for case, stream in WELL_ENDED.items() if case != "two_choices"}  # one message has one choice

Reader = TranslatingReader | PassingReader
Make = Callable[[], Reader]


def translating() -> TranslatingReader:
    return TranslatingReader("deep-coder", "1")


def passing() -> PassingReader:
    return PassingReader("deep-coder")


def read(stream: bytes, make: Make, *, step: int = 0) -> tuple[bytes, Reader]:
    """Feeds a stream in pieces of `step` bytes and takes after each one."""
    reader = make()
    taken = b""
    for start in range(0, len(stream), step or len(stream) or 1):
        reader.feed(stream[start : start + (step or len(stream))])
        taken += reader.take()
    reader.end()
    return taken + reader.take(), reader


def translated(stream: bytes) -> bytes:
    taken, reader = read(stream, translating)
    assert reader.succeeded, reader.error
    return taken


def events(stream: bytes) -> list[dict[str, Any]]:
    """Parses events, and holds each to its name."""
    found = []
    for event in stream.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        told = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + told["type"].encode()
        found.append(told)
    return found


def outcome(reader: Reader) -> tuple[object, ...]:
    return reader.succeeded, reader.error, reader.usage, reader.timings, reader.has_content, reader.prompt_read


def hold_to_the_grammar(stream: bytes) -> None:
    """Every block begins, grows and ends before the next, and the message's own events stand around them."""
    told = events(stream)
    assert told[0]["type"] == "message_start"
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]
    count, is_open = 0, False
    for event in told[1:-2]:
        assert event["index"] == count
        match event["type"]:
            case "content_block_start":
                assert not is_open
                is_open = True
            case "content_block_delta":
                assert is_open
            case "content_block_stop":
                assert is_open
                is_open, count = False, count + 1
            case other:
                raise AssertionError(other)
    assert not is_open


@pytest.mark.parametrize("case", CHATS)
def test_a_chat_stream_becomes_a_message_that_says_the_same(case: str) -> None:
    stream = translated(CHATS[case])
    hold_to_the_grammar(stream)
    chat = fold_chat(b"".join(part + b"\n\n" for part in CHATS[case].split(b"\n\n") if part.startswith(b"data: {")))
    said = chat["choices"][0]["message"]
    message = json.loads(fold_messages(stream))
    blocks = message["content"]
    assert "".join(block["text"] for block in blocks if block["type"] == "text") == (said["content"] or "")
    thought = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    assert thought == (said.get("reasoning_content") or said.get("reasoning") or "")
    assert [(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"] == [
        (made["id"], made["function"]["name"], json.loads(made["function"]["arguments"]))
        for made in said.get("tool_calls", ())
    ]
    if usage := chat.get("usage"):
        told = message["usage"]
        assert told["input_tokens"] + told["cache_read_input_tokens"] == usage["prompt_tokens"]
        assert told["output_tokens"] == usage["completion_tokens"]
    assert message["model"] == "deep-coder" and message["id"] == "msg_1"


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        (llama({"content": "a"}) + llama({}, "stop"), ("end_turn", None)),
        (llama({"content": "a"}) + llama({}, "length"), ("max_tokens", None)),
        (llama(call(0, id="c", name="n", arguments="{}")) + llama({}, "tool_calls"), ("tool_use", None)),
        (llama(call(0, id="c", name="n", arguments="{}")) + llama({}, "stop"), ("tool_use", None)),
        (llama(call(0, id="c", name="n", arguments='{"a')) + llama({}, "length"), ("max_tokens", None)),
        (llama({"content": "a"}) + llama({}, "content_filter"), ("refusal", None)),
        (vllm({"content": "a"}) + vllm({}, "stop", stop_reason="END"), ("stop_sequence", "END")),
        (vllm({"content": "a"}) + vllm({}, "stop", stop_reason=151643), ("end_turn", None)),
    ],
)
def test_each_end_has_its_reason(chat: bytes, told: tuple[str, str | None]) -> None:
    delta = events(translated(chat + DONE))[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == told


def test_reasoning_text_and_a_call_become_three_blocks() -> None:
    stream = translated(
        llama({"role": "assistant", "content": None})
        + llama({"reasoning_content": "Hm", "reasoning": "Hm"})
        + llama({"content": "I read."})
        + llama(call(0, id="c0", name="read", arguments='{"a":'))
        + llama(call(0, arguments="1}"))
        + llama({}, "tool_calls")
        + streams.usage_chunk("tiny")
        + DONE
    )
    assert stream == (GOLDEN / "three_blocks.expected").read_bytes()


def test_calls_whose_fragments_come_mixed_follow_each_other() -> None:
    stream = translated(
        llama(call(0, id="c0", name="one", arguments='{"a":'))
        + llama(call(1, id="c1", name="two", arguments='{"b":'))
        + llama(call(0, arguments="1}"))
        + llama({"content": "Between."})
        + llama(call(1, arguments="2}"))
        + llama({}, "tool_calls")
        + DONE
    )
    hold_to_the_grammar(stream)
    blocks = json.loads(fold_messages(stream))["content"]
    assert [(block.get("name"), block.get("input"), block.get("text")) for block in blocks] == [
        ("one", {"a": 1}, None),
        ("two", {"b": 2}, None),
        (None, None, "Between."),
    ]


def test_a_call_is_told_before_the_answer_ends() -> None:
    """A client shows a call as it grows; only what belongs to a later block waits."""
    reader = translating()
    reader.feed(llama(call(0, id="c0", name="one", arguments='{"a":')))
    assert [event["type"] for event in events(reader.take())] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
    ]


@pytest.mark.parametrize("arguments", ['{"a":', "[1,2]", '"a"', "[" * 100_000])
def test_arguments_that_are_no_object_are_none_in_a_whole_message(arguments: str) -> None:
    """They were cut short, or the model erred: Anthropic's are always an object, and so its clients read them."""
    stream = translated(llama(call(0, id="c0", name="one", arguments=arguments)) + llama({}, "length") + DONE)
    message = json.loads(fold_messages(stream))
    assert (message["content"][0]["input"], message["stop_reason"]) == ({}, "max_tokens")


def test_a_call_without_an_id_gets_one_that_no_other_answer_has() -> None:
    """A client gives a tool's result back by it, in a conversation that holds the calls of many answers."""
    stream = llama(call(0, name="one", arguments="{}")) + llama(call(1, name="two", arguments="{}"))
    for name in ("job1", "job2"):
        told, _ = read(stream + llama({}, "tool_calls") + DONE, lambda name=name: TranslatingReader("deep-coder", name))
        blocks = json.loads(fold_messages(told))["content"]
        assert [block["id"] for block in blocks] == [f"toolu_{name}_0", f"toolu_{name}_1"]


def test_nothing_is_said_before_the_first_content_and_no_end_before_the_runtimes() -> None:
    reader = translating()
    reader.feed(llama({"role": "assistant", "content": None}))
    assert reader.take() == b"" and not reader.has_content
    reader.feed(llama({"content": "a"}))
    assert b"message_start" in reader.take() and reader.has_content
    reader.feed(llama({}, "stop"))
    assert b"message_stop" not in reader.take()  # its usage is still to come
    reader.end()
    assert b"message_stop" in reader.take()


def test_an_empty_answer_is_a_message_without_blocks() -> None:
    message = json.loads(fold_messages(translated(WELL_ENDED["empty"])))
    assert message["content"] == [] and message["stop_reason"] == "end_turn"


@pytest.mark.parametrize("case", BADLY_ENDED)
def test_a_bad_end_is_never_a_message(case: str) -> None:
    taken, reader = read(BADLY_ENDED[case], translating)
    assert not reader.succeeded and reader.error
    assert b"message_stop" not in taken and b"message_delta" not in taken
    with pytest.raises(ValueError, match="does not end"):
        fold_messages(taken)


@pytest.mark.parametrize("case", CHATS | BADLY_ENDED)
@pytest.mark.parametrize("step", [1, 2, 7, 64, 251])
def test_a_chat_stream_reads_the_same_however_it_was_split(case: str, step: int) -> None:
    stream = (CHATS | BADLY_ENDED)[case]
    whole, pieces = read(stream, translating), read(stream, translating, step=step)
    if whole[1].succeeded:
        assert pieces[0] == whole[0]
    else:  # what came before the fault may be out or not
        assert pieces[0].startswith(whole[0]) or whole[0].startswith(pieces[0])
    assert outcome(pieces[1]) == outcome(whole[1])


@pytest.mark.parametrize("case", NATIVE)
def test_a_runtimes_own_events_reach_the_client_with_nothing_changed_but_the_model(case: str) -> None:
    taken, reader = read(NATIVE[case], passing)
    assert reader.succeeded and reader.error is None
    assert taken == NATIVE[case].replace(b'"model":"golden"', b'"model":"deep-coder"')
    hold_to_the_grammar(taken)
    assert reader.usage is not None and reader.usage["prompt_tokens"] == 45


@pytest.mark.parametrize("case", NATIVE)
def test_a_recorded_stream_folds_to_the_runtimes_own_whole_answer(case: str) -> None:
    folded = json.loads(fold_messages(NATIVE[case]))
    whole = json.loads((GOLDEN / f"{case}.whole.json").read_bytes())
    for message in (folded, whole):
        message.pop("id")
        usage = message.pop("usage")
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 45  # the cache divides it anew each time
    assert folded == whole


@pytest.mark.parametrize("case", NATIVE)
@pytest.mark.parametrize("step", [1, 2, 7, 64, 251])
def test_a_runtimes_own_events_read_the_same_however_they_were_split(case: str, step: int) -> None:
    whole, pieces = read(NATIVE[case], passing), read(NATIVE[case], passing, step=step)
    assert pieces[0] == whole[0] and outcome(pieces[1]) == outcome(whole[1])


def test_pings_and_comments_of_a_runtime_do_not_come_out_and_are_no_content() -> None:
    reader = passing()
    reader.feed(b': hello\n\nevent: ping\ndata: {"type": "ping"}\n\n')
    assert reader.take() == b"" and not reader.has_content
    taken, _ = read(
        NATIVE["length"].replace(b"event: content", b': x\n\nevent: ping\ndata: {"type":"ping"}\n\nevent: content'),
        passing,
    )
    assert taken == read(NATIVE["length"], passing)[0]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (b"", "without message_stop"),
        (b"proxy error: Failed to read connection", "proxy error"),
        (
            b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"slot failed"}}\n\n',
            "slot failed",
        ),
        (b"data: [1]\n\n", "not a JSON object"),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', "without message_stop"),  # and no stop reason
    ],
)
def test_a_native_stream_that_breaks_off_is_no_success(end: bytes, words: str) -> None:
    half = NATIVE["length"].split(b"event: content_block_stop")[0]
    taken, reader = read(half + end, passing)
    assert not reader.succeeded and words in (reader.error or "")
    assert taken.startswith(b"event: message_start")
    with pytest.raises(ValueError):
        fold_messages(taken + anthropic.error_event("runtime_failed", "x", status=502))


def test_an_overflow_is_known_by_the_body_that_was_recorded() -> None:
    assert read_complaint((GOLDEN / "overflow.error.json").read_bytes()).context_overflow


@pytest.mark.parametrize(
    "texts", [["a", "b", 'say "finish_reason": "stop"', "\\ \n\t \u2028 日本 \U0001f642", "", "}}", "c"]]
)
@pytest.mark.parametrize("key", ["content", "reasoning_content"])
def test_a_run_of_chunks_says_what_it_says_one_by_one(texts: list[str], key: str) -> None:
    """Most strings go over unparsed; bytes that only look alike do not."""
    stream = b"".join(llama({key: text}) for text in texts)
    stream = stream.replace(b"\\u65e5\\u672c", "日本".encode()) + llama({}, "stop") + DONE
    taken = translated(stream)
    deltas = [event["delta"] for event in events(taken) if event["type"] == "content_block_delta"]
    assert len([delta for delta in deltas if delta["type"] != "signature_delta"]) == len(texts) - 1  # "" is no event
    blocks = json.loads(fold_messages(taken))["content"]
    assert [block["text" if key == "content" else "thinking"] for block in blocks] == ["".join(texts)]


@pytest.mark.parametrize(
    "odd",
    [
        {"content": "x", "refusal": "y"},
        {"content": "x", "reasoning_content": "y"},
        {"content": None},
        {"content": "x", **call(0, id="c", name="n", arguments="{}")},
    ],
)
def test_an_odd_chunk_in_a_run_is_read_for_what_it_is(odd: dict[str, Any]) -> None:
    stream = (
        llama({"content": "a"}) + llama({"content": "b"}) + llama(odd) + llama({"content": "c"}) + llama({}, "stop")
    )
    taken = translated(stream + DONE)
    hold_to_the_grammar(taken)
    blocks = json.loads(fold_messages(taken))["content"]
    said = "".join(block.get("text", "") for block in blocks)
    assert said == "ab" + (odd["content"] or "") + odd.get("refusal", "") + "c"
    assert ("".join(block.get("thinking", "") for block in blocks)) == odd.get("reasoning_content", "")
    assert sum(block["type"] == "tool_use" for block in blocks) == len(odd.get("tool_calls", ()))


@pytest.mark.parametrize("odd", [{"content": "x", "refusal": "y"}, {"refusal": "y", "content": "x"}])
def test_chunks_that_say_two_things_make_no_run(odd: dict[str, str]) -> None:
    stream = llama(odd) * 3 + llama({}, "stop") + DONE
    assert json.loads(fold_messages(translated(stream)))["content"][0]["text"] == "xy" * 3


def test_a_string_elsewhere_in_a_chunk_is_not_what_it_says() -> None:
    chunks = [llama({"content": "a"}).replace(b"data: {", b'data: {"x":{"content":"%d"},' % n) for n in range(3)]
    stream = b"".join(chunks) + llama({}, "stop") + DONE
    assert json.loads(fold_messages(translated(stream)))["content"][0]["text"] == "aaa"


@pytest.mark.parametrize("broken", [b'"\\x"', b'"a" "b"', b'"\xff"', b"[", b'"a\tb"'])
def test_a_chunk_that_cannot_be_read_is_a_failure_and_no_crash(broken: bytes) -> None:
    """Chat passes such chunks on unparsed: its client finds out. Ours would be told half of it as the whole."""
    run = llama({"content": "a"}) + llama({"content": "b"}) + llama({"content": "c"})
    stream = run + llama({"content": "d"}).replace(b'"d"', broken) + llama({"content": "e"}) + llama({}, "stop") + DONE
    taken, reader = read(stream, translating)
    assert not reader.succeeded and "cannot be read" in (reader.error or "")
    assert b"message_stop" not in taken and b'"e"' not in taken


def test_a_fold_skips_heartbeats_wherever_they_stand() -> None:
    beat = anthropic.heartbeat("waiting\nbehind 2")
    assert beat.count(b"\n\n") == 1
    stream = NATIVE["length"].replace(b"event: ", beat + b"event: ")
    assert fold_messages(stream) == fold_messages(NATIVE["length"])


text = st.text(min_size=1, max_size=8)
arguments = st.dictionaries(text, st.one_of(st.integers(), text), max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, str, str, list[tuple[str, str]]]:
    """A chat stream of thoughts, texts and calls, whose fragments come mixed; and what it says."""
    said = thought = ""
    calls: list[tuple[str, str]] = []
    left: list[list[bytes]] = []
    for kind in draw(st.lists(st.sampled_from(["text", "thought", "call"]), min_size=1, max_size=8)):
        if kind == "call":
            whole, n = draw(arguments), len(calls)
            cut = draw(st.integers(0, len(whole)))
            calls.append((f"c{n}", whole))
            left.append(
                [llama(call(n, id=f"c{n}", name="tool", arguments=whole[:cut])), llama(call(n, arguments=whole[cut:]))]
            )
        else:
            piece = draw(text)
            said, thought = (said + piece, thought) if kind == "text" else (said, thought + piece)
            left.append([llama({"content" if kind == "text" else "reasoning_content": piece})])
    # Texts keep their order among themselves, and so do calls; their fragments may wait for later ones.
    stream = b"".join(part[0] for part in left)
    rest = [part[1] for part in left if len(part) > 1]
    stream += b"".join(draw(st.permutations(rest)))
    return stream + llama({}, "stop") + streams.usage_chunk("tiny") + DONE, said, thought, calls


@settings(max_examples=150)
@given(answers(), st.lists(st.integers(1, 300), max_size=20))
def test_no_text_thought_call_or_figure_is_lost(
    answer: tuple[bytes, str, str, list[tuple[str, str]]], cuts: list[int]
) -> None:
    stream, said, thought, calls = answer
    reader = translating()
    at, taken = 0, b""
    for cut in [*cuts, len(stream)]:
        reader.feed(stream[at : at + cut])
        taken += reader.take()
        at += cut
    reader.end()
    taken += reader.take()
    assert reader.succeeded
    hold_to_the_grammar(taken)
    message = json.loads(fold_messages(taken))
    blocks = message["content"]
    assert "".join(block["text"] for block in blocks if block["type"] == "text") == said
    assert "".join(block["thinking"] for block in blocks if block["type"] == "thinking") == thought
    made = [(block["id"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    assert made == [(call_id, json.loads(whole)) for call_id, whole in calls]
    assert message["usage"] == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 24,
        "output_tokens": 7,
    }
