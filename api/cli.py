"""`gateway`: the command line.

Exit codes are those of `api/exit_codes`; whatever goes wrong is one sentence on stderr. Commands for clients speak HTTP
to GATEWAY_URL, so that they work from any machine; those for the policy speak to Redis.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from api.alive import PARTS, tell
from api.cli_audit import audit
from api.cli_batch import batch_app
from api.cli_completion import asked_for, completion, prepare
from api.cli_dead import dead_app
from api.cli_doctor import doctor
from api.cli_explain import policy_explain
from api.cli_init import init
from api.cli_inspect import inspect_app
from api.cli_jobs import job_app
from api.cli_keys import key_app
from api.cli_logs import logs
from api.cli_models import drain, model_app, undrain
from api.cli_policy import AsJson, apply_policy, policy_app
from api.cli_submit import submit
from api.cli_top import top
from api.cli_tune import tune
from api.cli_usage import usage
from api.cli_webhooks import webhook_app
from api.client import ask, snapshot_of
from api.exit_codes import INTERRUPTED, OK, REFUSED, UNREACHABLE, UNWRITTEN, USAGE, Failed
from api.listen import Listen
from api.output import Unwritten, guarded
from api.settings import ApiSettings
from api.state_dir import CannotStart
from api.status_table import status_table
from api.terminal import harmless, text_of
from api.up import Options, child_environment
from api.up import up as run_up
from broker import errors
from broker.settings import SettingsInvalid, read_settings
from broker.version import version as installed_version

app = typer.Typer(
    help="A gateway for local LLMs with predictable first-token latency.", no_args_is_help=True,
    pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
)  # fmt: skip
policy_app.command("explain")(policy_explain)
app.add_typer(policy_app, name="policy")
app.add_typer(job_app, name="job")
app.add_typer(batch_app, name="batch")
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(dead_app, name="dead")
app.add_typer(webhook_app, name="webhook")
app.add_typer(inspect_app, name="inspect")
app.command()(init)
app.command()(doctor)
app.command()(audit)
app.command()(drain)
app.command()(undrain)
app.command()(usage)
app.command()(tune)
app.command()(logs)
app.command()(top)
app.command()(submit)
app.command()(completion)


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
def alive(
    part: Annotated[str, typer.Argument(metavar="PART", help="api, scheduler or worker.")],
    data: Annotated[
        Path | None, typer.Option(help="The directory of `gateway up --data`; else GATEWAY_STATE_DIR counts.")
    ] = None,
) -> None:
    """Says by its exit code whether that part of this machine works: for health checks. The api is asked at
    GATEWAY_BIND, else at GATEWAY_URL."""
    if part not in PARTS:
        raise Failed(f"A part is one of {', '.join(PARTS)}; {part!r} is none.", USAGE)
    raise typer.Exit(tell(part, os.environ, data=data))


@app.command()
def version() -> None:
    """Prints the version."""
    print(installed_version())


@app.command()
def status(
    as_json: AsJson = False,
    wide: Annotated[bool, typer.Option("--wide", help="Also slots, the last load, and cached prompt tokens.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again and again until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks.", min=0.1)] = 1.0,
) -> None:
    """Shows models, queues, memory and the policy."""
    console = Console(highlight=False, soft_wrap=True)

    async def show() -> None:
        told = await ask("GET", "/v1/status")
        shown = snapshot_of(told)
        text = json.dumps(told, indent=2) if as_json else status_table(shown, wide=wide)
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


def main() -> NoReturn:
    """Runs a command; every failure that somebody foresaw is a sentence and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command of these words; gives the exit code, once all that it printed is written."""
    with guarded():
        code = _run(arguments)
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # nobody listens any more, as with `| head`: a word about it is for nobody
            return code or REFUSED
        except Unwritten as failure:  # where it is not what the command itself ended with
            return code if code == UNWRITTEN else _say(str(failure), code or failure.code)
        return code


def _run(arguments: list[str]) -> int:
    if asked_for():
        prepare()
    try:
        app(arguments, standalone_mode=True, prog_name="gateway")
    except SystemExit as end:
        if isinstance(end.__context__, typer.Abort):  # its own code for Ctrl-C is 1
            return INTERRUPTED
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Failed as failure:
        return _say(harmless(str(failure)), failure.code)
    except (errors.PolicyInvalid, SettingsInvalid) as invalid:
        return _say(text_of(invalid.problems), USAGE)
    except CannotStart as problem:
        return _say(str(problem), USAGE)
    except errors.PolicyUnreadable as problem:
        return _say(text_of([f"{problem}:", *problem.problems]), USAGE)
    except errors.BrokerUnavailable as problem:
        return _say(harmless(str(problem)), UNREACHABLE)
    except errors.BrokerError as problem:
        return _say(harmless(str(problem)), REFUSED)
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


def _say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _become(module: str, **more: str) -> NoReturn:
    """Turns this process into a part: by name, so that the command line never imports a worker."""
    environment = {**child_environment(os.environ), **{name: value for name, value in more.items() if value}}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], environment)


if __name__ == "__main__":
    main()
