"""Whatever anybody sends: a real gateway answers as /openapi.json says, and never with a fault of its own.

schemathesis makes requests out of the document, right ones and wrong ones; what no document can describe (bytes that
are no JSON, depths, digits) is written out below. `-m long` tries many more of the former.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, CheckContext, Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from api import app
from api.openapi import Document
from broker.capabilities import EMBEDDING_ENDPOINTS
from broker.version import version
from tests.support.described import Book
from tests.support.gateway_process import House, house
from tests.support.worker_world import policy, simulated

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

A_JOB = "a-job"
NAMES = ["pretend", "vectors", "fast-edit", "nobody"]
UNSHRUNK = [phase for phase in Phase if phase is not Phase.shrink]
KEY = {"authorization": "Bearer secret-a"}
MODELS = {
    "pretend": simulated(maxConcurrent=8, maxQueue=50, memoryMb=1, contextTokens=600, options={"decodeTps": 20_000}),
    "vectors": simulated(maxConcurrent=8, maxQueue=50, memoryMb=1, contextTokens=600, embeddings=True),
}
ROUTING = [{"match": {"lane": "fast-edit"}, "target": "pretend"}]
CHECKS = [
    content_type_conformance, negative_data_rejection, response_headers_conformance,
    response_schema_conformance, status_code_conformance, unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    text = policy(MODELS, routing=ROUTING, headerHoldMs=300)
    with house(tmp_path_factory.mktemp("house") / "data", policy=text, GATEWAY_KEYS="ann:secret-a") as up:
        for name in MODELS:
            up.until_state(name, "warm")
        yield up
        assert "event=unexpected" not in up.output
        assert "starting it again" not in up.output, "a part of it broke down"


@pytest.fixture(scope="module")
def a_job(gateway: House) -> str:
    asked = {"model": "pretend", "messages": [{"role": "user", "content": "Hi"}]}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=asked, headers=KEY).headers["x-gateway-job"]


def narrowed() -> Any:
    """The document with names that there are, or nearly every request would end at a name that nobody knows."""
    known = {
        "model": NAMES,
        "job_id": [A_JOB, "nobody"],
        "file_id": ["file-nobody", "nobody"],
        "batch_id": ["batch_nobody", "nobody"],
        "name": ["pretend", "fast-edit", "nobody"],
        "host": ["nobody"],  # a drained one would serve nobody
        "X-Gateway-Lane": ["fast-edit", "nowhere"],
    }
    found = written()
    del found["paths"]["/v1/status/events"]  # a stream that has no end
    for name, schema in found["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema.get("required", ()):
            schema["properties"]["model"] = {"enum": known["model"]}
    for item in found["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in known and parameter["in"] != "query":  # a filter takes any name
                    parameter["schema"] = {"enum": known[parameter["name"]]}
    schema = schemathesis.openapi.from_dict(found)
    schema.config.generation.allow_extra_parameters = False  # a header that we do not know is nobody's fault
    return schema


def written() -> Any:
    routes = [*app.HOT, *(route for router in app.REST for route in router.routes)]
    return json.loads(Document(routes, version=version()).read(with_keys=True))


schema = narrowed()


@schemathesis.check
def no_fault_of_ours(_ctx: CheckContext, response: Response, _case: Case) -> None:
    """A refusal for want of room is honest; a fault is not."""
    assert response.status_code != 501
    if response.status_code == 500:
        assert response.json()["error"]["code"] != "internal_error"


def tried(case: Case, gateway: House, a_job: str) -> None:
    if case.path_parameters.get("job_id") == A_JOB:
        case.path_parameters["job_id"] = a_job
    said_nothing = any(isinstance(value, str) and not value.strip() for value in (case.headers or {}).values())
    model = case.body.get("model") if isinstance(case.body, dict) else None
    other_name = isinstance(model, str) and model != "" and model not in NAMES
    # An empty header counts as not sent; and that only some names may be said was our own narrowing.
    excluded = [negative_data_rejection] if said_nothing or other_name else []
    case.call_and_validate(
        base_url=gateway.url, headers=KEY, checks=[no_fault_of_ours, *CHECKS], excluded_checks=excluded, timeout=20
    )


@schema.parametrize()
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
def test_requests_out_of_the_document(case: Case, gateway: House, a_job: str) -> None:
    tried(case, gateway, a_job)


@pytest.mark.long
@schema.parametrize()
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_requests_out_of_the_document(case: Case, gateway: House, a_job: str) -> None:
    tried(case, gateway, a_job)


def test_what_is_served_is_what_the_requests_are_made_of(gateway: House) -> None:
    assert httpx.get(f"{gateway.url}/openapi.json").json() == written()


# --- what no document can describe -------------------------------------------------------------------------------

SAYS: dict[str, str] = {
    "/v1/completions": '"prompt": "%s"',
    "/v1/embeddings": '"input": "%s"',
    "/v1/responses": '"input": "%s"',
    "/api/generate": '"prompt": "%s", "stream": false',
    "/api/embed": '"input": "%s"',
    "/api/embeddings": '"prompt": "%s"',
    "/api/show": '"verbose": "%s"',
}
WITH_BODY = [*(kind.path for kind in app.HOT), "/api/show"]


def body(path: str, said: str = "Hi", more: str = "", model: str = "") -> bytes:
    """A request of this endpoint, with text of one's own in it."""
    model = model or ("vectors" if path in EMBEDDING_ENDPOINTS else "pretend")
    says = SAYS.get(path, '"messages": [{"role": "user", "content": "%s"}], "stream": false') % said
    return f'{{"model": "{model}", {says}{more}}}'.encode("utf-8", "surrogatepass")


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "no object": b"[1]",
    "null": b"null",
    "cut short": b'{"model": "pretend", ',
    "no JSON": b"model=pretend",
    "two objects": b"{}{}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a half of a pair in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "UTF-16": '{"model": "pretend"}'.encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf" + b'{"model": "pretend"}',
    "zeros": b"\x00" * 100,
    "a control character in a text": b'{"model": "a\nb"}',
    "only brackets": b"[" * 60_000,
    "objects without end": b'{"a":' * 10_000,
}
MEMBERS: dict[str, tuple[str, bool]] = {
    "NaN": (', "x": NaN', False),
    "Infinity": (', "x": -Infinity', False),
    "beyond a float": (', "x": 1e999', False),
    "digits without end": (', "x": ' + "9" * 5000, False),
    "nested": (', "x": ' + "[" * 5000 + "]" * 5000, False),
    "nested objects": (', "x": ' + '{"a":' * 250 + "1" + "}" * 250, False),
    "as deep as may be": (', "x": ' + "[" * 199 + "]" * 199, True),
    "a large number": (', "x": 123456789012345678901234567890', True),
    "a tiny number": (', "x": 1e-999', True),
    "the same key twice": (', "x": 1, "x": {"y": 2}', True),
    "half a pair": (', "x": "\\ud800", "\\udfff": 1', True),
    "a zero": (', "x": "\\u0000", "\\u0000": 1', True),
    "a long key": (', "' + "k" * 20_000 + '": 1', True),
}


