"""What webhooks are signed with: each caller has secrets of its own, of which all that have not ended sign.

They are kept as they are, since a signature needs them, and told once, when they are made. A caller whose keys are
revoked has none any more.
"""

import base64
import logging
import secrets
from dataclasses import dataclass

from broker import errors
from broker.callers import ID_CHARACTERS, ID_LENGTH
from broker.records import decode_hash
from broker.store import Store

log = logging.getLogger("warmlane.webhooks")

SECRET_BYTES = 32
PREFIX = "whsec_"
OVERLAP_MS, OVERLAP_MS_MAX = 24 * 3_600_000, 30 * 86_400_000
"""How long a replaced secret signs beside the new one, where nobody says otherwise, and at most."""

MOST = 4
"""Secrets of a caller that sign at once: each is one more signature in a header."""


@dataclass(frozen=True)
class Secret:
    """One secret of a caller. Instants in ms; `ends_at` 0 = it does not end."""

    id: str
    secret: str
    made_at: int
    ends_at: int


async def make(store: Store, caller: str) -> Secret:
    """Makes a caller's first secret; raises WishRefused where it has one."""
    return await _change(store, caller, "new", 0)


async def rotate(store: Store, caller: str, *, overlap_ms: int = OVERLAP_MS) -> Secret:
    """Makes another; until `overlap_ms` have passed those before it sign too. Raises WishRefused where there is none,
    or too many sign already."""
    return await _change(store, caller, "rotate", overlap_ms)


async def revoke(store: Store, caller: str, secret_id: str) -> None:
    """Takes one away at once; raises WishRefused where the caller has no such."""
    if await _run(store, caller, "revoke", secret_id, "", 0) == "none":
        raise errors.WishRefused(f"{caller} has no webhook secret {secret_id[: errors.NAME_SHOWN]!r}")
    log.info("event=webhook_secret_revoked caller=%s", caller)


async def listed(store: Store, caller: str) -> list[Secret]:
    """Those that sign now, the newest first."""
    found, now = [], await store.now_ms()
    for secret_id, text in decode_hash(await store.hash(store.keys.webhook_secrets(caller))).items():
        secret, made_at, ends_at = text.split(" ")
        if not 0 < int(ends_at) <= now:
            found.append(Secret(secret_id, secret, int(made_at), int(ends_at)))
    return sorted(found, key=lambda one: (one.ends_at > 0, -one.made_at, one.id))


async def _change(store: Store, caller: str, wish: str, overlap_ms: int) -> Secret:
    secret_id = "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
    secret = PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    match await _run(store, caller, wish, secret_id, secret, overlap_ms):
        case "exists":
            raise errors.WishRefused(f"{caller} has a webhook secret: `gateway webhook secret rotate` makes another")
        case "none":
            raise errors.WishRefused(f"{caller} has no webhook secret: `gateway webhook secret new` makes one")
        case "many":
            raise errors.WishRefused(f"{MOST} webhook secrets of {caller} sign already: revoke one, or wait")
    log.info("event=webhook_secret_made caller=%s secret=%s", caller, secret_id)
    return Secret(secret_id, secret, await store.now_ms(), 0)


async def _run(store: Store, caller: str, wish: str, secret_id: str, secret: str, overlap_ms: int) -> str:
    args = [store.now_arg(), wish, secret_id, secret, overlap_ms, MOST]
    said: bytes = await store.run("webhook_secret", [store.keys.webhook_secrets(caller)], args)
    return said.decode()
