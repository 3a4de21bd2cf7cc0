"""GET /openapi.json: this very api, described for programs that make clients and tests of it."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from api.auth import Gate
from api.described import JSON, Answer, Described, described
from api.openapi import PATH, Document
from broker.dialects.json_schema import thing

router = APIRouter(tags=["health"])


@router.api_route(PATH, methods=["GET", "HEAD"])
@described(Described("Describe the api", "health", {200: Answer("OpenAPI 3.1.", {JSON: thing({})})}, keyless=True))
async def openapi(request: Request, gateway: Gate) -> Response:
    """Gives the document; it says nothing that a caller could not find out, so it needs no key."""
    document: Document = request.app.state.document
    return Response(await asyncio.to_thread(document.read, with_keys=bool(gateway.keys)), media_type=JSON)
