"""What a worker knows of the waiting jobs: a bounded picture of its lanes, kept by tailing their streams.

The picture may be stale; the claim script is the judge. An entry that was refused once is never claimable again (a job
that goes back to wait gets a new entry), so it is remembered and not asked for twice.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from broker.records import Waiting

KEPT_INTERACTIVE = 256
KEPT_BATCH = 64
SPENT_KEPT = 20_000


class LanePicture:
    """Waiting jobs of the lanes that this host serves."""

    def __init__(self) -> None:
        self._lanes: dict[str, OrderedDict[str, Waiting]] = {}
        self._spent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._truncated: set[str] = set()

    def follow(self, lanes: Iterable[str]) -> None:
        """Says which lanes count from now on."""
        wanted = set(lanes)
        for gone in self._lanes.keys() - wanted:
            del self._lanes[gone]
            self._truncated.discard(gone)
        for new in wanted - self._lanes.keys():
            self._lanes[new] = OrderedDict()

    def add(self, job: Waiting) -> None:
        """Notes an entry, if there is room in the picture; beyond it the lane is looked at again later."""
        lane = self._lanes.get(job.lane)
        if lane is None or (job.lane, job.entry) in self._spent or job.entry in lane:
            return
        if len(lane) >= (KEPT_BATCH if job.priority == "batch" else KEPT_INTERACTIVE):
            self._truncated.add(job.lane)
            return
        lane[job.entry] = job

    def replace(self, lane: str, jobs: Iterable[Waiting]) -> None:
        """Takes what the stream itself says about one lane."""
        if lane not in self._lanes:
            return
        self._lanes[lane] = OrderedDict()
        self._truncated.discard(lane)
        for job in jobs:
            self.add(job)

    def spent(self, job: Waiting) -> None:
        """Notes that this entry is not to be had any more."""
        lane = self._lanes.get(job.lane)
        if lane is not None:
            lane.pop(job.entry, None)
        self._spent[(job.lane, job.entry)] = None
        if len(self._spent) > SPENT_KEPT:
            self._spent.popitem(last=False)

    def unspend(self, job: Waiting) -> None:
        """Notes that a refusal said nothing about the entry itself."""
        self._spent.pop((job.lane, job.entry), None)

    def waiting(self, lanes: Iterable[str]) -> Iterator[Waiting]:
        """The jobs known to wait in these lanes."""
        for lane in lanes:
            yield from self._lanes.get(lane, {}).values()

    def short(self) -> list[str]:
        """Lanes that hold more than the picture, and whose picture has run low: look again."""
        return [lane for lane in self._truncated if len(self._lanes.get(lane, ())) < KEPT_BATCH // 2]
