"""The dialect's words as the real anthropic SDK understands them, without a network in between."""

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic as sdk
import httpx2
import pytest

from broker.dialects import anthropic
from broker.dialects.anthropic_fold import fold_messages
from broker.dialects.anthropic_stream import PassingReader, TranslatingReader
from tests.unit.dialects import runtime_streams as streams
from tests.unit.dialects.runtime_streams import DONE, call, llama
from tests.unit.dialects.test_anthropic_stream import NATIVE

BEAT = anthropic.heartbeat("waiting in lane deep-coder behind 2, deep-coder is cold, about 12 s to the first token")
ASK: dict[str, Any] = {"model": "deep-coder", "max_tokens": 64, "messages": [{"role": "user", "content": "Read a.py."}]}


def answered(*parts: bytes, status: int = 200, headers: dict[str, str] | None = None) -> sdk.Anthropic:
    """Gives a client whose every request is answered with these parts."""
    return _client([httpx2.Response(status, headers=_headers(headers, status), stream=_Parts(parts))])


def _client(answers: list[httpx2.Response]) -> sdk.Anthropic:
    left = iter(answers)
    transport = httpx2.MockTransport(lambda _request: next(left))
    return sdk.Anthropic(api_key="key", base_url="http://gateway", http_client=httpx2.Client(transport=transport))


def _headers(more: dict[str, str] | None, status: int) -> dict[str, str]:
    kind = "text/event-stream; charset=utf-8" if status == 200 else "application/json"
    return {"content-type": kind} | (more or {})


class _Parts(httpx2.SyncByteStream):
    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts


def through(stream: bytes, *, native: bool = False) -> bytes:
    """Reads a runtime's stream to its end."""
    reader = PassingReader("deep-coder") if native else TranslatingReader("deep-coder", "1")
    reader.feed(stream)
    taken = reader.take()
    reader.end()
    return taken + reader.take()


TOOLS = through(
    llama({"reasoning_content": "I must read."})
    + llama({"content": "I read."})
    + llama(call(0, id="c0", name="read", arguments='{"path":'))
    + llama(call(0, arguments='"ä.py"}'))
    + llama(call(1, id="c1", name="list", arguments=""))
    + llama({}, "tool_calls")
    + streams.usage_chunk("tiny")
    + DONE
)


def hold_to_the_answer(message: sdk.types.Message) -> None:
    thinking, text, read, listing = message.content
    assert thinking.type == "thinking" and thinking.thinking == "I must read."
    assert text.type == "text" and text.text == "I read."
    assert read.type == "tool_use" and (read.id, read.name, read.input) == ("c0", "read", {"path": "ä.py"})
    assert listing.type == "tool_use" and (listing.name, listing.input) == ("list", {})
    assert message.stop_reason == "tool_use" and message.model == "deep-coder"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (7, 24)
    assert message.usage.output_tokens == 7


def test_pings_before_and_between_the_events_disturb_no_stream() -> None:
    """A cold start: the first bytes of the answer are heartbeats, long before `message_start`."""
    parts = [BEAT, BEAT, *(event + b"\n\n" + BEAT for event in TOOLS.split(b"\n\n") if event)]
    with answered(*parts).messages.stream(**ASK) as stream:
        said = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert said == "I read."
    hold_to_the_answer(message)


def test_raw_events_come_out_of_a_plain_stream_too() -> None:
    events = list(answered(BEAT, TOOLS).messages.create(**ASK, stream=True))
    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


def test_a_folded_answer_is_a_message() -> None:
    client = answered(b" " * 3 + fold_messages(TOOLS), headers={"content-type": "application/json"})
    hold_to_the_answer(client.messages.create(**ASK))


@pytest.mark.parametrize("case", NATIVE)
def test_a_runtimes_own_answer_is_a_message(case: str) -> None:
    with answered(BEAT, through(NATIVE[case], native=True)).messages.stream(**ASK) as stream:
        message = stream.get_final_message()
    whole = json.loads(fold_messages(NATIVE[case]))
    assert message.content[0].type == "text" and message.content[0].text == whole["content"][0]["text"]
    assert message.usage.output_tokens == whole["usage"]["output_tokens"]


def test_a_loss_in_the_middle_is_the_clients_own_error() -> None:
    half = TOOLS.split(b"event: content_block_stop")[0]
    event = anthropic.error_event("worker_lost", "the worker is gone", status=503, retry_after_s=1)
    with pytest.raises(sdk.APIStatusError, match="overloaded_error") as lost:
        with answered(half, event).messages.stream(**ASK) as stream:
            for _ in stream:
                pass
    assert lost.value.status_code == 200  # so it is not repeated by itself: half of it may have been shown
    assert lost.value.body["error"]["code"] == "worker_lost"  # type: ignore[index]


def test_a_loss_before_the_first_token_is_the_clients_own_error() -> None:
    event = anthropic.error_event("cold_start_deadline", "the model was not warm in time", status=503)
    with pytest.raises(sdk.APIStatusError, match="not warm in time"):
        with answered(BEAT, event).messages.stream(**ASK) as stream:
            stream.get_final_message()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, sdk.BadRequestError),
        (401, sdk.AuthenticationError),
        (403, sdk.PermissionDeniedError),
        (404, sdk.NotFoundError),
        (413, sdk.APIStatusError),
        (422, sdk.UnprocessableEntityError),
        (429, sdk.RateLimitError),
        (500, sdk.InternalServerError),
        (503, sdk.InternalServerError),
        (504, sdk.InternalServerError),
    ],
)
def test_a_status_at_the_door_is_the_clients_own_error(status: int, kind: type[sdk.APIStatusError]) -> None:
    body = json.dumps(anthropic.error_object("code", "some words", status=status)).encode()
    client = answered(body, status=anthropic.own_status(status)).with_options(max_retries=0)
    with pytest.raises(kind, match="some words") as refused:
        client.messages.create(**ASK)
    assert refused.value.status_code == anthropic.own_status(status)


def test_a_refusal_is_tried_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    refusal = json.dumps(anthropic.error_object("lane_full", "full", status=503, retry_after_s=2)).encode()
    busy = httpx2.Response(529, headers={"retry-after": "2", "content-type": "application/json"}, content=refusal)
    good = httpx2.Response(200, headers={"content-type": "application/json"}, content=fold_messages(TOOLS))
    hold_to_the_answer(_client([busy, good]).messages.create(**ASK))
    assert slept == [2.0]


def test_a_count_is_an_answer() -> None:
    count = json.dumps(anthropic.token_count(anthropic.read_messages(json.dumps(ASK).encode()).prompt_tokens)).encode()
    client = answered(count, headers={"content-type": "application/json"})
    asked = {key: value for key, value in ASK.items() if key != "max_tokens"}
    assert client.messages.count_tokens(**asked).input_tokens == 7
