"""Responses that were made in the background: look at one, follow it from any of its events, cancel it, delete it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response

from api.auth import Caller, Gate
from api.background import Followed, response_of
from api.described import EVENTS, JSON, UNSEEN, Answer, Described, described, says
from api.gateway import Gateway
from api.routes.jobs import own_job
from broker import callers, errors, jobs, kept
from broker.dialects import responses
from broker.dialects.json_schema import flag, ref, text, whole
from broker.dialects.responses_background import OPENING, stands
from broker.records import JobRecord

router = APIRouter(tags=["openai"])

_AT = "/v1/responses/{response_id}"
_ID = "resp_"
_WITHIN = {"response_id": text("As the response said it.")}
_FAILS = (errors.NoSuchResponse, errors.BrokerUnavailable)
_KEEPS = "Only responses that were made in the background are kept, for the policy's keepAsyncMs after their end."


@router.get(_AT, response_class=Response)
@described(
    Described(
        "Look at a response", "openai", words=_KEEPS, within=_WITHIN,
        fails=(errors.BadRequest, errors.BegunAgain, errors.CallerTooMany, *_FAILS),
        query={
            "stream": flag("Follow its events instead, also when it has ended."),
            "starting_after": whole("With `stream`: only events with a higher sequence number.", least=0),
        },
        answers={
            200: Answer(
                "As it is now; as a stream: its events, with the numbers that they had at first. An `error` at the end "
                "says that the stream ended and the response did not, and counts as none of its events.",
                {JSON: ref("Response"), EVENTS: UNSEEN},
            ),
        },
    )
)  # fmt: skip
async def show_response(
    response_id: str,
    gateway: Gate,
    caller: Caller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Shows a response that the caller had made in the background, or follows it."""
    job = await _made(gateway, response_id, caller)
    if not stream:
        if starting_after is not None:
            raise errors.BadRequest("starting_after goes with stream=true", "starting_after")
        return _whole(await response_of(gateway, job))
    after = -1 if starting_after is None else starting_after
    if after >= OPENING:
        first = await kept.first_frame(gateway.store, job.id)
        if first is None or not stands(after, first.attempt, first.seq):
            raise errors.BegunAgain
    body = await kept.request_of(gateway.store, job.id)
    return Followed(gateway, job, body, after=after, follower=caller.name)


@router.post(_AT + "/cancel", response_class=Response)
@described(
    Described(
        "Cancel a response", "openai", says("As it is now; one that had ended stays as it ended.", "Response"),
        words=_KEEPS, within=_WITHIN, fails=_FAILS,
    )
)  # fmt: skip
async def cancel_response(response_id: str, gateway: Gate, caller: Caller) -> Response:
    """Cancels a response in any state; one that has ended stays as it ended."""
    job = await _made(gateway, response_id, caller)
    await _cancel(gateway, job)
    return _whole(await response_of(gateway, await jobs.read(gateway.store, job.id)))


@router.delete(_AT)
@described(
    Described(
        "Delete a response", "openai", says("It is gone; it is cancelled first, if it runs.", "ResponseDeleted"),
        words=_KEEPS, within=_WITHIN, fails=_FAILS,
    )
)  # fmt: skip
async def delete_response(response_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Deletes a response with its request and its answer."""
    job = await _made(gateway, response_id, caller)
    await _cancel(gateway, job)
    try:
        await jobs.forget(gateway.store, job.id)
    except errors.NoSuchJob:
        raise _unknown(response_id) from None
    return {"id": response_id, "object": "response", "deleted": True}


async def _made(gateway: Gateway, response_id: str, caller: callers.Caller) -> JobRecord:
    """Reads the job of a response; another caller's is as unknown as one that never was."""
    try:
        if not response_id.startswith(_ID):
            raise errors.NoSuchJob(response_id)
        job = await own_job(gateway, response_id.removeprefix(_ID), caller)
    except errors.NoSuchJob:
        raise _unknown(response_id) from None
    if job.endpoint != responses.PATH:
        raise _unknown(response_id)
    if job.batch:
        raise errors.NoSuchResponse(f"response {response_id} answers a line of a batch: the batch's output file has it")
    if job.mode != "async":
        raise errors.NoSuchResponse(f"response {response_id} was not made in the background, and only those are kept")
    return job


async def _cancel(gateway: Gateway, job: JobRecord) -> None:
    try:
        await jobs.cancel(gateway.store, job.id)
    except errors.AlreadyEnded:
        pass


def _unknown(response_id: str) -> errors.NoSuchResponse:
    shown = response_id[: errors.NAME_SHOWN]
    return errors.NoSuchResponse(
        f"no response {shown} is known here (those made in the background are kept for the policy's keepAsyncMs)"
    )


def _whole(body: bytes) -> Response:
    return Response(body, media_type=JSON)
