"""The page that Prometheus reads, in both of its formats: clean, the same, and explained."""

import re
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

from api.scrape import wants_openmetrics
from broker import metric_notes
from broker.figures import NOBODY, By
from broker.metrics import DURABILITIES, OTHER, Here, Metrics
from broker.records import ModelFacts
from broker.status import HostStatus, LaneStatus, ModelStatus, SilentHost, Snapshot
from broker.vitals import Vitals
from broker.webhooks import Figures
from tests.support.metrics_lint import problems

JOB = "01JDWZ5C0MXZ5Y0H1N6Q8R7T3V"
SNAPSHOT = Snapshot(
    policy_version=3,
    models=(
        ModelStatus(name="big", state="quarantined", failures=2, quarantine_ms=9_500, state_ms=1_000, wanted=True),
        ModelStatus(name="small", state="warm", slots_total=2, slots_used=1, memory_bytes=3 << 30),
    ),
    lanes=(
        LaneStatus(name="big", model="big", waiting=3, max_queue=6, oldest_waiting_ms=12_000, deadline_used=0.5),
        LaneStatus(name="small", model="small", max_queue=12),
    ),
    hosts=(
        HostStatus(name="gpu1", beat_age_ms=700, memory_total=10, memory_headroom=4, skew_ms=-20, policy_version=3),
    ),
    silent=(SilentHost(name="gpu2", beat_age_ms=12_000),),
)
VITALS = Vitals(
    due_late_ms=2_500, due_overdue=2, jobs_live=7, dead_letters=1, batches_open=1, batch_oldest_ms=60_000,
    durability="rdb", unfit=("a sentence",), redis_used_bytes=1 << 20, redis_max_bytes=0, redis_writes_ok=True,
    facts={"big": ModelFacts(wakes=4, wakes_failed=2, loads=3, loads_ms=90_500, evictions=1)},
)  # fmt: skip
DAY = (
    (By("ann", "big", "big", "big"), {b"done/in_time/448": b"3", b"tokens_in": b"90", b"tokens_cached": b"60"}),
    (By("ann", "big", "big", "small"), {b"done/late/9000": b"1", b"promoted/small": b"1", b"put_back": b"2"}),
    (By("bob", "old", "old", "old"), {b"failed/worker_lost/no_token": b"1", b"recovered/failed": b"1"}),
    (By("bob", "old", "big", "old"), {b"running_ms": b"7", b"tokens_out": b"5"}),
    (By(NOBODY, NOBODY, NOBODY, NOBODY), {b"refused/invalid_api_key": b"9"}),
)  # fmt: skip


def busy() -> Metrics:
    """An api that has seen something of each kind."""
    metrics = Metrics(version="1.2.3")
    metrics.submitted("big")
    metrics.submitted("big", attached=True)
    metrics.refused("big", "lane_full")
    metrics.connection_refused("bad_http")
    metrics.queue_wait("big", 0.2, job=JOB)
    metrics.first_token("big", "big", 1.5, job=JOB)
    metrics.generation("big", "big", 9.0, job=JOB)
    metrics.loop_lag(0.003)
    return metrics


def page(metrics: Metrics, *, exemplars: bool = False, **more: Any) -> str:
    told: dict[str, Any] = {
        "snapshot": SNAPSHOT, "day": DAY, "callers": ["ann"], "redis_up": True, "vitals": VITALS,
        "webhooks": Figures({"delivered": 3, "failed": 1, "dead": 0}, 2), "here": Here(requests=1, ready=True),
    }  # fmt: skip
    return metrics.render(**{**told, **more}, exemplars=exemplars).decode()


@pytest.mark.parametrize("exemplars", [False, True])
def test_the_page_is_clean(exemplars: bool) -> None:
    assert problems(page(busy(), exemplars=exemplars)) == []


