"""Files for batches: sent in parts that nobody holds together, read, listed and deleted. Each is its caller's own."""

import json
import re
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response

from api import errors as told
from api.asgi import Receive, Scope, Send
from api.auth import Caller, Gate
from api.described import FORM, OCTETS, UNSEEN, Answer, Described, described, says
from api.exchange import CutConnection, Exchange, Interrupted
from api.form import Form
from api.gateway import Gateway
from api.paging import checked, ends_of
from broker import callers, errors, files
from broker.dialects.json_schema import one_of, text, whole
from broker.files import Upload
from broker.lanes import DAY_MS
from broker.records import FileRecord

router = APIRouter(tags=["batches"])

SECOND_MS = 1_000
FORM_BYTES_MAX = 64 << 10
"""What a form may hold around its file."""
KEEP_S_MIN, KEEP_S_MAX = 3_600, 30 * 86_400
LISTED_MAX = 10_000

_ID = re.compile(r"file-[0-9A-Za-z_-]{1,64}")
_SECONDS = re.compile(r"[0-9]{1,8}")
_JSON = [(b"content-type", b"application/json")]
_OCTETS = [(b"content-type", OCTETS.encode())]

_WITHIN = {"file_id": text("As it was told when the file was made.")}
_FAILS = (errors.NoSuchFile, errors.BrokerUnavailable)
_TAG = "batches"


@router.post("/v1/files", response_class=Response)
@described(
    Described(
        "Send a file", _TAG, says("It is kept.", "File"), body="NewFile", body_type=FORM,
        words="One line of the file is one request of a batch. It is read as it comes, and kept for `fileDays`.",
        fails=(
            errors.BadRequest, errors.BodyTooLarge, errors.FilesFull, errors.CallerTooMany, errors.BodiesTooMany,
            errors.ModelUnavailable, errors.BrokerUnavailable,
        ),
    )
)  # fmt: skip
async def send_file(gateway: Gate, caller: Caller) -> Response:
    """Takes a file of purpose `batch`."""
    return _Sent(gateway, caller.name)


