"""The only reader and writer of hash fields: what a job, a model and a host look like in Redis."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, Self, cast

from broker.lifecycle import ENDED, State

Zone = Literal["local", "remote"]
Priority = Literal["interactive", "batch"]
Mode = Literal["sync", "async"]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def decode_hash(raw: Mapping[Any, Any] | list[Any]) -> dict[str, str]:
    """Turns HGETALL's reply, a mapping or a flat list, into text."""
    if isinstance(raw, list):
        return {_text(raw[i]): _text(raw[i + 1]) for i in range(0, len(raw), 2)}
    return {_text(k): _text(v) for k, v in raw.items()}


class _Hash:
    """Shared codec: dataclass fields are the hash fields; int, float, bool and str survive the round trip."""

    _always: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_hash(cls, raw: Mapping[Any, Any] | list[Any]) -> Self:
        """Reads a record; fields that the hash lacks keep their defaults, fields we do not know are left alone."""
        readers = _readers(cast(Any, cls))
        pairs = zip(raw[::2], raw[1::2], strict=True) if isinstance(raw, list) else raw.items()
        known: dict[str, Any] = {}
        for key, value in pairs:
            name = _text(key)
            read = readers.get(name)
            if read is not None:
                known[name] = read(_text(value))
        return cls(**known)

    @classmethod
    def from_values(cls, names: Sequence[str], values: Sequence[bytes | str | None], **known: Any) -> Self:
        """Reads a record from these fields of a hash, in order, as HMGET tells them, and what is known of others."""
        readers = _readers(cast(Any, cls))
        for name, value in zip(names, values, strict=True):
            if value is not None:
                known[name] = readers[name](_text(value))
        return cls(**known)

    def to_hash(self) -> dict[str, str | int | float]:
        """Writes a record as hash fields; a field at its default is left out unless a script reads it."""
        own, always = self.__dict__, self._always
        return {
            name: int(own[name]) if own[name] is True or own[name] is False else own[name]
            for name, default in _defaults(cast(Any, type(self)))
            if own[name] != default or name in always
        }


_Read = Callable[[str], Any]
_READ: dict[Any, _Read] = {
    int: lambda text: int(text) if text.isdigit() else int(float(text or 0)),
    float: lambda text: float(text or 0),
    bool: lambda text: text in ("1", "true"),
    str: lambda text: text,
    State: State,
}


@cache
def _readers(kind: Any) -> dict[str, _Read]:
    return {f.name: _READ[f.type] for f in fields(kind)}


@cache
def _defaults(kind: Any) -> list[tuple[str, Any]]:
    return [(f.name, f.default) for f in fields(kind)]


