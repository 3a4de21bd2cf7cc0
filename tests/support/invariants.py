"""What must hold in Redis, as sentences about what does not. The model, integration and chaos tests all ask here.

`violated(store)` reads everything in one script, so its picture is of one moment even while others write.
`undone(before, after)` and `missteps(before, after)` compare two pictures: any two, and two with one verb between them.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import fakeredis
from fakeredis.model import Hash, XStream, ZSet

from broker import downgrades
from broker.keyspace import GROUP, Keyspace
from broker.lifecycle import ENDED, HELD, TRANSITIONS, Event, State
from broker.policies import Active
from broker.records import Frame, JobRecord, decode_hash
from broker.store import Store
from broker.trust import door
from tests.support.files import files_and_batches
from tests.support.owed import owed
from tests.support.reckoning import Counted, counted, miscounted

# A test may list keys; the verbs never do. Nothing here is written.
_DUMP = """
local out = {}
for _, key in ipairs(redis.call("KEYS", ARGV[1])) do
  local kind = redis.call("TYPE", key)
  if type(kind) == "table" then kind = kind.ok end
  local value = false
  if kind == "hash" then value = redis.call("HGETALL", key)
  elseif kind == "list" then value = redis.call("LRANGE", key, 0, -1)
  elseif kind == "string" then value = redis.call("GET", key)
  elseif kind == "zset" then value = redis.call("ZRANGE", key, 0, -1, "WITHSCORES")
  elseif kind == "stream" then
    local groups = {}
    for i, group in ipairs(redis.call("XINFO", "GROUPS", key)) do
      groups[i] = { group[2], redis.call("XPENDING", key, group[2], "-", "+", 100000) }
    end
    value = { redis.call("XRANGE", key, "-", "+"), groups }
  end
  out[#out + 1] = { key, kind, redis.call("PTTL", key), value }
end
return out
"""


@dataclass(frozen=True)
class Stream:
    """A stream's entries, in order, and who holds which of them."""

    entries: tuple[tuple[str, tuple[bytes, ...]], ...]
    groups: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]

    @property
    def held(self) -> dict[str, str]:
        """Entry -> consumer, of our own group."""
        return {entry: consumer for name, pending in self.groups if name == GROUP for entry, consumer in pending}

    @property
    def waiting(self) -> int:
        """Entries that nobody holds, counted as the verbs count them."""
        return len(self.entries) - len(self.held)


@dataclass(frozen=True)
class Key:
    """One key: its type, whether it goes by itself, and what it holds."""

    type: str
    expires: bool
    value: Any


@dataclass(frozen=True)
class Snapshot:
    """Everything in one namespace at one moment."""

    names: Keyspace
    keys: dict[str, Key]
    jobs: dict[str, JobRecord] = field(default_factory=dict, compare=False)
    lanes: dict[str, Stream] = field(default_factory=dict, compare=False)
    due: dict[str, int] = field(default_factory=dict, compare=False)

    def of(self, pattern: str) -> dict[str, Key]:
        """The keys of one row of the key table."""
        return {name: key for name, key in self.keys.items() if _pattern(self.names, name) == pattern}

    def log(self, job_id: str) -> list[Frame]:
        """The replay log of a job."""
        key = self.keys.get(self.names.frames(job_id))
        return [Frame.from_entry(entry, list(values)) for entry, values in key.value.entries] if key else []

    def counted(self) -> Counted:
        """What all days count."""
        figures = self.of("usage:<day>:<caller>:<lane>:<model>:<model>")
        return counted(self.names, {name: key.value for name, key in figures.items()})

    @property
    def audit(self) -> list[dict[str, str]]:
        """The records of what left, oldest first."""
        key = self.keys.get(self.names.audit)
        return [decode_hash(list(values)) for _, values in key.value.entries] if key else []

    def readers(self, job_id: str) -> dict[str, int]:
        """Reader -> end of its lease."""
        key = self.keys.get(self.names.readers(job_id))
        return dict(key.value) if key else {}

    def idem(self, name: str) -> str:
        """The job that an Idempotency-Key leads to, "" if none."""
        key = self.keys.get(name)
        return key.value.decode().split(" ")[0] if key else ""

    def waits(self, caller: str) -> dict[str, float]:
        """The places that a caller's waiting jobs hold, `<lane>/<id>`."""
        key = self.keys.get(self.names.waits(caller))
        return dict(key.value) if key else {}

    def retries(self, index_and_fingerprint: str) -> list[tuple[str, float]]:
        """Which jobs a retry with this fingerprint may find in its index, and until when."""
        index, fingerprint = index_and_fingerprint.split(" ")
        members = dict(self.keys[index].value) if index in self.keys else {}
        split = [(*member.split("/")[:2], until) for member, until in members.items()]
        return [(job, until) for mark, job, until in split if mark == fingerprint]

    def marks(self, other: "Snapshot") -> list[str]:
        """The names of the keys that differ."""
        names = self.keys.keys() | other.keys.keys()
        return sorted(n for n in names if self.keys.get(n) != other.keys.get(n))


