"""What stands in a gateway at rest: sockets and files of its processes, connections and subscriptions at its Redis.

Two pictures, one from before and one from after, say what was left behind.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from broker.store import Store
from tests.support.gateway_process import House

PARTS = ("api", "scheduler", "worker", "redis")
THREADS_MORE = 8
"""A pool of threads grows to its size by and by."""
ARQ_MAX = 6
"""Connections that arq opens for its cron, now and then one more; they have no name."""
IDLE_RSS_MB = 24
"""What a process may have grown by: its allocator keeps what the busiest moment took."""


@dataclass(frozen=True)
class Part:
    """One process from outside. `files` by kind; `idle` = its connections to runtimes, which are kept for a while."""

    files: Counter[str]
    idle: int
    served: int
    threads: int
    rss_mb: float


@dataclass(frozen=True)
class Standing:
    """A whole gateway."""

    parts: dict[str, Part]
    clients: Counter[str]
    """Connections of Redis by the name of their client, without the number of the process."""
    arq: int
    channels: Counter[str]
    patterns: int

    def left_behind(self, before: "Standing", *, rss_mb: float = IDLE_RSS_MB) -> list[str]:
        """Says what is there now and was not there before."""
        found = []
        for name, part in self.parts.items():
            was = before.parts[name]
            if part.served:
                found.append(f"{name} has {part.served} connections of clients that are gone")
            if more := part.files - was.files:
                found.append(f"{name} holds {dict(more)} more than before")
            if part.threads > was.threads + THREADS_MORE:
                found.append(f"{name} runs {part.threads} threads, before it were {was.threads}")
            if name != "redis" and part.rss_mb > was.rss_mb + rss_mb:  # of Redis, see `used_mb`
                found.append(f"{name} has grown from {was.rss_mb:.0f} to {part.rss_mb:.0f} MB")
        for what, now, then in (
            ("connections", self.clients, before.clients),
            ("channel", self.channels, before.channels),
        ):
            if now != then:
                found.append(f"Redis: {what} {dict(now - then)} more and {dict(then - now)} fewer than before")
        if self.arq > ARQ_MAX:
            found.append(f"arq has {self.arq} connections")
        if self.patterns != before.patterns:
            found.append(f"Redis has {self.patterns} pattern subscriptions, before it had {before.patterns}")
        return found


async def used_mb(store: Store) -> float:
    """What Redis says that its data takes: what its process holds beside that is its allocator's, from busier times."""
    told = bytes(await store.command("INFO", "memory")).decode()
    found = re.search(r"^used_memory:(\d+)", told, re.MULTILINE)
    assert found is not None, told
    return int(found[1]) / 1_000_000


async def look(up: House, store: Store, *, runtimes: frozenset[int]) -> Standing:
    """Takes the picture; `runtimes` are the ports of the runtimes."""
    told = bytes(await store.command("CLIENT", "LIST")).decode()
    names = Counter(re.sub(r"[0-9a-f]{8}$", "", found) for found in re.findall(r" name=(\S*)", told))
    arq = names.pop("", 0)
    channels = [bytes(name) for name in await store.command("PUBSUB", "CHANNELS")]
    numbers = await store.command("PUBSUB", "NUMSUB", *channels) if channels else []
    counted = Counter({bytes(numbers[i]).decode(): int(numbers[i + 1]) for i in range(0, len(numbers), 2)})
    own_port = int(up.url.rpartition(":")[2])
    parts = {name: _part(found, own_port, runtimes) for name in PARTS if (found := up.part(name)) is not None}
    assert set(parts) == set(PARTS), f"not all parts run: {set(parts)}"
    parts["redis"].files["socket"] -= arq
    parts["scheduler"].files["socket"] -= arq
    return Standing(parts, names, arq, counted, int(await store.command("PUBSUB", "NUMPAT")))


def _part(process: psutil.Process, own_port: int, runtimes: frozenset[int]) -> Part:
    idle = served = 0
    for connection in process.net_connections("inet"):
        if connection.raddr and connection.raddr.port in runtimes:
            idle += 1
        elif connection.raddr and connection.laddr.port == own_port:
            served += 1
    kinds = Counter(_kind(path) for path in Path(f"/proc/{process.pid}/fd").iterdir())
    kinds["socket"] -= idle + served
    return Part(kinds, idle, served, process.num_threads(), process.memory_info().rss / 2**20)


def _kind(path: Path) -> str:
    try:
        found = str(path.readlink())
        return "file" if found.startswith("/") else re.split(r"[:\[]", found)[0]
    except OSError:  # closed since
        return "gone"
