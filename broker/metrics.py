"""Every instrument. Labels come from the policy and the keys, so they are bounded; never a job, never a prompt.

Three sources: what this process counts itself (admissions, first tokens), the status snapshot (gauges), and the day's
counters in Redis, written by the scripts that moved and ended the jobs. Those last ones are the whole gateway's, the
same in every api process, and begin again at 0 with each day of UTC, which Prometheus reads as it reads a restart.

`gateway_first_tokens_judged{model, first_token}` counts each interactive job once, when it ends, under the model that
it asked for (spilled and promoted jobs too). Its first token is in time if it came within the cold-start budget of the
lane that it asked for, or the client's `X-SLO-TTFT-Ms` if that is sooner, counted from its submit (or later start); a
promotion does not move that instant. `first_token` is `asked`: in time, from the model asked for; `other`: in time,
from another one; `late`: after that instant, from any; `none`: it ended without one (failed, expired, or cancelled
after that instant). Not counted: batch work, refused requests, jobs cancelled before that instant without a first
token. So *first token in time from the model asked for* is asked / all, and *from any model* is (asked + other) / all.
"""

import math
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from broker import model_life
from broker.figures import ENDS, Day, counts
from broker.records import ModelFacts
from broker.status import Snapshot
from broker.vitals import Vitals
from broker.webhooks import Figures

OTHER = "other"

