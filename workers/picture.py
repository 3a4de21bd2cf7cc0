"""What a worker knows of the waiting jobs: a bounded picture of its lanes, kept by tailing their streams.

The picture may be stale; the claim script is the judge. An entry that was refused once is never claimable again (a job
that goes back to wait gets a new entry), so it is remembered and not asked for twice.

A caller that floods a lane fills the picture; of every other one the first few jobs are kept all the same, or it could
not be served before the flood is over, however little it has had.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

from broker import errors, lanes
from broker.records import Waiting
from broker.store import Store

log = logging.getLogger("warmlane.picture")

KEPT_INTERACTIVE = 256
KEPT_BATCH = 64
KEPT_EACH = 4
"""Of each caller so many jobs are kept where the lane holds more than the picture, in a picture of at most twice its
size."""

PAGE = KEPT_INTERACTIVE * 2
SPENT_KEPT = 20_000
RESYNC_EVERY_S = 5.0
SHORT_LOOK_S = 0.2
RETRY_PAUSE_S = 0.2


class LanePicture:
    """Waiting jobs of the lanes that this host serves."""

    def __init__(self) -> None:
        self._lanes: dict[str, OrderedDict[str, Waiting]] = {}
        self._callers: dict[str, Counter[tuple[str, str]]] = {}  # lane -> priority and caller -> jobs
        self._spent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._truncated: set[str] = set()
        self._heard: dict[str, list[Waiting]] = {}  # since the look at a lane that is under way

    def follow(self, lanes: Iterable[str]) -> None:
        """Says which lanes count from now on."""
        wanted = set(lanes)
        for gone in self._lanes.keys() - wanted:
            del self._lanes[gone], self._callers[gone]
            self._truncated.discard(gone)
        for new in wanted - self._lanes.keys():
            self._clear(new)

    def lanes(self) -> list[str]:
        """The lanes that count."""
        return list(self._lanes)

    def add(self, job: Waiting) -> None:
        """Notes an entry, if there is room in the picture; beyond it the lane is looked at again later."""
        lane = self._lanes.get(job.lane)
        if lane is None or (job.lane, job.entry) in self._spent or job.entry in lane:
            return
        if job.lane in self._heard:
            self._heard[job.lane].append(job)
        callers, whose = self._callers[job.lane], (job.priority, job.caller)
        kept = KEPT_BATCH if job.priority == "batch" else KEPT_INTERACTIVE
        if len(lane) >= kept and (callers[whose] >= KEPT_EACH or len(lane) >= 2 * kept):
            self._truncated.add(job.lane)
            return
        lane[job.entry] = job
        callers[whose] += 1

    def before_look(self, lane: str) -> None:
        """Says that the stream is about to be read: what is heard until `replace` may be newer than what is read."""
        self._heard[lane] = []

    def replace(self, lane: str, jobs: Iterable[Waiting], *, up_to: str = "") -> None:
        """Takes what the stream itself says about one lane, up to the entry where the look at it ended; "" = it was
        read to its end. What was heard of beyond that stays."""
        if lane not in self._lanes:
            return
        beyond = [job for job in self._lanes[lane].values() if up_to and _place(job.entry) > _place(up_to)]
        self._clear(lane)
        if up_to:
            self._truncated.add(lane)
        for job in [*jobs, *beyond, *self._heard.pop(lane, ())]:
            self.add(job)

    def spend(self, job: Waiting) -> None:
        """Notes that this entry is tried, and not to be tried again."""
        lane = self._lanes.get(job.lane)
        if lane is not None and lane.pop(job.entry, None) is not None:
            callers, whose = self._callers[job.lane], (job.priority, job.caller)
            callers[whose] -= 1
            if not callers[whose]:
                del callers[whose]
        self._spent[(job.lane, job.entry)] = None
        if len(self._spent) > SPENT_KEPT:
            self._spent.popitem(last=False)

    def unspend(self, job: Waiting) -> None:
        """Notes that the try said nothing about the entry itself: it still waits."""
        self._spent.pop((job.lane, job.entry), None)
        self.add(job)

    def waiting(self, lanes: Iterable[str]) -> Iterator[Waiting]:
        """The jobs known to wait in these lanes."""
        for lane in lanes:
            yield from self._lanes.get(lane, {}).values()

    def callers(self, lanes: Iterable[str]) -> dict[str, set[str]]:
        """Whose jobs are known to wait in these lanes, by priority."""
        found: dict[str, set[str]] = {}
        for lane in lanes:
            for priority, caller in self._callers.get(lane, ()):
                found.setdefault(priority, set()).add(caller)
        return found

    def anyone_waits(self, lanes: Iterable[str]) -> bool:
        """Whether a job is known to wait in any of these lanes."""
        return any(self._lanes.get(lane) for lane in lanes)

    def short(self) -> list[str]:
        """Lanes that hold more than the picture, and whose picture has run low: look again."""
        return [lane for lane in self._truncated if len(self._lanes.get(lane, ())) < KEPT_BATCH // 2]

    def _clear(self, lane: str) -> None:
        self._lanes[lane], self._callers[lane] = OrderedDict(), Counter()
        self._truncated.discard(lane)


class Tails:
    """Keeps a picture fresh: a blocking read hears of new entries at once, a look now and then mends the rest."""

    def __init__(self, store: Store, picture: LanePicture, on_news: Callable[[], None]) -> None:
        self._store = store
        self._picture = picture
        self._on_news = on_news
        self._tailed: set[str] = set()

    async def tail(self) -> None:
        """Hears of every new entry until cancelled. The blocking read itself is never cancelled: it ends by itself."""
        last: dict[str, str] = {}
        async with self._store.tail() as tail:
            while True:
                try:
                    last = await self._start(last)
                    self._tailed = set(last)
                    if not last:
                        await asyncio.sleep(RETRY_PAUSE_S)
                        continue
                    names = {self._store.keys.lane(lane): lane for lane in last}
                    for key, entries in await tail.read({key: last[lane] for key, lane in names.items()}):
                        lane = names[key]
                        for entry, values in entries:
                            self._picture.add(Waiting.from_entry(lane, entry, values))
                        last[lane] = entries[-1][0].decode()
                    self._on_news()
                except errors.BrokerUnavailable as e:
                    log.debug("event=tail_retry reason=%s", e)
                    last = {}  # after a break, look at the whole lane again
                    await asyncio.sleep(RETRY_PAUSE_S)

    async def resync(self) -> None:
        """Looks at whole lanes every RESYNC_EVERY_S, and sooner where the picture ran low, until cancelled."""
        whole_at = 0.0
        while True:
            await asyncio.sleep(SHORT_LOOK_S)
            try:
                now = asyncio.get_running_loop().time()
                # a lane that is new in the policy is looked at until the blocking read knows of it
                which = [*self._picture.short(), *(x for x in self._picture.lanes() if x not in self._tailed)]
                if now - whole_at > RESYNC_EVERY_S:
                    whole_at, which = now, self._picture.lanes()
                for lane in which:
                    await self._look(lane)
                if which:
                    self._on_news()
            except errors.BrokerUnavailable as e:
                log.debug("event=resync_retry reason=%s", e)

    async def _start(self, last: dict[str, str]) -> dict[str, str]:
        """Where to read on in each lane; a new lane is looked at whole, from before what the tail will tell."""
        served = self._picture.lanes()
        going = {lane: last[lane] for lane in served if lane in last}
        for lane in served:
            if lane not in going:
                key = self._store.keys.lane(lane)
                newest = await self._store.command("XREVRANGE", key, "+", "-", "COUNT", 1)
                going[lane] = newest[0][0].decode() if newest else "0-0"
                await self._look(lane, whole=True)
        return going

    async def _look(self, lane: str, *, whole: bool = False) -> None:
        """Reads the oldest entries of a lane; `whole` = page by page to its end, for callers that came late."""
        self._picture.before_look(lane)
        found = [job async for job in lanes.waiting_entries(self._store, lane, limit=PAGE)]
        page = found
        while whole and len(page) == PAGE:
            page = [job async for job in lanes.waiting_entries(self._store, lane, limit=PAGE, after=page[-1].entry)]
            found += page
        self._picture.replace(lane, found, up_to=page[-1].entry if len(page) == PAGE else "")


def _place(entry: str) -> tuple[int, int]:
    ms, _, number = entry.partition("-")
    return int(ms), int(number or 0)
