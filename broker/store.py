"""Opens Redis, runs the Lua verbs, and turns what can go wrong into our own errors. Nobody else holds a client.

Two servers stand behind it: a real one over `wire`, and fakeredis in tests. Both run the same verbs.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import hiredis
import redis.exceptions
from redis.asyncio import BlockingConnectionPool, Redis

from broker import errors, scripts
from broker.keyspace import GROUP, Keyspace
from broker.wire import Wire

log = logging.getLogger("warmlane.store")

FLOOR = (7, 0)
"""The oldest server whose streams behave as the verbs need."""

BLOCK_MS = 900
"""How long a blocking read may last: it is never cancelled, it ends by itself."""

RETRY_PAUSE_S = 0.1
OUTAGE_LIMIT_S = 60.0
"""How long a write that must not be lost is repeated while Redis is away."""

OnPush = Callable[[str, bytes], None]


class Store:
    """Redis, as the nouns of the broker see it."""

    def __init__(self, client: Redis, keys: Keyspace, *, wire: Wire | None, name: str, url: str) -> None:
        self.client = client
        self.keys = keys
        self.name = name
        self.url = url
        self.version = ""  # of the server, as it says itself
        self.clock: Callable[[], int] | None = None  # tests set virtual milliseconds; None asks the server
        self._wire = wire
        self._first_answer = asyncio.get_running_loop().time()

    @classmethod
    async def open(cls, url: str, *, namespace: str = "gw", name: str = "warmlane") -> "Store":
        """Connects and checks the server; raises BrokerUnavailable, RedisUnfit with a sentence."""
        scripts.read_all()
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=16,
                timeout=5,
                socket_timeout=5,
                socket_connect_timeout=2,
                socket_keepalive=True,
                health_check_interval=15,
                protocol=2,
                client_name=name,
                decode_responses=False,
            )
            wire = Wire(url, name=name)
        except ValueError as e:
            raise errors.RedisUnfit(f"the Redis URL is not usable: {e}") from None
        store = cls(Redis(connection_pool=pool), Keyspace(namespace), wire=wire, name=name, url=url)
        try:
            await wire.open()
            await store._check_version()
        except BaseException:
            await store.close()
            raise
        return store

    @classmethod
    def fake(cls, client: Redis, *, namespace: str = "gw") -> "Store":
        """Wraps a fakeredis client (tests)."""
        return cls(client, Keyspace(namespace), wire=None, name="fake", url="")

    async def close(self) -> None:
        """Closes every connection."""
        if self._wire is not None:
            await self._wire.close()
        await self.client.aclose()
        await self.client.connection_pool.disconnect()

    @property
    def answering_s(self) -> float:
        """How long this process has had an unbroken connection: leases are judged only after one whole lease of it."""
        since = self._wire.opened_at if self._wire is not None else self._first_answer
        return asyncio.get_running_loop().time() - since

    async def run(self, verb: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Runs a verb; raises the broker error that its refusal names. A clock argument "0" becomes the test clock."""
        script = scripts.load(verb, shebang=self._wire is not None)
        try:
            if self._wire is not None:
                try:
                    return await self._wire.call("EVALSHA", script.sha, len(keys), *keys, *args)
                except hiredis.ReplyError as e:
                    if not str(e).startswith("NOSCRIPT"):
                        raise
                    return await self._wire.call("EVAL", script.text, len(keys), *keys, *args)
            return await self._ask("EVAL", script.text, len(keys), *keys, *args)
        except (hiredis.ReplyError, redis.exceptions.ResponseError) as e:
            raise refusal(verb, str(e)) from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as e:
            raise errors.BrokerUnavailable(f"Redis does not answer: {e}") from None

    async def run_through(
        self, verb: str, keys: Sequence[str], args: Sequence[Any], *, limit_s: float = OUTAGE_LIMIT_S
    ) -> Any:
        """Runs a verb and repeats it while Redis is away, at most `limit_s`. Every verb may be repeated. One that is
        full is not away: it may stay so, and whoever asked may as well try elsewhere."""
        give_up = asyncio.get_running_loop().time() + limit_s
        while True:
            try:
                return await self.run(verb, keys, args)
            except errors.RedisFull:
                raise
            except errors.BrokerUnavailable:
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)

    def now_arg(self) -> str:
        """The clock argument of a verb: "0" lets the server say, a test's clock says itself."""
        return str(self.clock()) if self.clock is not None else "0"

    async def now_ms(self) -> int:
        """Redis' clock in ms."""
        if self.clock is not None:
            return self.clock()
        seconds, micros = await self.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def command(self, *args: str | int | float | bytes) -> Any:
        """Runs one plain command (reads, mostly) with our errors; the reply is as the server sends it."""
        try:
            if self._wire is not None:
                return await self._wire.call(*args)
            return await self._ask(*args)
        except (hiredis.ReplyError, redis.exceptions.ResponseError) as e:
            raise refusal(str(args[0]), str(e)) from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as e:
            raise errors.BrokerUnavailable(f"Redis does not answer: {e}") from None

    async def _ask(self, *args: Any) -> Any:
        listed = {"parse_detail": True} if args[0] == "XPENDING" and len(args) > 3 else {}  # else redis-py misreads it
        return await cast(Any, self.client).execute_command(*args, **listed)

    async def hash(self, key: str) -> dict[bytes, bytes]:
        """Reads a whole hash; an absent one is empty."""
        reply = await self.command("HGETALL", key)
        if isinstance(reply, dict):
            return reply
        return {reply[i]: reply[i + 1] for i in range(0, len(reply), 2)}

    @asynccontextmanager
    async def tail(self) -> AsyncIterator["Tail"]:
        """Lends a connection for blocking reads of lanes."""
        wire = None
        if self._wire is not None:
            wire = Wire(self.url, name=f"{self.name}-tail", reply_timeout_s=BLOCK_MS / 1000 + 5)
        try:
            yield Tail(self, wire)
        finally:
            if wire is not None:
                await wire.close()

    async def listen(self, channels: Sequence[str], on_push: OnPush, on_open: Callable[[], None]) -> None:
        """Hears channels until cancelled; reconnects by itself. `on_open` says that messages may have been missed."""
        if self._wire is None:
            await self._listen_fake(channels, on_push, on_open)
            return
        wire = Wire(self.url, name=f"{self.name}-ears", on_push=lambda c, d: on_push(c.decode(), d), on_open=on_open)
        try:
            while True:
                try:
                    wire.closed.clear()
                    await wire.subscribe(*channels)
                    await wire.closed.wait()
                except errors.BrokerUnavailable as e:
                    log.debug("event=listen_retry reason=%s", e)
                await asyncio.sleep(RETRY_PAUSE_S)
        finally:
            await wire.close()

    async def _listen_fake(self, channels: Sequence[str], on_push: OnPush, on_open: Callable[[], None]) -> None:
        pubsub = self.client.pubsub()
        try:
            await pubsub.subscribe(*channels)
            on_open()
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
                if message is not None and message["type"] == "message":
                    on_push(message["channel"].decode(), message["data"])
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def scan(self, pattern: str) -> AsyncIterator[str]:
        """Lists keys that match, but those whose name is no UTF-8: they are none of ours. For chores and tests, never
        for a request."""
        async for name in self.scan_names(pattern):
            try:
                key = name.decode()
            except UnicodeDecodeError:
                continue
            yield key

    async def scan_names(self, pattern: str) -> AsyncIterator[bytes]:
        """Lists keys that match as they are called, those of others too."""
        cursor: Any = "0"
        while True:
            cursor, names = await self.command("SCAN", cursor, "MATCH", pattern, "COUNT", 500)
            for name in names:
                yield name
            if int(cursor) == 0:
                return

    async def durability(self) -> str:
        """Says what a crash of Redis may lose: `none`, `rdb`, `aof-everysec`, `aof-always` or `unknown`."""
        try:
            appendonly = (await self.command("CONFIG", "GET", "appendonly"))[1]
            if appendonly == b"yes":
                fsync: bytes = (await self.command("CONFIG", "GET", "appendfsync"))[1]
                return f"aof-{fsync.decode()}"
            return "rdb" if (await self.command("CONFIG", "GET", "save"))[1] else "none"
        except (errors.BrokerError, IndexError):
            return "unknown"

    async def unfit_settings(self) -> list[str]:
        """Names the server settings that would break a promise, as sentences."""
        found = []
        if not (durable := await self.durability()).startswith("aof"):
            found.append(_NOT_DURABLE[durable])
        try:
            policy = (await self.command("CONFIG", "GET", "maxmemory-policy"))[1].decode()
        except (errors.BrokerError, IndexError):
            policy = "noeviction"
        if policy != "noeviction":
            found.append(f"Redis may evict keys (maxmemory-policy {policy}): set it to noeviction")
        return found

    async def unfit(self) -> list[str]:
        """Says what keeps Redis from working as it should, as sentences: such settings, and that it is full."""
        full = await self.full()
        return [*await self.unfit_settings(), *([full] if full else [])]

    async def full(self) -> str:
        """Says that Redis holds more than it may, so that it refuses whatever is new; "" while it does not."""
        info = await self.info("memory")
        used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
        most = int(info.get("maxmemory", 0))
        return _FULL.format(used / _MB, most / _MB) if 0 < most < used else ""

    async def info(self, section: str) -> dict[str, str]:
        """Reads what the server says of itself; nothing where it does not say."""
        try:
            reply = await self.command("INFO", section)
        except errors.BrokerUnavailable:
            raise
        except errors.BrokerError:
            return {}
        if not isinstance(reply, bytes):
            return {}
        lines = (line.partition(":") for line in reply.decode().splitlines())
        return {name: value.strip() for name, _, value in lines if value}

    async def _check_version(self) -> None:
        try:
            info = (await self.command("INFO", "server")).decode()
        except errors.BrokerUnavailable:
            raise
        except errors.BrokerError as e:
            raise errors.RedisUnfit(f"Redis refuses INFO: {e}") from None
        version = next(
            (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("redis_version")), "0"
        )
        valkey = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("valkey_ver")), "")
        self.version = f"Valkey {valkey}" if valkey else f"Redis {version}"
        if tuple(int(x) for x in version.split(".")[:2]) < FLOOR:
            raise errors.RedisUnfit(f"Redis {version} is too old: warmlane needs 7.0 or later, or Valkey 8 or later")