WANT_OF_ROOM = ("lane_full", "caller_share", "model_unavailable")
"""Refusals that more room would have spared; the alert asks for these."""
"""The label of whatever the policy or the keys do not (or no longer) know."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""What a scraper gets that asks for it: the same figures with their units, and with exemplars."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, which no panel of ours asks

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 25, 40, 60, 120, 300)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LONG_SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)

_UNITS = ("tokens_per_second", "seconds", "bytes", "ratio", "tokens")

DURABILITIES = ("none", "rdb", "aof-no", "aof-everysec", "aof-always", "unknown")
"""What `Store.durability` says."""

MODEL_STATES = tuple(model_life.STATES)


@dataclass(frozen=True, kw_only=True)
class Here:
    """One api process at the moment of a scrape. `ready`: whether some model can serve, None where nobody knows."""

    requests: int = 0
    bodies_bytes: int = 0
    ready: bool | None = None


@dataclass(frozen=True)
class Family:
    """What a page says of one family of metrics."""

    name: str  # of its samples, so of a counter with `_total`; of a histogram or summary without `_count` and its like
    type: str
    unit: str
    labels: tuple[str, ...]
    help: str


class Metrics:
    """The instruments of one api process."""

    def __init__(self, *, version: str) -> None:
        self._registry = CollectorRegistry()
        r = self._registry
        self._submitted = Counter("gateway_jobs_submitted", "Jobs let into a lane here.", ["lane"], registry=r)
        self._refused = Counter("gateway_jobs_refused", "Requests refused here.", ["lane", "reason"], registry=r)
        self._attached = Counter("gateway_jobs_attached", "Retries led to an earlier job here.", ["lane"], registry=r)
        self._connections_refused = Counter(
            "gateway_connections_refused", "Connections refused or cut here, and why.", ["reason"], registry=r
        )
        self._queue_wait = Histogram(
            "gateway_queue_wait_seconds", "From submit to claim, by the lane entered; under 50 ms counts as 0.",
            ["lane"], buckets=_SECONDS, unit="seconds", registry=r,
        )  # fmt: skip
        self._first_token = Histogram(
            "gateway_time_to_first_token_seconds",
            "From admission to the first content, by the lane entered and the model that served.",
            ["lane", "model"], buckets=_SECONDS, unit="seconds", registry=r,
        )  # fmt: skip
        self._generation = Histogram(
            "gateway_generation_seconds", "From admission to the end of an answer that succeeded, by the same.",
            ["lane", "model"], buckets=_LONG_SECONDS, unit="seconds", registry=r,
        )  # fmt: skip
        self._loop_lag = Histogram(
            "gateway_event_loop_lag_seconds", "How much later than asked for this process's event loop woke a timer.",
            buckets=_LAG_SECONDS, unit="seconds", registry=r,
        )  # fmt: skip
        self._streams: dict[tuple[str, str], tuple[Histogram, Histogram]] = {}
        self._waits: dict[str, Histogram] = {}
        self._lets_in: dict[tuple[str, bool], Counter] = {}
        self._own = (
            self._submitted, self._refused, self._attached, self._connections_refused,
            self._queue_wait, self._first_token, self._generation, self._loop_lag,
        )  # fmt: skip
        self._told = _Told(version)
        r.register(self._told)

    def begin_lanes(self, lanes: Iterable[str]) -> None:
        """Has the counters of these lanes stand at 0: to whoever computes a rate, one that appears with its first
        hundred refusals never rose."""
        for lane in lanes:
            self._submitted.labels(lane)
            for reason in WANT_OF_ROOM:
                self._refused.labels(lane, reason)

    def submitted(self, lane: str, *, attached: bool = False) -> None:
        """Counts a job that was let in, or a retry that came back to one."""
        found = self._lets_in.get((lane, attached))
        if found is None:
            found = self._lets_in[lane, attached] = (self._attached if attached else self._submitted).labels(lane)
        found.inc()

    def refused(self, lane: str, reason: str) -> None:
        """Counts a request that was refused; `reason` is a code of the error tree."""
        self._refused.labels(lane, reason).inc()

    def connection_refused(self, reason: str) -> None:
        """Counts a connection that was refused or cut before its request was anybody's; `reason` is a code of ours."""
        self._connections_refused.labels(reason).inc()

    def first_token(self, lane: str, model: str, seconds: float, *, job: str = "") -> None:
        """Notes how long a client waited for the first content, and with `job` whose wait that was: an exemplar."""
        self._of(lane, model)[0].observe(seconds, {"job_id": job} if job else None)

    def queue_wait(self, lane: str, seconds: float, *, job: str = "") -> None:
        """Notes how long a job waited in lanes until its last claim."""
        wait = self._waits.get(lane)
        if wait is None:
            wait = self._waits[lane] = self._queue_wait.labels(lane)
        wait.observe(seconds, {"job_id": job} if job else None)

    def generation(self, lane: str, model: str, seconds: float, *, job: str = "") -> None:
        """Notes how long a whole answer took."""
        self._of(lane, model)[1].observe(seconds, {"job_id": job} if job else None)

    def loop_lag(self, seconds: float) -> None:
        """Notes how much later than asked for the event loop came back."""
        self._loop_lag.observe(max(0.0, seconds))

    def _of(self, lane: str, model: str) -> tuple[Histogram, Histogram]:
        """Finds the children of two labels without the library's way through its locks: this is the hot path."""
        found = self._streams.get((lane, model))
        if found is None:
            found = self._first_token.labels(lane, model), self._generation.labels(lane, model)
            self._streams[lane, model] = found
        return found

    def render(
        self,
        snapshot: Snapshot | None,
        day: Day,
        *,
        callers: Collection[str],
        redis_up: bool,
        webhooks: Figures | None = None,
        vitals: Vitals | None = None,
        here: Here | None = None,
        exemplars: bool = False,
    ) -> bytes:
        """Gives the page that Prometheus reads; without a snapshot (no policy, no Redis) what this process knows.
        `exemplars`: as OpenMetrics, which has a place for them."""
        self._tell(snapshot, day, webhooks, vitals, here, callers=callers, redis_up=redis_up)
        if not exemplars:
            return generate_latest(self._registry)
        page: str | bytes = openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
        return page if isinstance(page, bytes) else page.encode()

    def families(self) -> list[Family]:
        """Gives every family that a page may hold, in the order of the page."""
        figures = Figures({}, 0)
        self._tell(Snapshot(), (), figures, Vitals(), Here(ready=False), callers=(), redis_up=False)
        labels = {told.name: _labels_of(told) for told in self._told.collect()}
        labels |= {told.name: _labels_of(own) for own in self._own for told in own.describe()}
        return [
            Family(
                f"{told.name}_total" if told.type == "counter" else told.name,
                told.type,
                told.unit or _unit_of(told.name),
                labels[told.name],
                told.documentation,
            )
            for told in self._registry.collect()
        ]

    def _tell(
        self,
        snapshot: Snapshot | None,
        day: Day,
        webhooks: Figures | None,
        vitals: Vitals | None,
        here: Here | None,
        *,
        callers: Collection[str],
        redis_up: bool,
    ) -> None:
        told = self._told
        told.snapshot, told.day, told.webhooks, told.vitals, told.here = snapshot, day, webhooks, vitals, here
        told.callers, told.redis_up = frozenset(callers), redis_up


