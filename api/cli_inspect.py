"""`gateway inspect`: what stands in Redis, read from Redis itself, for when the api, a worker or the scheduler is dead.

Nothing is written and no key is locked: a user of Redis with `+@read` alone may run all of it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from api import inspect_text as text
from api.cli_jobs import JobId
from api.cli_policy import AsJson, DataDir, redis_url
from api.durations import length_ms
from api.exit_codes import REFUSED, USAGE, Failed
from broker import dead, errors
from broker.inspection import hosts, jobs, keys, lanes, story
from broker.inspection.reading import ReadingStore
from broker.lifecycle import ENDED, HELD, LIVE, State
from broker.policies import Active, PolicyBook
from broker.settings import BrokerSettings, read_settings

EVERY_S_MIN = 0.2
LIMIT_MAX = 10_000

GROUPS = {"live": LIVE, "running": HELD, "ended": ENDED, "all": frozenset(State)}
"""Words for several states at once."""

NO_POLICY = "No policy has been applied to this Redis (namespace {namespace}) yet: run `gateway policy apply FILE`."

inspect_app = typer.Typer(
    help="Look at what stands in Redis, without the api: it reads, and changes nothing.", no_args_is_help=True
)

Watch = Annotated[bool, typer.Option("--watch", help="Look again and again until Ctrl-C.")]
Every = Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=EVERY_S_MIN)]
Limit = Annotated[int, typer.Option(help="How many at most.", min=1, max=LIMIT_MAX)]

Seen = tuple[str, Any]
"""What one look gives: the text for people, and the data for `--json`."""

Look = Callable[[ReadingStore, PolicyBook], Awaitable[Seen]]


@inspect_app.command("lanes")
def inspect_lanes(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Who waits and runs in each lane, for how long, held by whom."""

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        found = await lanes.look(store, _needed(store, await book.reload()))
        return text.lanes(found), asdict(found)

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("jobs")
def inspect_jobs(
    state: Annotated[str, typer.Option(help="A state, or live, running, ended, all.")] = "live",
    lane: Annotated[str, typer.Option(help="Only those of this lane.", show_default=False)] = "",
    caller: Annotated[str, typer.Option(help="Only those of this caller.", show_default=False)] = "",
    model: Annotated[str, typer.Option(help="Only those of this model.", show_default=False)] = "",
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Only those submitted so long ago, like 30s.", show_default=False)
    ] = "",
    limit: Limit = 50,
    as_json: AsJson = False,
    watch: Watch = False,
    every_s: Every = 1.0,
    data: DataDir = None,
) -> None:
    """Lists jobs: those of the lanes from the oldest on, ended ones from the newest on."""
    wanted = jobs.Wanted(
        states=_states(state),
        lane=lane,
        caller=caller,
        model=model,
        older_than_ms=_length(older_than),
        limit=limit,
    )

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        active = await book.reload()
        if active is not None and lane and active.lane(lane) is None:
            raise Failed(f"The policy has no lane {lane}: it has {', '.join(active.lanes())}.")
        found = await jobs.find(store, active, wanted)
        told = [{name: getattr(job, name) for name in jobs.TOLD} for job in found.jobs]
        more = {"at_ms": found.at_ms, "unseen": found.unseen, "scanned_all": found.scanned_all}
        return text.jobs(found, limit), {"jobs": told, **more}

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("job")
def inspect_job(
    job_id: JobId,
    as_json: AsJson = False,
    watch: Watch = False,
    every_s: Every = 1.0,
    data: DataDir = None,
) -> None:
    """One job: its steps with their times, what lies ahead, moves, put-backs and losses. Never what it says."""

    async def look(store: ReadingStore, _book: PolicyBook) -> Seen:
        told = await story.tell(store, job_id)
        return text.story(told), told.as_json()

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("hosts")
def inspect_hosts(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """The hosts of the last day, alive or gone, and the models on them."""

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        active = await book.reload()
        found = await hosts.look(store, active)
        return text.hosts(found, active.version if active else 0), {"hosts": [asdict(host) for host in found]}

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("locks")
def inspect_locks(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Wake locks: who holds each, under which epoch, for how much longer."""

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        active = await book.reload()
        models = list(active.models()) if active is not None else await hosts.locked_models(store)
        found = await hosts.locks(store, models)
        return text.locks(found), {"locks": [asdict(lock) for lock in found]}

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("dead")
def inspect_dead(
    limit: Limit = 50, as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None
) -> None:
    """Jobs that were given up on, newest first; `gateway dead` tries them again."""

    async def look(store: ReadingStore, _book: PolicyBook) -> Seen:
        total = int(await store.command("XLEN", store.keys.dead))
        page = await dead.page(store, limit=limit)
        return text.dead(page.letters, total), {"total": total, "dead": [asdict(letter) for letter in page.letters]}

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


@inspect_app.command("keys")
def inspect_keys(as_json: AsJson = False, watch: Watch = False, every_s: Every = 1.0, data: DataDir = None) -> None:
    """Every key by its row of the key table: count, memory, lifetime, and those without an owner or an end. It passes
    by all of them, which takes about a second for every 20,000."""

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        found = await keys.look(store, await book.reload())
        return text.keys(found), asdict(found)

    _show(look, as_json=as_json, every_s=every_s if watch else None, data=data)


def _show(look: Look, *, as_json: bool, every_s: float | None, data: Any) -> None:
    """Looks once, or every `every_s` until Ctrl-C: then a Redis that goes away is waited for."""
    settings = read_settings(BrokerSettings)
    url = redis_url(settings, data)
    console = Console(highlight=False, soft_wrap=True)

    def put(words: str) -> None:
        if every_s is not None and console.is_terminal:
            console.clear()
        console.print(words, markup=False, emoji=False)

    async def once(store: ReadingStore, book: PolicyBook) -> None:
        words, told = await look(store, book)
        put(json.dumps(told, indent=None if every_s is not None else 2) if as_json else words)

    async def run() -> None:
        store = await ReadingStore.open(url, namespace=settings.namespace)
        book = PolicyBook(store)
        try:
            await once(store, book)
            while every_s is not None:
                await asyncio.sleep(every_s)
                try:
                    await once(store, book)
                except errors.BrokerUnavailable as away:
                    put(json.dumps({"error": str(away)}) if as_json else f"{away}; looking again")
        finally:
            await store.close()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        if every_s is None:
            raise


def _needed(store: ReadingStore, active: Active | None) -> Active:
    if active is None:
        raise Failed(NO_POLICY.format(namespace=store.keys.namespace), REFUSED)
    return active


def _states(word: str) -> frozenset[State]:
    if word in GROUPS:
        return GROUPS[word]
    try:
        return frozenset({State(word)})
    except ValueError:
        known = ", ".join([*GROUPS, *(state.value for state in State)])
        raise Failed(f"{word!r} is no state: there are {known}.", USAGE) from None


def _length(words: str) -> int:
    try:
        return length_ms(words) if words else 0
    except ValueError as problem:
        raise Failed(f"--older-than: {problem}.", USAGE) from None
