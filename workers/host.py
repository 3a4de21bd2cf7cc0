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
from collections.abc import Callable
from pathlib import Path

import uvloop
from ulid import ULID

from broker import dispatch, errors, hosts, jobs, lanes
from broker.hosts import Fleet
from broker.policies import Active, PolicyBook
from broker.policy import Model
from broker.records import HostRecord, ModelFacts, Waiting
from broker.store import Store
from workers.attempt import Attempt, Ended, Limits
from workers.memory import Resident, evictions, host_memory, predicted_bytes
from workers.picture import KEPT_INTERACTIVE, LanePicture
from workers.runtimes.base import LoadFailed
from workers.settings import WorkerSettings
from workers.stream_client import StreamClient
from workers.waker import Surroundings, Waker

log = logging.getLogger("warmlane.host")

RENEW_EVERY_S = 3.0
RESYNC_EVERY_S = 5.0
RETRY_PAUSE_S = 0.2
ROOM_WAIT_S = 20.0
ROOM_LOOK_S = 0.25
EWMA = 0.2
SECOND_NAME_EXIT = 4
MACHINE = f"{platform.node()}/{uuid.getnode():x}"


class Host:
    """The worker of one machine."""

    def __init__(self, store: Store, settings: WorkerSettings, *, on_claim: Callable[[Waiting], None] | None = None) -> None:
        self.name = settings.host_name
        self.boot = str(ULID())
        self.draining = False
        self.wakers: dict[str, Waker] = {}
        self._settings = settings
        self._store = store
        self._book = PolicyBook(store)
        self._fleet = Fleet(store, self._book)
        self._picture = LanePicture()
        self._client = StreamClient()
        self._attempts: dict[str, Attempt] = {}
        self._tasks: asyncio.TaskGroup
        self._waker_tasks: dict[str, asyncio.Task[None]] = {}
        self._beat_now = asyncio.Event()
        self._stop = asyncio.Event()
        self._started_at = 0
        self._interactive_at: dict[str, int] = {}
        self._service_ms: dict[str, float] = {}
        self._unlearned: set[str] = set()
        self._skew_ms = 0
        self._on_claim = on_claim
        self._loading = asyncio.Lock()

    async def run(self) -> None:
        """Lives until `drain` is done; raises LockHeld when a worker on another machine has the name."""
        store = self._store
        self._started_at = await store.now_ms()
        await self._book.reload()
        before = await hosts.read(store, self.name)
        # the local lock proves that an earlier worker of this name on this machine is dead
        await self._beat(take=before is not None and before.machine == MACHINE)
        forever: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._book.on_change(self._policy_changed)
                chores = {
                    "policy": self._book.follow(), "fleet": self._fleet.follow(), "beat": self._keep_beating(),
                    "renew": self._keep_renewing(), "tail": self._tail(), "control": self._listen(),
                    "resync": self._keep_resyncing(),
                }  # fmt: skip
                forever = [self._tasks.create_task(work, name=f"host {what}") for what, work in chores.items()]
                await self._stop.wait()
                for task in [*self._waker_tasks.values(), *forever]:
                    task.cancel()
        finally:
            self._client.close()
            with contextlib.suppress(errors.BrokerUnavailable):
                await hosts.leave(store, self._record(), list(self.wakers))

    async def drain(self, *, limit_s: float | None = None) -> None:
        """Claims no more; what runs may finish until the limit, then unseen jobs go back and seen ones are told."""
        if self.draining:
            self._stop_attempts()
            self._stop.set()
            return
        self.draining = True
        self._beat_now.set()
        if limit_s is None:
            limit_s = self._book.active.policy.drain_timeout_ms / 1000 if self._book.present else 0
        log.info("event=drain running=%d limit_s=%.0f", len(self._attempts), limit_s)
        until = asyncio.get_running_loop().time() + limit_s
        while self._attempts and asyncio.get_running_loop().time() < until and not self._stop.is_set():
            await asyncio.sleep(0.05)
        self._stop_attempts()
        grace = asyncio.get_running_loop().time() + 2.0
        while self._attempts and asyncio.get_running_loop().time() < grace:
            await asyncio.sleep(0.02)
        self._stop.set()

    def _stop_attempts(self) -> None:
        for attempt in list(self._attempts.values()):
            attempt.stop(errors.WorkerLost(f"the worker on {self.name} was stopped while it served this request"))

    # --- what jobs wait -------------------------------------------------------------------------------------------

    async def _tail(self) -> None:
        """Hears of every new entry in the lanes of this host's models, at once."""
        last: dict[str, str] = {}
        async with self._store.tail() as tail:
            while True:
                try:
                    served = self._served_lanes()
                    last = {lane: last[lane] for lane in served if lane in last}
                    for lane in served:
                        if lane not in last:
                            last[lane] = await self._newest(lane)
                            await self._resync(lane)
                    if not last:
                        await asyncio.sleep(RETRY_PAUSE_S)
                        continue
                    names = {self._store.keys.lane(lane): lane for lane in last}
                    for key, entries in await tail.read({key: last[lane] for key, lane in names.items()}):
                        lane = names[key]
                        for entry, values in entries:
                            self._picture.add(Waiting.from_entry(lane, entry, values))
                        last[lane] = entries[-1][0].decode()
                    self._dispatch()
                except errors.BrokerUnavailable as e:
                    log.debug("event=tail_retry reason=%s", e)
                    last = {}  # after a break, look at the whole lane again
                    await asyncio.sleep(RETRY_PAUSE_S)

    async def _newest(self, lane: str) -> str:
        newest = await self._store.command("XREVRANGE", self._store.keys.lane(lane), "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"

    async def _resync(self, lane: str) -> None:
        found = [job async for job in lanes.waiting_entries(self._store, lane, limit=KEPT_INTERACTIVE * 2)]
        self._picture.replace(lane, found)

    async def _keep_resyncing(self) -> None:
        whole_at = 0.0
        while True:
            await asyncio.sleep(RETRY_PAUSE_S)
            try:
                now = asyncio.get_running_loop().time()
                which = self._picture.short()
                if now - whole_at > RESYNC_EVERY_S:
                    whole_at, which = now, self._served_lanes()
                    self._skew_ms = await self._store.now_ms() - _wall_ms()
                for lane in which:
                    await self._resync(lane)
                self._dispatch()
            except errors.BrokerUnavailable as e:
                log.debug("event=resync_retry reason=%s", e)

    def _served_lanes(self) -> list[str]:
        if not self._book.present:
            return []
        return [name for name, lane in self._book.active.lanes().items() if lane.model in self.wakers]

    # --- who is next ----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Gives free slots of warm models away. Called whenever a job, a slot or a state is new."""
        if self.draining or not self._book.present:
            return
        active = self._book.active
        for name, waker in self.wakers.items():
            while waker.claimable:
                waiting = self._picture.waiting(active.lanes_of(name))
                job = dispatch.choose(
                    (w for w in waiting if waker.state == "warm" or self._takes_degraded(w, active)),
                    free=waker.slots.free, total=waker.slots.total, now_ms=_wall_ms() + self._skew_ms,
                    service_ms=self._service_ms.get(name, 0.0), interactive_at=self._interactive_at.get(name, 0),
                )  # fmt: skip
                if job is None:
                    break
                self._picture.spent(job)
                waker.slots.take(job.job)
                self._tasks.create_task(self._serve(waker, job), name=f"attempt {job.job}")

    def _takes_degraded(self, job: Waiting, active: Active) -> bool:
        """Batch may use a slow model; a person's job too where there is nothing else for it."""
        lane = active.lane(job.lane)
        return job.priority == "batch" or lane is None or lane.fallback is None

    async def _serve(self, waker: Waker, job: Waiting) -> None:
        clean = True
        ended: Ended | None = None
        try:
            claimed = await lanes.claim(self._store, self._book.active, job, host=self.name, boot=self.boot)
            if job.priority != "batch":
                self._interactive_at[waker.name] = claimed.record.claimed_at
            if self._on_claim is not None:
                self._on_claim(job)
            model = waker.model
            limits = Limits(
                model.first_token_timeout_ms, model.stall_timeout_ms, self._book.active.policy.max_losses
            )  # fmt: skip
            attempt = Attempt(
                self._store, self._client, claimed, waker.runtime.endpoint(), limits, served_by=f"{waker.name}@{self.name}"
            )  # fmt: skip
            self._attempts[job.job] = attempt
            try:
                ended = await attempt.run()
            finally:
                del self._attempts[job.job]
            clean = ended.clean
        except errors.StalePolicy:
            await self._book.reload()
            await self._forget_try(job)
        except (errors.Lost, errors.NoSuchJob, errors.BadTransition, errors.TrustZoneRefused) as e:
            log.debug("event=claim_lost job=%s reason=%s", job.job, e)
        except errors.BrokerUnavailable as e:
            log.warning("event=claim_retry job=%s reason=%s", job.job, e)
            await self._forget_try(job)
        finally:
            waker.released(job.job, clean=clean)
            if ended is not None:
                self._learn(waker, ended)
            self._dispatch()

    async def _forget_try(self, job: Waiting) -> None:
        """A claim under an old policy leaves the entry as it was: forget that it was tried."""
        self._picture.unspend(job)
        with contextlib.suppress(errors.BrokerUnavailable):
            await self._resync(job.lane)

    def _learn(self, waker: Waker, ended: Ended) -> None:
        if ended.suspect:
            waker.suspect()
        if ended.outcome != "done":
            return
        before = self._service_ms.get(waker.name) or self._fleet.picture.facts.get(waker.name, ModelFacts()).service_ms
        self._service_ms[waker.name] = before + EWMA * (ended.total_ms - before) if before else ended.total_ms
        self._unlearned.add(waker.name)
        usage = ended.usage or {}
        waker.note_first_token(
            ended.first_token_ms, prompt_tokens=usage.get("prompt_tokens", 0), cached_tokens=usage.get("cached_tokens", 0)
        )  # fmt: skip

    # --- proving life ---------------------------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            await asyncio.gather(*(self._renew(attempt) for attempt in list(self._attempts.values())))

    async def _renew(self, attempt: Attempt) -> None:
        try:
            await jobs.renew(self._store, attempt.held, lease_ms=lanes.JOB_LEASE_MS)
        except (errors.Lost, errors.NoSuchJob) as e:
            attempt.stop(e)
        except errors.BrokerUnavailable as e:
            log.debug("event=renew_retry job=%s reason=%s", attempt.held.job_id, e)

    async def _keep_beating(self) -> None:
        while True:
            try:
                async with asyncio.timeout(hosts.BEAT_EVERY_S):
                    await self._beat_now.wait()
            except TimeoutError:
                pass
            self._beat_now.clear()
            try:
                await self._beat(take=False)
                for name in list(self._unlearned):
                    await hosts.learn(self._store, name, service_ms=round(self._service_ms[name], 1))
                    self._unlearned.discard(name)
            except errors.BrokerUnavailable as e:
                log.debug("event=beat_retry reason=%s", e)

    async def _beat(self, *, take: bool) -> None:
        version = self._book.active.version if self._book.present else 0
        told = {name: waker.told(version) for name, waker in self.wakers.items()}
        await hosts.beat(self._store, self._record(), told, take=take)

    def _record(self) -> HostRecord:
        memory = host_memory(self._settings.memory_mb, [w.memory_bytes for w in self.wakers.values()])
        return HostRecord(
            name=self.name, boot=self.boot, beat_at=_wall_ms() + self._skew_ms, started_at=self._started_at,
            memory_total=memory.total, memory_used=memory.used, memory_headroom=memory.headroom,
            policy_version=self._book.active.version if self._book.present else 0, draining=self.draining, pid=os.getpid(),
            machine=MACHINE,
        )  # fmt: skip

    async def _listen(self) -> None:
        await self._store.listen([self._store.keys.control_channel(self.name)], self._told, lambda: None)

    def _told(self, _channel: str, message: bytes) -> None:
        """Hears `cancel <job> <attempt>` and `stop <job> <attempt>`: the job is not ours any more."""
        word, job_id, number = message.decode().split(" ")
        attempt = self._attempts.get(job_id)
        if attempt is not None and attempt.held.attempt == int(number):
            log.info("event=%s job=%s attempt=%s", word, job_id, number)
            attempt.stop()

    # --- models ---------------------------------------------------------------------------------------------------

    def _policy_changed(self, active: Active) -> None:
        """Takes new models in, lets removed ones go when they are idle, hands changed definitions on."""
        models = active.models()
        for name, model in models.items():
            if model.hosts is not None and self.name not in model.hosts:
                continue
            waker = self.wakers.get(name)
            if waker is None:
                self.wakers[name] = waker = self._new_waker(name, model)
                self._waker_tasks[name] = self._tasks.create_task(waker.run(), name=f"waker {name}")
            else:
                waker.wanted_model = waker.model if waker.model == model else model
                waker.kick()
        for name in self.wakers.keys() - models.keys():
            waker = self.wakers[name]
            waker.leaving = True
            self._tasks.create_task(self._let_go(waker), name=f"let go {name}")
        self._picture.follow(self._served_lanes())
        self._beat_now.set()

    async def _let_go(self, waker: Waker) -> None:
        while not waker.slots.idle and not self._stop.is_set():
            await asyncio.sleep(RETRY_PAUSE_S)
        if self.wakers.get(waker.name) is waker:
            del self.wakers[waker.name]
            self._waker_tasks.pop(waker.name).cancel()
            self._beat_now.set()

    def _new_waker(self, name: str, model: Model) -> Waker:
        around = Surroundings(
            now_ms=self._now_ms, facts=lambda n: self._fleet.picture.facts.get(n, ModelFacts()),
            warm_elsewhere=self._warm_elsewhere, make_room=self._make_room, learn=self._learned, changed=self._changed,
        )  # fmt: skip
        return Waker(
            self._store, name, model, host=self.name, boot=self.boot, state_dir=self._settings.state_dir, around=around
        )  # fmt: skip

    def _changed(self) -> None:
        self._beat_now.set()
        self._dispatch()

    async def _now_ms(self) -> int:
        return await self._store.now_ms()

    async def _learned(self, model: str, **facts: float | int | str) -> None:
        await hosts.learn(self._store, model, **facts)
        await self._fleet.look()

    def _warm_elsewhere(self, model: str) -> bool:
        """Whether another live host has the model, or is about to: one is enough."""
        others = self._fleet.picture.on_host.get(model, {})
        return any(h != self.name and m.state in ("warm", "degraded", "waking") for h, m in others.items())

    async def _make_room(self, name: str) -> None:
        """Unloads idle models until `name` fits, and waits until the memory is really back."""
        async with self._loading:
            waker = self.wakers[name]
            facts = self._fleet.picture.facts.get(name, ModelFacts())
            model = waker.model
            need = predicted_bytes(learned=facts.footprint_bytes, memory_mb=model.memory_mb, weights=model.model)
            if await waker.runtime.state() == "loaded":
                return
            going = evictions(need, self._headroom(), self._residents(name))
            if going is None:
                raise LoadFailed(
                    f"{name} needs {need >> 20} MB, {self._headroom() >> 20} MB are free and nothing idle can make room"
                )
            for victim in going:
                log.info("event=evict model=%s for=%s", victim, name)
                await self.wakers[victim].unload(f"made room for {name}")
            until = asyncio.get_running_loop().time() + ROOM_WAIT_S
            while going and self._headroom() < need and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(ROOM_LOOK_S)

    def _headroom(self) -> int:
        return host_memory(self._settings.memory_mb, [w.memory_bytes for w in self.wakers.values()]).headroom

    def _residents(self, but: str) -> list[Resident]:
        found = []
        for name, waker in self.wakers.items():
            if name == but or not waker.memory_bytes:
                continue
            load_ms = self._fleet.picture.facts.get(name, ModelFacts()).load_ms
            found.append(Resident(
                name, waker.memory_bytes, load_ms, waker.model.weight, waker.idle_ms, waker.stayed_ms,
                waker.model.min_stay_ms, waker.state in ("warm", "degraded"),
            ))  # fmt: skip
        return found


def _wall_ms() -> int:
    return int(time.time() * 1000)


def lock_name(settings: WorkerSettings) -> int | None:
    """Takes this machine's lock on the worker's name; None when a live worker here has it.

    Who holds it has proved that an earlier worker of the name, on this machine, is dead.
    """
    what = f"{settings.redis_url}\n{settings.namespace}\n{settings.host_name}"
    name = f"warmlane-{os.getuid()}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock"
    handle = os.open(Path(tempfile.gettempdir()) / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


async def serve(settings: WorkerSettings) -> int:
    """Runs the worker until it is told to stop; gives the exit code."""
    held = lock_name(settings)
    if held is None:
        print(f"a worker named {settings.host_name} runs on this machine already", file=sys.stderr)
        return SECOND_NAME_EXIT
    store = await Store.open(settings.redis_url, namespace=settings.namespace, name=f"worker-{settings.host_name}")
    try:
        host = Host(store, settings)
        loop = asyncio.get_running_loop()
        drains: list[asyncio.Task[None]] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: drains.append(loop.create_task(host.drain(), name="drain")))
        await host.run()
        return 0
    except* errors.LockHeld:
        print(f"a worker named {settings.host_name} is alive on another machine: give this one another name "
              f"(GATEWAY_HOST_NAME)", file=sys.stderr)  # fmt: skip
    finally:
        await store.close()
        os.close(held)
    return SECOND_NAME_EXIT


def main() -> None:
    """Entry point of `python -m workers.host`."""
    settings = WorkerSettings()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        raise SystemExit(uvloop.run(serve(settings)))
    except errors.BrokerUnavailable as e:
        print(e, file=sys.stderr)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
