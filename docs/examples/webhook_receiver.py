"""Receives the gateway's webhooks and believes only those that are signed (Standard Webhooks). Needs Python alone.

    WEBHOOK_SECRET=whsec_… python webhook_receiver.py [PORT]

While a secret is changed, name both with a space between them. Deliveries may come more than once, with the same id.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

TOLERANCE_S = 300
BODY_BYTES_MAX = 1_000_000
SEEN_MAX = 10_000


class NotSigned(Exception):
    """Whoever sent this, it was not the gateway, or it is an old delivery sent again by somebody else."""


def verify(secrets: Iterable[str], headers: Mapping[str, str], body: bytes, *, now_s: float) -> str:
    """Gives the delivery's id; raises NotSigned. `headers` has names in lower case."""
    try:
        delivery, stamp, given = (headers["webhook-" + name] for name in ("id", "timestamp", "signature"))
        sent_s = int(stamp)
    except (KeyError, ValueError):
        raise NotSigned("the webhook headers are not there") from None
    if abs(now_s - sent_s) > TOLERANCE_S:
        raise NotSigned("it is too old, or from the future")
    signed = f"{delivery}.{stamp}.".encode() + body
    wanted = [_signature(secret, signed) for secret in secrets]
    offered = [part[3:].encode() for part in given.split(" ") if part.startswith("v1,")]
    # All pairs are compared, each in constant time.
    if not sum(hmac.compare_digest(one, other) for one in wanted for other in offered):
        raise NotSigned("no signature fits")
    return delivery


def _signature(secret: str, signed: bytes) -> bytes:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest())


class Receiver(BaseHTTPRequestHandler):
    """Answers 204 to what it has handled, 503 while it does so, 400 to what it does not believe; the gateway tries
    again whatever is no 2xx."""

    secrets: ClassVar[tuple[str, ...]] = ()
    seen: ClassVar[OrderedDict[str, None]] = OrderedDict()
    under_way: ClassVar[set[str]] = set()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        if not 0 < length <= BODY_BYTES_MAX:
            return self._answer(413)
        body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            delivery = verify(self.secrets, headers, body, now_s=time.time())
        except NotSigned as why:
            self.log_message("refused: %s", why)
            return self._answer(400)
        self._answer(self._handled(delivery, body))

    def _handled(self, delivery: str, body: bytes) -> int:
        with self.lock:
            if delivery in self.seen:
                return 204
            if delivery in self.under_way:  # the gateway waits for seconds only, and then delivers it again
                return 503
            self.under_way.add(delivery)
        try:
            handle(json.loads(body))
            with self.lock:
                self.seen[delivery] = None  # after the work: if that fails, the next delivery does it
                if len(self.seen) > SEEN_MAX:
                    self.seen.popitem(last=False)
        finally:
            with self.lock:
                self.under_way.discard(delivery)
        return 204

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()


def handle(event: dict[str, Any]) -> None:
    """What a job's end is good for."""
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    Receiver.secrets = tuple(os.environ["WEBHOOK_SECRET"].split())
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
    with ThreadingHTTPServer(("127.0.0.1", port), Receiver) as server:
        print(f"listens on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
        server.serve_forever()
