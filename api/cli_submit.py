"""`gateway submit`: hands a request in as a job, and may wait for its answer."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from api.cli_completion import models
from api.cli_policy import AsJson
from api.exit_codes import USAGE, Failed
from broker.policy.content import ENDPOINTS

_WORDS = ("notBefore", "expiresAfter", "Idempotency-Key")
"""What a refusal may name that is an option's wrong value: its limits are the gateway's."""

_UNSAID: dict[str, Any] = {"show_default": False}


def submit(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A model, or another name of the policy.", autocompletion=models, **_UNSAID),
    ] = "",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The prompt; - reads it from stdin.", **_UNSAID)
    ] = None,
    system: Annotated[Path | None, typer.Option(help="A file with the system prompt.", **_UNSAID)] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.  [default: the model's]", min=0, **_UNSAID)] = 0,
    body: Annotated[
        Path | None, typer.Option(help="Instead of a prompt: a request's whole body, as JSON.", **_UNSAID)
    ] = None,
    endpoint: Annotated[str, typer.Option(help="With --body: the path that it is for.")] = ENDPOINTS[0],
    lane: Annotated[str, typer.Option(help="The lane to enter, instead of the model's.", **_UNSAID)] = "",
    priority: Annotated[
        Literal["batch", "interactive"] | None, typer.Option(help="How urgent.  [default: batch]", **_UNSAID)
    ] = None,
    webhook: Annotated[str, typer.Option(metavar="URL", help="Where its end is told.", **_UNSAID)] = "",
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Noted on it; may be given again.")
    ] = None,
    not_before: Annotated[
        str, typer.Option(help="When it may start: an instant, or in how long, like 2h.", **_UNSAID)
    ] = "",
    expires_after: Annotated[str, typer.Option(help="How long it may wait, like 12h.", **_UNSAID)] = "",
    idempotency_key: Annotated[str, typer.Option(help="The same key again leads to the same job.", **_UNSAID)] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end and print the answer.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    timeout: Annotated[str, typer.Option(help="The longest wait, like 10m; the job goes on after it.", **_UNSAID)] = "",
    patience: Annotated[
        str, typer.Option(help="How long to try again while the gateway is away or full, like 5m.", **_UNSAID)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Hands a request in and prints its job's id; with --wait or --stream, the answer."""
    from api.cli_answer import length_s, pair
    from api.client import fits_header

    if not fits_header(idempotency_key):
        raise Failed("--idempotency-key takes ASCII without line feeds and the like: a header carries it.", USAGE)
    if expires_after:
        length_s(expires_after)
    if not_before:
        _check_instant(not_before)
    if body and (system or max_tokens):
        raise Failed("--system and --max-tokens go with -f: with --body, all of the request stands in its file.", USAGE)
    order = {
        "endpoint": endpoint,
        "body": _whole(body, model, given=file) if body else _chat(file, model, system, max_tokens),
        "lane": lane,
        "priority": priority,
        "webhook": webhook,
        "metadata": dict(map(pair, metadata or [])),
        "notBefore": not_before,
        "expiresAfter": expires_after,
    }
    _hand_in(
        {name: value for name, value in order.items() if value},
        key=idempotency_key,
        patience_s=length_s(patience) if patience else 0,
        wait=wait or bool(timeout),
        stream=stream,
        timeout_s=length_s(timeout) if timeout else None,
        as_json=as_json,
    )


def _hand_in(
    order: dict[str, Any],
    *,
    key: str,
    patience_s: float,
    wait: bool,
    stream: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    from ulid import ULID

    from api.cli_answer import tell, tell_as_it_comes, until_ended, with_jobs
    from api.jobs_client import JobsClient, Refusal, param_of
    from api.patience import Patience

    about: dict[str, Any] = {}

    async def run(jobs: JobsClient) -> None:
        # A key in any case: a reply that got lost must not make a second job.
        submitted = partial(jobs.submit, order, key=key or f"submit-{ULID()}")
        try:
            about.update(await Patience(patience_s).answered(submitted))
        except Refusal as refusal:
            if refusal.code == "invalid_request" and param_of(refusal.told) in _WORDS:
                raise Failed(str(refusal), USAGE) from None
            raise
        if not (wait or stream):
            print(json.dumps(about, indent=2) if as_json else about["id"])
            return
        print(f"job {about['id']}", file=sys.stderr)
        if stream:
            await tell_as_it_comes(jobs, about, as_json=as_json, timeout_s=timeout_s)
        else:
            about.update(await until_ended(jobs, about, timeout_s=timeout_s))
            await tell(jobs, about, as_json=as_json)

    with_jobs(run, about)


def _check_instant(text: str) -> None:
    from api.durations import instant_ms

    try:
        instant_ms(text, now_ms=0)
    except (ValueError, OverflowError) as wrong:
        raise Failed(f"--not-before {wrong}.", USAGE) from None


def _chat(file: Path | None, model: str, system: Path | None, max_tokens: int) -> dict[str, Any]:
    if file is None:
        raise Failed("Say what to ask: -f FILE with the prompt, -f - for stdin, or --body FILE.json.", USAGE)
    if not model:
        raise Failed("Say whom to ask: --model NAME (`gateway model list` lists them).", USAGE)
    messages = [{"role": "system", "content": _text(system)}] if system else []
    messages.append({"role": "user", "content": _text(file)})
    return {"model": model, "messages": messages} | ({"max_tokens": max_tokens} if max_tokens else {})


def _whole(file: Path, model: str, *, given: Path | None) -> dict[str, Any]:
    if given is not None:
        raise Failed("Either -f with a prompt, or --body with all of the request.", USAGE)
    try:
        told = json.loads(_text(file))
    except ValueError as problem:
        raise Failed(f"{file} is no JSON: {problem}.", USAGE) from None
    if not isinstance(told, dict):
        raise Failed(f"{file} holds no object.", USAGE)
    return told | ({"model": model} if model else {})


def _text(file: Path) -> str:
    if str(file) == "-" and sys.stdin is None:
        raise Failed("stdin is closed: pipe the prompt in, or name a file.", USAGE)
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return raw.decode()
    except UnicodeDecodeError:
        raise Failed(f"{file} is no UTF-8 text.", USAGE) from None
    except OSError as problem:
        raise Failed(f"{file} can't be read: {problem.strerror}.", USAGE) from None
