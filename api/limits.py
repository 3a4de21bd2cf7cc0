"""What one api process takes from its clients before it says no. README's table of limits names each of them."""

import asyncio
import resource
from dataclasses import dataclass, replace

from broker import errors

CONNECTIONS_MAX = 4096
FILES_KEPT = 128
"""File descriptors that connections leave to Redis, logs and modules."""
FILES_WANTED = 16_384


@dataclass(frozen=True)
class Limits:
    """The limits of connections, requests and callers; durations in seconds, sizes in bytes."""

    connections: int = CONNECTIONS_MAX
    connections_of_caller: int = 1024
    """Requests that one caller may have under way. Who has no key is one caller with all others on this machine."""
    head_bytes: int = 32 << 10
    head_lines: int = 128
    url_bytes: int = 8 << 10
    head_s: float = 10.0
    """From the connection, or a request's first byte, to the end of its head."""
    body_s: float = 20.0
    body_bytes_per_s: int = 32 << 10
    """A body may take `body_s`, and a second more for each so many bytes that have come."""
    body_bytes: int = 20 << 20
    bodies_bytes: int = 512 << 20
    """Bodies larger than what comes in one piece, all requests together, until their answers end."""
    large_bytes: int = 1 << 20
    large_bytes_per_s: int = 20_000_000
    """Bodies of `large_bytes` and more are looked into one after the other and no faster than this: each keeps the loop
    busy for a tenth of a second at worst, and whoever asks for little gets a turn between them."""
    keep_alive_s: float = 75.0
    """Longer than the pools of clients keep theirs, so that nobody writes into a connection that we just closed."""
    linger_s: float = 2.0
    """How long the rest of a refused request is read and dropped, so that its sender gets to read our answer."""
    closing_s: float = 30.0
    """How long a client may take to fetch the last bytes of a connection that we close."""
    pipelined: int = 16


class House:
    """What the requests of one process hold together, and what each caller has under way."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bodies_bytes = 0
        self._under_way: dict[str, int] = {}
        self._next_large = 0.0

    def take(self, size: int) -> None:
        """Makes room for a part of a body; raises BodiesTooMany."""
        if self.bodies_bytes + size > self.limits.bodies_bytes:
            raise errors.BodiesTooMany
        self.bodies_bytes += size

    def give_back(self, size: int) -> None:
        """Frees what a request held."""
        self.bodies_bytes -= size

    async def turn(self, size: int) -> None:
        """Waits until a body of this size may be looked into; small ones may at once."""
        if size < self.limits.large_bytes:
            return
        now = asyncio.get_running_loop().time()
        begin = max(now, self._next_large)
        self._next_large = begin + size / self.limits.large_bytes_per_s
        await asyncio.sleep(begin - now)

    def enter(self, caller: str) -> None:
        """Counts a request of a caller, until it leaves; raises CallerTooMany."""
        under_way = self._under_way.get(caller, 0)
        if under_way >= self.limits.connections_of_caller:
            raise errors.CallerTooMany(self.limits.connections_of_caller)
        self._under_way[caller] = under_way + 1

    def leave(self, caller: str) -> None:
        """The request has been answered."""
        left = self._under_way.pop(caller) - 1
        if left:
            self._under_way[caller] = left


def limits_here() -> Limits:
    """Raises this process's limit of open files as far as it may, and gives limits that fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return fitting(Limits(), files=CONNECTIONS_MAX * 2 if soft == resource.RLIM_INFINITY else soft)


def fitting(limits: Limits, *, files: int) -> Limits:
    """Lowers the number of connections where the process may not open so many files."""
    return replace(limits, connections=max(1, min(limits.connections, files - FILES_KEPT)))
