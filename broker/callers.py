"""Callers: the named keys that may use the gateway. Keys are kept as hashes and compared in constant time."""

import hashlib
import hmac
import re
from collections.abc import Mapping

from broker.errors import Unauthorized

ANONYMOUS = "anonymous"
"""Who calls where no keys are set: then the api listens to this machine only."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Keys:
    """The keys of one api process."""

    def __init__(self, hashes: Mapping[str, bytes]) -> None:
        self._hashes = dict(hashes)

    @classmethod
    def parse(cls, text: str) -> "Keys":
        """Reads `name:secret,name:secret`; a ValueError says what is wrong without repeating a secret."""
        hashes: dict[str, bytes] = {}
        pairs = [pair.strip() for pair in text.split(",")]
        for number, pair in enumerate(pairs if text.strip() else [], start=1):
            name, colon, secret = pair.partition(":")
            if not colon or not secret:
                raise ValueError(f"holds pairs like laptop-3:secret, with a comma between them; pair {number} is none")
            if not _NAME.fullmatch(name):
                raise ValueError(f"pair {number}: a name is 1 to 64 letters, digits, '.', '_' and '-'")
            if name in hashes:
                raise ValueError(f"names {name} twice")
            hashes[name] = _hash(secret)
        if len(set(hashes.values())) < len(hashes):
            raise ValueError("gives two names the same secret")
        return cls(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    @property
    def names(self) -> list[str]:
        """The callers that there are."""
        return list(self._hashes) or [ANONYMOUS]

    def caller_of(self, authorization: str | None, x_api_key: str | None = None) -> str:
        """Says whose key a request carries, as `Authorization: Bearer …` or `x-api-key`; raises Unauthorized."""
        if not self._hashes:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else ""
        presented = presented or (x_api_key or "").strip()
        if not presented:
            raise Unauthorized("this gateway needs a key: send `Authorization: Bearer <key>`")
        found, digest = "", _hash(presented)
        for name, known in self._hashes.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(known, digest):
                found = name
        if not found:
            raise Unauthorized("this key is not one of this gateway's")
        return found


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
