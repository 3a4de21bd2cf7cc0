"""An attempt at vectors, and one at a remote provider: what is sent, what counts as an answer, what is never told."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.dialects import vectors as whole
from broker.lifecycle import State
from tests.support.broker_world import fake_world
from tests.unit.test_attempt import Answer, Bench, refuses, runtime
from workers.attempt import Attempt, Ended, Refusal
from workers.runtimes.base import Endpoint
from workers.runtimes.http_server import Exchange

KEY = "sk-very-secret-0123"
PROVIDER = Endpoint("", {"Authorization": f"Bearer {KEY}"}, model="weights", key_env="EXAMPLE_API_KEY", metered=True)


class Listening(Bench):
    """Hears what the attempt says of its runtime."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.refusals: list[Refusal] = []

    async def claim(self, **fields: Any) -> Attempt:
        attempt = await super().claim(**fields)
        attempt._on_refusal = self.refusals.append
        return attempt


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Listening]:
    async with fake_world() as world, runtime() as (url, answers, bodies):
        await world.apply()
        await world.warm(big=2)
        bench = Listening(world, url, answers)
        bench.bodies = bodies
        yield bench
        bench.client.close()


async def vectors(bench: Bench, *answers: Answer) -> Ended:
    bench.body = json.dumps({"model": "big", "input": ["a", "b"], "encoding_format": "base64"}).encode()
    return await bench.run(*answers, endpoint="/v1/embeddings", stream=False)


def answers_with(value: Any, *, status: int = 200) -> Answer:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer(value, status=status)

    return answer


def busy(status: int, **headers: str) -> Answer:
    """A provider that is busy, says for how long, and repeats the key as some do."""

    async def answer(exchange: Exchange) -> None:
        body = json.dumps({"error": {"message": f"slow down, {KEY}"}}).encode()
        lines = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
        exchange.started = True
        await exchange._connection.send("\r\n".join([*lines, "", ""]).replace("_", "-").encode() + body)

    return answer


GOOD = {
    "object": "list",
    "model": "weights",
    "data": [{"object": "embedding", "index": index, "embedding": "AACAPwAAAEA="} for index in range(2)],
    "usage": {"prompt_tokens": 7, "total_tokens": 7},
}


async def test_vectors_are_asked_for_and_told_as_they_come(bench: Bench) -> None:
    ended = await vectors(bench, answers_with(GOOD))

    assert bench.bodies == [{"model": "weights", "input": ["a", "b"], "encoding_format": "base64"}]
    assert (ended.outcome, ended.clean, ended.suspect) == ("done", True, False)
    assert ended.usage == {"prompt_tokens": 7, "completion_tokens": 0}
    assert 0 < ended.first_token_ms <= ended.total_ms
    log = await bench.log()
    assert [kind for kind, _ in log] == ["content", "done"]
    assert json.loads(log[0][1]) == GOOD | {"model": "big"}
    record = await bench.record()
    assert record.first_token_at > 0
    assert json.loads(record.usage)["prompt_tokens"] == 7


async def test_a_large_answer_is_logged_in_pieces(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one frame it would be more than Redis lets a subscriber lag behind."""
    monkeypatch.setattr(whole, "PIECE_BYTES", 64)
    assert (await vectors(bench, answers_with(GOOD))).outcome == "done"

    pieces = [data for kind, data in await bench.log() if kind == "content"]
    assert len(pieces) > 3 and max(map(len, pieces)) == 64
    assert json.loads(b"".join(pieces)) == GOOD | {"model": "big"}


@pytest.mark.parametrize("said", [{"error": {"message": "out of memory"}}, GOOD | {"data": []}], ids=["error", "none"])
async def test_a_200_without_a_vector_is_a_failure(bench: Bench, said: dict[str, Any]) -> None:
    """It starts again, as any failure that nobody has seen; after its last loss the client is told."""
    assert (await vectors(bench, answers_with(said))).outcome == "released"
    assert (await bench.record()).state is State.QUEUED
    assert [kind for kind, _ in await bench.log() if kind == "content"] == []


async def test_an_input_beyond_the_batch_is_the_requests_own_fault(bench: Bench) -> None:
    """llama-server answers 500 to it, which would be tried again and again, on every host."""
    words = "input (2202 tokens) is too large to process. increase the physical batch size (current batch size: 256)"
    assert (await vectors(bench, refuses(500, words, "server_error"))).outcome == "failed"
    assert (await bench.said())["code"] == "context_length_exceeded"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_sets_the_model_aside_and_is_never_told(
    bench: Listening, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench.endpoint = PROVIDER
    caplog.set_level(logging.DEBUG)
    ended = await bench.run(busy(status))

    words = f"the provider refused the key that is in EXAMPLE_API_KEY ({status})"
    assert bench.refusals == [Refusal(reason=words)]
    assert ended.outcome == "released", "the request is not to blame: it may start again elsewhere"
    record = await bench.record()
    assert KEY not in caplog.text + repr(record) + repr(PROVIDER) + repr(ended)


@pytest.mark.parametrize(
    ("answer", "pause_s"),
    [
        (busy(429, retry_after="20"), 20.0),
        (busy(503, retry_after="900"), 60.0),
        (busy(429), 1.0),
        (busy(429, retry_after="Fri, 31 Dec 2027 23:59:59 GMT"), 1.0),
        (busy(500, retry_after="20"), 0.0),
    ],
)
async def test_a_busy_provider_is_left_alone_for_as_long_as_it_asks(
    bench: Listening, answer: Answer, pause_s: float
) -> None:
    bench.endpoint = PROVIDER
    ended = await bench.run(answer)

    assert ended.outcome == "released"
    assert bench.refusals == ([Refusal(pause_s)] if pause_s else [])


async def test_the_words_of_a_provider_are_told_without_the_key(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.endpoint = PROVIDER
    caplog.set_level(logging.DEBUG)
    await bench.run(busy(501, retry_after="20"))

    assert (await bench.record()).error_message == "the runtime answered 501: slow down, *** (try again in 20 s)"
    assert "the runtime answered 501" in caplog.text and "slow down" not in caplog.text  # it may repeat the prompt
    assert KEY not in caplog.text


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    """Where it leads to, nobody has allowed the prompt and the key to go."""
    bench.endpoint = PROVIDER
    ended = await bench.run(busy(307, location=f"{bench.url}/elsewhere"))

    assert len(bench.bodies) == 1
    assert ended.outcome == "failed"
    assert "the runtime answered 307" in (await bench.said())["message"]