class _Told(Collector):
    """Makes metrics of what Redis told for this scrape."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.snapshot: Snapshot | None = None
        self.day: Day = ()
        self.webhooks: Figures | None = None
        self.callers: frozenset[str] = frozenset()
        self.redis_up = False
        self.vitals: Vitals | None = None
        self.here: Here | None = None

    def collect(self) -> Iterator[Metric]:
        yield _gauge("gateway_build_info", "The version that runs.", ["version"], [((self._version,), 1)])
        yield _gauge("gateway_redis_up", "Whether Redis answered this scrape.", [], [((), int(self.redis_up))])
        yield from _process()
        if self.here is not None:
            yield from _of_here(self.here)
        if self.webhooks is not None:
            yield from _webhooks(self.webhooks)
        if self.vitals is not None:
            yield from _machinery(self.vitals)
        if self.snapshot is not None:
            yield from _gauges(self.snapshot)
            yield from _hosts(self.snapshot)
            yield from self._counters(self.snapshot)
        if self.snapshot is not None and self.vitals is not None:
            yield from _wakes([model.name for model in self.snapshot.models], self.vitals.facts)

    def _counters(self, snapshot: Snapshot) -> Iterator[Metric]:
        known = {
            "lane": {lane.name for lane in snapshot.lanes},
            "model": {model.name for model in snapshot.models},
            "caller": self.callers,
        }
        events = [*_begun(snapshot), *_events(self.day)]
        for name, help_text, words, labels in _COUNTED:
            family = CounterMetricFamily(name, help_text, labels=[label for label, _ in labels], unit=_unit_of(name))
            sums: dict[tuple[str, ...], float] = {}
            for event, values, value in events:
                if event != words:
                    continue
                key = tuple(
                    v if kind == "" or v in known[kind] else OTHER for v, (_, kind) in zip(values, labels, strict=True)
                )
                sums[key] = sums.get(key, 0) + value
            for key, value in sorted(sums.items()):
                family.add_metric(list(key), value)
            yield family


def _webhooks(figures: Figures) -> Iterator[Metric]:
    yield _gauge("gateway_outbox_length", "Events that no scheduler has taken up yet.", [], [((), figures.outbox)])
    attempts = CounterMetricFamily(
        "gateway_webhook_attempts",
        "Attempts to deliver a webhook: delivered, failed and tried again later, dead = given up on.",
        labels=["outcome"],
    )
    for outcome, count in figures.outcomes.items():
        attempts.add_metric([outcome], count)
    yield attempts


_FIRST_TOKEN = ("asked", "other", "late", "none")


def _begun(snapshot: Snapshot) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Lets what alerts watch begin the day at 0: how much a counter rose is not seen of one that was not there."""
    for model in snapshot.models:
        for words in _FIRST_TOKEN:
            yield "first_token", (model.name, words), 0


def _events(day: Day) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Reads the day's counters as the events of `_COUNTED`: event, values of its labels, amount."""
    for one in counts(day):
        by, amount = one.by, one.amount
        if one.figure in ENDS:
            yield "ended", (by.lane, one.figure), amount
        if one.judged == "in_time":
            yield "first_token", (by.asked_model, "asked" if by.model == by.asked_model else "other"), amount
        elif one.judged:
            yield "first_token", (by.asked_model, "late" if one.judged == "late" else "none"), amount
        match one.figure:
            case "promoted" | "recovered":
                yield one.figure, (by.lane, one.detail), amount
            case "refused":
                yield "refused", (by.lane, one.detail), amount
            case "released" | "put_back":
                yield one.figure, (by.lane,), amount
            case "tokens_in":
                yield "tokens_in", (by.caller, by.model, "false"), amount
            case "tokens_cached":
                yield "tokens_in", (by.caller, by.model, "true"), amount
                yield "tokens_in", (by.caller, by.model, "false"), -amount
            case "tokens_out":
                yield "tokens_out", (by.caller, by.model), amount
            case "running_ms":
                yield "running", (by.caller, by.model), amount / 1000


