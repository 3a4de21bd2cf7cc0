"""No leak: a search over policies, requests, promotions, lost workers and retries for a way out that is not allowed.

Real admission, verbs, `due` and the worker's own way from a claim to the bytes that it would send; only the sending
is a double, which keeps what it is given. What may be there is a second opinion (`leaks.py`). Each guard is taken out
once, to see that the search would notice.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from broker import admission, errors, jobs, lanes
from broker.hosts import Fleet
from broker.lifecycle import HELD, State
from broker.policies import PolicyBook
from broker.policy import Model
from broker.records import JobRecord, Waiting
from broker.store import Store
from broker.trust import audit, door, secrets
from tests.model.leaks import FAULTS, FRAME, HOLDS, RULES, TOLD, Plant, Request, Rules, body_of
from tests.support.broker_world import LONG_MS, World, fake_redis, new_namespace
from workers import dispatcher as dispatcher_module
from workers.attempt import Attempt
from workers.dispatcher import Dispatcher
from workers.picture import LanePicture
from workers.runtimes.base import Endpoint
from workers.swaps import Swaps
from workers.waker import Waker

RECENT = 5
"""So many of the last jobs are worked with: what matters happens to one."""

MODELS = ("near", "far", "home", "cloud")
picks = st.integers(0, 7)
numbers = st.integers(0, len(RULES) - 1)
LOCAL, LEAVES, BY_FAR = ("local", ""), ("remote", ""), ("remote", "far")
consents = st.sampled_from([LOCAL, LOCAL, LEAVES, BY_FAR, ("remote", "cloud far")])


class Leak(AssertionError):
    """Something left that must not, or stands where it would."""


@dataclass(frozen=True)
class Sent:
    """What a runtime was given."""

    url: str
    job: str
    body: bytes


class Worker:
    """The dispatcher of one host, and for each model the definition by which its runtime runs now."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.book = PolicyBook(world.store)
        self.held: dict[str, Model] = {}
        self.dispatcher = Dispatcher(
            world.store, self.book, Fleet(world.store, self.book), cast(LanePicture, SimpleNamespace(unspend=_nothing)),
            {}, cast(Swaps, None), host=name, boot=f"{name}-boot", tasks=cast(asyncio.TaskGroup, None),
        )  # fmt: skip

    async def serve(self, waiting: Waiting, model: str) -> tuple[Attempt, Sent, bool] | None:
        """Claims a job as the dispatcher does; gives what it would send to where, and whether that is out."""
        held = self.held[model]
        endpoint = Endpoint(base_url=held.url or "http://127.0.0.1:1", headers={}, model=held.model)
        waker = SimpleNamespace(
            name=model,
            model=held,
            runtime=SimpleNamespace(endpoint=lambda: endpoint),
            refused=_nothing,
            woken_ms=(0, 0),
        )
        attempt = await self.dispatcher._claim(cast(Waker, waker), waiting, 0)
        if attempt is None:
            return None
        if attempt.job.continues:
            await attempt._go_on()
        sent = Sent(endpoint.base_url, waiting.job, attempt._asking.request(None))
        return attempt, sent, held.trust == "remote"


