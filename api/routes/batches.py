"""Batches: a file of requests, worked off while nobody waits. Made, looked at, listed and cancelled here; the scheduler
does the work."""

import json
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from api.async_jobs import METADATA_KEY_CHARACTERS_MAX, METADATA_KEYS_MAX, METADATA_TEXT_CHARACTERS_MAX
from api.auth import Caller, Gate
from api.described import WISHES, Described, described, says
from api.durations import LENGTH_PATTERN, length_ms
from api.gateway import Gateway
from api.paging import checked, ends_of
from api.routes.files import KEEP_S_MAX, KEEP_S_MIN, SECOND_MS, own_file
from api.small_body import read_as
from api.visit import KEY, idempotency_key_of, leave_of, tries_again
from broker import batches, callers, errors, requests
from broker.batch_lines import ENDPOINTS
from broker.dialects.json_schema import text, whole
from broker.lanes import DAY_MS
from broker.records import BatchRecord

router = APIRouter(tags=["batches"])

PAGE, PAGE_MAX = 20, 100
WINDOW_MS_MIN, WINDOW_MS_MAX = 60_000, 7 * DAY_MS
WINDOW_CHARACTERS_MAX = 32

_ID = re.compile(r"batch_[0-9A-Za-z_-]{1,64}")
_INSTANTS = (
    "created_at in_progress_at finalizing_at completed_at failed_at expires_at expired_at cancelling_at cancelled_at"
).split()

Word = Annotated[str, Field(max_length=METADATA_KEY_CHARACTERS_MAX)]
Words = Annotated[str, Field(max_length=METADATA_TEXT_CHARACTERS_MAX)]


class ExpiresAfter(BaseModel):
    """For how long the files that a batch writes are kept after its end, at most `fileDays`."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=KEEP_S_MIN, le=KEEP_S_MAX, strict=True)]


class NewBatch(BaseModel):
    """A batch to make."""

    model_config = ConfigDict(frozen=True)

    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Literal[ENDPOINTS]  # type: ignore[valid-type]  # the same words, in one place
    completion_window: Annotated[
        str, Field(max_length=WINDOW_CHARACTERS_MAX, json_schema_extra={"pattern": LENGTH_PATTERN})
    ]
    metadata: Annotated[dict[Word, Words], Field(max_length=METADATA_KEYS_MAX)] | None = None
    output_expires_after: ExpiresAfter | None = None


_WITHIN = {"batch_id": text("As it was told when the batch was made.")}
_FAILS = (errors.NoSuchBatch, errors.BrokerUnavailable)
_TAG = "batches"


@router.post("/v1/batches")
@described(
    Described(
        "Make a batch", _TAG, says("It will be worked off.", "Batch"), body="NewBatch",
        words="Each line of the file is a request: `custom_id`, `method`, `url` (the endpoint), `body`. A line that is "
        "wrong is a line of the error file; the others go on. All of it is batch work, behind people's.",
        headers={
            **{n: WISHES[n] for n in ("X-Gateway-Lane", "X-Gateway-Allow-Remote", "X-Stainless-Retry-Count")},
            "Idempotency-Key": text(
                "The same key with the same request comes back to the same batch, unless that ended badly.",
                pattern=f"^({KEY.pattern})?$",
            ),
        },
        fails=(
            errors.BadRequest, errors.BodyTooLarge, errors.NoSuchFile, errors.BatchLimit, errors.UnknownLane,
            errors.LaneForbidden, errors.ModelUnavailable, errors.IdempotencyMismatch, errors.BrokerUnavailable,
        ),
    )
)  # fmt: skip
async def new_batch(request: Request, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Makes a batch of a file of the caller."""
    asked = await read_as(NewBatch, request)
    lane, leave = request.headers.get("x-gateway-lane", ""), request.headers.get("x-gateway-allow-remote", "").lower()
    leave_of(leave)
    key = idempotency_key_of(request.headers.get("idempotency-key", ""))
    within_ms = _window_ms(asked.completion_window)
    said = _said(asked, within_ms, lane, leave)
    if key and (made := await batches.find_by_key(gateway.store, caller=caller.name, key=key, said=said)):
        return shown(made)
    policy = gateway.book.active.policy
    if lane:
        with requests.told_of_lanes(lane):
            requests.lane_of(policy, caller, lane, endpoint=asked.endpoint)
    record = await own_file(gateway, asked.input_file_id, callers.Caller(caller.name, callers.Rights()))
    if record.purpose != "batch":
        raise errors.BadRequest("the file is no input of a batch", "input_file_id")
    keep_ms = policy.file_days * DAY_MS
    if asked.output_expires_after is not None:
        keep_ms = min(keep_ms, asked.output_expires_after.seconds * SECOND_MS)
    batch = BatchRecord(
        id="",
        caller=caller.name,
        named=caller.named,
        endpoint=asked.endpoint,
        lane=lane,
        leave=leave,
        input_file_id=record.id,
        completion_window=asked.completion_window,
        metadata=json.dumps(asked.metadata) if asked.metadata is not None else "",
        keep_ms=keep_ms,
    )
    opened = await batches.open_batch(
        gateway.store,
        batch,
        within_ms=within_ms,
        said=said,
        is_retry=tries_again(request.headers.get("x-stainless-retry-count", "")),
        idempotency_key=key,
    )
    return shown(opened)


