"""Whatever a runtime answers when it is asked to count, its worker goes on, and nobody's prompt stands in the log."""

import json

import pytest

from workers.counting import count
from workers.runtimes.base import Endpoint
from workers.runtimes.http_server import Exchange, HttpServer

CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "zebra"}]}).encode()


@pytest.mark.parametrize(
    "template",
    [
        b"[]",
        b"null",
        b'"zebra"',
        b"[" * 100_000,
        b"\xffzebra",
        b'{"prompt":{"zebra":1}}',
        b"zebra",
        b'{"prompt":"zebra"}',
    ],
    ids=lambda template: template[:12].decode("latin-1"),
)
async def test_a_runtime_that_counts_oddly_is_not_believed(template: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The last of them writes the prompt well, and cuts it into nonsense."""
    caplog.set_level("DEBUG")

    async def handle(exchange: Exchange) -> None:
        await exchange.begin("application/json")
        await exchange.write(template if exchange.path == "/apply-template" else b"\xffzebra")
        await exchange.end()

    async with HttpServer(handle).listening() as port:
        endpoint = Endpoint(f"http://127.0.0.1:{port}", model="weights", tokenizer="llama")
        assert await count(endpoint, CHAT) == 0
    assert "zebra" not in caplog.text
