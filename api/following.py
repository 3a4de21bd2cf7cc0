"""Reading along at a job without a say in it: its followers, and whoever waits for its end. None of them makes its
answer count as seen, so it may be started again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from api.exchange import Exchange
from api.gateway import Gateway
from broker import errors, jobs, lanes
from broker.frames import FrameReader


@asynccontextmanager
async def following(
    gateway: Gateway, exchange: Exchange, job_id: str, *, who: str, after: tuple[int, int] = (0, 0)
) -> AsyncIterator[FrameReader]:
    """Reads a job's frames for one client, which counts among its caller's requests. Raises CallerTooMany, NoSuchJob,
    BadRequest where the job has as many readers as it may."""
    gateway.house.enter(who)
    name = gateway.reader_name()
    reader = gateway.hub.open(job_id, after=after)
    gateway.exchanges.add(exchange)
    exchange.watch()
    try:
        await jobs.attach(gateway.store, job_id, reader=name, lease_ms=lanes.READER_LEASE_MS, sees=False)
        gateway.readers.add(name, job_id, sees=False)
        reader.look()
        yield reader
    finally:
        exchange.close()
        gateway.house.leave(who)
        gateway.exchanges.discard(exchange)
        gateway.readers.drop(name)
        gateway.hub.close(reader)
        await _detach(gateway, job_id, name)


async def _detach(gateway: Gateway, job_id: str, name: str) -> None:
    try:
        await jobs.detach(gateway.store, job_id, reader=name)
    except errors.BrokerError:
        pass  # its lease runs out
