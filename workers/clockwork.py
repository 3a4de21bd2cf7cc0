"""arq's place in the house: the only file that imports it. Cron chores, supervised: arq dies when Redis blips (its poll
loop has no reconnect), so it is started again. Values travel as JSON, never as pickles. Webhooks go from here, a round
each second; what arq knows of them is only that. While Redis is full, arq can write nothing down and dies at once; then
the chores go on without it, since they are what makes room."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from typing import Any, cast

from arq.connections import ArqRedis
from arq.cron import CronJob, cron
from arq.worker import Worker

from broker import errors
from broker.policies import PolicyBook
from broker.store import Store
from workers import chores
from workers.batches import Expander
from workers.courier import Courier
from workers.post import Post

log = logging.getLogger("warmlane.clockwork")

Step = Callable[[], Awaitable[float]]

JOB_TIMEOUT_S = 15
POLL_S = 0.5
RESTART_PAUSE_S = 1.0
RESTART_PAUSE_MAX_S = 10.0
CLOSE_TIMEOUT_S = 2.0
CANCEL_AGAIN_S = 0.5
BY_HAND_EVERY_S = 1.0
EVERY_SECOND = set(range(60))
SWEEP_SECONDS = {0, 10, 20, 30, 40, 50}
MAX_JOBS = 20
"""Rounds of webhooks overlap while endpoints are slow; chores must find a place beside them."""


async def keep_running(store: Store, book: PolicyBook) -> None:
    """Runs arq's worker until cancelled; a crash of it is logged and it starts again after a pause."""
    if not store.url:
        return
    async with Post() as post:
        works = {"store": store, "book": book, "courier": Courier(store, book, post), "expander": Expander(store, book)}
        await _keep_running(store, works)


async def _keep_running(store: Store, works: dict[str, Any]) -> None:
    pause_s = RESTART_PAUSE_S
    while True:
        await _by_hand_while_full(store, works)
        # a pool of our own: whatever arq dies of, and wherever it is cancelled, its connections can be closed
        pool = _pool(store)
        worker = _worker(store, pool, works)
        started = asyncio.get_running_loop().time()
        try:
            await _run(worker)
        except asyncio.CancelledError:
            raise
        except Exception as e:  # noqa: BLE001  # whatever arq dies of, chores go on later
            if await _full(store):
                continue
            log.warning("event=arq_restart reason=%s", str(e) or type(e).__name__)
        finally:
            await _close(worker, pool)
        lived_s = asyncio.get_running_loop().time() - started
        pause_s = RESTART_PAUSE_S if lived_s > 60 else min(pause_s * 2, RESTART_PAUSE_MAX_S)
        await asyncio.sleep(pause_s)


async def _by_hand_while_full(store: Store, works: dict[str, Any]) -> None:
    """Does the chores about as often as arq would. Other schedulers may do them at the same time: that is harmless."""
    if full := await _full(store):
        log.warning("event=chores_by_hand reason=%s", full)
    for turn in count():
        if not await _full(store):
            return
        due = [chore for chore, every in BY_HAND if turn % every == 0]
        await asyncio.gather(*(_tried(chore, works) for chore in due))
        await asyncio.sleep(BY_HAND_EVERY_S)


async def _tried(chore: Callable[[dict[str, Any]], Awaitable[None]], works: dict[str, Any]) -> None:
    try:
        async with asyncio.timeout(JOB_TIMEOUT_S):
            await chore(works)
    except Exception as e:  # noqa: BLE001  # as with arq: the next time is soon, and the others go on
        log.warning("event=chore_failed chore=%s reason=%s", chore.__name__.strip("_"), str(e) or type(e).__name__)


async def _full(store: Store) -> str:
    try:
        return await store.full()
    except errors.BrokerUnavailable:
        return ""


async def _sweep(context: dict[str, Any]) -> None:
    await chores.sweep(context["store"], context["book"])


async def _forget(context: dict[str, Any]) -> None:
    await chores.forget(context["store"], context["book"])


async def _deliver(context: dict[str, Any]) -> None:
    await context["courier"].round()


