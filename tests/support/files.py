"""What must hold of files and batches in Redis, as sentences about what does not."""

from typing import TYPE_CHECKING

from broker.records import FileRecord

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
    return found
