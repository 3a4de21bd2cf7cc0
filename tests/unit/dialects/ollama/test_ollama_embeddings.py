"""Vectors in the Ollama dialect, from an Ollama and from a /v1/embeddings."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dialects import ollama_embeddings
from broker.dialects import vectors as whole
from broker.dialects.ollama_embeddings import AskedVectors, VectorReader
from broker.errors import BadRequest


def embed(**request: Any) -> AskedVectors:
    return ollama_embeddings.read_embed(json.dumps({"model": "vectors", "input": "Hi"} | request).encode())


def legacy(**request: Any) -> AskedVectors:
    return ollama_embeddings.read_embeddings(json.dumps({"model": "vectors", "prompt": "Hi"} | request).encode())


def openai(*vectors: list[float], order: list[int] | None = None, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)]
    data = [data[n] for n in order] if order else data
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return json.dumps({"object": "list", "model": "w", "data": data, "usage": usage} | more).encode()


def native(*vectors: list[float], **more: Any) -> bytes:
    told = {"model": "nomic:latest", "embeddings": vectors, "total_duration": 14, "prompt_eval_count": 8}
    return json.dumps(told | more, separators=(",", ":")).encode()


def read(asked: AskedVectors, answer: bytes, *, native: bool = False, step: int = 0) -> tuple[bytes, VectorReader]:
    reader = VectorReader("vectors", asked=asked, native=native, waited_ns=3, now_ns=lambda: 10)
    for start in range(0, len(answer), step or len(answer) or 1):
        reader.feed(answer[start : start + (step or len(answer))])
        assert reader.take() == b""
    reader.end()
    taken = b""
    while piece := reader.take():
        assert len(piece) <= whole.PIECE_BYTES
        taken += piece
    return taken, reader


def test_vectors_of_a_v1_endpoint_become_an_ollamas() -> None:
    taken, reader = read(embed(input=["a", "b"]), openai([0.1, -2e-05], [3, 4.50]))
    assert json.loads(taken) == {
        "model": "vectors",
        "embeddings": [[0.1, -2e-05], [3, 4.5]],
        "total_duration": 3,
        "load_duration": 3,
        "prompt_eval_count": 5,
    }
    assert b"[0.1, -2e-05]" in taken, "numbers go on as they are written"
    assert reader.succeeded and reader.usage == {"prompt_tokens": 5, "completion_tokens": 0}


def test_vectors_come_in_the_order_of_their_inputs() -> None:
    taken, _ = read(embed(input=["a", "b", "c"]), openai([1], [2], [3], order=[2, 0, 1]))
    assert json.loads(taken)["embeddings"] == [[1], [2], [3]]


def test_the_older_endpoint_gets_one_vector() -> None:
    taken, _ = read(legacy(), openai([0.25, 0.5]))
    assert json.loads(taken) == {"embedding": [0.25, 0.5]}


def test_an_ollamas_vectors_go_on_as_they_are() -> None:
    answer = native([0.10, 1e-9], [2], load_duration=1)
    taken, reader = read(embed(input=["a", "b"]), answer, native=True)
    assert taken == answer.replace(b"nomic:latest", b"vectors")
    assert reader.usage == {"prompt_tokens": 8, "completion_tokens": 0}


def test_an_ollamas_answer_to_the_older_endpoint_goes_on_as_it_is() -> None:
    taken, reader = read(legacy(), b'{"embedding":[0.5,1.0]}\n', native=True)
    assert taken == b'{"embedding":[0.5,1.0]}\n' and reader.succeeded


def test_an_odd_name_is_replaced_all_the_same() -> None:
    answer = native([1], model='a[1] "model":"x"')
    taken, _ = read(embed(), answer, native=True)
    assert json.loads(taken)["model"] == "vectors" and json.loads(taken)["embeddings"] == [[1]]
    taken, _ = read(embed(), b'{"by":{"model":"x"},"model":"y","embeddings":[[1]]}', native=True)
    assert json.loads(taken) == {"by": {"model": "x"}, "model": "vectors", "embeddings": [[1]]}


def test_shorter_vectors_have_length_one_again() -> None:
    taken, _ = read(embed(dimensions=2), openai([3, 4, 12]))
    (vector,) = json.loads(taken)["embeddings"]
    assert vector == pytest.approx([0.6, 0.8]) and math.hypot(*vector) == pytest.approx(1)
    assert json.loads(read(embed(dimensions=9), openai([3, 4]))[0])["embeddings"] == [[3, 4]]
    assert json.loads(read(embed(dimensions=1), openai([0.0, 4]))[0])["embeddings"] == [[0.0]]


BAD = {
    "nothing": b"",
    "text": b"bad gateway",
    "no vector": openai(),
    "too few": openai([1]),
    "base64": openai([1], [2]).replace(b"[1]", b'"AAAA"'),
    "empty vector": openai([1], []),
    "cut": openai([1], [2])[:-30],
    "cut in a vector": openai([1], [2, 3])[:-70],
    "words": openai([1], [2]).replace(b"[2]", b"[null]"),
    "an error": b'{"error":{"message":"input is too long","type":"invalid_request_error"}}',
    "an Ollama's error": b'{"error":"the input length exceeds the context length"}',
    "a list": b"[]",
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
@pytest.mark.parametrize("native", [True, False])
def test_what_is_no_vector_for_each_input_is_a_failure(answer: bytes, native: bool) -> None:
    taken, reader = read(embed(input=["a", "b"]), answer, native=native)
    assert taken == b"" and reader.error and not reader.succeeded and not reader.has_content


def test_the_runtimes_words_are_kept() -> None:
    _, reader = read(embed(), BAD["an Ollama's error"], native=True)
    assert reader.complaint is not None and reader.complaint.context_overflow


def test_numbers_that_are_none_are_a_failure() -> None:
    taken, reader = read(embed(dimensions=1), openai([7, 8]).replace(b"[7, 8]", b"[7,,-]"))
    assert taken == b"" and reader.error


def test_an_answer_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "ANSWER_BYTES_MAX", 1 << 20)
    _, reader = read(embed(), b"x" * (2 << 20), step=1 << 19)
    assert reader.error == "the runtime's answer is longer than 1 MiB; send fewer inputs at once"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"model": None}, "model"),
        ({"input": 7}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": "3"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
    ],
)
def test_a_bad_request_is_refused_with_a_sentence(request_: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        embed(**request_)
    assert refused.value.param == param


@pytest.mark.parametrize("given_", ["", [], None])
def test_no_input_is_a_wish_to_load(given_: Any) -> None:
    asked = embed(input=given_)
    assert asked.empty and json.loads(ollama_embeddings.nothing(asked)) == {"model": "vectors", "embeddings": []}
    assert json.loads(ollama_embeddings.nothing(legacy(prompt=""))) == {"embedding": []}


def test_what_admission_must_know() -> None:
    asked = embed(input=["x" * 40, "y" * 400])
    assert (asked.prompt_tokens, asked.longest_tokens) == (112, 101)


def test_a_v1_endpoint_is_asked_for_numbers_and_never_for_fewer() -> None:
    told = json.loads(ollama_embeddings.to_openai(embed(input=["a"], dimensions=3, truncate=True), "w"))
    assert told == {"model": "w", "input": ["a"], "encoding_format": "float"}


def test_an_ollama_gets_the_clients_bytes_but_for_what_must_change() -> None:
    asked = b'{ "model":"vectors","input": "\\u00fc","truncate": false,"options":{"num_ctx":1},"dimensions": 3 }'
    assert ollama_embeddings.rewrite(asked, "nomic", drops=frozenset({"num_ctx"})) == (
        b'{ "model":"nomic","input": "\\u00fc","truncate": false,"dimensions": 3,"keep_alive":-1 }'
    )


@given(
    vectors=st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), min_size=1),
    step=st.integers(1, 200),
    spaced=st.booleans(),
)
def test_no_number_is_lost_however_the_bytes_are_split(vectors: list[list[float]], step: int, spaced: bool) -> None:
    answer = openai(*vectors)
    answer = answer if spaced else json.dumps(json.loads(answer), separators=(",", ":")).encode()
    asked = embed(input=["x"] * len(vectors))
    assert json.loads(read(asked, answer, step=step)[0])["embeddings"] == vectors
    assert json.loads(read(asked, native(*vectors), native=True, step=step)[0])["embeddings"] == vectors