_COUNTED: tuple[tuple[str, str, str, list[tuple[str, str]]], ...] = (
    ("gateway_jobs_ended", "Jobs ended today, by lane and final state.", "ended", [("lane", "lane"), ("state", "")]),
    ("gateway_requests_refused", "Requests refused today, by any api, also those that named no lane or no caller.",
     "refused", [("lane", "lane"), ("reason", "")]),
    ("gateway_promotions", "Jobs moved to a fallback lane today.", "promoted",
     [("from_lane", "lane"), ("to_lane", "lane")]),
    ("gateway_leases_recovered", "Jobs whose worker was lost today.", "recovered", [("lane", "lane"), ("outcome", "")]),
    ("gateway_jobs_released", "Jobs given back by their worker today.", "released", [("lane", "lane")]),
    ("gateway_jobs_put_back", "Running batch jobs put back for interactive work today.", "put_back",
     [("lane", "lane")]),
    ("gateway_first_tokens_judged", "Interactive jobs ended today: was the first token in time, and from which model.",
     "first_token", [("model", "model"), ("first_token", "")]),
    ("gateway_prompt_tokens", "Prompt tokens today, by whether they were in the runtime's cache.", "tokens_in",
     [("caller", "caller"), ("model", "model"), ("cached", "")]),
    ("gateway_slot_seconds", "Time for which jobs held slots today; told when they let go of them.", "running",
     [("caller", "caller"), ("model", "model")]),
    ("gateway_completion_tokens", "Tokens generated today.", "tokens_out", [("caller", "caller"), ("model", "model")]),
)  # fmt: skip


def _gauges(s: Snapshot) -> Iterator[Metric]:
    lanes, models, hosts = s.lanes, s.models, s.hosts
    lane, model, host = ["lane"], ["model"], ["host"]
    yield _gauge("gateway_snapshot_number", "The snapshot that the gauges tell of, as status and the page name it.",
                 [], [((), s.number)])  # fmt: skip
    yield _gauge("gateway_policy_version", "The active policy.", [], [((), s.policy_version)])
    yield _gauge("gateway_lane_depth", "Jobs waiting.", lane, [((x.name,), x.waiting) for x in lanes])
    yield _gauge("gateway_lane_budget", "Jobs that may queue.", lane, [((x.name,), x.max_queue) for x in lanes])
    yield _gauge("gateway_lane_running", "Jobs held by a worker.", lane, [((x.name,), x.running) for x in lanes])
    yield _gauge(
        "gateway_lane_oldest_waiting_seconds", "Age of the job that has waited longest.", lane,
        [((x.name,), x.oldest_waiting_ms / 1000) for x in lanes],
    )  # fmt: skip
    yield _gauge(
        "gateway_lane_deadline_used_ratio",
        "How much of its time the job that has waited longest has used: 1 = its deadline is now. 0 = none waits.", lane,
        [((x.name,), x.deadline_used) for x in lanes],
    )  # fmt: skip
    yield _gauge(
        "gateway_model_state", "1 for the state that the model is in.", ["model", "state"],
        [((m.name, state), int(m.state == state)) for m in models for state in MODEL_STATES],
    )  # fmt: skip
    yield _gauge(
        "gateway_model_slots", "Slots by what they do.", ["model", "use"],
        [
            ((m.name, use), value)
            for m in models
            for use, value in (("total", m.slots_total), ("used", m.slots_used), ("settling", m.slots_settling))
        ],
    )  # fmt: skip
    yield _gauge("gateway_model_memory_bytes", "Memory of the loaded model.", model,
                 [((m.name,), m.memory_bytes) for m in models])  # fmt: skip
    yield _gauge("gateway_model_footprint_bytes", "What the model needs, learned or told; 0 = unknown.", model,
                 [((m.name,), m.footprint_bytes) for m in models])  # fmt: skip
    yield _gauge("gateway_model_first_token_seconds", "The last one measured, 0 = none yet.", model,
                 [((m.name,), m.first_token_ms / 1000) for m in models])  # fmt: skip
    yield _gauge("gateway_model_prefill_tokens_per_second", "Learned rate of uncached prompt tokens, 0 = not known.",
                 model, [((m.name,), m.prefill_tps) for m in models])  # fmt: skip
    yield _gauge("gateway_model_decode_tokens_per_second", "Learned rate of answer tokens, 0 = not known.", model,
                 [((m.name,), m.decode_tps) for m in models])  # fmt: skip
    yield _gauge("gateway_model_downgrades", "Of the last 200 jobs that asked for it, under a cap: served by another.",
                 model, [((m.name,), m.downgraded) for m in models])  # fmt: skip
    yield _gauge("gateway_sessions_on_fallback", "Sessions that asked for it and stay on its fallback.", model,
                 [((m.name,), m.sessions_on_fallback) for m in models])  # fmt: skip
    yield _gauge("gateway_model_wanted", "Whether somebody has asked for it lately.", model,
                 [((m.name,), int(m.wanted)) for m in models])  # fmt: skip
    yield _gauge("gateway_model_failed_loads", "Loads that failed since the last one that succeeded.", model,
                 [((m.name,), m.failures) for m in models])  # fmt: skip
    yield _gauge("gateway_model_quarantine_seconds", "For how long it is still set aside, 0 = it is not.", model,
                 [((m.name,), m.quarantine_ms / 1000) for m in models])  # fmt: skip
    yield _gauge("gateway_model_state_age_seconds", "For how long it has been in its state.", model,
                 [((m.name,), m.state_ms / 1000) for m in models])  # fmt: skip
    yield _gauge("gateway_host_draining", "Hosts that take no more work.", host,
                 [((h.name,), int(h.draining)) for h in hosts])  # fmt: skip
    yield _gauge("gateway_host_memory_bytes", "Memory of a host.", ["host", "kind"], [
        ((h.name, kind), value)
        for h in hosts
        for kind, value in (("total", h.memory_total), ("used", h.memory_used), ("headroom", h.memory_headroom))
    ])  # fmt: skip


