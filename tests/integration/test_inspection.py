"""`gateway inspect` reads Redis itself: what it tells, that it only reads, and that a long lane keeps it no longer."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api import inspect_text
from broker import errors, jobs, usage, wake
from broker import hosts as hosts_of_broker
from broker.inspection import hosts, keys, lanes, story
from broker.inspection import jobs as listing
from broker.inspection.reading import CLOCK, READS, ReadingStore
from broker.inspection.timeline import timeline, troubles
from broker.lifecycle import ENDED, State
from broker.policies import Active, PolicyBook
from broker.records import JobRecord, ModelOnHost
from broker.store import Store
from tests.support.broker_world import START, World, policy_with, real_world
from tests.support.redis_server import RedisServer
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "inspect.md").read_text()
PROMPT = b'{"model":"big","messages":[{"role":"user","content":"zebra"}]}'
VERBS = (
    ["lanes"], ["jobs"], ["jobs", "--state", "all"], ["jobs", "--state", "scheduled"], ["jobs", "--state", "running"],
    ["hosts"], ["locks"], ["dead"], ["keys"],
)  # fmt: skip


@pytest_asyncio.fixture
async def real(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A world on a real server in real time, which the environment points at."""
    async with real_world(redis_server.url) as world:
        world.real_time()
        await world.apply()
        monkeypatch.setenv("GATEWAY_REDIS_URL", redis_server.url)
        monkeypatch.setenv("GATEWAY_NAMESPACE", world.store.keys.namespace)
        yield world


async def busy(world: World) -> dict[str, str]:
    """One job of each kind; the word for it -> its id."""
    await world.warm(big=2)
    done, failed = await world.submit(body=PROMPT), await world.submit(body=PROMPT, mode="async")
    held = await world.stream(done)
    await jobs.end(world.store, held, "finish", served_by="big@gpu1", seq=2, data=b"x", usage={"prompt_tokens": 3})
    held = await world.claim(failed)
    await jobs.end(world.store, held, "fail", error=errors.RuntimeFailed("it broke: zebra"))
    streams, waits = await world.submit(body=PROMPT, caller="ann"), await world.submit(body=PROMPT, caller="bob")
    await world.stream(streams)
    soon = await world.store.now_ms() + 60_000
    later = await world.submit(body=PROMPT, not_before=soon, caller="ci", mode="async", priority="batch")
    moved = await world.submit(body=PROMPT, caller="cy")
    await world.promote(moved, "small")
    assert await wake.take(world.store, "small", host="gpu1", boot="boot1") is not None
    return {"streams": streams, "waits": waits, "later": later, "moved": moved, "done": done, "failed": failed}


# --- what it tells, on both servers ------------------------------------------------------------------------------


async def test_lanes_tell_who_waits_and_who_holds_what(world: World) -> None:
    await world.warm(big=2)
    first, second = await world.submit(caller="ann"), await world.submit(caller="bob")
    world.now += 3_000
    await world.submit(caller="ann")
    await world.claim(first)
    world.now += 1_000
    told = await lanes.look(world.store, world.book.active)
    by_name = {lane.name: lane for lane in told.lanes}
    big = by_name["big"]
    assert (big.waiting, big.running, big.held_by, big.max_queue) == (2, 1, {"gpu1": 1}, 3)
    assert big.oldest_waiting_ms == 4_000, f"{second} waits longest, not the one that is held"
    assert (big.asking, big.fallback, by_name["side"].waiting) == (2, "small", 0)
    assert (told.late, told.late_ms) == (0, 0)
    world.now = START + 30_000
    told = await lanes.look(world.store, world.book.active)
    assert told.late == 3 and told.late_ms == 28_000, "their deadlines have passed and no scheduler looks"
    world.now = START + 90_000
    (big,) = [lane for lane in (await lanes.look(world.store, world.book.active)).lanes if lane.name == "big"]
    assert (big.waiting, big.asking) == (2, 0), "they wait, and nobody has asked since"


