"""Reads the lines of a batch: whether there is anything to do in it, the next ones, and one that was read before."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from broker import batches, files
from broker.batch_lines import LINE_BYTES_MAX, LINES_MAX, Line, read_line
from broker.batches import Taken, Working
from broker.files import Place
from broker.records import BatchRecord, FileRecord
from broker.store import Store

LARGE_BYTES = 256 << 10
"""More than this is read or folded beside the loop, on which deadlines wait."""
LINES_AT_ONCE = 500
"""So many lines, most of them wrong, are read in one go at most."""
BYTES_AT_ONCE = 4 << 20
"""After so many, no further line is begun in one go: a batch's step has to end, for the others to have theirs."""
WHY_MAX = 10


@dataclass(frozen=True)
class Next:
    """What was read: the lines, how many were read by now, where the next one begins, and whether there is one."""

    lines: list[Taken]
    taken: int
    place: Place
    read_all: bool


def expired(batch: BatchRecord) -> tuple[str, str]:
    """Code and words for a line for which there was no time left, with what the batch waited for last."""
    words = "the batch's time was over before this request could be answered"
    if batch.wait:
        words += f"; its lines waited last for this: {json.loads(batch.wait)['message']}"
    return "batch_expired", words


async def why_failed(store: Store, batch: BatchRecord, record: FileRecord) -> list[dict[str, Any]]:
    """What is wrong with all of it, as OpenAI lists it; [] where at least one line can be asked for, and of a file that
    is nothing but wrong for longer than BYTES_AT_ONCE: that is read on as it goes."""
    if record.lines > LINES_MAX:
        words = f"the file has {record.lines} lines; a batch has {LINES_MAX} at most"
        return [{"code": "too_many_lines", "message": words, "line": None}]
    wrong: list[dict[str, Any]] = []
    read = 0
    async for line, size, _, _ in _lines(store, batch, record, Place(), number=0):
        read += size
        if (line is not None and not line.code) or read > BYTES_AT_ONCE:
            return []
        if line is not None and len(wrong) < WHY_MAX:
            wrong.append({"code": line.code, "message": line.message, "line": line.number})
    return wrong or [{"code": "empty_file", "message": "the file has no lines", "line": None}]


async def next_lines(store: Store, batch: BatchRecord, record: FileRecord, *, most: int) -> Next:
    """Reads on, until there are `most` good lines; what earlier lines were called is wrong with a later one."""
    found: list[Taken] = []
    taken, place, read_all, good, read = batch.taken, Place(batch.part, batch.offset), True, 0, 0
    async for line, size, begins, after in _lines(store, batch, record, place, number=taken):
        taken, place, read = taken + 1, after, read + size
        if line is not None:
            found.append(Taken(replace(line, body=b""), begins))  # it is read anew when its turn comes
            good += not line.code
        if good == most or len(found) == LINES_AT_ONCE or read > BYTES_AT_ONCE:
            read_all = False
            break
    known = await batches.known_names(store, batch.id, [one.line for one in found])
    for at, one in enumerate(found):
        if not one.line.code and one.line.name in known:
            twice = one.line.wrong("duplicate_custom_id", "its custom_id was that of a line before")
            found[at] = Taken(twice, one.at)
        known.add(one.line.name)
    return Next(found, taken, place, read_all)


async def late_lines(store: Store, batch: BatchRecord, record: FileRecord) -> Next:
    """Reads on for a batch whose time is over: of all that is good in it nothing is asked for any more."""
    told = await next_lines(store, batch, record, most=LINES_AT_ONCE)
    late = expired(batch)
    lines = [one if one.line.code else Taken(one.line.wrong(*late), one.at) for one in told.lines]
    return replace(told, lines=lines)


async def line_at(store: Store, batch: BatchRecord, record: FileRecord, working: Working) -> Line | None:
    """Reads one line again; None where its file is not what it was."""
    async for raw, _, _ in files.lines_of(store, record, working.at, bytes_max=LINE_BYTES_MAX):
        line = await _read(raw, number=working.number, endpoint=batch.endpoint)
        return line if line.custom_id == working.custom_id else None
    return None


async def _lines(
    store: Store, batch: BatchRecord, record: FileRecord, at: Place, *, number: int
) -> AsyncIterator[tuple[Line | None, int, Place, Place]]:
    """Reads line by line, None for a blank one: each with its bytes, its place and the next one's."""
    async for raw, begins, after in files.lines_of(store, record, at, bytes_max=LINE_BYTES_MAX):
        number += 1
        line = await _read(raw, number=number, endpoint=batch.endpoint) if raw.strip() else None
        yield line, len(raw), begins, after


async def _read(raw: bytes, *, number: int, endpoint: str) -> Line:
    if len(raw) <= LARGE_BYTES:
        return read_line(raw, number=number, endpoint=endpoint)
    return await asyncio.to_thread(read_line, raw, number=number, endpoint=endpoint)
