"""What an ordinary client sees before, during and after an attack on the api, with a gateway as `gateway up` runs it.

One process attacks, this one asks for short answers all the while, each over a new connection. The model is simulated
and costs nothing, so what is measured is the door. The attacker has a key of its own where it needs one.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from machine import (
    ROOT,
    command_line,
    descendants,
    end_process,
    facts,
    free_port,
    gateway_command,
    python_env,
    rss_mb,
    wait_until,
)

KEYS = "ann:ordinary,mal:attacker"
HOT = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
PACE_S = 0.1
ANSWER_S_MAX = 10.0
QUICK = {"backend": "simulated", "model": "weights", "keepWarm": True, "maxConcurrent": 64, "contextTokens": 8192}


# --- the ordinary client -------------------------------------------------------------------------------------------


class Seen:
    """What it saw: milliseconds to the first token, and what went wrong instead."""

    def __init__(self) -> None:
        self.first_token_ms: list[float] = []
        self.wrong: Counter[str] = Counter()

    def __str__(self) -> str:
        found = sorted(self.first_token_ms)
        if not found:
            return f"none of {self.wrong.total()} answered ({dict(self.wrong)})"
        p99 = found[min(len(found) - 1, int(len(found) * 0.99))]
        said = f"p50 {statistics.median(found):.0f} ms, p99 {p99:.0f} ms, worst {found[-1]:.0f} ms of {len(found)}"
        return said + (f"; refused or failed: {dict(self.wrong)}" if self.wrong else "")


async def ask_for(port: int, seconds: float) -> Seen:
    """Asks every tenth of a second, whatever became of the last one."""
    seen = Seen()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(seconds / PACE_S)):
            await asyncio.sleep(max(0.0, begun + number * PACE_S - loop.time()))
            tasks.create_task(_ask(port, seen), name=f"ask {number}")
    return seen


async def _ask(port: int, seen: Seen) -> None:
    body = {"model": "quick", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    begun = time.perf_counter()
    writer = None
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_request("ordinary", json.dumps(body).encode()))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                seen.wrong[head.split(b" ", 2)[1].decode()] += 1
                return
            await reader.readuntil(b"data: ")
            seen.first_token_ms.append((time.perf_counter() - begun) * 1000)
            await reader.readuntil(b"[DONE]")
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        seen.wrong[type(error).__name__] += 1
    finally:
        if writer is not None:
            writer.close()


def _request(key: str, body: bytes) -> bytes:
    return (HOT.format(key=key) + f"content-length: {len(body)}\r\n\r\n").encode() + body


# --- the attacker --------------------------------------------------------------------------------------------------

Attack = Callable[[int, Counter[str]], Awaitable[None]]


async def _many(count: int, one: Callable[[], Awaitable[None]]) -> None:
    """Keeps so many going, each begun anew when it has ended; 400 are begun at a time."""
    gate = asyncio.Semaphore(400)

    async def over_and_over() -> None:
        while True:
            async with gate:
                await asyncio.sleep(0)
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await one()

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(over_and_over(), name=f"attack {number}")


def trickled(count: int, head: bytes, *, each_s: float) -> Attack:
    """Connections that send a byte now and then."""

    async def attack(port: int, told: Counter[str]) -> None:
        async def one() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            told["connections"] += 1
            try:
                writer.write(head)
                while not reader.at_eof():
                    writer.write(b"x")
                    with suppress(TimeoutError):
                        async with asyncio.timeout(each_s):
                            told["closed"] += not await reader.read(4096)
            finally:
                writer.close()

        await _many(count, one)

    return attack


async def silent(port: int, told: Counter[str]) -> None:
    """6,000 connections that say nothing, each opened anew when it is closed."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        told["connections"] += 1
        try:
            await reader.read()
        finally:
            writer.close()

    await _many(6_000, one)


def poured(count: int, body: bytes) -> Attack:
    """Whole large requests, one behind the other on each of some connections."""

    async def attack(port: int, told: Counter[str]) -> None:
        async def one() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
            try:
                while True:
                    writer.write(_request("attacker", body))
                    await writer.drain()
                    head = await reader.readuntil(b"\r\n\r\n")
                    told[head.split(b" ", 2)[1].decode()] += 1
                    length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
                    if not length:
                        return
                    await reader.readexactly(int(length))
            finally:
                writer.transport.abort()

        await _many(count, one)

    return attack


