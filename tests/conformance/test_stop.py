"""Ctrl-C while answers run: what can end ends, who has seen some is told, and everything is gone."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.support.clients import ask, user
from tests.support.gateway_process import House, is_alive, tells_no_traceback
from tests.support.waiting import until
from tests.support.worker_world import eventually, policy, simulated, words

pytestmark = pytest.mark.real


def body(tokens: int, *, stream: bool = True) -> dict[str, object]:
    return {"model": "slow", "messages": user("go on"), "max_tokens": tokens, "stream": stream}


async def test_an_interrupt_lets_short_answers_end_and_tells_the_others(tmp_path: Path) -> None:
    """The short ones end within the drain; the long one is told in-band; one Ctrl-C is enough, and it ends with 0."""
    model = simulated(maxConcurrent=3, memoryMb=1, options={"decodeTps": 20})
    up = House(tmp_path / "data", policy=policy({"slow": model}, headerHoldMs=300))
    try:
        await asyncio.to_thread(up.ready)
        up.until_state("slow", "warm")
        family = up.family()
        async with httpx.AsyncClient(timeout=30) as http, asyncio.TaskGroup() as tasks:
            short = tasks.create_task(ask(http, up.url, body(50)))
            whole = tasks.create_task(ask(http, up.url, body(50, stream=False)))
            long = tasks.create_task(ask(http, up.url, body(5000)))
            runtime = up.runtime("slow")

            async def all_run() -> bool:
                return bool((await runtime.stats())["active"] == 3)

            await eventually(all_run, what="all three answers are under way")
            up.signal(signal.SIGINT)
            stopped_at = time.monotonic()
            late = await ask(http, up.url, body(2))
        assert await asyncio.to_thread(up.exit) == 0, up.output
        assert time.monotonic() - stopped_at < 12
        assert (short.result().text, whole.result().text) == (words(50), words(50))
        assert (long.result().outcome, long.result().code) == ("told", "worker_lost"), long.result()
        assert late.outcome in ("refused", "cut", "told"), late
        assert up.lines[-1] == "stopped"
        await until(lambda: not [p for p in family if is_alive(p)], what="everything is gone", timeout_s=2)
    finally:
        await asyncio.to_thread(up.end)
    tells_no_traceback(up.output)
