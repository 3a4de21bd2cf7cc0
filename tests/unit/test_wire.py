"""The wire of the tests: what it says of who closed a connection."""

import asyncio

import pytest

from tests.support.waiting import until
from tests.support.wire import Wire


@pytest.mark.parametrize("ends", [False, True])
async def test_a_hang_up_is_noted_while_the_server_goes_on_writing_and_only_then(ends: bool) -> None:
    """Then both ways break in the same moment, each for what the other found."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            while not ends:
                writer.write(b"a word ")
                await writer.drain()
                await asyncio.sleep(0)
        except OSError:
            return
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Wire(f"http://127.0.0.1:{port}").running() as wire:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(wire.url.rpartition(":")[2]))
                writer.write(b"GET /words HTTP/1.1\r\n\r\n")
                assert bool(await reader.read(10)) is not ends
                writer.transport.abort()
                await until(lambda: not wire._open, what="the wire has let go")
            assert [path for path, _ in wire.hung_up] == ([] if ends else ["/words"] * 20)
