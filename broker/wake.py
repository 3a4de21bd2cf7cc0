"""The wake lock: at most one wake of a model at a time, with a named holder and a fencing epoch."""

from dataclasses import dataclass

from broker import errors
from broker.store import Store

WAKE_TTL_MS = 15_000
WAKE_RENEW_S = 5.0


@dataclass(frozen=True)
class WakeLock:
    """A held lock. Its value in Redis is `host/boot/epoch`."""

    model: str
    host: str
    boot: str
    epoch: int

    @property
    def value(self) -> str:
        """What Redis holds."""
        return f"{self.host}/{self.boot}/{self.epoch}"


async def take(store: Store, model: str, *, host: str, boot: str, ttl_ms: int = WAKE_TTL_MS) -> WakeLock | None:
    """Takes the lock, or gives None when somebody else holds it."""
    keys = [store.keys.wake(model), store.keys.wake_epoch(model)]
    try:
        epoch = await store.run("wake_take", keys, [host, boot, ttl_ms, 0])
    except errors.LockHeld:
        return None
    return WakeLock(model, host, boot, int(epoch))


async def keep(store: Store, lock: WakeLock, *, ttl_ms: int = WAKE_TTL_MS) -> bool:
    """Renews the lock, or takes it again if it fell free; False when another holder was seen since.

    Redis' silence is no reason to stop a load: BrokerUnavailable says nothing about who holds the lock.
    """
    keys = [store.keys.wake(lock.model), store.keys.wake_epoch(lock.model)]
    try:
        await store.run("wake_take", keys, [lock.host, lock.boot, ttl_ms, lock.epoch])
    except errors.LockHeld:
        return False
    return True


async def drop(store: Store, lock: WakeLock) -> None:
    """Gives the lock back."""
    await store.run("wake_drop", [store.keys.wake(lock.model)], [lock.value])


async def holder(store: Store, model: str) -> str:
    """Says who holds the lock, "" if nobody."""
    value = await store.command("GET", store.keys.wake(model))
    return value.decode() if value else ""