async def take(store: Store) -> Snapshot:
    """Reads everything in the store's namespace in one script."""
    names = store.keys
    server = store.client.connection_pool.connection_kwargs.get("server")
    pattern = f"{names.namespace}:*"
    dump = _dump_fake(server, pattern) if server is not None else await _dump(store, pattern)
    return _snapshot(names, dump)


async def take_by_script(store: Store) -> Snapshot:
    """The same where a fake server would be read from within."""
    return _snapshot(store.keys, await _dump(store, f"{store.keys.namespace}:*"))


async def _dump(store: Store, pattern: str) -> Any:
    return await store.command("EVAL", _DUMP, 0, pattern)


def _snapshot(names: Keyspace, dump: Any) -> Snapshot:
    keys: dict[str, Key] = {}
    for raw_name, kind, ttl_ms, value in dump:
        keys[raw_name.decode()] = Key(kind.decode(), int(ttl_ms) >= 0, _value(kind.decode(), value))
    jobs, lanes = {}, {}
    for name, key in keys.items():
        match _pattern(names, name):
            case "job:<id>":
                jobs[name.rpartition(":")[2]] = JobRecord.from_hash(key.value)
            case "lane:<lane>":
                lanes[name.removeprefix(names.lane(""))] = key.value
    due = dict(keys[names.due].value) if names.due in keys else {}
    return Snapshot(names, keys, jobs, lanes, due)


async def violated(store: Store) -> list[str]:
    """Reads everything and says what does not hold; [] is what a healthy gateway answers at every moment."""
    return violations(await take(store))


def violations(s: Snapshot) -> list[str]:
    """Says which promises one picture breaks."""
    found: list[str] = []
    for job in s.jobs.values():
        found += _record(s, job)
        found += _ended(s, job) if job.state in ENDED else _live(s, job)
        found += _log(s, job)
    found += _lanes(s) + _places(s) + _due(s) + _keys(s) + _wake_locks(s) + _downgrades(s)
    return found + _listed(s) + owed(s) + files_and_batches(s)


