"""The small server below the simulated runtime and the doubles: what it cuts, and when."""

import asyncio
import socket

import pytest

from workers.runtimes.http_server import Exchange, HttpServer


async def answer(exchange: Exchange) -> None:
    await exchange.answer({})


@pytest.mark.parametrize("passes", range(5))
async def test_a_client_that_came_just_before_the_end_is_cut_like_the_others(passes: int) -> None:
    """A connection that is accepted but has no transport yet would stay open for ever, with nobody behind it."""
    with socket.socket() as client:
        async with HttpServer(answer).listening() as port:
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
            for _ in range(passes):
                await asyncio.sleep(0)
        async with asyncio.timeout(1):
            try:
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
            except ConnectionResetError:
                return