async def test_jobs_are_found_by_what_is_asked_for(world: World) -> None:
    await world.warm(big=2)
    old = await world.submit(caller="ann")
    world.now += 10_000
    young, held = await world.submit(caller="bob"), await world.submit(caller="ann")
    other = await world.submit("small", caller="ann")
    later = await world.submit("small", caller="ann", not_before=world.now + 5_000)
    await world.claim(held)
    gone = await world.submit()
    await jobs.cancel(world.store, gone)

    async def found(**wanted: object) -> list[str]:
        told = await listing.find(world.store, world.book.active, replace(listing.Wanted(), **wanted))  # type: ignore[arg-type]
        assert told.unseen == 0
        return [job.id for job in told.jobs]

    assert await found() == [old, young, held, other, later]
    assert await found(lane="small") == [other, later]
    assert await found(model="big") == [old, young, held]
    assert await found(caller="bob") == [young]
    assert await found(states=frozenset({State.CLAIMED})) == [held]
    assert await found(states=frozenset({State.SCHEDULED})) == [later]
    assert await found(older_than_ms=5_000) == [old]
    assert await found(states=ENDED) == [gone]
    assert await found(states=ENDED, caller="nobody") == []
    unpolicied = await listing.find(world.store, None, listing.Wanted(caller="ann"))
    assert {job.id for job in unpolicied.jobs} == {old, held, other, later}, "the due set knows them without a policy"


async def test_what_a_limit_leaves_out_is_counted(world: World) -> None:
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 30")))
    every = [await world.submit() for _ in range(12)]
    told = await listing.find(world.store, world.book.active, listing.Wanted(limit=5))
    assert [job.id for job in told.jobs] == every[:5] and told.unseen == 7
    for job_id in every:
        await jobs.cancel(world.store, job_id)
        world.now += 10
    told = await listing.find(world.store, world.book.active, listing.Wanted(states=ENDED, limit=5))
    assert [job.id for job in told.jobs] == every[:6:-1] and told.unseen == 7, "the newest ends first"


async def test_a_job_that_a_limit_left_out_of_its_lane_is_not_counted_again(world: World) -> None:
    """It stands in the due set as well, with the jobs that start later."""
    await world.apply(policy_with(("maxQueue: 3", "maxQueue: 30")))
    every = [await world.submit() for _ in range(10)]
    later = [await world.submit(not_before=world.now + 5_000 + number) for number in range(6)]
    for limit, left_out in ((3, 13), (10, 6), (12, 4), (16, 0)):
        told = await listing.find(world.store, world.book.active, listing.Wanted(limit=limit))
        assert [job.id for job in told.jobs] == [*every, *later][:limit] and told.unseen == left_out, limit
    wanted = listing.Wanted(states=frozenset({State.SCHEDULED}), limit=2)
    assert (await listing.find(world.store, world.book.active, wanted)).unseen == 4


async def test_a_story_has_every_step_with_its_time_and_no_word_of_the_prompt(world: World) -> None:
    job_id = await world.submit(body=PROMPT, caller="ann", instead_of="big")
    world.now += 2_000
    await world.tell("gpu1", {"big": ModelOnHost(state="warm", slots_total=1, woke_at=world.now)})
    waits = await story.tell(world.store, job_id)
    assert [step.step for step in waits.steps if not step.ahead] == ["submitted", "woke"], "as its model tells"
    world.now += 500
    held = await world.claim(job_id, woke_at=world.now - 500)
    await world.tell("gpu1", {"big": ModelOnHost(state="warm", slots_total=1, woke_at=world.now + 90_000)})
    world.now += 700
    await jobs.first_token(world.store, held, b"a frame with zebra")
    world.now += 4_000
    await jobs.end(world.store, held, "fail", error=errors.RuntimeFailed("the runtime answered 500: zebra"), seq=1)
    told = await story.tell(world.store, job_id)
    assert [(step.step, step.after_ms, step.took_ms) for step in told.steps] == [
        ("submitted", 0, 0), ("woke", 2_000, 2_000), ("claimed", 2_500, 500), ("first token", 3_200, 700),
        ("failed", 7_200, 4_000),
    ]  # fmt: skip
    assert told.error == "the runtime answered 500" and told.models == {"gpu1": "warm"}
    assert told.frames == 2 and told.request_bytes == 0 and told.kept_ms > 0
    assert "zebra" not in json.dumps(told.as_json())


