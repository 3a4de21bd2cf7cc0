"""One process per machine with runtimes: it tails its lanes, keeps its models warm, runs attempts, and drains.

Start here to read the worker: `Host.run` starts every task that lives as long as the process, each with a name and an
owner. `python -m workers.host` is the process.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import signal
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path

import psutil
from ulid import ULID

from broker import continuing, errors, hosts, jobs, lanes
from broker.alive import Pulse
from broker.hosts import Fleet
from broker.policies import Active, PolicyBook
from broker.records import HostRecord
from broker.store import Store
from workers import part
from workers.counting import Counting
from workers.dispatcher import Dispatcher
from workers.errands import Errands
from workers.picture import LanePicture, Tails
from workers.residents import Residents
from workers.runtimes import process
from workers.settings import WorkerSettings

log = logging.getLogger("warmlane.host")

DRAIN_LOOK_S = 0.05
LAST_WORDS_S = 2.0
"""How long stopped attempts may take to end their jobs."""

SECOND_NAME_EXIT = 4


def _machine() -> str:
    """Names this hardware, the same for every process on it."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            return f"{platform.node()}/{Path(path).read_text().strip()}"
    return f"{platform.node()}/{uuid.getnode():x}"


MACHINE = _machine()


class Host:
    """The worker of one machine."""

    def __init__(self, store: Store, settings: WorkerSettings) -> None:
        self.name = settings.host_name
        self.boot = str(ULID())
        self.draining = False  # on its way out
        self.drained = False  # set aside by an operator; it stays and takes no work
        self.residents: Residents
        self.dispatcher: Dispatcher
        self.errands: Errands
        self.counting: Counting
        self._settings = settings
        self._store = store
        self._book = PolicyBook(store)
        self._fleet = Fleet(store, self._book)
        self._picture = LanePicture()
        self._pulse = Pulse(settings.state_dir, "worker")
        self._beat_now = asyncio.Event()
        self._stop = asyncio.Event()
        self._started_at = 0

    async def run(self) -> None:
        """Lives until `drain` is done; raises LockHeld when a worker on another machine has the name."""
        self._started_at = await self._store.now_ms()
        await self._book.catch_up()
        before = await hosts.read(self._store, self.name)
        await asyncio.to_thread(process.stop_orphans, self._settings.state_dir)  # before anything is measured or loaded
        try:
            async with asyncio.TaskGroup() as tasks:
                self._furnish(tasks)
                await self._beat(take=before is not None and _is_dead(before))
                await self._recover_earlier_life()
                self._book.on_change(self._policy_changed)
                tails = Tails(self._store, self._picture, self.dispatcher.dispatch)
                channel = self._store.keys.control_channel(self.name)
                chores = {
                    "policy": self._book.follow(),
                    "fleet": self._fleet.follow(),
                    "beat": self._keep_beating(),
                    "memory": self.residents.watch(),
                    "renew": self.dispatcher.keep_renewing(),
                    "tail": tails.tail(),
                    "resync": tails.resync(),
                    "control": self._store.listen([channel], lambda _, m: self._hear(m), self.dispatcher.renew_now),
                }
                forever = [tasks.create_task(work, name=f"host {what}") for what, work in chores.items()]
                await self._stop.wait()
                self.residents.stop()
                for task in forever:
                    task.cancel()
        finally:
            self._pulse.end()
            self.dispatcher.close()
            with contextlib.suppress(errors.BrokerUnavailable):
                await hosts.leave(self._store, self._record(), list(self.residents.wakers))

    async def drain(self) -> None:
        """Claims no more; what runs may finish until `drainTimeoutMs`, then unseen jobs go back and seen ones are
        told. A second call stops at once."""
        if not hasattr(self, "dispatcher"):  # told before it had begun
            self._stop.set()
            return
        if self.draining:
            await self._end_attempts()
            self._stop.set()
            return
        self.draining = self.dispatcher.stopped = True
        self._beat_now.set()
        limit_s = self._book.active.policy.drain_timeout_ms / 1000 if self._book.present else 0
        log.info("event=drain running=%d limit_s=%.0f", len(self.dispatcher.attempts), limit_s)
        await self._idle_within(limit_s)
        await self._end_attempts()
        self._stop.set()

    def _furnish(self, tasks: asyncio.TaskGroup) -> None:
        self.residents = Residents(
            self._store,
            self._fleet,
            self._picture,
            host=self.name,
            boot=self.boot,
            state_dir=self._settings.state_dir,
            memory_mb=self._settings.memory_mb,
            tasks=tasks,
            tell=lambda: self._beat(take=False),
            changed=self._changed,
            drained=lambda: self.draining or self.drained or self._book.unreadable is not None,
        )
        self.dispatcher = Dispatcher(
            self._store,
            self._book,
            self._fleet,
            self._picture,
            self.residents.wakers,
            self.residents.swaps,
            host=self.name,
            boot=self.boot,
            tasks=tasks,
        )
        self.errands = Errands(self.residents.wakers, tasks=tasks, set_aside=self.set_aside)
        self.counting = Counting(self._store, self.residents.wakers, tasks=tasks)

    def set_aside(self, drained: bool) -> None:
        """Follows an operator: claims no more and wakes nothing, or takes work again. What runs goes on."""
        self.drained = drained
        self.dispatcher.stopped = self.draining or drained
        self._changed()

    def _hear(self, message: bytes) -> None:
        if not (self.errands.hear(message) or self.counting.hear(message)):
            self.dispatcher.told(message)

    async def _recover_earlier_life(self) -> None:
        """Gives back what an earlier, killed life of this worker held: nobody has to wait for its leases to end."""
        if not self._book.present:
            return
        active = self._book.active
        for lane in active.lanes():
            for job_id in await lanes.held_by(self._store, lane, self.name):
                with contextlib.suppress(errors.Lost, errors.NoSuchJob, errors.BadTransition):
                    job = await jobs.read(self._store, job_id)
                    within_ms = continuing.within_ms(active, job) if job.seen else None
                    go_on = await continuing.judge(self._store, job, within_ms=within_ms)
                    await lanes.recover(
                        self._store,
                        job,
                        max_losses=active.policy.max_losses,
                        host=self.name,
                        boot=self.boot,
                        go_on=go_on,
                    )

    async def _idle_within(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.dispatcher.busy and not self._stop.is_set():  # noqa: ASYNC110  # several facts, polled
                    await asyncio.sleep(DRAIN_LOOK_S)

    async def _end_attempts(self) -> None:
        words = f"the worker on {self.name} was stopped while it served this request"
        self.dispatcher.stop_attempts(errors.WorkerLost(words))
        await self._idle_within(LAST_WORDS_S)
        self.dispatcher.abandon()

    def _policy_changed(self, active: Active) -> None:
        self.residents.follow(active)
        self._picture.follow(name for name, lane in active.lanes().items() if lane.model in self.residents.wakers)

    def _changed(self) -> None:
        """A state or a slot is new: tell everybody, and see whether a job can start."""
        self._beat_now.set()
        self.dispatcher.dispatch()

    async def _keep_beating(self) -> None:
        while True:
            self._pulse.beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hosts.BEAT_EVERY_S):
                    await self._beat_now.wait()
            self._beat_now.clear()
            try:
                await self._beat(take=False)
                await self.dispatcher.tell_learned()
            except errors.BrokerUnavailable as e:
                log.debug("event=beat_retry reason=%s", e)
            except errors.LockHeld:
                self.dispatcher.stopped = True  # the name is another worker's now: claim nothing on the way out
                raise

    async def _beat(self, *, take: bool) -> None:
        version = self._book.active.version if self._book.present else 0
        told = {
            name: replace(
                waker.told(version),
                slots_yielding=self.dispatcher.yielding(name),
                slots_kept=self.dispatcher.kept(name),
            )
            for name, waker in self.residents.wakers.items()
        }
        if self.draining or self.drained:  # nobody should count on its free slots any more
            told = {
                name: replace(m, slots_total=m.slots_used + m.slots_settling, slots_kept=0) for name, m in told.items()
            }
        await hosts.beat(self._store, self._record(), told, take=take)

    def _record(self) -> HostRecord:
        memory = self.residents.footprints.memory()
        return HostRecord(
            name=self.name,
            boot=self.boot,
            beat_at=int(time.time() * 1000) + self._fleet.skew_ms,
            started_at=self._started_at,
            memory_total=memory.total,
            memory_used=memory.used,
            memory_headroom=self.residents.headroom(),
            memory_source=memory.source if memory.total else "",
            memory_note=memory.note,
            policy_version=self._book.active.version if self._book.present else 0,
            policy_unread=self._book.unread,
            draining=self.draining or self.drained,
            pid=os.getpid(),
            skew_ms=self._fleet.skew_ms,
            machine=MACHINE,
        )


