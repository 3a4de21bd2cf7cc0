"""Parts on their own that die and are not started again, are missing from the start, or run twice."""

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from broker.lanes import READER_LEASE_MS
from broker.lifecycle import State
from tests.chaos.parts import Parts, parts
from tests.chaos.storm import TOLD_S_MAX, Ledger, watched
from tests.support.clients import Told, ask, user
from tests.support.worker_world import eventually, policy, simulated, words

pytestmark = pytest.mark.real

SLOW = {"decodeTps": 20, "prefillTps": 2000}
LOOKS_S = 2.0
"""How long after a lease somebody may take to see that it has ended."""


def body(model: str, tokens: int, *, stream: bool = True) -> dict[str, object]:
    return {"model": model, "messages": user("go on"), "max_tokens": tokens, "stream": stream}


async def job(http: httpx.AsyncClient, url: str, job_id: str) -> dict[str, object]:
    found: dict[str, object] = (await http.get(f"{url}/v1/jobs/{job_id}")).json()
    return found


async def the_dead_stay_dead(directory: Path) -> None:
    """A worker and an api go for good: two schedulers, another worker and another api do what is left to do."""
    models = {
        "shared": simulated(maxConcurrent=4, maxQueue=8, memoryMb=1, options=SLOW),
        "other": simulated(maxConcurrent=4, maxQueue=8, memoryMb=1, hosts=["worker2"], options=SLOW),
    }
    names = ("api1", "api2", "scheduler1", "scheduler2", "worker1")
    async with parts(directory, policy(models, headerHoldMs=1000), *names) as house:
        await house.until_warm("shared", workers=("worker1",))
        house.start("worker2")
        await house.until_warm("other", workers=("worker2",))
        async with watched(house.redis.url) as ledger, httpx.AsyncClient(timeout=60.0) as http:
            async with asyncio.TaskGroup() as tasks:
                seen = tasks.create_task(ask(http, house.api("api1"), body("shared", 2000)))
                unseen = tasks.create_task(ask(http, house.api("api1"), body("shared", 60, stream=False)))
                orphan = tasks.create_task(ask(http, house.api("api2"), body("other", 2000)))
                kept = tasks.create_task(
                    ask(http, house.api("api2"), body("other", 100), x_gateway_on_disconnect="keep")
                )
                keyed = tasks.create_task(ask(http, house.api("api2"), body("other", 100), idempotency_key="again"))
                await asyncio.sleep(1.5)
                dead_at = time.monotonic()
                house.kill("worker1")
                house.kill("api2")
                again = await ask(http, house.api("api1"), body("other", 100), idempotency_key="again")
            tells_who_saw_some(seen.result(), dead_at)
            assert unseen.result().served, unseen.result()
            assert unseen.result().text == words(60)
            assert {told.result().outcome for told in (orphan, kept, keyed)} == {"cut"}
            assert (again.job_id, again.text) == (keyed.result().job_id, words(100))
            await ledger.settled()
        assert not ledger.found, ledger.found
        lost = ledger.jobs[unseen.result().job_id]
        assert (lost.state, lost.attempt, lost.losses, lost.served_by) == (State.DONE, 2, 1, "shared@worker2")
        ends_with_its_reader(ledger, orphan.result())
        assert ledger.jobs[kept.result().job_id].state is State.DONE
        assert ledger.jobs[again.job_id].state is State.DONE
        await keeps_count(house, ledger)


def tells_who_saw_some(told: Told, dead_at: float) -> None:
    """In-band, with a code, within the lease and a little."""
    assert (told.outcome, told.code) == ("told", "worker_lost"), told
    assert told.saw_some
    assert told.ended_at - dead_at < TOLD_S_MAX


def ends_with_its_reader(ledger: Ledger, told: Told) -> None:
    """Nobody generates for a client whose api is gone."""
    left = ledger.jobs[told.job_id]
    assert left.state is State.CANCELLED, left
    assert left.ended_at - left.submitted_at < READER_LEASE_MS + 3000 + LOOKS_S * 1000  # the last renewal was in there


