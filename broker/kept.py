"""What is kept of a job beside its record: the request, and its log, whole or the two ends of it."""

from broker import errors, frames
from broker.records import Frame
from broker.store import Store

ANSWER_BYTES_MAX = 64 << 20
"""A whole answer larger than this is told to nobody."""


async def request_of(store: Store, job_id: str) -> bytes:
    """The body of the request; b"" where it is not kept any more."""
    found = await store.command("GET", store.keys.request(job_id))
    return bytes(found or b"")


async def first_frame(store: Store, job_id: str) -> Frame | None:
    """The oldest frame that stands; None while the log is empty."""
    found = await store.command("XRANGE", store.keys.frames(job_id), "-", "+", "COUNT", 1)
    return Frame.from_entry(*found[0]) if found else None


async def last_frames(store: Store, job_id: str) -> tuple[bytes, Frame | None]:
    """What the answer ends with, b"" where there is none; and the frame that says how the job ended, if it has."""
    found = await store.command("XREVRANGE", store.keys.frames(job_id), "+", "-", "COUNT", 2)
    ends = [Frame.from_entry(*one) for one in found or []]
    end = ends.pop(0) if ends and ends[0].terminal else None
    return (ends[0].data if ends else b""), end


async def answer_of(store: Store, job_id: str) -> tuple[list[bytes], Frame | None]:
    """The answer's bytes, frame by frame, and the frame that says how the job ended, None where it has not; raises
    RuntimeFailed where they are more than ANSWER_BYTES_MAX."""
    parts: list[bytes] = []
    size = 0
    async for frame in frames.replay(store, job_id):
        if frame.terminal:
            return parts, frame
        parts.append(frame.data)
        size += len(frame.data)
        if size > ANSWER_BYTES_MAX:
            raise errors.RuntimeFailed(f"the answer is larger than {ANSWER_BYTES_MAX} bytes")
    return parts, None
