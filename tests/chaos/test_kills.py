"""SIGKILL under load: whatever one process is killed, every accepted job ends once and its client is told."""

import asyncio
import time
from pathlib import Path

import pytest

from broker.lifecycle import State
from tests.chaos.storm import ENOUGH, Ledger, Storm, ends, judge, loads, seed_of, storm_policy, watched
from tests.support.gateway_process import House, house
from tests.support.waiting import until

pytestmark = pytest.mark.real

KILLS = 2
PROBES = 4
"""One or two tokens that each of the two models is asked for when it has been woken."""


async def kill_and_wait(up: House, part: str, storm: Storm) -> None:
    """Kills a part at a random moment, and waits until another one runs in its place."""
    await asyncio.sleep(0.2 + 1.3 * storm.dice.random())
    killed = up.kill_part(part)
    await until(lambda: (now := up.part(part)) is not None and now.pid != killed, what=f"another {part}", timeout_s=15)


async def run(up: House, storm: Storm, ledger: Ledger, parts: list[str]) -> None:
    """Kills these parts one after another, goes on until there is enough to judge, and waits for everything to end."""
    async with storm.raging():
        await asyncio.sleep(1.0)
        for part in parts:
            await kill_and_wait(up, part, storm)
        await asyncio.sleep(1.0)
        await until(lambda: storm.outcomes["served"] > ENOUGH, what="enough are served", timeout_s=30)
    await ledger.settled()
    print(dict(storm.outcomes), ends(ledger))


@pytest.mark.parametrize("part", ["worker", "api", "scheduler", "redis"])
async def test_a_part_is_killed_under_load(part: str, tmp_path: Path) -> None:
    """Forty clients ask all the time; the part is killed at random moments."""
    seed = seed_of(part)
    log = tmp_path / "loads"
    with house(tmp_path / "data", policy=storm_policy(log)) as up:
        storm = Storm([up.url], seed)
        async with watched(up.redis_url) as ledger:
            started = time.monotonic()
            await run(up, storm, ledger, [part] * KILLS)
            judge(storm, ledger, apis_live=part != "api")
            print(f"{len(storm.told)} requests in {time.monotonic() - started:.1f} s")
            if part != "worker":
                await no_answer_was_made_twice(up, ledger)
    assert not ledger.last or not ledger.last.of("wake:<model>")
    lives = 1 + (KILLS if part == "worker" else 0)
    for model in ("big", "small"):
        assert 1 <= loads(log, model) <= lives, f"{loads(log, model)} loads of {model} in {lives} lives"
    assert bool(ledger.uncounted) is (part == "redis"), "the witness knows when Redis was another one"
    if part == "scheduler":
        assert storm.outcomes.keys() <= {"served", "refused lane_full"}, storm.outcomes
    if part in ("scheduler", "redis"):
        # a Redis that forgot what it had acknowledged (README, limits) may have lost a part of what was being answered
        forgotten = {told.job_id for told in storm.told if ledger.may_be_forgotten(told)}
        lost = [job for job in ledger.jobs.values() if job.state is not State.DONE and job.id not in forgotten]
        assert not lost, ends(ledger)


async def no_answer_was_made_twice(up: House, ledger: Ledger) -> None:
    """The runtimes that lived through it have begun no more answers than there were attempts, and ended each once."""
    stats = [await up.runtime(model).stats() for model in ("big", "small")]
    attempts = sum(job.attempt for job in ledger.jobs.values())
    done = sum(job.state is State.DONE for job in ledger.jobs.values())
    assert sum(s["requests_started"] for s in stats) <= attempts + PROBES, (stats, attempts)
    assert sum(s["requests_finished"] for s in stats) <= done + PROBES, (stats, done)