@dataclass(frozen=True, kw_only=True)
class JobRecord(_Hash):
    """One generation, from submit to its end. Instants end in `_at` and are ms of Redis' clock, 0 = has not come."""

    _always = frozenset(
        "attempt caller entry grace_ms keep_ms last_seq losses mode priority promotions session tokens zone".split()
    )
    HIDDEN: ClassVar[frozenset[str]] = frozenset(
        (
            "apis boot idem retries exits judged leaves left last_seq usage grace_ms keep_ms entry asked_number "
            "error_message letter trace"
        ).split()
    )
    """What is ours alone to know, or is told in another form."""

    id: str
    state: State = State.QUEUED
    lane: str = ""
    entry: str = ""  # stream id of the job's entry in its lane, "" while in none
    model: str = ""  # policy key of the lane's model
    asked: str = ""  # what the client wrote: model, alias or lane
    asked_model: str = ""  # policy key that the request was routed to before any spill or promotion
    asked_number: int = 0  # its number among the jobs that asked for this model, 0 = they are not counted
    spilled: str = ""  # why it entered another lane than the one asked for: the code of that one's refusal, or STICKY
    caller: str = "anonymous"
    max_waiting: int = 0  # of one that starts later: jobs of its caller that may wait at once, 0 = no limit
    max_running: int = 0  # jobs of its caller that may run at once, by the key that it came with, 0 = no limit
    session: str = ""
    zone: str = "local"  # `remote`: it is allowed to leave, as far as its caller has a say; never given afterwards
    exits: str = ""  # remote lanes by which it may leave, with spaces between them, "" = any
    judged: str = ""  # digest of the `remote:` rules that its content passed, `-` before those that it did not
    leaves: str = ""  # hash of the copy of its body that would leave
    left: str = ""  # JSON of what its audit record says of that copy: bytes, passed, redacted
    priority: str = "interactive"
    endpoint: str = "/v1/chat/completions"
    mode: str = "sync"
    stream: bool = False
    needs: str = ""  # what only some models can do, in words with spaces between them: "native"
    include_usage: bool = False
    choices: int = 1
    tokens: int = 0  # estimated prompt tokens
    longest: int = 0  # of an embedding request, the tokens of its longest input; 0 = tokens is one prompt
    max_tokens: int = 0  # answer tokens asked for, 0 = not said
    attempt: int = 0
    losses: int = 0
    held_ms: int = 0  # how long attempts that were put back or moved held slots
    promotions: int = 0
    put_backs: int = 0  # times that it was stopped and put back, as batch work, for interactive work
    seen: bool = False
    owner: str = ""  # host that holds it
    boot: str = ""
    policy_version: int = 0
    apis: str = ""
    last_seq: int = 0
    continues: int = 0  # the attempt up to which the frames stand and are gone on from, 0 = none was lost and stands
    grace_ms: int = -1  # how long it outlives its last reader, -1 = it does not depend on readers
    keep_ms: int = 600_000
    idem: str = ""  # key that binds an Idempotency-Key to it
    retries: str = ""  # key of the index and fingerprint by which an SDK's retry finds it, "" = none does
    submitted_at: int = 0
    not_before: int = 0
    queued_at: int = 0
    promote_at: int = 0
    retry_at: int = 0
    promoted_at: int = 0
    requeued_at: int = 0  # when it went back into its lane, because its worker was lost or gave it back
    woke_at: int = 0  # when the model that claimed it had woken, 0 = its worker found it awake
    claimed_at: int = 0
    first_token_at: int = 0
    first_token_by: int = 0  # start + cold-start budget of the lane that was asked for, 0 = batch work; never moved
    ended_at: int = 0
    give_up_at: int = 0
    continue_by: int = 0  # until when an answer that has begun waits to be gone on from, 0 = it does not
    abandon_at: int = 0
    lease_until: int = 0
    served_by: str = ""  # policy key and host that produced the answer, `coder-small@gpu1`
    error: str = ""
    error_message: str = ""
    usage: str = ""  # JSON of the runtime's own figures
    webhook: str = ""  # the URL that is told of its end, "" = none
    batch: str = ""  # the batch that it is a line of, "" = none
    metadata: str = ""  # JSON object of what its caller noted on it, texts only
    trace: str = ""  # `traceparent` of the trace that it belongs to, "" = none
    retry_of: str = ""  # the job that ended badly whose request this one tries again
    retried_as: str = ""  # the newest job that tries this one's request again
    letter: str = ""  # id of its entry among the dead letters

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state not in ENDED

    @property
    def entered_at(self) -> int:
        """When it came into its lane: the id of its entry says so, whatever brought it there."""
        return int(self.entry.partition("-")[0]) if self.entry else self.submitted_at

    @property
    def waits_since(self) -> int:
        """When its last wait began: in another lane, or after an attempt that came to nothing, it waited anew."""
        return max(self.submitted_at, self.not_before, self.promoted_at, self.requeued_at)

    @property
    def given_back(self) -> bool:
        """Whether nothing came of its last claim."""
        return 0 < self.claimed_at and (self.state is State.QUEUED or self.claimed_at < self.waits_since)

    @property
    def consent(self) -> str:
        """How far it may leave, in one word or more: what two requests must share to be the same."""
        return f"{self.zone} {self.exits}".rstrip()

    def public(self) -> dict[str, Any]:
        """What a client may see of its job."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.HIDDEN}
        out["usage"] = json.loads(self.usage) if self.usage else None
        out["metadata"] = json.loads(self.metadata) if self.metadata else {}
        out["error"] = {"code": self.error, "message": self.error_message} if self.error else None
        return out


@dataclass(frozen=True, kw_only=True)
class ModelOnHost(_Hash):
    """One model on one host, as its worker last told."""

    _always = frozenset({"state", "slots_total", "slots_settling"})

    state: str = "cold"  # cold | waking | warm | degraded | unloading | quarantined
    reason: str = ""
    runtime: str = ""  # llama.cpp | ollama | simulated | openai
    slots_total: int = 0
    slots_used: int = 0
    slots_settling: int = 0
    slots_yielding: int = 0  # of those used, by batch work that is put back where people would miss their deadline
    slots_kept: int = 0  # so many of its free slots batch work may not have now
    first_token_ms: float = 0  # last measured, 0 = never
    first_token_ewma_ms: float = 0
    memory_bytes: int = 0
    parallel: int = 0  # generations that really run at once, where that is fewer than maxConcurrent; else 0
    last_load_ms: float = 0  # how long its last load here took, 0 = none since the worker began
    progress: float = -1  # 0..1 of the load that goes on, by the runtime's own figures; -1 = it does not say
    counts: bool = False  # whether its runtime tells how many tokens a prompt has
    manageable: bool = True  # whether it is ours to unload
    room_at: int = 0  # the earliest instant at which others make room for it, 0 = it waits for nobody's memory
    footprint_bytes: int = 0  # learned on this host, 0 = it was never loaded there
    load_ms: float = 0  # learned on this host, 0 = it was never loaded there
    unfit: bool = False  # cannot fit on this host whatever our other models leave; the reason says so in numbers
    sessions: str = ""  # JSON: slot -> [session whose prompt it has in its cache, tokens]
    prompts: str = ""  # JSON: session -> tokens of its cached prompt, as the api estimates them
    since: int = 0  # instant of the last change of state
    woke_at: int = 0  # when its last wake here was over, 0 = none since the worker began
    version: int = 0  # policy version that the worker serves it under

    def cached(self) -> dict[int, tuple[str, int]]:
        """Whose prompt each slot has in its cache: slot -> session, tokens."""
        table = json.loads(self.sessions) if self.sessions else {}
        return {int(slot): (session, tokens) for slot, (session, tokens) in table.items()}

    def estimates(self) -> dict[str, int]:
        """How long the cached prompt of each session is, in the api's estimate, which a new prompt is told in too."""
        found: dict[str, int] = json.loads(self.prompts) if self.prompts else {}
        return found


