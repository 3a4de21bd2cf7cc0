"""One wake of a model: its lock, room for it, the load, and the probe that alone makes it warm.

The wake lock is held for as long as the wake goes on, on a connection or a subprocess of ours, so that no client's
hang-up ends it. Only seeing another holder stops a load, not Redis' silence.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from broker import errors, wake
from broker.policy import Model
from broker.store import Store
from workers import progress
from workers.readiness import probe_within_s
from workers.room import Claim, NoRoom
from workers.runtimes.base import LoadFailed, Runtime, RuntimeProblem

log = logging.getLogger("warmlane.wake")

TELL_TURN_S = 1.0
"""A turn that takes longer than this is told: somebody else's load goes on."""


@dataclass(frozen=True)
class Woken:
    """What a wake that succeeded has shown, in ms."""

    load_ms: float  # 0 = it was in memory already
    first_token_ms: float


class NotWoken(Exception):
    """A wake failed; the message says why. Not `tried` = nobody was there to load anything."""

    def __init__(self, words: str, *, tried: bool) -> None:
        super().__init__(words)
        self.tried = tried


@asynccontextmanager
async def locked(
    store: Store, model: str, *, host: str, boot: str, tell: Callable[[], Awaitable[None]]
) -> AsyncIterator[wake.WakeLock | None]:
    """Holds the model's wake lock, so that nobody else on any host wakes it meanwhile; None = somebody else does."""
    lock = await wake.take(store, model, host=host, boot=boot)
    try:
        yield lock
    finally:
        if lock is not None:
            try:
                await tell()  # before the lock is free: whoever takes it next must see that it is warm
                await wake.drop(store, lock)
            except errors.BrokerUnavailable:
                log.warning("event=wake_drop model=%s reason=redis away, the lock runs out by itself", model)


class Wake:
    """One wake under its lock. It says how it went; what the model is then is its waker's to say."""

    def __init__(
        self,
        store: Store,
        lock: wake.WakeLock,
        model: Model,
        runtime: Runtime,
        *,
        room: AbstractAsyncContextManager[Claim],
        waits: Callable[[str], None],
        begins: Callable[[], Awaitable[None]],
        in_memory: Callable[[], Awaitable[None]],
        progressed: Callable[[float], None],
    ) -> None:
        """`waits` hears of a turn that takes long; `begins` is called when the load may begin; `in_memory` is called
        once it has answered, while its room is still kept: it notes what it occupies."""
        self._store = store
        self._lock = lock
        self._name = lock.model
        self._model = model
        self._runtime = runtime
        self._room = room
        self._waits = waits
        self._begins = begins
        self._in_memory = in_memory
        self._progressed = progressed
        self._began = self._reached = False

    async def run(self) -> Woken:
        """Loads the model until it has answered a probe.

        Raises NoRoom if no load was begun because it does not fit now, BrokerUnavailable if Redis was away then,
        LockHeld if another holder was seen, NotWoken for any other failure. What is in memory after a failed load is
        taken out again.
        """
        failed: Exception | None = None
        woken = Woken(0.0, 0.0)
        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep_lock(), name=f"wake-lock {self._name}")
                shown = group.create_task(progress.follow(self._runtime, self._progressed), name=f"load {self._name}")
                woken = await self._load()
                keeper.cancel()
                shown.cancel()
        except* (RuntimeProblem, OSError, errors.LockHeld, errors.BrokerUnavailable) as group_error:
            failed = first_of(group_error)  # a timeout is an OSError
        if isinstance(failed, errors.BrokerUnavailable):
            raise failed  # no load had begun: only its beginning asks Redis, and what goes on does not depend on it
        if failed is not None:
            raise await self._failure(failed)
        return woken

    async def _load(self) -> Woken:
        timeout_s = self._model.wake_timeout_ms / 1000
        if lacking := await self._runtime.lacks():
            self._began = self._reached = True  # as good as tried: its pauses grow
            raise LoadFailed(lacking)
        async with self._turn(), self._room as room, asyncio.timeout(timeout_s):  # what it waits for has its own limits
            self._began, self._reached = True, await self._runtime.state() != "unreachable"
            await self._begins()
            load_ms = await room.load(self._runtime, timeout_s=timeout_s)
            first_ms = await self._probe()
            if first_ms > self._model.first_token_budget_ms:  # the first answer after a load may be slow
                first_ms = await self._probe()
            await self._in_memory()
            return Woken(load_ms, first_ms)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        words = "waits for its runtime to end another load"
        late = asyncio.get_running_loop().call_later(TELL_TURN_S, self._waits, words)
        try:
            async with self._runtime.turn():
                late.cancel()
                yield
        finally:
            late.cancel()

    async def _probe(self) -> float:
        return await self._runtime.probe(timeout_s=probe_within_s(self._model.first_token_budget_ms))

    async def _keep_lock(self) -> None:
        while True:
            await asyncio.sleep(wake.WAKE_RENEW_S)
            try:
                if not await wake.keep(self._store, self._lock):
                    raise errors.LockHeld(f"somebody else wakes {self._name} now")
            except errors.BrokerUnavailable as e:
                log.debug("event=wake_keep_retry model=%s reason=%s", self._name, e)

    async def _failure(self, error: Exception) -> Exception:
        """Says what a failed wake comes to, and clears up after it."""
        if isinstance(error, NoRoom) and not self._began:  # one that ran out of memory while it loaded did fail
            return error
        if isinstance(error, errors.LockHeld):
            await self._abandon()
            return error
        timeout_s = self._model.wake_timeout_ms / 1000
        words = f"it did not answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
        tried = self._began and (self._reached or await self._runtime.state() != "unreachable")
        await self._abandon()
        return NotWoken(words, tried=tried)

    async def _abandon(self) -> None:
        try:
            await self._runtime.unload()
        except RuntimeProblem as e:
            log.warning("event=unload_failed model=%s reason=%s", self._name, e)


def first_of(error: BaseException) -> Exception:
    """The first error of a group, of groups within it too."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, Exception) else LoadFailed(str(error))
