"""The text of `gateway status`, letter by letter."""

import json
from dataclasses import replace

from api.status_table import duration, size, status_table
from broker import hosts
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.records import HostRecord, ModelOnHost
from broker.snapshots import Snapshots
from broker.status import HostStatus, LaneStatus, ModelStatus, SilentHost, Snapshot
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace

GIB = 1 << 30

SPECIFIED = """\
MODEL        STATE   FIRST TOKEN   QUEUE   MEM
deep-coder   warm    1180ms        2/6     31.8G
coder-small  warm    420ms         1/12    8.6G
policy: deep-coder fallback -> coder-small after 25000ms cold-start budget
"""

DEEP = ModelStatus(
    name="deep-coder", runtime="ollama", state="warm", first_token_ms=1180.4, waiting=2, max_queue=6,
    slots_total=2, memory_bytes=int(31.8 * GIB), hosts=("gpu1",),
)  # fmt: skip
SMALL = ModelStatus(
    name="coder-small", runtime="llama.cpp", state="warm", first_token_ms=420, waiting=1, max_queue=12,
    slots_total=4, memory_bytes=int(8.6 * GIB), hosts=("gpu1",),
)  # fmt: skip
HOST = HostStatus(
    name="gpu1", memory_total=48 * GIB, memory_used=int(40.4 * GIB), memory_headroom=int(7.6 * GIB),
    models=("coder-small", "deep-coder"),
)  # fmt: skip
TEAM = Snapshot(
    policy_version=3,
    models=(DEEP, SMALL),
    lanes=(
        LaneStatus(
            name="deep-coder", model="deep-coder", waiting=2, max_queue=6, fallback="coder-small",
            cold_start_budget_ms=25_000,
        ),
        LaneStatus(name="deep-coder.batch", model="deep-coder", priority="batch", max_queue=10_000),
        LaneStatus(name="coder-small", model="coder-small", waiting=1, max_queue=12, cold_start_budget_ms=4_000),
    ),
    hosts=(HOST,),
)  # fmt: skip


def test_the_table_of_the_specification() -> None:
    """What people were promised, and under it the host."""
    assert status_table(TEAM) == SPECIFIED + "host: gpu1 up, 40.4G of 48.0G used, headroom 7.6G"


def test_a_host_says_whose_memory_it_is_and_why_it_is_not_the_gpus() -> None:
    gpu = replace(HOST, memory_source="gpu")
    assert status_table(Snapshot(hosts=(gpu,))).splitlines()[1] == (
        "host: gpu1 up, 40.4G of 48.0G GPU memory used, headroom 7.6G"
    )
    words = "GPU 0 does not tell its memory (NVML_ERROR_NOT_SUPPORTED): the system's memory counts"
    unified = replace(HOST, memory_source="system", memory_note=words)
    assert status_table(Snapshot(hosts=(unified,))).splitlines()[1:] == [
        "host: gpu1 up, 40.4G of 48.0G used, headroom 7.6G",
        f"note: host gpu1: {words}",
    ]


def test_a_host_that_fell_silent_is_told_beside_those_that_live() -> None:
    box2 = SilentHost(name="box2", beat_age_ms=12_000)
    assert status_table(replace(TEAM, silent=(box2,))).splitlines()[-2:] == [
        "host: gpu1 up, 40.4G of 48.0G used, headroom 7.6G",
        "host: box2 silent for 12s, its worker sends no heartbeat and did not take its leave",
    ]
    assert status_table(Snapshot(silent=(box2,))).splitlines()[1:] == [
        "host: none is alive, so nothing can be served",
        "host: box2 silent for 12s, its worker sends no heartbeat and did not take its leave",
    ]


def test_what_is_not_known_is_a_dash() -> None:
    cold = Snapshot(models=(ModelStatus(name="big", state="cold", max_queue=8),), hosts=(HOST,))
    assert status_table(cold).splitlines()[1] == "big    cold    -             0/8     -"


