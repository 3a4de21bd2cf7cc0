"""Batches: requests in a file, worked off a window of lines at a time. The only caller of their verbs.

Where a batch stands is a place in its file, and the few lines before it that are being worked off: its window. A line
enters the window as the place moves past it, and leaves it as its answer is written, each in one script. So whoever
does the work may be killed anywhere, and two may do it at once.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ulid import ULID

from broker import errors, files
from broker.batch_lines import Line, unanswered
from broker.files import Place
from broker.keyspace import digest
from broker.records import BatchRecord, FileRecord
from broker.store import Store

KEPT_MAX = 1_000
"""Batches of one caller."""

RETRY_MS = 900_000
"""So long after it an SDK may still ask for the same batch again: its own timeout is ten minutes, tried thrice."""

JOB_KEEP_MS = 60_000
"""How long the job of a line is kept once its answer is written: that is there twice for so long, and may be megabytes
of vectors."""

Ending = Literal["cancelled", "expired"]
End = Literal["completed", "failed", "cancelled", "expired"]


@dataclass(frozen=True)
class Working:
    """A line that is being worked off: its number, where it begins, its custom_id."""

    number: int
    at: Place
    custom_id: str

    def told(self) -> str:
        """Writes it as the window keeps it."""
        return json.dumps([self.at.part, self.at.offset, self.custom_id], separators=(",", ":"))


@dataclass(frozen=True)
class Taken:
    """A line that was read, and the place where it begins."""

    line: Line
    at: Place


def job_id_of(batch_id: str, number: int) -> str:
    """The job of a line: always the same, so that asking for it twice is asking once."""
    return f"{batch_id}-{number}"


def output_id_of(batch_id: str) -> str:
    """The file of its answers."""
    return f"file-{batch_id.removeprefix('batch_')}-output"


def error_id_of(batch_id: str) -> str:
    """The file of what has no answer."""
    return f"file-{batch_id.removeprefix('batch_')}-error"


async def open_batch(
    store: Store, batch: BatchRecord, *, within_ms: int, said: str, is_retry: bool = False, idempotency_key: str = ""
) -> BatchRecord:
    """Accepts a batch of `batch.caller`; raises NoSuchFile, BatchLimit. `is_retry`: its SDK asks again, and is led to
    the batch that the same request made within RETRY_MS before, if it made one: no line is to be paid for twice. With
    an `idempotency_key` it is led to what `find_by_key` finds. `said` is what the client said, which its repeats say
    as well; raises IdempotencyMismatch where another request was made with the key."""
    keys, batch_id = store.keys, f"batch_{ULID()}"
    file_id, caller = batch.input_file_id, batch.caller
    told = {**batch.to_hash(), "id": batch_id}
    fields = [x for name, value in told.items() if name not in ("state", "keep_ms") for x in (name, value)]
    opened = await store.run_through(
        "batch_open",
        [
            keys.batch(batch_id),
            keys.batches,
            keys.batches_of(caller),
            keys.file(file_id),
            keys.parts(file_id),
            keys.files(caller),
            keys.batch_idem(caller, idempotency_key),
        ],
        [
            store.now_arg(),
            batch_id,
            file_id,
            within_ms,
            batch.keep_ms,
            KEPT_MAX,
            digest(said),
            RETRY_MS if is_retry else 0,
            int(bool(idempotency_key)),
            *fields,
            "keep_ms",
            batch.keep_ms,
        ],
        limit_s=files.OUTAGE_S,
    )
    return await read(store, opened.decode())


async def find_by_key(store: Store, *, caller: str, key: str, said: str) -> BatchRecord | None:
    """Finds the batch that a caller's Idempotency-Key made, where that is kept, and neither failed nor is to end before
    its lines do; raises IdempotencyMismatch where it was made of other words than `said`. Only a look: what
    `open_batch` finds in its script decides."""
    held = await store.command("GET", store.keys.batch_idem(caller, key))
    if held is None:
        return None
    batch_id, _, same = held.decode().partition(" ")
    try:
        batch = await read(store, batch_id)
    except errors.NoSuchBatch:
        return None
    if batch.state == "failed" or batch.ending:
        return None
    if same != digest(said):
        raise errors.IdempotencyMismatch(batch_id)
    return batch


async def read(store: Store, batch_id: str, *, caller: str = "") -> BatchRecord:
    """Reads a batch; raises NoSuchBatch. With `caller`, another's is as unknown."""
    raw = await store.hash(store.keys.batch(batch_id))
    record = BatchRecord.from_hash(raw) if b"id" in raw else None
    if record is None or (caller and record.caller != caller):
        raise errors.NoSuchBatch(batch_id)
    return record


async def of_caller(store: Store, caller: str, *, before: str = "", limit: int) -> list[BatchRecord]:
    """Lists the caller's batches, newest first: those made before the one named."""
    # those whose time is over would fill a page, and the page would look like the last
    names = await store.command("ZRANGE", store.keys.batches_of(caller), f"({await store.now_ms()}", "+inf", "BYSCORE")
    ids = sorted((name.decode() for name in names), reverse=True)
    if before:
        ids = [batch_id for batch_id in ids if batch_id < before]
    raws = await asyncio.gather(*(store.hash(store.keys.batch(batch_id)) for batch_id in ids[:limit]))
    return [BatchRecord.from_hash(raw) for raw in raws if b"id" in raw]


