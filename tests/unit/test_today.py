"""What the day's counters say of each model."""

from prometheus_client.parser import text_string_to_metric_families

from broker.figures import By
from broker.metrics import Metrics
from broker.status import LaneStatus, ModelStatus, Snapshot
from broker.today import Today, by_model


def test_counters_are_summed_up_by_model() -> None:
    """Tokens over callers, under the model that served; first tokens under the model that was asked for."""
    day = [
        (By("ann", "big", "big", "big"), {b"tokens_in": b"1000", b"tokens_cached": b"900", b"done/in_time/460": b"6"}),
        (By("ci", "big", "big", "big"), {b"tokens_in": b"50", b"done": b"12", b"cancelled/late/900": b"2"}),
        (By("ci", "small", "big", "small"), {b"tokens_in": b"7", b"tokens_cached": b"7", b"done/in_time/18": b"3"}),
        (By("ann", "big", "big", "big"), {b"failed/runtime_failed/no_token": b"1", b"tokens_out": b"3"}),
        (By("-", "-", "-", "-"), {b"refused/invalid_api_key": b"5", b"of_another_version": b"4"}),
    ]
    assert by_model(day) == {
        "big": Today(prompt_tokens=1_050, cached_tokens=900, judged=12, in_time_asked=6, in_time_any=9),
        "small": Today(prompt_tokens=7, cached_tokens=7),
    }
    assert by_model([]) == {}


def test_metrics_of_the_day_have_names_of_the_policy_and_the_keys_only() -> None:
    """Whoever left, and what no policy knows any more, is `other`; a move counts under the lane that was left."""
    lanes = tuple(LaneStatus(name=name, model=name) for name in ("big", "small", "late"))
    shown = Snapshot(models=tuple(ModelStatus(name=lane.name) for lane in lanes), lanes=lanes)
    ran = {b"done/in_time/448": b"2", b"running_ms": b"1500", b"tokens_in": b"90", b"tokens_cached": b"60"}
    day = [
        (By("ann", "big", "big", "big"), ran | {b"promoted/late": b"4", b"released": b"3", b"recovered/failed": b"1"}),
        (By("left", "gone", "gone", "big"), ran | {b"failed/worker_lost/no_token": b"5", b"refused/lane_full": b"7"}),
        (By("gone", "gone", "gone", "gone"), ran),
    ]
    page = Metrics(version="1").render(shown, day, callers=["ann"], redis_up=True).decode()
    found = {
        (sample.name.removeprefix("gateway_").removesuffix("_total"), *dict(sorted(sample.labels.items())).values()): (
            sample.value
        )
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert (found["slot_seconds", "ann", "big"], found["slot_seconds", "other", "big"]) == (1.5, 1.5)
    assert found["slot_seconds", "other", "other"] == 1.5
    assert (found["jobs_ended", "big", "done"], found["jobs_ended", "other", "failed"]) == (2, 5)
    assert (found["first_tokens_judged", "asked", "big"], found["first_tokens_judged", "other", "other"]) == (2, 2)
    assert found["first_tokens_judged", "none", "other"] == 5
    assert found["prompt_tokens", "true", "ann", "big"] == 60 and found["prompt_tokens", "false", "ann", "big"] == 30
    assert (found["promotions", "big", "late"], found["jobs_released", "big"]) == (4, 3)
    assert found["leases_recovered", "big", "failed"] == 1
    assert not {name for key in found for name in key} & {"left", "gone"}
    assert found["requests_refused", "other", "lane_full"] == 7