async def test_moves_put_backs_and_losses_are_told(world: World) -> None:
    await world.warm(big=1, small=1)
    moved = await world.submit()
    await world.promote(moved, "small")
    lost = await world.submit(priority="batch", body=PROMPT)
    await jobs.put_back(world.store, await world.claim(lost), left_ms=0)
    await world.claim(lost)
    world.now += 12_000
    await world.recover(lost)
    told = await story.tell(world.store, moved)
    assert [step.step for step in told.steps] == ["submitted", "moved", "tries its fallback", "gives up"]
    assert [step.step for step in (await story.tell(world.store, lost)).steps][:3] == [
        "submitted", "claimed", "waits again"
    ]  # fmt: skip
    assert told.steps[-2].took_ms < 0, "nobody has looked after it"
    assert told.steps[-1].ahead and told.steps[-1].took_ms == 8_000
    assert told.ahead == 0 and "moved to a fallback lane once" in told.troubles[0]
    words = "; ".join((await story.tell(world.store, lost)).troubles)
    assert "put back for interactive work once" in words and "lost with its worker or runtime once" in words


@pytest.mark.parametrize(
    ("spilled", "words"),
    [
        ("lane_full", "deep had no place (lane_full)"),
        ("caller_share", "ann had its share of the places of deep (caller_share)"),
        ("model_unavailable", "big could not serve then (model_unavailable)"),
        ("context_length_exceeded", "big has too little context for it (context_length_exceeded)"),
        ("wrong_endpoint", "big does not do what it asks for (wrong_endpoint)"),
        ("trust_zone", "it may not leave by deep (trust_zone)"),
        ("sticky", "its session left big lately and stays there (sticky)"),
        ("of_tomorrow", "deep did not take it (of_tomorrow)"),
    ],
)
def test_why_a_job_entered_a_fallback_is_told(spilled: str, words: str) -> None:
    job = JobRecord(id="a", caller="ann", lane="small", asked="deep", asked_model="big", model="small", spilled=spilled)
    assert troubles(job) == [f"let into lane small at once: {words}"]
    later, _ = troubles(replace(job, lane="tiny", model="tiny", promotions=1))
    assert later == f"let into a fallback lane at once: {words}", "which one is not known any more"


def test_what_lies_ahead_of_a_job_is_told_by_its_state() -> None:
    now = 10_000
    waits = JobRecord(id="a", submitted_at=1_000, promote_at=12_000, give_up_at=30_000)
    assert [(s.step, s.took_ms) for s in timeline(waits, now_ms=now) if s.ahead] == [
        ("tries its fallback", 2_000), ("gives up", 20_000)
    ]  # fmt: skip
    later = JobRecord(id="a", state=State.SCHEDULED, submitted_at=1_000, not_before=11_000, give_up_at=30_000)
    assert [s.step for s in timeline(later, now_ms=now)] == ["submitted", "starts", "gives up"]
    runs = JobRecord(id="a", state=State.CLAIMED, submitted_at=1, claimed_at=5, lease_until=10_500, owner="gpu1")
    assert timeline(runs, now_ms=now)[-1].words == "unless gpu1 renews it"
    half = JobRecord(id="a", submitted_at=1, claimed_at=5, continue_by=11_000, continues=1, attempt=1)
    assert timeline(half, now_ms=now)[-1].step == "ends" and troubles(half) == []
    assert "given back" in timeline(half, now_ms=now)[1].words


def test_a_wait_that_begins_anew_is_told_apart_from_the_one_before() -> None:
    """A wake that was over by then is none of it, and a claim that was given back is no claim of it."""
    job = JobRecord(id="a", model="big", submitted_at=1_000, not_before=2_000, queued_at=9_000, promoted_at=9_000)

    def told(**fields: Any) -> list[tuple[str, int]]:
        return [
            (s.step, s.at_ms) for s in timeline(replace(job, **fields), now_ms=30_000, woke_at=9_500) if not s.ahead
        ]

    moved = [("submitted", 1_000), ("started", 2_000), ("moved", 9_000)]
    assert told() == [*moved, ("woke", 9_500)]
    ran = {"claimed_at": 9_600, "attempt": 1, "woke_at": 5_000}
    assert told(state=State.CLAIMED, **ran) == [*moved, ("claimed", 9_600)]
    again = {**ran, "requeued_at": 12_000}
    waits = [*moved, ("claimed", 9_600), ("waits again", 12_000)]
    assert told(**again) == waits
    assert told(**again, state=State.CANCELLED, ended_at=13_000) == [*waits, ("cancelled", 13_000)]
    assert (
        "given back since" in timeline(replace(job, **again, state=State.CANCELLED, ended_at=13_000), now_ms=1)[3].words
    )
    served = {**again, "claimed_at": 20_000, "attempt": 2, "woke_at": 19_000, "state": State.DONE, "ended_at": 21_000}
    assert told(**served) == [*moved, ("waits again", 12_000), ("woke", 19_000), ("claimed", 20_000), ("done", 21_000)]