def test_long_names_widen_their_column() -> None:
    long = ModelStatus(name="a-model-with-quite-a-name", state="quarantined", max_queue=8)
    head, row = status_table(Snapshot(models=(long,), hosts=(HOST,))).splitlines()[:2]
    assert head.index("STATE") == row.index("quarantined") == len(long.name) + 2
    assert head.index("FIRST TOKEN") == row.index("-", row.index("quarantined")) == head.index("STATE") + 14


def test_whatever_needs_a_word_gets_a_line() -> None:
    """Simulated answers, a failed load, slots that settle, a batch that waits, a lane on its way out, no host."""
    shown = Snapshot(
        made_up=True,
        models=(
            ModelStatus(name="sim", state="warm", simulated=True, slots_total=2, slots_settling=1),
            ModelStatus(name="big", label="the big one", state="quarantined", reason="the file is not there"),
        ),
        lanes=(
            LaneStatus(name="sim", model="sim"),
            LaneStatus(
                name="sim.batch", model="sim", waiting=7, max_queue=10_000, running=1, oldest_waiting_ms=185_000
            ),
            LaneStatus(name="gone", model="gone", waiting=1, max_queue=4, retiring=True),
        ),
    )
    assert status_table(shown).splitlines()[3:] == [
        "lane: sim.batch 7/10000 waiting, 1 running on sim, the oldest for 3m",
        "lane: gone 1/4 waiting, 0 running on gone, retiring",
        "host: none is alive, so nothing can be served",
        "note: sim is simulated: its answers mean nothing",
        "note: sim has 1 of 2 slots settling after a cancel",
        "note: the big one is quarantined: the file is not there",
        "note: this policy was made up by `gateway up`, since none was given",
    ]


def test_a_snapshot_survives_the_wire() -> None:
    """The command line reads what the api tells, also when a newer one tells more."""
    team = replace(TEAM, silent=(SilentHost(name="box2", beat_age_ms=12_000),))
    told = json.loads(json.dumps(team.as_json()))
    for part in (told, *(told[name][0] for name in ("models", "lanes", "hosts", "silent"))):
        part["news"] = [1]
    assert Snapshot.from_json(told) == team
    del told["silent"]
    assert Snapshot.from_json(told) == TEAM, "an older api tells of none"
    assert told["policy"] == ["deep-coder fallback -> coder-small after 25000ms cold-start budget"]


def test_sizes_and_ages_are_short() -> None:
    assert [size(n) for n in (0, 1, 640 << 20, 1023 << 20, GIB, 100 * GIB)] == [
        "-", "1M", "640M", "1023M", "1.0G", "100.0G",
    ]  # fmt: skip
    assert [duration(n) for n in (0, 999, 1000, 119_000, 120_000, 7_199_000, 7_200_000)] == [
        "0ms", "999ms", "1s", "119s", "2m", "120m", "2h",
    ]  # fmt: skip


def test_the_wide_table_adds_slots_the_last_load_and_the_cached_share() -> None:
    """The specification's columns stay where they are; what is not known is a dash."""
    deep = replace(DEEP, slots_used=1, last_load_ms=42_000, load_ms=40_000, prompt_tokens=100_000, cached_tokens=99_265)
    lines = status_table(replace(TEAM, models=(deep, replace(SMALL, load_ms=2_500))), wide=True).splitlines()
    assert lines[:3] == [
        "MODEL        STATE   FIRST TOKEN   QUEUE   MEM     SLOTS   LAST LOAD   CACHED",
        "deep-coder   warm    1180ms        2/6     31.8G   1/2     42s         99%",
        "coder-small  warm    420ms         1/12    8.6G    0/4     2s          -",
    ]
    assert lines[3:] == status_table(TEAM).splitlines()[3:]


