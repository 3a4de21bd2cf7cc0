"""`gateway up`: one command that runs the whole house, and takes it down again in order.

It owns a data directory, runs Redis there unless it is given one, sees to it that Redis holds a policy, and keeps
three processes alive: the api, the scheduler and a worker. They are started by name, never imported.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx

from api.children import Child, Part, Say, keep_alive
from api.discover import discover
from api.embedded_redis import EmbeddedRedis
from api.listen import DEFAULT_URL, Listen
from api.output import Unwritten
from api.part_logs import PartLog
from api.state_dir import CannotStart, only_one_up, state_dir
from api.stop_requests import Stopped, StopRequests, stop_requests
from broker.errors import BrokerError, BrokerUnavailable, PolicyUnreadable
from broker.keybook import KeyBook
from broker.policy import Policy
from broker.store import Store

READY_S_MAX = 30.0
"""How long `up` waits for the api before it says that something is wrong."""
WORKER_S_MAX = 5.0
"""How long it then waits for a worker that can serve something."""
READY_POLL_S = 0.1
STOP_S_MAX = 5.0
"""What the scheduler and the api get to end."""
REDIS_STOP_S_MAX = 15.0
"""What Redis gets to write the rest of its file."""

NOT_CLEAN = 1
CANNOT_START = 2
NO_REDIS = 3
INTERRUPTED = 130

_ROOMS = ("api", "broker", "workers")


@dataclass(frozen=True)
class Options:
    """What the person who typed `gateway up` wants."""

    policy_path: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8400
    """0 takes any free port."""
    data_dir: Path | None = None
    redis_url: str = ""
    """A Redis that somebody else looks after; empty runs a private one."""
    namespace: str = "gw"
    keys: str = field(default="", repr=False)
    host_name: str = ""


@dataclass(frozen=True)
class AppliedPolicy:
    """What Redis holds once the policy has been seen to."""

    version: int
    models: Sequence[str]
    kept: bool = False
    """True if a policy that somebody applied was left in place of a made-up one."""
    warnings: Sequence[str] = ()


class ApplyPolicy(Protocol):
    """Brings a policy into Redis if it differs from the active one; raises BrokerError.

    A made-up policy never takes the place of one that a person has applied.
    """

    async def __call__(self, redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy: ...


class MakeParts(Protocol):
    """Makes the processes to keep alive, in the order of their start; they are stopped in the opposite one."""

    def __call__(self, env: Mapping[str, str], *, keys: str, say: Say) -> Sequence[Part]: ...


def gateway_parts(env: Mapping[str, str], *, keys: str, say: Say) -> Sequence[Part]:
    """The three processes of the house; only the api learns the keys. What they say is kept in the data directory."""

    def child(name: str, module: str, env: Mapping[str, str] = env) -> Child:
        keep = PartLog(Path(env["GATEWAY_STATE_DIR"]), name).write
        return Child(name, (sys.executable, "-P", "-m", module), env=env, say=say, keep=keep)

    return (
        child("api", "api.app", {**env, "GATEWAY_KEYS": keys} if keys else env),
        child("scheduler", "workers.scheduler"),
        child("worker", "workers.host"),
    )


def print_line(line: str) -> None:
    """Prints at once, and goes on in silence when nobody listens any more (`gateway up | head`)."""
    try:
        with contextlib.suppress(Unwritten):  # a full disk is no reason to serve nobody
            print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_problem(sentence: str) -> None:
    """Prints why `up` gives up, where every command says what went wrong."""
    print(sentence, file=sys.stderr)


async def up(
    options: Options,
    *,
    apply_policy: ApplyPolicy,
    environ: Mapping[str, str] = os.environ,
    say: Say = print_line,
    complain: Say = print_problem,
    make_parts: MakeParts = gateway_parts,
) -> int:
    """Runs everything until it is told to stop; gives the exit code, 0 only after a clean end."""
    try:
        directory = state_dir(options.data_dir, environ)
        with only_one_up(directory), stop_requests() as requests:
            listen = Listen.on(options.host, options.port)
            may_have_keys = options.keys or options.redis_url or EmbeddedRedis.was_in(directory)
            if not listen.is_loopback and not may_have_keys:
                raise CannotStart(listen.needs_keys)
            house = _House(options, listen, directory, requests, environ=environ, say=say)
            return await house.run(apply_policy, make_parts)
    except (CannotStart, PolicyUnreadable) as problem:
        complain(str(problem))
        return CANNOT_START
    except BrokerUnavailable as problem:
        complain(str(problem))
        return NO_REDIS
    except BrokerError as problem:
        complain(str(problem))
        return CANNOT_START


class _House:
    """Everything that `up` has started, in the order of the start."""

    def __init__(
        self,
        options: Options,
        listen: Listen,
        directory: Path,
        requests: StopRequests,
        *,
        environ: Mapping[str, str],
        say: Say,
    ) -> None:
        self._options = options
        self._listen = listen
        self._directory = directory
        self._requests = requests
        self._environ = environ
        self._say = say
        self._parts: list[Part] = []
        self._hopeless: CannotStart | None = None

    async def run(self, apply_policy: ApplyPolicy, make_parts: MakeParts) -> int:
        clean = True
        try:
            await self._requests.unless(self._start(apply_policy, make_parts))
            async with asyncio.TaskGroup() as tasks:
                keepers = [
                    tasks.create_task(self._keep_alive(part), name=f"keeper of {part.name}") for part in self._parts
                ]
                ready = tasks.create_task(self._tell_when_ready(), name="ready")
                await self._requests.asked.wait()
                self._say("stopping; Ctrl-C (again) cuts what still runs")
                ready.cancel()
                for part, keeper in reversed(list(zip(self._parts, keepers, strict=True))):
                    keeper.cancel()
                    await asyncio.wait((keeper,))
                    clean &= await self._stop(part)
        except Stopped:
            pass
        finally:
            # After an orderly end this finds nothing left to stop.
            for part in reversed(self._parts):
                clean &= await self._stop(part)
        if self._requests.hurry.is_set():
            return INTERRUPTED
        self._say("stopped" if clean else "stopped, but not cleanly: see above")
        if self._hopeless is not None:
            raise self._hopeless
        return 0 if clean else NOT_CLEAN

    async def _start(self, apply_policy: ApplyPolicy, make_parts: MakeParts) -> None:
        options = self._options
        text = _read(options.policy_path) if options.policy_path is not None else None
        if text is not None:
            Policy.parse(text)  # before anything is started
        redis_url = options.redis_url
        which = "the one at GATEWAY_REDIS_URL"
        if not redis_url:
            redis = EmbeddedRedis(self._directory, _without_our_settings(self._environ))
            self._parts.append(redis)
            await redis.start()
            redis_url, which = redis.url, str(redis)
        named = await has_keys(redis_url, options.namespace)
        if not options.keys and not named and not self._listen.is_loopback:
            raise CannotStart(self._listen.needs_keys)
        if text is None:
            made = await discover(self._environ)
            policy = await apply_policy(redis_url, options.namespace, made.text, made_up=True)
            origin = made.sentence
        else:
            policy = await apply_policy(redis_url, options.namespace, text, made_up=False)
            origin = f"from {options.policy_path}"
        self._introduce(which, "the one that was applied before" if policy.kept else origin, policy, named=named)
        for part in make_parts(self._child_env(redis_url), keys=options.keys, say=self._say):
            self._parts.append(part)
            await part.start()

    async def _keep_alive(self, part: Part) -> None:
        """Keeps a part alive; one that cannot run as it is set up takes the whole house down, in order."""
        try:
            await keep_alive(part, say=self._say)
        except CannotStart as problem:
            self._hopeless = problem
            self._requests.asked.set()

    async def _stop(self, part: Part) -> bool:
        grace_s = {"worker": self._requests.drain_s, "redis": REDIS_STOP_S_MAX}.get(part.name, STOP_S_MAX)
        clean = await part.stop(grace_s=grace_s, hurry=self._requests.hurry)
        if not clean:
            self._say(f"{part.name} did not end cleanly")
        return clean

    def _introduce(self, redis: str, origin: str, policy: AppliedPolicy, *, named: bool) -> None:
        version = _version()
        key = "one of `gateway key new`" if named else "one of GATEWAY_KEYS" if self._options.keys else "any"
        self._say(f"warmlane  {version} listens on {self._listen.url}, its data is in {self._directory}")
        self._say(f"redis     {redis}")
        self._say(f"policy    version {policy.version}, {origin}")
        for warning in policy.warnings:
            self._say(f"          {warning}")
        self._say(f"models    {', '.join(policy.models)}")
        self._say(f"clients   OPENAI_BASE_URL={self._listen.url}/v1 OPENAI_API_KEY={key}")
        if self._listen.url != DEFAULT_URL:
            self._say(f"commands  GATEWAY_URL={self._listen.url} gateway status")

    async def _tell_when_ready(self) -> None:
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            try:
                await _until_fine(client, f"{self._listen.url}/healthz", READY_S_MAX)
            except TimeoutError:
                self._say(f"The api has not answered within {READY_S_MAX:g} s; what it says is above. Still trying.")
                return
            # The worker comes a moment later; who asks before it would be refused. A model that cannot be loaded at
            # all is told by the worker, not by our silence.
            with contextlib.suppress(TimeoutError):
                await _until_fine(client, f"{self._listen.url}/readyz", WORKER_S_MAX)
        self._say("ready     the api answers; Ctrl-C stops everything")

    def _child_env(self, redis_url: str) -> dict[str, str]:
        env = child_environment(self._environ)
        env.update(
            GATEWAY_REDIS_URL=redis_url,
            GATEWAY_NAMESPACE=self._options.namespace,
            GATEWAY_BIND=self._listen.bind,
            GATEWAY_STATE_DIR=str(self._directory),
        )
        if self._options.host_name:
            env["GATEWAY_HOST_NAME"] = self._options.host_name
        return env


async def has_keys(redis_url: str, namespace: str) -> bool:
    """Whether named callers have keys there."""
    store = await Store.open(redis_url, namespace=namespace)
    try:
        book = KeyBook(store)
        await book.reload()
        return bool(book)
    finally:
        await store.close()


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment, such that `python -P -m workers.host` finds our packages and no other of that name.

    `-P` keeps the working directory out. An uninstalled checkout is then found through PYTHONPATH; entries of it that
    are relative, or hold packages called like ours, would let a stranger's in.
    """
    env = {name: value for name, value in environ.items() if name not in ("GATEWAY_KEYS", "GATEWAY_POLICY")}
    root = Path(__file__).resolve().parent.parent
    installed = {Path(place).resolve() for place in (*site.getsitepackages(), site.getusersitepackages())}
    places = [Path(place) for place in env.pop("PYTHONPATH", "").split(os.pathsep)]
    places = [place for place in places if place.is_absolute() and not any((place / room).exists() for room in _ROOMS)]
    if root not in installed:
        places.insert(0, root)  # site-packages stay where they are: before the standard library they could hide it
    if places:
        env["PYTHONPATH"] = os.pathsep.join(map(str, places))
    return env | {"PYTHONUNBUFFERED": "1"}


def _version() -> str:
    try:
        return importlib.metadata.version("warmlane")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout that isn't installed)"


def _without_our_settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith("GATEWAY_")}


async def _until_fine(client: httpx.AsyncClient, url: str, s_max: float) -> None:
    """Asks until the answer is a success; raises TimeoutError."""
    async with asyncio.timeout(s_max):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).is_success:
                    return
            await asyncio.sleep(READY_POLL_S)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CannotStart(f"The policy {path} is no UTF-8 text.") from None
    except OSError as error:
        raise CannotStart(f"The policy {path} can't be read: {error.strerror}.") from error
