"""A health check must not have a worker killed for waiting: its models are loaded, and Redis comes back."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from broker.alive import SILENT_S_MAX
from tests.chaos.parts import Parts
from tests.support.gateway_process import gateway
from tests.support.redis_server import start_server

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(180)]

NAMES = {"worker1": "worker", "scheduler1": "scheduler"}
OUTAGE_S = 2 * SILENT_S_MAX


@pytest.mark.parametrize("fault", ["killed", "hanging"])
async def test_parts_that_wait_for_redis_are_alive(fault: str, tmp_path: Path) -> None:
    redis = start_server()
    parts = Parts(tmp_path, redis)
    try:
        for name in NAMES:
            parts.start(name)
        end = time.monotonic() + 30
        while not all([await _alive(tmp_path, name) for name in NAMES]):
            assert time.monotonic() < end, parts.running
        if fault == "killed":
            redis.kill()
        else:
            os.kill(redis.pid, signal.SIGSTOP)
        end = time.monotonic() + OUTAGE_S
        while time.monotonic() < end:
            for name in NAMES:
                assert await _alive(tmp_path, name), f"{name} is called dead while Redis is {fault}"
        if fault == "killed":
            redis.start()
        else:
            os.kill(redis.pid, signal.SIGCONT)
        os.kill(parts.running["worker1"].pid, signal.SIGSTOP)
        end = time.monotonic() + OUTAGE_S
        while await _alive(tmp_path, "worker1"):
            assert time.monotonic() < end, "a worker that does nothing is called alive"
    finally:
        for part in parts.running.values():
            part.kill()
        redis.close()


async def _alive(directory: Path, name: str) -> bool:
    done = await asyncio.to_thread(gateway, "alive", NAMES[name], GATEWAY_STATE_DIR=str(directory / name))
    return done.returncode == 0