def test_a_load_shows_how_far_it_is() -> None:
    """By the runtime's own figures, else by how long it takes as a rule, else only for how long it has gone on."""

    def line(**known: float | str) -> str:
        waking = ModelStatus(name="big", state="waking", **known)  # type: ignore[arg-type]
        return status_table(Snapshot(models=(waking,), hosts=(HOST,))).splitlines()[-1]

    assert line(state_ms=4_000, progress=0.4, load_ms=30_000) == (
        "note: big is waking: [########............] 40% after 4s"
    )
    assert line(state_ms=4_000, progress=1.0) == "note: big is waking: [####################] 100% after 4s"
    assert line(state_ms=15_000, load_ms=30_000) == ("note: big is waking: [##########..........] 15s of about 30s")
    assert line(state_ms=90_000, load_ms=30_000) == ("note: big is waking: [###################.] 90s of about 30s"), (
        "a bar is never full before it is over"
    )
    assert line(state_ms=4_000) == "note: big is waking: for 4s"
    waits = line(state_ms=39_000, load_ms=30_000, reason="waits for the memory of small")
    assert waits == "note: big is waking: waits for the memory of small, for 39s", "no load has begun"


def test_who_is_too_old_for_the_active_policy_is_told() -> None:
    hosts = (replace(HOST, policy_unread=4, running=2), HostStatus(name="gpu2", policy_unread=4, draining=True))
    assert status_table(Snapshot(policy_version=3, policy_unread=4, hosts=hosts)).splitlines()[1:] == [
        "host: gpu1 too old for policy 4 (2 still running), 40.4G of 48.0G used, headroom 7.6G",
        "host: gpu2 too old for policy 4 (nothing runs)",
        "note: policy 4 is active, and the api's version of warmlane cannot read it: it lets nothing in, and shows "
        "policy 3",
    ]


def test_what_an_operator_did_and_what_ends_by_itself_is_told() -> None:
    shown = Snapshot(
        models=(
            ModelStatus(name="big", state="quarantined", reason="no such file", quarantine_ms=31_000),
            ModelStatus(name="kept", state="cold", keep_warm=True, pinned=True, unloaded_ms=3_540_000),
            ModelStatus(name="other", state="cold", unloaded_ms=3_540_000),
        ),
        hosts=(replace(HOST, draining=True, running=2), HostStatus(name="gpu2", draining=True)),
    )
    assert status_table(shown).splitlines()[4:] == [
        "host: gpu1 draining (2 still running), 40.4G of 48.0G used, headroom 7.6G",
        "host: gpu2 draining (nothing runs)",
        "note: big is quarantined: no such file, for 31s more",
        "note: kept is pinned",
        "note: kept was unloaded by hand and is not kept warm for 59m",
    ]


def test_what_a_promise_of_the_policy_is_doing_is_told() -> None:
    """A model that is kept warm and cold, sessions that stay elsewhere, jobs that another model serves."""
    hours = "Mon-Fri 08:00-19:00 Europe/Berlin"
    shown = Snapshot(
        models=(
            ModelStatus(name="office", state="cold", keep_warm=True, outside_hours=hours),
            ModelStatus(name="late", state="warm", keep_warm=True, outside_hours=hours),
            ModelStatus(name="big", state="waking", sessions_on_fallback=3, asked=24, downgraded=6),
            ModelStatus(name="one", state="warm", sessions_on_fallback=1, asked=24),
        ),
        hosts=(HostStatus(name="gpu1"),),
    )
    assert status_table(shown).splitlines()[6:] == [
        f"note: office is not kept warm now: its activeHours are {hours}",
        "note: big is waking: for 0ms",
        "note: big has 3 sessions that stay on its fallback for a while",
        "note: big had 6 of its last 24 jobs served by another model",
        "note: one has 1 session that stays on its fallback for a while",
    ]