def undone(before: Snapshot, after: Snapshot) -> list[str]:
    """Says what a later picture lacks or turned back, however many verbs lie between."""
    found = []
    for job_id, was in before.jobs.items():
        now = after.jobs.get(job_id)
        if now is None:
            if was.state not in ENDED:
                found.append(f"accepted job {job_id} vanished while {was.state}")
            continue
        if was.state in ENDED and (
            replace(now, retried_as=was.retried_as) != was or after.log(job_id) != before.log(job_id)
        ):
            found.append(f"job {job_id} had ended {was.state} and changed afterwards")
        if was.state is not State.SCHEDULED and now.state is State.SCHEDULED:
            found.append(f"job {job_id} went back to scheduled from {was.state}")
        for name in (
            "submitted_at",
            "give_up_at",
            "not_before",
            "asked",
            "asked_model",
            "asked_number",
            "spilled",
            "first_token_by",
            "zone",
            "exits",
            "mode",
            "stream",
            "caller",
            "idem",
            "webhook",
        ):
            if getattr(was, name) != getattr(now, name):
                found.append(f"{name} of job {job_id} moved from {getattr(was, name)} to {getattr(now, name)}")
        for name in ("attempt", "losses", "promotions", "put_backs", "seen", "continues"):
            if getattr(now, name) < getattr(was, name):
                found.append(f"{name} of job {job_id} went back from {getattr(was, name)} to {getattr(now, name)}")
        # put back and then cancelled, a job keeps its attempt and loses its log: only these three were never put back
        kept = now.state in (State.STREAMING, State.DONE, State.FAILED)
        old, new = before.log(job_id), after.log(job_id)
        if kept and was.attempt == now.attempt and was.state is State.STREAMING and new[: len(old)] != old:
            found.append(f"frames of job {job_id} were rewritten within attempt {was.attempt}")
        if was.seen and was.live and was.first_token_at:  # a client may have seen what is logged: it stands for good
            if new[: len(old)] != old:
                found.append(f"frames of job {job_id} were rewritten that a client may have seen")
            if now.first_token_at != was.first_token_at:
                found.append(f"job {job_id}, begun at {was.first_token_at}, began once more at {now.first_token_at}")
    return found


def missteps(before: Snapshot, after: Snapshot, active: Active) -> list[str]:
    """Says what one verb did that no verb may do, under the policy that it decided with."""
    found = undone(before, after)
    found += miscounted(before.jobs, after.jobs, before.counted(), after.counted())
    for lane, stream in after.lanes.items():
        old = before.lanes.get(lane, Stream((), ()))
        if len(stream.entries) > len(old.entries):
            (new, *_) = [job for job in after.jobs.values() if (job.lane, job.entry) == (lane, stream.entries[-1][0])]
            limit = bound(before, active, lane, new)
            if old.waiting >= limit or len(stream.entries) > len(old.entries) + 1:
                found.append(f"promise 1: lane {lane} took an entry with {old.waiting} waiting and a bound of {limit}")
    for job_id, now in after.jobs.items():
        was = before.jobs.get(job_id)
        if was is None:
            if now.state not in (State.QUEUED, State.SCHEDULED):
                found.append(f"job {job_id} began as {now.state}")
        elif (was.state, was.lane, was.entry, was.attempt) != (now.state, now.lane, now.entry, now.attempt):
            found += _move(before, after, was, now, active)
        if now.model != now.asked_model and (was is None or was.model == was.asked_model):
            if not may_downgrade(before, active, now.asked_model, was):
                found.append(
                    f"job {job_id} is served by {now.model} beyond the cap of those who asked {now.asked_model}"
                )
    return found


def bound(s: Snapshot, active: Active, lane_name: str, job: JobRecord) -> int:
    """How many jobs may wait in a lane when this one asks: the rule of the design, told once more in Python."""
    lane = active.lane(lane_name)
    if lane is None:
        return 0
    running = sum(len(s.lanes[name].held) for name in active.lanes_of(lane.model) if name in s.lanes)
    slots = 0
    for name, key in s.of("model:<model>:<host>").items():
        if name.startswith(s.names.model(lane.model) + ":"):
            told = decode_hash(key.value)
            if told["state"] in ("warm", "degraded"):
                kept = int(told.get("slots_kept", 0)) if "batch" in (job.priority, lane.priority) else 0
                slots += max(0, int(float(told["slots_total"])) - int(float(told["slots_settling"])) - kept)
    free = slots - running
    if job.max_running:
        free = min(free, job.max_running - sum(j.caller == job.caller and j.state in HELD for j in s.jobs.values()))
    limit = lane.max_queue + max(0, free)
    return max(1, limit) if running == 0 else limit