async def test_hosts_are_told_alive_or_gone(world: World) -> None:
    await world.warm("gpu1", big=2)
    await world.warm("gpu2", small=1)
    await world.store.command("DEL", world.store.keys.host("gpu2"))
    world.now += 5_000
    alive, gone = await hosts.look(world.store, world.book.active)
    assert (alive.name, alive.alive, alive.beat_age_ms) == ("gpu1", True, 5_000)
    assert [(m.name, m.state, m.slots_total, m.behind) for m in alive.models] == [("big", "warm", 2, True)]
    assert (gone.name, gone.alive) == ("gpu2", False)


async def test_a_cold_model_on_a_host_tells_why_it_is_not_loaded(world: World) -> None:
    """Its worker calls it cold once nobody wants it, also while the pause after a failed load goes on."""
    await world.tell("gpu1", {"big": ModelOnHost(state="cold"), "small": ModelOnHost(state="warm")})

    async def reasons() -> list[str]:
        [host] = await hosts.look(world.store, world.book.active)
        return [model.reason for model in host.models]

    assert await reasons() == ["", ""]
    until = world.now + 5_000
    for model in ("big", "small"):
        await hosts_of_broker.learn(world.store, model, failures=2, failure="no such file", quarantined_until=until)
    assert await reasons() == ["quarantined: no such file", ""]
    world.now += 5_000
    assert await reasons() == ["its last 2 loads failed: no such file", ""]


async def test_locks_tell_holder_epoch_and_lifetime(world: World) -> None:
    await world.warm("gpu1", big=1)
    assert await wake.take(world.store, "big", host="gpu1", boot="boot1", ttl_ms=9_000) is not None
    assert await wake.take(world.store, "small", host="gpu9", boot="dead", ttl_ms=9_000) is not None
    big, small, far = await hosts.locks(world.store, ["big", "small", "far"])
    assert (big.holder, big.boot, big.epoch, big.alive, big.wakes) == ("gpu1", "boot1", 1, True, 1)
    assert 0 < big.ttl_ms <= 9_000
    assert (small.holder, small.alive) == ("gpu9", False)
    assert (far.holder, far.epoch, far.ttl_ms, far.wakes) == ("", 0, 0, 0)
    assert await hosts.locked_models(world.store) == ["big", "small"]


async def test_a_lock_that_no_worker_wrote_is_told_as_it_stands(world: World, gateway: Gateway) -> None:
    """Whoever looks at locks may do so because one of them is odd."""
    k = world.store.keys
    await world.store.command("SET", k.wake("big"), b"me, by hand \xff")
    await world.store.command("SET", k.wake("small"), "gpu1/boot1/x")
    await world.store.command("SET", k.wake_epoch("far"), "many")
    big, small, far = await hosts.locks(world.store, ["big", "small", "far"])
    assert (big.holder, big.boot, big.alive) == ("me, by hand \\xff", "", False)
    assert (small.holder, small.boot, small.epoch, far.wakes) == ("gpu1/boot1/x", "", 0, 0)
    told = inspect_text.locks([big]).splitlines()[1].split("  ")
    assert "me, by hand \\xff (no worker's)" in told


async def test_a_key_whose_name_is_no_text_is_nobodys(world: World) -> None:
    """Chores that go by all keys pass it by."""
    names = [
        f"{world.store.keys.namespace}:{word}:".encode() + b"\xff" for word in ("model", "usage", "job", "learned")
    ]
    for name in names:
        await world.store.command("SET", name, "1")
    await hosts_of_broker.forget(world.store, known={"big"})
    await usage.keep(world.store, usage_days=1)
    told = await listing.find(world.store, world.book.active, listing.Wanted(states=ENDED))
    assert told.jobs == () and await world.store.command("EXISTS", *names) == len(names)


# --- keys, and what only a real server shows ---------------------------------------------------------------------


