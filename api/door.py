"""What is refused at the door whatever it asks for: pages of foreign origins, names that are not ours, odd encodings.

A browser sends a page's `POST` of `text/plain` anywhere without asking first. Where no keys are set, any page that a
teammate opens could drive the gateway that way, or read it too, once its own name resolves to 127.0.0.1.
"""

import socket
from collections.abc import Iterable
from ipaddress import ip_address

from api.asgi import Scope
from api.cors import ANY
from api.errors import INVALID, PERMISSION, Wrong

OURS = frozenset({"localhost", "host.docker.internal", "gateway.docker.internal", "host.containers.internal"})
"""Names by which this machine is called and that no stranger's DNS can give; addresses are as good."""
HOSTS_KNOWN = 64

_ONCE = (
    b"host",
    b"origin",
    b"content-length",
    b"transfer-encoding",
    b"content-encoding",
    b"idempotency-key",
    b"x-gateway-lane",
    b"x-gateway-allow-remote",
)

_FOREIGN = Wrong(
    "origin_refused", "pages of this origin may not call: GATEWAY_CORS_ORIGINS names those that may", 403, PERMISSION
)
_HOST = Wrong(
    "host_refused",
    "without a key the gateway answers by its address, localhost and this machine's name only",
    403,
    PERMISSION,
)
_ENCODED = Wrong(
    "unsupported_encoding", "the gateway takes bodies as they are; leave Content-Encoding out", 415, INVALID
)
_TRANSFER = Wrong("bad_http", "the only Transfer-Encoding that is understood is chunked", 400, INVALID)
_NO_HOST = Wrong("bad_http", "a request of HTTP/1.1 needs a Host", 400, INVALID)


class Door:
    """Looks at the headers of every request."""

    def __init__(self, origins: Iterable[str], *, host: str = "") -> None:
        origins = frozenset(origins)
        self._any_origin = ANY in origins
        self._origins = {origin.encode("latin-1") for origin in origins}
        self._names = OURS | {name.lower() for name in (host, socket.gethostname()) if name}
        self._hosts: set[bytes] = set()

    def wrong_with(self, scope: Scope, *, anonymous: bool) -> Wrong | None:
        """Says why a request goes no further, or None; `anonymous` is a gateway without keys."""
        pairs = scope["headers"]
        headers: dict[bytes, bytes] = dict(pairs)
        if len(headers) != len(pairs) and (twice := _sent_twice(pairs)):
            return Wrong("bad_http", f"{twice} was sent twice", 400, INVALID)
        host = headers.get(b"host")
        if host is None:
            if scope["http_version"] != "1.0":
                return _NO_HOST
        elif anonymous and host not in self._hosts and not self._is_ours(host):
            return _HOST
        if b"transfer-encoding" in headers and headers[b"transfer-encoding"].lower() != b"chunked":
            return _TRANSFER
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return _ENCODED
        origin = headers.get(b"origin")
        if origin is None or self._any_origin or origin in self._origins or _same(origin, host):
            return None
        return _FOREIGN

    def _is_ours(self, host: bytes) -> bool:
        name = _name_of(host.decode("latin-1").strip().lower())
        ours = name in self._names or name.endswith(".localhost") or _is_address(name)
        if ours and len(self._hosts) < HOSTS_KNOWN:
            self._hosts.add(host)
        return ours


def _sent_twice(pairs: Iterable[tuple[bytes, bytes]]) -> str:
    names = [name for name, _ in pairs]
    return next((name.decode() for name in _ONCE if names.count(name) > 1), "")


def _same(origin: bytes, host: bytes | None) -> bool:
    """Whether a page is our own: its origin is the host that the request is sent to."""
    scheme, _, rest = origin.partition(b"://")
    return scheme in (b"http", b"https") and bool(host) and rest.lower() == (host or b"").lower()


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