def may_downgrade(s: Snapshot, active: Active, asked_model: str, job: JobRecord | None) -> bool:
    """Whether the cap lets one more job be served by another model than the one asked for, None = one that asks now:
    the rule of the design, told once more in Python."""
    model = active.policy.models.get(asked_model)
    if model is None or model.max_downgrade_share == 1:
        return True
    asked, marked = _window(s, asked_model)
    if job is None:
        asked += 1
        marked = marked - {asked - downgrades.WINDOW}
    if job is not None and job.asked_number in marked:
        return True
    jobs = min(asked, downgrades.WINDOW)
    return jobs < downgrades.BINDING_FROM or len(marked) + 1 <= model.max_downgrade_share * jobs + 1e-9


def _window(s: Snapshot, model: str) -> tuple[int, set[int]]:
    """How many asked for the model, and the numbers of the last ones among them that are marked as downgrades."""
    key = s.keys.get(s.names.downgrades(model))
    told = decode_hash(key.value) if key else {}
    asked, size = int(told.get("asked", 0)), downgrades.WINDOW
    return asked, {asked - (asked - int(place)) % size for place in told.keys() - {"asked", "downgraded"}}


def instant(job: JobRecord) -> int:
    """The moment at which somebody must look at a live job."""
    if job.state is State.SCHEDULED:
        moments = [max(job.not_before, job.retry_at), job.give_up_at, job.abandon_at]
    elif job.state is State.QUEUED and job.continue_by:
        moments = [job.continue_by, job.abandon_at]
    elif job.state is State.QUEUED:
        moments = [max(job.promote_at, job.retry_at) if job.promote_at else 0, job.give_up_at, job.abandon_at]
    else:
        moments = [job.lease_until, job.abandon_at]
    return min((m for m in moments if m > 0), default=0)


def _record(s: Snapshot, job: JobRecord) -> list[str]:
    found = []
    if job.seen and not (job.stream and job.mode == "sync"):
        found.append(f"job {job.id} is seen, but no reader of it can be: stream={job.stream} mode={job.mode}")
    if job.state in HELD and not (job.owner and job.boot and job.lease_until and job.attempt):
        found.append(f"job {job.id} is {job.state} and lacks owner, boot, lease or attempt")
    if job.state in (State.SCHEDULED, State.QUEUED) and (job.owner or job.boot or job.lease_until):
        found.append(f"job {job.id} is {job.state} and still has an owner, a boot or a lease")
    if bool(job.continue_by) != bool(job.continues) and job.state is State.QUEUED:
        found.append(f"job {job.id} waits with continues={job.continues} and continue_by={job.continue_by}")
    if job.continue_by and job.state in HELD:
        found.append(f"job {job.id} is {job.state} and still waits to be gone on from")
    if job.continues and not (job.seen and job.first_token_at and job.continues <= job.attempt):
        found.append(f"job {job.id} goes on from attempt {job.continues}, which nobody saw or which never was")
    if job.state is State.CLAIMED and job.last_seq and not job.continues:
        found.append(f"job {job.id} is claimed with {job.last_seq} frames counted")
    return found


def _live(s: Snapshot, job: JobRecord) -> list[str]:
    found = []
    if s.keys[s.names.job(job.id)].expires:
        found.append(f"promise 3: live job {job.id} expires by itself")
    request = s.keys.get(s.names.request(job.id))
    if request is None or request.expires:
        found.append(f"promise 3: live job {job.id} has no lasting request body")
    if job.idem and s.idem(job.idem) != job.id:
        found.append(f"live job {job.id} lost its Idempotency-Key")
    if job.retries and dict(s.retries(job.retries)).get(job.id) != math.inf:
        found.append(f"live job {job.id} is not in its index of retries for as long as it lives")
    readers = s.readers(job.id)
    if job.grace_ms >= 0 and readers and job.abandon_at < max(readers.values()) + job.grace_ms:
        found.append(f"job {job.id} counts as abandoned before its last reader's lease and grace end")
    if job.grace_ms < 0 and job.abandon_at:
        found.append(f"job {job.id} does not depend on readers and would be abandoned")
    places = [(lane, entry) for lane, stream in s.lanes.items() for entry, who in _entries(stream) if who == job.id]
    expected = [] if job.state is State.SCHEDULED else [(job.lane, job.entry)]
    if places != expected:
        found.append(f"promise 2: job {job.id} is {job.state} with entry {job.lane}/{job.entry}, found at {places}")
    elif expected and (job.entry in s.lanes[job.lane].held) != (job.state in HELD):
        found.append(f"promise 2: job {job.id} is {job.state}, which its place in the pending list denies")
    elif expected and job.state in HELD and s.lanes[job.lane].held[job.entry] != job.owner:
        found.append(f"promise 2: job {job.id} is held by {job.owner}, pending with another")
    return found


