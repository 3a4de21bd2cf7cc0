"""The keys of callers: Redis holds them, every process that needs them reads and follows them without a restart."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from broker import errors, jobs
from broker.callers import ANONYMOUS, Caller, Key, Keyring, Keys, Rights, check_name, make_key
from broker.policy.sentences import near_words
from broker.store import Store

log = logging.getLogger("warmlane.keys")

FOLLOW_EVERY_S = 0.4
"""A revoked key opens nothing anywhere after this long, and the time of one read."""

HEARD_EVERYWHERE_S = 0.6
"""After so long every api that Redis answers knows."""

CHANGE_TRIES = 5
EXPIRED_KEPT_MS = 30 * 86_400_000
"""An expired key is listed for this long, and forgotten with the next change after that."""


@dataclass(frozen=True)
class NewKey:
    """A key that was just made. `shown` is it in full: nobody can show it again."""

    caller: str
    id: str
    shown: str
    expires_at: int = 0


class KeyBook:
    """Reads, follows and changes the keys; what it holds of them is one `Keyring` at a time."""

    def __init__(self, store: Store, environment: Keys | None = None, *, anonymous: bool = True) -> None:
        """`anonymous`: whether everybody may call while there is no key at all; never where strangers can reach us."""
        self._store = store
        self._anonymous = anonymous
        self._ring = Keyring(environment or Keys({}), anonymous=anonymous)
        self._revision = 0
        self._reading = asyncio.Lock()  # of two reads at once, the later to end may have read the older keys

    def __bool__(self) -> bool:
        return bool(self._ring)

    @property
    def names(self) -> list[str]:
        """The callers that there are."""
        return self._ring.names

    def caller_of(self, authorization: str | None, x_api_key: str | None = None) -> Caller:
        """Says who calls; raises Unauthorized. Expiry goes by this machine's clock, to the second."""
        return self._ring.caller_of(authorization, x_api_key, now_ms=int(time.time() * 1000))

    def rights_of(self, name: str) -> Rights | None:
        """What a named caller may; None where its key came from the environment or is gone."""
        return self._ring.rights.get(name)

    def listing(self) -> list[dict[str, Any]]:
        """Lists every caller with its rights and keys; no secrets, no digests."""
        return self._ring.listing()

    async def reload(self) -> None:
        """Reads the keys if they changed. Keys that went without being revoked open the gateway to nobody."""
        async with self._reading:
            store = self._store
            revision = int(await store.command("HGET", store.keys.callers, "revision") or 0)
            if revision == self._revision:
                return
            fields = {k.decode(): v.decode() for k, v in (await store.hash(store.keys.callers)).items()}
            keys: dict[str, Key] = {}
            rights: dict[str, Rights] = {}
            gone = int(fields.get("revision", 0)) < self._revision and bool(self._ring.keys)
            for name, value in fields.items():
                kind, _, what = name.partition(":")
                try:
                    if kind == "key":
                        keys[what] = Key.from_json(value)
                    elif kind == "caller":
                        rights[what] = Rights.from_json(value)
                except (TypeError, ValueError, AttributeError) as e:  # written by another version, or by hand
                    log.error("event=key_unreadable field=%s reason=%s", name, type(e).__name__)
                    gone = gone or kind == "key"
            if gone and not keys:
                log.error("event=keys_lost reason=Redis has lost the keys, or they cannot be read: nobody may call")
            anonymous = self._anonymous and not gone
            self._ring = replace(self._ring, keys=keys, rights=rights, anonymous=anonymous)
            self._revision = int(fields.get("revision", 0))

    async def follow(self) -> None:
        """Keeps up with changes until cancelled."""
        while True:
            try:
                await self.reload()
            except errors.BrokerUnavailable as e:
                log.debug("event=keys_retry reason=%s", e)
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def new(self, name: str, rights: Rights, *, by: str, expires_at: int = 0) -> NewKey:
        """Makes a caller and its first key; raises BadRequest, WishRefused."""
        try:
            check_name(name)
        except ValueError as e:
            raise errors.BadRequest(str(e), "name") from None

        def change(ring: Keyring, now_ms: int) -> tuple[dict[str, str], NewKey]:
            if name in ring.names:
                raise errors.WishRefused(f"{name} has a key: `gateway key rotate {name}` gives it another one")
            if not ring.environment and not rights.admin and not ring.admins_without(now_ms=now_ms):
                raise errors.WishRefused(
                    "the first key must be an administrator's, or nobody could make the next: add --admin"
                )
            if 0 < expires_at <= now_ms:
                raise errors.BadRequest("a key that has expired opens nothing", "expires")
            key, shown = make_key(name, now_ms=now_ms, by=by, expires_at=expires_at)
            fields = {f"caller:{name}": rights.to_json(), f"key:{key.id}": key.to_json()}
            return fields, NewKey(name, key.id, shown, expires_at)

        made: NewKey = await self._change(change)
        log.info("event=key_new caller=%s key=%s by=%s", name, made.id, by)
        return made

    async def rotate(self, name: str, *, by: str, keep_old_ms: int = 0) -> NewKey:
        """Gives a caller a new key with the same rights and end; its old ones end at once, or after `keep_old_ms`."""

        def change(ring: Keyring, now_ms: int) -> tuple[dict[str, str], NewKey]:
            old = _keys_of(ring, name)
            expires_at = max((key.expires_at for key in old), default=0) if all(k.expires_at for k in old) else 0
            if 0 < expires_at <= now_ms:
                raise errors.WishRefused(f"the key of {name} has expired: revoke it, and make a new one")
            key, shown = make_key(name, now_ms=now_ms, by=by, expires_at=expires_at)
            fields = {f"key:{key.id}": key.to_json()}
            for gone in old:
                end = now_ms + keep_old_ms
                kept = replace(gone, expires_at=min(end, gone.expires_at or end))
                fields[f"key:{gone.id}"] = kept.to_json() if keep_old_ms > 0 else ""
            return fields, NewKey(name, key.id, shown, expires_at)

        made: NewKey = await self._change(change)
        log.info("event=key_rotated caller=%s key=%s by=%s", name, made.id, by)
        return made

    async def revoke(self, name: str, *, by: str) -> list[str]:
        """Takes a caller's keys and rights away, and what its webhooks are signed with; gives the ids of the keys. What
        waits of it is cancelled, also what an api took that had not heard yet; what runs goes on to its end.

        Asked again, it cancels what a revoke that broke off left waiting; with nothing left, it raises UnknownCaller.
        """

        def change(ring: Keyring, now_ms: int) -> tuple[dict[str, str], list[str]]:
            ids = [key.id for key in _keys_of(ring, name)]
            others = len(ring.rights) > 1
            if others and not ring.environment and not ring.admins_without(*ids, now_ms=now_ms):
                raise errors.WishRefused(
                    f"{name} is the last administrator, and nobody could change a key after it: make another first"
                )
            return {f"caller:{name}": ""} | {f"key:{key_id}": "" for key_id in ids}, ids

        try:
            gone: list[str] = await self._change(change, self._store.keys.webhook_secrets(name))
            cancelled = await self._cancel_waiting(name)
        except errors.UnknownCaller:  # perhaps it was revoked, and whoever did that came no further
            gone, cancelled = [], await self._cancel_waiting(name) if name != ANONYMOUS else 0
            if not cancelled:
                raise
        await asyncio.sleep(HEARD_EVERYWHERE_S)
        cancelled += await self._cancel_waiting(name)
        log.info("event=key_revoked caller=%s keys=%s cancelled=%d by=%s", name, ",".join(gone), cancelled, by)
        return gone

    async def _cancel_waiting(self, name: str) -> int:
        """Cancels the caller's jobs that wait, or will; says how many."""
        waiting = await self._store.command("ZRANGE", self._store.keys.waits(name), 0, -1)
        cancelled = 0
        for place in waiting:
            with suppress(errors.Lost, errors.NoSuchJob):
                await jobs.cancel(self._store, place.decode().rpartition("/")[2], message="its key was revoked")
                cancelled += 1
        return cancelled

    async def _change(self, change: Any, *goes: str) -> Any:
        """Decides on what is there now and writes it, unless somebody else was faster: then it decides again. The keys
        `goes` are deleted in the same step."""
        store = self._store
        for _ in range(CHANGE_TRIES):
            await self.reload()
            now_ms = await store.now_ms()
            fields, made = change(self._ring, now_ms)
            fields |= {f"key:{key.id}": "" for key in self._ring.keys.values() if _long_over(key, now_ms)}
            flat = [x for name, value in fields.items() for x in (name, value)]
            try:
                await store.run("keys_change", [store.keys.callers, *goes], [self._revision, *flat])
            except errors.StalePolicy:
                continue
            await self.reload()
            return made
        raise errors.WishRefused("the keys change faster than this change could be made; try again")


def _long_over(key: Key, now_ms: int) -> bool:
    return 0 < key.expires_at < now_ms - EXPIRED_KEPT_MS


def _keys_of(ring: Keyring, name: str) -> list[Key]:
    if name in ring.environment.names and name not in ring.rights:
        raise errors.WishRefused(f"the key of {name} stands in GATEWAY_KEYS: change it there")
    if name not in ring.rights:
        raise errors.UnknownCaller(name, near_words(name, list(ring.rights), most=3))
    return [key for key in ring.keys.values() if key.caller == name]
