"""What is thought about webhooks: signatures, pauses, horizons, breakers. And how one request is sent."""

import asyncio
import random
import ssl
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from broker.trust.addresses import Target
from tests.support.webhook_endpoint import receiver
from workers import post as post_module
from workers.post import BODY_BYTES_MAX, Post
from workers.webhooks import (
    FAILURES_MAX,
    HORIZON_MS,
    OPEN_MS,
    OPEN_MS_MAX,
    PAUSE_MS,
    PAUSE_MS_MAX,
    Answer,
    judge,
    open_ms,
    retry_after_s,
    retry_ms,
    signed,
)

SECRETS = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"]
TARGET = Target("https", "ci.example.com", 8443, "/hook?token=abc")
DOWN = Answer(0, "no connection could be made")


def verdict(answer: Answer, *, tries: int = 0, after_ms: int = 0, failures: int = 0) -> tuple[str, int, int]:
    found = judge(
        answer, tries=tries, since_ms=1_000, now_ms=1_000 + after_ms, failures=failures, chance=random.Random(1)
    )
    return found.outcome, found.retry_after_ms, found.open_for_ms


@pytest.mark.parametrize("secret", SECRETS)
def test_each_secret_signs_as_the_standard_says(secret: str) -> None:
    body, now = '{"type":"job.done","data":{"id":"ü"}}', datetime.now(UTC)
    headers = signed(SECRETS, delivery_id="msg_1", at_s=int(now.timestamp()), body=body)
    assert headers["webhook-signature"].count("v1,") == 2
    assert standardwebhooks.Webhook(secret).verify(body, headers) == {"type": "job.done", "data": {"id": "ü"}}
    for name, other in (("webhook-id", "msg_2"), ("webhook-timestamp", str(int(now.timestamp()) + 1))):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(secret).verify(body, headers | {name: other})
    late = signed(SECRETS, delivery_id="msg_1", at_s=int((now - timedelta(minutes=6)).timestamp()), body=body)
    with pytest.raises(standardwebhooks.WebhookVerificationError, match="too old"):
        standardwebhooks.Webhook(secret).verify(body, late)


@given(tries=st.integers(1, 2_000), seed=st.integers())
def test_pauses_double_up_to_an_hour_and_chance_takes_half_at_most(tries: int, seed: int) -> None:
    longest = min(PAUSE_MS_MAX, PAUSE_MS * 2 ** (tries - 1))
    assert longest / 2 <= retry_ms(tries, random.Random(seed)) <= longest


def test_chance_spreads_what_failed_together() -> None:
    chance = random.Random(3)
    assert len({retry_ms(5, chance) for _ in range(50)}) > 40


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_is_delivered(status: int) -> None:
    assert verdict(Answer(status), tries=9, after_ms=HORIZON_MS * 2, failures=50) == ("delivered", 0, 0)


@pytest.mark.parametrize("status", [0, 301, 302, 307, 400, 401, 404, 429, 500, 503])
def test_all_else_is_tried_again_until_the_horizon(status: int) -> None:
    outcome, pause_ms, _ = verdict(Answer(status))
    assert outcome == "failed" and PAUSE_MS / 2 <= pause_ms <= PAUSE_MS
    assert verdict(Answer(status), tries=40, after_ms=HORIZON_MS - PAUSE_MS_MAX)[0] == "failed"
    assert verdict(Answer(status), tries=40, after_ms=HORIZON_MS)[:2] == ("dead", 0)


def test_who_is_gone_is_believed() -> None:
    assert verdict(Answer(410)) == ("dead", 0, 0)


@pytest.mark.parametrize(
    ("answer", "breaks"),
    [
        (DOWN, True), (Answer(500), True), (Answer(503), True), (Answer(429), True), (Answer(408), True),
        (Answer(200), False), (Answer(400), False), (Answer(404), False), (Answer(302), False), (Answer(410), False),
        (Answer(0, "webhooks do not go there", refused=True), False),
    ],
)  # fmt: skip
def test_one_refused_event_does_not_mean_that_the_endpoint_is_down(answer: Answer, breaks: bool) -> None:
    assert answer.breaks is breaks
    assert (verdict(answer, failures=FAILURES_MAX)[2] > 0) is breaks


def test_an_endpoint_is_left_alone_longer_and_longer() -> None:
    pauses = [open_ms(failures) for failures in range(1, 40)]
    assert pauses[: FAILURES_MAX - 1] == [0] * (FAILURES_MAX - 1)
    assert pauses[FAILURES_MAX - 1 : FAILURES_MAX + 2] == [OPEN_MS, 2 * OPEN_MS, 4 * OPEN_MS]
    assert pauses == sorted(pauses) and pauses[-1] == OPEN_MS_MAX


