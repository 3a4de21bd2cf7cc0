"""The readers of one api process: one task keeps all their leases and looks after jobs that nobody else looks after."""

import asyncio
import logging
from dataclasses import dataclass

from broker import errors, jobs, lanes
from broker.due import Due
from broker.store import Store

log = logging.getLogger("warmlane.readers")

TICK_S = 1.0
RENEW_EVERY_TICKS = 3
OVERDUE_MS = 1_000
"""How late a job's instant may be before its reader suspects that no scheduler lives."""
PAGE = 128


@dataclass(frozen=True)
class _Stay:
    job_id: str
    sees: bool


class Readers:
    """Renews the leases of this process's readers, and settles their jobs where the scheduler does not."""

    def __init__(self, store: Store, due: Due) -> None:
        self._store = store
        self._due = due
        self._stays: dict[str, _Stay] = {}

    def add(self, reader: str, job_id: str, *, sees: bool) -> None:
        """Keeps a reader that has been attached (by submit, or by `jobs.attach`) until `drop`."""
        self._stays[reader] = _Stay(job_id, sees)

    def drop(self, reader: str) -> None:
        """Forgets a reader; its lease runs out unless it is detached."""
        self._stays.pop(reader, None)

    async def keep(self) -> None:
        """Does so every TICK_S until cancelled."""
        tick = 0
        while True:
            await asyncio.sleep(TICK_S)
            tick += 1
            try:
                await self.settle()
                if tick % RENEW_EVERY_TICKS == 0:
                    await self.renew()
            except errors.BrokerUnavailable as e:
                log.debug("event=readers_retry reason=%s", e)

    async def renew(self) -> None:
        """Renews every lease."""
        stays = list(self._stays.items())
        for start in range(0, len(stays), PAGE):
            await asyncio.gather(*(self._renew(reader, stay) for reader, stay in stays[start : start + PAGE]))

    async def settle(self) -> None:
        """Looks at our jobs whose instant passed a while ago: whoever should have looked is dead or far behind."""
        ids = list({stay.job_id for stay in self._stays.values()})
        if not ids:
            return
        store = self._store
        now = await store.now_ms()
        for start in range(0, len(ids), PAGE):
            page = ids[start : start + PAGE]
            instants = await store.command("ZMSCORE", store.keys.due, *page)
            for job_id, instant in zip(page, instants, strict=True):
                if instant is not None and float(instant) < now - OVERDUE_MS:
                    await self._look(job_id)

    async def _renew(self, reader: str, stay: _Stay) -> None:
        if reader not in self._stays:
            return
        try:
            await jobs.attach(
                self._store, stay.job_id, reader=reader, lease_ms=lanes.READER_LEASE_MS, sees=stay.sees
            )  # fmt: skip
        except (errors.NoSuchJob, errors.BadRequest):
            return  # it ended and was forgotten: whoever reads will hear so from the log
        if reader not in self._stays:  # it left while the lease travelled, and may have detached before it arrived
            await jobs.detach(self._store, stay.job_id, reader=reader)

    async def _look(self, job_id: str) -> None:
        try:
            looked = await self._due.look(job_id)
        except errors.BrokerUnavailable:
            raise
        except errors.BrokerError as e:
            log.warning("event=overdue job=%s code=%s reason=%s", job_id, e.code, e)
        else:
            log.info("event=overdue job=%s outcome=%s late_ms=%d", job_id, looked.outcome, looked.late_ms)