@pytest.mark.real
async def test_keys_count_every_row_and_name_what_has_no_owner_or_no_end(real: World) -> None:
    await busy(real)
    store, k = real.store, real.store.keys
    whole = await keys.look(store, real.book.active)
    assert whole.faults == {} and whole.scanned == sum(row.count for row in whole.families)
    rows = {row.pattern: row for row in whole.families}
    assert rows["job:<id>"].count == 6 and rows["job:<id>"].endless == 4 and rows["job:<id>"].bytes > 500
    assert rows["wake:<model>"].longest_ms > 0
    await store.command("SET", k.lane("x").replace("lane", "stranger"), "1")
    await store.command("XADD", k.lane("removed"), "*", "job", "x")
    await store.command("SET", k.request("nobody"), "body")
    await store.command("HSET", k.host("gpu7"), "boot", "b")
    await store.command("SET", k.job("text"), "no hash")
    faults = (await keys.look(store, real.book.active)).faults
    words = {key.removeprefix(k.namespace + ":"): fault for key, fault in faults.items()}
    assert words == {
        "stranger:x": "no row of the key table knows it: it has no owner",
        "lane:removed": "has no owner: the policy has no lane removed",
        "job:nobody:request": "has no owner: its job is gone",
        "host:gpu7": "has no lifetime; it should live 6 s, renewed every 2 s",
        "job:text": "is a string, the key table says hash",
    }


@pytest.mark.real
async def test_a_key_whose_name_is_no_text_is_a_fault(real: World, gateway: Gateway) -> None:
    await real.store.command("SET", real.store.keys.job("").encode() + b"\xff\x1b", "1")
    ran = await asyncio.to_thread(gateway, "inspect", "keys")
    assert ran.code == 0 and r":job:\xff\x1b no row of the key table knows it: it has no owner" in ran.out


@contextmanager
def monitored(port: int) -> Iterator[list[str]]:
    """Every command that the server gets meanwhile, as it says itself."""
    heard: list[str] = []
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as ear:
        ear.sendall(b"MONITOR\r\n")
        lines = ear.makefile()
        assert lines.readline().startswith("+OK")
        yield heard
        with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as mouth:
            mouth.sendall(b"ECHO over\r\n")
            for line in lines:
                if '"ECHO" "over"' in line:
                    return
                heard.append(line.split('"')[1].upper())


@pytest.mark.real
async def test_every_command_that_is_sent_reads(real: World, gateway: Gateway, redis_server: RedisServer) -> None:
    """As the server heard them, against the server's own list of reading commands; and nothing in Redis changes."""
    ids = await busy(real)
    await real.store.command("SET", real.store.keys.request("nobody"), "x")  # of a fault more is asked
    before = await world_of(real)
    with monitored(redis_server.port) as heard:
        for words in [*VERBS, *(["job", job_id] for job_id in ids.values())]:
            ran = await asyncio.to_thread(gateway, "inspect", *words)
            assert ran.code == 0, ran.err
            assert "zebra" not in ran.out
    reading = {name.decode().upper().partition("|")[0] for name in await real.store.command("ACL", "CAT", "read")}
    assert READS <= reading and CLOCK not in reading
    assert set(heard) <= READS | {CLOCK}, set(heard) - READS
    assert READS <= set(heard), f"never sent: {READS - set(heard)}"
    assert await world_of(real) == before


async def world_of(world: World) -> dict[str, bytes]:
    """Every key as the server would write it down."""
    names = [name async for name in world.store.scan(world.store.keys.everything)]
    return {name: await world.store.command("DUMP", name) for name in names}