@router.get("/v1/batches")
@described(
    Described(
        "List batches", _TAG, says("The caller's own, the newest first.", "Batches"),
        query={
            "after": text("The last id of the page before."),
            "limit": whole(f"How many; {PAGE} unless said.", least=1, most=PAGE_MAX),
        },
        fails=(errors.BadRequest, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def list_batches(gateway: Gate, caller: Caller, after: str = "", limit: int = PAGE) -> dict[str, Any]:
    """Lists the caller's batches."""
    limit = checked(limit, PAGE_MAX)
    found = await batches.of_caller(gateway.store, caller.name, before=after, limit=limit + 1)
    page = [shown(batch) for batch in found[:limit]]
    return {"object": "list", "data": page, "has_more": len(found) > limit, **ends_of(page)}


@router.get("/v1/batches/{batch_id}")
@described(Described("Look at a batch", _TAG, says("As it is now.", "Batch"), within=_WITHIN, fails=_FAILS))
async def show_batch(batch_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Shows a batch of the caller."""
    return shown(await _own_batch(gateway, batch_id, caller))


@router.post("/v1/batches/{batch_id}/cancel")
@described(
    Described(
        "Cancel a batch", _TAG, says("As it is now; one that had ended stays as it ended.", "Batch"), within=_WITHIN,
        fails=_FAILS,
    )
)  # fmt: skip
async def cancel_batch(batch_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Asks for no more lines, and ends those that are under way; what has been answered stays in its file."""
    await _own_batch(gateway, batch_id, caller)
    await batches.stop(gateway.store, batch_id, "cancelled")
    return shown(await batches.read(gateway.store, batch_id))


def _window_ms(text: str) -> int:
    try:
        window_ms = length_ms(text)
    except ValueError as wrong:
        raise errors.BadRequest(f"completion_window: {wrong}", "completion_window") from None
    if not WINDOW_MS_MIN <= window_ms <= WINDOW_MS_MAX:
        raise errors.BadRequest("completion_window must be 1m to 7d", "completion_window")
    return window_ms


def _said(asked: NewBatch, within_ms: int, lane: str, leave: str) -> str:
    """What a client said of a batch, the same for whatever means the same."""
    told = asked.model_dump(exclude={"completion_window"}) | {"metadata": asked.metadata or None}
    return json.dumps([told, within_ms, lane, leave], sort_keys=True)


async def _own_batch(gateway: Gateway, batch_id: str, caller: callers.Caller) -> BatchRecord:
    if not _ID.fullmatch(batch_id):
        raise errors.NoSuchBatch(batch_id[: errors.NAME_SHOWN])
    return await batches.read(gateway.store, batch_id, caller="" if caller.rights.admin else caller.name)


def shown(batch: BatchRecord) -> dict[str, Any]:
    """The batch object, as OpenAI's clients read it."""
    instants = {name: getattr(batch, name) // SECOND_MS or None for name in _INSTANTS}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": json.loads(batch.errors)} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.state,
        "output_file_id": batch.output_file_id or None,
        "error_file_id": batch.error_file_id or None,
        **instants,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": json.loads(batch.metadata) if batch.metadata else None,
        "wait": json.loads(batch.wait) if batch.wait and batch.live and not batch.ending else None,
    }
