"""Whose request it is and what it may, for the endpoints that FastAPI serves."""

from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends, Request

from api.gateway import Gateway
from broker import callers, errors
from broker.policy import Lane


def gateway_of(request: Request) -> Gateway:
    """The process's parts, as an endpoint asks for them."""
    gateway: Gateway = request.app.state.gateway
    return gateway


_CARRY_KEYS = frozenset({b"authorization", b"x-api-key"})

Gate = Annotated[Gateway, Depends(gateway_of)]


def who_calls(gateway: Gateway, headers: Iterable[tuple[bytes, bytes]]) -> callers.Caller:
    """The caller by the key that the headers carry; raises Unauthorized.

    A header that comes twice is no key: whoever stands before us may have looked at the other one.
    """
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _CARRY_KEYS:
            if name in found:
                raise errors.Unauthorized(callers.NOT_OURS)
            found[name] = value.decode("latin-1").strip()
    return gateway.keys.caller_of(found.get(b"authorization"), found.get(b"x-api-key"))


def caller_of(request: Request, gateway: Gate) -> callers.Caller:
    """The caller by the key that the request carries; raises Unauthorized."""
    return who_calls(gateway, request.scope["headers"])


Caller = Annotated[callers.Caller, Depends(caller_of)]


def lane_of(gateway: Gateway, caller: callers.Caller, name: str, *, endpoint: str, prompt_tokens: int = 0) -> Lane:
    """The lane that a name leads this caller to; raises UnknownModel, and LaneForbidden where its key opens no such."""
    policy = gateway.book.active.policy
    try:
        lane = policy.route(name, caller=caller.name, endpoint=endpoint, prompt_tokens=prompt_tokens)
    except (errors.UnknownModel, errors.UnknownLane) as unknown:
        near = [other for other in unknown.suggestions if caller.rights.may_ask_for(other)]
        raise type(unknown)(unknown.asked, near) from None
    if not caller.rights.may_ask_for(name, lane.name):
        opens = ", ".join(caller.rights.lanes)
        raise errors.LaneForbidden(f"the key of {caller.name} is for {opens}, not for {name[: errors.NAME_SHOWN]!r}")
    return lane


def admin_of(caller: Caller) -> callers.Caller:
    """The same, where only an administrator may; raises AdminOnly."""
    if not caller.rights.admin:
        raise errors.AdminOnly(f"the key of {caller.name} has no administrator's rights")
    return caller


Admin = Annotated[callers.Caller, Depends(admin_of)]
