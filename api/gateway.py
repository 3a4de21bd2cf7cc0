"""What one api process holds: its parts of the broker, its readers, its keys and its figures."""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from api.exchange import Exchange, Stalled, Stopping
from api.limits import House, Limits
from broker import errors
from broker.due import Due
from broker.frames import Hub
from broker.hosts import Fleet
from broker.keybook import KeyBook
from broker.metrics import OTHER, Metrics
from broker.policies import Active, PolicyBook
from broker.readers import Readers
from broker.refusals import Refusals
from broker.snapshots import Snapshots
from broker.store import Store
from broker.trust import secrets as scanner
from broker.waits import Waits

log = logging.getLogger("warmlane.api")

STALLED_S = 300.0
"""A client that takes nothing for this long is cut off: its job's log does not live much longer either."""
LOOK_FOR_STALLED_S = 5.0
LOOP_LOOK_S = 0.5
"""How often the event loop is asked how late it is."""
START_S_MAX = 5.0


def new_api_id() -> str:
    """A name for this process, under which its readers hear their frames."""
    return f"api-{secrets.token_hex(4)}"


class Gateway:
    """A holder; what happens, happens in its parts."""

    def __init__(
        self,
        store: Store,
        keys: KeyBook,
        *,
        version: str,
        api_id: str = "",
        origins: frozenset[str] = frozenset(),
        host: str = "",
        limits: Limits | None = None,
    ) -> None:
        self.store = store
        self.keys = keys
        self.version = version
        self.origins = origins
        self.host = host
        self.limits = limits or Limits()
        self.house = House(self.limits)
        self.book = PolicyBook(store)
        self.fleet = Fleet(store, self.book)
        self.hub = Hub(store, name=api_id or new_api_id())
        self.due = Due(store, self.book, self.fleet)
        self.readers = Readers(store, self.due)
        self.waits = Waits(store, self.book, self.fleet)
        self.snapshots = Snapshots(store, self.book, self.fleet)
        self.metrics = Metrics(version=version)
        self.book.on_change(lambda active: self.metrics.begin_lanes(active.lanes()))
        self.refusals = Refusals(store, self.book)
        self.exchanges: set[Exchange] = set()
        self.stopping = False
        self._numbers = itertools.count(1)

    def reader_name(self) -> str:
        """A name for one client's connection: `api/number`."""
        return f"{self.hub.name}/{next(self._numbers)}"

    def known_lane(self, lane: str) -> str:
        """How figures name a lane: a client's own words are no label."""
        return lane if self.book.present and self.book.active.lane(lane) is not None else OTHER

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the parts that run by themselves. If one of them breaks, an ExceptionGroup ends the whole."""
        try:
            await self.keys.reload()
            await self.book.catch_up()
            if self.book.present:
                await self.fleet.look()
        except errors.BrokerUnavailable as e:  # it was there a moment ago: the parts below will find it again
            log.warning("event=start_without_redis reason=%s", e)
        async with asyncio.TaskGroup() as tasks:
            parts = [
                tasks.create_task(self.book.follow(), name="policy"),
                tasks.create_task(self.keys.follow(), name="keys"),
                tasks.create_task(self.fleet.follow(), name="fleet"),
                tasks.create_task(self.hub.run(), name="hub"),
                tasks.create_task(self.readers.keep(), name="readers"),
                tasks.create_task(self.refusals.keep(), name="refusals"),
                tasks.create_task(self._cut_stalled(), name="stalled clients"),
                tasks.create_task(self._watch_loop(), name="event loop"),
                tasks.create_task(self._prepare_scanner(), name="scanner for secrets"),
            ]
            try:
                async with asyncio.timeout(START_S_MAX):
                    await self.hub.listening.wait()
            except TimeoutError:
                log.warning("event=start_without_redis reason=the frames channel could not be subscribed yet")
            yield
            for part in parts:
                part.cancel()

    def stop_in(self, seconds: float) -> None:
        """Lets running answers go on for a while, then tells their clients and takes the readers off their jobs."""
        self.stopping = True
        asyncio.get_running_loop().call_later(seconds, self._stop)

    def _stop(self) -> None:
        for exchange in list(self.exchanges):
            exchange.interrupt(Stopping)

    async def _prepare_scanner(self) -> None:
        """Compiles the scanner's rules once a policy has a remote model, before a request has to wait for it."""
        wanted = asyncio.Event()

        def look(active: Active) -> None:
            if any(model.trust == "remote" for model in active.models().values()):
                wanted.set()

        self.book.on_change(look)
        await wanted.wait()
        await asyncio.to_thread(scanner.prepare)

    async def _watch_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOP_LOOK_S
            await asyncio.sleep(LOOP_LOOK_S)
            self.metrics.loop_lag(loop.time() - due)

    async def _cut_stalled(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_FOR_STALLED_S)
            for exchange in list(self.exchanges):
                if exchange.sending_since and loop.time() - exchange.sending_since > STALLED_S:
                    exchange.interrupt(Stalled)