@router.get("/v1/files")
@described(
    Described(
        "List files", _TAG, says("The caller's own, the newest first unless said.", "Files"),
        query={
            "after": text("The last id of the page before."),
            "limit": whole("How many.", least=1, most=LISTED_MAX),
            "order": one_of("asc", "desc", words="By when they were made."),
            "purpose": text("Only these."),
        },
        fails=(errors.BadRequest, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def list_files(
    gateway: Gate,
    caller: Caller,
    after: str = "",
    limit: int = LISTED_MAX,
    order: Literal["asc", "desc"] = "desc",
    purpose: str = "",
) -> dict[str, Any]:
    """Lists the caller's files."""
    limit = checked(limit, LISTED_MAX)
    found = [record for record in await files.of_caller(gateway.store, caller.name) if purpose in ("", record.purpose)]
    if order == "desc":
        found.reverse()
    if after:
        found = [record for record in found if (record.id > after if order == "asc" else record.id < after)]
    page = [shown(record) for record in found[:limit]]
    return {"object": "list", "data": page, "has_more": len(found) > limit, **ends_of(page)}


@router.get("/v1/files/{file_id}")
@described(Described("Look at a file", _TAG, says("What is known of it.", "File"), within=_WITHIN, fails=_FAILS))
async def show_file(file_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Shows a file of the caller."""
    return shown(await own_file(gateway, file_id, caller))


@router.get("/v1/files/{file_id}/content", response_class=Response)
@described(
    Described(
        "Read a file", _TAG, within=_WITHIN, fails=(errors.CallerTooMany, *_FAILS),
        answers={200: Answer("What it holds; of a batch that goes on, what there is by now.", {OCTETS: UNSEEN})},
    )
)  # fmt: skip
async def read_file(file_id: str, gateway: Gate, caller: Caller) -> Response:
    """Sends what a file holds."""
    return _Content(gateway, caller.name, await own_file(gateway, file_id, caller))


@router.delete("/v1/files/{file_id}")
@described(
    Described(
        "Delete a file", _TAG, says("It is gone.", "FileDeleted"), within=_WITHIN, fails=(errors.FileInUse, *_FAILS)
    )
)
async def delete_file(file_id: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Deletes a file of the caller that no batch needs any more."""
    record = await own_file(gateway, file_id, caller)
    await files.drop(gateway.store, record.id, caller=record.caller)
    return {"id": file_id, "object": "file", "deleted": True}


async def own_file(gateway: Gateway, file_id: str, caller: callers.Caller) -> FileRecord:
    """Reads a file; another caller's is as unknown as one that never was, but to an administrator."""
    if not _ID.fullmatch(file_id):
        raise errors.NoSuchFile(file_id[: errors.NAME_SHOWN])
    return await files.read(gateway.store, file_id, caller="" if caller.rights.admin else caller.name)


def shown(record: FileRecord) -> dict[str, Any]:
    """The file object, as OpenAI's clients read it."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at // SECOND_MS,
        "expires_at": record.expires_at // SECOND_MS,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


class _Sent(Response):
    """Reads the form while it comes; the answer is the file that it held."""

    def __init__(self, gateway: Gateway, caller: str) -> None:
        super().__init__()
        self._gateway = gateway
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, house = Exchange(scope, receive, send), self._gateway.house
        try:
            house.enter(self._caller)
            try:
                house.take(files.PART_BYTES)
                try:
                    record = await self._read(exchange)
                finally:
                    house.give_back(files.PART_BYTES)
            finally:
                house.leave(self._caller)
        except Interrupted:
            return
        except errors.BrokerError as error:
            return await exchange.refuse(told.wrong(error), unread=True)
        await exchange.answer(200, _JSON, json.dumps(shown(record), separators=(",", ":")).encode())

    async def _read(self, exchange: Exchange) -> FileRecord:
        upload = Upload(self._gateway.store, self._gateway.book.active, self._caller)
        length = exchange.header(b"content-length")
        if length.isdigit() and int(length) > upload.bytes_max + FORM_BYTES_MAX:
            raise errors.BodyTooLarge(upload.bytes_max)
        form = Form(exchange.header(b"content-type"))
        kept = False
        try:
            came = 0
            async for data in exchange.parts():
                if piece := form.feed(data):
                    await upload.write(piece)
                came += len(data)
                if came - upload.size > FORM_BYTES_MAX:  # it need not have said how much there will be
                    raise errors.BodyTooLarge(upload.bytes_max)
            keep_ms = _asked_of(form, days_max=self._gateway.book.active.policy.file_days)
            record = await upload.finish(form.filename, keep_ms=keep_ms)
            kept = True
            return record
        finally:
            if not kept:
                await upload.drop()


def _asked_of(form: Form, *, days_max: int) -> int:
    """Checks a whole form; gives for how long the file is wanted, in ms."""
    if not form.whole:
        raise errors.BadRequest("the form ends in its middle")
    if not form.has_file:
        raise errors.BadRequest("the form lacks the file", "file")
    if form.fields.get("purpose") != "batch":
        raise errors.BadRequest("purpose must be batch: files are for batches here", "purpose")
    if form.fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise errors.BadRequest("expires_after[anchor] must be created_at", "expires_after[anchor]")
    seconds = form.fields.get("expires_after[seconds]")
    if seconds is None:
        return days_max * DAY_MS
    if not _SECONDS.fullmatch(seconds) or not KEEP_S_MIN <= int(seconds) <= KEEP_S_MAX:
        words = f"expires_after[seconds] must be {KEEP_S_MIN} to {KEEP_S_MAX}"
        raise errors.BadRequest(words, "expires_after[seconds]")
    return min(int(seconds) * SECOND_MS, days_max * DAY_MS)


class _Content(Response):
    """Sends a file part by part, as fast as its client takes them."""

    def __init__(self, gateway: Gateway, caller: str, record: FileRecord) -> None:
        super().__init__()
        self._gateway = gateway
        self._caller = caller
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, record, house = Exchange(scope, receive, send), self._record, self._gateway.house
        try:
            house.enter(self._caller)
        except errors.CallerTooMany as error:
            return await exchange.refuse(told.wrong(error))
        self._gateway.exchanges.add(exchange)  # whoever takes nothing for minutes is cut off
        try:
            await exchange.start(200, [*_OCTETS, (b"content-length", str(record.bytes).encode())])
            async for part in files.parts_of(self._gateway.store, record):
                await exchange.write(part)
            await exchange.write(b"", last=True)
        except errors.BrokerError as error:
            raise CutConnection(error.code) from None
        except Interrupted:
            pass
        finally:
            self._gateway.exchanges.discard(exchange)
            house.leave(self._caller)