def _is_dead(before: HostRecord) -> bool:
    """Whether a worker's record is that of an earlier life on this machine. The local lock says so, but not for
    another user, nor for one who spells the Redis URL otherwise: ask for the process too."""
    return before.machine == MACHINE and (before.pid == os.getpid() or not psutil.pid_exists(before.pid))


class NameLock:
    """This machine's lock on a worker's name. Who holds it has proved that an earlier worker of the name, on this
    machine, is dead."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle = handle

    @classmethod
    def take(cls, settings: WorkerSettings) -> "NameLock | None":
        """Takes the lock; None when a live worker here has it."""
        what = f"{settings.redis_url}\n{settings.namespace}\n{settings.host_name}"
        name = f"warmlane-{os.getuid()}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"
        path = Path(tempfile.gettempdir()) / name
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                return None
            if _is_at(path, handle):
                return cls(path, handle)
            os.close(handle)  # its holder took the file away just before we got it

    def close(self) -> None:
        """Lets the name go, and takes the file away while nobody else can hold it."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


async def serve(settings: WorkerSettings) -> int:
    """Runs the worker until it is told to stop; gives the exit code."""
    name = settings.host_name
    held = NameLock.take(settings)
    if held is None:
        print(f"a worker named {name} runs on this machine already", file=sys.stderr)
        return SECOND_NAME_EXIT
    with contextlib.closing(held):
        return await _work(settings, name)


async def _work(settings: WorkerSettings, name: str) -> int:
    store = await Store.open(settings.redis_url, namespace=settings.namespace, name=f"worker-{name}")
    taken = False
    away: errors.BrokerUnavailable | None = None
    try:
        host = Host(store, settings)
        loop = asyncio.get_running_loop()
        drains: list[asyncio.Task[None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: drains.append(loop.create_task(host.drain(), name="drain")))
        await host.run()
    except* errors.BrokerUnavailable as group:  # Redis went away before anything of it could be waited out
        away = errors.BrokerUnavailable(str(group.exceptions[0]))
    except* errors.LockHeld:
        taken = True
        other = f"a worker named {name} is alive on another machine"
        print(f"{other}: give this one another name (GATEWAY_HOST_NAME)", file=sys.stderr)
    finally:
        await store.close()
    if away is not None:
        raise away
    return SECOND_NAME_EXIT if taken else 0


def main() -> None:
    """Entry point of `python -m workers.host`."""
    part.run(serve, part="worker", quiet=["httpx"])


if __name__ == "__main__":
    main()
