"""What is kept of a job beside its record: the request, and the two ends of its log."""

from broker.records import Frame
from broker.store import Store


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
    frames = [Frame.from_entry(*one) for one in found or []]
    end = frames.pop(0) if frames and frames[0].terminal else None
    return (frames[0].data if frames else b""), end