@pytest.mark.parametrize("exemplars", [False, True])
def test_a_page_without_redis_is_clean(exemplars: bool) -> None:
    """What is not known is left out, and nothing is made up."""
    told = page(
        Metrics(version="1"), exemplars=exemplars, snapshot=None, day=(), redis_up=False, vitals=None, webhooks=None,
        here=Here(requests=0),
    )  # fmt: skip
    assert problems(told) == []
    assert "gateway_redis_up 0" in told and "gateway_ready" not in told and "gateway_lane" not in told


PLANTED = [
    ("# TYPE gateway_lane_depth gauge", "# TYPE gateway_lane_depth counter"),
    ("# HELP gateway_lane_depth Jobs waiting.\n", ""),
    ("Jobs waiting.", "jobs waiting"),
    ('gateway_lane_depth{lane="small"}', 'gateway_lane_depth{lane="big"}'),
    ('gateway_lane_depth{lane="small"}', 'gateway_lane_depth{lane=""}'),
    ('gateway_lane_depth{lane="small"}', 'gateway_lane_depth{model="small"}'),
    ('gateway_lane_depth{lane="small"}', 'gateway_lane_depth{job="small"}'),
    ('gateway_lane_depth{lane="small"} 0.0', 'gateway_lane_depth{lane="small"} NaN'),
    ("gateway_lane_depth", "gateway_laneDepth"),
    ("gateway_lane_depth", "gateway:lane_depth"),
    ("gateway_lane_depth", "lane_depth"),
    ("gateway_lane_depth", "gateway_lane_depth_gauge"),
    ("gateway_lane_depth", "gateway_lane_depth_total"),
    ("gateway_lane_oldest_waiting_seconds", "gateway_lane_oldest_waiting_ms"),
    ('_wait_seconds_bucket{lane="big",le="0.25"} 1.0', '_wait_seconds_bucket{lane="big",le="0.25"} 2.0'),
    ('le="+Inf"', 'le="400"'),
    ("gateway_queue_wait_seconds_count", "gateway_queue_wait_seconds_number"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), PLANTED)
def test_the_lint_finds_what_is_planted(right: str, wrong: str) -> None:
    clean = page(busy())
    assert right in clean and problems(clean.replace(right, wrong))


def test_both_formats_tell_the_same() -> None:
    """But for units and exemplars, which only one of them has."""
    metrics = busy()
    plain, exact = page(metrics), page(metrics, exemplars=True)
    changing = {"gateway_process_cpu_seconds_total", "gateway_process_resident_memory_bytes"}
    told = [
        {
            (s.name, frozenset(s.labels.items())): s.value
            for f in read(text)
            for s in f.samples
            if s.name not in changing
        }
        for read, text in ((read_plain, plain), (read_openmetrics, exact))
    ]
    assert len(told[0]) > 100 and told[0] == told[1]
    assert "job_id" not in plain and "# UNIT" not in plain


def test_exemplars_name_a_job_of_their_bucket() -> None:
    """Of the three histograms of a job's way; none where the job is not told."""
    named = {
        s.name: (s.exemplar.labels, s.exemplar.value)
        for family in read_openmetrics(page(busy(), exemplars=True))
        for s in family.samples
        if s.exemplar is not None
    }
    assert named == {
        "gateway_queue_wait_seconds_bucket": ({"job_id": JOB}, 0.2),
        "gateway_time_to_first_token_seconds_bucket": ({"job_id": JOB}, 1.5),
        "gateway_generation_seconds_bucket": ({"job_id": JOB}, 9.0),
    }
    unnamed = Metrics(version="1")
    unnamed.first_token("big", "big", 1.5)
    assert "job_id" not in page(unnamed, exemplars=True)


