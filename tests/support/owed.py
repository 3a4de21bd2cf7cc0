"""What must hold of webhooks: who ended is owed one event, in one place, and somebody will look at it."""

from typing import TYPE_CHECKING

from broker.lifecycle import ENDED
from broker.records import decode_hash

if TYPE_CHECKING:
    from tests.support.invariants import Snapshot


def owed(s: "Snapshot") -> list[str]:
    """Says which of it does not hold."""
    outbox = s.keys.get(s.names.outbox)
    waiting = [decode_hash(list(values)) for _, values in outbox.value.entries] if outbox else []
    deliveries = {name: decode_hash(key.value) for name, key in s.of("webhook:<id>").items()}
    return _events(s, waiting, deliveries) + _lines(s, deliveries) + _endpoints(s)


def _events(s: "Snapshot", waiting: list[dict[str, str]], deliveries: dict[str, dict[str, str]]) -> list[str]:
    found = []
    events = [*waiting, *deliveries.values()]
    ids = [event["id"] for event in events]
    if len(ids) != len(set(ids)):
        found.append(f"an event is in the outbox and a delivery too: {sorted(ids)}")
    for job in s.jobs.values():
        own = [event for event in events if event["job"] == job.id]
        wanted = 1 if job.webhook and job.state in ENDED else 0
        if len(own) != wanted:
            found.append(f"job {job.id} is {job.state} with webhook {job.webhook!r} and {len(own)} events")
        for event in own:
            told = (event["type"], event["caller"], event["url"])
            if told != (f"job.{job.state}", job.caller, job.webhook):
                found.append(f"the event of job {job.id}, {job.state}, tells {told}")
    return found


def _lines(s: "Snapshot", deliveries: dict[str, dict[str, str]]) -> list[str]:
    found = []
    lines = {name: [member for member, _ in key.value] for name, key in s.of("webhook_line:<id>").items()}
    due = {member: name for name, key in s.of("webhook_due:<digest>").items() for member, _ in key.value}
    for name, f in deliveries.items():
        pending = f["state"] == "pending"
        line = lines.get(s.names.webhook_line(f["job"]), [])
        if s.keys[name].expires == pending:
            found.append(f"promise 9: delivery {f['id']} is {f['state']}, expires={s.keys[name].expires}")
        if (f["id"] in line) != pending:
            found.append(f"delivery {f['id']} is {f['state']}, the line of its job is {line}")
        place = s.names.webhook_due(f["endpoint"]) if pending and line[:1] == [f["id"]] else None
        if due.get(f["id"]) != place:
            found.append(f"delivery {f['id']} is {f['state']} in {line}, due at {due.get(f['id'])}")
    known = {f["id"] for f in deliveries.values()}
    loose = [member for line in lines.values() for member in line if member not in known] + list(due.keys() - known)
    return [*found, *(f"promise 9: {member} is pending and is no delivery" for member in loose)]


def _endpoints(s: "Snapshot") -> list[str]:
    wanted = {}
    for name, key in s.of("webhook_due:<digest>").items():
        endpoint = name.rpartition(":")[2]
        breaker = s.keys.get(s.names.webhook_endpoint(endpoint))
        open_until = int(decode_hash(breaker.value).get("open_until") or 0) if breaker else 0
        wanted[endpoint] = max(min(score for _, score in key.value), open_until)
    told = dict(s.keys[s.names.webhooks].value) if s.names.webhooks in s.keys else {}
    return [] if told == wanted else [f"endpoints are to be looked at {told}, by what is due {wanted}"]