@dataclass(frozen=True, kw_only=True)
class ModelFacts(_Hash):
    """What is known of a model wherever it runs."""

    wanted_until: int = 0
    quarantined_until: int = 0
    unloaded_until: int = 0  # unloaded by hand: not kept warm until then, or until somebody asks
    pinned: bool = False  # by hand: neither evicted nor unloaded for being idle
    failures: int = 0
    failure: str = ""
    failed_at: str = ""  # JSON: the instants of the failed loads of the last hour
    load_ms: float = 0  # of its last loads wherever they were, 0 = never loaded
    footprint_bytes: int = 0
    definition: str = ""  # of the model whose load time and footprint these are
    service_ms: float = 0  # mean time that a job holds a slot
    prefill_tps: float = 0  # uncached prompt tokens read a second, 0 = not known
    decode_tps: float = 0  # answer tokens written a second, 0 = not known
    rates_of: str = ""  # definition of the model whose service time and rates these are
    wakes: int = 0  # that ended warm, as long as the model is in the policy; and below those that did not
    wakes_failed: int = 0
    wakes_unreachable: int = 0  # nobody was there to load it
    loads: int = 0  # of those wakes that found it in no memory, and the time that their loads took together
    loads_ms: int = 0
    evictions: int = 0  # unloaded to make room for another

    def failed(self, model: str) -> str:
        """What is to be said behind the model's name of loads that failed since the last one that succeeded."""
        loads = "load" if self.failures == 1 else f"{self.failures} loads"
        return f"its last {loads} failed: {without_name(model, self.failure)}" if self.failures else ""


@dataclass(frozen=True, kw_only=True)
class Downgrades(_Hash):
    """How many of the last jobs that asked for a model are served by another; the scripts keep more fields."""

    asked: int = 0  # all jobs so far
    downgraded: int = 0  # of the last ones


@dataclass(frozen=True, kw_only=True)
class Learned(_Hash):
    """What was learned of a model on one host; 0 = nothing."""

    footprint_bytes: int = 0
    load_ms: float = 0
    definition: str = ""  # what was loaded: under its name the policy may have other weights by now


@dataclass(frozen=True, kw_only=True)
class HostRecord(_Hash):
    """One machine with runtimes."""

    name: str
    boot: str = ""
    beat_at: int = 0
    started_at: int = 0
    memory_total: int = 0
    memory_used: int = 0
    memory_headroom: int = 0
    memory_source: str = ""  # limit | gpu | system
    memory_note: str = ""  # why it is not the GPUs' memory, where one would expect that
    policy_version: int = 0
    policy_unread: int = 0  # version of the active policy, where this worker cannot read it and takes no work; else 0
    draining: bool = False
    pid: int = 0
    skew_ms: int = 0  # Redis' clock minus this machine's
    machine: str = ""  # which hardware the name stands for

    @property
    def takes_work(self) -> bool:
        """Whether anybody may count on it for what comes."""
        return not self.draining and not self.policy_unread


