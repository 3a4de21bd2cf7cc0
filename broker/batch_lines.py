"""One line of a batch: what is asked in it, what is wrong with it, and what is written of it. Pure.

A line that is wrong is a line of the error file, and the others go on: a bot that made one bad line of ten thousand
wants the other answers.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from broker import requests
from broker.dialects import openai
from broker.dialects.bounds import too_many_values
from broker.keyspace import digest
from broker.whole import FOLDS

LINES_MAX: Final = 50_000
LINE_BYTES_MAX: Final = 20 << 20
"""What a body may have anywhere."""
NAME_MAX: Final = 512

ENDPOINTS: Final = tuple(path for path in requests.ENDPOINTS if path in FOLDS)
"""What a batch may ask for: OpenAI's dialect."""

_OF_A_STREAM = ("stream", "stream_options")
_SHOWN = 60


@dataclass(frozen=True)
class Line:
    """What was read of a line; `code` and `message` say what is wrong with it, "" = nothing."""

    number: int
    custom_id: str = ""
    body: bytes = b""
    code: str = ""
    message: str = ""

    @property
    def name(self) -> str:
        """By what a second line with the same custom_id is found, "" where it has none."""
        return digest(self.custom_id) if self.custom_id else ""

    def wrong(self, code: str, message: str) -> "Line":
        """The same line, with what is wrong with it."""
        return Line(self.number, self.custom_id, b"", code, f"line {self.number}: {message}")


def read_line(line: bytes, *, number: int, endpoint: str) -> Line:
    """Reads a line: an object with `custom_id`, `method`, `url` and `body`."""
    found = Line(number)
    if len(line) > LINE_BYTES_MAX:
        return found.wrong("line_too_long", f"it has more than {LINE_BYTES_MAX} bytes")
    if too_many_values(line):
        return found.wrong("invalid_json_line", "it holds too many values")
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is one
        return found.wrong("invalid_json_line", "it is not JSON")
    if not isinstance(said, dict):
        return found.wrong("invalid_json_line", "it is no JSON object")
    name = said.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= NAME_MAX:
        return found.wrong("invalid_custom_id", f"custom_id must be text of 1 to {NAME_MAX} characters")
    found = Line(number, name)
    if said.get("method") != "POST":
        return found.wrong("invalid_method", "method must be POST")
    if said.get("url") != endpoint:
        return found.wrong("invalid_url", f"url must be {endpoint}, as the batch's endpoint is")
    if not isinstance(body := said.get("body"), dict):
        return found.wrong("invalid_body", "body must be an object")
    try:
        return Line(number, name, body_of(body))
    except RecursionError:
        return found.wrong("invalid_body", "body is nested too deeply")


def body_of(said: dict[str, Any]) -> bytes:
    """The request as its endpoint reads it: nobody waits for a stream here."""
    kept = {key: value for key, value in said.items() if key not in _OF_A_STREAM}
    return json.dumps(kept, separators=(",", ":")).encode()


def answered(job_id: str, custom_id: str, body: bytes) -> bytes:
    """The line of an answer, whose body is JSON; on one line for every client, so in ASCII."""
    if not body.isascii():
        body = json.dumps(json.loads(body), separators=(",", ":")).encode()
    for at_an_end in (b"\n", b"\r"):
        body = body.replace(at_an_end, b" ")
    head = {"id": f"batch_req_{job_id}", "custom_id": custom_id}
    said = {"status_code": 200, "request_id": job_id}
    return _json(head)[:-1] + b',"response":' + _json(said)[:-1] + b',"body":' + body + b'},"error":null}'


def unanswered(job_id: str, custom_id: str, *, code: str, message: str, status: int = 0) -> bytes:
    """The line of a request without an answer; `status` is that of a runtime that refused it."""
    response = error = None
    if status:
        told = openai.error_object(code, message, kind="invalid_request_error", param=None, retry_after_s=None)
        response = {"status_code": status, "request_id": job_id, "body": told}
    else:
        error = {"code": code, "message": message}
    return _json({"id": f"batch_req_{job_id}", "custom_id": custom_id or None, "response": response, "error": error})


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
