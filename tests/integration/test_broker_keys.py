"""Counts that hold at every moment of a busy run, and keys that are gone when their time is over."""

import asyncio
import itertools
import random

import pytest

from broker import errors, hosts, jobs, lanes, wake
from broker.lifecycle import State
from broker.records import HostRecord, JobRecord, Learned, ModelOnHost
from tests.support.broker_world import World, turns, until_gone
from tests.support.invariants import Snapshot, left_over, take, undone, violations

KEEP_MS = 400
OUTLIVE_MS = {"active:<lane>": 60_000, "spent:<caller>:<day>": 2 * 86_400_000, "jobs:<caller>": 2 * 86_400_000}
"""What may stay longer than the jobs that it was made for, and for how long."""


def outlives(s: Snapshot, name: str) -> str:
    """The family of such a key, "" for any other."""
    family = s.names.family(name)
    return family.pattern if family is not None and family.pattern in OUTLIVE_MS else ""


async def test_counts_agree_at_random_moments_of_a_busy_run(world: World) -> None:
    """Six clients, three workers, a scheduler and a nervous operator; everything is read in one script, forty times."""
    rng = random.Random(7)
    await world.warm(big=2, small=1)
    stop = asyncio.Event()
    lost = (errors.Lost, errors.Refused, errors.BadTransition)

    async def clients() -> None:
        while not stop.is_set():
            try:
                await world.submit(
                    rng.choice(["big", "big", "small", "side"]), reader=rng.choice(["", "api1/r"]),
                    grace_ms=rng.choice([-1, 0]), stream=rng.random() < 0.5,
                    key=rng.choice(["", "", f"k{rng.randrange(99)}"]),
                )  # fmt: skip
            except errors.LaneFull:
                pass
            await turns(rng.randrange(20))

    async def worker(host: str) -> None:
        while not stop.is_set():
            for lane in ("big", "small", "side"):
                async for waiting in lanes.waiting_entries(world.store, lane, limit=2):
                    try:
                        held = await world.claim(waiting.job, host=host)
                        await jobs.first_token(world.store, held, b"1")
                        await jobs.emit(world.store, held, 2, b"2")
                        match rng.randrange(4):
                            case 0:
                                error = errors.RuntimeFailed("broke")
                                await jobs.release(world.store, held, loss=True, max_losses=3, error=error)
                            case 1:
                                await jobs.end(world.store, held, "fail", error=errors.RuntimeFailed("broke"))
                            case 2:
                                await jobs.end(world.store, held, "finish", seq=3, data=b"3")
                    except lost:
                        continue
            await turns(1)

    async def scheduler() -> None:
        while not stop.is_set():
            world.now += 40
            due, _ = await world.due.next(limit=20)
            for job_id in due:
                await world.due.look(job_id)
            await turns(5)

    async def operator() -> None:
        while not stop.is_set():
            live = await world.store.command("ZRANGE", world.store.keys.due, 0, -1)
            if live:
                try:
                    await jobs.cancel(world.store, rng.choice(live).decode())
                except lost:
                    pass
            await turns(40)

    async def watch() -> list[Snapshot]:
        seen = [await take(world.store)]
        while len(seen) < 40 or len(seen[-1].jobs) < 80:
            await turns(rng.randrange(100))
            seen.append(await take(world.store))
        stop.set()
        return seen

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for work in (*(clients() for _ in range(6)), *(worker(f"gpu{n}") for n in range(3)), scheduler(), operator()):
            tasks.create_task(work)
        watching = tasks.create_task(watch())
    pictures = watching.result()
    for before, after in itertools.pairwise(pictures):
        assert violations(after) + undone(before, after) == []
    ended = {job.state for job in pictures[-1].jobs.values()}
    assert ended >= {State.DONE, State.FAILED, State.CANCELLED}


async def test_nothing_is_left_when_its_time_is_over(world: World) -> None:
    """Every kind of job in every way it can end, every lock and host; past the keep time only the table's own stay."""
    await world.tell("gpu1", {"big": ModelOnHost(state="warm", slots_total=9)})

    async def job(**fields: object) -> str:
        asked = {"keep_ms": KEEP_MS, "reader": "api1/r", "key": world.new_id(), "mode": "async"} | fields
        return await world.submit(**asked)  # type: ignore[arg-type]

    done, failed, lost, cancelled, promoted, expired, later = [await job() for _ in range(5)] + [
        await job(lane="small"), await job(not_before=world.now + 100),
    ]  # fmt: skip
    sync = await job(mode="sync", stream=True)
    for ended in (done, sync):
        await jobs.end(world.store, await world.stream(ended), "finish")
    error = errors.RuntimeFailed("broke")
    await jobs.end(world.store, await world.claim(failed), "fail", error=error)
    await jobs.release(world.store, await world.claim(lost), loss=True, max_losses=0, error=error)
    await jobs.cancel(world.store, cancelled)
    await world.promote(promoted, "small")
    world.now += 100
    assert (await world.due.look(later)).outcome == "started"
    world.now += 30_000
    for job_id in (promoted, expired, later):
        assert (await world.due.look(job_id)).outcome == "expired"
    with pytest.raises(errors.BrokerError):
        await jobs.attach(world.store, "nobody", reader="api1/r", lease_ms=1, sees=True)
    await jobs.detach(world.store, done, reader="api1/r")
    await lanes.postpone(world.store, JobRecord(id="nobody"), after_ms=1)
    for model in ("big", "small"):
        await wake.take(world.store, model, host="gpu1", boot="boot1", ttl_ms=KEEP_MS)
    await hosts.beat(world.store, HostRecord(name="gpu1", boot="boot1"), {"big": ModelOnHost()}, lease_ms=KEEP_MS)
    await hosts.learn_here(world.store, "big", "gpu1", Learned(footprint_bytes=1, load_ms=1), keep_ms=KEEP_MS)
    s = await world.healthy()
    assert {j.state for j in s.jobs.values()} == {State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED}
    await until_gone(world, lambda s: [name for name in left_over(s) if not outlives(s, name)])
    s = await world.healthy()
    for name in s.keys:
        if outlives(s, name):
            left_ms = await world.store.command("PTTL", name)
            assert 0 < left_ms <= OUTLIVE_MS[outlives(s, name)]
            await world.store.command("DEL", name)
    s = await world.healthy()
    patterns = {family.pattern for name in s.keys if (family := s.names.family(name))}
    stay = {"lane:<lane>", "model:<model>", "wake:<model>:epoch", "hosts", "dead", "policy"}
    assert patterns == stay | {"usage:<day>", "usage:<day>:<caller>:<lane>:<model>:<model>"}
    assert not any(stream.entries for stream in s.lanes.values())