def _machinery(v: Vitals) -> Iterator[Metric]:
    """What is late, what has piled up, and what Redis is like."""
    yield _gauge("gateway_due_late_seconds", "For how long the oldest instant of a job has passed that nobody settled.",
                 [], [((), v.due_late_ms / 1000)])  # fmt: skip
    yield _gauge("gateway_due_overdue_jobs", "Jobs whose instant has passed.", [], [((), v.due_overdue)])
    yield _gauge("gateway_jobs_live", "Jobs that have not ended, scheduled ones too.", [], [((), v.jobs_live)])
    yield _gauge("gateway_dead_letters", "Jobs that were given up on, the newest 10,000.", [], [((), v.dead_letters)])
    yield _gauge("gateway_batches_open", "Batches that have not ended.", [], [((), v.batches_open)])
    yield _gauge("gateway_batch_oldest_seconds", "Age of the oldest batch that has not ended.", [],
                 [((), v.batch_oldest_ms / 1000)])  # fmt: skip
    yield _gauge("gateway_outbox_oldest_seconds", "Age of the oldest event that no scheduler has taken up.", [],
                 [((), v.outbox_oldest_ms / 1000)])  # fmt: skip
    yield _gauge("gateway_webhooks_late_seconds", "For how long the next round of webhooks is overdue.", [],
                 [((), v.webhooks_late_ms / 1000)])  # fmt: skip
    yield _gauge("gateway_redis_durability", "1 for what a crash of Redis leaves.", ["kind"],
                 [((kind,), int(v.durability == kind)) for kind in DURABILITIES])  # fmt: skip
    yield _gauge("gateway_redis_unfit_settings", "Settings of Redis that break a promise; `/healthz` names them.", [],
                 [((), len(v.unfit))])  # fmt: skip
    memory = [(("used",), v.redis_used_bytes), (("max",), v.redis_max_bytes)]
    yield _gauge("gateway_redis_memory_bytes", "Memory of Redis; a max of 0 = it may take what there is.", ["kind"],
                 [(kind, value) for kind, value in memory if value is not None])  # fmt: skip
    yield _gauge("gateway_redis_writes_ok", "Whether Redis' last writes to its files went well.", [],
                 [] if v.redis_writes_ok is None else [((), int(v.redis_writes_ok))])  # fmt: skip


