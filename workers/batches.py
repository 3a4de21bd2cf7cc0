"""Works batches off: asks for their lines a window at a time, writes what became of each, and ends them.

A round goes over all batches that have not ended and does a little for each, so they advance side by side. Nothing is
kept here between rounds that Redis does not know: whatever is killed, the next round goes on, and several schedulers at
it do nothing twice. Where a lane or Redis is full, a caller has its share, or its answers fill its place for files,
nothing is wrong with a line: it is asked for again.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from broker import admission, batches, errors, files, jobs, requests
from broker.batch_lines import Line
from broker.batches import Working, job_id_of
from broker.callers import Caller
from broker.hosts import Fleet
from broker.keybook import KeyBook
from broker.lifecycle import ENDED, State
from broker.policies import Active, PolicyBook
from broker.records import BatchRecord, FileRecord
from broker.store import Store
from workers import batch_answers
from workers.batch_answers import Written
from workers.batch_reading import late_lines, line_at, next_lines, why_failed

log = logging.getLogger("warmlane.batches")

WINDOW = 32
"""Lines of one batch that are worked off at once."""
WINDOW_OF_CALLER = 128
"""Lines of all batches of a caller that wait or run. Those that no lane takes do neither: that may be so for days."""
REFILL_BELOW = 24
"""A window is filled up once it holds fewer: reading on costs a part of the file each time."""

ROUND_S = 8.0
IDLE_S = 0.1
"""How long a round that found nothing to do waits."""
PICTURE_S = 0.5
REST_S_MAX = 2.0
"""After a refusal a batch asks again within this time, whatever the lane says, and at once when a line of it ends."""

LATER = (
    errors.LaneFull,
    errors.CallerShare,
    errors.CallerLimit,
    errors.QuotaUsed,
    errors.ModelUnavailable,
    errors.DowngradesCapped,
    errors.RedisFull,
    errors.PolicyUnreadable,
)
"""What says nothing against a line: it is asked for again."""

USUAL = errors.LaneFull, errors.CallerShare, errors.CallerLimit
"""Of these no batch tells: its lines are more than a lane has places, and go as those before them do."""


class Expander:
    """Advances every batch of a gateway."""

    def __init__(self, store: Store, book: PolicyBook) -> None:
        self._store = store
        self._book = book
        self._keys = KeyBook(store)
        self._fleet = Fleet(store, book)
        self._resting: dict[str, float] = {}  # batch that was refused a place -> loop time of its next try
        self._at_work = False
        self._last = ""  # the batch that had its turn last: the next one's comes first

    async def round(self) -> None:
        """Works for ROUND_S while there is a batch; over at once where there is none, or another round is at it."""
        if self._at_work:
            return
        self._at_work = True
        loop = asyncio.get_running_loop()
        end = loop.time() + ROUND_S
        try:
            while self._book.present and loop.time() < end:
                live = await batches.live(self._store)
                if not live:
                    return
                if not await self.advance(live, until=end):
                    await asyncio.sleep(IDLE_S)
        finally:
            self._at_work = False

    async def advance(self, live: Sequence[BatchRecord], *, until: float = math.inf) -> bool:
        """Does for each of them what can be done now, and begins none after `until` (loop time); False if there was
        nothing to do. The next time begins behind the last one: a round that is cut off must not always end at the same
        batch."""
        await self._keys.reload()
        await self._book.catch_up()  # who made one of them may have put its model into the policy a moment before
        await self._fleet.look_again(older_than_s=PICTURE_S)
        self._resting = {batch.id: self._resting[batch.id] for batch in live if batch.id in self._resting}
        now, moved = await self._store.now_ms(), False
        windows = {batch.id: await batches.window(self._store, batch.id) for batch in live}
        states = {batch.id: await self._states(batch.id, windows[batch.id]) for batch in live}
        held: dict[str, int] = {}
        for batch in live:
            at_work = sum(bool(state) and state not in ENDED for state in states[batch.id].values())
            held[batch.caller] = held.get(batch.caller, 0) + at_work
        loop = asyncio.get_running_loop()
        for batch in sorted(live, key=lambda batch: (batch.id <= self._last, batch.id)):
            if loop.time() > until:
                return True
            self._last = batch.id
            room = WINDOW_OF_CALLER - held[batch.caller]
            step = _Step(self, batch, windows[batch.id], states[batch.id], now=now, room=room)
            try:
                moved |= await step.make()
            except (errors.Moved, errors.AlreadyEnded, errors.NoSuchBatch):
                pass  # somebody else is at it
            except errors.RedisFull as full:  # its next lines wait; another batch may end, which makes room
                self.rest(batch, full)
            except errors.BrokerUnavailable:
                raise
            except Exception:  # one batch that nobody can read must not keep the others from theirs
                log.exception("event=batch_failed batch=%s", batch.id)
            finally:
                held[batch.caller] += room - step.room
        return moved

    async def _states(self, batch_id: str, window: Sequence[Working]) -> dict[int, str]:
        """How the jobs of a window's lines do, as Redis has it; "" = the line has not been asked for."""
        store = self._store
        told = await asyncio.gather(
            *(store.command("HGET", store.keys.job(job_id_of(batch_id, one.number)), "state") for one in window)
        )
        return {one.number: (state or b"").decode() for one, state in zip(window, told, strict=True)}

    def caller_of(self, batch: BatchRecord) -> Caller | None:
        """Whose it is, with the rights of this moment; None for one whose key was taken away. A key of the environment
        is known to the api alone: who had one when it made the batch may go on."""
        if not batch.named:
            return Caller(batch.caller)
        rights = self._keys.rights_of(batch.caller)
        return Caller(batch.caller, rights) if rights is not None else None

    def rests(self, batch: BatchRecord) -> bool:
        """Whether it was refused a place a moment ago."""
        return asyncio.get_running_loop().time() < self._resting.get(batch.id, 0.0)

    def rest(self, batch: BatchRecord, refusal: errors.BrokerError) -> None:
        """Lets it rest for as long as the refusal says."""
        after_s = min(REST_S_MAX, float(getattr(refusal, "retry_after_s", 1)))
        self._resting[batch.id] = asyncio.get_running_loop().time() + after_s

    def rests_no_more(self, batch: BatchRecord) -> None:
        """A place of its own is free again."""
        self._resting.pop(batch.id, None)

    async def admit(self, batch: BatchRecord, line: Line, caller: Caller, *, now: int) -> None:
        """Makes the line a job, or finds that it is one already; raises Refused, PolicyUnreadable. What the policy does
        not know any more is unavailable: the line was right when its batch was made, and a policy may be rolled back.
        """
        asked = requests.ENDPOINTS[batch.endpoint].read(line.body)
        try:
            await self._admit(batch, line, asked, caller, now=now)
        except errors.UnknownModel as unknown:
            if not await self._was_known(batch, asked, caller):
                raise
            shown = unknown.asked[: errors.NAME_SHOWN]
            words = f"{shown!r} has left the policy since the batch was made, and its lines wait for it to come back"
            raise errors.ModelUnavailable(f"{words}: {unknown}") from None

    async def _was_known(self, batch: BatchRecord, asked: requests.Asked, caller: Caller) -> bool:
        """Whether a policy that was in force since the batch was made led this caller to a lane."""
        tokens = asked.longest or asked.tokens
        for policy in await self._book.since(batch.created_at):
            name = requests.name_of(batch.endpoint, asked, policy, lane=batch.lane)
            with suppress(errors.UnknownModel, errors.LaneForbidden):
                requests.lane_of(policy, caller, name, endpoint=batch.endpoint, prompt_tokens=tokens)
                return True
        return False

    async def _admit(self, batch: BatchRecord, line: Line, asked: requests.Asked, caller: Caller, *, now: int) -> None:
        leave = {"true": True, "false": False}.get(batch.leave)
        left_ms = max(1, batch.expires_at - now)
        with self._book.deciding() as active:
            job = requests.job_of(batch.endpoint, asked, active, caller, lane=batch.lane, leave=leave)
        job = replace(
            job,
            id=job_id_of(batch.id, line.number),
            batch=batch.id,
            mode="async",
            priority="batch",
            stream=False,
            keep_ms=left_ms + active.policy.keep_async_ms,  # until its answer is written; then for a while
        )
        await admission.admit(
            self._store, self._book, self._fleet, job, line.body, give_up_within_ms=left_ms, rights=caller.rights
        )

    @property
    def active(self) -> Active:
        """The policy in force."""
        return self._book.active

    @property
    def store(self) -> Store:
        """Where it all is."""
        return self._store


