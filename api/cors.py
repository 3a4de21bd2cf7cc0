"""Lets pages of named origins call the gateway from a browser. Off unless GATEWAY_CORS_ORIGINS names some.

Plain ASGI around the whole application: of an answer only its start is touched, never a piece of its body.
"""

from collections.abc import Iterable, MutableMapping
from typing import Any

from api.asgi import App, Receive, Scope, Send

ANY = "*"
PREFLIGHT_KEPT_S = b"600"
METHODS = b"GET, HEAD, POST, PUT, DELETE, OPTIONS"
EXPOSED = (
    b"Retry-After, X-Gateway-Job, X-Gateway-Lane, X-Gateway-Served-By, X-Gateway-Queue-Ms, X-Gateway-First-Token-Ms"
)


class Cors:
    """The application behind it, for browsers too."""

    def __init__(self, app: App, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = {origin.encode("latin-1") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        origin = headers.get(b"origin", b"")
        if not origin:
            return await self._app(scope, receive, send)
        allowed = self._allowed(origin)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            # The browser asks before it sends a key or JSON: no key comes with the question, so none is wanted.
            if allowed:
                wanted = headers.get(b"access-control-request-headers", b"*")
                allowed += [
                    (b"access-control-allow-methods", METHODS),
                    (b"access-control-allow-headers", wanted),
                    (b"access-control-max-age", PREFLIGHT_KEPT_S),
                ]
            varies = (b"vary", b"Origin, Access-Control-Request-Headers")
            await send({"type": "http.response.start", "status": 204, "headers": [varies, *allowed]})
            return await send({"type": "http.response.body", "body": b""})

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                exposed = [(b"access-control-expose-headers", EXPOSED)] if allowed else []
                message["headers"] = [*message.get("headers", ()), (b"vary", b"Origin"), *allowed, *exposed]
            await send(message)

        await self._app(scope, receive, sent)

    def _allowed(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        if ANY.encode() in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin)] if origin in self._origins else []