def _ended(s: Snapshot, job: JobRecord) -> list[str]:
    found = []
    if not s.keys[s.names.job(job.id)].expires:
        found.append(f"promise 9: ended job {job.id} is kept for ever")
    log = s.keys.get(s.names.frames(job.id))
    if log is None or not log.expires:
        found.append(f"promise 9: the log of ended job {job.id} is missing or kept for ever")
    request = s.keys.get(s.names.request(job.id))
    if request is not None and (job.mode == "sync" or not request.expires):
        found.append(f"promise 9: the request of ended job {job.id} outlives it")
    if s.names.readers(job.id) in s.keys:
        found.append(f"promise 9: ended job {job.id} still has readers")
    if job.idem and job.state is not State.DONE and s.idem(job.idem) == job.id:
        found.append(f"job {job.id} ended {job.state} and still holds its Idempotency-Key")
    if not job.ended_at or job.lease_until or job.entry:
        found.append(f"job {job.id} ended without an instant, or with a lease or an entry left")
    return found


def _log(s: Snapshot, job: JobRecord) -> list[str]:
    frames = s.log(job.id)
    found = []
    attempts = [f.attempt for f in frames]
    if attempts != sorted(attempts) or any(a != job.attempt and not a <= job.continues for a in attempts):
        found.append(f"promise 4: the log of job {job.id} at attempt {job.attempt} holds frames of {attempts}")
    seqs = [f.seq for f in frames]
    if seqs and seqs != list(range(seqs[0], seqs[0] + len(seqs))):
        found.append(f"promise 4: the log of job {job.id} has gaps: {seqs}")
    if job.state in ENDED:
        if [f.terminal for f in frames] != [False] * (len(frames) - 1) + [True] or frames[-1].kind != job.state.value:
            kinds = [f.kind for f in frames]
            found.append(f"promise 3: job {job.id} ended {job.state}, its log does not end so: {kinds}")
        elif (len(frames) > 1 and seqs[0] != 1) or seqs[-1] != job.last_seq:
            found.append(f"promise 4: the log of ended job {job.id} is {seqs}, its last frame {job.last_seq}")
    elif job.state is State.STREAMING or job.continues:
        if seqs != list(range(1, job.last_seq + 1)) or not seqs or any(f.terminal for f in frames):
            found.append(f"promise 4: job {job.id} streams with log {seqs} and last frame {job.last_seq}")
    elif frames:
        found.append(f"job {job.id} is {job.state} and its log is not empty")
    return found


def _lanes(s: Snapshot) -> list[str]:
    found = []
    for lane, stream in s.lanes.items():
        for entry, job_id in _entries(stream):
            job = s.jobs.get(job_id)
            if job is None or job.state in ENDED:
                found.append(f"promise 2: entry {entry} of lane {lane} has no live job ({job_id})")
                continue
            fields = decode_hash(list(dict(stream.entries)[entry]))
            told = {
                "caller": job.caller, "session": job.session, "priority": job.priority, "zone": job.zone,
                "promote_at": str(job.promote_at), "submitted": str(job.submitted_at), "tokens": str(job.tokens),
            }  # fmt: skip
            if job.entry == entry and told.items() - fields.items():
                found.append(f"the entry of job {job_id} tells workers {fields}, its record {told}")
        if loose := stream.held.keys() - {entry for entry, _ in stream.entries}:
            found.append(f"promise 2: lane {lane} has pending entries that are gone: {sorted(loose)}")
        queued = sum(job.state is State.QUEUED and job.lane == lane for job in s.jobs.values())
        if stream.waiting != queued:
            found.append(f"promise 2: lane {lane} counts {stream.waiting} waiting, {queued} records are queued in it")
    return found


