"""How submit, choose + claim and promote grow with the jobs that wait, and how late promotions come; prints JSON.

    python benchmarks/broker_growth.py --redis URL [--quick]

Works on the broker itself, on a real server, in namespaces of its own that it removes. `overhead.py` calls it.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from machine import ROOT, end_process, python_env

from broker import dispatch, errors, hosts, jobs, lanes
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.records import HostRecord, JobRecord, ModelOnHost, Waiting
from broker.store import Store

SHALLOW, DEEP = 10, 10_000
PICTURE = 256
"""How many waiting jobs a worker looks at when it chooses."""
BLOCK = 20
"""Samples at one depth before the other has its turn: both meet the same disturbances."""
LATE_JOBS = 1_000
FIRST_DUE_MS = 2_500
"""Time to put all of them in before the first is due."""
SCHEDULER_START_S = 15
HOST, BOOT = "bench-host", "bench-boot"
BODY = json.dumps({"model": "big", "messages": [{"role": "user", "content": "x" * 400}]}).encode()

POLICY = """models:
  big:
    backend: llama.cpp
    model: big
    url: http://127.0.0.1:9
    maxConcurrent: 4
    maxQueue: 50000
    coldStartBudgetMs: 100000
    fallback: small
  small:
    backend: llama.cpp
    model: small
    url: http://127.0.0.1:9
    maxConcurrent: 4
    maxQueue: 50000
    coldStartBudgetMs: 100000
