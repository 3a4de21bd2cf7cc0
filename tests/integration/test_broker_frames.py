"""How an answer reaches its readers: every frame once and in order, whatever pub/sub loses."""

import asyncio
import random

import pytest

from broker import errors, jobs
from broker.frames import CHECK_EVERY_S, QUEUE_FRAMES, FrameReader, Restarted, replay
from broker.records import Frame
from tests.support.broker_world import World, fake_world, hub_of
from tests.support.waiting import until

DRAINED = errors.WorkerLost("drained")


async def read_on(reader: FrameReader, *, timeout_s: float = 10) -> list[Frame | Restarted]:
    """Everything up to the terminal frame."""
    found: list[Frame | Restarted] = []
    async with asyncio.timeout(timeout_s):
        while True:
            got = await reader.next()
            assert got is not None
            found.append(got)
            if isinstance(got, Frame) and got.terminal:
                return found


def told(found: list[Frame | Restarted]) -> list[str]:
    return [f"restarted {x.attempt}" if isinstance(x, Restarted) else f"{x.id} {x.kind}" for x in found]


async def test_two_hundred_readers_hear_everything_in_order(world: World) -> None:
    """One listening connection, twenty jobs, ten readers each."""
    async with hub_of(world) as hub:
        ids = [await world.submit("big.batch") for _ in range(20)]
        reading = []
        for job_id in ids:
            for n in range(10):
                await jobs.attach(world.store, job_id, reader=f"api1/{n}", lease_ms=60_000, sees=False)
                reading.append(asyncio.create_task(read_on(hub.open(job_id)), name=f"reader of {job_id}"))

        async def serve(job_id: str) -> None:
            held = await world.stream(job_id, *(b"%d" % n for n in range(8)))
            await jobs.end(world.store, held, "finish", seq=9, data=b"last")

        await asyncio.gather(*(serve(job_id) for job_id in ids))
        everything = await asyncio.gather(*reading)
    expected = [f"1-{n} content" for n in range(1, 10)] + ["1-10 done"]
    assert all(told(found) == expected for found in everything) and len(everything) == 200
    await world.healthy()


async def test_messages_that_get_lost_are_read_from_the_log(world: World) -> None:
    """Every second message is dropped; the gap is noticed at the next one."""
    async with hub_of(world) as hub:
        heard, count = hub._heard, 0

        def deaf(channel: str, message: bytes) -> None:
            nonlocal count
            count += 1
            if count % 2 == 0:
                heard(channel, message)

        job_id = await world.submit(reader="api1/r")
        reader = hub.open(job_id)
        hub._heard = deaf  # type: ignore[method-assign]
        hub_heard = asyncio.create_task(read_on(reader), name="reader")
        held = await world.stream(job_id, *(b"%d" % n for n in range(20)))
        await jobs.end(world.store, held, "finish")
        found = await hub_heard
    assert told(found) == [f"1-{n} content" for n in range(1, 21)] + ["1-21 done"]


@pytest.mark.real
async def test_a_cut_connection_loses_nothing(world: World) -> None:
    """The server closes the listening connection mid-stream, as it does to a client that reads too slowly."""
    if world.store.name == "fake":
        pytest.skip("fakeredis has no connections to cut")
    async with hub_of(world) as hub:
        job_id = await world.submit(reader="api1/r")
        reader = hub.open(job_id)
        held = await world.stream(job_id, b"1")
        assert told([x for x in [await reader.next(timeout_s=5)] if x]) == ["1-1 content"]
        for cut in range(3):
            hub.listening.clear()
            assert await kill_ears(world) == 1
            for seq in range(2 + 2 * cut, 4 + 2 * cut):
                await jobs.emit(world.store, held, seq, b"x")
            async with asyncio.timeout(5):
                await hub.listening.wait()
        await jobs.end(world.store, held, "finish")
        found = await read_on(reader)
    assert told(found) == [f"1-{n} content" for n in range(2, 8)] + ["1-8 done"]


async def kill_ears(world: World) -> int:
    """Cuts the store's listening connection; gives how many there were."""
    listed = (await world.store.command("CLIENT", "LIST")).decode().splitlines()
    fields = [dict(word.split("=", 1) for word in line.split(" ") if "=" in word) for line in listed]
    ears = [f["id"] for f in fields if f["name"] == f"{world.store.name}-ears"]
    for connection in ears:
        await world.store.command("CLIENT", "KILL", "ID", connection)
    return len(ears)


