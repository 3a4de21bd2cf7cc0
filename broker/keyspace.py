"""Every key and channel, by name. No other file spells one.

`TABLE` is the printed form: ARCHITECTURE.md shows it, and the key sweep of the tests holds Redis against it.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

GROUP = "workers"
"""The consumer group of every lane stream."""

EVERYBODY = "*"
"""No caller's name: whose list of webhooks has all of them."""


@dataclass(frozen=True)
class Family:
    """One row of the key table: a pattern with <names>, its Redis type, its lifetime, what it holds."""

    pattern: str
    type: Literal["string", "hash", "list", "stream", "zset", "channel"]
    lifetime: str
    persistent: bool
    holds: str


TABLE: tuple[Family, ...] = (
    Family(
        "lane:<lane>",
        "stream",
        "while the lane is in the policy or not empty",
        True,
        "one entry per waiting or running job; group `workers`",
    ),
    Family("job:<id>", "hash", "end + keep time", False, "the job record"),
    Family("job:<id>:request", "string", "the job's end (sync), end + keep time (async)", False, "the request body"),
    Family("job:<id>:frames", "stream", "end + keep time", False, "replay log, ids `<attempt>-<seq>`"),
    Family("readers:<id>", "zset", "the job's end", False, "readers of the job and the ends of their leases"),
    Family("due", "zset", "a member lives as long as its job", False, "live job -> its next instant"),
    Family("wake:<model>", "string", "15 s, renewed while held", False, "wake lock: `host/boot/epoch`"),
    Family("wake:<model>:epoch", "string", "while the model is in the policy", True, "number of wakes so far"),
    Family(
        "model:<model>",
        "hash",
        "while the model is in the policy",
        True,
        "wanted_until, quarantine, an operator's wishes, learned load time, footprint and rates, counts of its wakes",
    ),
    Family(
        "downgrades:<model>",
        "hash",
        "a week after the last job that asked for the model",
        True,
        "which of the last 200 jobs that asked for the model are downgrades; only while it has a cap",
    ),
    Family(
        "sticky:<model>",
        "zset",
        "`stickyPromotionMs` after the last session",
        True,
        "session that stays on the model's fallback -> until when",
    ),
    Family(
        "learned:<model>:<host>",
        "hash",
        "30 days after the model's last load there, at most while the model is in the policy",
        False,
        "footprint and load time of the model on the host",
    ),
    Family(
        "model:<model>:<host>",
        "hash",
        "6 s, renewed every 2 s",
        False,
        "state, first-token times, memory, slots of the model on the host",
    ),
    Family("host:<host>", "hash", "6 s, renewed every 2 s", False, "boot id, heartbeat, memory, draining"),
    Family(
        "hosts",
        "zset",
        "a member lives until its host leaves, or for a day after its last heartbeat",
        True,
        "host -> last heartbeat; the index of the keys above",
    ),
    Family("idem:<caller>:<digest>", "string", "the job's keep time", False, "job id and body hash"),
    Family(
        "retries:<caller>:<digest>",
        "zset",
        "60 s after the end of its last job",
        False,
        "`<fingerprint>/<id>[/<reader that fetched it>]` of jobs that an SDK's retry may come back to -> until when",
    ),
    Family(
        "waits:<caller>",
        "zset",
        "while it has jobs that wait",
        False,
        "`<lane>/<id>` of the caller's jobs that wait, `@<lane>/<start>/<id>` of those that will, all with score 0",
    ),
    Family(
        "jobs:<caller>",
        "zset",
        "a day after the last of its jobs must be forgotten",
        False,
        "the caller's asynchronous jobs, the newest 100,000, all with score 0: in the order of their ids",
    ),
    Family("runs:<caller>", "zset", "while it has jobs that run", False, "the caller's jobs that run -> since when"),
    Family(
        "active:<lane>",
        "zset",
        "a minute after the last request",
        False,
        "callers that asked for a place in the lane -> when last",
    ),
    Family(
        "line:<lane>",
        "zset",
        "31 s after the last of them was refused",
        False,
        "callers that found no place in the lane and have none there -> since when",
    ),
    Family(
        "spent:<caller>:<day>",
        "string",
        "two days",
        False,
        "tokens computed for the caller on the day: read anew, or made",
    ),
    Family("count:<id>", "string", "2 s, or until its worker has it", False, "a prompt whose tokens are to be counted"),
    Family("file:<id>", "hash", "`fileDays`, a minute after the last part while it is sent", False, "a caller's file"),
    Family("file:<id>:parts", "list", "as its file", False, "what the file holds, in order"),
    Family(
        "files:<caller>",
        "hash",
        "as the last of its files",
        False,
        "id of each of the caller's files -> `<bytes> <until>`",
    ),
    Family("batch:<id>", "hash", "`fileDays` after its end, or its window's", False, "the batch record"),
    Family(
        "batch:<id>:window",
        "hash",
        "the batch's end",
        False,
        "number of a line that is being worked off -> where it begins, its custom_id",
    ),
    Family(
        "batch:<id>:names",
        "zset",
        "the batch's end",
        False,
        "digest of a custom_id that was read -> number of its line",
    ),
    Family("batches", "zset", "a member lives until its batch ends", True, "batch that has not ended -> since when"),
    Family(
        "batches:<caller>",
        "zset",
        "as the last of its batches",
        False,
        "the caller's batches -> until when each is kept",
    ),
    Family("batch_idem:<caller>:<digest>", "string", "as its batch", False, "batch id and what was asked, in a digest"),
    Family("audit", "stream", "`auditDays`", True, "who sent what size of request to which provider, never what"),
    Family("dead", "stream", "the newest 10,000", True, "jobs given up on: whose, which, in which lane, and why"),
    Family("outbox", "stream", "an entry goes when its delivery is made", True, "ended jobs that owe a webhook"),
    Family(
        "webhook:<id>",
        "hash",
        "until it is delivered, and a day; or given up on, and 7 days",
        False,
        "one event on its way to its caller: the body, its state, the last attempts",
    ),
    Family(
        "webhook_line:<id>", "zset", "while deliveries of the job are pending", False, "they, in order: the first goes"
    ),
    Family(
        "webhook_due:<digest>",
        "zset",
        "while deliveries to the endpoint are pending",
        False,
        "the first of each job -> its next attempt, or the end of the lease of one",
    ),
    Family("webhooks", "zset", "while deliveries are pending", False, "endpoint -> when somebody should look at it"),
    Family(
        "webhook_endpoint:<digest>",
        "hash",
        "a day after its last failure, or until a success",
        False,
        "failures in a row of an endpoint, and until when it is left alone",
    ),
    Family(
        "webhook_list:<caller>",
        "zset",
        "the newest 10,000, 9 days after the newest",
        False,
        "the caller's deliveries -> when their jobs ended; `*` has everybody's",
    ),
    Family(
        "webhook_secrets:<caller>",
        "hash",
        "until revoked, at most as long as the caller's keys",
        True,
        "id -> `<secret> <made at> <ends at, 0 = never>`: what the caller's webhooks are signed with",
    ),
    Family("webhook_counts", "hash", "always", True, "deliveries that were delivered, failed attempts, given up on"),
    Family(
        "usage:<day>",
        "hash",
        "`usageDays` after the day",
        True,
        "`<caller>:<lane>:<model asked for>:<model that served>` -> first counted on the day (UTC)",
    ),
    Family(
        "usage:<day>:<caller>:<lane>:<model>:<model>",
        "hash",
        "`usageDays` after the day",
        True,
        "figures of the day: `done/in_time/<ms>`, `tokens_in`, `running_ms`, …",
    ),
    Family("callers", "hash", "always", True, "revision; callers: their rights, the hashes of their keys"),
    Family("policy", "hash", "always", True, "active policy, its version and history, retiring lanes"),
    Family("frames:<api>", "channel", "-", False, "frames for the readers of one api process"),
    Family("control:<host>", "channel", "-", False, "cancel, stop, an operator's drain, undrain, unload, count"),
)


