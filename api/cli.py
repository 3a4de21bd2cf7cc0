"""`gateway`: the command line.

Exit codes: 0 fine, 1 refused or failed, 2 wrong usage or an invalid policy, 3 the gateway or its Redis cannot be
reached. Whatever goes wrong is one sentence on stderr. Commands for clients speak HTTP to GATEWAY_URL, so that they
work from any machine; those for the policy speak to Redis.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import httpx
import typer
from rich.console import Console
from rich.syntax import Syntax

from api.listen import Listen
from api.settings import ApiSettings
from api.state_dir import CannotStart, state_dir
from api.status_table import duration, status_table
from api.up import AppliedPolicy, Options, child_environment
from api.up import up as run_up
from api.version import version as installed_version
from broker import errors
from broker.policies import PolicyBook
from broker.policy import Policy
from broker.settings import BrokerSettings, SettingsInvalid, read_settings
from broker.status import Snapshot
from broker.store import Store

REFUSED, USAGE, UNREACHABLE = 1, 2, 3
ANSWER_S_MAX = 10.0

T = TypeVar("T")

app = typer.Typer(
    help="A gateway for local LLMs with predictable first-token latency.", no_args_is_help=True,
    pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
)  # fmt: skip
policy_app = typer.Typer(help="Check, apply and look back at the policy.", no_args_is_help=True)
job_app = typer.Typer(help="Look at a job, or cancel it.", no_args_is_help=True)
model_app = typer.Typer(help="What may be asked for.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
app.add_typer(job_app, name="job")
app.add_typer(model_app, name="model")

PolicyFile = Annotated[Path, typer.Argument(help="The policy file.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option("--data", help="The data directory of `gateway up`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Failed(Exception):
    """A sentence for the person, and the exit code."""

    def __init__(self, sentence: str, code: int = REFUSED) -> None:
        super().__init__(sentence)
        self.code = code


@app.command()
def up(
    policy: Annotated[Path | None, typer.Option(help="The policy to serve.", envvar="GATEWAY_POLICY")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one.  [default: 8400]", min=0, max=65535)] = None,
    data: Annotated[Path | None, typer.Option(help="Where the data goes.", envvar="GATEWAY_STATE_DIR")] = None,
) -> None:
    """Runs everything on this machine: Redis if need be, the api, the scheduler and a worker."""
    settings = read_settings(ApiSettings)
    options = Options(
        policy_path=policy,
        host=host or settings.host,
        port=settings.port if port is None else port,
        data_dir=data,
        redis_url=os.environ.get("GATEWAY_REDIS_URL", ""),
        namespace=settings.namespace,
        keys=settings.keys.get_secret_value(),
        host_name=os.environ.get("GATEWAY_HOST_NAME", ""),
    )
    raise typer.Exit(asyncio.run(run_up(options, apply_policy=apply_policy)))


@app.command()
def api(
    host: Annotated[str | None, typer.Option(help="Where to listen; GATEWAY_BIND says so too.")] = None,
    port: Annotated[int | None, typer.Option(help="The port.", min=0, max=65535)] = None,
) -> None:
    """Runs the api alone, against GATEWAY_REDIS_URL."""
    settings = read_settings(ApiSettings)
    place = Listen(host or settings.host, settings.port if port is None else port)
    _become("api.app", GATEWAY_BIND=place.bind, GATEWAY_KEYS=settings.keys.get_secret_value())


@app.command()
def worker() -> None:
    """Runs a worker alone: one per machine with runtimes."""
    _become("workers.host")


@app.command()
def scheduler() -> None:
    """Runs the scheduler alone."""
    _become("workers.scheduler")


@app.command()
def version() -> None:
    """Prints the version."""
    print(installed_version())


@app.command()
def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again and again until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 1.0,
) -> None:
    """Shows models, queues, memory and the policy."""
    console = Console(highlight=False, soft_wrap=True)

    async def show() -> None:
        told = await _ask("GET", "/v1/status")
        text = json.dumps(told, indent=2) if as_json else status_table(Snapshot.from_json(told))
        if watch and console.is_terminal:
            console.clear()
        console.print(text, markup=False)

    async def look() -> None:
        await show()
        while watch:
            await asyncio.sleep(every_s)
            await show()

    try:
        asyncio.run(look())
    except KeyboardInterrupt:
        if not watch:
            raise


@policy_app.command("check")
def policy_check(file: PolicyFile) -> None:
    """Says what is wrong with a policy file, line by line. Nothing is applied."""
    policy = Policy.parse(_read(file))
    for warning in policy.warnings():
        print(f"warning: {warning}")
    lanes = sum(1 for name in policy.all_lanes() if not name.endswith(".batch"))
    print(f"{file}: fine, {len(policy.models)} models, {lanes} lanes, {len(policy.routing)} routing rules")


@policy_app.command("schema")
def policy_schema() -> None:
    """Prints the JSON Schema with which editors complete a policy file."""
    print(json.dumps(Policy.json_schema(), indent=2))


@policy_app.command("apply")
def policy_apply(file: PolicyFile, data: DataDir = None) -> None:
    """Makes a file the active policy; every process follows within a second."""
    text = _read(file)
    policy = Policy.parse(text)  # before Redis: a typo needs no server
    for warning in policy.warnings():
        print(f"warning: {warning}", file=sys.stderr)

    async def apply(book: PolicyBook) -> tuple[int, int]:
        before = await book.reload()
        return before.version if before else 0, await book.apply(text, by="cli")

    before, after = _with_book(apply, data)
    print(f"version {after} is active" if after != before else f"version {after} says the same and stays active")


@policy_app.command("show")
def policy_show(
    wanted: Annotated[int | None, typer.Option("--version", help="An earlier version.", min=1)] = None,
    data: DataDir = None,
) -> None:
    """Prints the active policy as it was written, or an earlier one."""
    if wanted is None:
        active = _with_book(_active, data)
        text = active.policy.text
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


@job_app.command("show")
def job_show(job_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Shows what became of a job."""
    _print_job(asyncio.run(_ask("GET", f"/v1/jobs/{job_id}")), as_json=as_json)