def test_an_endpoint_may_ask_for_time() -> None:
    assert verdict(Answer(503, retry_after_s=120))[:2] == ("failed", 120_000)
    assert verdict(Answer(429, retry_after_s=10**8))[1] == 3_600_000
    said = {"120": 120, "": 0, "soon": 0, "-5": 0, "Wed, 21 Oct 2026 07:28:00 GMT": 0, "9" * 30: 0, "²": 0}
    assert {header: retry_after_s(header) for header in said} == said


# --- one request -----------------------------------------------------------------------------------------------------


async def test_a_request_goes_to_the_checked_address_and_says_its_name() -> None:
    """Whatever the name would resolve to by now; and the certificate must be the name's."""
    sent: list[httpx.Request] = []

    def network(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b""))

    async with Post(httpx.MockTransport(network)) as post:
        assert (await post(TARGET, ["93.184.215.14"], {"webhook-id": "msg_1"}, "{}")).taken
        assert (await post(Target("http", "::1", 80, "/"), ["::1"], {}, "{}")).taken
    first, second = sent
    assert str(first.url) == "https://93.184.215.14:8443/hook?token=abc"
    assert first.headers["host"] == "ci.example.com:8443"
    assert first.extensions["sni_hostname"] == "ci.example.com"
    assert (first.method, first.headers["content-type"]) == ("POST", "application/json")
    assert (str(second.url), second.headers["host"]) == ("http://[::1]/", "[::1]")


async def test_the_handshake_asks_for_the_name_and_not_for_the_address() -> None:
    """A server that has no certificate hears that much."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server, Post() as post:
        answer = await post(Target("https", "ci.example.com", port, "/"), ["127.0.0.1"], {}, "{}")
    assert asked == ["ci.example.com"] and answer.status == 0


async def test_the_next_address_is_tried_where_the_first_takes_no_connection() -> None:
    asked: list[str] = []

    def network(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host != "3.3.3.3":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, stream=httpx.ByteStream(b""))

    async with Post(httpx.MockTransport(network)) as post:
        assert (await post(TARGET, ["1.1.1.1", "2.2.2.2", "3.3.3.3"], {}, "{}")).taken
        assert asked == ["1.1.1.1", "2.2.2.2", "3.3.3.3"]
        answer = await post(TARGET, ["1.1.1.1"] * 9, {}, "{}")
    assert (answer.status, answer.error) == (0, "no connection could be made")
    assert len(asked) == 6


async def test_no_redirect_is_followed() -> None:
    async with receiver() as end, Post() as post:
        end.answers = [f"HTTP/1.1 307 Elsewhere\r\nlocation: {end.url}/inside\r\ncontent-length: 0\r\n\r\n".encode()]
        answer = await post(Target("http", "ci.example.com", end.port, "/hook"), ["127.0.0.1"], {}, "{}")
        assert (answer.status, answer.taken) == (307, False)
        assert answer.error == "it answered 307, and redirects are not followed"
        assert end.heads == ["POST /hook HTTP/1.1"]
        assert end.requests[0][0]["host"] == f"ci.example.com:{end.port}"


async def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with receiver() as end, Post() as post:
        assert (await post(Target("http", "localhost", end.port, "/"), ["127.0.0.1"], {}, "{}")).taken


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async with receiver() as end, Post() as post:
        end.answers = [b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (BODY_BYTES_MAX * 20)]
        assert (await post(Target("http", "a", end.port, "/"), ["127.0.0.1"], {}, "{}")).taken


async def test_a_body_that_does_not_come_changes_nothing_about_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been taken: to send it again until the body is whole would be for ever."""
    monkeypatch.setattr(post_module, "WHOLE_S", 2.0)
    monkeypatch.setattr(post_module, "BODY_S", 0.1)
    async with receiver() as end, Post() as post:
        end.answers, end.open = [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"], True
        assert (await post(Target("http", "a", end.port, "/"), ["127.0.0.1"], {}, "{}")).taken


async def test_an_answer_that_does_not_come_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte may come in time and the whole never."""
    monkeypatch.setattr(post_module, "WHOLE_S", 0.3)
    async with receiver() as end, Post() as post:
        end.hold.clear()
        answer = await post(Target("http", "a", end.port, "/"), ["127.0.0.1"], {}, "{}")
        assert (answer.status, answer.error, answer.breaks) == (0, "no answer within 0.3 s", True)
        end.hold.set()


async def test_what_goes_wrong_is_told_without_the_url() -> None:
    """It may hold a token."""

    def network(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError(f"at {request.url}")

    async with Post(httpx.MockTransport(network)) as post:
        answer = await post(TARGET, ["1.1.1.1"], {}, "{}")
    assert answer == Answer(0, "what came back was no HTTP answer")
