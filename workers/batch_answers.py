"""What became of a line: the bytes that are written of its job, once that has ended."""

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Literal

from broker import errors, kept
from broker.batch_lines import answered, unanswered
from broker.lifecycle import State
from broker.records import BatchRecord
from broker.store import Store
from broker.whole import FOLDS
from workers.batch_reading import LARGE_BYTES, expired

log = logging.getLogger("warmlane.batches")


@dataclass(frozen=True)
class Written:
    """A line of one of the batch's files; `which` "" = of neither."""

    which: Literal["output", "error", ""]
    text: bytes = b""


async def of_job(store: Store, batch: BatchRecord, job_id: str, custom_id: str, state: State) -> Written:
    """What is written of a job that has ended."""
    if state is State.CANCELLED and batch.ending == "cancelled":
        return Written("")
    if await _ran_out_of_time(store, batch, state):
        return late(batch, job_id, custom_id)
    try:
        parts, last = await kept.answer_of(store, job_id)
        if state is State.DONE and parts:
            return Written("output", await _line(batch.endpoint, parts, job_id, custom_id))
        said = json.loads(last.data) if last is not None else {}
        code, words = said.get("code") or errors.WorkerLost.code, said.get("message") or "the answer is gone"
        status = int(said.get("status") or 0) if code == errors.RuntimeRefused.code else 0
        return Written("error", unanswered(job_id, custom_id, code=code, message=words, status=status))
    except errors.RuntimeFailed as failed:
        return wrong(job_id, custom_id, failed)


async def _ran_out_of_time(store: Store, batch: BatchRecord, state: State) -> bool:
    """Whether the end of the batch's time ended the job. One may expire before that, where its model does not load."""
    if state is State.EXPIRED:
        return batch.expires_at <= await store.now_ms()
    return state is State.CANCELLED and batch.ending == "expired"


def wrong(job_id: str, custom_id: str, error: errors.BrokerError) -> Written:
    """What is written of a request that was refused for good."""
    return Written("error", unanswered(job_id, custom_id, code=error.code, message=str(error)))


def late(batch: BatchRecord, job_id: str, custom_id: str) -> Written:
    """What is written of a request for which there was no time left."""
    code, message = expired(batch)
    return Written("error", unanswered(job_id, custom_id, code=code, message=message))


async def _line(endpoint: str, parts: list[bytes], job_id: str, custom_id: str) -> bytes:
    def made() -> bytes:
        return answered(job_id, custom_id, FOLDS[endpoint](parts))

    try:
        return made() if sum(map(len, parts)) <= LARGE_BYTES else await asyncio.to_thread(made)
    except ValueError:
        raise errors.RuntimeFailed("the answer could not be put together from its stream") from None
    except Exception:  # a line that nobody foresaw must not hold its batch up past its expiry
        log.exception("event=answer_unreadable job=%s", job_id)
        raise errors.RuntimeFailed("the gateway could not put the answer together from its stream") from None