def _places(s: Snapshot) -> list[str]:
    """Each caller is said to hold the places of its live jobs, and no others."""
    expected: dict[str, dict[str, float]] = {}
    for job in s.jobs.values():
        if job.state in HELD:
            expected.setdefault(s.names.runs(job.caller), {})[job.id] = job.claimed_at
        elif job.live:
            later = job.state is State.SCHEDULED
            place = f"@{job.lane}/{job.not_before}/{job.id}" if later else f"{job.lane}/{job.id}"
            expected.setdefault(s.names.waits(job.caller), {})[place] = 0
    told = {name: dict(key.value) for family in ("waits", "runs") for name, key in s.of(f"{family}:<caller>").items()}
    return [
        f"{name} says that {told.get(name, {})} is held, by the records it is {expected.get(name, {})}"
        for name in sorted(expected.keys() | told.keys())
        if expected.get(name) != told.get(name)
    ]


def _listed(s: Snapshot) -> list[str]:
    """Each asynchronous job stands in its caller's list, in the order of the ids; lines of batches do not."""
    found = []
    for job in s.jobs.values():
        key = s.keys.get(s.names.jobs(job.caller))
        listed = dict(key.value) if key else {}
        if (listed.get(job.id) == 0) != (job.mode == "async" and not job.batch):
            found.append(f"{job.mode} job {job.id} stands in the list of {job.caller} as {listed.get(job.id)}")
    return found


def _due(s: Snapshot) -> list[str]:
    live = {job.id: instant(job) for job in s.jobs.values() if job.live}
    found = [f"promise 3: live job {i} has no instant" for i in sorted(live.keys() - s.due.keys())]
    found += [f"promise 9: {i} is due and is no live job" for i in sorted(s.due.keys() - live.keys())]
    found += [
        f"job {i} is due at {s.due[i]}, its record says {at}"
        for i, at in sorted(live.items())
        if s.due.get(i, at) != at
    ]
    return found


def _keys(s: Snapshot) -> list[str]:
    found = []
    for name, key in s.keys.items():
        family = s.names.family(name)
        if family is None:
            found.append(f"promise 9: no row of the key table knows {name}")
        elif family.type != key.type:
            found.append(f"promise 9: {name} is a {key.type}, the key table says {family.type}")
        elif family.pattern.startswith(("job:<id>:", "readers:")):
            if name.removeprefix(s.names.namespace + ":").split(":")[1] not in s.jobs:
                found.append(f"promise 9: {name} has no job")
        elif family.pattern in _MUST_EXPIRE and not key.expires:
            found.append(f"promise 9: {name} never expires")
        elif family.pattern.startswith("retries:"):
            endless = [str(m) for m, until in dict(key.value).items() if until == math.inf]
            if bool(endless) == key.expires:
                found.append(f"promise 9: {name} expires={key.expires} with the live members {endless}")
            for member in endless:
                job = s.jobs.get(member.partition("/")[2])
                if job is None or not job.live:
                    found.append(f"promise 9: {name} keeps {member}, which has ended, for ever")
        elif family.pattern.startswith("idem:"):
            job = s.jobs.get(s.idem(name))
            if job is None or job.live == key.expires:
                found.append(f"promise 9: {name} leads to {job and job.state}, expires={key.expires}")
    return found