def test_figures_are_told_in_base_units_and_by_what_they_are() -> None:
    told = {(s.name, tuple(s.labels.values())): s.value for family in read_plain(page(busy())) for s in family.samples}
    assert told["gateway_due_late_seconds", ()] == 2.5
    assert told["gateway_lane_deadline_used_ratio", ("big",)] == 0.5
    assert told["gateway_model_quarantine_seconds", ("big",)] == 9.5
    assert told["gateway_model_load_seconds_sum", ("big",)] == 90.5
    assert told["gateway_model_load_seconds_count", ("big",)] == 3
    assert told["gateway_model_wakes_total", ("big", "failed")] == 2
    assert told["gateway_model_wakes_total", ("small", "failed")] == 0, "else Prometheus would not see the first one"
    assert (told["gateway_host_up", ("gpu1",)], told["gateway_host_up", ("gpu2",)]) == (1, 0)
    ages = [told["gateway_host_beat_age_seconds", (host,)] for host in ("gpu1", "gpu2")]
    assert ages == [0.7, 12], "that of a host which fell silent counts on"
    assert told["gateway_host_clock_skew_seconds", ("gpu1",)] == -0.02
    assert told["gateway_redis_durability", ("rdb",)] == 1
    assert sum(told["gateway_redis_durability", (kind,)] for kind in DURABILITIES) == 1
    assert told["gateway_redis_memory_bytes", ("max",)] == 0
    assert told["gateway_requests_refused_total", (OTHER, "invalid_api_key")] == 9
    assert told["gateway_leases_recovered_total", (OTHER, "failed")] == 1
    assert told["gateway_slot_seconds_total", (OTHER, OTHER)] == 0.007
    assert told["gateway_process_cpu_seconds_total", ()] > 0 and told["gateway_process_files", ("open",)] > 0


def test_what_redis_does_not_tell_is_left_out() -> None:
    told = page(busy(), vitals=replace(VITALS, redis_used_bytes=None, redis_max_bytes=None, redis_writes_ok=None))
    assert "\ngateway_redis_memory_bytes" not in told and "\ngateway_redis_writes_ok" not in told


# --- the page about the page ----------------------------------------------------------------------------------------


def test_each_family_has_a_note_and_each_note_a_family() -> None:
    families = [family.name for family in Metrics(version="1").families()]
    noted = [name for notes in metric_notes.LOOK.values() for name in notes]
    assert sorted(noted) == sorted(families)


def test_a_page_holds_no_family_and_no_label_that_is_not_declared() -> None:
    families = {family.name: family for family in Metrics(version="1").families()}
    for told in read_plain(page(busy())):
        name = f"{told.name}_total" if told.type == "counter" else told.name
        family = families.pop(name)
        assert (told.type, told.documentation) == (family.type, family.help)
        for sample in told.samples:
            assert set(sample.labels) - {"le"} == set(family.labels), name
    assert families == {}


def test_each_label_says_where_its_values_come_from() -> None:
    used = {label for family in Metrics(version="1").families() for label in family.labels}
    assert metric_notes.LABELS.keys() == used | {"le"}


def test_the_notes_name_no_metric_that_is_not_there() -> None:
    known = {family.name for family in Metrics(version="1").families()}
    words = " ".join(look for notes in metric_notes.LOOK.values() for look in notes.values())
    assert set(re.findall(r"gateway_\w+", words)) <= known


# --- which format ---------------------------------------------------------------------------------------------------

PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # noqa: E501
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"  # noqa: E501


@pytest.mark.parametrize(
    ("accepts", "wanted"),
    [
        ([PROMETHEUS_2], True),
        ([PROMETHEUS_3], True),
        (["application/openmetrics-text"], True),
        (['application/openmetrics-text; version="1.0.0"'], True),
        (["text/plain", "application/openmetrics-text; version=1.0.0"], True),
        ([], False),
        ([""], False),
        (["*/*"], False),
        (["text/plain;version=0.0.4;q=0.5,*/*;q=0.1"], False),
        (["text/html,application/xhtml+xml"], False),
        (["application/openmetrics-text;version=0.0.1"], False),
        (["application/openmetrics-text;version=2.0.0"], False),
        (["application/openmetrics-text;q=0"], False),
        (["application/openmetrics-text;q=nan"], False),
        (["application/openmetrics-text;q=much, text/plain"], False),
        (["application/openmetrics-text;q=0.3, text/plain;q=0.8"], False),
        (["application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;q=0.9"], False),
    ],
)
def test_openmetrics_is_served_to_who_asks_for_it(accepts: list[str], wanted: bool) -> None:
    assert wants_openmetrics(accepts) is wanted
