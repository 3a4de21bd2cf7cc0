"""Whose request it is, for the endpoints that FastAPI serves."""

from typing import Annotated

from fastapi import Depends, Request

from api.gateway import Gateway


def gateway_of(request: Request) -> Gateway:
    """The process's parts, as an endpoint asks for them."""
    gateway: Gateway = request.app.state.gateway
    return gateway


Gate = Annotated[Gateway, Depends(gateway_of)]


def caller_of(request: Request, gateway: Gate) -> str:
    """The caller by the key that the request carries; raises Unauthorized."""
    headers = request.headers
    return gateway.keys.caller_of(headers.get("authorization"), headers.get("x-api-key"))


Caller = Annotated[str, Depends(caller_of)]