async def keeps_count(house: Parts, ledger: Ledger) -> None:
    """The runtime that lived has made each answer once: no attempt without a claim, none twice."""
    stats = await house.runtime("worker2", "other").stats()
    attempts = sum(job.attempt for job in ledger.jobs.values() if job.model == "other")
    done = sum(job.state is State.DONE for job in ledger.jobs.values() if job.model == "other")
    probes = stats["requests_started"] - attempts
    assert 1 <= probes <= 2, stats  # those of the wake
    assert stats["requests_finished"] - probes == done, stats
    assert stats["requests_aborted"] == 1, stats  # the orphan


async def each_api_looks_after_its_own(directory: Path) -> None:
    """No scheduler: promotion, giving up and recovery come a little later, but they come."""
    never = {"coldStartMs": 600_000}
    models = {
        "cold": simulated(coldStartBudgetMs=1000, fallback="warm", memoryMb=1, options=never),
        "hopeless": simulated(coldStartBudgetMs=1000, memoryMb=1, options=never),
        "warm": simulated(maxConcurrent=4, memoryMb=1, options=SLOW),
    }
    lanes = {"impatient": {"target": "hopeless", "maxWaitMs": 2000}}
    async with parts(directory, policy(models, lanes=lanes, headerHoldMs=5000), "api1", "worker1") as house:
        await house.until_warm("warm")
        async with watched(house.redis.url) as ledger, httpx.AsyncClient(timeout=60.0) as http:
            promoted, given_up, asked = await asyncio.gather(
                ask(http, house.url, body("cold", 5)),
                ask(http, house.url, body("impatient", 5)),
                ask(http, house.url, body("warm", 20, stream=False)),
            )
            await ledger.settled()
        assert promoted.served, promoted
        assert promoted.text == words(5)
        record = ledger.jobs[promoted.job_id]
        assert (record.asked, record.model, record.promotions) == ("cold", "warm", 1)
        assert 1000 <= record.promoted_at - record.submitted_at < 1000 + 3000
        assert (given_up.outcome, given_up.code, given_up.status) == ("refused", "cold_start_deadline", 503), given_up
        assert given_up.retry_after
        assert given_up.ended_at - given_up.started_at < 2.0 + 3.0
        assert asked.served
        assert not ledger.found, ledger.found


async def a_dead_worker_is_found_out(directory: Path) -> None:
    """No scheduler either: the api of the client that waits gives its job to another worker, or tells it so."""
    models = {"calm": simulated(maxConcurrent=4, maxQueue=8, memoryMb=1, options=SLOW)}
    async with parts(directory, policy(models, headerHoldMs=1000), "api1", "worker1") as house:
        await house.until_warm("calm")
        house.start("worker2")
        async with watched(house.redis.url) as ledger, httpx.AsyncClient(timeout=60.0) as http:
            async with asyncio.TaskGroup() as tasks:
                seen = tasks.create_task(ask(http, house.url, body("calm", 2000)))
                unseen = tasks.create_task(ask(http, house.url, body("calm", 60, stream=False)))

                async def both_run() -> bool:
                    held = await ledger.look()
                    return held is not None and sum(j.state is State.STREAMING for j in held.jobs.values()) == 2

                await eventually(both_run, what="both run")
                dead_at = time.monotonic()
                house.kill("worker1")
            await ledger.settled()
        tells_who_saw_some(seen.result(), dead_at + 1.0)  # an api waits a second longer than a scheduler
        assert unseen.result().text == words(60)
        assert not ledger.found, ledger.found


@pytest.mark.long
async def test_nobody_is_stranded(tmp_path: Path) -> None:
    """Three gateways side by side, because most of it is waiting for leases to end."""
    async with asyncio.TaskGroup() as tasks:
        for scene in (the_dead_stay_dead, each_api_looks_after_its_own, a_dead_worker_is_found_out):
            (directory := tmp_path / scene.__name__).mkdir()
            tasks.create_task(scene(directory), name=scene.__name__)