class Door(RuleBasedStateMachine):
    """Clients of all sorts, two workers that may be behind, a scheduler that tries everything, and an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rules: Rules = RULES[0]
        self.requests: dict[str, Request] = {}
        self.bodies: dict[tuple[str, int], bytes] = {}
        self.sent: list[Sent] = []
        self.gone_on = 0  # answers that went on where they had begun
        self.holdings: list[jobs.Holding] = []
        self.world = self.wait(self._open())

    def wait(self, coming: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(coming)  # type: ignore[arg-type]

    async def _open(self) -> World:
        world = World(Store.fake(fake_redis(), namespace=new_namespace()))
        await world.apply(self.rules.text)
        self.workers = [Worker(world, name) for name in ("gpu1", "gpu2")]
        for worker in self.workers:
            await worker.book.reload()
            worker.held = dict(worker.book.active.models())
        return world

    def teardown(self) -> None:
        for worker in self.workers:
            worker.dispatcher.close()
        self.wait(self.world.store.close())
        self.wait(self.loop.shutdown_default_executor())
        self.loop.close()

    @initialize(number=numbers, warm=st.booleans())
    def begin(self, number: int, warm: bool = True) -> None:
        self.change(number)
        self.take_over(0)
        self.take_over(1)
        self.wait(self.world.warm(near=int(warm), far=1, home=1, cloud=1))

    # -- clients --

    @rule(
        kind=st.sampled_from(list(HOLDS)), consent=consents, model=st.sampled_from(MODELS), word=st.integers(0, 2),
        key=st.sampled_from(["", "", "k"]), try_again=st.booleans(), batch=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def ask(
        self, kind: str, consent: tuple[str, str], model: str, word: int, key: str, try_again: bool, batch: bool
    ) -> None:
        w = self.world
        body = self.bodies.setdefault((kind, word), body_of(kind, word, "any"))
        request = Request(kind, body, *consent)
        job = JobRecord(
            id=w.new_id(), asked=model, zone=consent[0], exits=consent[1], keep_ms=LONG_MS, grace_ms=LONG_MS,
            session=f"{kind}-{word}-{model}", priority="batch" if batch else "interactive", mode="sync", stream=True,
        )  # fmt: skip
        try:
            admitted = self.wait(
                admission.admit(
                    w.store, w.book, w.fleet, job, body, reader="api1/r", idempotency_key=key, may_retry=True,
                    is_retry=try_again,
                )
            )  # fmt: skip
        except errors.Refused:
            return
        if admitted.attached:
            other = self.requests[admitted.job_id]
            if (other.zone, other.exits, other.body) != (request.zone, request.exits, request.body):
                raise Leak(f"a request with consent {consent} was led to one with {other.zone} {other.exits}")
            return
        self.requests[job.id] = request
        lane = admitted.lane.removesuffix(".batch")
        if lane in self.rules.remote and not (request.consents(admitted.lane) and self.rules.lets(kind, lane)):
            raise Leak(f"admission let a {kind} request with consent {consent} into {lane} under {self.rules}")
        self.wait(jobs.detach(w.store, job.id, reader="api1/r"))

    # -- workers --

    @rule(worker=st.integers(0, 1), pick=picks, then=st.sampled_from(["done", "lost", "released", "begun", "silent"]),
          unheard=st.sampled_from([False, False, True]))  # fmt: skip
    def work(self, worker: int, pick: int, then: str, unheard: bool) -> None:
        job = self.some_job(pick, State.QUEUED)
        if job is None:
            return
        w, one = self.world, self.workers[worker]
        lane = w.book.active.lane(job.lane)
        if lane is None or lane.model not in one.held:
            return
        waiting = Waiting(job=job.id, lane=job.lane, entry=job.entry, session=job.session)
        with _claim_unheard(w.store) if unheard else nullcontext():
            served = self.wait(one.serve(waiting, lane.model))
        if served is None:
            return
        attempt, sent, out = served
        if out:
            self.judge(sent, self.requests[job.id], job.lane, attempt.held)
        elif attempt.job.continues:
            assert json.loads(sent.body)["messages"][-1]["content"] == TOLD * (attempt._stands)
            self.gone_on += 1
        if then in ("begun", "silent"):
            attempt._seq += 1
            self.wait(jobs.first_token(w.store, attempt.held, FRAME, seq=attempt._seq))
        match then:
            case "lost" | "silent":
                self.holdings.append(attempt.held)
            case "released" | "begun":
                self.wait(attempt._give_back(errors.WorkerLost("drain")))
            case _:
                self.wait(jobs.end(w.store, attempt.held, "finish", seq=attempt._seq + 1, data=b"answer"))

    def judge(self, sent: Sent, request: Request, lane: str, held: jobs.Holding) -> None:
        """The double was given something: may it be there, by the policy of this moment?"""
        model = lane.removesuffix(".batch")
        if model not in self.rules.remote:
            raise Leak(f"{sent.job} left by lane {lane}, which is local")
        if not request.consents(lane):
            raise Leak(f"{sent.job} left by {lane} with consent {request.zone} {request.exits}")
        if not self.rules.lets(request.kind, model):
            raise Leak(f"a {request.kind} request left by {lane} under {self.rules}")
        if sent.url != self.rules.url:
            raise Leak(f"{sent.job} left to {sent.url}, and the policy leads to {self.rules.url}")
        if TOLD in sent.body.decode():
            raise Leak(f"{sent.job} left with the answer that was begun, which nobody has judged")
        if self.rules.redact and b"ACME" in sent.body:
            raise Leak(f"{sent.job} left without its redaction")
        words = json.loads(request.body)["messages"]
        assert self.rules.redact or json.loads(sent.body)["messages"] == words, "it was mangled on its way"
        records = self.wait(audit.read(self.world.store, since_ms=LONG_MS * 100))
        if (sent.job, held.attempt, lane) not in {(r.job, r.attempt, r.lane) for r in records}:
            raise Leak(f"{sent.job} left without a record")
        self.sent.append(sent)

    @rule(worker=st.integers(0, 1))
    def take_over(self, worker: int) -> None:
        """Its runtimes run by the definitions of the active policy from here on."""
        one = self.workers[worker]
        self.wait(one.book.reload())
        one.held = one.held | dict(one.book.active.models())

    # -- scheduler --

    @rule(pick=picks, hasten=st.booleans())
    def look(self, pick: int, hasten: bool) -> None:
        job = self.some_job(pick)
        if job is not None:
            try:
                self.wait(self.world.due.look(job.id, hasten=hasten))
            except errors.TrustZoneRefused as e:
                raise Leak(f"the scheduler tried to lead {job.id} out: {e}") from None

    @rule(pick=picks, to=st.sampled_from(MODELS))
    def promote(self, pick: int, to: str) -> None:
        """Somebody tries it without asking `due`."""
        job, lane = self.some_job(pick, State.QUEUED, State.CLAIMED), self.world.book.active.lane(to)
        if job is None or lane is None or job.lane == to:
            return
        try:
            self.wait(lanes.promote(self.world.store, self.world.book.active, self.world.fleet, job, lane))
        except errors.BrokerError:
            return
        if to in self.rules.remote:
            raise Leak(f"{job.id} was promoted into {to}, which leads out")

    @rule(ms=st.sampled_from([500, 2_000, 11_000]))
    def time_passes(self, ms: int) -> None:
        """Leases and deadlines end; what was lost is looked after."""
        self.world.now += ms
        for held in self.holdings:
            with suppress(errors.BrokerError):
                job = self.wait(self.world.job(held.job_id))
                if job.state in HELD:
                    self.wait(self.world.due.look(held.job_id))
        self.holdings.clear()

    # -- operator --

    @rule(number=numbers)
    def change(self, number: int) -> None:
        self.rules = RULES[number]
        self.wait(self.world.apply(self.rules.text))

    @rule(
        number=st.sampled_from([6, 6, 8, *range(len(RULES))]), kind=st.sampled_from(["plain", "plain", *HOLDS]),
        consent=st.sampled_from([LEAVES, LEAVES, BY_FAR, LOCAL]), worker=st.integers(0, 1),
        late=st.sampled_from([False, False, True]), begun=picks,
    )  # fmt: skip
    def a_policy_changes_under_waiting_jobs(
        self, number: int, kind: str, consent: tuple[str, str], worker: int, late: bool, begun: int
    ) -> None:
        """One job in each lane; the answer to one has perhaps begun, and waits to go on."""
        for model in MODELS:
            self.ask(kind, consent, model, 0, "", False, False)
        for _ in range(2 if begun < len(MODELS) else 0):
            self.work(worker, begun, "begun", False)
        self.change(number)
        if not late:
            self.take_over(worker)
        for pick in range(2 * len(MODELS)):
            self.work(worker, pick // 2, "done", False)  # the first time it may have to be judged

    @rule(kind=st.sampled_from(list(HOLDS)), consent=consents, then=consents, model=st.sampled_from(MODELS),
          key=st.sampled_from(["", "k"]))  # fmt: skip
    def a_client_tries_again(
        self, kind: str, consent: tuple[str, str], then: tuple[str, str], model: str, key: str
    ) -> None:
        """Perhaps with another consent."""
        self.ask(kind, consent, model, 2, key, False, False)
        self.ask(kind, then, model, 2, key, True, False)

    @rule(consent=consents, model=st.sampled_from(MODELS))
    def a_deadline_passes(self, consent: tuple[str, str], model: str) -> None:
        self.ask("plain", consent, model, 1, "", False, False)
        self.time_passes(2_000)
        self.look(0, False)

    @invariant()
    def consent_is_as_it_was_given(self) -> None:
        for job_id, request in list(self.requests.items())[-RECENT:]:
            with suppress(errors.NoSuchJob):
                job = self.wait(self.world.job(job_id))
                if (job.zone, job.exits) != (request.zone, request.exits):
                    raise Leak(f"{job_id} has {job.zone} {job.exits}, its client gave {request.zone} {request.exits}")

    def some_job(self, pick: int, *states: State) -> JobRecord | None:
        found = [self.wait(self.world.job(job_id)) for job_id in list(self.requests)[-RECENT:]]
        fit = [job for job in found if (job.state in states if states else job.live)]
        return fit[-1 - pick % len(fit)] if fit else None


class _claim_unheard:
    """A claim is made, and its reply is lost."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._run = store.run

    async def _lost(self, verb: str, keys: Any, args: Any) -> Any:
        found = await self._run(verb, keys, args)
        if verb == "claim":
            raise errors.BrokerUnavailable("the reply was lost")
        return found

    def __enter__(self) -> None:
        self._store.run = self._lost  # type: ignore[method-assign]

    def __exit__(self, *_why: object) -> None:
        self._store.run = self._run  # type: ignore[method-assign]


