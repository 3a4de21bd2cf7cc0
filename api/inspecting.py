"""What each `gateway inspect` looks at, and how a look is shown, once or again and again. Nothing is written."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from api import inspect_text as text
from api.cli_policy import redis_url
from api.durations import length_ms
from api.exit_codes import REFUSED, USAGE, Failed
from broker import dead, errors
from broker.inspection import hosts, jobs, keys, lanes, story
from broker.inspection.reading import ReadingStore
from broker.lifecycle import ENDED, HELD, LIVE, State
from broker.policies import Active, PolicyBook
from broker.settings import BrokerSettings, read_settings

GROUPS = {"live": LIVE, "running": HELD, "ended": ENDED, "all": frozenset(State)}
"""Words for several states at once."""

NO_POLICY = "No policy has been applied to this Redis (namespace {namespace}) yet: run `gateway policy apply FILE`."

Seen = tuple[str, Any]
"""What one look gives: the text for people, and the data for `--json`."""

Look = Callable[[ReadingStore, PolicyBook], Awaitable[Seen]]


async def at_lanes(store: ReadingStore, book: PolicyBook) -> Seen:
    """The lanes; raises Failed where no policy says which there are."""
    active = await book.reload()
    if active is None:
        raise Failed(NO_POLICY.format(namespace=store.keys.namespace), REFUSED)
    found = await lanes.look(store, active)
    return text.lanes(found), asdict(found)


def at_jobs(*, state: str, lane: str, caller: str, model: str, older_than: str, limit: int) -> Look:
    """The jobs that are asked for; raises Failed for words that are none."""
    wanted = jobs.Wanted(
        states=_states(state), lane=lane, caller=caller, model=model, older_than_ms=_length(older_than), limit=limit
    )

    async def look(store: ReadingStore, book: PolicyBook) -> Seen:
        active = await book.reload()
        _known(active, lane)
        found = await jobs.find(store, active, wanted)
        told = [{name: getattr(job, name) for name in jobs.TOLD} for job in found.jobs]
        more = {"at_ms": found.at_ms, "unseen": found.unseen, "scanned_all": found.scanned_all}
        return text.jobs(found, limit), {"jobs": told, **more}

    return look


def at_job(job_id: str) -> Look:
    """One job; the look raises NoSuchJob."""

    async def look(store: ReadingStore, _book: PolicyBook) -> Seen:
        told = await story.tell(store, job_id)
        return text.story(told), told.as_json()

    return look


async def at_hosts(store: ReadingStore, book: PolicyBook) -> Seen:
    """The hosts of the last day."""
    active = await book.reload()
    found = await hosts.look(store, active)
    return text.hosts(found, active.version if active else 0), {"hosts": [asdict(host) for host in found]}


async def at_locks(store: ReadingStore, book: PolicyBook) -> Seen:
    """The wake locks of the policy's models, or of those that have any."""
    active = await book.reload()
    models = list(active.models()) if active is not None else await hosts.locked_models(store)
    found = await hosts.locks(store, models)
    return text.locks(found), {"locks": [asdict(lock) for lock in found]}


def at_dead(limit: int) -> Look:
    """The newest dead letters."""

    async def look(store: ReadingStore, _book: PolicyBook) -> Seen:
        total = int(await store.command("XLEN", store.keys.dead))
        page = await dead.page(store, limit=limit)
        return text.dead(page.letters, total), {"total": total, "dead": [asdict(letter) for letter in page.letters]}

    return look


async def at_keys(store: ReadingStore, book: PolicyBook) -> Seen:
    """Every key."""
    found = await keys.look(store, await book.reload())
    return text.keys(found), asdict(found)


def show(look: Look, *, as_json: bool, every_s: float | None, data: Path | None) -> None:
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


def _known(active: Active | None, lane: str) -> None:
    if active is not None and lane and active.lane(lane) is None:
        raise Failed(f"The policy has no lane {lane}: it has {', '.join(active.lanes())}.")


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