async def test_a_slow_reader_refills_from_the_log(world: World) -> None:
    """It never holds the connection up and never keeps more than its bound, and still gets every frame."""
    async with hub_of(world) as hub:
        job_id = await world.submit(reader="api1/r")
        reader = hub.open(job_id)
        frames = 2 * QUEUE_FRAMES + 100
        held = await world.stream(job_id, *(b"%d" % n for n in range(frames)))
        await jobs.end(world.store, held, "finish")
        await until(lambda: reader._look, what="a full queue")
        assert len(reader._queue) <= QUEUE_FRAMES
        found = await read_on(reader, timeout_s=CHECK_EVERY_S)
    assert told(found) == [f"1-{n} content" for n in range(1, frames + 1)] + [f"1-{frames + 1} done"]
    assert [f.data for f in found if isinstance(f, Frame)][:-1] == [b"%d" % n for n in range(frames)]


async def test_an_answer_that_starts_again_says_so(world: World) -> None:
    """Who has read of the first attempt hears `Restarted` first; who has not, just reads the second."""
    async with hub_of(world) as hub:
        job_id = await world.submit(reader="api1/r")
        early, idle = hub.open(job_id), hub.open(job_id)
        held = await world.stream(job_id, b"one", b"two")
        assert [(await early.next(timeout_s=5)).id for _ in range(2)] == ["1-1", "1-2"]  # type: ignore[union-attr]
        await jobs.release(world.store, held, loss=True, max_losses=3, error=DRAINED)
        late = hub.open(job_id, after=(1, 1))
        again = await world.stream(job_id, b"uno", b"dos", host="gpu2")
        await jobs.end(world.store, again, "finish")
        rest = ["2-1 content", "2-2 content", "2-3 done"]
        assert told(await read_on(early)) == ["restarted 2", *rest]
        assert told(await read_on(late)) == ["restarted 2", *rest]
        assert [x for x in told(await read_on(idle)) if x.startswith("2-")] == rest


async def test_a_cancel_between_two_attempts_is_heard(world: World) -> None:
    async with hub_of(world) as hub:
        job_id = await world.submit(reader="api1/r")
        early, late = hub.open(job_id), hub.open(job_id, after=(1, 1))
        held = await world.stream(job_id, b"one", b"two", b"three")
        assert await early.next(timeout_s=5)
        await jobs.release(world.store, held, loss=True, max_losses=3, error=DRAINED)
        await jobs.cancel(world.store, job_id)
        for reader in (early, late, hub.open(job_id, after=(1, 3)), hub.open(job_id, after=(0, 1))):
            assert told(await read_on(reader))[-1] == "1-4 cancelled"


async def test_a_resumed_reader_gets_the_rest(world: World) -> None:
    job_id = await world.submit()
    held = await world.stream(job_id, b"1", b"2", b"3")
    await jobs.end(world.store, held, "finish")
    async with hub_of(world) as hub:
        assert told(await read_on(hub.open(job_id, after=(1, 2)))) == ["1-3 content", "1-4 done"]
        assert told([f async for f in replay(world.store, job_id, after=(1, 3))]) == ["1-4 done"]
        reader = hub.open(job_id, after=(1, 4))
        assert await reader.next(timeout_s=0.05) is None
        await world.store.command("DEL", world.store.keys.job(job_id), world.store.keys.frames(job_id))
        reader.look()
        with pytest.raises(errors.NoSuchJob):
            await reader.next(timeout_s=1)


async def test_a_retry_follows_the_job_that_its_key_led_to(world: World) -> None:
    """The reader that was opened for an id that never came to be is forgotten; a new one hears the earlier job."""
    async with hub_of(world) as hub:
        job_id = await world.submit(key="k", reader="api1/r1")
        reader = hub.open("never")
        assert await world.submit(id="never", key="k") == job_id
        hub.close(reader)
        reader = hub.open(job_id)
        reader.look()
        held = await world.stream(job_id, b"one")
        assert told([x for x in [await reader.next(timeout_s=5)] if x]) == ["1-1 content"]
        await jobs.emit(world.store, held, 2, b"two")
        assert told([x for x in [await reader.next(timeout_s=1)] if x]) == ["1-2 content"]
        hub.close(reader)
        assert not hub._readers


