"""Webhooks, as far as they are thinking: signatures, when to try again, when to give up, when to leave an endpoint
alone. Pure.

An event is tried for a day: after 5 s, 10 s, 20 s and so on, at most an hour apart, each pause shortened by chance so
that what failed together does not come back together. After five failures in a row an endpoint is left alone for half a
minute, then longer, five minutes at most, and gets one delivery as a trial.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal

from broker.webhook_secrets import PREFIX

HORIZON_MS = 24 * 3_600_000
"""For how long an event is tried, from when its delivery was made or somebody sent it once more."""

PAUSE_MS = 5_000
PAUSE_MS_MAX = 3_600_000
RETRY_AFTER_S_MAX = 3_600
"""An endpoint's own `Retry-After` counts up to this."""

FAILURES_MAX = 5
OPEN_MS = 30_000
OPEN_MS_MAX = 300_000

GONE = 410
"""By which an endpoint says that it wants no more of this."""

_ASKS_TO_WAIT = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Answer:
    """How an endpoint answered; status 0 = it did not, and `error` says why. `refused`: it was not even asked."""

    status: int
    error: str = ""
    retry_after_s: int = 0
    refused: bool = False

    @property
    def taken(self) -> bool:
        """Whether the event has arrived."""
        return 200 <= self.status < 300

    @property
    def breaks(self) -> bool:
        """Whether the endpoint itself is in trouble, and not only this event refused."""
        return not self.taken and not self.refused and (not 300 <= self.status < 500 or self.status in _ASKS_TO_WAIT)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a delivery after an attempt."""

    outcome: Literal["delivered", "failed", "dead"]
    retry_after_ms: int = 0
    open_for_ms: int = 0


def judge(answer: Answer, *, tries: int, since_ms: int, now_ms: int, failures: int, chance: Random) -> Verdict:
    """Decides after an attempt; `tries` and `failures` (of the endpoint, in a row) are those before it."""
    if answer.taken:
        return Verdict("delivered")
    open_for_ms = open_ms(failures + 1) if answer.breaks else 0
    pause_ms = max(retry_ms(tries + 1, chance), min(answer.retry_after_s, RETRY_AFTER_S_MAX) * 1_000)
    if answer.status == GONE or now_ms + pause_ms > since_ms + HORIZON_MS:
        return Verdict("dead", open_for_ms=open_for_ms)
    return Verdict("failed", pause_ms, open_for_ms)


def retry_ms(tries: int, chance: Random) -> int:
    """The pause after so many attempts: twice as long each time, and by chance up to half of it shorter."""
    longest = min(PAUSE_MS_MAX, PAUSE_MS * 2 ** min(tries - 1, 20))
    return int(longest * (1 - chance.random() / 2))


def open_ms(failures: int) -> int:
    """For how long an endpoint is left alone after so many failures in a row, 0 = not at all."""
    over = failures - FAILURES_MAX
    return 0 if over < 0 else min(OPEN_MS_MAX, OPEN_MS * 2 ** min(over, 10))


def signed(secrets: Iterable[str], *, delivery_id: str, at_s: int, body: str) -> dict[str, str]:
    """The headers of Standard Webhooks: each secret gives a signature of its own."""
    told = f"{delivery_id}.{at_s}.{body}".encode()
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{_signature(secret, told)}" for secret in secrets),
    }


def retry_after_s(header: str) -> int:
    """Reads a `Retry-After` in seconds; a date or nonsense is 0, and our own pause counts."""
    return int(header) if header.isascii() and header.isdigit() and len(header) < 9 else 0


def _signature(secret: str, told: bytes) -> str:
    key = binascii.a2b_base64(secret.removeprefix(PREFIX))
    return base64.b64encode(hmac.new(key, told, hashlib.sha256).digest()).decode()