_MUST_EXPIRE = (
    "jobs:<caller>",
    "downgrades:<model>",
    "sticky:<model>",
    "wake:<model>",
    "model:<model>:<host>",
    "host:<host>",
    "usage:<day>",
    "active:<lane>",
    "line:<lane>",
    "webhook_list:<caller>",
    "webhook_endpoint:<digest>",
    "spent:<caller>:<day>",
    "usage:<day>:<caller>:<lane>:<model>:<model>",
    "file:<id>",
    "file:<id>:parts",
    "files:<caller>",
    "batch:<id>",
    "batch:<id>:window",
    "batch:<id>:names",
    "batches:<caller>",
    "batch_idem:<caller>:<digest>",
)


def _wake_locks(s: Snapshot) -> list[str]:
    found = []
    for name, key in s.of("wake:<model>").items():
        counter = s.keys.get(name + ":epoch")
        if counter is None or key.value.decode().rpartition("/")[2] != counter.value.decode():
            found.append(f"promise 6: {name} is held as {key.value!r}, which is not the newest epoch")
    return found


def _downgrades(s: Snapshot) -> list[str]:
    """Every counted job is marked as its lane says, and the sum is that of the marks."""
    found = []
    for name, key in s.of("downgrades:<model>").items():
        model = name.removeprefix(s.names.downgrades(""))
        asked, marked = _window(s, model)
        told = int(decode_hash(key.value).get("downgraded", 0))
        if told != len(marked) or any(number < 1 for number in marked):
            found.append(f"{name} counts {told} downgrades and marks {sorted(marked)} of {asked}")
        for job in s.jobs.values():
            if job.asked_model != model or not asked - downgrades.WINDOW < job.asked_number <= asked:
                continue
            if job.asked_number and (job.asked_number in marked) != (job.model != model):
                found.append(
                    f"job {job.id} asked for {model} and has {job.model}, marked: {job.asked_number in marked}"
                )
    return found


def _move(before: Snapshot, after: Snapshot, was: JobRecord, now: JobRecord, active: Active) -> list[str]:
    found = []
    arrows = dict(TRANSITIONS.get(was.state, {}))
    if was.state is State.CLAIMED and now.state in ENDED and now.last_seq > was.last_seq + 1:
        arrows |= TRANSITIONS[State.STREAMING]  # its first token came with its end: two steps in one
    if now.state not in arrows.values() and not (was.state == now.state and was.state in HELD):
        found.append(f"job {was.id} went from {was.state} to {now.state}, which the table has no arrow for")
    if was.lane != now.lane:
        here = active.lane(was.lane)
        promoted = Event.PROMOTE in arrows and now.state is State.QUEUED and not was.continues
        if not promoted or here is None or here.fallback != now.lane:
            found.append(f"job {was.id} moved from lane {was.lane} to {now.lane} while {was.state}")
        there = active.lane(now.lane)
        if there is not None and there.trust == "remote":
            found.append(f"job {was.id} was moved into lane {now.lane}, which leads out")
    if now.state is State.CLAIMED and was.state is State.QUEUED:
        found += _left(before, after, was, active)
        if now.attempt != was.attempt + 1 or now.entry != was.entry:
            found.append(f"claim of {was.id}: attempt {was.attempt} to {now.attempt}, entry {was.entry} to {now.entry}")
    elif now.attempt != was.attempt:
        found.append(f"promise 5: attempt of job {was.id} changed without a claim")
    if now.state is State.QUEUED and was.state is not State.SCHEDULED:
        stream = before.lanes.get(now.lane)
        if stream is not None and now.entry in dict(stream.entries):
            found.append(f"job {was.id} was put back under the old entry {now.entry}: no tailing worker sees it")
        if was.state is State.STREAMING and was.seen and now.continues != was.attempt:
            found.append(f"job {was.id} was started again although a client has seen part of its answer")
    return found