async def pipelined(port: int, told: Counter[str]) -> None:
    """Ten thousand requests at once on each of 32 connections."""
    flood = b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer attacker\r\n\r\n" * 10_000

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        told["connections"] += 1
        writer.write(flood)
        try:
            while await reader.read(1 << 16):
                pass
        finally:
            writer.transport.abort()

    await _many(32, one)


LONG = json.dumps({"model": "quick", "messages": [{"role": "user", "content": "word " * 3_000_000}]}).encode()
DEAR = b'{"model":"quick","messages":[],"x":[' + b"[0]," * 3_750_000 + b"0]}"
DEAR_BELOW = b'{"model":"nobody","messages":[],"x":[' + b"[0]," * 240_000 + b'0],"y":"' + b"z" * 14_000_000 + b'"}'

ATTACKS: dict[str, tuple[str, Attack]] = {
    "slow-heads": ("2,000 heads, a byte a second each", trickled(2_000, b"POST / HTTP/1.1\r\nx-a: ", each_s=1.0)),
    "slow-bodies": (
        "1,000 bodies of 20 MB, a byte a second each",
        trickled(1_000, (HOT.format(key="attacker") + "content-length: 20000000\r\n\r\n{").encode(), each_s=1.0),
    ),
    "silent": ("6,000 connections that say nothing", silent),
    "pipelined": ("32 connections with 10,000 requests sent ahead", pipelined),
    "large": ("8 connections pouring prompts of 15 MB", poured(8, LONG)),
    "dear": ("8 connections pouring 15 MB of small lists", poured(8, DEAR)),
    "dear-within": ("8 connections pouring 15 MB with as many lists as a body may hold", poured(8, DEAR_BELOW)),
}


def _attack(name: str, port: int, seconds: float, told: Any) -> None:
    async def attack() -> None:
        counted: Counter[str] = Counter()
        try:
            async with asyncio.timeout(seconds):
                await ATTACKS[name][1](port, counted)
        except TimeoutError:
            pass
        finally:
            told.send(dict(counted))

    os.nice(5)  # it shares the cores with what it attacks
    asyncio.run(attack())


# --- the run -------------------------------------------------------------------------------------------------------


def measure(name: str, port: int, api: int, seconds: float) -> None:
    """Prints what is seen before, during and after one attack."""
    print(f"\n{name}: {ATTACKS[name][0]}", flush=True)
    print(f"  before  {asyncio.run(ask_for(port, seconds / 2))}; {_held(api)}", flush=True)
    hears, tells = multiprocessing.Pipe(duplex=False)
    attacker = multiprocessing.Process(target=_attack, args=(name, port, seconds + 3.0, tells))
    attacker.start()
    try:
        time.sleep(2.0)  # it has begun
        during = asyncio.run(ask_for(port, seconds))
        held = _held(api)
        attacker.join(15)
        done = hears.recv() if hears.poll() else "the attacker did not end by itself"
        print(f"  during  {during}; {held}; the attacker: {done}", flush=True)
    finally:
        attacker.kill()
        attacker.join()
    print(f"  after   {asyncio.run(ask_for(port, seconds / 2))}; {_held(api)}", flush=True)


def _held(api: int) -> str:
    return f"api {rss_mb([api]):.0f} MB, {len(os.listdir(f'/proc/{api}/fd'))} files"


def main() -> None:
    """Runs the attacks that are asked for, one after the other."""
    wishes = argparse.ArgumentParser(description=__doc__)
    wishes.add_argument("--only", action="append", choices=list(ATTACKS), help="one attack, may be given again")
    wishes.add_argument("--seconds", type=float, default=10.0, help="how long each attack is measured")
    asked = wishes.parse_args()
    for fact, value in facts().items():
        print(f"{fact}: {value}")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        policy = Path(directory) / "policy.yaml"
        policy.write_text(json.dumps({"models": {"quick": QUICK}}))
        env = {k: v for k, v in python_env().items() if not k.startswith("GATEWAY_")} | {"GATEWAY_KEYS": KEYS}
        command = [*gateway_command(), "up", "--policy", str(policy), "--data", str(Path(directory) / "data")]
        with (Path(directory) / "log").open("w") as log:
            house = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)], env=env, cwd=ROOT, stdout=log, stderr=log
            )
            try:
                assert wait_until(lambda: asyncio.run(ask_for(port, PACE_S)).first_token_ms, 30, 0.2), "no answer"
                api = next(pid for pid in descendants(house.pid) if "-m api.app" in command_line(pid))
                for name in asked.only or ATTACKS:
                    measure(name, port, api, asked.seconds)
            finally:
                end_process(house)


if __name__ == "__main__":
    main()