@dataclass(frozen=True, kw_only=True)
class FileRecord(_Hash):
    """A caller's file. Instants are ms of Redis' clock; `parts` of its list are whole, what comes after them is not."""

    _always = frozenset("caller purpose state bytes parts lines uses created_at expires_at".split())

    id: str
    caller: str = ""
    purpose: str = "batch"  # batch | batch_output
    state: str = "sent"  # sending | sent
    filename: str = ""
    bytes: int = 0
    parts: int = 0
    lines: int = 0  # those that are not blank
    uses: int = 0  # batches that have not ended and read or write it
    opened: str = ""  # the last batch that was made of it, a digest of what was asked, and when
    created_at: int = 0
    expires_at: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchRecord(_Hash):
    """Requests in a file, worked off line by line. Instants are ms of Redis' clock, 0 = has not come."""

    _always = frozenset("caller state taken failed completed".split())
    ENDED: ClassVar[frozenset[str]] = frozenset({"failed", "completed", "expired", "cancelled"})

    id: str
    caller: str = ""
    named: bool = False  # its caller's rights stand in Redis, and are asked anew for each line
    state: str = "validating"  # validating | in_progress | finalizing | cancelling, or one of ENDED
    ending: str = ""  # expired | cancelled: no more lines are asked for, and it will end so
    endpoint: str = ""
    lane: str = ""  # what its requests ask for instead of their model, "" = their model
    leave: str = ""  # true | false: what was said of remote models, "" = nothing
    input_file_id: str = ""
    output_file_id: str = ""  # once there is a line in it
    error_file_id: str = ""
    completion_window: str = ""
    metadata: str = ""  # JSON
    errors: str = ""  # JSON: why it failed, [{code, message, line}]
    wait: str = ""  # JSON: what its lines wait for that nothing takes now, {code, message}
    total: int = 0  # lines that are not blank
    completed: int = 0
    failed: int = 0
    taken: int = 0  # lines that were read, blank ones included
    part: int = 0  # where the next line begins: a part of the file …
    offset: int = 0  # … and a byte of it
    read_all: bool = False  # there is no next line
    keep_ms: int = 0  # how long it and its files are kept after its end
    created_at: int = 0
    in_progress_at: int = 0
    finalizing_at: int = 0
    completed_at: int = 0
    failed_at: int = 0
    expires_at: int = 0
    expired_at: int = 0
    cancelling_at: int = 0
    cancelled_at: int = 0

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state not in self.ENDED


@dataclass(frozen=True)
class Frame:
    """One numbered piece of a job's answer. A terminal frame's kind is the state that the job ended in."""

    attempt: int
    seq: int
    kind: str
    data: bytes

    @property
    def id(self) -> str:
        """The frame's id in the log and in `Last-Event-ID`."""
        return f"{self.attempt}-{self.seq}"

    @property
    def terminal(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind in _ENDED_WORDS

    @classmethod
    def from_entry(cls, entry_id: bytes | str, values: list[Any] | Mapping[Any, Any]) -> Self:
        """Reads a frame from an entry of the log."""
        attempt, seq = _text(entry_id).split("-")
        pairs = values if isinstance(values, list) else [x for kv in values.items() for x in kv]
        found = {_text(pairs[i]): pairs[i + 1] for i in range(0, len(pairs), 2)}
        data = found["data"]
        return cls(int(attempt), int(seq), _text(found["kind"]), data.encode() if isinstance(data, str) else data)

    def message(self, job_id: str) -> bytes:
        """Writes it as the scripts do, for the frames channel."""
        return f"{job_id} {self.id} {self.kind}\n".encode() + self.data

    @classmethod
    def from_message(cls, message: bytes) -> tuple[str, Self]:
        """Reads a job's id and a frame from a message of the frames channel."""
        head, _, data = message.partition(b"\n")
        job_id, frame_id, kind = head.decode("ascii").split(" ")
        attempt, seq = frame_id.split("-")
        return job_id, cls(int(attempt), int(seq), kind, data)


_ENDED_WORDS = frozenset(state.value for state in ENDED)


@dataclass(frozen=True)
class Waiting:
    """One entry of a lane, as every worker sees it."""

    job: str
    lane: str
    entry: str
    caller: str = ""
    session: str = ""
    promote_at: int = 0
    submitted: int = 0
    tokens: int = 0
    priority: str = "interactive"
    zone: str = "local"

    @classmethod
    def from_entry(cls, lane: str, entry_id: bytes | str, values: list[Any] | Mapping[Any, Any]) -> Self:
        """Reads an entry of a lane's stream; one that we did not write has no job, and no claim finds it."""
        f = decode_hash(values)
        return cls(
            job=f.get("job", ""),
            lane=lane,
            entry=_text(entry_id),
            caller=f.get("caller", ""),
            session=f.get("session", ""),
            promote_at=int(f.get("promote_at") or 0),
            submitted=int(f.get("submitted") or 0),
            tokens=int(f.get("tokens") or 0),
            priority=f.get("priority", "interactive"),
            zone=f.get("zone", "local"),
        )


@dataclass(frozen=True)
class Claimed:
    """What a worker holds after a claim: the attempt that fences its writes, the request's bytes, and of the record
    what an attempt needs (the rest stands at its defaults)."""

    attempt: int
    record: JobRecord
    body: bytes


def without_name(model: str, reason: str) -> str:
    """Gives a reason as it reads behind the model's name, where a runtime's own words begin with it."""
    return reason.removeprefix(f"model '{model}': ")
