"""What a hostile client cannot do to the api: each limit on connections and requests, over real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from api import app, connection, limits
from api.limits import Limits
from broker import operator
from broker.store import Store
from tests.support.live_api import RawClient, Scene, chat_body, live_scene
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(40)

HOT = "/v1/chat/completions"
HASTE = Limits(head_s=0.3, body_s=0.3, keep_alive_s=1.0, linger_s=0.3, closing_s=0.3)


@pytest.fixture
def store(fake_store: Store) -> Store:
    """What a connection or a body costs depends on no Redis: one server will do."""
    return fake_store


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections are looked at in each tenth of a second."""
    monkeypatch.setattr(app, "LOOK_EVERY", 1)


@asynccontextmanager
async def limited(store: Store, limits: Limits, *, keys: str = "") -> AsyncIterator[Scene]:
    async with live_scene(store, keys=keys, limits=limits) as scene:
        yield scene


def counted(scene: Scene, reason: str) -> float:
    page = scene.api.gateway.metrics.render(None, {}, callers=[], redis_up=True).decode()
    line = f'gateway_connections_refused_total{{reason="{reason}"}} '
    return next((float(row.removeprefix(line)) for row in page.splitlines() if row.startswith(line)), 0.0)


async def refused(client: RawClient, status: int, code: str) -> None:
    """The client hears this, in JSON, on a connection that is closed."""
    assert await client.head() == status
    assert json.loads(await client.body())["error"]["code"] == code
    assert client.headers["connection"] == "close"


async def ends(client: RawClient) -> None:
    """The connection is closed without a word."""
    try:
        assert await asyncio.wait_for(client.reader.read(), 10) == b""
    except ConnectionResetError:
        pass


async def answers(scene: Scene) -> None:
    """Somebody else is served meanwhile."""
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        answer = await http.post(HOT, content=chat_body("hello", stream=False))
    assert answer.status_code == 200, answer.text


# --- heads ---------------------------------------------------------------------------------------------------------

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (HEAD + b"x-a: " + b"b" * 40_000, 431, "head_too_large"),  # it never ends
        (HEAD + b"x-a: " + b"b" * 40_000 + b"\r\n\r\n", 431, "head_too_large"),
        (HEAD + b"x-a: b\r\n" * 200 + b"\r\n", 431, "head_too_large"),
        (b"GET /v1/models/%s HTTP/1.1\r\nhost: localhost\r\n\r\n" % (b"a" * 9_000), 414, "url_too_long"),
        (b"GET http://other.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "bad_http"),
        (b"CONNECT other.example:80 HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "bad_http"),
        (b"nonsense\r\n\r\n", 400, "bad_http"),
        (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400, "bad_http"),
        (HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}", 400, "bad_http"),
        (HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n", 400, "bad_http"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\nabcde\r\n0\r\n\r\n", 400, "bad_http"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc", 400, "bad_http"),
    ],
    ids=lambda value: "sent" if isinstance(value, bytes) else None,
)
async def test_a_head_that_is_none_is_refused_at_once(scene: Scene, sent: bytes, status: int, code: str) -> None:
    client = await RawClient.open(scene.api)
    client.writer.write(sent)
    await refused(client, status, code)
    assert counted(scene, code) == 1
    await answers(scene)


async def test_nonsense_is_counted_and_fills_no_log(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """A line for each would be a way to fill our disk."""
    client = await RawClient.open(scene.api)
    client.writer.write(b"nonsense\r\n\r\n")
    await refused(client, 400, "bad_http")
    said = [record for record in caplog.records if record.name == "uvicorn.error" and record.levelname == "WARNING"]
    assert said and not any(map(app._worth_a_line, said))
    assert counted(scene, "bad_http") == 1


async def test_a_head_as_large_as_it_may_be_is_served(scene: Scene) -> None:
    """The limit counts the head alone: the body that came in the same packet is not part of it."""
    client = await RawClient.open(scene.api)
    size = scene.api.gateway.limits.head_bytes - 400
    await client.send("POST", HOT, chat_body("hello " + "x" * 100_000, stream=False), x_a="b" * size)
    assert await client.head() == 200


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        ([], 400, "bad_http"),  # no host
        (["host: localhost", "host: localhost"], 400, "bad_http"),
        (["host: localhost", "idempotency-key: a", "idempotency-key: b"], 400, "bad_http"),
        (["host: localhost", "x-gateway-allow-remote: false", "x-gateway-allow-remote: true"], 400, "bad_http"),
        (["host: localhost", "x-gateway-lane: big", "x-gateway-lane: small"], 400, "bad_http"),
        (["host: localhost", "transfer-encoding: gzip, chunked"], 400, "bad_http"),
        (["host: localhost", "content-encoding: gzip"], 415, "unsupported_encoding"),
    ],
)
async def test_headers_that_may_be_read_in_two_ways_are_refused(
    scene: Scene, lines: list[str], status: int, code: str
) -> None:
    client = await RawClient.open(scene.api)
    client.writer.write("\r\n".join([f"GET {HOT} HTTP/1.1", *lines, "", ""]).encode())
    assert await client.head() == status
    assert json.loads(await client.body())["error"]["code"] == code


