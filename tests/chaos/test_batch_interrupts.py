"""A batch run that is stopped again and again ends complete, and the runtime was asked for each line once."""

import asyncio
import random
import signal
from pathlib import Path

import pytest

from api.exit_codes import INTERRUPTED, OK, TERMINATED
from tests.chaos.storm import seed_of
from tests.support.batch_command import END_S_MAX, BatchCommand, asked_for, line, read, text_of
from tests.support.gateway_process import House, started
from tests.support.telling_runtime import TellingLlama
from tests.support.waiting import until
from tests.support.worker_world import policy

pytestmark = pytest.mark.real

STOPS = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGKILL: -signal.SIGKILL}
PIECES = 3
PIECE_MS = 50
"""So slow that there is something to be done yet at the last stop, though jobs go on between two runs."""
WITHIN_S = 0.4
"""A stop comes so long after the moment that it was planned for, at most."""


async def interrupted(directory: Path, *, lines: int, stops: int, restarts: int, seed: int) -> None:
    """Stops the run at random moments, and the api too at some of them, then lets it end."""
    chance = random.Random(seed)
    asked = asked_for(lines, pieces=PIECES, ms=PIECE_MS)
    requests, output = directory / "requests.jsonl", directory / "out.jsonl"
    requests.write_text("".join(line(name, told) + "\n" for name, told in asked.items()))
    llama = TellingLlama()
    llama.slots = 4
    async with llama.running():
        coder = {"backend": "llama.cpp", "model": "w", "url": llama.url, "maxConcurrent": 4, "keepWarm": True}
        async with started(directory / "data", policy({"coder": coder})) as up:
            await asyncio.to_thread(up.until_state, "coder", "warm")
            away = set(chance.sample(range(stops), restarts))
            for number in range(stops):
                planned = len(read(output)) + chance.randrange(lines // stops // 2)
                run = BatchCommand(up.url, requests, output, "--concurrency", "8")
                await stopped(up, run, chance, planned=planned, kills_api=number in away)
            last = BatchCommand(up.url, requests, output)
            left_s = (lines - len(read(output))) * PIECES * PIECE_MS / 1_000 / llama.slots
            assert await last.end(timeout_s=END_S_MAX + 2 * left_s) == OK, last.err
            assert f"{lines} of {lines} answered" in last.err.replace(",", "")
    outputs = {found["custom_id"]: found for found in read(output)}
    assert outputs.keys() == asked.keys() and len(read(output)) == lines
    assert {name: text_of(found) for name, found in outputs.items()} == {n: told.text for n, told in asked.items()}
    assert llama.begun == llama.whole == {told.tag: 1 for told in asked.values()}
    assert len({found["response"]["request_id"] for found in outputs.values()}) == lines
    assert not (directory / "out.errors.jsonl").exists()


async def stopped(up: House, run: BatchCommand, chance: random.Random, *, planned: int, kills_api: bool) -> None:
    """Lets it run until so many lines are there and a moment more, and stops it; what it wrote is whole."""
    try:
        await until(lambda: run.begun or not run.running, what="it has begun", timeout_s=30)
        await until(lambda: len(read(run.output)) >= planned or not run.running, what="lines", timeout_s=30)
        if kills_api:
            await asyncio.to_thread(up.kill_part, "api")
        await asyncio.sleep(chance.random() * WITHIN_S)
        stop = chance.choice(STOPS)
        assert run.running, "it was done before it could be stopped"
        run.signal(stop)
        assert await run.end() == CODES[stop], run.err
    finally:
        run.kill()
    assert stop is signal.SIGKILL or "goes on from here" in run.err, run.err


@pytest.mark.timeout(120)
async def test_interrupts_lose_nothing_and_pay_for_nothing_twice(tmp_path: Path) -> None:
    await interrupted(tmp_path, lines=150, stops=5, restarts=1, seed=seed_of("interrupts"))


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_many_interrupts_and_an_api_that_dies_too(tmp_path: Path) -> None:
    await interrupted(tmp_path, lines=2_000, stops=40, restarts=10, seed=seed_of("many interrupts"))