@pytest.mark.real
async def test_a_user_who_may_only_read_can_run_all_of_it(
    real: World, gateway: Gateway, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the very line that docs/inspect.md tells people to type."""
    ids = await busy(real)
    words = next(line for line in PAGE.splitlines() if line.strip().startswith("ACL SETUSER looker"))
    words = words.replace("SECRET", "secret").replace("gw:", f"{real.store.keys.namespace}:")
    assert {word for word in words.split() if word.startswith("+")} == {"+@read"}
    await real.store.command(*words.split())
    monkeypatch.setenv("GATEWAY_REDIS_URL", f"redis://looker:secret@127.0.0.1:{redis_server.port}/0")
    try:
        for words in [*VERBS, ["job", ids["moved"]]]:
            ran = await asyncio.to_thread(gateway, "inspect", *words, "--json")
            assert (ran.code, ran.err) == (0, ""), ran.err
            assert json.loads(ran.out)
    finally:
        await real.store.command("ACL", "DELUSER", "looker")


@pytest.mark.real
async def test_logs_tell_their_lines_where_redis_refuses(
    real: World, gateway: Gateway, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user of Redis that may read nothing of ours."""
    log = tmp_path / "api.log"
    log.write_text("2026-09-21T14:13:20.000Z INFO warmlane.lanes event=submit job=01J lane=big\n")
    await real.store.command("ACL", "SETUSER", "blind", "on", ">secret", "~nothing:*", "+@read")
    monkeypatch.setenv("GATEWAY_REDIS_URL", f"redis://blind:secret@127.0.0.1:{redis_server.port}/0")
    try:
        ran = await asyncio.to_thread(gateway, "logs", "01J", "--file", str(log))
        assert ran.code == 0 and "submit" in ran.out and "Only log lines are told." in ran.err
    finally:
        await real.store.command("ACL", "DELUSER", "blind")


async def test_a_reading_store_sends_nothing_else(real: World, redis_server: RedisServer) -> None:
    store = await ReadingStore.open(redis_server.url, namespace=real.store.keys.namespace)
    try:
        for call in (
            lambda: store.command("DEL", "x"),
            lambda: store.run("sweep", [], []),
            lambda: PolicyBook(store).apply("models: {a: {backend: simulated, model: x}}"),
        ):
            with pytest.raises(TypeError):
                await call()
    finally:
        await store.close()


@pytest.mark.real
async def test_a_lane_of_ten_thousand_jobs_is_looked_at_quickly(real: World, gateway: Gateway) -> None:
    """A backlog is when somebody looks. The entries are made in one script: submitting them would take longer."""
    await real.apply(policy_with(("maxQueue: 3", "maxQueue: 10000")))
    k, now = real.store.keys, await real.store.now_ms()
    made = """
    redis.call("XGROUP", "CREATE", KEYS[1], "workers", "0", "MKSTREAM")
    for i = 1, 10000 do
      local id = string.format("job%05d", i)
      local at = tostring(ARGV[1] - 20000 + i)
      local entry = redis.call("XADD", KEYS[1], "*", "job", id, "caller", "c" .. (i % 7), "submitted", at,
        "session", "", "promote_at", "0", "tokens", "1", "priority", "interactive", "zone", "local")
      redis.call("HSET", ARGV[2] .. id, "id", id, "state", "queued", "lane", "big", "model", "big", "entry", entry,
        "caller", "c" .. (i % 7), "submitted_at", at, "give_up_at", ARGV[1] + 60000, "asked", "big")
      redis.call("ZADD", KEYS[2], ARGV[1] + 60000, id)
    end"""
    await real.store.command("EVAL", made, 2, k.lane("big"), k.due, now, k.job(""))
    store = await ReadingStore.open(real.store.url, namespace=k.namespace)
    took: dict[str, float] = {}
    try:
        for name, look in {
            "lanes": lambda: lanes.look(store, real.book.active),
            "jobs": lambda: listing.find(store, real.book.active, listing.Wanted()),
            "caller": lambda: listing.find(store, real.book.active, listing.Wanted(caller="c3")),
            "running": lambda: listing.find(
                store, real.book.active, listing.Wanted(states=frozenset({State.STREAMING}))
            ),
            "scheduled": lambda: listing.find(
                store, real.book.active, listing.Wanted(states=frozenset({State.SCHEDULED}))
            ),
            "job": lambda: story.tell(store, "job05000"),
        }.items():
            began = time.perf_counter()
            told = await look()
            took[name] = time.perf_counter() - began
            if name == "lanes":
                assert told.lanes[0].waiting == 10_000 and told.lanes[0].oldest_waiting_ms >= 19_999
            if name == "jobs":
                assert len(told.jobs) == 50 and told.unseen == 9_950 and told.jobs[0].id == "job00001"
            if name == "caller":
                assert {job.caller for job in told.jobs} == {"c3"}
    finally:
        await store.close()
    assert max(took.values()) < 0.5, took  # measured: 2 to 30 ms
    ran = await asyncio.to_thread(gateway, "inspect", "jobs")
    assert "note: 50 jobs shown; 9950 more were left out: --limit (now 50)" in ran.out


# --- at the command line -----------------------------------------------------------------------------------------


@pytest.mark.real
async def test_tables_for_people(real: World, gateway: Gateway) -> None:
    ids = await busy(real)

    async def seen(*words: str) -> str:
        ran = await asyncio.to_thread(gateway, "inspect", *words)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    text = await seen("lanes")
    assert text.splitlines()[0].split() == "LANE MODEL PRIORITY WAITING RUNNING OLDEST ASKING HELD BY".split()
    assert "policy: version 1" in text and "note: 1 job in no lane yet: to start later" in text
    assert "gpu1 1" in text and "-> small after 2s" in text
    text = await seen("jobs")
    assert all(ids[word] in text for word in ("streams", "waits", "later", "moved")) and ids["done"] not in text
    assert "attempt 1 on gpu1" in text and "tries its fallback" in text and "starts in" in text
    text = await seen("jobs", "--state", "failed")
    assert ids["failed"] in text and "runtime_failed" in text
    assert (await seen("jobs", "--caller", "nobody")).strip() == "no such jobs"
    text = await seen("job", ids["failed"])
    assert "error" in text and "runtime_failed: it broke" in text and "zebra" not in text
    text = await seen("job", ids["waits"])
    assert "queued, behind 0" in text and "gives up" in text and "reader" in text
    text = await seen("hosts")
    assert "gpu1" in text and "big" in text and "0/2" in text
    text = await seen("locks")
    assert "gpu1/boot1" in text and "EPOCH" in text
    text = await seen("dead")
    assert ids["failed"] in text and "it broke" in text and "zebra" not in text
    text = await seen("keys")
    assert "job:<id>" in text and "fault" not in text


@pytest.mark.real
async def test_without_a_policy_or_a_redis_it_says_so(
    redis_server: RedisServer, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_REDIS_URL", redis_server.url)
    monkeypatch.setenv("GATEWAY_NAMESPACE", "nothing-here")
    lanes_ran = await asyncio.to_thread(gateway, "inspect", "lanes")
    lanes_ran.complains(1, "No policy has been applied to this Redis (namespace nothing-here) yet")
    for words, said in (
        (["jobs"], "no such jobs"), (["hosts"], "no worker has told"), (["locks"], "no wake locks"),
        (["dead"], "no dead letters"), (["keys"], "no keys"),
    ):  # fmt: skip
        ran = await asyncio.to_thread(gateway, "inspect", *words)
        assert ran.code == 0 and said in ran.out
    (await asyncio.to_thread(gateway, "inspect", "job", "x")).complains(1, "x")
    monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://127.0.0.1:9/0")
    for words in VERBS:
        (await asyncio.to_thread(gateway, "inspect", *words)).complains(3, "Redis does not answer at 127.0.0.1:9")


@pytest.mark.real
async def test_watching_goes_on_when_redis_goes_away(
    real: World, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is when somebody watches. Ctrl-C is its proper end."""
    looks = iter([None, errors.BrokerUnavailable("Redis does not answer"), None, KeyboardInterrupt()])
    look = lanes.look

    async def next_look(store: Store, active: Active) -> lanes.Lanes:
        if (what := next(looks)) is not None:
            raise what
        return await look(store, active)

    monkeypatch.setattr(lanes, "look", next_look)
    ran = await asyncio.to_thread(gateway, "inspect", "lanes", "--watch", "--every", "0.2", "--json")
    first, away, again = (json.loads(line) for line in ran.out.splitlines())
    assert ran.code == 0 and away == {"error": "Redis does not answer"}
    assert first["lanes"] == again["lanes"] and first["at_ms"] < again["at_ms"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobs", "--state", "tired"], "'tired' is no state: there are live, running"),
        (["jobs", "--older-than", "soon"], "'soon' is no length of time"),
    ],
)
def test_wrong_words_are_a_2(gateway: Gateway, words: list[str], said: str) -> None:
    gateway("inspect", *words).complains(2, said)


@pytest.mark.real
async def test_a_lane_that_the_policy_lacks_is_named(real: World, gateway: Gateway) -> None:
    ran = await asyncio.to_thread(gateway, "inspect", "jobs", "--lane", "bgi")
    ran.complains(1, "no lane bgi", "big")


def test_what_must_end_is_what_the_invariants_say() -> None:
    """The invariants are the tests' own word; the command must not be milder."""
    from tests.support.invariants import _MUST_EXPIRE

    assert set(_MUST_EXPIRE) <= keys.MUST_END
