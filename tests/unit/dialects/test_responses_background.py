"""The numbers of a background response: the same for all who follow, and those of a void attempt are told apart."""

import json
from typing import Any

import pytest

from broker.dialects.responses_background import ATTEMPT, BackgroundEvents, stands
from broker.dialects.responses_stream import final_response
from tests.unit.dialects.runtime_streams import VLLM_REASONING
from tests.unit.dialects.test_responses_stream import JOB, read

BODY = json.dumps({"model": "m", "input": "Hello", "background": True, "instructions": "Be kind."}).encode()


def events_of(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]


def told(after: int = -1, *, attempt: int = 1, stream: bytes = b"") -> list[dict[str, Any]]:
    """Everything that a client hears which has the events up to `after`, a frame for each event."""
    events = BackgroundEvents(BODY, job_id=JOB, model="m", after=after)
    raw = events.opening()
    for one in (stream or read(VLLM_REASONING)[0]).split(b"\n\n")[:-1]:
        raw += events.passing(attempt, one + b"\n\n")
    return events_of(raw)


def test_the_events_are_the_workers_behind_an_opening_of_our_own() -> None:
    worker = events_of(read(VLLM_REASONING)[0])
    heard = told()
    assert [event["sequence_number"] for event in heard] == list(range(len(worker) + 1))
    assert [event["type"] for event in heard[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [{**event, "sequence_number": 0} for event in heard[2:]] == [
        {**event, "sequence_number": 0} for event in worker[1:]
    ]
    created = heard[0]["response"]
    assert (created["status"], created["background"], created["store"]) == ("queued", True, True)
    assert created["instructions"] == "Be kind." and heard[1]["response"]["instructions"] is None


@pytest.mark.parametrize("attempt", [1, 3])
def test_from_every_number_on_it_is_exactly_the_rest(attempt: int) -> None:
    whole = told(attempt=attempt)
    for after in [-1, *(event["sequence_number"] for event in whole)]:
        rest = told(after, attempt=attempt)
        assert rest == [event for event in whole if event["sequence_number"] > after]


def test_frames_of_several_events_are_counted_like_single_ones() -> None:
    stream = read(VLLM_REASONING)[0]
    events = BackgroundEvents(BODY, job_id=JOB, model="m", after=4)
    assert events_of(events.opening() + events.passing(1, stream)) == told(4)


@pytest.mark.parametrize(
    ("after", "attempt", "seq", "good"),
    [
        (0, 7, 1, True),  # only the opening was told: it is the same for every attempt
        (1, 2, 9, True),
        (2, 1, 1, True),
        (ATTEMPT + 1, 1, 1, True),
        (2, 0, 1, True),  # the end of a job that was never claimed
        (2, 2, 1, False),
        (ATTEMPT + 2, 2, 1, True),
        (ATTEMPT + 2, 1, 1, False),
        (ATTEMPT + 2, 3, 1, False),
        (5, 1, 6, False),  # an end behind frames that were dropped
    ],
)
def test_a_number_says_of_which_attempt_it_is(after: int, attempt: int, seq: int, good: bool) -> None:
    assert stands(after, attempt, seq) is good


def test_each_attempt_counts_on_its_own() -> None:
    assert [event["sequence_number"] for event in told(attempt=3)[:4]] == [0, 1, 2 * ATTEMPT + 2, 2 * ATTEMPT + 3]
    events = BackgroundEvents(BODY, job_id=JOB, model="m")
    events.opening()
    assert events.goes_on(1) and events.goes_on(4)
    events.passing(2, read(VLLM_REASONING)[0])
    assert events.goes_on(2) and not events.goes_on(3)


@pytest.mark.parametrize(("status", "error"), [("failed", {"code": "server_error"}), ("cancelled", None)])
def test_a_bad_end_has_the_number_behind_the_last(status: Any, error: Any) -> None:
    stream = b"".join(one + b"\n\n" for one in read(VLLM_REASONING)[0].split(b"\n\n")[:5])
    whole = told(stream=stream)
    last = whole[-1]["sequence_number"]
    for after in (-1, 3, last):
        events = BackgroundEvents(BODY, job_id=JOB, model="m", after=after)
        events.opening()
        events.passing(1, stream)
        [end] = events_of(events.ended(1, status, error))
        assert (end["type"], end["sequence_number"]) == ("response.failed", last + 1)
        assert (end["response"]["status"], end["response"]["error"]) == (status, error)
    seen_it = BackgroundEvents(BODY, job_id=JOB, model="m", after=last + 1)
    assert seen_it.opening() + seen_it.passing(1, stream) + seen_it.ended(1, status, error) == b""


def test_a_bad_end_before_the_first_token_comes_behind_the_opening() -> None:
    for attempt, number in ((0, 2), (1, 2), (2, ATTEMPT + 2)):
        events = BackgroundEvents(BODY, job_id=JOB, model="m")
        events.opening()
        assert events_of(events.ended(attempt, "cancelled", None))[0]["sequence_number"] == number


def test_what_ends_the_stream_alone_counts_as_none_of_the_events() -> None:
    """Whoever goes on from its number misses nothing; and it holds what makes the SDKs raise."""
    events = BackgroundEvents(BODY, job_id=JOB, model="m")
    assert events_of(events.broken("x", "y"))[0]["sequence_number"] == 0
    events.opening()
    [said] = events_of(events.broken("broker_unavailable", "go on later"))
    assert said["error"] == {"code": "broker_unavailable", "message": "go on later"}
    assert (said["type"], said["sequence_number"], said["message"]) == ("error", 1, "go on later")


def test_the_response_that_an_answer_ends_with_is_given_in_its_own_bytes() -> None:
    stream = read(VLLM_REASONING, background=True)[0]
    assert json.loads(final_response(stream)) == events_of(stream)[-1]["response"]
    assert json.loads(final_response(stream))["background"] is True
    with pytest.raises(ValueError, match="no end"):
        final_response(stream[: stream.rfind(b"event: response.completed")])
