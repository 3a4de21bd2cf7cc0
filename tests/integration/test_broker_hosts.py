"""Hosts, the wake lock, and the sweep that repairs what somebody broke by hand."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from broker import admission, errors, hosts, jobs, lanes, wake
from broker.dispatch import ModelView
from broker.hosts import Fleet
from broker.keyspace import GROUP
from broker.records import HostRecord, JobRecord, Learned, ModelFacts, ModelOnHost
from broker.snapshots import Snapshots
from tests.support.broker_world import LONG_MS, POLICY, World, until_gone
from tests.support.invariants import take, violations


async def test_a_host_tells_and_everybody_sees_it(world: World) -> None:
    """Numbers survive the way through JSON and Lua, and a later beat leaves nothing of an earlier one."""
    told = ModelOnHost(
        state="warm", reason='said "ready"', slots_total=3, slots_settling=1, first_token_ewma_ms=1180.5,
        memory_bytes=34_359_738_368, since=world.now,
    )  # fmt: skip
    host = HostRecord(name="gpu1", boot="boot1", beat_at=world.now, memory_total=137_438_953_472)
    await hosts.beat(world.store, host, {"big": told, "small": ModelOnHost(state="waking", since=world.now)})
    await hosts.learn(world.store, "big", load_ms=31_000.5, service_ms=900)
    picture = await world.fleet.look()
    assert picture.on_host["big"]["gpu1"] == told
    assert picture.hosts["gpu1"] == host == await hosts.read(world.store, "gpu1")
    assert picture.facts["big"] == ModelFacts(load_ms=31_000.5, service_ms=900)
    view = world.fleet.view("big")
    assert (view.availability, view.slots_total, view.slots_free, view.first_token_ms) == ("warm", 2, 2, 1180.5)
    assert world.fleet.view("side").availability == "waking"
    assert world.fleet.view("far").availability == "unavailable"
    await world.claim(await world.submit())
    await world.submit()
    await world.fleet.look()
    assert (world.fleet.view("big").slots_free, world.fleet.picture.waiting["big"]) == (1, 1)
    await hosts.beat(world.store, replace(host, draining=True), {"big": told})
    await world.fleet.look()
    assert world.fleet.view("big").availability == "unavailable"  # it finishes what it has and takes nothing new
    await hosts.beat(world.store, HostRecord(name="gpu1", boot="boot1"), {"big": ModelOnHost()})
    assert (await world.fleet.look()).on_host["big"]["gpu1"] == ModelOnHost()
    await world.healthy()


async def test_an_older_look_never_replaces_a_newer_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks at once: the slower one, with the older answers in hand, must not have the last word."""
    await world.warm(big=1)
    run, slow, overtaken = world.store.run, asyncio.Event(), asyncio.Event()

    async def first_is_slow(verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        found = await run(verb, keys, args)
        if verb == "look" and not slow.is_set():
            slow.set()
            await overtaken.wait()
        return found

    monkeypatch.setattr(world.store, "run", first_is_slow)
    older = asyncio.create_task(world.fleet.look(), name="older look")
    await slow.wait()
    await hosts.leave(world.store, HostRecord(name="gpu1", boot="boot1"), ["big"])
    newer = asyncio.create_task(world.fleet.look(), name="newer look")
    await asyncio.wait({newer}, timeout=0.2)
    overtaken.set()
    assert "gpu1" in (await older).hosts
    assert "gpu1" not in (await newer).hosts
    assert world.fleet.picture is newer.result()


async def test_many_who_want_a_fresh_picture_share_one_look(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty refusals in one moment are one question to Redis; a picture that is fresh enough is not asked for."""
    fleet, run, looks = Fleet(world.store, world.book), world.store.run, 0

    async def counted(verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        nonlocal looks
        looks += verb == "look"
        return await run(verb, keys, args)

    monkeypatch.setattr(world.store, "run", counted)
    assert await asyncio.gather(*(fleet.look_again(older_than_s=60) for _ in range(60))) == [True] * 60
    assert looks == 1
    assert not await fleet.look_again(older_than_s=60)
    assert looks == 1


async def test_a_hosts_name_belongs_to_one_boot(world: World) -> None:
    """A second worker with the same name is refused until the first is proved dead or silent."""
    await world.warm(big=2)
    second = HostRecord(name="gpu1", boot="boot2")
    async with world.refused(errors.LockHeld) as caught:
        await hosts.beat(world.store, second, {"big": ModelOnHost(state="cold")})
    assert "boot1" in str(caught.value)
    await hosts.beat(world.store, second, {"big": ModelOnHost(state="cold")}, take=True, lease_ms=100)
    async with world.refused(errors.LockHeld):
        await hosts.beat(world.store, HostRecord(name="gpu1", boot="boot1"), {}, lease_ms=LONG_MS)
    await gone(world, world.store.keys.host("gpu1"))
    await hosts.beat(world.store, HostRecord(name="gpu1", boot="boot3"), {}, lease_ms=LONG_MS)
    await hosts.leave(world.store, HostRecord(name="gpu1", boot="boot2"), ["big"])
    assert await hosts.read(world.store, "gpu1")
    await hosts.leave(world.store, HostRecord(name="gpu1", boot="boot3"), ["big"])
    assert await hosts.read(world.store, "gpu1") is None


async def test_a_host_that_takes_its_leave_late_is_not_called_silent(world: World) -> None:
    """Its lease may run out while it unloads what it has; whoever has the name by then keeps it."""
    left = HostRecord(name="gpu1", boot="boot1")
    snapshots = Snapshots(world.store, world.book, world.fleet)
    await hosts.beat(world.store, left, {}, lease_ms=1)
    await gone(world, world.store.keys.host("gpu1"))
    assert [host.name for host in (await snapshots.latest()).silent] == ["gpu1"]
    await hosts.leave(world.store, left, ["big"])
    assert (await snapshots.latest()).silent == ()
    await hosts.beat(world.store, HostRecord(name="gpu1", boot="boot2"), {}, lease_ms=LONG_MS)
    await hosts.leave(world.store, left, ["big"])
    assert [host.name for host in (await snapshots.latest()).hosts] == ["gpu1"]


async def gone(world: World, key: str) -> None:
    """Waits until a key has expired."""
    await until_gone(world, lambda s: key in s.keys)


async def test_a_silent_host_and_an_unknown_model_are_forgotten(world: World) -> None:
    await world.warm(big=1)
    await hosts.learn(world.store, "old-model", load_ms=1)
    await wake.take(world.store, "old-model", host="gpu1", boot="boot1", ttl_ms=LONG_MS)
    await wake.take(world.store, "big", host="gpu1", boot="boot1", ttl_ms=LONG_MS)
    await hosts.learn(world.store, "big", load_ms=1)
    for model in ("old-model", "big"):
        await hosts.learn_here(world.store, model, "gpu1", Learned(footprint_bytes=7, load_ms=2))
    world.now += hosts.FORGET_HOST_MS
    await hosts.forget(world.store, known={"big", "small", "far"})
    names = (await take(world.store)).keys
    k = world.store.keys
    assert k.hosts not in names and k.model("old-model") not in names and k.wake_epoch("old-model") not in names
    assert k.learned("old-model", "gpu1") not in names
    assert k.learned("big", "gpu1") in names, "a box that was off for a weekend need not learn it all again"
    assert k.model("big") in names and k.wake_epoch("big") in names and k.model_on_host("big", "gpu1") in names


async def test_what_a_load_showed_is_kept_by_host_and_for_hosts_that_never_loaded_it(world: World) -> None:
    """The same weights take other memory and time on another box; where nothing is known, the last box's word helps."""
    await hosts.learn_here(world.store, "big", "gpu1", Learned(footprint_bytes=21 << 30, load_ms=31_000.5))
    await hosts.learn_here(world.store, "big", "gpu2", Learned(footprint_bytes=23 << 30, load_ms=9_000))
    assert await hosts.learned_here(world.store, "big", "gpu1") == Learned(footprint_bytes=21 << 30, load_ms=31_000.5)
    assert await hosts.learned_here(world.store, "big", "gpu3") == Learned()
    facts = (await world.fleet.look()).facts["big"]
    assert (facts.footprint_bytes, facts.load_ms) == (23 << 30, 9_000)
    assert await world.store.command("PTTL", world.store.keys.learned("big", "gpu1")) > hosts.LEARNED_MS / 2


async def test_a_model_that_fits_nowhere_is_unavailable_with_the_numbers(world: World) -> None:
    """On every able host; one that may have it, or has it, makes it available."""
    cold, words = ModelOnHost(state="cold"), "big needs 21000 MB; 900 MB are free"
    unfit = ModelOnHost(state="cold", unfit=True, reason=words)

    async def tells(**hosts_tell: ModelOnHost) -> ModelView:
        for host, told in hosts_tell.items():
            await world.tell(host, {"big": told})
        await world.fleet.look()
        return world.fleet.view("big")

    view = await tells(gpu1=unfit)
    assert (view.availability, view.reason) == ("unavailable", words)
    assert (await tells(gpu2=cold)).availability == "cold"
    assert (await tells(gpu2=ModelOnHost(state="quarantined", reason="it broke"))).availability == "unavailable"
    assert (await tells(gpu2=ModelOnHost(state="waking"))).availability == "waking"
    assert (await tells(gpu2=ModelOnHost(state="warm", slots_total=1))).availability == "warm"
    assert (await tells(gpu1=cold, gpu2=unfit)).availability == "cold"


async def test_a_cold_start_is_predicted_from_the_host_that_loads_fastest(world: World) -> None:
    await hosts.learn(world.store, "big", load_ms=9_000)
    await world.tell("gpu1", {"big": ModelOnHost(state="cold")})
    assert (await world.fleet.look()).view("big", ["big"]).load_ms == 9_000
    await world.tell("gpu1", {"big": ModelOnHost(state="cold", load_ms=4_000)})
    await world.tell("gpu2", {"big": ModelOnHost(state="cold", load_ms=2_000, unfit=True)})
    assert (await world.fleet.look()).view("big", ["big"]).load_ms == 4_000


async def test_one_wake_at_a_time(world: World) -> None:
    """Promise 6: of many who ask at once one gets the lock; it renews it and gives it back."""
    asked = [wake.take(world.store, "big", host=f"gpu{n}", boot="b", ttl_ms=LONG_MS) for n in range(20)]
    [lock] = [got for got in await asyncio.gather(*asked) if got is not None]
    assert await wake.holder(world.store, "big") == lock.value == f"{lock.host}/b/1"
    assert await wake.take(world.store, "big", host=lock.host, boot="b") is None
    assert await wake.keep(world.store, lock, ttl_ms=LONG_MS)
    before = await take(world.store)
    await wake.drop(world.store, wake.WakeLock("big", "other", "b", 1))
    assert not before.marks(await take(world.store))
    await wake.drop(world.store, lock)
    assert await wake.holder(world.store, "big") == ""
    again = await wake.take(world.store, "big", host="gpu7", boot="b", ttl_ms=LONG_MS)
    assert again is not None and again.epoch == 2
    await world.healthy()


async def test_a_holder_takes_its_free_lock_again_and_a_late_one_does_not(world: World) -> None:
    """After an outage the lock may have expired: its holder goes on, unless another wake began in between."""
    first = await wake.take(world.store, "big", host="gpu1", boot="b", ttl_ms=50)
    assert first is not None
    await gone(world, world.store.keys.wake("big"))
    assert await wake.keep(world.store, first, ttl_ms=50)
    assert await wake.holder(world.store, "big") == first.value
    await gone(world, world.store.keys.wake("big"))
    second = await wake.take(world.store, "big", host="gpu2", boot="b", ttl_ms=LONG_MS)
    assert second is not None and second.epoch == 2
    assert not await wake.keep(world.store, first)
    await wake.drop(world.store, second)
    assert not await wake.keep(world.store, first)
    assert await wake.holder(world.store, "big") == ""


async def test_a_restarted_worker_breaks_its_own_dead_boots_lock(world: World) -> None:
    dead = await wake.take(world.store, "big", host="gpu1", boot="boot1", ttl_ms=LONG_MS)
    assert dead is not None
    assert await wake.take(world.store, "big", host="gpu2", boot="boot2") is None
    mine = await wake.take(world.store, "big", host="gpu1", boot="boot2", ttl_ms=LONG_MS)
    assert mine is not None and mine.epoch == 2
    assert not await wake.keep(world.store, dead)
    assert await wake.holder(world.store, "big") == mine.value
    await world.healthy()


async def test_the_sweep_repairs_planted_damage(world: World) -> None:
    """Entries without a live job, twins of an entry and lost instants, over several pages; the healthy stay."""
    store, lane = world.store, world.store.keys.lane("big.batch")
    good = [await world.submit("big.batch") for _ in range(7)]
    await world.claim(good[0])
    vanished = await world.submit("big.batch")
    await store.command("DEL", store.keys.job(vanished), store.keys.request(vanished))
    await store.command("ZREM", store.keys.due, vanished)
    taken = await world.submit("big.batch")
    await world.claim(taken)
    await store.command("DEL", store.keys.job(taken), store.keys.request(taken))
    await store.command("ZREM", store.keys.due, taken)
    ended = await world.submit("big.batch")
    entry = (await world.job(ended)).entry
    await jobs.cancel(store, ended)
    for twin in (ended, good[1]):
        await store.command("XADD", lane, "*", "job", twin)
    await store.command("XADD", lane, "*", "something", "else")
    held = await store.command("XADD", lane, "*", "job", ended)
    claim = "redis.call('XCLAIM', KEYS[1], ARGV[1], 'x', '0', ARGV[2], 'FORCE', 'JUSTID')"
    await store.command("EVAL", claim, 1, lane, GROUP, held)
    await store.command("ZREM", store.keys.due, good[0], good[2])
    assert entry and violations(await take(store))
    assert await lanes.sweep(store, "big.batch", page=3) == (6, 2)
    s = await world.healthy()
    assert len(s.lanes["big.batch"].entries) == 7
    assert await lanes.sweep(store, "big.batch") == (0, 0)
    assert not s.marks(await take(store))
    assert await lanes.sweep(store, "small") == (0, 0)


async def test_a_load_that_waits_has_not_begun(world: World) -> None:
    """Else it would be predicted to end at any moment, for as long as it waits for another's."""
    loading = ModelOnHost(state="waking", since=world.now - 30_000)
    await world.tell("gpu1", {"big": loading})
    assert world.fleet.view("big").waking_since == world.now - 30_000
    await world.tell("gpu1", {"big": replace(loading, reason="waits for its runtime to end another load")})
    assert world.fleet.view("big").waking_since == 0


async def test_a_quarantine_holds_on_every_host(world: World) -> None:
    """Also where nobody has tried the model since: who asks for it there is told at once."""
    await world.tell("gpu1", {"big": ModelOnHost(state="cold")})
    assert world.fleet.view("big").availability == "cold"
    await hosts.learn(world.store, "big", quarantined_until=world.now + 5_000, failure="its file is broken")
    await world.fleet.look()
    view = world.fleet.view("big")
    assert (view.availability, view.reason) == ("unavailable", "its file is broken")
    assert view.aside_until == world.now + 5_000
    world.now += 5_001
    await world.fleet.look()
    view = world.fleet.view("big")
    assert (view.availability, view.aside_until) == ("cold", 0)


async def test_a_refusal_for_a_quarantine_says_when_it_is_over(world: World) -> None:
    """Within 30 s, as every Retry-After; where nobody knows when it ends, a few seconds."""
    await world.apply(POLICY.replace("    fallback: small\n", ""))

    async def told(left_ms: int) -> int:
        await hosts.learn(world.store, "big", quarantined_until=world.now + left_ms, failure="its file is broken")
        await world.fleet.look()
        with pytest.raises(errors.ModelUnavailable, match="its file is broken") as refused:
            await admission.admit(
                world.store, world.book, world.fleet, JobRecord(id=world.new_id(), asked="big"), b"{}"
            )
        return refused.value.retry_after_s

    await world.tell("gpu1", {"big": ModelOnHost(state="quarantined", reason="its file is broken")})
    assert [await told(left_ms) for left_ms in (75_000, 17_200, 300)] == [30, 18, 1]
    assert await told(-1) == 5, "its worker has not said yet that it is over"
    await world.tell("gpu1", {"big": ModelOnHost(state="cold", unfit=True, reason="its file is broken and too big")})
    assert await told(17_200) == 5, "it fits on no host, quarantine or not"