async def _advance(context: dict[str, Any]) -> None:
    await context["expander"].round()


BY_HAND = ((_deliver, 1), (_advance, 1), (_sweep, 10), (_forget, 3600))
"""The chores, and in every how many turns each is done."""


def _as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


def _pool(store: Store) -> ArqRedis:
    connections = ArqRedis.from_url(store.url, socket_connect_timeout=2, socket_timeout=10).connection_pool
    # it enqueues the cron jobs, and would do so in pickles
    return ArqRedis(connections, job_serializer=_as_json, job_deserializer=json.loads)


class _Worker(Worker):
    """arq's worker, and the notes that it writes of how its jobs ended.

    Each is written behind a shield: a job that is cancelled goes without it, and of what the note dies of then, as when
    Redis is away, nobody would hear but the event loop, in a traceback.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes: set[asyncio.Task[Any]] = set()

    async def finish_job(self, *args: Any, **kwargs: Any) -> None:
        """Notes how a job ended."""
        self._write()
        await super().finish_job(*args, **kwargs)

    async def finish_failed_job(self, *args: Any, **kwargs: Any) -> None:
        """Notes that a job could not be run."""
        self._write()
        await super().finish_failed_job(*args, **kwargs)

    def _write(self) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self.notes.add(task)
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[Any]) -> None:
        self.notes.discard(task)
        if not task.cancelled() and (died_of := task.exception()) is not None:
            log.debug("event=arq_note_lost reason=%s", died_of)


def _worker(store: Store, pool: ArqRedis, works: dict[str, Any]) -> _Worker:
    name = store.keys.namespace  # arq's own keys know no namespace: without it, gateways that share a Redis take turns
    return _Worker(
        functions=[],
        cron_jobs=[
            _chore(f"{name}:sweep", _sweep, second=SWEEP_SECONDS),
            _chore(f"{name}:forget", _forget, minute={7}, second={30}),
            _chore(f"{name}:deliver", _deliver, second=EVERY_SECOND),
            _chore(f"{name}:batches", _advance, second=EVERY_SECOND),
        ],
        redis_pool=pool,
        queue_name=f"arq:{name}",  # beside its other keys, and not among ours: no row of our key table describes it
        handle_signals=False,
        keep_result=0,
        poll_delay=POLL_S,
        job_timeout=JOB_TIMEOUT_S,
        health_check_interval=15,
        max_jobs=MAX_JOBS,
        job_serializer=_as_json,
        job_deserializer=json.loads,
        ctx={**works},  # arq adds to it
    )


def _chore(name: str, run: Callable[[dict[str, Any]], Awaitable[None]], **when: Any) -> CronJob:
    return cron(cast(Any, run), name=name, timeout=JOB_TIMEOUT_S, keep_result=0, unique=True, **when)


async def _run(worker: Worker) -> None:
    """Runs arq's loop, and cancels it as often as it takes: redis-py sends through `asyncio.wait_for`, which in Python
    3.11 loses a cancellation that comes just as a write ends."""
    running = asyncio.create_task(worker.async_run(), name="arq")
    try:
        await asyncio.wait({running})
    finally:
        while not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=CANCEL_AGAIN_S)
    running.result()


async def _close(worker: _Worker, pool: ArqRedis) -> None:
    """Closes everything, one after another; a job that arq cancels on its way out must not keep the rest open.

    Of several, arq waits for the first that ends cancelled; the others note their ends in Redis, and would open
    connections anew behind us.
    """
    for close in (worker.close, partial(_ended, worker), pool.aclose, pool.connection_pool.disconnect):
        closing = asyncio.create_task(_quietly(close), name="arq close")
        await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_S)
        closing.cancel()


async def _ended(worker: _Worker) -> None:
    await asyncio.gather(*worker.tasks.values(), return_exceptions=True)
    await asyncio.gather(*worker.notes, return_exceptions=True)


async def _quietly(close: Callable[[], Awaitable[Any]]) -> None:
    try:
        await close()
    except Exception as e:  # noqa: BLE001  # it is being thrown away
        log.debug("event=arq_close reason=%s", e)
