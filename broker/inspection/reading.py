"""Redis behind glass: a store that can only read, for a user of Redis that may do no more.

It greets the server with nothing but a password, since a user with `+@read` alone may not even give its connection a
name. Whatever is no reading command is refused here, before it is sent.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from broker import errors
from broker.keyspace import Keyspace
from broker.store import Store
from broker.wire import Wire

log = logging.getLogger("warmlane.inspection")

READS = frozenset(
    (
        "EXISTS GET HGET HGETALL HMGET MEMORY PTTL SCAN STRLEN TYPE XLEN XPENDING XRANGE XREVRANGE ZCARD ZCOUNT ZRANGE"
    ).split()
)
"""The commands that are sent. Each is of Redis' own category `@read`, which a test asks the server."""

CLOCK = "TIME"
"""The one command besides: it reads no key, and a user that may not send it gets this machine's clock."""


class ReadingStore(Store):
    """A store whose every verb and writing command raises."""

    @classmethod
    async def open(cls, url: str, *, namespace: str = "gw", name: str = "") -> "ReadingStore":
        """Connects; raises BrokerUnavailable, RedisUnfit with a sentence."""
        try:
            wire = Wire(url, name="")
        except ValueError as e:
            raise errors.RedisUnfit(f"the Redis URL is not usable: {e}") from None
        store = cls(Redis(), Keyspace(namespace), wire=wire, name=name, url=url)  # that client never connects
        try:
            await wire.open()
        except BaseException:
            await store.close()
            raise
        return store

    async def command(self, *args: str | int | float | bytes) -> Any:
        """Runs a reading command; any other is a bug of ours."""
        if args[0] not in READS and args[0] != CLOCK:
            raise TypeError(f"{args[0]!r} is no reading command")
        return await super().command(*args)

    async def run(self, verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Refuses: every verb may write."""
        raise TypeError(f"{verb!r} is a verb, and inspection only reads")

    async def now_ms(self) -> int:
        """Redis' clock in ms, or this machine's where the user may not ask."""
        try:
            return await super().now_ms()
        except errors.BrokerUnavailable:
            raise
        except errors.BrokerError as e:
            log.debug("event=clock_forbidden reason=%s", e)
            return int(time.time() * 1000)
