"""Every error of the broker has words, a status and a type at the door; nothing that waiting cures lacks a time."""

import json
import logging

import pytest

from api import errors as told
from broker import errors
from broker.records import Frame


def leaves(kind: type[errors.BrokerError] = errors.BrokerError) -> list[type[errors.BrokerError]]:
    found = [leaf for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for leaf in leaves(sub)]
    return found if not kind.__dict__.get("code") or kind is errors.BrokerError else [kind, *found]


def terminal(code: str, message: str = "it broke", **more: object) -> Frame:
    return Frame(1, 2, "failed", json.dumps({"code": code, "message": message, **more}).encode())


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_leaf_has_a_row(kind: type[errors.BrokerError]) -> None:
    """Whoever adds an error decides what its client hears."""
    row = told.ROWS[kind]
    assert 400 <= row.status < 600
    assert (row.status in (429, 503)) == (row.retry_after_s is not None)


def test_codes_are_unique() -> None:
    """A terminal frame names its error by the code alone."""
    codes = [kind.code for kind in leaves()]
    assert len(codes) == len(set(codes))


def test_a_refusal_in_the_words_of_the_dialect() -> None:
    wrong = told.wrong(errors.LaneFull("big", retry_after_s=4))
    assert (wrong.status, dict(wrong.headers())[b"retry-after"]) == (503, b"4")
    assert json.loads(wrong.body())["error"] == {
        "message": "lane big is full; try again in 4 s",
        "type": "service_unavailable",
        "param": None,
        "code": "lane_full",
        "retry_after_s": 4,
    }
    assert b"retry_after_s" in wrong.event() and b"[DONE]" not in wrong.event()


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_for_clients_of_ollama(kind: type[errors.BrokerError]) -> None:
    """They take `error` for a text; what is beside it is for whoever knows us."""
    wrong = told.Wrong(kind.code, "it is so", told.ROWS[kind].status, "x", retry_after_s=told.ROWS[kind].retry_after_s)
    body = json.loads(wrong.body("/api/chat"))
    assert isinstance(body["error"], str) and body["error"].endswith("it is so") and body["code"] == kind.code
    assert body.get("retry_after_s") == told.ROWS[kind].retry_after_s
    assert json.loads(wrong.event("/api/generate")) == body and wrong.event("/api/generate").endswith(b"}\n")


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_for_clients_of_anthropic(kind: type[errors.BrokerError]) -> None:
    """What waiting cures is an overload to them; a status of ours that they do not know would not be tried again."""
    row = told.ROWS[kind]
    wrong = told.Wrong(kind.code, "it is so", row.status, "x", retry_after_s=row.retry_after_s)
    body = json.loads(wrong.body("/v1/messages"))
    assert body["type"] == "error" and body["error"]["message"] == "it is so" and body["error"]["code"] == kind.code
    assert body["error"].get("retry_after_s") == row.retry_after_s
    status = wrong.status_at("/v1/messages/count_tokens")
    assert status == {503: 529, 502: 500}.get(row.status, row.status)
    assert (body["error"]["type"] == "overloaded_error") == (row.status == 503)
    assert (
        wrong.event("/v1/messages")
        == b"event: error\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
    )


def test_a_client_of_ollama_finds_the_words_it_looks_for() -> None:
    assert "not found" in json.loads(told.wrong(errors.UnknownModel("x")).body("/api/show"))["error"]


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (12, 12), (900, 30)])
def test_retry_after_stays_within_what_clients_accept(asked: int, given: int) -> None:
    """Clients do not retry at all, or sleep for hours, over a long one."""
    assert told.wrong(errors.LaneFull("big", retry_after_s=asked)).retry_after_s == given


def test_the_part_of_the_request_that_is_to_blame_is_named() -> None:
    assert told.wrong(errors.BadRequest("n must be a number", "n")).param == "n"
    assert told.wrong(errors.UnknownModel("bigg")).param == "model"
    assert told.wrong(errors.UnknownLane("fats")).param == "X-Gateway-Lane"


def test_a_missing_key_says_how_to_send_one() -> None:
    wrong = told.wrong(errors.Unauthorized("this gateway needs a key"))
    assert (wrong.status, dict(wrong.headers())[b"www-authenticate"]) == (401, b"Bearer")


def test_the_runtimes_own_refusal_keeps_its_status() -> None:
    """The request's own fault: a client that repeats it gets the same."""
    assert told.ended(terminal("runtime_refused", status=422)).status == 422
    assert told.ended(terminal("runtime_refused", status=422)).retry_after_s is None
    assert told.ended(terminal("runtime_refused", status=503)).status == 400
    assert told.wrong(errors.RuntimeRefused("no", status=415)).status == 415


@pytest.mark.parametrize("code", ["expired", "cold_start_deadline"])
def test_a_wait_in_vain_says_how_the_lane_drains(code: str) -> None:
    assert told.ended(terminal(code), retry_after_s=17).retry_after_s == 17
    assert told.ended(terminal(code), retry_after_s=99).retry_after_s == 30


def test_a_lost_worker_may_be_tried_again_at_once() -> None:
    wrong = told.ended(terminal("worker_lost"), retry_after_s=17)
    assert (wrong.status, wrong.retry_after_s) == (503, 1)


def test_no_client_repeats_a_cancelled_job() -> None:
    """SDKs repeat 408, 409, 429 and everything from 500."""
    frame = Frame(1, 2, "cancelled", b'{"code":"cancelled","message":"its caller did"}')
    assert told.ended(frame).status == 499


def test_a_code_that_a_newer_worker_wrote_is_a_failure_of_the_runtime() -> None:
    assert (told.ended(terminal("what_is_this")).status, told.ended(terminal("what_is_this")).code) == (
        502,
        "what_is_this",
    )


def test_an_error_without_a_name_is_logged_under_a_number(caplog: pytest.LogCaptureFixture) -> None:
    """The client gets the number, the log the cause."""
    with caplog.at_level(logging.ERROR):
        wrong = told.wrong(errors.BrokerError("submit: WRONGTYPE"))
    assert (wrong.status, wrong.code) == (500, "internal_error")
    number = wrong.message.rsplit(" ", 1)[-1]
    assert number in caplog.text and "WRONGTYPE" not in wrong.message
