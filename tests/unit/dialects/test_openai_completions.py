"""OpenAI's older completions: what a request asks for, how its stream is read and folded."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dialects.openai_completions import CompletionReader, fold_completion, read_completion
from broker.errors import BadRequest


def chunk(text: str = "", index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    """As llama.cpp writes it."""
    choice = {"text": text, "index": index, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
    said = {"choices": [choice], "created": 7, "model": "weights", "object": "text_completion", "id": "c-1", **more}
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt: int, made: int) -> dict[str, Any]:
    details = {"cached_tokens": 1}
    return {"completion_tokens": made, "prompt_tokens": prompt, "prompt_tokens_details": details}


DONE = b"data: [DONE]\n\n"
ONE = chunk("fi") + chunk(' "g"\u2028') + chunk("!") + chunk("", finish="length", usage=usage(6, 3)) + DONE
TWO = (  # llama.cpp, two prompts: a null ahead, and no [DONE]
    b"data: null\n\n"
    + chunk("b", 1)
    + chunk("a", 0)
    + chunk("", 1, "stop", usage=usage(3, 1))
    + chunk("A", 0)
    + chunk("", 0, "length", usage=usage(4, 2))
)
COUNTED_LAST = (  # vLLM
    chunk("a", usage=None) + chunk("b", finish="stop", usage=None) + b"data: "
    b'{"id":"c-1","model":"weights","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n' + DONE
)


def read(stream: bytes, **keys: Any) -> CompletionReader:
    reader = CompletionReader("coder", **({"include_usage": True} | keys))
    reader.feed(stream)
    reader.end()
    return reader


def asked(**keys: Any) -> bytes:
    return json.dumps({"model": "coder", "prompt": "Hi", **keys}).encode()


@given(st.data())
def test_however_the_bytes_are_split_the_answer_is_the_same(data: st.DataObject) -> None:
    stream, prompts = data.draw(st.sampled_from([(ONE, 1), (TWO, 2), (COUNTED_LAST, 1)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = CompletionReader("coder", include_usage=True, n=prompts, prompts=prompts)
    out = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        out += reader.take()
    reader.end()
    assert reader.succeeded and out + reader.take() == read(stream, n=prompts, prompts=prompts).take()


def test_the_model_is_renamed_and_nothing_else() -> None:
    reader = read(ONE)
    assert reader.take() == ONE.removesuffix(DONE).replace(b'"model":"weights"', b'"model":"coder"')
    assert reader.usage == {"prompt_tokens": 6, "completion_tokens": 3, "cached_tokens": 1}


def test_a_usage_that_nobody_asked_for_stays_behind() -> None:
    assert b"prompt_tokens" in read(COUNTED_LAST).take()
    quiet = read(COUNTED_LAST, include_usage=False)
    assert b"prompt_tokens" not in quiet.take() and quiet.usage == {"prompt_tokens": 5, "completion_tokens": 2}


def test_the_usage_of_several_choices_is_told_once_and_at_the_end() -> None:
    """llama.cpp tells that of each choice when it ends; clients sum or keep the last one that they hear."""
    told = [json.loads(event[6:]) for event in read(TWO, n=2, prompts=2).take().split(b"\n\n") if event]
    assert [(bool(said["choices"]), bool(said.get("usage"))) for said in told] == [(True, False)] * 5 + [(False, True)]
    assert told[-1]["usage"] == {**usage(7, 3), "prompt_tokens_details": {"cached_tokens": 2}}
    assert (told[-1]["id"], told[-1]["model"]) == ("c-1", "coder")
    quiet = read(TWO, n=2, prompts=2, include_usage=False)
    assert b"prompt_tokens" not in quiet.take()
    assert quiet.usage == {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 2}


def test_each_prompt_must_have_its_answer() -> None:
    """On one slot the second begins when the first is over: a finish reason alone is no end."""
    half = chunk("a", 0) + chunk("", 0, "stop")
    assert read(half).succeeded
    reader = CompletionReader("coder", include_usage=True, n=2, prompts=2)
    reader.feed(half)
    assert reader.has_content and not reader.succeeded
    reader.end()
    assert reader.error == "the runtime ended the stream without a finish reason"


def test_the_progress_of_a_second_prompt_is_no_clients_business() -> None:
    progress = chunk("", 0, prompt_progress={"total": 9, "processed": 3})
    told = read(TWO.replace(chunk("A", 0), progress + chunk("A", 0)), n=2, prompts=2)
    assert told.prompt_read == (3, 9) and told.take() == read(TWO, n=2, prompts=2).take()


def test_text_is_the_first_token_and_a_role_is_not() -> None:
    reader = CompletionReader("coder", include_usage=True)
    reader.feed(chunk(""))
    assert not reader.has_content and reader.take() == b""
    reader.feed(chunk(" "))
    assert reader.has_content


def test_folded_prompts_keep_their_places_and_their_tokens_add_up() -> None:
    whole = fold_completion(read(TWO, n=2, prompts=2).take())
    assert [(choice["text"], choice["finish_reason"]) for choice in whole["choices"]] == [
        ("aA", "length"),
        ("b", "stop"),
    ]
    assert whole["usage"] == {**usage(7, 3), "prompt_tokens_details": {"cached_tokens": 2}}
    assert (whole["object"], whole["model"], whole["id"]) == ("text_completion", "coder", "c-1")
    assert fold_completion(read(COUNTED_LAST).take())["usage"] == {"prompt_tokens": 5, "completion_tokens": 2}


def test_folded_logprobs_follow_each_other() -> None:
    old = [{"tokens": [token], "token_logprobs": [-1.0], "text_offset": [at]} for at, token in enumerate("ab")]
    stream = chunk("a", logprobs=old[0]) + chunk("b", logprobs=old[1]) + chunk("", finish="stop")
    choice = fold_completion(stream)["choices"][0]
    assert choice["logprobs"] == {"tokens": ["a", "b"], "token_logprobs": [-1.0, -1.0], "text_offset": [0, 1]}


def test_an_error_is_no_answer() -> None:
    with pytest.raises(ValueError):
        fold_completion(b'data: {"error":{"message":"broke"}}\n\n')


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [
        ("x" * 40, (1, 11, 11)),
        (["x" * 40, "y"], (2, 12, 11)),
        ([1, 2, 3], (1, 3, 3)),
        ([[1, 2, 3], [4]], (2, 4, 3)),
    ],
)
def test_a_prompt_is_weighed_in_every_form(prompt: Any, sizes: tuple[int, int, int]) -> None:
    facts = read_completion(asked(prompt=prompt, n=2, max_tokens=0))
    assert (facts.prompts, facts.prompt_tokens, facts.longest_tokens) == sizes
    assert (facts.choices, facts.max_tokens) == (2 * sizes[0], 0)


def test_a_suffix_needs_room_too() -> None:
    facts = read_completion(asked(suffix="z" * 400))
    assert facts.longest_tokens == 102


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"model": ""}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_a_wrong_request_is_told_where(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_completion(asked(**wrong))
    assert caught.value.param == param


def test_a_count_of_all_choices_replaces_those_of_each() -> None:
    every = {"prompt_tokens": 7, "completion_tokens": 3}
    said = b'data: {"id":"c-1","model":"weights","choices":[],"usage":' + json.dumps(every).encode() + b"}\n\n"
    reader = read(TWO + said, n=2, prompts=2)
    told = reader.take()
    assert reader.usage == every and fold_completion(told)["usage"] == every and told.count(b"prompt_tokens") == 1