class Keyspace:
    """Makes every name in one namespace."""

    def __init__(self, namespace: str = "gw") -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", namespace):
            raise ValueError(f"namespace {namespace!r} may hold letters, digits, '.', '_' and '-' only, 64 at most")
        self.namespace = namespace
        self._prefix = namespace + ":"
        self.due = self._prefix + "due"
        self.hosts = self._prefix + "hosts"
        self.dead = self._prefix + "dead"
        self.audit = self._prefix + "audit"
        self.outbox = self._prefix + "outbox"
        self.webhooks = self._prefix + "webhooks"
        self.webhook_counts = self._prefix + "webhook_counts"
        self.policy = self._prefix + "policy"
        self.batches = self._prefix + "batches"
        self.no_idem = self.idem("-", "-")
        """What stands in a script's keys where a request has no Idempotency-Key."""

    def lane(self, lane: str) -> str:
        """Stream of a lane."""
        return f"{self._prefix}lane:{lane}"

    def job(self, job_id: str) -> str:
        """Hash of a job."""
        return f"{self._prefix}job:{job_id}"

    @property
    def everything(self) -> str:
        """Pattern of all keys of the namespace, for a scan."""
        return f"{self._prefix}*"

    def named_in(self, key: str) -> str:
        """Reads what stands behind the first word of a key's name: a lane, a job's id, a model."""
        return key.removeprefix(self._prefix).split(":")[1]

    def job_of(self, key: str) -> str:
        """Reads the id from the key of a job's hash; "" for any other key."""
        family = self.family(key)
        return key.removeprefix(self.job("")) if family and family.pattern == "job:<id>" else ""

    def request(self, job_id: str) -> str:
        """String with the request body of a job."""
        return f"{self._prefix}job:{job_id}:request"

    def frames(self, job_id: str) -> str:
        """Stream with the replay log of a job."""
        return f"{self._prefix}job:{job_id}:frames"

    def readers(self, job_id: str) -> str:
        """Zset of the readers of a job."""
        return f"{self._prefix}readers:{job_id}"

    def wake(self, model: str) -> str:
        """Wake lock of a model."""
        return f"{self._prefix}wake:{model}"

    def wake_epoch(self, model: str) -> str:
        """Counter of a model's wakes: the fencing number in the lock."""
        return f"{self._prefix}wake:{model}:epoch"

    def wake_model_of(self, key: str) -> str:
        """Reads the model's name from a wake lock's key or from that of its counter; "" for any other key."""
        family = self.family(key)
        return self.named_in(key) if family is not None and family.pattern.startswith("wake:<model>") else ""

    def model(self, model: str) -> str:
        """Hash of what is known of a model wherever it runs."""
        return f"{self._prefix}model:{model}"

    def downgrades(self, model: str) -> str:
        """Hash with the downgrades among the last jobs that asked for a model."""
        return f"{self._prefix}downgrades:{model}"

    def sticky(self, model: str) -> str:
        """Zset of the sessions that asked for a model and stay on its fallback."""
        return f"{self._prefix}sticky:{model}"

    def model_on_host(self, model: str, host: str) -> str:
        """Hash of a model on one host. Model names hold no `:`, so it cannot be another model's own hash."""
        return f"{self._prefix}model:{model}:{host}"

    def learned(self, model: str, host: str) -> str:
        """Hash of what was learned of a model on one host."""
        return f"{self._prefix}learned:{model}:{host}"

    def learned_model_of(self, key: str) -> str:
        """Reads the model's name from a key of what was learned of it on a host; "" for any other key."""
        family = self.family(key)
        learned = family is not None and family.pattern == "learned:<model>:<host>"
        return key.removeprefix(self._prefix).split(":")[1] if learned else ""

    def model_of(self, key: str) -> str:
        """Reads the model's name from the key of its own hash; "" for any other key."""
        family = self.family(key)
        return key.removeprefix(self.model("")) if family and family.pattern == "model:<model>" else ""

    def host(self, host: str) -> str:
        """Hash of a host, owned by one boot."""
        return f"{self._prefix}host:{host}"

    def idem(self, caller: str, key: str) -> str:
        """String that binds a caller's Idempotency-Key to a job."""
        return f"{self._prefix}idem:{caller}:{digest(key)}"

    def retries(self, caller: str, session: str) -> str:
        """Zset of the jobs of a session that an SDK's retry may come back to."""
        return f"{self._prefix}retries:{caller}:{digest(session)}"

    @property
    def callers(self) -> str:
        """Hash of the callers and their keys: `revision`, `caller:<name>`, `key:<id>`."""
        return f"{self._prefix}callers"

    def waits(self, caller: str) -> str:
        """Zset of the caller's jobs that wait."""
        return f"{self._prefix}waits:{caller}"

    def jobs(self, caller: str) -> str:
        """Zset of the caller's asynchronous jobs, for its lists."""
        return f"{self._prefix}jobs:{caller}"

    def runs(self, caller: str) -> str:
        """Zset of the caller's jobs that run."""
        return f"{self._prefix}runs:{caller}"

    def active(self, lane: str) -> str:
        """Zset of the callers that want places of a lane."""
        return f"{self._prefix}active:{lane}"

    def line(self, lane: str) -> str:
        """Zset of the callers that are in line for a place of a lane."""
        return f"{self._prefix}line:{lane}"

    def spent(self, caller: str, day: str) -> str:
        """String that counts a caller's tokens of a day, YYYY-MM-DD in UTC."""
        return f"{self._prefix}spent:{caller}:{day}"

    def count(self, question_id: str) -> str:
        """String with a prompt whose tokens are to be counted."""
        return f"{self._prefix}count:{question_id}"

    def file(self, file_id: str) -> str:
        """Hash of a file."""
        return f"{self._prefix}file:{file_id}"

    def parts(self, file_id: str) -> str:
        """List of what a file holds."""
        return f"{self._prefix}file:{file_id}:parts"

    def files(self, caller: str) -> str:
        """Hash of a caller's files: what each holds, and until when."""
        return f"{self._prefix}files:{caller}"

    def batch(self, batch_id: str) -> str:
        """Hash of a batch."""
        return f"{self._prefix}batch:{batch_id}"

    def window(self, batch_id: str) -> str:
        """Hash of the lines of a batch that are being worked off."""
        return f"{self._prefix}batch:{batch_id}:window"

    def names(self, batch_id: str) -> str:
        """Zset of the custom_ids of a batch that were read, as digests."""
        return f"{self._prefix}batch:{batch_id}:names"

    def batch_idem(self, caller: str, key: str) -> str:
        """String that binds a caller's Idempotency-Key to a batch."""
        return f"{self._prefix}batch_idem:{caller}:{digest(key)}"

    def batches_of(self, caller: str) -> str:
        """Zset of a caller's batches."""
        return f"{self._prefix}batches:{caller}"

    def usage(self, day: str) -> str:
        """Hash of who and what was counted on a day; `day` is YYYY-MM-DD in UTC."""
        return f"{self._prefix}usage:{day}"

    def figures(self, day: str, by: str) -> str:
        """Hash of a day's figures; `by` is `<caller>:<lane>:<model asked for>:<model that served>`."""
        return f"{self._prefix}usage:{day}:{by}"

    def usage_day_of(self, key: str) -> str:
        """Reads the day from a key of its counters; "" for any other key."""
        family = self.family(key)
        return key.removeprefix(self._prefix).split(":")[1] if family and family.pattern.startswith("usage:") else ""

    def usage_prefix(self) -> str:
        """What a script puts before the day it computed from Redis' clock."""
        return f"{self._prefix}usage:"

    def webhook(self, delivery_id: str) -> str:
        """Hash of one delivery."""
        return f"{self._prefix}webhook:{delivery_id}"

    def webhook_line(self, job_id: str) -> str:
        """Zset of the pending deliveries of a job, in their order."""
        return f"{self._prefix}webhook_line:{job_id}"

    def webhook_due(self, endpoint: str) -> str:
        """Zset of the deliveries that an endpoint gets next; `endpoint` is a digest."""
        return f"{self._prefix}webhook_due:{endpoint}"

    def webhook_endpoint(self, endpoint: str) -> str:
        """Hash of how an endpoint fails; `endpoint` is a digest."""
        return f"{self._prefix}webhook_endpoint:{endpoint}"

    def webhook_list(self, caller: str) -> str:
        """Zset of a caller's deliveries, `EVERYBODY` for those of all."""
        return f"{self._prefix}webhook_list:{caller}"

    def webhook_secrets(self, caller: str) -> str:
        """Hash of the secrets that a caller's webhooks are signed with."""
        return f"{self._prefix}webhook_secrets:{caller}"

    def frames_channel(self, api: str) -> str:
        """Channel on which one api process hears its readers' frames."""
        return f"{self._prefix}frames:{api}"

    def control_channel(self, host: str) -> str:
        """Channel on which one worker hears cancel, stop and the operator."""
        return f"{self._prefix}control:{host}"

    def family(self, key: str) -> Family | None:
        """Finds the row of the key table that a concrete key belongs to."""
        name = key.removeprefix(self._prefix)
        if name == key:
            return None
        return next((family for family in _rows_of(name.split(":", 1)[0]) if _matcher(family.pattern)(name)), None)


