"""What people should know of each metric beside its own words: where labels come from, where to look when it is high.

`docs/metrics.md` is printed from this and from what `metrics` declares; a family without a note fails a test.
"""

from collections.abc import Sequence

from broker.metrics import DURABILITIES, MODEL_STATES, Family

LABELS: dict[str, str] = {
    "lane": "a lane of the policy; `other` for a name that it does not (or no longer) know",
    "from_lane": "as `lane`",
    "to_lane": "as `lane`",
    "model": "a model of the policy, or `other`",
    "host": "the name of a worker's machine (`GATEWAY_HOST_NAME`) that told of itself within a day",
    "caller": "the name of a key, or `anonymous` where there are no keys. An administrator's key sees all of them, any "
    "other its own and `other`",
    "reason": "a code of the error tree, as clients get it: "
    "[README](../README.md#what-happens-to-a-request) has them all",
    "state": "of a model: " + ", ".join(f"`{state}`" for state in MODEL_STATES) + "; of a job that ended: `done`, "
    "`failed`, `cancelled`, `expired`",
    "use": "`total` (of a host that drains, what still runs), `used`, `settling` (cancelled, and the runtime still "
    "works on it)",
    "kind": "of durability: " + ", ".join(f"`{kind}`" for kind in DURABILITIES) + "; of memory: `total`, `used`, "
    "`headroom`, of Redis' `used`, `max`; of files: `open`, `max`",
    "outcome": "of a wake: `done`, `failed`, `unreachable`; of a webhook: `delivered`, `failed`, `dead`; of a lost "
    "worker's job: `queued`, `continued`, `failed`",
    "first_token": "`asked`: in time, from the model asked for; `other`: in time, from another; `late`; `none`",
    "cached": "`true`, `false`",
    "version": "of warmlane, as `/healthz` tells it",
    "le": "the upper bound of a histogram's bucket",
}
"""Where the values of a label come from: never from what a client writes."""

