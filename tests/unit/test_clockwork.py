"""arq's worker ends when it is told to, whatever the libraries below it do with a cancellation."""

import asyncio
import gc
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from arq.worker import Worker

from workers import clockwork


class Deaf:
    """An arq worker that loses the first cancellation, as `asyncio.wait_for` of Python 3.11 does when what it waits for
    ends in the same moment (redis-py sends through it); closing it is cancelled by a job that it was running."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.cancelled = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.notes: set[asyncio.Task[None]] = set()

    async def async_run(self) -> None:
        while self.cancelled < 2:
            self.running.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
        raise asyncio.CancelledError

    async def close(self) -> None:
        raise asyncio.CancelledError


class Pool:
    """Connections that note that they were closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.used_late = False
        self.connection_pool = self

    def use(self) -> None:
        self.used_late = self.used_late or bool(self.closed)

    async def aclose(self) -> None:
        self.closed.append("client")

    async def disconnect(self) -> None:
        self.closed.append("connections")


async def test_a_lost_cancellation_is_said_again_and_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a scheduler that is told to stop waits for arq for ever, and leaves its sockets open."""
    worker, pool = Deaf(), Pool()
    monkeypatch.setattr(clockwork, "_worker", lambda *_: worker)
    monkeypatch.setattr(clockwork, "_pool", lambda _: pool)
    monkeypatch.setattr(clockwork, "CANCEL_AGAIN_S", 0.01)
    store: Any = SimpleNamespace(url="redis://127.0.0.1:1", full=AsyncMock(return_value=""))
    book: Any = None
    keeping = asyncio.create_task(clockwork.keep_running(store, book))
    await worker.running.wait()
    keeping.cancel()
    _, late = await asyncio.wait({keeping}, timeout=10)
    for task in late:  # what fails must not hang the other tests
        task.cancel()
    assert not late and keeping.cancelled()
    assert worker.cancelled == 2
    assert pool.closed == ["client", "connections"]


async def test_connections_stay_open_until_the_last_job_has_noted_its_end() -> None:
    """arq's own close gives up at the first job that ends cancelled; another one still writes how it ended."""
    worker, pool, told = Deaf(), Pool(), asyncio.Event()

    async def writes_its_end() -> None:
        await told.wait()
        pool.use()

    worker.tasks["slow"] = asyncio.create_task(writes_its_end())
    asyncio.get_running_loop().call_later(0.05, told.set)
    await clockwork._close(worker, pool)  # type: ignore[arg-type]
    assert worker.tasks["slow"].done() and not pool.used_late
    assert pool.closed == ["client", "connections"]


@pytest.mark.parametrize("note", ["finish_job", "finish_failed_job"])
async def test_a_note_outlives_its_cancelled_job_and_what_it_dies_of_is_no_traceback(
    note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arq writes how a job ended behind a shield. A cancelled job goes without it, and nobody hears of it any more."""
    pool, begun, told, unheard = Pool(), asyncio.Event(), asyncio.Event(), list[Any]()

    async def writes_in_vain(_self: Worker, *_: Any, **__: Any) -> None:
        begun.set()
        await told.wait()
        pool.use()
        raise ConnectionError("Redis is away")

    async def job() -> None:
        await asyncio.shield(getattr(worker, note)("job"))

    monkeypatch.setattr(Worker, note, writes_in_vain)
    store: Any = SimpleNamespace(keys=SimpleNamespace(namespace="gw"))
    worker: Any = clockwork._worker(store, pool, {})  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    monkeypatch.setattr(worker, "close", Deaf().close)
    worker.tasks["one"] = asyncio.create_task(job())
    await begun.wait()
    worker.tasks["one"].cancel()
    loop.call_later(0.05, told.set)
    await clockwork._close(worker, pool)  # type: ignore[arg-type]
    assert told.is_set() and not pool.used_late and pool.closed == ["client", "connections"]
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard
