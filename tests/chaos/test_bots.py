"""Kills while CI bots hand over their jobs: each is done once, each answer is there, each webhook arrives."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from broker import errors
from broker.store import Store
from tests.chaos.bots import Bots, Mailbox
from tests.chaos.parts import Parts, parts
from tests.chaos.storm import Ledger, seed_of, watched
from tests.support.waiting import until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

NAMES = ("api1", "api2", "scheduler1", "scheduler2", "worker1", "worker2")
BOTS = 8
MAIL_S_MAX = 120.0
"""How long the last webhooks may take after the last job: a few tries at an endpoint that failed now and then."""


def bots_policy() -> str:
    """Two models, losses allowed as the kills need them, and webhooks to this machine."""
    fast = {"decodeTps": 200, "prefillTps": 5000, "coldStartMs": 150}
    models = {
        "big": simulated(maxConcurrent=8, maxQueue=16, memoryMb=1, options=fast),
        "small": simulated(maxConcurrent=4, maxQueue=24, memoryMb=1, options=fast),
    }
    return policy(models, maxLosses=20, webhooks={"allow": ["127.0.0.0/8"]})


async def test_bots_lose_nothing(tmp_path: Path) -> None:
    await run(tmp_path, each=30, kills=7, pause_s=(0.2, 0.8))


@pytest.mark.long
@pytest.mark.timeout(2_400)
async def test_five_thousand_jobs_are_done_once(tmp_path: Path) -> None:
    await run(tmp_path, each=625, kills=10_000, pause_s=(1.0, 4.0))


async def run(tmp_path: Path, *, each: int, kills: int, pause_s: tuple[float, float]) -> None:
    """The bots work; parts are killed as long as they do, `kills` times at most; then everything is compared."""
    seed = seed_of("bots")
    dice = random.Random(seed)
    async with parts(tmp_path, bots_policy(), *NAMES) as house:
        await house.until_ready()
        async with httpx.AsyncClient() as http:
            told = await http.post(f"{house.url}/v1/webhooks/secrets")
            assert told.is_success, told.text
        async with Mailbox(told.json()["secret"], dice).open() as mail, watched(house.redis.url, every_s=4.0) as ledger:
            urls = [house.api("api1"), house.api("api2")]
            bots = Bots(urls, mail.url, seed, BOTS, each)
            killed: Counter[str] = Counter()
            began = time.monotonic()
            working = asyncio.create_task(bots.run(), name="bots")
            order = list(dict.fromkeys(dice.sample([*NAMES, "redis"], len(NAMES) + 1)))
            while not working.done() and killed.total() < kills:
                await asyncio.sleep(dice.uniform(*pause_s))
                name = order[killed.total()] if killed.total() < len(order) else dice.choice([*NAMES, "redis"])
                await kill_and_restart(house, name, ledger, dice)
                killed[name] += 1
            await working
            worked_s = time.monotonic() - began
            await ledger.settled()
            job_ids = {job.job_ids[-1] for job in bots.jobs}
            await mail_has_come(mail, job_ids)
            found = list(dict.fromkeys(ledger.found)) + bots.wrong(may_be_forgotten=bool(ledger.losses))
            found += mail.complaints(job_ids) + await done_once(ledger, job_ids)
            repeats = sum(len(ids) - 1 for ids in mail.seen.values())
            print(
                f"{len(bots.jobs)} jobs in {worked_s:.0f} s, kills {killed.total()} {dict(killed)}; "
                f"{sum(map(len, mail.seen.values()))} webhooks taken, {repeats} of them repeats; "
                f"Redis forgot {len(ledger.losses)} times"
            )
            assert not found, f"seed {seed}\n" + "\n".join(found[:40])
            assert len(job_ids) == BOTS * each


async def kill_and_restart(house: Parts, name: str, ledger: Ledger, dice: random.Random) -> None:
    house.kill(name)
    if name == "redis":
        ledger.redis_kills.append(time.monotonic())
    await asyncio.sleep(dice.random())
    if name == "redis":
        await asyncio.to_thread(house.redis.start)
    else:
        house.start(name)


async def mail_has_come(mail: Mailbox, job_ids: set[str]) -> None:
    """Waits for the last webhooks; what does not come is told by `complaints`."""
    with contextlib.suppress(AssertionError):
        await until(lambda: not job_ids - mail.seen.keys(), what="all webhooks", timeout_s=MAIL_S_MAX)


async def done_once(ledger: Ledger, job_ids: set[str]) -> list[str]:
    """What Redis says: every job done, with one terminal frame, and nobody among the dead."""
    found = []
    for job_id in job_ids:
        job = ledger.jobs.get(job_id)
        if job is None or job.state != "done":
            found.append(f"job {job_id} is {job and job.state} in Redis")
    store: Store = ledger.store
    try:
        dead = await store.command("XLEN", store.keys.dead)
    except errors.BrokerUnavailable as e:
        return [*found, str(e)]
    if dead:
        found.append(f"{dead} dead letters")
    return found