class Tail:
    """Blocking reads on a connection of their own."""

    def __init__(self, store: Store, wire: Wire | None) -> None:
        self._store = store
        self._wire = wire

    async def read(self, last: dict[str, str]) -> list[tuple[str, list[tuple[bytes, list[bytes]]]]]:
        """Gives the entries after the last ids seen, by key; waits at most BLOCK_MS for the first."""
        args = ("XREAD", "COUNT", 512, "BLOCK", BLOCK_MS, "STREAMS", *last.keys(), *last.values())
        try:
            if self._wire is not None:
                reply = await self._wire.call(*args)
            else:
                reply = await self._store._ask(*args)
        except (hiredis.ReplyError, redis.exceptions.ResponseError) as e:
            raise refusal("XREAD", str(e)) from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as e:
            raise errors.BrokerUnavailable(f"Redis does not answer: {e}") from None
        if not reply:
            return []
        items = reply.items() if isinstance(reply, dict) else reply
        return [(k.decode(), [e for e in (v[0] if isinstance(reply, dict) else v)]) for k, v in items]


_NOT_DURABLE = {
    "none": "Redis keeps no file, so a crash of it loses accepted jobs: set `appendonly yes`",
    "rdb": "Redis keeps snapshots only, so a crash of it loses accepted jobs: set `appendonly yes`",
    "unknown": "Redis does not tell whether a crash of it loses accepted jobs: make sure of `appendonly yes`",
}