@job_app.command("cancel")
def job_cancel(job_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Cancels a job in any state."""
    _print_job(asyncio.run(_ask("DELETE", f"/v1/jobs/{job_id}")), as_json=as_json)


@model_app.command("list")
def model_list(as_json: AsJson = False) -> None:
    """Lists every name that a client may ask for."""
    told = asyncio.run(_ask("GET", "/v1/models"))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for model in told["data"]:
        print(model["id"])


async def apply_policy(redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy:
    """Brings a policy into Redis for `gateway up`; a made-up one never takes the place of one that was applied."""
    store = await Store.open(redis_url, namespace=namespace, name="gateway-up")
    try:
        book = PolicyBook(store)
        before = await book.reload()
        kept = made_up and before is not None and not before.made_up
        if not kept:
            await book.apply(text, by="up", made_up=made_up)
        active = book.active
        return AppliedPolicy(
            version=active.version,
            models=list(active.policy.models),
            kept=kept,
            warnings=[*active.policy.warnings(), *await store.unfit_settings()],
        )
    finally:
        await store.close()


def main() -> NoReturn:
    """Runs a command; every failure that somebody foresaw is a sentence and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command of these words; gives the exit code."""
    try:
        app(arguments, standalone_mode=True, prog_name="gateway")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Failed as failure:
        return _say(str(failure), failure.code)
    except (errors.PolicyInvalid, SettingsInvalid) as invalid:
        return _say("\n".join(invalid.problems), USAGE)
    except CannotStart as problem:
        return _say(str(problem), USAGE)
    except errors.BrokerUnavailable as problem:
        return _say(str(problem), UNREACHABLE)
    except errors.BrokerError as problem:
        return _say(str(problem), REFUSED)
    except KeyboardInterrupt:
        return 0
    return 0


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _become(module: str, **more: str) -> NoReturn:
    """Turns this process into a part: by name, so that the command line never imports a worker."""
    environment = {**child_environment(os.environ), **{name: value for name, value in more.items() if value}}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], environment)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Failed(f"{file} is no UTF-8 text.", USAGE) from None
    except OSError as problem:
        raise Failed(f"{file} can't be read: {problem.strerror}.", USAGE) from None


def _with_book(work: Callable[[PolicyBook], Awaitable[T]], data: Path | None) -> T:
    settings = read_settings(BrokerSettings)

    async def run_it() -> T:
        store = await Store.open(_redis_url(settings, data), namespace=settings.namespace, name="gateway-cli")
        try:
            return await work(PolicyBook(store))
        finally:
            await store.close()

    return asyncio.run(run_it())


def _redis_url(settings: BrokerSettings, data: Path | None) -> str:
    """The Redis of the environment, else the private one that `gateway up` runs on its data directory."""
    if os.environ.get("GATEWAY_REDIS_URL") and data is None:
        return settings.redis_url
    given = data or (Path(os.environ["GATEWAY_STATE_DIR"]) if os.environ.get("GATEWAY_STATE_DIR") else None)
    place = state_dir(given, os.environ) / "redis" / "url"
    try:
        return place.read_text().strip()
    except OSError:
        raise Failed(
            f"No GATEWAY_REDIS_URL is set and no `gateway up` has run on {place.parent.parent}.", UNREACHABLE
        ) from None


async def _active(book: PolicyBook) -> Any:
    await book.reload()
    return book.active


async def _ask(method: str, path: str) -> dict[str, Any]:
    """Asks the gateway over HTTP; whatever it refuses becomes its own sentence."""
    url = os.environ.get("GATEWAY_URL", "http://127.0.0.1:8400").rstrip("/")
    key = os.environ.get("GATEWAY_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S_MAX, headers=headers) as client:
            response = await client.request(method, url + path)
        told = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise Failed(f"The gateway at {url} can't be reached: {problem or 'no answer'}.", UNREACHABLE) from None
    except ValueError:
        raise Failed(f"What answers at {url} is no warmlane gateway.", UNREACHABLE) from None
    if response.is_error:
        error = told.get("error") if isinstance(told, dict) else None
        raise Failed(error["message"] if isinstance(error, dict) else f"{url} says {response.status_code}.")
    if not isinstance(told, dict):
        raise Failed(f"What answers at {url} is no warmlane gateway.", UNREACHABLE)
    return told


def _print_job(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(job, indent=2))
        return
    rows = {
        "job": job["id"],
        "state": job["state"],
        "lane": job["lane"] if job["asked"] == job["lane"] else f"{job['lane']} (asked for {job['asked']})",
        "served by": job["served_by"] or "-",
        "queued": _between(job, "submitted_at", "claimed_at"),
        "first token": _between(job, "submitted_at", "first_token_at"),
        "whole": _between(job, "submitted_at", "ended_at"),
        "attempts": str(job["attempt"]),
    }
    if job["promotions"]:
        rows["promoted"] = f"{job['promotions']} times"
    if job["error"]:
        rows["error"] = f"{job['error']['code']}: {job['error']['message']}"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _between(job: dict[str, Any], start: str, end: str) -> str:
    return duration(job[end] - job[start]) if job[end] else "-"


if __name__ == "__main__":
    main()
