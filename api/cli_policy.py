"""`gateway policy`: check, apply and look back at the policy, with Redis where that is asked for."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.syntax import Syntax

from api.exit_codes import UNREACHABLE, USAGE, Failed
from api.machine import machine_memory_mb
from api.state_dir import where
from api.up import AppliedPolicy
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.policy import Policy
from broker.settings import BrokerSettings, read_settings
from broker.store import Store

T = TypeVar("T")

policy_app = typer.Typer(help="Check, apply and look back at the policy.", no_args_is_help=True)

PolicyFile = Annotated[Path, typer.Argument(help="The policy file.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option("--data", help="The data directory of `gateway up`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@policy_app.command("check")
def policy_check(
    file: PolicyFile,
    memory_mb: Annotated[
        int | None, typer.Option(help="Memory that models may use on a host.  [default: this machine's]", min=1)
    ] = None,
) -> None:
    """Says what is wrong with a policy file, line by line. Nothing is applied."""
    policy = Policy.parse(_read(file))
    for warning in policy.warnings(host_memory_mb=memory_mb or machine_memory_mb()):
        print(f"warning: {warning}")
    lanes = sum(1 for name in policy.all_lanes() if not name.endswith(".batch"))
    rules = _count(len(policy.routing), "routing rule")
    print(f"{file}: fine, {_count(len(policy.models), 'model')}, {_count(lanes, 'lane')}, {rules}")


@policy_app.command("schema")
def policy_schema() -> None:
    """Prints the JSON Schema with which editors complete a policy file."""
    print(json.dumps(Policy.json_schema(), indent=2))


@policy_app.command("apply")
def policy_apply(file: PolicyFile, data: DataDir = None) -> None:
    """Makes a file the active policy; every process follows within a second."""
    text = _read(file)
    policy = Policy.parse(text)  # before Redis: a typo needs no server

    async def apply(book: PolicyBook, store: Store) -> tuple[int, int]:
        before = await book.catch_up()
        hosts = (await Fleet(store, book).look()).hosts.values() if before else ()
        there = max((host.memory_total for host in hosts), default=0) >> 20
        for warning in policy.warnings(host_memory_mb=there or None):
            print(f"warning: {warning}", file=sys.stderr)
        return before.version if before else 0, await book.apply(text, by="cli")

    before, after = with_store(apply, data)
    print(f"version {after} is active" if after != before else f"version {after} says the same and stays active")


@policy_app.command("show")
def policy_show(
    wanted: Annotated[int | None, typer.Option("--version", help="An earlier version.", min=1)] = None,
    data: DataDir = None,
) -> None:
    """Prints the active policy as it was written, or an earlier one."""
    if wanted is None:
        text = with_store(_text, data)
    else:
        past = {int(entry["version"]): entry for entry in _with_book(lambda book: book.history(), data)}
        if wanted not in past:
            raise Failed(f"Version {wanted} is not in the history.")
        text = past[wanted]["text"]
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")


@policy_app.command("history")
def policy_history(as_json: AsJson = False, data: DataDir = None) -> None:
    """Lists the last versions, newest first."""
    entries = _with_book(lambda book: book.history(), data)
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    for entry in entries:
        at = datetime.fromtimestamp(int(entry["applied_at"]) / 1000, UTC)
        print(f"{entry['version']:>4}  {at:%Y-%m-%d %H:%M:%S} UTC  {entry['applied_by']:<6}  {entry['digest'][:12]}")


@policy_app.command("rollback")
def policy_rollback(
    to: Annotated[int, typer.Argument(help="The version to go back to.", min=1, metavar="VERSION")],
    data: DataDir = None,
) -> None:
    """Makes an earlier version's text the active policy, as a new version."""
    now = _with_book(lambda book: book.rollback(to), data)
    print(f"version {now} is active, with the text of version {to}")


async def apply_policy(redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy:
    """Brings a policy into Redis for `gateway up`; a made-up one never takes the place of one that was applied."""
    store = await Store.open(redis_url, namespace=namespace, name="gateway-up")
    try:
        book = PolicyBook(store)
        before = await book.reload() if made_up else None
        kept = before is not None and not before.made_up
        if not kept:
            await book.apply(text, by="up", made_up=made_up)
        active = book.active
        return AppliedPolicy(
            version=active.version,
            models=list(active.policy.models),
            kept=kept,
            warnings=[
                *active.policy.warnings(host_memory_mb=machine_memory_mb()),  # the worker of `up` is on this machine
                *await store.unfit_settings(),
            ],
        )
    finally:
        await store.close()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Failed(f"{file} is no UTF-8 text.", USAGE) from None
    except OSError as problem:
        raise Failed(f"{file} can't be read: {problem.strerror}.", USAGE) from None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"


def _with_book(work: Callable[[PolicyBook], Awaitable[T]], data: Path | None) -> T:
    return with_store(lambda book, _store: work(book), data)


def with_store(work: Callable[[PolicyBook, Store], Awaitable[T]], data: Path | None) -> T:
    settings = read_settings(BrokerSettings)

    async def run_it() -> T:
        store = await Store.open(redis_url(settings, data), namespace=settings.namespace, name="gateway-cli")
        try:
            return await work(PolicyBook(store), store)
        finally:
            await store.close()

    return asyncio.run(run_it())


def redis_url(settings: BrokerSettings, data: Path | None) -> str:
    """The Redis of the environment, else the private one that `gateway up` runs on its data directory."""
    if os.environ.get("GATEWAY_REDIS_URL") and data is None:
        return settings.redis_url
    place = data_dir(data, os.environ) / "redis" / "url"
    try:
        return place.read_text().strip()
    except OSError:
        raise Failed(
            f"No GATEWAY_REDIS_URL is set and no `gateway up` has run on {place.parent.parent}; "
            "where one runs on another directory, name it with --data.",
            UNREACHABLE,
        ) from None


def data_dir(data: Path | None, environ: Mapping[str, str]) -> Path:
    """The data directory of `gateway up`: the one that was named, else the one of the environment."""
    return where(data or (Path(environ["GATEWAY_STATE_DIR"]) if environ.get("GATEWAY_STATE_DIR") else None), environ)


async def _text(book: PolicyBook, store: Store) -> str:
    """What was applied, also where this version cannot read it; raises ModelUnavailable where nothing was."""
    written = await store.command("HGET", store.keys.policy, "text")
    if written is None:
        return book.active.policy.text
    text: str = written.decode()
    return text