async def test_the_snapshot_tells_which_hours_keep_a_model_cold() -> None:
    """Where the hours name a zone; without one they are the worker's, and not the api's to judge."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    store.clock = lambda: 1_764_331_200_000  # a Friday, 12:00 UTC
    book = PolicyBook(store)
    hours = {"in": "Fri 11:00-13:00 UTC", "out": "Sat 11:00-13:00 UTC", "here": "Sat 11:00-13:00"}
    rows = [f"{n}: {{backend: simulated, model: x, keepWarm: true, activeHours: '{h}'}}" for n, h in hours.items()]
    await book.apply(f"models: {{{', '.join(rows)}}}")
    shown = await Snapshots(store, book, Fleet(store, book)).latest()
    assert {m.name: m.outside_hours for m in shown.models} == {"in": "", "out": hours["out"], "here": ""}
    await store.close()


async def test_the_snapshot_tells_loads_quarantine_wishes_and_the_cached_share() -> None:
    """From what workers, operators and the scripts that ended jobs wrote, over all callers of a model."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    store.clock = lambda: 1_764_331_200_000
    book = PolicyBook(store)
    await book.apply("models: {big: {backend: simulated, model: x}, bad: {backend: simulated, model: x}}")
    now = await store.now_ms()
    waking = ModelOnHost(state="waking", progress=0.25, since=now - 4_000)
    warm_there = {"big": waking, "bad": ModelOnHost(state="quarantined", slots_used=1, last_load_ms=3)}
    await hosts.beat(store, HostRecord(name="gpu1", boot="b"), warm_there, lease_ms=600_000)
    await hosts.learn(store, "big", load_ms=9_000, pinned=1, unloaded_until=now + 60_000)
    await hosts.learn(store, "bad", quarantined_until=now + 5_000, failure="broke", failures=2)
    tokens = {
        "ann:big:big:big": (80, 50),
        "bob:x:bad:big": (20, 20),
        "ann:bad:bad:bad": (7, 0),
        "a:b:c:bigger": (99, 99),
    }
    for by, (read, cached) in tokens.items():
        await store.command("HSET", store.keys.usage("2025-11-28"), by, 1)
        key = store.keys.figures("2025-11-28", by)
        await store.command("HSET", key, "tokens_in", read, "tokens_cached", cached)
    shown = await Snapshots(store, book, Fleet(store, book)).latest()
    big, bad = shown.models
    assert (big.progress, big.state_ms, big.load_ms, big.pinned, big.unloaded_ms) == (0.25, 4_000, 9_000, True, 60_000)
    assert (big.prompt_tokens, big.cached_tokens, big.cached_share) == (100, 70, 0.7)
    assert (bad.state, bad.quarantine_ms, bad.reason, bad.last_load_ms) == ("quarantined", 5_000, "broke", 3)
    assert (bad.progress, bad.cached_share) == (-1, 0.0)
    assert shown.hosts[0].running == 1
    assert [model["cached_share"] for model in shown.as_json()["models"]] == [0.7, 0.0]
    assert Snapshot.from_json(json.loads(json.dumps(shown.as_json()))) == shown
    await store.close()


async def test_a_cold_model_whose_last_loads_failed_says_so() -> None:
    """Once the pause has ended and nobody waits, nothing else tells of it; a load that succeeds makes it forgotten."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    store.clock = lambda: 1_764_331_200_000
    book = PolicyBook(store)
    await book.apply("models: {bad: {backend: simulated, model: x}}")
    await hosts.beat(store, HostRecord(name="gpu1", boot="b"), {"bad": ModelOnHost(state="cold")}, lease_ms=600_000)
    words = "model 'bad': there is no GGUF file at /m/x."

    async def told(**facts: int | str) -> tuple[str, str]:
        await hosts.learn(store, "bad", **facts)
        shown = await Snapshots(store, book, Fleet(store, book)).latest()
        return shown.models[0].state, shown.models[0].reason

    now = await store.now_ms()
    assert await told(quarantined_until=now + 1, failure=words, failures=3) == (
        "quarantined",
        "there is no GGUF file at /m/x.",
    )
    assert await told(quarantined_until=now) == ("cold", "its last 3 loads failed: there is no GGUF file at /m/x.")
    assert await told(failures=1) == ("cold", "its last load failed: there is no GGUF file at /m/x.")
    assert await told(**hosts.NOT_FAILED) == ("cold", "")
    await hosts.beat(store, HostRecord(name="gpu1", boot="b"), {"bad": ModelOnHost(state="waking")}, lease_ms=600_000)
    assert await told(failure=words, failures=3) == ("waking", ""), "a load goes on"
    await store.close()


def test_a_remote_fallback_takes_no_promoted_job_and_the_policy_line_says_so() -> None:
    lane = LaneStatus(name="near", model="near", fallback="far", spills_only=True, cold_start_budget_ms=25000)

    assert Snapshot(lanes=(lane,)).policy_lines == [
        "near spill -> far while it has no place, for requests that may leave"
    ]
