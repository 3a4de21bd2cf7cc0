"""Embeddings: what a request asks for, and which answers are vectors. A 200 alone proves nothing."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.dialects import vectors as whole
from broker.dialects.openai_embeddings import EmbeddingReader, read_embeddings, rewrite_embeddings
from broker.errors import BadRequest


def asked(given: Any, **more: Any) -> bytes:
    return json.dumps({"model": "embed-small", "input": given, **more}).encode()


def answer(*vectors: Any, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    return json.dumps({"object": "list", "data": data, "model": "weights", "usage": usage, **more}).encode()


def read(*pieces: bytes) -> EmbeddingReader:
    reader = EmbeddingReader("embed-small")
    for piece in pieces:
        reader.feed(piece)
    assert reader.take() == b"", "nothing goes out before all of it has been read"
    assert not reader.has_content
    reader.end()
    return reader


def taken(reader: EmbeddingReader) -> bytes:
    return b"".join(iter(reader.take, b""))


@pytest.mark.parametrize(
    ("value", "inputs", "tokens", "longest"),
    [
        ("x" * 400, 1, 101, 101),
        (["x" * 400, "y" * 40], 2, 112, 101),
        ([5, 6, 7], 1, 3, 3),
        ([[5, 6, 7], [8]], 2, 4, 3),
        ("é" * 200, 1, 101, 101),
        ("", 1, 1, 1),
    ],
)
def test_a_request_is_weighed_input_by_input(value: Any, inputs: int, tokens: int, longest: int) -> None:
    """Each input alone must fit the context; together they are a batch, however large."""
    facts = read_embeddings(asked(value))

    assert (facts.model, facts.inputs) == ("embed-small", inputs)
    assert (facts.prompt_tokens, facts.longest_tokens) == (tokens, longest)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"input": "a"}', "model"),
        (asked(None), "input"),
        (asked([]), "input"),
        (asked({"text": "a"}), "input"),
        (asked(["a", {"b": 1}]), "input[1]"),
        (asked("a", stream=True), "stream"),
    ],
)
def test_a_wrong_request_is_one_sentence_that_names_the_part(body: bytes, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_embeddings(body)
    assert caught.value.param == param


def test_only_the_model_changes_in_a_request() -> None:
    sent = b'{"input": [1e5, "\\u00e9"],\n "model": "embed-small", "encoding_format":"base64", "dimensions": 4}'

    assert rewrite_embeddings(sent, "nomic") == sent.replace(b"embed-small", b"nomic")


def test_what_would_load_the_model_again_is_taken_out_and_what_the_runtime_needs_put_in() -> None:
    sent = b'{"model": "embed-small", "keep_alive": 5, "input": "a", "options": {"num_ctx": 9}, "user": "ann"}'

    found = rewrite_embeddings(sent, "nomic", drops=frozenset({"keep_alive"}), extra={"truncate": False})
    assert json.loads(found) == {"model": "nomic", "input": "a", "user": "ann", "truncate": False}


@pytest.mark.parametrize("vector", [[0.25, -1e-9, 3], "AACAPg=="], ids=["float", "base64"])
def test_vectors_come_out_as_they_were_under_our_name(vector: Any) -> None:
    sent = answer(vector, vector)
    reader = read(sent[:20], sent[20:])

    assert reader.succeeded and reader.error is None
    assert reader.usage == {"prompt_tokens": 7, "completion_tokens": 0}
    assert taken(reader) == sent.replace(b'"weights"', b'"embed-small"')


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "the runtime's answer is empty"),
        (b"<html>busy</html>", "the runtime's answer is not JSON"),
        (answer([0.5, 1.5])[:-40], "the runtime's answer is not JSON"),
        (answer([0.5, 1.5])[:90], "the runtime's answer is not JSON"),
        (answer(), "the runtime answered without a vector"),
        (answer([0.5], []), "the runtime answered without a vector"),
        (answer([0.5], ""), "the runtime answered without a vector"),
        (answer([0.5], None), "the runtime answered without a vector"),
        (answer([0.5], True), "the runtime answered without a vector"),
        (answer([0.5], {"vector": [0.5]}), "the runtime answered without a vector"),
        (answer([[0.5], [1.5]]), "the runtime answered without a vector"),
        (b'{"object": "list", "model": "weights"}', "the runtime answered without a vector"),
        (b'{"object": "list", "data": [{"object": "embedding"}]}', "the runtime answered without a vector"),
        (b'{"error": {"message": "out of memory"}}', "out of memory"),
        (b'{"error": "model not found"}', "model not found"),
        (answer([0.5], error={"message": "half of it"}), "half of it"),
    ],
)
def test_what_is_no_vector_is_an_error_whatever_its_status(sent: bytes, words: str) -> None:
    reader = read(sent)

    assert not reader.succeeded
    assert reader.error == words
    assert taken(reader) == b""


def test_a_name_that_is_not_there_is_put_in_and_one_that_hides_is_found() -> None:
    nameless = json.dumps({"data": [{"embedding": [1.5]}]}).encode()
    assert json.loads(taken(read(nameless)))["model"] == "embed-small"
    twice = answer([1.5], note={"model": "other"})
    found = json.loads(taken(read(twice)))
    assert (found["model"], found["note"]) == ("embed-small", {"model": "other"})


def test_a_large_answer_comes_in_pieces_and_one_too_large_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis hangs up on a subscriber that is some megabytes behind."""
    sent = answer(*[[0.123456789] * 1024] * 128)
    reader = read(sent)
    pieces = list(iter(reader.take, b""))
    assert max(map(len, pieces)) == whole.PIECE_BYTES
    assert len(pieces) > 5
    assert json.loads(b"".join(pieces))["data"] == json.loads(sent)["data"]
    monkeypatch.setattr(whole, "ANSWER_BYTES_MAX", len(sent) - 1)
    assert "send fewer inputs" in str(read(sent).error)


floats = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4)
texts = st.text(min_size=1).map(lambda text: text.encode(errors="replace").hex())


@given(vectors=st.lists(floats | texts, min_size=1, max_size=5), name=st.text(), indent=st.sampled_from([None, 1]))
def test_no_number_is_lost_however_it_is_written(vectors: list[Any], name: str, indent: int | None) -> None:
    """The vectors are stepped over and not parsed: the step must not take anything else for one."""
    said = json.loads(answer(*vectors)) | {"model": name, "about": {"embedding": "none", "list": [["embedding"]]}}
    reader = EmbeddingReader("embed-small")
    reader.feed(json.dumps(said, indent=indent).encode())
    reader.end()

    assert json.loads(taken(reader)) == said | {"model": "embed-small"}