async def test_an_http_1_0_client_is_served(scene: Scene) -> None:
    client = await RawClient.open(scene.api)
    body = chat_body("hello", stream=False)
    client.writer.write(b"POST %s HTTP/1.0\r\ncontent-length: %d\r\n\r\n%s" % (HOT.encode(), len(body), body))
    assert await client.head() == 200 and client.headers["connection"] == "close"


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"])
async def test_a_connection_that_asks_for_nothing_is_closed(store: Store, sent: bytes) -> None:
    """Long before one that has asked for something."""
    async with limited(store, replace(HASTE, keep_alive_s=60)) as scene:
        client = await RawClient.open(scene.api)
        client.writer.write(sent)
        await ends(client)


@pytest.mark.usefixtures("looks_often")
async def test_a_request_that_trickles_in_is_refused(store: Store) -> None:
    """However alive its sender looks: a line of the head now and then, or a byte of the body."""
    drips = {
        b"GET / HTTP/1.1\r\nhost: localhost\r\n": b"x-a: b\r\n",
        HEAD + b"content-length: 100000\r\n\r\n": b" ",
        HEAD + b"transfer-encoding: chunked\r\n\r\n": b"1;extension=long\r\n \r\n",
        b"POST /api/show HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n": b" ",
    }
    async with limited(store, HASTE) as scene:
        for begin, drip in drips.items():
            client = await RawClient.open(scene.api)
            client.writer.write(begin)
            async with dripping(client, drip):
                assert await client.head() == 408, begin
                assert b"request_timeout" in await client.body()
        silent = await RawClient.open(scene.api)
        silent.writer.write(HEAD + b"content-length: 1000\r\n\r\n")
        await refused(silent, 408, "request_timeout")
        await ends(silent)  # it need not hang up by itself
        assert scene.api.gateway.exchanges == set()


@asynccontextmanager
async def dripping(client: RawClient, drip: bytes) -> AsyncIterator[None]:
    """The client goes on to send these bytes now and then."""

    loop = asyncio.get_running_loop()

    def send() -> None:
        nonlocal timer
        client.writer.write(drip)
        timer = loop.call_later(0.05, send)

    timer: asyncio.Handle = loop.call_soon(send)
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.usefixtures("looks_often")
async def test_a_body_that_comes_steadily_is_read_to_its_end(store: Store) -> None:
    """However slow the way: what has come buys time for the rest."""
    body, loop = chat_body("hello", stream=False), asyncio.get_running_loop()
    async with limited(store, replace(HASTE, body_bytes_per_s=200)) as scene:
        client = await RawClient.open(scene.api)
        client.writer.write(HEAD + b"content-length: %d\r\n\r\n" % (len(body) + 20 * 25) + body)
        began = loop.time()
        for number in range(20):
            loop.call_later(0.05 * (number + 1), client.writer.write, b" " * 25)
        assert await client.head() == 200
        assert loop.time() - began > 3 * HASTE.body_s