LOOK: dict[str, dict[str, str]] = {
    "What clients feel": {
        "gateway_jobs_submitted_total": "load: compare with `gateway_lane_budget`",
        "gateway_jobs_attached_total": "clients time out and try again: their read timeout against first-token times",
        "gateway_jobs_refused_total": "`lane_full`, `caller_share`: slots and budgets; else `gateway status`",
        "gateway_requests_refused_total": "`invalid_api_key`: somebody tries keys, or a client has an old one",
        "gateway_connections_refused_total": "too many or too slow clients: the limits in README",
        "gateway_queue_wait_seconds": "slots (`maxConcurrent`), or the model is often cold",
        "gateway_time_to_first_token_seconds": "queue wait first, then long prompts that no cache holds",
        "gateway_generation_seconds": "long answers, or more generations at once than the runtime can do",
        "gateway_first_tokens_judged_total": "`late`, `none`: budgets too small, or the model is not kept warm",
        "gateway_jobs_ended_total": "`failed`: `gateway dead list`; `expired`: nobody could serve in time",
        "gateway_promotions_total": "the lane's model is cold or too slow for its budget",
        "gateway_requests_open": "clients that wait: `gateway_lane_depth` says where",
        "gateway_ready": "0: `/readyz` says why, model by model",
    },
    "Lanes": {
        "gateway_lane_depth": "its budget, and the slots of its model",
        "gateway_lane_budget": "`maxQueue`; where slots are free, as many more come in, and wait if others take them",
        "gateway_lane_running": "the slots of its model",
        "gateway_lane_oldest_waiting_seconds": "is the model warm, is it at work on something long",
        "gateway_lane_deadline_used_ratio": "near 1: it will be promoted or given up; over 1: its fallback has no room",
        "gateway_jobs_live": "more than depth and running together: the rest is scheduled",
        "gateway_jobs_released_total": "workers that drain or lose their runtime",
        "gateway_jobs_put_back_total": "batch work makes way for people often: more slots, or batch at night",
        "gateway_leases_recovered_total": "workers die: their logs, the machine's memory",
    },
    "Models": {
        "gateway_model_state": "`degraded`, `quarantined`: `gateway status` has the reason",
        "gateway_model_state_age_seconds": "`waking` for long: what it waits for stands in `gateway status`",
        "gateway_model_wanted": "1 while it is not warm: somebody waits for it",
        "gateway_model_slots": "`used` = `total`: a queue grows; `settling`: the runtime is slow to notice hang-ups",
        "gateway_model_memory_bytes": "its weights and caches as measured",
        "gateway_model_footprint_bytes": "what must be free before it is loaded",
        "gateway_model_first_token_seconds": "`firstTokenBudgetMs`: two that are slower make it degraded",
        "gateway_model_prefill_tokens_per_second": "low: something else uses the GPU",
        "gateway_model_decode_tokens_per_second": "low: something else uses the GPU, or too many at once",
        "gateway_model_downgrades": "at `maxDowngradeShare` jobs wait instead",
        "gateway_sessions_on_fallback": "`stickyPromotionMs`, and why they were promoted",
        "gateway_model_wakes_total": "`failed`: the worker's log; `done` often: memory is too small for all of them",
        "gateway_model_load_seconds": "slow disk, or the file is not in the page cache; sum by count is the mean",
        "gateway_model_failed_loads": "above 0: `gateway status` has the reason",
        "gateway_model_quarantine_seconds": "mend the reason, then `gateway model reset`",
        "gateway_model_evictions_total": "models take turns in memory: `keepWarm`, `weight`, `minStayMs`",
        "gateway_prompt_tokens_total": "`cached=\"false\"`: sessions lose their slot; `X-Session-Affinity`",
        "gateway_completion_tokens_total": "who uses the box",
        "gateway_slot_seconds_total": "who uses the box, in time",
    },
    "Hosts": {
        "gateway_host_up": "0: the machine or its worker is gone without a word; it is forgotten after a day",
        "gateway_host_beat_age_seconds": "above 6: its lease has run out; for a silent host it counts on",
        "gateway_host_clock_skew_seconds": "the machine's clock: NTP",
        "gateway_host_policy_version": "other than `gateway_policy_version` for long: the host does not hear "
        "Redis, or is too old to read that policy (`gateway doctor`)",
        "gateway_host_draining": "1: `gateway undrain HOST` when the work on it is done",
        "gateway_host_memory_bytes": "no `headroom`: nothing else can be loaded without an eviction",
    },
    "Machinery": {
        "gateway_build_info": "two versions at once: an upgrade is half done",
        "gateway_snapshot_number": "as the page and `gateway status --json` name it: equal numbers, equal figures",
        "gateway_policy_version": "it changes when somebody applies one: `gateway policy history`",
        "gateway_due_late_seconds": "no scheduler runs, or it cannot keep up",
        "gateway_due_overdue_jobs": "the same, by number",
        "gateway_dead_letters": "`gateway dead list`",
        "gateway_batches_open": "batch lanes: `gateway_lane_depth{lane=~\".*batch\"}`",
        "gateway_batch_oldest_seconds": "near 24 h: it will expire",
        "gateway_outbox_length": "no scheduler runs",
        "gateway_outbox_oldest_seconds": "no scheduler runs, or its chores do not",
        "gateway_webhooks_late_seconds": "the scheduler's chores do not run",
        "gateway_webhook_attempts_total": "`failed`, `dead`: `gateway webhook list` has how the last attempts went",
        "gateway_redis_up": "0: Redis does not answer this api",
        "gateway_redis_durability": "not `aof-…`: a crash of Redis loses accepted jobs; set `appendonly yes`",
        "gateway_redis_unfit_settings": "`/healthz` says which, and what to set",
        "gateway_redis_memory_bytes": "`used` near `max`: writes fail; files and kept answers are most of it",
        "gateway_redis_writes_ok": "0: the disk of Redis is full or broken",
        "gateway_event_loop_lag_seconds": "this api has too much to do for one core: run a second one",
        "gateway_request_bodies_bytes": "many large prompts at once; at the limit they are refused `too_many_bodies`",
        "gateway_process_cpu_seconds_total": "near one core: run a second api",
        "gateway_process_resident_memory_bytes": "growing for days: a leak",
        "gateway_process_start_time_seconds": "it changes when the api restarts",
        "gateway_process_files": "`open` near `max`: connections will be refused",
    },
}  # fmt: skip
"""What to look at when a figure is high (or is what the sentence says), by family, in the order of the page."""


def as_markdown(families: Sequence[Family]) -> str:
    """Prints the tables of the page."""
    known = {family.name: family for family in families}
    lines: list[str] = []
    for title, notes in LOOK.items():
        lines += [f"### {title}", "", "| metric | type | unit | labels | what it is | where to look |"]
        lines += ["|---|---|---|---|---|---|"]
        for name, look in notes.items():
            family = known[name]
            labels = ", ".join(f"`{label}`" for label in family.labels) or "-"
            lines.append(f"| `{name}` | {family.type} | {family.unit or '-'} | {labels} | {family.help} | {look} |")
        lines.append("")
    lines += ["### Labels", "", "| label | where its values come from |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{label}` | {source} |" for label, source in LABELS.items())])
