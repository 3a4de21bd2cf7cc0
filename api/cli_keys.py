"""`gateway key`: callers and their keys. The commands ask the gateway, with an administrator's GATEWAY_KEY."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer

from api.cli_policy import AsJson
from api.client import ask, part
from api.durations import length_ms
from api.exit_codes import USAGE, Failed
from api.output import or_else

key_app = typer.Typer(help="Who may call, and what each may.", no_args_is_help=True)


def _limit(option: typer.CallbackParam, given: int | None) -> int:
    """Over HTTP 0 = no limit; whoever types it may well mean that nothing is allowed."""
    if given is not None and given < 1:
        raise Failed(f"{option.opts[0]} is at least 1; leave it out for no limit.", USAGE)
    return given or 0


LIMIT: dict[str, Any] = {"callback": _limit, "show_default": False}

Name = Annotated[str, typer.Argument(metavar="NAME", help="The caller's name.", show_default=False)]


@key_app.command("new")
def key_new(
    name: Name,
    lanes: Annotated[str, typer.Option(help="Names it may ask for, with commas.  [default: all]")] = "",
    priority: Annotated[
        Literal["interactive", "batch"], typer.Option(help="The most urgent that its work may be.")
    ] = "interactive",
    max_waiting: Annotated[
        int | None, typer.Option(help="Its jobs that may wait at once.  [default: no limit]", **LIMIT)
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Its jobs that may run at once.  [default: no limit]", **LIMIT)
    ] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(help="Tokens read anew or made for it, of a day in UTC.  [default: no limit]", **LIMIT)
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Its requests may leave the machine if they ask to.")
    ] = False,
    remote_lanes: Annotated[
        str, typer.Option(help="Remote lanes into which they need not ask, with commas; with --remote.")
    ] = "",
    admin: Annotated[bool, typer.Option("--admin", help="May change models, hosts, keys; sees all jobs.")] = False,
    expires: Annotated[str, typer.Option(help="How long it is good, like 90d or 12h.  [default: always]")] = "",
    as_json: AsJson = False,
) -> None:
    """Makes a caller and prints its key, this once."""
    if remote_lanes and not remote:
        raise Failed("--remote-lanes without --remote would open nothing: add --remote.", USAGE)
    asked = {
        "name": name,
        "lanes": _names(lanes),
        "priority": priority,
        "maxWaiting": max_waiting,
        "maxRunning": max_running,
        "tokensPerDay": tokens_per_day,
        "remote": remote,
        "remoteLanes": _names(remote_lanes),
        "admin": admin,
        "expiresInS": seconds(expires) if expires else 0,
    }
    _show_new(asyncio.run(ask("POST", "/v1/keys", asked)), as_json=as_json)


@key_app.command("list")
def key_list(as_json: AsJson = False) -> None:
    """Lists callers, what they may, and when their keys end."""
    told = asyncio.run(ask("GET", "/v1/keys"))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    if not told["data"]:
        print("no keys: everybody on the gateway's own machine may call, and nobody else")
        return
    rows = [("CALLER", "MAY", "KEYS")]
    for caller in told["data"]:
        keys = ", ".join(f"{key['id']}{_until(key)}" for key in caller["keys"]) or "in GATEWAY_KEYS"
        rows.append((caller["name"], _rights(caller["rights"]), keys))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for caller, may, keys in rows:
        print(f"{caller:<{widths[0]}}  {may:<{widths[1]}}  {keys}")


@key_app.command("rotate")
def key_rotate(
    name: Name,
    keep_old: Annotated[str, typer.Option(help="How long the old key stays good, like 24h.")] = "",
    as_json: AsJson = False,
) -> None:
    """Gives a caller a new key with the same rights, and prints it, this once."""
    asked = {"keepOldS": seconds(keep_old)} if keep_old else None
    _show_new(asyncio.run(ask("POST", f"/v1/keys/{part(name)}/rotate", asked)), as_json=as_json)


@key_app.command("revoke")
def key_revoke(name: Name) -> None:
    """Takes a caller's keys away, everywhere within a second. What waits of it is cancelled, what runs goes on."""
    told = asyncio.run(ask("DELETE", f"/v1/keys/{part(name)}"))
    print(f"{told['name']} may not call any more ({', '.join(told['revoked'])})")


def _show_new(told: dict[str, Any], *, as_json: bool) -> None:
    name = told["name"]
    with or_else(f"A key of {name} was made and is not shown again: `gateway key rotate {name}` makes another."):
        print(json.dumps(told, indent=2) if as_json else told["key"])
    if as_json:
        return
    end = f", and ends {instant(told['expires_at'])}" if told["expires_at"] else ""
    typer.echo(f"This is the key of {told['name']}; it is shown this once{end}.", err=True)


def _rights(rights: dict[str, Any]) -> str:
    said = [f"ask for {', '.join(rights['lanes'])}" if rights["lanes"] else "ask for everything"]
    if rights["priority"] == "batch":
        said.append("as batch only")
    limits = (("max_waiting", "waiting"), ("max_running", "running"), ("tokens_per_day", "tokens a day"))
    said += [f"at most {rights[name]:,} {words}" for name, words in limits if rights[name]]
    if rights["remote"]:
        always = f" (into {', '.join(rights['remote_lanes'])} without asking)" if rights["remote_lanes"] else ""
        said.append(f"leave the machine{always}")
    if rights["admin"]:
        said.append("administer")
    return ", ".join(said)


def _until(key: dict[str, Any]) -> str:
    return f" until {instant(key['expires_at'])}" if key["expires_at"] else ""


def instant(ms: int) -> str:
    """Writes an instant as people read it."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def seconds(text: str) -> int:
    """Reads a length of time like 90d, 12h or 30m; raises Failed."""
    try:
        return max(1, length_ms(text) // 1_000)
    except ValueError as wrong:
        raise Failed(f"{wrong}.", USAGE) from None
