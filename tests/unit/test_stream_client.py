"""The token path's HTTP client against a server that does what servers do: keep, close, break and refuse."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.support.waiting import until
from workers.stream_client import Exchange, StreamClient, UpstreamLost

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Caller:
    """One client and what its last request got."""

    def __init__(self, port: int) -> None:
        self.client = StreamClient()
        self.url = f"http://127.0.0.1:{port}"
        self.data = bytearray()
        self.news = asyncio.Event()

    async def post(self, **more: bool) -> Exchange:
        self.data = bytearray()
        return await self.client.post(
            self.url, "/v1/x", b"{}", headers={"X-A": "b"}, on_data=self.data.extend, on_news=self.news.set, **more
        )

    async def whole(self, **more: bool) -> Exchange:
        exchange = await self.post(**more)
        await until(lambda: exchange.done or exchange.lost, what="the end of the exchange")
        return exchange


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Caller]:
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    caller = Caller(server.sockets[0].getsockname()[1])
    try:
        yield caller
    finally:
        caller.client.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(2)


async def test_a_request_is_whole_and_an_answer_keeps_its_connection() -> None:
    connections, heads = 0, []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            heads.append(await request(reader))
            writer.write(CHUNKED + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")

    async with served(handler) as caller:
        for _ in range(3):
            exchange = await caller.whole()
            assert (exchange.status, exchange.done, caller.data) == (200, True, b"onetwo")
        assert connections == 1
        await caller.whole(fresh=True)
        assert connections == 2
        port = caller.url.rpartition(":")[2]
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "POST /v1/x HTTP/1.1"
    assert {
        f"Host: 127.0.0.1:{port}",
        "Content-Length: 2",
        "X-A: b",
        "Accept: text/event-stream, application/json",
    } <= set(lines)
    assert lines[-1] == "{}"


async def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(HEAD + b"\r\nall of it")

    async with served(handler) as caller:
        exchange = await caller.whole()
        assert (exchange.done, exchange.lost, caller.data) == (True, None, b"all of it")


async def test_a_chunked_answer_that_ends_early_is_lost() -> None:
    """Its last chunk is missing: what came is not the whole."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + b"3\r\none\r\n")

    async with served(handler) as caller:
        exchange = await caller.whole()
        assert not exchange.done
        assert exchange.lost is not None and str(exchange.lost) == "the runtime closed the connection"
        assert not exchange.lost.reused
        assert caller.data == b"one"


async def test_an_old_connection_that_dies_unread_is_told_apart() -> None:
    """The server closed it while it was idle: the request may be sent again on a new one."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + b"0\r\n\r\n")
        await request(reader)

    async with served(handler) as caller:
        await caller.whole()
        exchange = await caller.whole()
        assert exchange.lost is not None and exchange.lost.reused
        assert (await caller.whole(fresh=True)).done


async def test_an_idle_connection_that_the_server_closed_is_not_used() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + b"0\r\n\r\n")

    async with served(handler) as caller:
        await caller.whole()
        await until(lambda: not any(caller.client._idle.values()), what="the close is noticed")
        assert (await caller.whole()).done


async def test_connection_close_and_a_talkative_server_are_not_kept() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        if connections == 1:
            writer.write(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nok")
        else:
            writer.write(HEAD + b"Content-Length: 2\r\n\r\nok")
            await writer.drain()
            writer.write(b"and another thing")
        await reader.read()

    async with served(handler) as caller:
        assert (await caller.whole()).done
        assert not any(caller.client._idle.values())
        assert (await caller.whole()).done
        await until(lambda: not any(caller.client._idle.values()), what="who talks unasked is hung up on")
        assert connections == 2


async def test_abort_closes_the_connection_at_once() -> None:
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + b"3\r\none\r\n")
        with pytest.raises(ConnectionError):
            while await reader.read(100):
                pass
            raise ConnectionError("closed")
        closed.set()

    async with served(handler) as caller:
        exchange = await caller.post()
        await until(lambda: caller.data, what="the first bytes")
        exchange.abort()
        await asyncio.wait_for(closed.wait(), 1)
        await until(lambda: exchange.lost, what="the exchange knows")
        assert not any(caller.client._idle.values())


async def test_a_paused_exchange_makes_the_server_wait() -> None:
    """A runtime that is faster than Redis feels it, instead of filling our memory."""
    sent, stalled = 0, asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(HEAD + b"Content-Length: 30000000\r\n\r\n")
        for _ in range(30):
            writer.write(bytes(1_000_000))
            try:
                await asyncio.wait_for(writer.drain(), 0.3)
            except TimeoutError:
                stalled.set()
                await writer.drain()
            sent += 1

    async with served(handler) as caller:
        exchange = await caller.post()
        await until(lambda: caller.data, what="the first bytes")
        exchange.pause()
        exchange.pause()
        await asyncio.wait_for(stalled.wait(), 5)
        assert sent < 29
        exchange.resume()
        await until(lambda: exchange.done, what="the rest")
        assert len(caller.data) == 30_000_000


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"), (b"", "closed the connection")],
)
async def test_what_is_no_answer_is_lost(answer: bytes, words: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)

    async with served(handler) as caller:
        exchange = await caller.whole()
        assert exchange.lost is not None and words in str(exchange.lost)


async def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UpstreamLost, match=rf"nobody answers at 127.0.0.1:{port}"):
        await Caller(port).post()


async def test_an_answer_that_is_over_no_longer_touches_its_connection() -> None:
    """A job cancelled while its end was being written once cut the stream of the next job on the same connection."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + b"3\r\none\r\n0\r\n\r\n")
        await request(reader)
        writer.write(CHUNKED + b"3\r\ntwo\r\n")
        await writer.drain()
        await asyncio.wait_for(second_may_end.wait(), 5)
        writer.write(b"5\r\nthree\r\n0\r\n\r\n")

    second_may_end = asyncio.Event()
    async with served(handler) as caller:
        first = await caller.whole()
        second = await caller.post()
        await until(lambda: caller.data == b"two", what="the second answer's first bytes")
        first.pause()
        first.abort()
        second_may_end.set()
        await until(lambda: second.done or second.lost, what="the end of the second answer")
        assert second.lost is None
        assert caller.data == b"twothree"


async def test_a_connection_that_was_paused_at_its_answers_end_reads_the_next() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for word in (b"one", b"two"):
            await request(reader)
            writer.write(CHUNKED + b"3\r\n" + word + b"\r\n0\r\n\r\n")

    async with served(handler) as caller:
        held: list[Exchange] = []

        def pausing(data: bytes) -> None:
            caller.data.extend(data)
            held[0].pause()

        held.append(
            await caller.client.post(caller.url, "/v1/x", b"{}", headers={}, on_data=pausing, on_news=caller.news.set)
        )
        await until(lambda: held[0].done or held[0].lost, what="the end of the first answer")
        await caller.whole()
        assert caller.data == b"two"