@pytest.mark.parametrize("path", WITH_BODY)
def test_bytes_that_no_document_describes(gateway: House, path: str) -> None:
    """What is no JSON, or no number, is refused in a sentence; odd keys are the runtime's to judge."""
    book = Book(written())
    with httpx.Client(base_url=gateway.url, headers=KEY, timeout=20) as http:

        def post(content: bytes, **headers: str) -> httpx.Response:
            answer = http.post(path, content=content, headers=headers)
            book.judge("post", path, answer)
            return answer

        for name, content in REFUSED.items():
            assert post(content).status_code == 400, name
        for name, (more, taken) in MEMBERS.items():
            answer = post(body(path, more=more))
            status = answer.status_code
            served = status == 200 or _is_the_runtimes(answer)
            assert served if taken else status == 400, f"{name}: {answer.text}"
        for said in ("\\ud800", "\\u0000", "\\ud83d\\ude42", "", " ", "\U0010ffff", "ü" * 300):
            answer = post(body(path, said))
            assert answer.status_code == 200 or _is_the_runtimes(answer), said
        for model in ("\\ud800", "\\u0000", "x" * 50_000, "../../etc", "pretend\\n", "*"):
            assert post(body(path, model=model)).status_code == 404, model
        for media_type in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "application/xml",
            "x",
        ):
            answer = post(body(path), content_type=media_type)
            assert answer.status_code == 200 or _is_the_runtimes(answer), media_type


def _is_the_runtimes(answer: httpx.Response) -> bool:
    """Whether it was the runtime that did not like it: the simulated one knows no completions."""
    return "runtime_refused" in answer.text or "wrong_endpoint" in answer.text


@pytest.mark.parametrize(
    "path", ["/v1/models/%s", "/v1/jobs/%s", "/v1/jobs/%s/events", "/v1/models/%s/warm", "/%s", "/api/%s"]
)
def test_paths_that_lead_nowhere(gateway: House, path: str) -> None:
    with httpx.Client(base_url=gateway.url, headers=KEY, timeout=20) as http:
        for word in ("%ff", "%00", "%ed%a0%80", "..%2f..", "%E2%80%AE", "a" * 5_000, "%", "'", "%22", "*", "{x}", ";"):
            method = "POST" if path.endswith("warm") else "GET"
            answer = http.request(method, path % word)
            assert answer.status_code == 404, (word, answer.text)
            error = answer.json()["error"]
            assert isinstance(error, str) == path.startswith("/api/"), word
