"""What a client of jobs makes of whatever answers: a gateway that is busy, away or refuses, and what is no gateway."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from api.exit_codes import UNREACHABLE, Failed
from api.jobs_client import Away, Busy, Event, JobsClient, Refusal

Answer = httpx.Response


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": f"it is {code}", "code": code}}


def client(answer: Callable[[httpx.Request], httpx.Response]) -> JobsClient:
    return JobsClient(httpx.AsyncClient(transport=httpx.MockTransport(answer)))


def says(status: int, told: Any = None, *, text: str = "", **headers: str) -> JobsClient:
    def answer(_request: httpx.Request) -> httpx.Response:
        spelled = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(status, headers=spelled, **({"text": text} if told is None else {"json": told}))

    return client(answer)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (says(503, error("lane_full"), retry_after="7"), Busy, "it is lane_full"),
        (says(429, error("quota_used"), retry_after="soon"), Busy, "quota_used"),
        (says(503, text="<html>no upstream"), Away, "503"),
        (says(502, text="<html>no upstream"), Away, "502"),
        (says(500, error("internal_error")), Refusal, "internal_error"),
        (says(404, error("job_not_found")), Refusal, "job_not_found"),
        (says(404, text="<html>not here"), Failed, "no warmlane gateway"),
        (says(401, {"detail": "who are you"}), Failed, "no warmlane gateway"),
        (says(200, text="<html>welcome"), Failed, "no warmlane gateway"),
        (says(200, [1]), Failed, "no warmlane gateway"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_has_a_kind(answer: JobsClient, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as found:
        await answer.look("01J")
    if isinstance(found.value, Busy):
        assert found.value.retry_after_s == (7 if "lane_full" in words else 1)
    if isinstance(found.value, Failed):
        assert found.value.code == UNREACHABLE


async def test_a_line_that_breaks_is_away_and_an_address_that_is_none_is_not_tried_again() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("", request=request)

    with pytest.raises(Away, match="ReadError"):
        await client(broken).look("01J")
    real = JobsClient(httpx.AsyncClient())
    with pytest.MonkeyPatch.context() as patched:
        for url in ("127.0.0.1:8400", "ftp://box", "http://box:port"):
            patched.setenv("GATEWAY_URL", url)
            with pytest.raises(Failed, match="can't be reached"):
                await real.look("01J")


async def test_a_result_is_the_jobs_own_or_a_word_about_asking() -> None:
    """A header of the gateway tells them apart, whatever the status."""
    own = await says(503, error("expired"), x_gateway_job="01J").result("01J")
    assert (own.status, own.good, own.body) == (503, False, error("expired"))
    assert (await says(200, {"choices": []}, x_gateway_job="01J").result("01J")).good
    with pytest.raises(Busy):
        await says(503, error("broker_unavailable")).result("01J")
    with pytest.raises(Refusal):
        await says(404, error("job_not_found")).result("01J")


async def test_what_is_asked_is_spelled_as_the_gateway_reads_it() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return Answer(200, json={"id": "01J"})

    jobs = client(answer)
    await jobs.look("a/b", wait_s=30)
    await jobs.page(state="done", lane="", **{"metadata[a b]": "ü&"}, limit=5)
    await jobs.submit({"body": {}}, key="k")
    assert asked[0].url.raw_path == b"/v1/jobs/a%2Fb?wait=30s"
    assert dict(asked[1].url.params) == {"state": "done", "metadata[a b]": "ü&", "limit": "5"}
    assert asked[2].headers["idempotency-key"] == "k" and json.loads(asked[2].content) == {"body": {}}


STREAM = (
    ": following\n\n"
    'id: 1-1\nevent: frame\ndata: {"data":"a\u2028b\u0085\\r\\n"}\n\n'
    ": still following\n\n"
    'event: restarted\ndata: {"kind":"restarted"}\n\n'
    'id: 2-1\nevent: end\ndata: {"kind":"done"}\n\n'
)


class Pieces(httpx.AsyncByteStream):
    """A body in pieces of so many bytes, whatever letters they cut."""

    def __init__(self, text: str, size: int) -> None:
        self._data, self._size = text.encode(), size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self._data), self._size):
            yield self._data[at : at + self._size]


async def events_of(text: str, *, size: int = 4096, status: int = 200) -> list[Event]:
    found: list[Event] = []
    jobs = client(lambda _: Answer(status, stream=Pieces(text, size), headers={"content-type": "text/event-stream"}))
    async with jobs.events("01J", "1-0") as events:
        async for event in events:
            found.append(event)
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
async def test_events_are_read_however_they_come(size: int) -> None:
    """Only a line feed ends a line; what else Unicode calls an end stands in data."""
    found = await events_of(STREAM, size=size)
    assert [(event.name, event.id) for event in found] == [("frame", "1-1"), ("restarted", ""), ("end", "2-1")]
    assert found[0].said["data"] == "a\u2028b\u0085\r\n"


async def test_a_stream_that_breaks_off_is_away_and_one_that_was_seen_is_over() -> None:
    for cut in (len(STREAM) // 2, STREAM.index("id: 2-1")):
        with pytest.raises(Away):
            await events_of(STREAM[:cut])
    assert await events_of("", status=204) == []
    with pytest.raises(Away):
        await events_of("no upstream", status=502)