_NAMES = {
    "lane": r"[^:]+",
    "id": r"[^:]+",
    "model": r"[^:]+",
    "host": r"[^:]+",
    "digest": r"[0-9a-f]{24}",
    "caller": r"[^:]+",
    "day": r"[0-9-]+",
    "api": r"[^:]+",
}


@cache
def _rows_of(word: str) -> tuple[Family, ...]:
    """The rows of keys that begin with this word."""
    return tuple(row for row in TABLE if row.type != "channel" and row.pattern.split(":", 1)[0] == word)


@cache
def _matcher(pattern: str) -> Callable[[str], object]:
    names = re.sub(r"<(lane|id|model|host|digest|caller|day|api)>", lambda m: _NAMES[m.group(1)], re.escape(pattern))
    return re.compile(names).fullmatch


def digest(text: str) -> str:
    """Stands for what a client chose in a key's name: `redis-cli`, the slow log and every tool show names, and there
    may well be a token or a person in it."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


def as_markdown() -> str:
    """Prints the key table for ARCHITECTURE.md, with the default namespace."""
    rows = ["| key | type | lifetime | holds |", "|---|---|---|---|"]
    rows += [f"| `gw:{f.pattern}` | {f.type} | {f.lifetime} | {f.holds} |" for f in TABLE]
    return "\n".join(rows)
