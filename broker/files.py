"""Files of callers, for batches: sent in parts, read in parts, kept for a while. None is ever in memory as a whole.

A file lives in Redis beside everything else, so that every process reaches it and a backup of one is a backup of all.
While it is sent it lives for a minute after each part: an upload that breaks off leaves nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ulid import ULID

from broker import errors
from broker.lanes import DAY_MS
from broker.policies import Active
from broker.records import FileRecord
from broker.store import Store

PART_BYTES = 256 << 10
"""Larger ones would keep Redis from others, smaller ones would cost more calls."""

PARTS_AT_ONCE = 64
"""Many short lines and then long ones in a file must not be megabytes of each times many."""

SENDING_MS = 60_000
OUTAGE_S = 5.0
"""How long an upload waits for a Redis that is away: its client can send it again."""
FILES_MAX = 2_000
MB = 1_000_000
OF_BATCHES = (b"-output", b"-error")
"""How the ids of files end that batches write."""


@dataclass(frozen=True)
class Place:
    """A place in a file: how many parts lie before it, and how many bytes of the next one."""

    part: int = 0
    offset: int = 0


class Upload:
    """A file that is being sent. `write` and `finish` raise FilesFull, BodyTooLarge, BadRequest, NoSuchFile."""

    def __init__(self, store: Store, active: Active, caller: str) -> None:
        self.id = f"file-{ULID()}"
        self._store = store
        self._policy = active.policy
        self._caller = caller
        self._held = bytearray()
        self._parts = 0
        self._lines = Lines()
        self.size = 0

    @property
    def bytes_max(self) -> int:
        """How large it may become."""
        return self._policy.max_file_mb * MB

    async def write(self, data: bytes | memoryview) -> None:
        """Takes what comes next; at most a part and `data` are in memory."""
        self.size += len(data)
        if self.size > self.bytes_max:
            raise errors.BodyTooLarge(self.bytes_max)
        self._held += data
        while len(self._held) >= PART_BYTES:
            await self._append(PART_BYTES)

    async def finish(self, filename: str, *, keep_ms: int | None = None) -> FileRecord:
        """Keeps what was sent as a file."""
        if not self.size:
            raise errors.BadRequest("the file is empty", "file")
        if self._held:
            await self._append(len(self._held))
        keys, keep_ms = self._store.keys, self._policy.file_days * DAY_MS if keep_ms is None else keep_ms
        await self._store.run_through(
            "file_keep",
            [keys.file(self.id), keys.parts(self.id), keys.files(self._caller)],
            [self._store.now_arg(), self.id, self._parts, self._lines.count, filename, keep_ms],
            limit_s=OUTAGE_S,
        )
        return await read(self._store, self.id)

    async def drop(self) -> None:
        """Forgets what was sent so far; what fails here ends by itself within a minute."""
        if self._parts:
            try:
                await drop(self._store, self.id, caller=self._caller)
            except errors.BrokerError:
                pass

    async def _append(self, size: int) -> None:
        part = bytes(self._held[:size])
        keys = self._store.keys
        fields = FileRecord(id=self.id, caller=self._caller, state="sending").to_hash()
        told = [x for name in ("id", "caller", "purpose", "lines", "uses") for x in (name, fields[name])]
        await self._store.run_through(
            "file_append",
            [keys.file(self.id), keys.parts(self.id), keys.files(self._caller)],
            [
                self._store.now_arg(),
                self.id,
                self._parts,
                part,
                self._policy.max_files_mb * MB,
                FILES_MAX,
                SENDING_MS,
                *told,
            ],
            limit_s=OUTAGE_S,
        )
        self._parts += 1
        self._lines.take(part)
        del self._held[:size]


class Lines:
    """Counts the lines that are not blank, as the parts go by."""

    def __init__(self) -> None:
        self.count = 0
        self._said = False  # the line that the last part ended in is counted already

    def take(self, part: bytes) -> None:
        """Counts those that end or begin in a part."""
        first, *more = part.split(b"\n")
        if not self._said and first.strip():
            self.count += 1
            self._said = True
        if more:
            self.count += sum(1 for line in more if line.strip())
            self._said = bool(more[-1].strip())


async def read(store: Store, file_id: str, *, caller: str = "") -> FileRecord:
    """Reads what is known of a file that was sent; raises NoSuchFile. With `caller`, another's is as unknown."""
    raw = await store.hash(store.keys.file(file_id))
    record = FileRecord.from_hash(raw) if b"id" in raw else None
    if record is None or record.state != "sent" or (caller and record.caller != caller):
        raise errors.NoSuchFile(file_id)
    return record


async def of_caller(store: Store, caller: str) -> list[FileRecord]:
    """Lists the caller's files, oldest first."""
    told = await store.hash(store.keys.files(caller))
    raws = await asyncio.gather(*(store.hash(store.keys.file(file_id.decode())) for file_id in sorted(told)))
    found = [FileRecord.from_hash(raw) for raw in raws if b"id" in raw]
    return [record for record in found if record.state == "sent"]


async def hold_answers_enough(store: Store, active: Active, caller: str) -> bool:
    """Whether the files that batches wrote hold, by themselves, what all files of a caller may."""
    told, now = await store.hash(store.keys.files(caller)), await store.now_ms()
    sizes = (value.split() for file_id, value in told.items() if file_id.endswith(OF_BATCHES))
    return sum(int(size) for size, til in sizes if int(til) > now) >= active.policy.max_files_mb * MB


async def drop(store: Store, file_id: str, *, caller: str) -> None:
    """Deletes a file of this caller; raises NoSuchFile, FileInUse."""
    keys = store.keys
    await store.run("file_drop", [keys.file(file_id), keys.parts(file_id), keys.files(caller)], [file_id])


async def parts_of(store: Store, record: FileRecord, *, first: int = 0) -> AsyncIterator[bytes]:
    """Reads what the file held when its record was read, some PART_BYTES at a time, at most PARTS_AT_ONCE parts;
    raises NoSuchFile in the middle where it goes away."""
    at_once = PART_BYTES * record.parts // max(1, record.bytes)  # the parts of answers are single lines, mostly short
    at_once = max(1, min(at_once, PARTS_AT_ONCE))
    while first < record.parts:
        last = min(first + at_once, record.parts) - 1
        found = await store.command("LRANGE", store.keys.parts(record.id), first, last)
        if len(found) != last - first + 1:
            raise errors.NoSuchFile(record.id)
        yield b"".join(found)
        first = last + 1


async def lines_of(
    store: Store, record: FileRecord, at: Place, *, bytes_max: int
) -> AsyncIterator[tuple[bytes, Place, Place]]:
    """Reads the lines from a place on: each, where it begins, and where the next one does. Of a line that is longer
    than `bytes_max` it gives one byte more than that. Raises NoSuchFile."""
    held, begins, part, offset = bytearray(), at, at.part, at.offset
    while part < record.parts:
        data = await store.command("LINDEX", store.keys.parts(record.id), part)
        if data is None:
            raise errors.NoSuchFile(record.id)
        while (end := data.find(b"\n", offset)) >= 0:
            held += data[offset : min(end, offset + bytes_max + 1)]
            offset = end + 1
            after = Place(part, offset)
            yield bytes(held[: bytes_max + 1]), begins, after
            held.clear()
            begins = after
        held += data[offset:]
        del held[bytes_max + 1 :]
        part, offset = part + 1, 0
    if held:
        yield bytes(held), begins, Place(part)
