"""Every error of the broker has words, a status and a type at the door; nothing that waiting cures lacks a time."""

import json
import logging

import pytest

from api import errors as told
from api.voices import CountedVoice
from broker import errors
from broker.records import Frame


def leaves(kind: type[errors.BrokerError] = errors.BrokerError) -> list[type[errors.BrokerError]]:
    found = [leaf for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for leaf in leaves(sub)]
    return found if not kind.__dict__.get("code") or kind is errors.BrokerError else [kind, *found]


def of_row(kind: type[errors.BrokerError]) -> told.Wrong:
    """What a client hears of an error of this kind, but for its words."""
    row = told.ROWS[kind]
    return told.Wrong(kind.code, "it is so", row.status, row.kind, retry_after_s=row.retry_after_s)


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
    dialect = told.dialect_of("/v1/chat/completions")
    assert json.loads(dialect.body(wrong))["error"] == {
        "message": "lane big is full; try again in 4 s",
        "type": "service_unavailable",
        "param": None,
        "code": "lane_full",
        "retry_after_s": 4,
    }
    assert b"retry_after_s" in dialect.event(wrong) and b"[DONE]" not in dialect.event(wrong)


OPENAIS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/embeddings": "input",
    "/v1/responses": "input",
}
"""The endpoints of OpenAI's dialects, and what each calls its prompt."""


@pytest.mark.parametrize("path", OPENAIS)
@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_for_clients_of_openai(kind: type[errors.BrokerError], path: str) -> None:
    """Their object has a type and a code, and when to come back where that helps."""
    row, dialect, wrong = told.ROWS[kind], told.dialect_of(path), of_row(kind)
    error = json.loads(dialect.body(wrong))["error"]
    assert (error["message"], error["type"], error["code"]) == ("it is so", row.kind, kind.code)
    assert error.get("retry_after_s") == row.retry_after_s
    assert error["param"] == (OPENAIS[path] if kind is errors.ContextTooLong else None)
    assert dialect.status(wrong) == row.status
    assert dialect.event(wrong) == b"data: " + dialect.body(wrong) + b"\n\n"


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_in_a_stream_of_responses(kind: type[errors.BrokerError]) -> None:
    """Codex tries again by itself after two codes, and reads in the words when; all others are final."""
    row = told.ROWS[kind]
    said = CountedVoice(b'{"model":"big","input":"hi"}', "1", "big").failed(of_row(kind))
    created, _, failed = [json.loads(line[6:]) for line in said.decode().split("\n") if line.startswith("data: ")]
    assert (created["type"], failed["type"]) == ("response.created", "response.failed")
    error = failed["response"]["error"]
    assert error["reason"] == kind.code and error["message"].startswith("it is so")
    if kind is errors.ContextTooLong:
        assert error["code"] == "context_length_exceeded"
    elif row.retry_after_s is not None:
        assert error["code"] == "rate_limit_exceeded" and f"try again in {row.retry_after_s}s" in error["message"]
    else:
        assert error["code"] == ("invalid_prompt" if row.status < 500 else "server_error")


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_for_clients_of_ollama(kind: type[errors.BrokerError]) -> None:
    """They take `error` for a text; what is beside it is for whoever knows us."""
    dialect, wrong = told.dialect_of("/api/chat"), of_row(kind)
    body = json.loads(dialect.body(wrong))
    assert isinstance(body["error"], str) and body["error"].endswith("it is so") and body["code"] == kind.code
    assert body.get("retry_after_s") == told.ROWS[kind].retry_after_s
    assert body.keys() <= {"error", "code", "retry_after_s"}
    assert dialect.status(wrong) == wrong.status
    assert json.loads(dialect.event(wrong)) == body and dialect.event(wrong).endswith(b"}\n")


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.__name__)
def test_every_error_has_words_for_clients_of_anthropic(kind: type[errors.BrokerError]) -> None:
    """What waiting cures is an overload to them; a status of ours that they do not know would not be tried again."""
    row, dialect, wrong = told.ROWS[kind], told.dialect_of("/v1/messages"), of_row(kind)
    body = json.loads(dialect.body(wrong))
    assert body["type"] == "error" and body["error"]["message"] == "it is so" and body["error"]["code"] == kind.code
    assert body["error"].get("retry_after_s") == row.retry_after_s
    assert "param" not in body["error"]
    assert dialect.status(wrong) == {503: 529, 502: 500}.get(row.status, row.status)
    assert (body["error"]["type"] == "overloaded_error") == (row.status == 503)
    assert dialect.event(wrong) == b"event: error\ndata: " + dialect.body(wrong) + b"\n\n"


def test_every_path_speaks_one_dialect() -> None:
    """Also where nothing is served, such as a page of an Ollama that we do not have."""
    openais = [told.dialect_of(path) for path in (*OPENAIS, "/v1/jobs/1", "/nothing", "")]
    ollamas = {told.dialect_of(f"/api/{path}") for path in ("chat", "generate", "embed", "embeddings", "show", "pull")}
    anthropics = {told.dialect_of(path) for path in ("/v1/messages", "/v1/messages/count_tokens")}
    assert len(ollamas) == len(anthropics) == 1
    assert not {*openais} & (ollamas | anthropics)
    assert openais[-1] is openais[0], "what is of no endpoint speaks as chat does"


def test_a_client_of_ollama_finds_the_words_it_looks_for() -> None:
    body = told.dialect_of("/api/show").body(told.wrong(errors.UnknownModel("x")))
    assert "not found" in json.loads(body)["error"]


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (12, 12), (900, 30)])
def test_retry_after_stays_within_what_clients_accept(asked: int, given: int) -> None:
    """Clients do not retry at all, or sleep for hours, over a long one."""
    assert told.wrong(errors.LaneFull("big", retry_after_s=asked)).retry_after_s == given


def test_the_part_of_the_request_that_is_to_blame_is_named() -> None:
    assert told.wrong(errors.BadRequest("n must be a number", "n")).param == "n"
    assert told.wrong(errors.UnknownModel("bigg")).param == "model"
    assert told.wrong(errors.UnknownLane("fats")).param == "X-Gateway-Lane"


def test_a_prompt_that_the_runtime_finds_too_long_is_to_blame_too() -> None:
    """Also when it said so after the job was let in."""
    body = told.dialect_of("/v1/responses").body(told.ended(terminal("context_length_exceeded")))
    assert json.loads(body)["error"]["param"] == "input"


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
