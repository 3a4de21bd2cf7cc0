"""What must hold of files and batches in Redis, as sentences about what does not."""

from typing import TYPE_CHECKING

from broker.batches import error_id_of, output_id_of
from broker.records import BatchRecord, FileRecord

if TYPE_CHECKING:
    from tests.support.invariants import Snapshot


def files_and_batches(s: "Snapshot") -> list[str]:
    """Says which promises of files one picture breaks."""
    found = []
    records = {name: FileRecord.from_hash(key.value) for name, key in s.of("file:<id>").items()}
    for name, record in records.items():
        parts = s.keys.get(s.names.parts(record.id))
        held = parts.value if parts else ()
        if len(held) != record.parts or sum(map(len, held)) != record.bytes:
            found.append(f"{name} has {list(map(len, held))}, its hash says {record.parts} and {record.bytes}")
        index = s.keys.get(s.names.files(record.caller))
        told = index.value.get(record.id.encode()) if index else None
        if told != f"{record.bytes} {record.expires_at}".encode():
            found.append(f"{name} holds {record.bytes} until {record.expires_at}, its caller's index says {told!r}")
    for name in s.of("file:<id>:parts"):
        if name.removesuffix(":parts") not in records:
            found.append(f"promise 9: {name} has no file")
    return found + _batches(s, {record.id: record for record in records.values()})


def _batches(s: "Snapshot", files: dict[str, FileRecord]) -> list[str]:
    """Each line of a batch is in its window or in one of its files, once; one that has ended holds nothing more."""
    found = []
    live = {name for name, _ in s.keys[s.names.batches].value} if s.names.batches in s.keys else set()
    uses: dict[str, int] = {}
    for name, key in s.of("batch:<id>").items():
        batch = BatchRecord.from_hash(key.value)
        window, names = (s.keys.get(key) for key in (s.names.window(batch.id), s.names.names(batch.id)))
        working = len(window.value) if window else 0
        for which, count, file_id in (
            ("answers", batch.completed, output_id_of(batch.id)),
            ("errors", batch.failed, error_id_of(batch.id)),
        ):
            written = files[file_id].lines if file_id in files else 0
            if count != written:
                found.append(f"{name} counts {count} {which}, its file has {written}")
        if batch.completed + batch.failed + working > batch.total:
            found.append(f"{name} has {batch.completed} + {batch.failed} + {working} lines of {batch.total}")
        if batch.state == "completed" and batch.completed + batch.failed != batch.total:
            found.append(f"{name} is completed with {batch.completed} + {batch.failed} lines of {batch.total}")
        if batch.live != (batch.id in live):
            found.append(f"{name} is {batch.state}, which the index of live batches denies")
        if not batch.live and (window or names):
            found.append(f"promise 9: {name} is {batch.state} and still has a window or names")
        own = s.keys.get(s.names.batches_of(batch.caller))
        if own is None or batch.id not in dict(own.value):
            found.append(f"{name} is not among the batches of {batch.caller}")
        if batch.live:
            for file_id in (batch.input_file_id, output_id_of(batch.id), error_id_of(batch.id)):
                uses[file_id] = uses.get(file_id, 0) + 1
    for record in files.values():
        if record.uses != uses.get(record.id, 0):
            found.append(f"file {record.id} counts {record.uses} uses, {uses.get(record.id, 0)} batches are at it")
    return found
