"""One line of a batch: what is taken, what is refused and why, and what is written of it."""

import json
from typing import Any

import pytest

from broker import batch_lines
from broker.batch_lines import NAME_MAX, answered, read_line, unanswered
from tests.support.batch_files import CHAT, line


def read(said: dict[str, Any] | bytes) -> batch_lines.Line:
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    return read_line(raw, number=17, endpoint=CHAT)


def test_a_line_is_its_name_and_a_request_without_a_stream() -> None:
    asked = line("a")
    asked["body"] |= {"stream": True, "stream_options": {"include_usage": True}, "seed": 7}
    found = read(asked)
    assert (found.number, found.custom_id, found.code) == (17, "a", "")
    assert json.loads(found.body) == {"model": "big", "messages": asked["body"]["messages"], "seed": 7}


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (b'{"custom_id": ' + b"9" * 5_000 + b"}", "invalid_json_line"),
        ({}, "invalid_custom_id"),
        (line("x") | {"custom_id": 7}, "invalid_custom_id"),
        (line("x" * (NAME_MAX + 1)), "invalid_custom_id"),
        (line("x") | {"method": None}, "invalid_method"),
        (line("x", url="/v1/chat"), "invalid_url"),
        (line("x") | {"body": "text"}, "invalid_body"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(said: Any, code: str) -> None:
    found = read(said)
    assert found.code == code
    assert found.message.startswith("line 17: ")
    assert found.body == b""


def test_a_line_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LINE_BYTES_MAX", 10)
    assert read(b" " * 11).code == "line_too_long"


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0"])
def test_a_line_that_would_keep_the_scheduler_busy_for_seconds_is_not_read(value: bytes) -> None:
    """No body with so many values is read anywhere; and reading it beside the loop would hold the loop all the same."""
    raw = (
        json.dumps(line("a"))
        .encode()
        .replace(b'"messages"', b'"more": [' + b",".join([value] * 2_100_000) + b'], "messages"')
    )
    found = read(raw)
    assert found.code == "invalid_json_line" and "too many values" in found.message


def test_an_answer_is_one_line_for_every_client() -> None:
    body = json.dumps({"text": "a\u2028b\x85c ü", "more": [1]}, ensure_ascii=False, indent=2).encode()
    written = answered("batch_1-7", "näme", body)
    assert written.isascii() and len(written.decode().splitlines()) == 1
    said = json.loads(written)
    assert (said["id"], said["custom_id"], said["error"]) == ("batch_req_batch_1-7", "näme", None)
    assert said["response"] == {"status_code": 200, "request_id": "batch_1-7", "body": json.loads(body)}
    plain = json.loads(answered("j", "n", b'{\n "vectors": [1,\r\n 2]}'))
    assert plain["response"]["body"] == {"vectors": [1, 2]}


def test_a_request_without_an_answer_has_an_error_or_the_runtimes_refusal() -> None:
    said = json.loads(unanswered("j", "", code="invalid_json_line", message="line 1: no"))
    assert said == {
        "id": "batch_req_j", "custom_id": None, "response": None,
        "error": {"code": "invalid_json_line", "message": "line 1: no"},
    }  # fmt: skip
    said = json.loads(unanswered("j", "n", code="runtime_refused", message="no", status=422))
    assert (said["error"], said["response"]["status_code"]) == (None, 422)
    assert said["response"]["body"]["error"]["code"] == "runtime_refused"
