"""Callers: the named keys that may use the gateway, and what each of them may. Pure: no Redis here, no clock.

A key is `wl_<id>_<secret>`; the id is for people, in lists and logs. The secret is 256 random bits and is kept as one
SHA-256: there is nothing to guess that a slow hash would protect. A key is found by the hash of all of it, so that the
time of a refusal says nothing of the keys that there are, not even whether an id is known. Keys of GATEWAY_KEYS are
whatever a person chose, and all of them are compared each time.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from broker.errors import Unauthorized
from broker.policy.content import BATCH

ANONYMOUS = "anonymous"
"""Who calls where no keys are set: then the api listens to this machine only."""

NOT_OURS = "this key is not one of this gateway's"
"""What everybody hears whose key does not open, whatever is wrong with it."""

PRESENTED_MAX = 512
"""Characters of a presented key that are looked at."""

SECRET_BYTES = 32
ID_CHARACTERS = "abcdefghijkmnpqrstuvwxyz23456789"
ID_LENGTH = 8

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_NAME = re.compile(NAME_PATTERN)


@dataclass(frozen=True)
class Rights:
    """What a caller may. The default is to ask for everything, as long as it stays on this machine.

    `lanes`: the names it may ask for, empty = all. `priority`: the most urgent that its work may be. `max_waiting` and
    `max_running`: its jobs that may do so at once; `tokens_per_day`: read anew or made, of a day in UTC; 0 = no limit.
    `remote`: its requests may leave the machine if they say so; into `remote_lanes` they may without a word, since
    agents can't send headers. `admin`: policy, models, hosts, keys and other callers' jobs.
    """

    lanes: tuple[str, ...] = ()
    priority: Literal["interactive", "batch"] = "interactive"
    max_waiting: int = 0
    max_running: int = 0
    tokens_per_day: int = 0
    remote: bool = False
    remote_lanes: tuple[str, ...] = ()
    admin: bool = False

    @property
    def exits(self) -> frozenset[str]:
        """The lanes by which its requests may leave without a word: those named, and their batch lanes."""
        return frozenset(self.remote_lanes) | {name + BATCH for name in self.remote_lanes}

    def to_json(self) -> str:
        """Writes it as Redis keeps it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Rights":
        """Reads it; fields of a newer version are left out. Raises ValueError."""
        return _RIGHTS.validate_json(text)

    def may_ask_for(self, name: str, lane: str = "") -> bool:
        """Whether it may ask for this name, or for the lane that the name leads to."""
        return not self.lanes or name in self.lanes or lane in self.lanes


EVERYTHING = Rights(remote=True, admin=True)


@dataclass(frozen=True)
class Caller:
    """Somebody who calls."""

    name: str
    rights: Rights = EVERYTHING

    @property
    def named(self) -> bool:
        """Whether its rights stand in Redis and may change: not those of GATEWAY_KEYS, nor of nobody in particular."""
        return self.rights is not EVERYTHING


NOBODY_IN_PARTICULAR = Caller(ANONYMOUS)


@dataclass(frozen=True)
class Key:
    """A key as it is kept: never the secret. Instants in ms; `expires_at` 0 = it does not."""

    id: str
    caller: str
    digest: str
    created_at: int = 0
    created_by: str = ""
    expires_at: int = 0

    def to_json(self) -> str:
        """Writes it as Redis keeps it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Key":
        """Reads it; fields of a newer version are left out. Raises ValueError."""
        return _KEYS.validate_json(text)

    def holds_at(self, now_ms: int) -> bool:
        """Whether it is good at this instant."""
        return not 0 < self.expires_at <= now_ms


_RIGHTS, _KEYS = TypeAdapter(Rights), TypeAdapter(Key)


def make_key(caller: str, *, now_ms: int, by: str, expires_at: int = 0) -> tuple[Key, str]:
    """Makes a key; gives it as it is kept, and as its owner sees it this once."""
    key_id = "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
    shown = f"wl_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return Key(key_id, caller, _hash(shown).hex(), now_ms, by, expires_at), shown


def check_name(name: str) -> None:
    """Raises ValueError for what cannot name a caller."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or digit")
    if name == ANONYMOUS:
        raise ValueError(f"{ANONYMOUS} is who calls without a key")


class Keys:
    """The keys of GATEWAY_KEYS: they may everything, because who sets the environment may."""

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
        return list(self._hashes)

    def caller_of(self, digest: bytes) -> str:
        """Says whose secret has this digest, "" for nobody's. All are compared, so that the time says nothing."""
        found = ""
        for name, known in self._hashes.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


@dataclass(frozen=True)
class Keyring:
    """Every key that opens this gateway, as of one moment. `anonymous`: without any key everybody may call."""

    HIDDEN: ClassVar[frozenset[str]] = frozenset({"digest", "caller"})
    """What a list does not say of each key."""

    environment: Keys = field(default_factory=lambda: Keys({}))
    keys: Mapping[str, Key] = field(default_factory=dict)
    rights: Mapping[str, Rights] = field(default_factory=dict)
    anonymous: bool = True

    def __bool__(self) -> bool:
        return bool(self.environment) or bool(self.keys)

    @cached_property
    def _by_hash(self) -> Mapping[bytes, Key]:
        return {bytes.fromhex(key.digest): key for key in self.keys.values()}

    @property
    def names(self) -> list[str]:
        """The callers that there are."""
        return [*self.environment.names, *self.rights] or [ANONYMOUS]

    def caller_of(self, authorization: str | None, x_api_key: str | None = None, *, now_ms: int) -> Caller:
        """Says whose key a request carries, as `Authorization: Bearer …` or `x-api-key`; raises Unauthorized.

        A key that is wrong, revoked, expired, cut short or of another gateway is answered with the same words.
        """
        if self.anonymous and not self:
            return NOBODY_IN_PARTICULAR
        scheme, _, token = (authorization or "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else ""
        presented = presented or (x_api_key or "").strip()
        if not presented:
            raise Unauthorized("this gateway needs a key: send `Authorization: Bearer <key>`")
        if len(presented) > PRESENTED_MAX:
            presented = ""
        digest = _hash(presented)
        key = self._by_hash.get(digest)
        name = self.environment.caller_of(digest)
        if name:
            return Caller(name)
        if key is not None and key.holds_at(now_ms) and key.caller in self.rights:
            return Caller(key.caller, self.rights[key.caller])
        raise Unauthorized(NOT_OURS)

    def admins_without(self, *key_ids: str, now_ms: int) -> list[str]:
        """The ids of the keys of administrators that would be left without these."""
        return [
            key.id
            for key in self.keys.values()
            if key.id not in key_ids and key.holds_at(now_ms) and self.rights.get(key.caller, Rights()).admin
        ]

    def listing(self) -> list[dict[str, Any]]:
        """Lists every caller with its rights and keys; no secrets, no digests."""
        named = [
            {
                "name": name,
                "rights": asdict(rights),
                "keys": [
                    {name: value for name, value in asdict(key).items() if name not in self.HIDDEN}
                    for key in self.keys.values()
                    if key.caller == name
                ],
            }
            for name, rights in sorted(self.rights.items())
        ]
        set_outside = [
            {"name": name, "rights": asdict(EVERYTHING), "keys": [], "from": "GATEWAY_KEYS"}
            for name in self.environment.names
        ]
        return set_outside + named


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
