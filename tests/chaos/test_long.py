"""Hundreds of kills: two of every part, any of them at any moment, for minutes. Figures are printed."""

import asyncio
import os
import time
from pathlib import Path

import pytest

from broker.lifecycle import State
from tests.chaos.parts import parts
from tests.chaos.storm import Storm, ends, judge, seed_of, storm_policy, was_unseen, watched

pytestmark = [pytest.mark.real, pytest.mark.long]

MINUTES = float(os.environ.get("CHAOS_MINUTES", "14"))
NAMES = ("api1", "api2", "scheduler1", "scheduler2", "worker1", "worker2")


@pytest.mark.timeout(MINUTES * 60 + 120)
async def test_hundreds_of_kills(tmp_path: Path) -> None:
    """Every part dies again and again, Redis among them; whatever was accepted ends, and ends once."""
    seed = seed_of("long")
    log = tmp_path / "loads"
    kills: dict[str, int] = {}
    policy = storm_policy(log, hosts=("worker1", "worker2"), keepMs=60_000)
    async with parts(tmp_path, policy, *NAMES) as house:
        await house.until_warm("of-worker1", workers=("worker1",))
        await house.until_warm("of-worker2", workers=("worker2",))
        models = ("big", "big", "small", "of-worker1", "of-worker2")
        storm = Storm([house.api("api1"), house.api("api2")], seed, longest=60, models=models)
        async with watched(house.redis.url, every_s=4.0) as ledger:
            end = time.monotonic() + MINUTES * 60
            async with storm.raging():
                while time.monotonic() < end:
                    await asyncio.sleep(0.5 + 2.5 * storm.dice.random())
                    name = storm.dice.choice([*NAMES, "redis"])
                    house.kill(name)
                    if name == "redis":
                        ledger.redis_kills.append(time.monotonic())
                    kills[name] = kills.get(name, 0) + 1
                    await asyncio.sleep(storm.dice.random())
                    if name == "redis":
                        await asyncio.to_thread(house.redis.start)
                    else:
                        house.start(name)
                    if ledger.found:
                        break
            await ledger.settled()
            unseen = [job for job in ledger.jobs.values() if was_unseen(job)]
            done = sum(job.state is State.DONE for job in unseen)
            print(f"kills {sum(kills.values())} {kills}; {len(storm.told)} requests {dict(storm.outcomes)}")
            print(f"{len(ledger.jobs)} jobs {ends(ledger)}; unseen {done} of {len(unseen)} done")
            print(f"restarts of Redis that came back without writes it had acknowledged: {len(ledger.losses)}")
            judge(storm, ledger, apis_live=False)
            assert not ledger.last or not ledger.last.of("wake:<model>")