def _wakes(models: list[str], facts: Mapping[str, ModelFacts]) -> Iterator[Metric]:
    wakes = CounterMetricFamily(
        "gateway_model_wakes", "Wakes that ended: done = warm, failed, unreachable = nobody was there to load it.",
        labels=["model", "outcome"],
    )  # fmt: skip
    loads = SummaryMetricFamily(
        "gateway_model_load_seconds", "What loads took, of wakes that found the model in no memory.",
        labels=["model"], unit="seconds",
    )  # fmt: skip
    evictions = CounterMetricFamily(
        "gateway_model_evictions", "Times that it was unloaded to make room for another.", labels=["model"]
    )
    for model in models:
        known = facts.get(model, ModelFacts())
        outcomes = {"done": known.wakes, "failed": known.wakes_failed, "unreachable": known.wakes_unreachable}
        for outcome, count in outcomes.items():
            wakes.add_metric([model, outcome], count)
        loads.add_metric([model], known.loads, known.loads_ms / 1000)
        evictions.add_metric([model], known.evictions)
    yield from (wakes, loads, evictions)


def _hosts(s: Snapshot) -> Iterator[Metric]:
    host, hosts = ["host"], s.hosts
    yield _gauge("gateway_host_up", "1 for hosts that live, for a day 0 for those that fell silent on their own.", host,
                 [*(((h.name,), 1) for h in hosts), *(((h.name,), 0) for h in s.silent)])  # fmt: skip
    yield _gauge("gateway_host_beat_age_seconds", "Age of its last heartbeat.", host,
                 [*(((h.name,), h.beat_age_ms / 1000) for h in hosts),
                  *(((h.name,), h.beat_age_ms / 1000) for h in s.silent)])  # fmt: skip
    yield _gauge("gateway_host_clock_skew_seconds", "Redis' clock minus the host's.", host,
                 [((h.name,), h.skew_ms / 1000) for h in hosts])  # fmt: skip
    yield _gauge("gateway_host_policy_version", "The policy that the host serves by.", host,
                 [((h.name,), h.policy_version) for h in hosts])  # fmt: skip


def _of_here(here: Here) -> Iterator[Metric]:
    """What this api process has in its hands."""
    if here.ready is not None:
        yield _gauge("gateway_ready", "Whether some model can serve, as `/readyz` says.", [], [((), int(here.ready))])
    yield _gauge("gateway_requests_open", "Requests that this process is answering.", [], [((), here.requests)])
    yield _gauge("gateway_request_bodies_bytes", "Large bodies that this process holds until their answers end.", [],
                 [((), here.bodies_bytes)])  # fmt: skip


def _process() -> Iterator[Metric]:
    """What this api process costs its machine."""
    process = psutil.Process()
    with process.oneshot():
        times, memory = process.cpu_times(), process.memory_info()
        cpu = CounterMetricFamily("gateway_process_cpu_seconds", "Processor time of this process.", unit="seconds")
        cpu.add_metric([], times.user + times.system)
        yield cpu
        yield _gauge("gateway_process_resident_memory_bytes", "Memory of this process.", [], [((), memory.rss)])
        yield _gauge("gateway_process_start_time_seconds", "When this process began, since 1970.", [],
                     [((), process.create_time())])  # fmt: skip
        most: float = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = math.inf if most == resource.RLIM_INFINITY else most
        yield _gauge("gateway_process_files", "Files and sockets of this process.", ["kind"],
                     [(("open",), process.num_fds()), (("max",), most)])  # fmt: skip


def _unit_of(name: str) -> str:
    return next((unit for unit in _UNITS if name.endswith(f"_{unit}")), "")


def _labels_of(family: Metric | Counter | Histogram) -> tuple[str, ...]:
    return tuple(getattr(family, "_labelnames", ()))  # the library tells it nowhere else before there is a sample


def _gauge(
    name: str, help_text: str, labels: list[str], samples: list[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=labels, unit=_unit_of(name))
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
