"""The due loop: looks at every job whose instant has passed, and at jobs that wait for a model that cannot come.

Several schedulers may run: the scripts decide. None at all strands nobody either: each api looks after its own jobs.
arq's chores run in the same process (`clockwork`), but nothing here waits for them.
"""

import asyncio
import contextlib
import logging
import signal
from collections import OrderedDict
from collections.abc import Mapping

from broker import dispatch, errors, hosts, lanes
from broker.alive import Pulse
from broker.dispatch import ModelView
from broker.due import Due, Looked
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.policy import Lane
from broker.precedence import Before, LaneSeen, Precedence, Waiter
from broker.records import Waiting
from broker.store import Store
from workers import clockwork, part
from workers.settings import WorkerSettings

log = logging.getLogger("warmlane.scheduler")

PAGE = 200
SLEEP_MAX_S = 0.1
"""The next instant may be set earlier while the loop sleeps: it never sleeps longer than this."""

REST_S = 0.25
"""A due job that could not be settled is left alone for this long."""

STUCK_LOOK_S = 0.05
STUCK_KEPT = 1_000
HOPELESS_LOOK_S = 0.5
HOPELESS_PAGE = 256
RETRY_PAUSE_S = 0.2


class Scheduler:
    """Settles due jobs until told to stop."""

    def __init__(self, store: Store, pulse: Pulse | None = None) -> None:
        self._store = store
        self._pulse = pulse
        self._book = PolicyBook(store)
        self._fleet = Fleet(store, self._book)
        self._due = Due(store, self._book, self._fleet)
        self._stuck: dict[str, OrderedDict[str, None]] = {}  # full lane -> jobs that wanted to enter it, oldest first
        self._waiting_then: dict[str, int] = {}
        self._resting: dict[str, float] = {}  # looked at, not to be settled yet -> loop time of the next look
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ends `run` after the work in hand."""
        self._stop.set()

    async def run(self) -> None:
        """Runs the loops until `stop`."""
        await self._book.catch_up()
        if self._book.present:
            await self._fleet.look()
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self._book.follow(), name="scheduler policy"),
                group.create_task(self._fleet.follow(), name="scheduler fleet"),
                group.create_task(self._steadily(self._settle_due, self._pulse), name="scheduler due"),
                group.create_task(self._steadily(self._retry_stuck), name="scheduler stuck"),
                group.create_task(self._steadily(self._hasten_hopeless), name="scheduler hopeless"),
                group.create_task(clockwork.keep_running(self._store, self._book), name="scheduler arq"),
            ]
            await self._stop.wait()
            for task in loops:
                task.cancel()

    async def _steadily(self, step: "clockwork.Step", pulse: Pulse | None = None) -> None:
        """Repeats a step; each says how long to sleep. Redis' absence is waited out."""
        while True:
            if pulse is not None:
                pulse.beat()
            try:
                pause_s = await step() if self._book.present else RETRY_PAUSE_S
            except errors.BrokerUnavailable as e:
                log.debug("event=scheduler_retry reason=%s", e)
                pause_s = RETRY_PAUSE_S
            await asyncio.sleep(pause_s)

    async def _settle_due(self) -> float:
        now = asyncio.get_running_loop().time()
        self._resting = {job: until for job, until in self._resting.items() if until > now}
        due, wait_ms = await self._due.next(limit=PAGE, but=self._resting.keys())
        if not due:
            return SLEEP_MAX_S if wait_ms is None else min(SLEEP_MAX_S, wait_ms / 1000)
        found = await asyncio.gather(*(self._look(job) for job in due))
        for job, looked in zip(due, found, strict=True):
            self._note(job, looked)
            if looked.outcome == "not_due":  # its lease may not be judged yet, or somebody else was first
                self._resting[job] = now + REST_S
        return 0.0

    async def _look(self, job: str, *, hasten: bool = False, before: Before | None = None) -> Looked:
        try:
            return await self._due.look(job, hasten=hasten, before=before)
        except errors.BrokerUnavailable as e:  # if Redis is away, asking for the next ones will tell
            log.debug("event=look_retry job=%s reason=%s", job, e)
            return Looked("not_due")
        except Exception:  # a record that nobody can read must not keep the others from being looked at
            log.exception("event=look_failed job=%s", job)
            return Looked("not_due")

    def _note(self, job: str, looked: Looked) -> None:
        if looked.outcome == "full":
            waiting = self._stuck.setdefault(looked.lane, OrderedDict())
            if len(waiting) < STUCK_KEPT:
                waiting[job] = None
            return
        for waiting in self._stuck.values():
            waiting.pop(job, None)

    async def _retry_stuck(self) -> float:
        """Lets jobs into a fallback as soon as it has a place, oldest first."""
        stuck = [lane for lane, jobs in self._stuck.items() if jobs]
        if not stuck:
            self._waiting_then.clear()
            return STUCK_LOOK_S
        counts = await hosts.lane_counts(self._store, stuck)
        for lane in stuck:
            length, held = counts[lane]
            waiting, before = length - held, self._waiting_then.get(lane)
            self._waiting_then[lane] = waiting
            # the first count of a lane comes after its refusal: a place may have been freed in between
            places = 1 if before is None else max(0, before - waiting)
            while places > 0 and self._stuck[lane]:
                job, _none = self._stuck[lane].popitem(last=False)
                looked = await self._look(job, hasten=True)
                self._note(job, looked)
                if looked.outcome not in ("gone", "not_due"):  # one that ended meanwhile takes no place
                    places -= 1
        return STUCK_LOOK_S

    async def _hasten_hopeless(self) -> float:
        """Finds jobs whose waiting is pointless: no host, quarantined, too slow, or a first token that is predicted to
        come too late."""
        silence_counts = (
            self._store.answering_s * 1000 >= hosts.HOST_LEASE_MS
        )  # else hosts may live and not have said so
        active = self._book.active
        now = await self._store.now_ms()
        for name, lane in active.lanes().items():
            if not self._fleet.picture.waiting.get(name):
                continue
            view = self._fleet.view(name)
            if not lane.fallback and view.aside_until <= now:  # who waits longer than that may still hope
                continue
            if not silence_counts and lane.model not in self._fleet.picture.on_host:
                continue
            await self._hasten_in(lane, view, now)
        return HOPELESS_LOOK_S

    async def _hasten_in(self, lane: Lane, view: ModelView, now: int) -> None:
        """Looks at those who wait in one lane, oldest first; one that goes makes room for those behind it."""
        entries = await self._entries(lane.model)
        order = self._order(entries)
        for job in entries.get(lane.name, ()):
            waiter = Waiter.of(job)
            before = order.before(waiter)
            here = dispatch.first_token_in_ms(
                view,
                ahead=before.ahead,
                batch_ahead=before.batch_ahead,
                now_ms=now,
                fresh_tokens=self._fleet.fresh_tokens(lane.model, session=job.session, tokens=job.tokens),
            )
            if lane.retiring or dispatch.waiting_is_pointless(
                here, view, left_ms=job.promote_at - now, priority=job.priority, ahead=before.all
            ):
                looked = await self._look(job.job, hasten=True, before=before)
                self._note(job.job, looked)
                if looked.outcome == "promoted":
                    order.leaves(waiter)

    async def _entries(self, model: str) -> dict[str, list[Waiting]]:
        """The oldest entries of each lane of a model in which somebody waits."""
        waiting, found = self._fleet.picture.waiting, {}
        for name in self._book.active.lanes_of(model):
            if waiting.get(name):
                found[name] = [one async for one in lanes.waiting_entries(self._store, name, limit=HOPELESS_PAGE)]
        return found

    def _order(self, entries: Mapping[str, list[Waiting]]) -> Precedence:
        picture, active, lines = self._fleet.picture, self._book.active, []
        for name, found in entries.items():
            lane = active.lane(name)
            # held jobs have their entries too, the oldest mostly
            waits = [Waiter.of(one) for one in found[picture.running.get(name, 0) :]]
            more = max(0, picture.waiting.get(name, 0) - len(waits))
            lines.append(LaneSeen(waits, more, lane is not None and lane.priority == "batch"))
        return Precedence(lines)


async def serve(settings: WorkerSettings) -> int:
    """Runs the scheduler until it is told to stop; gives the exit code."""
    store = await Store.open(settings.redis_url, namespace=settings.namespace, name="scheduler")
    pulse = Pulse(settings.state_dir, "scheduler")
    scheduler = Scheduler(store, pulse)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, scheduler.stop)
    try:
        await scheduler.run()
    finally:
        pulse.end()
        with contextlib.suppress(errors.BrokerUnavailable):
            await store.close()
    return 0


def main() -> None:
    """Entry point of `python -m workers.scheduler`."""
    # the lines of those would tell URLs, with tokens in them
    part.run(serve, part="scheduler", quiet=["arq", "httpx", "httpcore"])


if __name__ == "__main__":
    main()