def _nothing(*_words: object) -> None: ...


@pytest.fixture(autouse=True)
def no_pauses(scanner: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no verdict that a slow machine puts off: it would only keep a request in."""
    monkeypatch.setattr(dispatcher_module, "RETRY_PAUSE_S", 0)
    monkeypatch.setattr(door, "JUDGE_S_MAX", 600)
    monkeypatch.setattr(secrets, "SCAN_S_MAX", 600)


QUICK = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)  # fmt: skip
HUNT = settings(
    QUICK, max_examples=600, stateful_step_count=12, derandomize=True, database=None, phases=[Phase.generate]
)


def test_no_path_leads_a_local_only_request_out() -> None:
    run_state_machine_as_test(Door, settings=QUICK)


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_no_path_leads_a_local_only_request_out_for_long() -> None:
    run_state_machine_as_test(Door, settings=settings(QUICK, max_examples=1_500, stateful_step_count=60))


Story = Callable[[Door], None]


def story(*steps: tuple[Any, ...], rules: int = 0, warm: bool = True) -> Story:
    """A few steps of the machine, in this order."""

    def tell(machine: Door) -> None:
        machine.begin(rules, warm)
        for name, *arguments in steps:
            getattr(machine, name)(*arguments)

    return tell


def asks(kind: str, consent: tuple[str, str], model: str, key: str = "") -> tuple[Any, ...]:
    return "ask", kind, consent, model, 0, key, False, False


WORKS = [("work", 0, 0, "done", False)] * 3  # a worker may have to hear of the policy first, and then to judge
STORIES: dict[str, Story] = {
    "the claim does not ask for consent": story(asks("plain", LOCAL, "near"), ("change", 6), ("take_over", 0), *WORKS),
    "the claim does not ask by which lane": story(
        asks("plain", BY_FAR, "near"), ("change", 6), ("take_over", 0), *WORKS
    ),
    "the claim does not ask by which rules": story(
        asks("tool", LEAVES, "cloud"), ("change", 0), ("take_over", 0), *WORKS, rules=1
    ),
    "the claim does not ask for a begun answer": story(
        asks("plain", LEAVES, "near"), ("work", 0, 0, "begun", False), ("change", 6), ("take_over", 0), *WORKS
    ),
    "the claim leaves no record": story(asks("plain", LEAVES, "cloud"), *WORKS),
    "a promotion leads out": story(asks("plain", LEAVES, "near"), ("promote", 0, "far")),
    "due tries to promote out": story(
        asks("plain", LOCAL, "near"), ("time_passes", 2_000), ("look", 0, False), warm=False
    ),
    "admission does not ask for consent": story(asks("plain", LOCAL, "far")),
    "admission does not ask the rules": story(asks("tool", LEAVES, "far")),
    "nobody looks for secrets": story(asks("secret", LEAVES, "far")),
    "nobody looks for files in messages": story(asks("file", LEAVES, "far")),
    "a model's own rules are not asked": story(asks("tool", LEAVES, "far"), rules=2),
    "the runtime that is held is not asked": story(asks("plain", LEAVES, "far"), ("change", 5), *WORKS),
    "the body itself is sent": story(asks("plain", LEAVES, "cloud"), *WORKS, rules=4),
    "a retry joins whatever has its key": story(asks("plain", LEAVES, "near", "k"), asks("plain", LOCAL, "near", "k")),
    "an SDK joins whatever has its body": story(
        asks("plain", LEAVES, "near"), ("ask", "plain", LOCAL, "near", 0, "", True, False)
    ),
    "who judges anew lets all pass": story(
        asks("tool", LEAVES, "cloud"), ("change", 0), ("take_over", 0), *WORKS, rules=1
    ),
}
"""For each guard the shortest way that it alone bars, and that the search above walks too."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_guard_that_is_taken_out_is_missed(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each alone, by what the double and the second opinion see; with the guard in place there is nothing to see."""
    for plant in (nullcontext, FAULTS[fault]):
        machine = Door()
        try:
            with plant(), nullcontext() if plant is nullcontext else pytest.raises(Leak) as caught:
                STORIES[fault](machine)
        finally:
            machine.teardown()
    with capsys.disabled():
        print(f"\n{fault}: {caught.value}")


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_the_search_finds_what_is_planted(fault: str) -> None:
    """A search that finds nothing proves nothing until it finds what was planted."""
    plant: Plant = FAULTS[fault]
    with plant(), pytest.raises(Leak):
        run_state_machine_as_test(Door, settings=HUNT)


def test_the_search_sees_requests_leave() -> None:
    """Else it would prove nothing: those that may leave do, and an answer that was begun here goes on here."""
    machine = Door()
    try:
        machine.begin(1)
        for kind in HOLDS:
            machine.ask(kind, ("remote", ""), "cloud", 0, "", False, False)
            machine.work(0, 0, "done", False)
        left = {machine.requests[sent.job].kind for sent in machine.sent}
        assert left == {kind for kind, holds in HOLDS.items() if holds != "never"}
        for step in ("begun", "silent", "done"):
            machine.ask("plain", ("remote", ""), "near", 0, "", False, False) if step == "begun" else None
            machine.work(0, 0, step, False)
            machine.time_passes(11_000) if step == "silent" else None
        assert machine.gone_on == 2
    finally:
        machine.teardown()
