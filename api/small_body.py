"""Bodies of endpoints that ask for little: read up to a small size, and only once it is known who asks."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from broker import errors

SMALL_BYTES_MAX = 64 << 10

_Asked = TypeVar("_Asked", bound=BaseModel)


async def small_body(request: Request) -> bytes:
    """Reads it; raises BodyTooLarge as soon as it is."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > SMALL_BYTES_MAX:
            raise errors.BodyTooLarge(SMALL_BYTES_MAX)
    return body


async def read_as(kind: type[_Asked], request: Request, *, default: _Asked | None = None) -> _Asked:
    """Reads it as the JSON of a model, or gives the default where there is no body; raises BodyTooLarge, and BadRequest
    with the first thing that is wrong."""
    body = await small_body(request)
    if not body and default is not None:
        return default
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise errors.BadRequest(str(first["msg"]), str(first["loc"][-1]) if first["loc"] else None) from None
