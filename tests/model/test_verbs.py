"""The model test: every verb in any order, on a virtual clock, against the promises of the design.

After each step one picture of Redis is taken. It must break no sentence of `invariants`, the step must be one that the
lifecycle table and the queue budgets allow, a refusal must have left no mark, and the answer must be the one that the
rules below expect. The faults of `faults.py` show that it notices.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from broker import downgrades, errors, jobs, lanes, webhooks
from broker.jobs import GoOn, Holding
from broker.lifecycle import ENDED, HELD, State
from broker.policies import Active
from broker.policy import Lane
from broker.records import JobRecord, ModelOnHost, Waiting, decode_hash
from broker.store import Store
from tests.model.faults import FAULTS, Fault, planted
from tests.support.broker_world import LONG_MS, POLICY, World, fake_redis, new_namespace, policy_with
from tests.support.invariants import Snapshot, bound, may_downgrade, missteps, take, violations

CAPPED = policy_with(("weights-big\n", "weights-big\n    maxDowngradeShare: 0.67\n    stickyPromotionMs: 600000\n"))
POLICIES = [
    POLICY,
    policy_with(("maxQueue: 3", "maxQueue: 1"), ("maxQueue: 2", "maxQueue: 0")),
    policy_with(("weights-big\n", "weights-big\n    trust: remote\n")),
    "models:\n  big:\n    backend: simulated\n    model: weights-big\n    maxQueue: 3\n",
    CAPPED,
    POLICY + "remote: { allow: [images] }\n",
]
LANES = ("big", "small", "side", "far")
BROKE = errors.RuntimeFailed("broke")

Step = TypeVar("Step", bound=Callable[..., None])
DRAWN: dict[str, st.SearchStrategy[dict[str, Any]]] = {}

Call = Callable[[], Awaitable[Any]]
Expected = type[errors.BrokerError] | None
GOES_ON_WITHIN_MS = 2_000
PUT_BACK_LEFT_MS = 1_000
LINE_MS = 31_000
TRIED_AGAIN = ("submit", "claim", "first_token", "recover", "release")
MOVED = ("submit", "claim", "promote", "renew", "claim")
BEGUN = ("submit", "claim", "first_token", "emit")
SERVED = ("submit", "claim", "first_token", "emit", "end")
HOOKS = ("", "", "https://a.example/hook", "https://b.example/hook")
FAILURES_MAX = 2
HORIZON_MS = 30_000
MAY_LEAVE = {"remote": True, "exits": "", "judged": "yes"}
SDK = {"sync": True, "reader": True, "retried": True, "key": "", "grace": 4_000, "stale": False, "later": 0} | MAY_LEAVE
picks = st.integers(0, 15)
judgements = st.sampled_from([None, 0, 0, 0, 1])
"""How many frames came since it was judged that an answer can be gone on from; None = it cannot."""


def takes(**drawn: st.SearchStrategy[Any]) -> Callable[[Step], Step]:
    """Says from what a step's arguments are drawn."""

    def mark(step: Step) -> Step:
        DRAWN[step.__name__] = st.fixed_dictionaries(drawn)
        return step

    return mark


def several(*names: str) -> st.SearchStrategy[list[tuple[str, dict[str, Any]]]]:
    """A few steps of one kind of actor, in any order; a name that stands here twice is drawn twice as often."""
    one = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), DRAWN[name]))
    return st.lists(one, min_size=1, max_size=4)


def judged(job: JobRecord, behind: int | None) -> GoOn | None:
    return None if behind is None else GoOn(job.last_seq - behind, GOES_ON_WITHIN_MS)