@pytest.mark.usefixtures("looks_often")
async def test_a_body_that_nobody_reads_holds_no_connection(store: Store) -> None:
    """The answer is out already; the rest of the request may not come for ever."""
    async with limited(store, HASTE) as scene:
        client = await RawClient.open(scene.api)
        # what asks nothing of Redis: on a busy machine its answer may else come later than the body is waited for
        client.writer.write(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n")
        assert await client.head() == 200
        await client.body()
        async with dripping(client, b" "):
            await ends(client)


@pytest.mark.usefixtures("looks_often")
async def test_a_body_that_we_do_not_take_is_not_called_slow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads this one, so it stops on its way; what was asked for goes on."""
    monkeypatch.setattr(operator, "HEARD_S_MAX", 4 * HASTE.body_s)
    async with limited(store, replace(HASTE, body_bytes_per_s=1 << 30)) as scene:
        client = await RawClient.open(scene.api)
        line = "POST /v1/models/big/unload HTTP/1.1"
        client.writer.write(f"{line}\r\nhost: localhost\r\ncontent-length: 5000000\r\n\r\n".encode())
        client.writer.write(b" " * 5_000_000)
        assert await client.head() == 409  # its worker is deaf


@pytest.mark.usefixtures("looks_often")
async def test_an_idle_connection_is_kept_for_a_while(store: Store) -> None:
    """Empty lines between requests do not make it younger."""
    async with limited(store, HASTE) as scene:
        client = await RawClient.open(scene.api)
        await client.send("GET", "/healthz")
        assert await client.head() == 200
        await client.body()
        answered = asyncio.get_running_loop().time()
        async with dripping(client, b"\r\n"):
            await ends(client)
        assert asyncio.get_running_loop().time() - answered > 2 * HASTE.head_s


@pytest.mark.usefixtures("looks_often")
async def test_a_long_answer_is_not_cut_off(store: Store) -> None:
    """Neither for its length nor for what its client sends meanwhile."""
    async with limited(store, HASTE) as scene:
        client = await RawClient.open(scene.api)
        await client.chat("wait")
        client.writer.write(b"\r\n\r\nGET /healthz HT")
        assert await client.head() == 200
        began = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > began + 1.5, what="longer than any of the limits")
        scene.go.set()
        assert b"[DONE]" in await client.body()


# --- how many ------------------------------------------------------------------------------------------------------


async def test_who_asks_for_nothing_makes_room(store: Store) -> None:
    """A flood of silent connections keeps nobody out: the oldest of them go."""
    async with limited(store, Limits(connections=20)) as scene:
        busy = await RawClient.open(scene.api)
        await busy.chat("wait")
        silent = [await RawClient.open(scene.api) for _ in range(60)]
        await answers(scene)
        assert len(scene.api.server.server_state.connections) <= 21
        await ends(silent[0])
        scene.go.set()
        assert await busy.head() == 200 and b"[DONE]" in await busy.body()
        assert counted(scene, "evicted") > 0


async def test_when_all_are_at_work_the_next_one_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not each of a flood: those few words keep a file open too."""
    monkeypatch.setattr(connection, "EVICTED_AT_ONCE", 1)
    async with limited(store, Limits(connections=3)) as scene:
        busy = [await RawClient.open(scene.api) for _ in range(3)]
        for client in busy:
            await client.chat("wait")
        await until(lambda: len(scene.api.gateway.exchanges) == 3, what="three are at work")
        late = await RawClient.open(scene.api)
        await refused(late, 503, "too_many_connections")
        assert late.headers["retry-after"] == "1"
        await ends(await RawClient.open(scene.api))
        scene.go.set()
        for client in busy:
            assert await client.head() == 200


async def test_who_has_followed_a_job_may_follow_again(store: Store) -> None:
    async with limited(store, Limits(connections_of_caller=1)) as scene:
        async with httpx.AsyncClient(base_url=scene.api.url) as http:
            asked = await http.post(HOT, content=chat_body("hello", stream=False))
            for _ in range(2):
                followed = await http.get(f"/v1/jobs/{asked.headers['x-gateway-job']}/events")
                assert followed.status_code == 200 and "event: end" in followed.text


async def test_one_caller_cannot_take_all_connections(store: Store) -> None:
    async with limited(store, Limits(connections_of_caller=2), keys="ann:secret-a,bob:secret-b") as scene:
        ann = [await RawClient.open(scene.api) for _ in range(3)]
        for client in ann[:2]:
            await client.chat("wait", authorization="Bearer secret-a")
        await until(lambda: len(scene.api.gateway.exchanges) == 2, what="two are at work")
        await ann[2].chat("hello", authorization="Bearer secret-a")
        assert await ann[2].head() == 429 and ann[2].headers["retry-after"] == "1"
        assert json.loads(await ann[2].body())["error"]["code"] == "too_many_requests"
        bob = await RawClient.open(scene.api)
        await bob.chat("hello", authorization="Bearer secret-b")
        assert await bob.head() == 200
        scene.go.set()
        for client in ann[:2]:
            assert await client.head() == 200
            await client.body()
        await ann[2].chat("hello", authorization="Bearer secret-a")
        assert await ann[2].head() == 200


async def test_a_flood_of_pipelined_requests_is_cut(scene: Scene) -> None:
    client = await RawClient.open(scene.api)
    await client.chat("wait")
    client.writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await client.head()
    await answers(scene)


async def test_a_few_pipelined_requests_are_answered_in_turn(scene: Scene) -> None:
    client = await RawClient.open(scene.api)
    client.writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * 10)
    for _ in range(10):
        assert await client.head() == 200
        await client.body()


