"""`gateway webhook`: what webhooks are signed with, what became of them, sending one again. Asks the gateway, with the
GATEWAY_KEY of whose they are."""

import asyncio
import json
from typing import Annotated, Any

import typer

from api.cli_keys import instant, seconds
from api.cli_policy import AsJson
from api.client import ask, part
from api.exit_codes import USAGE, Failed
from api.output import or_else
from broker.webhook_secrets import OVERLAP_MS_MAX

webhook_app = typer.Typer(help="Be told when jobs end.", no_args_is_help=True)
secret_app = typer.Typer(help="What your webhooks are signed with.", no_args_is_help=True)
webhook_app.add_typer(secret_app, name="secret")

SECRETS = "/v1/webhooks/secrets"
DELIVERIES = "/v1/webhooks/deliveries"


@webhook_app.command("list")
def webhook_list(
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=200)] = 50, as_json: AsJson = False
) -> None:
    """Lists deliveries, the newest first, with how their last attempt went."""
    told = asyncio.run(ask("GET", f"{DELIVERIES}?limit={limit}"))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    if not told["data"]:
        print("no job with a webhook has ended")
        return
    rows = [("DELIVERY", "EVENT", "STATE", "LAST ATTEMPT")]
    rows += [(one["id"], one["type"], one["state"], _last(one)) for one in told["data"]]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[3]]))


@webhook_app.command("redeliver")
def webhook_redeliver(
    delivery: Annotated[str, typer.Argument(metavar="ID", help="The delivery's id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Sends an event again, or at once."""
    told = asyncio.run(ask("POST", f"{DELIVERIES}/{part(delivery)}/redeliver"))
    print(json.dumps(told, indent=2) if as_json else f"{told['id']} is on its way")


@secret_app.command("new")
def secret_new(as_json: AsJson = False) -> None:
    """Makes your first secret and prints it, this once."""
    _show_new(asyncio.run(ask("POST", SECRETS)), as_json=as_json)


@secret_app.command("rotate")
def secret_rotate(
    overlap: Annotated[str, typer.Option(help="How long the old ones sign too, like 24h; 0 = no longer.")] = "24h",
    as_json: AsJson = False,
) -> None:
    """Makes another secret and prints it, this once; for a while both sign."""
    overlap_s = 0 if overlap == "0" else seconds(overlap)
    if overlap_s * 1_000 > OVERLAP_MS_MAX:
        raise Failed(f"--overlap may be {OVERLAP_MS_MAX // 86_400_000}d at most.", USAGE)
    _show_new(asyncio.run(ask("POST", SECRETS, {"rotate": True, "overlapS": overlap_s})), as_json=as_json)


@secret_app.command("list")
def secret_list(as_json: AsJson = False) -> None:
    """Lists the secrets that sign now, by their names."""
    told = asyncio.run(ask("GET", SECRETS))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for one in told["data"]:
        end = f", signs until {instant(one['ends_at'])}" if one["ends_at"] else ""
        print(f"{one['id']}  made {instant(one['made_at'])}{end}")
    if not told["data"]:
        print("no secret: `gateway webhook secret new` makes one")


@secret_app.command("revoke")
def secret_revoke(
    secret: Annotated[str, typer.Argument(metavar="ID", help="Its name in the list.", show_default=False)],
) -> None:
    """Takes a secret away; it signs no more."""
    told = asyncio.run(ask("DELETE", f"{SECRETS}/{part(secret)}"))
    print(f"{told['revoked']} signs no more")


def _show_new(told: dict[str, Any], *, as_json: bool) -> None:
    with or_else(
        f"Secret {told['id']} was made and is not shown again: `gateway webhook secret rotate` makes another, and then "
        f"`gateway webhook secret revoke {told['id']}` takes it away."
    ):
        print(json.dumps(told, indent=2) if as_json else told["secret"])
    if as_json:
        return
    typer.echo(f"Webhooks of {told['caller']} are signed with it; it is shown this once.", err=True)


def _last(delivery: dict[str, Any]) -> str:
    if not delivery["attempts"]:
        return "none yet"
    last = delivery["attempts"][-1]
    words = [instant(last["at"]), last["error"] or f"status {last['status']}", f"{last['ms']} ms"]
    if delivery["next_at"]:
        left_alone_until = delivery.get("left_alone_until", 0)  # of an older gateway: not there
        why = " (its endpoint is left alone until then)" if left_alone_until > delivery["next_at"] else ""
        words.append(f"again {instant(max(delivery['next_at'], left_alone_until))}{why}")
    return ", ".join(words)