def straight(step: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The same step taken by somebody who is not confused: with the newest job that fits, and the next frame."""
    name, arguments = step
    newest = -4 if name in ("claim", "recover") else 0
    plain = {"claim": {"confused": ""}, "first_token": {"ahead": 1}, "emit": {"ahead": 1}, "end": {"ahead": 1}}
    return name, arguments | {"pick": newest} | plain.get(name, {})


class NothingFits(Exception):
    """There is no job for this step at the moment."""


class Broken(AssertionError):
    """A promise was broken; the message says which."""


PLAIN: dict[str, Any] = {"key": "", "stale": False, "later": 0, "limits": (0, 0), "again": None}
SDK = PLAIN | {"who": "ann", "sync": True, "reader": True, "retried": True, "grace": 4_000}
"""What every try of an SDK says of itself."""


class Verbs(RuleBasedStateMachine):
    """Clients, two workers, a scheduler and an operator, all of whom may be confused."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = self.wait(self._open())
        self.now = self.wait(take(self.world.store))
        self.old: Active = self.world.book.active
        self.ids: list[str] = []
        self.held: list[Holding] = []
        self.bodies: dict[str, bytes] = {}
        self.wanted: dict[tuple[str, str], int] = {}  # lane and caller -> when it last asked for a place there
        self.seen: dict[str, bool] = {}
        self.said: dict[str, list[bytes]] = {}
        self.taken: list[webhooks.Taken] = []
        self.unheard: dict[str, str] = {}  # an answer that nobody heard -> the reader that has fetched it, if one has

    def wait(self, coming: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(coming)  # type: ignore[arg-type]

    async def _open(self) -> World:
        world = World(Store.fake(fake_redis(), namespace=new_namespace()))
        await world.apply(CAPPED)
        return world

    def teardown(self) -> None:
        self.wait(self.world.store.close())
        self.wait(self.loop.shutdown_default_executor())
        self.loop.close()

    # -- one step --

    def act(self, what: str, call: Call, expected: Expected = None, *, marks: bool = True) -> Any:
        """Does one thing and judges it; gives its result, None where it was refused."""
        before, active = self.now, self.world.book.active
        result, refusal = None, None
        try:
            result = self.wait(call())
        except errors.BrokerError as e:
            refusal = e
        self.now = after = self.wait(take(self.world.store))
        for i, job in after.jobs.items():
            if job.state is State.DONE and before.jobs[i].live and not self.heard(before, i):
                self.unheard[i] = ""
        broken = []
        changed = before.marks(after)
        if refusal is not None and any(":active:" not in name and ":line:" not in name for name in changed):
            broken.append(f"promise 8: {what} was refused with {refusal.code} and left a mark on {', '.join(changed)}")
        if not marks and changed:
            broken.append(f"{what} changed {', '.join(changed)}")
        broken += missteps(before, after, active) + violations(after)
        if type(refusal) is not (expected or type(None)):
            broken.append(f"{what}: expected {expected and expected.__name__}, got {refusal!r}")
        if broken:
            raise Broken("; ".join(broken))
        return result

    def heard(self, s: Snapshot, job_id: str) -> bool:
        """Whether somebody whose lease runs reads this job."""
        return any(until > self.world.now for until in s.readers(job_id).values())

    @invariant()
    def what_was_said_is_in_the_log(self) -> None:
        """Promise 4, and the rule of `seen`: known here because every frame and every reader came from here."""
        for job_id, job in self.now.jobs.items():
            content = [f.data for f in self.now.log(job_id) if not f.terminal]
            if content and content != self.said[job_id]:
                raise Broken(f"promise 4: the log of {job_id} says {content}, its worker said {self.said[job_id]}")
            if job.seen != self.seen[job_id]:
                raise Broken(f"job {job_id} has seen={job.seen}, its readers make it {self.seen[job_id]}")

    @invariant()
    def whoever_is_given_up_on_has_a_letter(self) -> None:
        """One for each job, which outlives it, and none once its request is tried again."""
        key = self.now.keys.get(self.world.store.keys.dead)
        letters = sorted(decode_hash(list(values))["job"] for _, values in key.value.entries) if key else []
        dead = sorted(
            job.id for job in self.now.jobs.values()
            if not job.retried_as and (
                job.state is State.FAILED or (job.state is State.EXPIRED and job.mode == "async")
            )
        )  # fmt: skip
        if [job_id for job_id in letters if job_id in self.now.jobs] != dead:
            raise Broken(f"there are letters of {letters}, dead are {dead}")

    # -- what the rules draw from --

    def some_job(self, pick: int, *fitting: State) -> JobRecord:
        """A job in one of the states that fit; every fourth pick is any job, live ones first."""
        records = [self.now.jobs[i] for i in self.ids]
        fit = [job for job in records if job.state in fitting]
        known = fit if fitting and pick % 4 < 3 else sorted(records, key=lambda job: not job.live)
        if not known:
            raise NothingFits
        return known[pick // 4 % len(known)]

    def pick_of(self, job_id: str, *fitting: State) -> int:
        """The pick that gives just this job."""
        for pick in range(0, 4 * len(self.ids), 4):
            if self.some_job(pick, *fitting).id == job_id:
                return pick
        raise NothingFits

    def some_hold(self, pick: int, *fitting: State) -> tuple[Holding, JobRecord]:
        """Half the time a hold that holds, in one of the states that fit; else a stale one, or any."""
        records = [(held, self.now.jobs[held.job_id]) for held in self.held]
        fit = [held for held, job in records if self.fenced(held, job) is None and job.state in fitting]
        stale = [held for held, job in records if self.fenced(held, job) is errors.StaleAttempt]
        known = (fit, fit, stale, self.held[-8:])[pick % 4]
        if not known:
            raise NothingFits
        held = known[-1 - pick // 4 % len(known)]
        return held, self.now.jobs[held.job_id]

    def fenced(self, held: Holding, job: JobRecord) -> Expected:
        if job.state in ENDED:
            return errors.AlreadyEnded
        return None if job.state in HELD and job.attempt == held.attempt else errors.StaleAttempt

    def has_its_share(self, job: JobRecord, lane: Lane) -> bool:
        """Whether others want places of the lane, and this caller has as many as they would: the rule once more."""
        now, who, places = self.world.now, job.caller, bound(self.now, self.world.book.active, lane.name, job)
        sharers = {other for (name, other), at in self.wanted.items() if name == lane.name and at > now - 60_000} | {
            who
        }
        own = sum(place.startswith(f"{lane.name}/") for place in self.now.waits(who))
        return len(sharers) > 1 and own >= max(1, places // len(sharers))

    def has_as_many_to_come(self, who: str, lane: Lane) -> bool:
        return sum(p.startswith(f"@{lane.name}/") for p in self.now.waits(who)) >= max(1, lane.max_queue)

    def waits_as_may(self, who: str, max_waiting: int) -> bool:
        """Whether as many jobs of a caller wait as its key allows; those that start later wait from then on."""
        return 0 < max_waiting <= sum(not place.startswith("@") for place in self.now.waits(who))

    def full(self, lane: Lane, job: JobRecord) -> bool:
        return self.waiting(lane) >= bound(self.now, self.world.book.active, lane.name, job)

    def waiting(self, lane: Lane) -> int:
        return self.now.lanes[lane.name].waiting if lane.name in self.now.lanes else 0

    def places_are_others(self, job: JobRecord, lane: Lane) -> bool:
        """Whether no slot is free and the places left belong to callers before this one: the rule once more."""
        places, waiting = bound(self.now, self.world.book.active, lane.name, job), self.waiting(lane)
        who = job.caller
        line = [other for other in self.line(lane.name) if self.stays_in_line(other, lane.name)]
        before = line.index(who) if who in line else len(line)
        return waiting >= places - lane.max_queue and places - waiting <= before

    def line(self, lane: str) -> list[str]:
        """Those who were refused a place and have none, first of all who was so first."""
        told = self.now.keys.get(self.world.store.keys.line(lane))
        return [who for who, _ in sorted(told.value, key=lambda one: (one[1], one[0]))] if told else []

    def stays_in_line(self, who: str, lane: str) -> bool:
        told = self.now.keys.get(self.world.store.keys.active(lane))
        asked = dict(told.value).get(who, 0) if told else 0
        return asked > self.world.now - LINE_MS and not self.has_a_place(who, lane)

    def has_a_place(self, who: str, lane: str) -> bool:
        return any(place.startswith(f"{lane}/") for place in self.now.waits(who))

    def lines_up(self, who: str, lane: str, expected: Expected) -> None:
        """Whoever finds no place and has none stands in line from there, who got one by asking does not. One who got it
        otherwise, by a promotion or because a job of its was put back, may still be noted: it counts no more."""
        if expected is errors.LaneFull and who not in self.line(lane) and not self.has_a_place(who, lane):
            raise Broken(f"{who} was refused in {lane}, and in line are {self.line(lane)}")
        if expected is None and who in self.line(lane):
            raise Broken(f"{who} has a place in {lane} and stays in line")

    # -- clients --

    @takes(
        lane=st.sampled_from(LANES), sync=st.booleans(), stream=st.booleans(), grace=st.sampled_from([-1, 0, 4_000]),
        reader=st.booleans(), later=st.sampled_from([0, 0, 0, 1_500]), key=st.sampled_from(["", "", "a", "b"]),
        body=st.sampled_from([b"x", b"x", b"y"]), remote=st.booleans(), exits=st.sampled_from(["", "", "far", "side"]),
        judged=st.sampled_from(["yes", "yes", "yes", "no", ""]), stale=st.sampled_from([False] * 5 + [True]),
        spills=st.sampled_from([False, False, False, True]), session=st.sampled_from(["", "s1", "s2"]),
        retried=st.booleans(), who=st.sampled_from(["ann", "ann", "bob"]),
        limits=st.sampled_from([(0, 0), (0, 0), (0, 0), (1, 0), (0, 1)]), hook=st.sampled_from(HOOKS),
        again=st.one_of(st.none(), st.none(), st.none(), picks),
        priority=st.sampled_from(["interactive", "interactive", "batch"]),
    )  # fmt: skip
    def submit(
        self, lane: str, sync: bool, stream: bool, grace: int, reader: bool, later: int, key: str, body: bytes,
        remote: bool, exits: str, judged: str, stale: bool, spills: bool, session: str, retried: bool, who: str,
        limits: tuple[int, int], hook: str, again: int | None, priority: str,
    ) -> None:  # fmt: skip
        active = self.old if stale else self.world.book.active
        into, w = active.lane(lane), self.world
        if into is None or len(self.now.due) >= MOST_LIVE:
            return
        old = self.some_job(again, *ENDED) if again is not None and self.ids else None
        record = JobRecord(
            id=w.new_id(), retry_of=old.id if old else "", stream=stream,
            mode="sync" if sync else "async", grace_ms=grace if sync else -1,
            keep_ms=LONG_MS, not_before=w.now + later if later else 0, zone="remote" if remote else "local",
            session=session, exits=exits if remote else "", judged=self.verdict_now(lane, judged) if remote else "",
            leaves="hash", left="{}", caller=who, max_running=limits[1], webhook=hook, priority=priority,
        )  # fmt: skip
        idem = self.now.keys.get(w.store.keys.idem(who, key)) if key else None
        twin = idem.value.decode().split(" ")[0] if idem else ""
        asked = (active.lane("big") if spills else None) or into
        expected: Expected = None
        if into.retiring:
            expected = errors.ModelUnavailable
        elif active.version != w.book.active.version:
            expected = errors.StalePolicy
        elif twin and (self.bodies[twin], self.now.jobs[twin].consent) != (body, record.consent):
            expected = errors.IdempotencyMismatch
        elif not twin and old is not None and (old.live or old.state is State.DONE):
            expected = errors.NotRetryable
        if expected is None and not twin and old is not None:
            twin = self.tried_again(old)
        if expected is not None:
            pass
        elif not twin and not later and self.waits_as_may(who, limits[0]):
            expected = errors.CallerLimit
        elif not twin and later and self.has_as_many_to_come(who, into):
            expected = errors.ScheduleFull
        elif not twin and not later and self.full(into, record):
            expected = errors.LaneFull
        elif not twin and not later and self.has_its_share(record, into):
            expected = errors.CallerShare
        elif not twin and not later and self.places_are_others(record, into):
            expected = errors.LaneFull
        elif not twin and into.model != asked.model and not may_downgrade(self.now, active, asked.model, None):
            expected = errors.DowngradesCapped
        before = self.now
        got = self.act(
            f"submit into {lane}",
            lambda: lanes.submit(
                w.store,
                active,
                w.fleet,
                record,
                into,
                body,
                reader="api1/r1" if reader else "",
                idempotency_key=key,
                retried=retried,
                max_waiting=limits[0],
                asked=asked,
            ),
            expected,
            marks=not twin,
        )
        if not later and not (expected is None and twin):
            self.noted(who, lane, expected)
        if got is None:
            return
        assert got.job_id == (twin or record.id) and got.attached == bool(twin)
        if old is not None and not twin and self.now.jobs[old.id].retried_as != record.id:
            raise Broken(f"job {old.id} does not say that {record.id} tries its request again")
        if not twin:
            self.ends_the_abandoned(before, record.id, reader=reader)
        if not twin:
            self.ids.append(record.id)
            self.bodies[record.id] = body
            self.seen[record.id] = sync and stream and reader

    def tried_again(self, old: JobRecord) -> str:
        """The job that tries an ended one's request again and need not be joined by another, "" if none does."""
        other = self.now.jobs.get(old.retried_as)
        return other.id if other is not None and (other.live or other.state is State.DONE) else ""

    def ends_the_abandoned(self, before: Snapshot, new: str, *, reader: bool) -> None:
        """A new request of a session ends those of its jobs that nobody reads and that asked for something else."""
        asked, now = self.now.jobs[new], self.world.now
        for job_id, was in before.jobs.items():
            ends = (
                reader and asked.session != "" and (was.caller, was.session) == (asked.caller, asked.session)
                and was.live and was.retries != "" and was.grace_ms >= 0
                and was.retries != asked.retries and not self.heard(before, job_id)
            )  # fmt: skip
            if self.now.jobs[job_id].abandon_at != (now if ends else was.abandon_at):
                raise Broken(f"job {job_id} should{'' if ends else ' not'} end with the new request of its session")

    @takes(
        pick=picks, reader=st.sampled_from(["api1/r1", "api1/r2", "api2/r1"]), other=st.sampled_from([b"", b"", b"z"])
    )
    def rejoin(self, pick: int, reader: str, other: bytes) -> None:
        """An SDK tries again: only what was left behind is taken up, by one of them."""
        like, now = self.some_job(pick), self.world.now
        body = other or self.bodies[like.id]
        fitting = {
            job.id for job in self.now.jobs.values()
            if job.retries and (job.caller, job.session, job.consent, self.bodies[job.id])
            == (like.caller, like.session, like.consent, body)
            and (
                (job.live and (not self.heard(self.now, job.id) or reader in self.now.readers(job.id)))
                or (self.unheard.get(job.id) in ("", reader) and now < job.ended_at + 60_000)
            )
        }  # fmt: skip
        fetched_before = {i for i in fitting if self.unheard.get(i) == reader}
        again = replace(like, id=self.world.new_id())
        got = self.act(
            "rejoin",
            lambda: lanes.rejoin(self.world.store, again, body, reader=reader),
            marks=bool(fitting - fetched_before),
        )
        if (got is None) != (not fitting) or (got is not None and got.job_id not in fitting):
            raise Broken(f"a retry got {got and got.job_id}, left behind were {sorted(fitting)}")
        if got is None:
            return
        job = self.now.jobs[got.job_id]
        if not job.live:
            self.unheard[job.id] = reader
        else:
            if self.now.readers(job.id).get(reader) != now + lanes.READER_LEASE_MS:
                raise Broken(f"a retry was led to {job.id} and does not read it")
            self.seen[job.id] |= job.stream and job.mode == "sync"

    @takes(pick=picks, lane=st.sampled_from(LANES))
    def submit_again(self, pick: int, lane: str) -> None:
        """The reply was lost: the same id once more, perhaps even into another lane."""
        job, w = self.some_job(pick), self.world
        into = w.book.active.lane(lane)
        if into is not None and not into.retiring:
            again = JobRecord(id=job.id, keep_ms=LONG_MS)
            self.act(
                "submit again", lambda: lanes.submit(w.store, w.book.active, w.fleet, again, into, b"x"), marks=False
            )

    @takes(pick=picks, reader=st.sampled_from(["api1/r1", "api1/r2", "api2/r1"]), wants=st.booleans())
    def attach(self, pick: int, reader: str, wants: bool) -> None:
        job = self.some_job(pick, State.QUEUED, State.STREAMING)
        sees = wants and job.stream and job.mode == "sync"
        self.act(
            f"attach to {job.state}",
            lambda: jobs.attach(self.world.store, job.id, reader=reader, lease_ms=10_000, sees=sees),
            marks=job.live,
        )
        if job.live and sees:
            self.seen[job.id] = True

    @takes(
        pick=picks, reader=st.sampled_from(["api1/r1", "api1/r2", "api2/r1"]),
        knows=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def detach(self, pick: int, reader: str, knows: bool = False) -> None:
        job, there = self.some_job(pick), self.now.readers(self.some_job(pick).id)
        left = self.act(
            "detach",
            lambda: jobs.detach(self.world.store, job.id, reader=reader, comes_back=knows),
            marks=job.live and reader in there,
        )
        if self.now.jobs[job.id].retries != ("" if knows and job.live and reader in there else job.retries):
            raise Broken(f"a retry may{'' if knows else ' not'} come back to {job.id} after its client has left")
        alive = [name for name, until in there.items() if until > self.world.now and name != reader]
        assert left == (len(alive) if job.live else 0)
        if job.live and reader in there and not alive and job.grace_ms >= 0:
            assert self.now.jobs[job.id].abandon_at == self.world.now + job.grace_ms

    @takes(pick=picks, only=st.sampled_from(["", "abandoned", "unread"]))
    def cancel(self, pick: int, only: Any) -> None:
        job = self.some_job(pick)
        expected: Expected = None if job.live else errors.AlreadyEnded
        if job.live and only == "abandoned" and not 0 < job.abandon_at <= self.world.now:
            expected = errors.NotDue
        if job.live and only == "unread" and any(t > self.world.now for t in self.now.readers(job.id).values()):
            expected = errors.NotDue
        self.act(f"cancel {job.state}", lambda: jobs.cancel(self.world.store, job.id, only=only), expected)

    # -- workers --

    @takes(
        pick=picks, host=st.sampled_from(["gpu1", "gpu2"]),
        confused=st.sampled_from(["", "", "", "", "", "entry", "lane", "policy"]),
    )  # fmt: skip
    def claim(self, pick: int, host: str, confused: str) -> None:
        job, w = self.some_job(pick, State.QUEUED), self.world
        active = self.old if confused == "policy" else w.book.active
        lane_name = "side" if confused == "lane" else job.lane
        picture = Waiting(job.id, lane_name, "1-1" if confused == "entry" else job.entry)
        lane, expected = active.lane(lane_name), None
        if lane is None or active.version != w.book.active.version:
            expected = errors.StalePolicy
        elif not job.live:
            expected = errors.AlreadyEnded
        elif job.state is not State.QUEUED:
            expected = errors.BadTransition
        elif (lane_name, picture.entry) != (job.lane, job.entry):
            expected = errors.Moved
        elif lane.trust == "remote" and self.kept_in(job, lane):
            expected = self.kept_in(job, lane)
        elif 0 < job.max_running <= sum(j.caller == job.caller and j.state in HELD for j in self.now.jobs.values()):
            expected = errors.CallerBusy
        got = self.act(
            f"claim {job.state}",
            lambda: lanes.claim(w.store, active, picture, host=host, boot=host + "-boot"),
            expected,
        )
        if got is not None:
            record = self.now.jobs[job.id]
            assert got.body == self.bodies[job.id]
            assert [getattr(got.record, name) for name in CLAIMED] == [getattr(record, name) for name in CLAIMED]
            self.held.append(Holding(job.id, job.lane, got.attempt, host + "-boot"))
            if not record.continues:
                self.said[job.id] = []

    def verdict_now(self, lane: str, word: str) -> str:
        """The verdict under the rules in force for a lane, "" where it leads nowhere or nobody judged."""
        into = self.world.book.active.lane(lane)
        rules = self.world.rules(lane) if word and into is not None else ""
        return {"yes": rules, "no": rules and "-" + rules, "": ""}[word]

    def kept_in(self, job: JobRecord, lane: Lane) -> Expected:
        """Why a claim that leads out refuses the job: its consent first, then the verdict on its content."""
        rules = self.world.rules(lane.name)
        if job.zone != "remote" or (job.exits and lane.name not in job.exits.split()) or job.continues:
            return errors.TrustZoneRefused
        if job.judged != rules:
            return errors.TrustZoneRefused if job.judged == "-" + rules else errors.Unjudged
        return None

    @takes(pick=picks, passes=st.booleans(), confused=st.sampled_from(["", "", "", "entry", "policy"]))
    def judge(self, pick: int, passes: bool, confused: str) -> None:
        """A worker writes a verdict under the rules in force onto a waiting job; it never gives consent."""
        job, w = self.some_job(pick, State.QUEUED), self.world
        lane, active = w.book.active.lane(job.lane), self.old if confused == "policy" else w.book.active
        if lane is None:
            return
        judged = self.verdict_now(job.lane, "yes" if passes else "no")
        expected: Expected = None
        if active.version != w.book.active.version:
            expected = errors.StalePolicy
        elif job.state is not State.QUEUED or confused == "entry":
            expected = errors.Moved
        entry = "1-1" if confused == "entry" else job.entry
        keys = [w.store.keys.job(job.id), w.store.keys.policy]
        args = [active.version, job.lane, entry, judged, "hash", "{}"]
        self.act(f"judge {job.state}", lambda: w.store.run("judge", keys, args), expected)

    @takes(pick=picks, ahead=st.sampled_from([1] * 10 + [0, 2]))
    def first_token(self, pick: int, ahead: int) -> None:
        held, job = self.some_hold(pick, State.CLAIMED)
        expected = self.fenced(held, job)
        again = job.state is State.STREAMING
        seq = max(1, job.last_seq + ahead - again)
        data = b"%d-%d" % (held.attempt, seq)
        repeat = again and seq <= job.last_seq
        if expected is None and not repeat and (again or seq != job.last_seq + 1):
            expected = errors.BadTransition if again else errors.FrameGap
        self.act(
            f"first token {seq} for {job.state} after {job.last_seq}",
            lambda: jobs.first_token(self.world.store, held, data, seq=seq),
            expected,
            marks=not repeat,
        )
        if expected is None and not repeat:
            self.said[job.id].append(data)

    @takes(pick=picks, ahead=st.sampled_from([1, 1, 1, 0, 2]))
    def emit(self, pick: int, ahead: int) -> None:
        held, job = self.some_hold(pick, State.STREAMING)
        seq = max(1, job.last_seq + ahead)
        expected = self.fenced(held, job)
        if expected is None and (job.state is not State.STREAMING or seq > job.last_seq + 1):
            expected = errors.FrameGap
        data = b"%d-%d" % (held.attempt, seq)
        repeat = seq <= job.last_seq
        self.act(
            f"emit {seq} after {job.last_seq}", lambda: jobs.emit(self.world.store, held, seq, data), expected,
            marks=not repeat,
        )  # fmt: skip
        if expected is None and not repeat:
            self.said[job.id].append(data)

    @takes(
        pick=picks, finish=st.booleans(), ahead=st.sampled_from([None, None, 0, 1, 1, 2]),
        logged=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def end(self, pick: int, finish: bool, ahead: int | None, logged: bool) -> None:
        held, job = self.some_hold(pick, State.CLAIMED, State.STREAMING)
        seq = 0 if ahead is None else job.last_seq + ahead
        data, error = b"" if logged else b"%d-%d" % (held.attempt, seq), None if finish else BROKE
        expected = self.fenced(held, job)
        if expected is None and finish and job.state is State.CLAIMED and seq != job.last_seq + 1:
            expected = errors.BadTransition
        elif expected is None and seq > job.last_seq + (0 if logged else 1):
            expected = errors.FrameGap
        self.act(
            f"end {job.state} at attempt {job.attempt} by attempt {held.attempt}",
            lambda: jobs.end(self.world.store, held, "finish" if finish else "fail", seq=seq, data=data, error=error),
            expected,
        )
        if expected is None and seq == job.last_seq + 1:
            self.said[job.id].append(data)

    @takes(pick=picks, loss=st.booleans(), behind=judgements)
    def release(self, pick: int, loss: bool, behind: int | None) -> None:
        held, job = self.some_hold(pick, State.CLAIMED, State.STREAMING)
        expected = self.fenced(held, job)
        if expected is None and self.stands(job) and behind != 0:
            expected = errors.BadTransition if behind is None else errors.Moved
        got = self.act(
            f"release {job.state}, judged {behind} behind {job.last_seq}",
            lambda: jobs.release(
                self.world.store, held, loss=loss, max_losses=1, error=BROKE, go_on=judged(job, behind)
            ),
            expected,
        )
        if got is not None:
            assert got == ("failed" if loss and job.losses >= 1 else "queued")
            self.waits_to_go_on(job, put_back=got == "queued")

    @takes(pick=picks)
    def put_back(self, pick: int) -> None:
        held, job = self.some_hold(pick, State.CLAIMED, State.STREAMING)
        expected = self.fenced(held, job)
        if expected is None and self.stands(job):
            expected = errors.BadTransition
        elif expected is None and (
            job.put_backs >= jobs.PUT_BACK_MAX or job.give_up_at < self.world.now + PUT_BACK_LEFT_MS
        ):
            expected = errors.NotPutBack
        self.act(
            f"put_back {job.state}, put back {job.put_backs} times",
            lambda: jobs.put_back(self.world.store, held, left_ms=PUT_BACK_LEFT_MS),
            expected,
        )
        if expected is None:
            now = self.now.jobs[job.id]
            if (now.state, now.put_backs, now.losses) != (State.QUEUED, job.put_backs + 1, job.losses):
                raise Broken(f"put back, and not counted so: {now}")
            self.waits_to_go_on(job, put_back=True)

    def stands(self, job: JobRecord) -> bool:
        """Whether a client has been given a part of the answer, so that it may not start again."""
        return job.seen and bool(self.said.get(job.id)) and (job.state is State.STREAMING or job.continues > 0)

    def waits_to_go_on(self, was: JobRecord, *, put_back: bool) -> None:
        """What stands is gone on from within the time given, what does not begins anew."""
        job = self.now.jobs[was.id]
        by = self.world.now + GOES_ON_WITHIN_MS if put_back and self.stands(was) else 0
        assert job.continue_by == by and (not by or job.continues == was.attempt), (job, by)

    @takes(pick=picks, right=st.sampled_from([True, True, False]))
    def renew(self, pick: int, right: bool) -> None:
        held, job = self.some_hold(pick, State.CLAIMED, State.STREAMING)
        asked = held if right else replace(held, boot="another")
        expected = self.fenced(held, job) or (None if right else errors.StaleAttempt)
        self.act("renew", lambda: jobs.renew(self.world.store, asked, lease_ms=10_000), expected)

    # -- schedulers --

    @takes(pick=picks, moved=st.sampled_from([False, False, False, True]))
    def promote(self, pick: int, moved: bool) -> None:
        job, w = self.some_job(pick, State.QUEUED, State.CLAIMED), self.world
        here = w.book.active.lane(job.lane)
        to = w.book.active.policy.lane(here.fallback) if here is not None and here.fallback else None
        if to is None:
            return
        picture, expected = replace(job, entry="1-1") if moved else job, None
        if not job.live:
            expected = errors.AlreadyEnded
        elif job.state not in (State.QUEUED, State.CLAIMED):
            expected = errors.BadTransition
        elif moved:
            expected = errors.Moved
        elif job.continues:
            expected = errors.BadTransition
        elif to.trust == "remote":
            expected = errors.TrustZoneRefused
        elif self.full(to, job) or self.has_its_share(job, to) or self.places_are_others(job, to):
            expected = errors.LaneFull
        elif to.model != job.asked_model and not may_downgrade(self.now, w.book.active, job.asked_model, job):
            expected = errors.DowngradesCapped
        self.act(f"promote {job.state}", lambda: lanes.promote(w.store, w.book.active, w.fleet, picture, to), expected)

    @takes(pick=picks, behind=judgements)
    def recover(self, pick: int, behind: int | None) -> None:
        job = self.some_job(pick, State.CLAIMED, State.STREAMING)
        expected: Expected = None
        if not job.live:
            expected = errors.AlreadyEnded
        elif job.state not in HELD:
            expected = errors.BadTransition
        elif job.lease_until > self.world.now:
            expected = errors.NotDue
        elif self.stands(job) and behind:
            expected = errors.Moved
        again = self.act(
            f"recover {job.state}, judged {behind} behind {job.last_seq}",
            lambda: lanes.recover(self.world.store, job, max_losses=1, go_on=judged(job, behind)),
            expected,
        )
        if again is not None:
            assert again == (job.losses < 1 and (behind == 0 or not self.stands(job)))
            self.waits_to_go_on(job, put_back=again)

    @takes(pick=picks)
    def expire(self, pick: int) -> None:
        job = self.some_job(pick, State.QUEUED)
        expected: Expected = None
        if not job.live:
            expected = errors.AlreadyEnded
        elif job.state in HELD:
            expected = errors.BadTransition
        elif (job.continue_by or job.give_up_at) > self.world.now:
            expected = errors.NotDue
        self.act(
            f"expire {job.state}", lambda: lanes.expire(self.world.store, job, errors.JobExpired("late")), expected
        )

    @takes(pick=picks)
    def release_due(self, pick: int) -> None:
        job, w = self.some_job(pick, State.SCHEDULED), self.world
        lane = w.book.active.lane(job.lane)
        if lane is None:
            return
        expected: Expected = None
        if not job.live:
            expected = errors.AlreadyEnded
        elif job.state is not State.SCHEDULED:
            expected = errors.BadTransition
        elif job.not_before > w.now:
            expected = errors.NotDue
        elif self.waits_as_may(job.caller, job.max_waiting):
            expected = errors.CallerLimit
        elif self.full(lane, job):
            expected = errors.LaneFull
        elif self.has_its_share(job, lane):
            expected = errors.CallerShare
        elif self.places_are_others(job, lane):
            expected = errors.LaneFull
        self.act(
            f"release_due {job.state}", lambda: lanes.release_due(w.store, w.book.active, w.fleet, job, lane), expected
        )
        self.noted(job.caller, lane.name, expected)

    def noted(self, who: str, lane: str, refused: Expected) -> None:
        """Looks at what is remembered of somebody who asked for a place now, and got it or not."""
        if refused in (errors.LaneFull, errors.CallerShare, None):
            self.lines_up(who, lane, refused)
            self.wanted[lane, who] = self.world.now

    @takes(pick=picks)
    def postpone(self, pick: int) -> None:
        job = self.some_job(pick)
        self.act("postpone", lambda: lanes.postpone(self.world.store, job, after_ms=1_000), marks=job.state not in HELD)

    @takes(pick=picks, hasten=st.booleans())
    def look(self, pick: int, hasten: bool) -> None:
        job = self.some_job(pick)
        looked = self.act("look", lambda: self.world.due.look(job.id, hasten=hasten))
        tried = job.state is State.SCHEDULED and self.world.book.active.lane(job.lane) is not None
        if tried and looked.outcome in ("started", "full"):  # that asked for a place, as `release_due` does
            self.noted(job.caller, job.lane, None if looked.outcome == "started" else errors.CallerShare)

    @takes(lane=st.sampled_from(LANES))
    def sweep(self, lane: str) -> None:
        """On a healthy lane it has nothing to do."""
        assert self.act("sweep", lambda: lanes.sweep(self.world.store, lane, page=2), marks=False) == (0, 0)

    # -- couriers --

    def deliveries(self) -> dict[str, dict[str, str]]:
        """What is on its way, or was."""
        found = [decode_hash(key.value) for key in self.now.of("webhook:<id>").values()]
        return {f["id"]: f for f in found}

    @takes()
    def gather(self) -> None:
        self.act("gather", lambda: webhooks.gather(self.world.store, limit=2))

    @takes(pick=picks, most=st.integers(1, 2))
    def take(self, pick: int, most: int) -> None:
        endpoints = self.wait(webhooks.due(self.world.store, limit=9))
        if not endpoints:
            raise NothingFits
        before, now = self.deliveries(), self.world.now
        rules = {"most": most, "failures_max": FAILURES_MAX, "horizon_ms": HORIZON_MS}
        taken = self.act("take", lambda: webhooks.take(self.world.store, endpoints[pick % len(endpoints)], **rules))
        trying = [one for one in taken if not one.over]
        failures = taken[0].failures if taken else 0
        if len(trying) > (1 if failures >= FAILURES_MAX else most):
            raise Broken(f"an endpoint that failed {failures} times got {len(trying)} deliveries at once")
        for one in taken:
            was = before[one.delivery.id]
            if int(was.get("lease_until", 0)) > now or one.attempt != int(was["attempt"]) + 1:
                raise Broken(f"{one.delivery.id} was taken while it was {was}")
            if one.over and int(was["since"]) + HORIZON_MS > now:
                raise Broken(f"{one.delivery.id} was over before its time: {was}")
        self.taken += taken

    @takes(
        pick=picks, outcome=st.sampled_from(webhooks.OUTCOMES), breaks=st.booleans(),
        open_for_ms=st.sampled_from([0, 5_000]),
    )  # fmt: skip
    def note(self, pick: int, outcome: Any, breaks: bool, open_for_ms: int) -> None:
        if not self.taken:
            raise NothingFits
        taken = self.taken[-1 - pick % len(self.taken)]
        now = self.deliveries()[taken.delivery.id]
        holds = now["state"] == "pending" and int(now["attempt"]) == taken.attempt
        told = webhooks.Try(self.world.now, 500, 1)
        self.act(
            f"note {outcome} of attempt {taken.attempt} at {now['id']}",
            lambda: webhooks.note(
                self.world.store, taken, outcome, told, retry_after_ms=1_000, breaks=breaks, open_for_ms=open_for_ms
            ),
            None if holds else errors.StaleAttempt,
        )
        if holds and self.deliveries()[now["id"]]["state"] != ("pending" if outcome == "failed" else outcome):
            raise Broken(f"{now['id']} was noted {outcome} and is {self.deliveries()[now['id']]}")

    @takes(pick=picks)
    def redeliver(self, pick: int) -> None:
        known = sorted(self.deliveries())
        if not known:
            raise NothingFits
        self.act("redeliver", lambda: webhooks.redeliver(self.world.store, known[pick % len(known)]))

    # -- operator, hosts, time --

    @takes(number=st.integers(0, len(POLICIES) - 1))
    def apply(self, number: int) -> None:
        self.old = self.world.book.active
        self.act("apply", lambda: self.world.apply(POLICIES[number]))

    @takes(lane=st.sampled_from(LANES))
    def retire(self, lane: str) -> None:
        async def retire() -> None:
            gone = await lanes.retire(self.world.store, lane)
            assert not gone or lane not in self.now.lanes or not self.now.lanes[lane].entries
            await self.world.book.reload()

        self.act("retire", retire)

    @takes(
        host=st.sampled_from(["gpu1", "gpu2"]), model=st.sampled_from(["big", "small", "far"]),
        state=st.sampled_from(["warm", "warm", "degraded", "cold", "waking"]), slots=st.integers(0, 3),
        settling=st.integers(0, 1), kept=st.integers(0, 1),
    )  # fmt: skip
    def beat(self, host: str, model: str, state: str, slots: int, settling: int, kept: int) -> None:
        told = {model: ModelOnHost(state=state, slots_total=slots, slots_settling=settling, slots_kept=kept)}
        self.act("beat", lambda: self.world.tell(host, told, boot=host + "-boot"))

    # -- who does what: the rules --
    # One rule for each kind of actor, several steps long: with a rule for each verb, hypothesis switches so many of
    # them off in an example that a job rarely comes as far as its second frame.

    def later(self, ms: int) -> None:
        """Time goes by, and the hosts beat on: what a host last told is there for as long as it is known."""
        self.world.now += ms
        hosts = self.wait(self.world.store.command("ZRANGE", self.world.store.keys.hosts, 0, -1))
        if hosts:
            beats = [word for host in hosts for word in (self.world.now, host)]
            self.wait(self.world.store.command("ZADD", self.world.store.keys.hosts, *beats))
        self.now = self.wait(take(self.world.store))

    def do(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        for name, arguments in steps:
            with suppress(NothingFits):
                getattr(self, name)(**arguments)

    @initialize(first=DRAWN["submit"], told=DRAWN["beat"])
    def begin(self, first: dict[str, Any], told: dict[str, Any]) -> None:
        self.beat(**told)
        self.submit(**first)

    @rule(steps=several("submit", "submit", "submit", "submit_again"))
    def clients_ask(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        self.do(steps)

    @rule(
        first=DRAWN["submit"], second=DRAWN["submit"],
        between=several("detach", "detach", "claim", "first_token", "end", "end"), served=DRAWN["end"],
        again=several("rejoin", "rejoin", "submit"),
    )  # fmt: skip
    def an_sdk_tries_again(
        self, first: dict[str, Any], second: dict[str, Any], between: list[tuple[str, dict[str, Any]]],
        served: dict[str, Any], again: list[tuple[str, dict[str, Any]]],
    ) -> None:  # fmt: skip
        """Its first try waits, perhaps beside one that is just the same; it hangs up, and comes back."""
        self.do([("submit", first | SDK), ("submit", second | SDK), *between, *again])
        self.do([straight(("claim", {"host": "gpu1"})), straight(("end", served)), *again])

    @rule(
        first=DRAWN["submit"], claim=DRAWN["claim"], heard=st.booleans(),
        again=st.lists(st.sampled_from(["api1/r2", "api2/r1"]), min_size=1, max_size=2),
    )  # fmt: skip
    def an_answer_ends_between_two_tries(
        self, first: dict[str, Any], claim: dict[str, Any], heard: bool, again: list[str]
    ) -> None:
        """An SDK's answer comes to its end, with its client there or gone; then its retries come."""
        with suppress(NothingFits):
            self.submit(**first | SDK)
            job_id = self.ids[-1]
            if not heard:
                self.detach(self.pick_of(job_id), "api1/r1")
            self.claim(**claim | {"pick": self.pick_of(job_id, State.QUEUED), "confused": ""})
            self.first_token(0, ahead=1)
            self.end(0, finish=True, ahead=1, logged=False)
            for reader in again:
                self.rejoin(self.pick_of(job_id), reader, b"")

    @rule(
        lane=st.sampled_from(LANES),
        asked=DRAWN["submit"],
        leaves=st.sampled_from([True, True, False]),
        alone=st.booleans(),
    )
    def another_comes_late(self, lane: str, asked: dict[str, Any], leaves: bool, alone: bool) -> None:
        """A lane was filled by one alone, or by one each; another is refused, and then somebody who was there before
        asks for the place that becomes free."""
        asked = asked | PLAIN | {"lane": lane, "spills": False}
        self.time_passes(ms=60_000)  # nobody else has wanted anything since
        into = self.world.book.active.lane(lane)
        asks = JobRecord(id="", caller="cid", priority=asked["priority"])
        if into is None or self.full(into, asks):
            return
        before = len(self.ids)
        for number in range(8):  # no lane here has more places
            if not self.full(into, asks):
                self.submit(**asked | {"who": "ann" if alone else f"ann{number}"})
        if len(self.ids) == before:
            return
        last = self.ids[-1]
        self.submit(**asked | {"who": "cid"})
        if leaves:
            self.cancel(self.pick_of(last), "")
        first = self.now.jobs[last].caller
        self.do([("submit", asked | {"who": who}) for who in (first, "cid", first)])

    @rule(steps=several("attach", "detach", "cancel", "rejoin"))
    def clients_read(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        self.do(steps)

    @rule(job=DRAWN["submit"], number=st.integers(0, len(POLICIES) - 1), judge=DRAWN["judge"], claim=DRAWN["claim"])
    def a_job_may_leave(self, job: dict[str, Any], number: int, judge: dict[str, Any], claim: dict[str, Any]) -> None:
        """It waits in a lane that leads out; perhaps the rules change; perhaps it is judged anew; a worker comes."""
        with suppress(NothingFits):
            self.submit(**job | {"lane": "far", "remote": True, "exits": "", "stale": False, "later": 0})
            self.apply(number)
            pick = self.pick_of(self.ids[-1], State.QUEUED)
            self.judge(**judge | {"pick": pick})
            self.claim(**claim | {"pick": pick, "confused": ""})

    @rule(
        steps=several(
            "claim", "judge", "first_token", "first_token", "emit", "end", "end", "release", "put_back", "renew"
        )
    )  # fmt: skip
    def workers_work(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        self.do(steps)

    @rule(served=st.tuples(*(DRAWN[name] for name in SERVED)), steps=st.integers(3, len(SERVED)))
    def a_job_is_served(self, served: tuple[dict[str, Any], ...], steps: int) -> None:
        """The straight road, as far as it goes."""
        self.do(list(zip(SERVED, served, strict=True))[:steps])

    @rule(
        tried=st.tuples(*(DRAWN[name] for name in TRIED_AGAIN)),
        silent=st.booleans(),
        late=several("end", "emit", "renew"),
    )
    def an_attempt_is_lost(
        self, tried: tuple[dict[str, Any], ...], silent: bool, late: list[tuple[str, dict[str, Any]]]
    ) -> None:
        """Its worker falls silent or gives the job back, another claims it, and the first still has a word."""
        steps = dict(zip(TRIED_AGAIN, tried, strict=True))
        self.do([(name, steps[name]) for name in ("submit", "claim", "first_token")])
        if silent:
            self.later(lanes.JOB_LEASE_MS)
        self.do([("recover" if silent else "release", steps["recover" if silent else "release"])])
        self.do([("claim", steps["claim"]), *late])

    @rule(
        begun=st.tuples(*(DRAWN[name] for name in BEGUN)), silent=st.booleans(), lost=DRAWN["release"],
        meanwhile=several("promote", "expire", "look", "attach", "cancel"), taken=DRAWN["claim"],
        patient=st.sampled_from([True, True, False]),
        then=several("first_token", "first_token", "emit", "end", "release", "recover", "look"),
    )  # fmt: skip
    def an_answer_goes_on(
        self, begun: tuple[dict[str, Any], ...], silent: bool, lost: dict[str, Any],
        meanwhile: list[tuple[str, dict[str, Any]]], patient: bool, taken: dict[str, Any],
        then: list[tuple[str, dict[str, Any]]],
    ) -> None:  # fmt: skip
        """A client hears the begin of it, the worker is lost, and another goes on, if one comes in time."""
        seen = PLAIN | {"sync": True, "stream": True, "reader": True}
        submitted, *more = zip(BEGUN, begun, strict=True)
        seen["lane"] = "big" if begun[0]["lane"] == "far" else begun[0]["lane"]  # what leaves does not go on
        self.do([(submitted[0], submitted[1] | seen), *map(straight, more)])
        if silent:
            self.later(lanes.JOB_LEASE_MS)
        words = {name: value for name, value in lost.items() if name != "loss" or not silent}
        self.do([straight(("recover" if silent else "release", words)), *meanwhile])
        if not patient:
            self.later(GOES_ON_WITHIN_MS)
            self.do(meanwhile)
        self.do([straight(("claim", taken)), *then, *then])

    @rule(
        served=st.tuples(*(DRAWN[name] for name in SERVED)), shown=st.sampled_from([0, 0, 1, 2]),
        times=st.integers(1, 4),
        late=several("end", "emit", "put_back", "attach", "recover"),
    )  # fmt: skip
    def a_job_makes_way(
        self, served: tuple[dict[str, Any], ...], shown: int, times: int, late: list[tuple[str, dict[str, Any]]]
    ) -> None:
        """It runs, is put back, runs again; and its old attempts still have a word."""
        submitted, claimed, *more = zip(SERVED, served, strict=True)
        calm = {"key": "", "stale": False, "later": 0, "limits": (0, 0)}
        self.do([(submitted[0], submitted[1] | calm)])
        for _ in range(times):
            self.do([straight(claimed), *map(straight, more[:shown]), ("put_back", {"pick": 0}), *late])

    @rule(moved=st.tuples(*(DRAWN[name] for name in MOVED)), held=st.booleans())
    def a_job_is_moved(self, moved: tuple[dict[str, Any], ...], held: bool) -> None:
        """It waits or is claimed, moves to its fallback, and a worker there takes it."""
        steps = list(zip(MOVED, moved, strict=True))
        self.do(steps if held else [steps[0], *steps[2:]])

    @rule(steps=several("promote", "promote", "recover", "expire", "release_due", "postpone", "look", "sweep"))
    def schedulers_look(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        self.do(steps)

    @rule(first=DRAWN["submit"], hook=st.sampled_from(HOOKS[2:]), steps=several("take", "note", "note", "redeliver"))
    def couriers_deliver(self, first: dict[str, Any], hook: str, steps: list[tuple[str, dict[str, Any]]]) -> None:
        """A job with a webhook ends, and what is owed goes its way."""
        before = len(self.ids)
        self.submit(**first | PLAIN | {"hook": hook})
        if len(self.ids) > before:
            self.cancel(self.pick_of(self.ids[-1]), "")
        self.do([("gather", {}), ("take", {"pick": 0, "most": 2}), *steps])
        self.later(webhooks.LEASE_MS)
        self.do([("take", {"pick": 0, "most": 2}), *steps, *steps])

    @rule(steps=several("apply", "retire", "beat", "beat"))
    def operators_change(self, steps: list[tuple[str, dict[str, Any]]]) -> None:
        self.do(steps)

    @rule(ms=st.sampled_from([1_000, 10_000, 1, 500, 4_000, 20_000]))
    def time_passes(self, ms: int) -> None:
        """Of the ended jobs all but the last few are past their keep time: their keys go as if they had expired."""
        self.later(ms)
        names, ended = self.world.store.keys, [i for i in self.ids if not self.now.jobs[i].live]
        for job_id in ended[:-2]:
            gone = [names.job(job_id), names.frames(job_id), names.request(job_id)]
            idem = self.now.jobs[job_id].idem
            if idem and self.now.idem(idem) == job_id:
                gone.append(idem)
            self.wait(self.world.store.command("DEL", *gone))
            self.ids.remove(job_id)
            self.held = [held for held in self.held if held.job_id != job_id]
        self.now = self.wait(take(self.world.store))


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap on downgrades looks at the last few jobs, and binds soon: an example has no two hundred."""
    monkeypatch.setattr(downgrades, "WINDOW", 3)
    monkeypatch.setattr(downgrades, "BINDING_FROM", 2)


MOST_LIVE = 4
CLAIMED = (
    "id",
    "lane",
    "entry",
    "state",
    "attempt",
    "owner",
    "boot",
    "model",
    "stream",
    "mode",
    "zone",
    "lease_until",
    "continues",
    "last_seq",
)
QUICK = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)  # fmt: skip
HUNT = settings(QUICK, max_examples=250, derandomize=True, database=None, phases=[Phase.generate])


def test_the_verbs_keep_the_promises() -> None:
    run_state_machine_as_test(Verbs, settings=QUICK)


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("part", range(1, 9))
def test_the_verbs_keep_the_promises_for_long(part: int) -> None:
    """Four thousand examples in eight parts of about ten minutes of CPU each, which may run beside one another
    (`-k 1`, `-k 2` and so on)."""
    seeded = settings(QUICK, max_examples=500, stateful_step_count=80, derandomize=False, database=None)
    run_state_machine_as_test(Verbs, settings=seeded)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=pytest.mark.long if fault.slow else ()) for fault in FAULTS],
    ids=lambda fault: fault.name.replace(" ", "-"),
)
def test_a_planted_fault_is_caught(fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    """A model test that notices nothing proves nothing."""
    with planted(fault), pytest.raises(Broken) as caught:
        run_state_machine_as_test(Verbs, settings=HUNT)
    with capsys.disabled():
        print(f"\n{fault.name}: {caught.value}")