"""


@dataclass
class House:
    """One namespace with a policy, two models and jobs that wait."""

    store: Store
    book: PolicyBook
    fleet: Fleet
    made: int = 0
    oldest: deque[JobRecord] = field(default_factory=deque)
    times_us: dict[str, list[float]] = field(default_factory=lambda: {"submit": [], "claim": [], "promote": []})

    @classmethod
    async def open(cls, url: str, namespace: str) -> "House":
        store = await Store.open(url, namespace=namespace, name="bench")
        book = PolicyBook(store)
        await book.apply(POLICY, by="bench")
        house = cls(store, book, Fleet(store, book))
        await house.beat()
        await house.fleet.look()
        return house

    async def beat(self) -> None:
        """The only host has `small` warm and `big` cold."""
        now = await self.store.now_ms()
        host = HostRecord(name=HOST, boot=BOOT, beat_at=now, started_at=now)
        small = ModelOnHost(state="warm", runtime="llama.cpp", slots_total=4, first_token_ms=20, since=now)
        big = ModelOnHost(state="cold", runtime="llama.cpp", since=now)
        await hosts.beat(self.store, host, {"small": small, "big": big}, lease_ms=120_000)

    async def submit(self, lane_name: str = "big", *, promote_within_ms: int | None = None) -> JobRecord:
        """Puts one more job into a lane."""
        lane = self.book.active.lane(lane_name)
        assert lane is not None
        self.made += 1
        job = JobRecord(id=f"{self.made:08d}", asked=lane_name, asked_model=lane_name, tokens=100)
        await lanes.submit(
            self.store, self.book.active, self.fleet, job, lane, BODY, promote_within_ms=promote_within_ms
        )
        return job

    async def fill(self, depth: int) -> None:
        """Lets `depth` jobs wait in each lane."""
        for lane in ("big", "small"):
            for start in range(0, depth, 100):
                made = await asyncio.gather(*(self.submit(lane) for _ in range(start, min(depth, start + 100))))
                if lane == "big":
                    self.oldest += made
        await self.fleet.look()

    async def sample(self) -> None:
        """Times one of each verb and leaves as many jobs waiting as before."""
        self.oldest.append(await self._timed("submit", self.submit()))
        oldest = await jobs.read(self.store, self.oldest.popleft().id)
        to = self.book.active.lane("small")
        assert to is not None
        await self._timed("promote", lanes.promote(self.store, self.book.active, self.fleet, oldest, to))
        # A worker holds this picture already: it hears each new entry once, when it comes.
        picture = [w async for w in lanes.waiting_entries(self.store, "small", limit=PICTURE)]
        now = await self.store.now_ms()
        claimed = await self._timed("claim", self._choose_and_claim(picture, now))
        await jobs.cancel(self.store, claimed)

    async def _choose_and_claim(self, picture: list[Waiting], now_ms: int) -> str:
        chosen = dispatch.choose(picture, free=1, total=1, now_ms=now_ms, service_ms=5_000)
        assert chosen is not None
        await lanes.claim(self.store, self.book.active, chosen, host=HOST, boot=BOOT)
        return chosen.job

    async def _timed(self, verb: str, call: Awaitable[Any]) -> Any:
        began = time.perf_counter_ns()
        result = await call
        self.times_us[verb].append((time.perf_counter_ns() - began) / 1e3)
        return result

    async def close(self) -> None:
        """Removes every key of the namespace."""
        prefix = self.store.keys.lane("").removesuffix("lane:")
        at = b"0"
        while True:
            at, keys = await self.store.command("SCAN", at, "MATCH", f"{prefix}*", "COUNT", 2000)
            if keys:
                await self.store.command("UNLINK", *keys)
            if at == b"0":
                break
        await self.store.close()


async def growth(url: str, *, samples: int) -> dict[str, Any]:
    """Times each verb with few and with many jobs waiting, in turn, and gives the ratio of the medians."""
    few, many = await House.open(url, "growth-few"), await House.open(url, "growth-many")
    try:
        await few.fill(SHALLOW)
        await many.fill(DEEP)
        for house in (few, many):  # the first calls load the scripts
            await house.sample()
            house.times_us = {verb: [] for verb in house.times_us}
        for _ in range(samples // BLOCK):
            for house in (few, many):
                for _ in range(BLOCK):
                    await house.sample()
    finally:
        await few.close()
        await many.close()
    found: dict[str, Any] = {}
    for verb in few.times_us:
        a, b = at(few.times_us[verb], 0.5), at(many.times_us[verb], 0.5)
        found[verb] = b / a
        found[f"{verb}_us"] = {"few": a, "many": b, "few_p99": at(few.times_us[verb], 0.99),
                               "many_p99": at(many.times_us[verb], 0.99)}  # fmt: skip
    return found


async def lateness(url: str, *, spread_ms: int) -> dict[str, Any]:
    """Lets a real scheduler process promote 1,000 waiting jobs whose instants pass one after the other."""
    house = await House.open(url, "growth-late")
    scheduler = start_scheduler(url, "growth-late")
    try:
        await ready(house, scheduler)
        within = [FIRST_DUE_MS + i * spread_ms // LATE_JOBS for i in range(LATE_JOBS)]
        made: list[JobRecord] = []
        for start in range(0, LATE_JOBS, 100):
            made += await asyncio.gather(
                *(house.submit(promote_within_ms=within[i]) for i in range(start, start + 100))
            )
        await house.beat()
        await asyncio.sleep((FIRST_DUE_MS + spread_ms + 500) / 1000)
        late = []
        for job, promote_within_ms in zip(made, within, strict=True):
            record = await jobs.read(house.store, job.id)
            if record.promoted_at:
                late.append(float(record.promoted_at - record.submitted_at - promote_within_ms))
        if len(late) < LATE_JOBS * 0.99:
            raise RuntimeError(f"only {len(late)} of {LATE_JOBS} jobs were promoted")
        return {"n": len(late), "p50": at(late, 0.5), "p99": at(late, 0.99), "max": max(late)}
    finally:
        end_process(scheduler)
        await house.close()


def start_scheduler(url: str, namespace: str) -> subprocess.Popen[bytes]:
    """Starts the project's own scheduler on the namespace."""
    env = {**python_env(), "GATEWAY_REDIS_URL": url, "GATEWAY_NAMESPACE": namespace}
    args = [sys.executable, "-m", "workers.scheduler"]
    return subprocess.Popen(args, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def ready(house: House, scheduler: subprocess.Popen[bytes]) -> None:
    """Waits until the scheduler has promoted a first job: it runs, and its scripts are loaded."""
    job = await house.submit(promote_within_ms=1)
    for _ in range(SCHEDULER_START_S * 20):
        if (await jobs.read(house.store, job.id)).promoted_at:
            return
        if scheduler.poll() is not None:
            raise RuntimeError(f"workers.scheduler ended with {scheduler.returncode}")
        await asyncio.sleep(0.05)
    raise TimeoutError("the scheduler did not promote a first job")


def at(samples: list[float], share: float) -> float:
    """Gives a percentile."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {"growth": await growth(args.redis, samples=100 if args.quick else 300)}
    try:
        found["lateness_ms"] = await lateness(args.redis, spread_ms=1_500 if args.quick else 4_000)
    except (TimeoutError, RuntimeError, errors.BrokerError) as problem:
        found["problem"] = f"promotion lateness: {str(problem) or 'the scheduler did not start'}"
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        sys.exit(uvloop.run(main()))
    sys.exit(asyncio.run(main()))