async def test_large_bodies_are_bounded_together(store: Store) -> None:
    """What an answer holds comes back when it ends."""
    async with limited(store, Limits(bodies_bytes=3 << 20)) as scene:
        first, second = await RawClient.open(scene.api), await RawClient.open(scene.api)
        large = chat_body("wait" + "x" * (2 << 20))
        await first.send("POST", HOT, chat_body("wait", pad="x" * (2 << 20)))
        await until(lambda: scene.api.gateway.house.bodies_bytes > 2 << 20, what="it is held")
        await second.send("POST", HOT, large)
        await refused(second, 503, "too_many_bodies")
        await answers(scene)  # small ones need no room
        scene.go.set()
        assert await first.head() == 200 and b"[DONE]" in await first.body()
        await until(lambda: scene.api.gateway.house.bodies_bytes == 0, what="it is given back")


async def test_large_bodies_leave_others_their_turn(store: Store) -> None:
    """What looks into 15 MB keeps the loop busy: eight at once kept everybody else waiting for seconds."""
    loop = asyncio.get_running_loop()
    async with limited(store, Limits(large_bytes=5_000, large_bytes_per_s=10_000)) as scene:
        began = loop.time()
        clients = [await RawClient.open(scene.api) for _ in range(3)]
        for client in clients:
            await client.send("POST", HOT, chat_body("hello", pad="x" * 5_000, stream=False))
        await answers(scene)
        assert loop.time() - began < 0.5  # the small one, however many large ones wait
        assert [await client.head() for client in clients] == [200] * 3
        assert loop.time() - began > 1.0


def test_fewer_connections_where_few_files_may_be_open() -> None:
    assert limits.fitting(Limits(), files=1024).connections == 1024 - limits.FILES_KEPT
    assert limits.fitting(Limits(), files=100_000).connections == Limits().connections


# --- bodies --------------------------------------------------------------------------------------------------------

NEST = b"[" * 200_000 + b"]" * 200_000
DEEPEST = b"[" * 1_000_000 + b"]" * 1_000_000
SAYS = b'"messages":[{"role":"user","content":"hello"}]'