class _Step:
    """What is done for one batch in one go."""

    def __init__(
        self,
        expander: Expander,
        batch: BatchRecord,
        window: list[Working],
        states: dict[int, str],
        *,
        now: int,
        room: int,
    ) -> None:
        self._expander = expander
        self._store = expander.store
        self._batch = batch
        self._window = window
        self._states = states
        self._now = now
        self.room = room
        """How many lines more its caller's batches may have asked for; those that it takes now are to be asked for."""

    async def make(self) -> bool:
        """Makes it; False if there was nothing to do. Raises Moved, AlreadyEnded, NoSuchBatch."""
        batch, store = self._batch, self._store
        caller = self._expander.caller_of(batch)
        if not batch.ending and (caller is None or batch.expires_at <= self._now):
            await batches.stop(store, batch.id, "cancelled" if caller is None else "expired")
            return True
        if not batch.ending and not self._window and self.room <= 0:
            return False  # its caller's other batches have all that they may have together
        record = await self._input()
        if record is None:
            return True
        collected = await self._collect()
        left = [one for one in self._window if self._states[one.number] not in ENDED]
        if batch.ending or caller is None:
            return await self._wind_down(record, left) or collected
        if collected:
            self._expander.rests_no_more(batch)
        unasked = [one for one in left if not self._states[one.number]]
        asked = await self._ask(record, unasked[: max(0, self.room)], caller)
        if not batch.read_all and len(left) < REFILL_BELOW and self.room > 0 and not self._expander.rests(batch):
            told = await next_lines(store, batch, record, most=min(self.room, WINDOW - len(left)))
            await batches.take(store, batch, told.lines, taken=told.taken, place=told.place, read_all=told.read_all)
            self.room -= sum(not one.line.code for one in told.lines)
            return True
        if batch.read_all and not left:
            await self._end("completed")
            return True
        return collected or asked

    async def _input(self) -> FileRecord | None:
        """The file; None where the batch has failed for it."""
        batch = self._batch
        try:
            record = await batches.input_of(self._store, batch)
        except errors.NoSuchFile as gone:
            for one in self._window:
                await self._cancel(job_id_of(batch.id, one.number))
                await self._note(one, Written(""))
            why = [{"code": gone.code, "message": str(gone), "line": None}]
        else:
            why = await why_failed(self._store, batch, record) if batch.state == "validating" else []
            if not why:
                return record
        await batches.end(self._store, batch, "failed", why=why)
        log.info("event=batch_ended batch=%s state=failed code=%s", batch.id, why[0]["code"])
        return None

    async def _collect(self) -> bool:
        done = False
        for one in self._window:
            state = self._states[one.number]
            if state in ENDED:
                job_id = job_id_of(self._batch.id, one.number)
                await self._note(
                    one, await batch_answers.of_job(self._store, self._batch, job_id, one.custom_id, State(state))
                )
                done = True
        return done

    async def _ask(self, record: FileRecord, unasked: list[Working], caller: Caller) -> bool:
        """Makes jobs of lines, until there is no more place for them; the others keep their place in the window."""
        expander, batch, asked = self._expander, self._batch, False
        if expander.rests(batch) or not unasked:
            return False
        refusal: errors.BrokerError | None
        if await files.hold_answers_enough(self._store, expander.active, batch.caller):
            refusal = errors.FilesFull("the caller's answers have no more place")
        else:
            asked, refusal = await self._make_jobs(record, unasked, caller)
        if refusal is not None:
            expander.rest(batch, refusal)
        await batches.note_wait(self._store, batch, None if isinstance(refusal, USUAL) else refusal)
        return asked

    async def _make_jobs(
        self, record: FileRecord, unasked: list[Working], caller: Caller
    ) -> tuple[bool, errors.BrokerError | None]:
        """Whether it dealt with any of them, and what it met that all others have to wait for."""
        batch, asked = self._batch, False
        for one in unasked:
            line = await line_at(self._store, batch, record, one)
            job_id = job_id_of(batch.id, one.number)
            try:
                if line is None:
                    raise errors.NoSuchFile(record.id)
                await self._expander.admit(batch, line, caller, now=self._now)
                self.room -= 1
            except LATER as refusal:
                return asked, refusal
            except errors.Refused as refusal:
                await self._note(one, batch_answers.wrong(job_id, one.custom_id, refusal))
            asked = True
        return asked, None

    async def _wind_down(self, record: FileRecord, left: list[Working]) -> bool:
        """Ends what is under way; what nobody asked for is not asked for any more."""
        batch, store = self._batch, self._store
        for one in left:
            job_id = job_id_of(batch.id, one.number)
            if self._states[one.number]:
                await self._cancel(job_id)
            elif batch.ending == "expired":
                await self._note(one, batch_answers.late(batch, job_id, one.custom_id))
            else:
                await self._note(one, Written(""))
        if left:
            return True
        if batch.ending == "expired" and not batch.read_all:
            if self._expander.rests(batch):
                return False
            told = await late_lines(store, batch, record)
            await batches.take(store, batch, told.lines, taken=told.taken, place=told.place, read_all=told.read_all)
        else:
            await self._end("expired" if batch.ending == "expired" else "cancelled")
        return True

    async def _cancel(self, job_id: str) -> None:
        try:
            await jobs.cancel(self._store, job_id, message="its batch ended before it did")
        except (errors.AlreadyEnded, errors.NoSuchJob):
            pass  # the next step sees what it ended as

    async def _note(self, one: Working, written: Written) -> None:
        await batches.note_line(self._store, self._batch, one.number, which=written.which, text=written.text)

    async def _end(self, state: batches.End) -> None:
        await batches.end(self._store, self._batch, state)
        log.info("event=batch_ended batch=%s state=%s", self._batch.id, state)
