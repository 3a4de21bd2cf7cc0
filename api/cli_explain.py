"""`gateway policy explain`: which lanes a request may use, and why, without sending it anywhere."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli_policy import AsJson, DataDir, with_store
from api.exit_codes import USAGE, Failed
from broker import errors
from broker.callers import ANONYMOUS, EVERYTHING, Caller, Keys
from broker.keybook import KeyBook
from broker.policies import PolicyBook
from broker.policy.content import ENDPOINTS
from broker.policy.sentences import near_words
from broker.store import Store

if TYPE_CHECKING:
    from broker.trust.explain import Explained


def policy_explain(
    file: Annotated[
        Path, typer.Argument(metavar="REQUEST", help="The body of a request, as JSON.", show_default=False)
    ],
    endpoint: Annotated[str, typer.Option(help="The path it would be sent to.")] = ENDPOINTS[0],
    caller: Annotated[str, typer.Option(help="Whose key it would carry.")] = ANONYMOUS,
    header: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be given again.")] = None,
    as_json: AsJson = False,
    data: DataDir = None,
) -> None:
    """Says which lanes a request may use now, and why not the others. Nothing is sent."""
    from api.dry_run import dry_run

    if endpoint not in ENDPOINTS:
        raise Failed(f"{endpoint} is no endpoint of the gateway, use one of {', '.join(ENDPOINTS)}.", USAGE)
    headers = [_pair(line) for line in header or []]
    try:
        body = file.read_bytes()
    except OSError as problem:
        raise Failed(f"{file} can't be read: {problem.strerror}.", USAGE) from None

    async def run(book: PolicyBook, store: Store) -> "Explained":
        who = await _who(store, caller)
        return await dry_run(store, book, endpoint=endpoint, body=body, headers=headers, caller=who)

    told = with_store(run, data)
    for line in [json.dumps(asdict(told), indent=2)] if as_json else _lines(told):
        print(line)


async def _who(store: Store, name: str) -> Caller:
    """The caller of that name and what it may; raises UnknownCaller."""
    keys = KeyBook(store, Keys.parse(os.environ.get("GATEWAY_KEYS", "")))
    await keys.reload()
    if name == ANONYMOUS and keys:
        raise errors.BadRequest("this gateway has keys: say whose the request would carry with --caller NAME", "caller")
    rights = keys.rights_of(name)
    if rights is None and name not in (ANONYMOUS, *keys.names):
        raise errors.UnknownCaller(name, near_words(name, keys.names, most=3))
    return Caller(name, rights or EVERYTHING)


def _pair(line: str) -> tuple[str, str]:
    name, equals, value = line.partition("=")
    if not equals or not name.strip():
        raise Failed(f"--header takes NAME=VALUE, and {line[:80]!r} is none.", USAGE)
    return name.strip(), value.strip()


def _lines(told: "Explained") -> list[str]:
    lines = [f"asks for lane {told.asked}"]
    lines += [
        f"{'may use' if word.may else 'may not use'} {word.lane} ({word.trust}): {word.why}" for word in told.lanes
    ]
    return [*lines, f"it holds {'; '.join(told.holds)}"] if told.holds else lines