async def test_the_log_decides_when_redis_is_away_for_a_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await world.submit()
    held = await world.stream(job_id, b"1")
    await jobs.end(world.store, held, "finish")
    reader, command, failures = FrameReader(world.store, job_id, after=(0, 0)), world.store.command, 0

    async def flaky(*args: str) -> object:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise errors.BrokerUnavailable("away")
        return await command(*args)

    monkeypatch.setattr(world.store, "command", flaky)
    reader.look()
    assert told(await read_on(reader)) == ["1-1 content", "1-2 done"]
    assert failures == 3


async def test_a_wait_ends_in_time_while_redis_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The api must tell its client `still waiting` during an outage too."""

    async def away(*_: str) -> object:
        raise errors.BrokerUnavailable("away")

    monkeypatch.setattr(world.store, "command", away)
    reader = FrameReader(world.store, "job", after=(1, 1))
    async with asyncio.timeout(1):
        assert await reader.next(timeout_s=0.15) is None


@pytest.mark.parametrize("seed", range(25))
async def test_any_loss_delay_and_order_of_messages(seed: int) -> None:
    """Messages come late, twice, not at all or in the wrong order; what the client gets is right every time."""
    rng = random.Random(seed)
    async with fake_world() as world:
        await world.apply()
        job_id = await world.submit()
        reader = FrameReader(world.store, job_id)
        got: list[Frame | Restarted] = []
        air: list[Frame] = []

        async def some_time() -> None:
            air.extend(f for f in await world.log(job_id) if rng.random() < 0.7)
            rng.shuffle(air)
            for _ in range(rng.randrange(len(air) + 1)):
                reader.push(air.pop())
            while rng.random() < 0.8 and (found := await reader.next(timeout_s=0)) is not None:
                got.append(found)

        for last_attempt in (False, rng.random() < 0.5, True):
            held = await world.stream(job_id)
            for seq in range(2, rng.randrange(2, 12)):
                await jobs.emit(world.store, held, seq, b"%d" % seq)
                await some_time()
            if last_attempt:
                break
            await jobs.release(world.store, held, loss=False, max_losses=3, error=DRAINED)
        await jobs.end(world.store, held, "finish")
        for frame in air:
            reader.push(frame)
        if not (got and isinstance(got[-1], Frame) and got[-1].terminal):
            reader.look()
            got += await read_on(reader)
        check(got, await world.log(job_id))


def check(got: list[Frame | Restarted], log: list[Frame]) -> None:
    """Within an attempt 1, 2, 3 …; a change of attempt is said before it, if anything was read; the last is whole."""
    attempt, seq = 0, 0
    for x in got:
        if isinstance(x, Restarted):
            assert x.attempt > attempt and seq > 0, told(got)
            attempt, seq = x.attempt, 0
        else:
            if seq == 0:
                attempt = x.attempt
            assert (x.attempt, x.seq) == (attempt, seq + 1), told(got)
            seq += 1
    assert [x for x in got if isinstance(x, Frame)][-len(log) :] == log, told(got)


async def test_an_end_that_comes_during_a_look_hides_no_frame_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look finds nothing after what was given; by the time it asks for an end, the last frames have come too."""
    job_id = await world.submit()
    held = await world.stream(job_id, b"1")
    reader = FrameReader(world.store, job_id)
    reader.look()
    assert told([x for x in [await reader.next(timeout_s=1)] if x]) == ["1-1 content"]
    command = world.store.command

    async def late(*words: object) -> object:
        if words[0] == "XREVRANGE":
            await jobs.end(world.store, held, "finish", seq=2, data=b"2")
        return await command(*words)  # type: ignore[arg-type]

    with monkeypatch.context() as for_now:
        for_now.setattr(world.store, "command", late)
        reader.look()
        assert await reader.next(timeout_s=0.01) is None
    reader.look()
    found = [await reader.next(timeout_s=1) for _ in range(2)]
    assert told([x for x in found if x]) == ["1-2 content", "1-3 done"]


async def test_an_end_that_is_all_that_was_heard_hides_no_frame_before_it(world: World) -> None:
    """Whoever hears nothing of an attempt but its end asks the log what came before."""
    job_id = await world.submit()
    held = await world.stream(job_id, b"1", b"2")
    reader = FrameReader(world.store, job_id)
    await jobs.end(world.store, held, "finish")
    reader.push((await world.log(job_id))[-1])
    found = [await reader.next(timeout_s=1) for _ in range(3)]
    assert told([x for x in found if x]) == ["1-1 content", "1-2 content", "1-3 done"]