def many(item: bytes, count: int) -> bytes:
    return b",".join([item] * count)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (HOT, b'{"model":"big","messages":%s}' % NEST, "nested too deeply"),
        (HOT, b'{"model":"big","messages":%s}' % DEEPEST, "too many values"),
        (HOT, b'{"model":"big",%s,"x":%s}' % (SAYS, b"[" * 200 + b"]" * 200), "200 levels at most"),
        ("/v1/messages", b'{"model":"big","max_tokens":5,"messages":%s}' % NEST, "nested too deeply"),
        ("/v1/responses", b'{"model":"big","input":%s}' % NEST, "nested too deeply"),
        ("/v1/completions", b'{"model":"big","prompt":%s}' % NEST, "nested too deeply"),
        ("/v1/embeddings", b'{"model":"big","input":%s}' % NEST, "nested too deeply"),
        ("/api/chat", b'{"model":"big","messages":%s}' % NEST, "nested too deeply"),
        ("/api/generate", b'{"model":"big","prompt":%s}' % NEST, "nested too deeply"),
        ("/api/embed", b'{"model":"big","input":%s}' % NEST, "nested too deeply"),
        ("/api/show", b'{"model":%s}' % (b"[" * 20_000), "nested too deeply"),
        (HOT, b'{"model":"big",%s,%s}' % (SAYS, many(b'"a":1', 1_000)), "1,000 keys at most"),
        (HOT, b'{"model":"big","messages":[%s]}' % many(b"{}", 10_001), "10,000 items at most"),
        ("/v1/messages", b'{"model":"big","messages":[%s]}' % many(b"{}", 10_001), "10,000 items at most"),
        ("/v1/responses", b'{"model":"big","input":[%s]}' % many(b"{}", 10_001), "10,000 items at most"),
        ("/v1/embeddings", b'{"model":"big","input":[%s]}' % many(b'"x"', 10_001), "10,000 items at most"),
        ("/api/embed", b'{"model":"big","input":[%s]}' % many(b'"x"', 10_001), "10,000 items at most"),
        ("/api/chat", b'{"model":"big","messages":[%s]}' % many(b"{}", 10_001), "10,000 items at most"),
        ("/api/chat", b'{"model":"big",%s,"options":{%s}}' % (SAYS, many(b'"a":1', 9)), ""),
        (HOT, b'{"model":"big",%s,"tools":[%s]}' % (SAYS, many(b"{}", 1_025)), "1,024 items at most"),
        (HOT, b'{"model":"big",%s,"stop":[%s]}' % (SAYS, many(b'"x"', 65)), "64 items at most"),
        (HOT, b'{"model":"big",%s,"x":[%s]}' % (SAYS, many(b"[0]", 300_000)), "too many values"),
    ],
    ids=lambda value: "body" if isinstance(value, bytes) else value,  # not two million characters
)
async def test_a_body_that_is_cheap_to_send_and_dear_to_walk_is_refused(
    scene: Scene, path: str, body: bytes, words: str
) -> None:
    """In the words of the dialect that asked."""
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        answer = await http.post(path, content=body)
    if not words:
        assert answer.status_code == 200
        return
    told: Any = answer.json()["error"]
    message = told if path.startswith("/api/") else told["message"]
    assert answer.status_code == 400 and words in message, answer.text
    await answers(scene)


# --- headers of answers --------------------------------------------------------------------------------------------


async def test_every_answer_carries_the_security_headers(scene: Scene) -> None:
    """Of the hot routes, of FastAPI's, and of the connection's own; and none names the server program."""
    wanted = {"x-content-type-options": "nosniff", "cache-control": "no-store", "referrer-policy": "no-referrer"}
    wanted["content-security-policy"] = "frame-ancestors 'none'"
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        found = [
            await http.post(HOT, content=chat_body("hello")),
            await http.post(HOT, content=b"{"),
            *[await http.get(path) for path in ("/", "/metrics", "/v1/models", "/healthz", "/nowhere")],
            await http.get("/v1/models", headers={"host": "evil.example"}),
            await http.get("/v1/models/" + "a" * 9_000),
        ]
    for answer in found:
        assert {name: answer.headers[name].split(", no-cache")[0] for name in wanted} == wanted, answer.url
        assert "server" not in answer.headers