async def live(store: Store) -> list[BatchRecord]:
    """Reads the batches that have not ended, oldest first; the index forgets those that are gone."""
    found = []
    for name in await store.command("ZRANGE", store.keys.batches, 0, -1):
        try:
            found.append(await read(store, name.decode()))
        except errors.NoSuchBatch:  # nobody worked them off in all their time
            await store.command("ZREM", store.keys.batches, name)
    return found


async def window(store: Store, batch_id: str) -> list[Working]:
    """Reads the lines that are being worked off."""
    told = await store.hash(store.keys.window(batch_id))
    lines = [(int(number), json.loads(value)) for number, value in told.items()]
    return [Working(number, Place(part, offset), name) for number, (part, offset, name) in sorted(lines)]


async def known_names(store: Store, batch_id: str, lines: Sequence[Line]) -> set[str]:
    """Which of the lines' names earlier lines have had."""
    names = [line.name for line in lines if line.name]
    if not names:
        return set()
    scores = await store.command("ZMSCORE", store.keys.names(batch_id), *names)
    return {name for name, score in zip(names, scores, strict=True) if score is not None}


async def take(
    store: Store, batch: BatchRecord, lines: Sequence[Taken], *, taken: int, place: Place, read_all: bool
) -> None:
    """Moves the batch's place past these lines; raises Moved where another has, AlreadyEnded, NoSuchBatch."""
    keys, error_id = store.keys, error_id_of(batch.id)
    told: list[str | int | bytes] = []
    for one in lines:
        line = one.line
        works = "" if line.code else Working(line.number, one.at, line.custom_id).told()
        job_id = job_id_of(batch.id, line.number)
        wrong = unanswered(job_id, line.custom_id, code=line.code, message=line.message) if line.code else b""
        told += [line.number, "" if line.code else line.name, works, wrong]
    await store.run(
        "batch_take",
        [
            keys.batch(batch.id),
            keys.window(batch.id),
            keys.names(batch.id),
            keys.file(error_id),
            keys.parts(error_id),
            keys.files(batch.caller),
        ],
        [store.now_arg(), batch.id, error_id, batch.taken, taken, place.part, place.offset, int(read_all), *told],
    )


async def note_line(
    store: Store, batch: BatchRecord, number: int, *, which: Literal["output", "error", ""], text: bytes = b""
) -> bool:
    """Writes what became of a line of the window; False where that was done before."""
    keys, job_id = store.keys, job_id_of(batch.id, number)
    file_id = output_id_of(batch.id) if which == "output" else error_id_of(batch.id)
    done = await store.run(
        "batch_line",
        [
            keys.batch(batch.id),
            keys.window(batch.id),
            keys.file(file_id),
            keys.parts(file_id),
            keys.files(batch.caller),
            keys.job(job_id),
            keys.frames(job_id),
            keys.request(job_id),
        ],
        [store.now_arg(), batch.id, file_id, which, number, text, JOB_KEEP_MS],
    )
    return bool(done)


async def note_wait(store: Store, batch: BatchRecord, refusal: errors.BrokerError | None) -> None:
    """Says in a batch what its lines wait for, None = for nothing; raises AlreadyEnded, NoSuchBatch."""
    wait = json.dumps({"code": refusal.code, "message": str(refusal)}) if refusal is not None else ""
    if wait != batch.wait:
        await store.run("batch_wait", [store.keys.batch(batch.id)], [batch.id, wait])


async def stop(store: Store, batch_id: str, ending: Ending) -> None:
    """Says that it is to end early; one that has ended stays as it ended. Raises NoSuchBatch."""
    await store.run("batch_stop", [store.keys.batch(batch_id)], [store.now_arg(), batch_id, ending])


async def end(store: Store, batch: BatchRecord, state: End, *, why: Sequence[dict[str, Any]] = ()) -> None:
    """Ends a batch whose window is empty; raises Moved where it is not, or is to end otherwise."""
    keys, output_id, error_id = store.keys, output_id_of(batch.id), error_id_of(batch.id)
    await store.run(
        "batch_end",
        [
            keys.batch(batch.id),
            keys.window(batch.id),
            keys.names(batch.id),
            keys.batches,
            keys.batches_of(batch.caller),
            keys.file(batch.input_file_id),
            keys.file(output_id),
            keys.parts(output_id),
            keys.file(error_id),
            keys.parts(error_id),
            keys.files(batch.caller),
        ],
        [store.now_arg(), batch.id, state, json.dumps(list(why)) if why else "", output_id, error_id],
    )


async def input_of(store: Store, batch: BatchRecord) -> FileRecord:
    """Its file; raises NoSuchFile."""
    return await files.read(store, batch.input_file_id)