def _left(before: Snapshot, after: Snapshot, job: JobRecord, active: Active) -> list[str]:
    """Promise 7, at a claim: consent, a verdict by the rules in force, and a record of it, written in the same step."""
    lane = active.lane(job.lane)
    new = len(after.audit) - len(before.audit)
    if lane is None or lane.trust == "local":
        return [f"claim of {job.id} in local lane {job.lane} wrote {new} audit records"] if new else []
    _, rules, _ = door.asked_at_claim(active, lane, None)
    found = []
    if job.zone != "remote" or (job.exits and lane.name not in job.exits.split()):
        found.append(f"promise 7: local-only job {job.id} was claimed in lane {job.lane}, which leads out")
    if job.judged != rules:
        found.append(f"promise 7: job {job.id} was claimed in lane {job.lane} judged by {job.judged!r}, not {rules!r}")
    told = after.audit[-1] if new == 1 else {}
    if (told.get("job"), told.get("attempt"), told.get("lane")) != (job.id, str(job.attempt + 1), job.lane):
        found.append(f"promise 7: the claim of {job.id} in lane {job.lane}, which leads out, is not in the audit log")
    return found


def _entries(stream: Stream) -> list[tuple[str, str]]:
    return [(entry, decode_hash(list(values)).get("job", "")) for entry, values in stream.entries]


def _dump_fake(server: fakeredis.FakeServer, pattern: str) -> list[Any]:
    """What the script tells, out of the server's own objects: many times as fast, and of one moment because nothing is
    awaited. `test_broker_keys` holds it against the script."""
    database, now = server.dbs[0], time.time()
    prefix = pattern.removesuffix("*").encode()
    found = []
    for key in sorted(key for key in list(database) if key.startswith(prefix)):
        item = database.get(key)
        if item is None or (item.expireat is not None and item.expireat <= now):
            continue  # it has expired, and nobody has asked for it since
        value: Any = item.value
        if isinstance(value, Hash):
            kind, told = b"hash", [x for pair in value.getall().items() for x in pair]
        elif isinstance(value, ZSet):
            kind, told = b"zset", [x for score, member in value.islice_score(None, None) for x in (member, score)]
        elif isinstance(value, list):
            kind, told = b"list", list(value)
        elif isinstance(value, XStream):
            kind, told = b"stream", _stream(value, grouped=b":lane:" in key)
        else:
            kind, told = b"string", value
        ttl_ms = -1 if item.expireat is None else math.ceil((item.expireat - now) * 1000)
        found.append((key, kind, ttl_ms, told))
    return found


def _stream(stream: XStream, *, grouped: bool) -> list[Any]:
    entries = [(number.encode(), stream._values_dict[number]) for number in stream._ids]
    groups = stream._groups.items() if grouped else ()
    return [
        entries,
        [
            (name, [(number.encode(), held.consumer_name) for number, held in group.pel.items()])
            for name, group in groups
        ],
    ]


def _score(told: float) -> float:
    return told if math.isinf(told) else int(told)


def _value(kind: str, raw: Any) -> Any:
    match kind:
        case "hash":
            return {raw[i]: raw[i + 1] for i in range(0, len(raw), 2)}
        case "zset":
            return tuple((raw[i].decode(), _score(float(raw[i + 1]))) for i in range(0, len(raw), 2))
        case "list":
            return tuple(raw)
        case "stream":
            entries = tuple((entry.decode(), tuple(values)) for entry, values in raw[0])
            groups = tuple(
                (name.decode(), tuple(sorted((p[0].decode(), p[1].decode()) for p in pending)))
                for name, pending in raw[1]
            )
            return Stream(entries, groups)
        case _:
            return raw


@lru_cache(maxsize=10_000)
def _row(namespace: str, key: str) -> str:
    family = Keyspace(namespace).family(key)
    return family.pattern if family else ""


def _pattern(names: Keyspace, key: str) -> str:
    """The row of a key, remembered: the model test asks for the same few names thousands of times."""
    return _row(names.namespace, key)


def left_over(s: Snapshot) -> Mapping[str, Key]:
    """The keys that are not there to stay: what must be gone when all jobs have ended and their keep time is over."""
    return {n: k for n, k in s.keys.items() if (f := s.names.family(n)) is None or not f.persistent}