_FULL = (
    "Redis is full ({:,.0f} MB, and it may hold {:,.0f} MB), so nothing new is taken or begun: "
    "raise `maxmemory`, or delete files and jobs that nobody needs"
)
_MB = 1 << 20

_REFUSALS: dict[str, type[errors.BrokerError]] = {
    "STALE": errors.StaleAttempt,
    "MOVED": errors.Moved,
    "STALEPOLICY": errors.StalePolicy,
    "NOTDUE": errors.NotDue,
    "GAP": errors.FrameGap,
    "ENDED": errors.AlreadyEnded,
    "HELD": errors.LockHeld,
    "BADTRANSITION": errors.BadTransition,
    "TRUSTZONE": errors.TrustZoneRefused,
    "CALLERBUSY": errors.CallerBusy,
    "UNJUDGED": errors.Unjudged,
    "NOTPUTBACK": errors.NotPutBack,
    "SEEN": errors.BadTransition,
    "DOWNGRADES": errors.DowngradesCapped,
    "READERS": errors.BadRequest,
    "NOTDEAD": errors.NotRetryable,
}


_IN_SENTENCES: dict[str, type[errors.BrokerError]] = {
    "FILESFULL": errors.FilesFull,
    "FILEINUSE": errors.FileInUse,
    "BATCHLIMIT": errors.BatchLimit,
    "IDEMMISMATCH": errors.IdempotencyMismatch,
}
"""Whose words are the script's, without its name."""


def refusal(verb: str, text: str) -> errors.BrokerError:
    """Reads a script's refusal: its first word names the error, the rest is for people."""
    word, _, rest = text.partition(" ")
    rest = rest.split(" script: ")[0]
    if word == "LANEFULL":
        lane, _, before = rest.rpartition(":")[2].partition(" ")
        return errors.LaneFull(lane, before=int(before or 0))
    if word == "SCHEDULEFULL":
        lane, _, first_in_ms = rest.rpartition(":")[2].partition(" ")
        return errors.ScheduleFull(lane, retry_after_s=max(1, math.ceil(int(first_in_ms or 0) / 1000)))
    if word == "CALLERSHARE":
        return errors.CallerShare(rest)
    if word == "CALLERLIMIT":
        return errors.CallerLimit(rest)
    if word == "QUOTA":
        return errors.QuotaUsed(retry_after_s=math.ceil(int(rest) / 1000))
    if word == "NODELIVERY":
        return errors.NoSuchDelivery(rest)
    if word in _IN_SENTENCES:
        return _IN_SENTENCES[word](rest)
    if word == "NOFILE":
        return errors.NoSuchFile(rest.rpartition(":")[2])
    if word == "NOBATCH":
        return errors.NoSuchBatch(rest.rpartition(":")[2])
    if word == "NOJOB":
        return errors.NoSuchJob(rest.rpartition(":")[2])
    if word == "OOM":
        return errors.RedisFull("Redis is full: nothing new is taken until there is room again")
    if word in ("LOADING", "BUSY", "MASTERDOWN", "READONLY", "UNBLOCKED", "NOGROUP", "MISCONF"):
        return errors.BrokerUnavailable(f"Redis cannot work at the moment: {text}")
    if word in _REFUSALS:
        return _REFUSALS[word](f"{verb}: {rest}")
    return errors.BrokerError(f"{verb}: {text}")


__all__ = ["BLOCK_MS", "GROUP", "Store", "Tail", "refusal"]
