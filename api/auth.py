"""Whose request it is and what it may, for the endpoints that FastAPI serves."""

from collections.abc import AsyncIterator, Iterable
from typing import Annotated

from fastapi import Depends, Request

from api.gateway import Gateway
from broker import callers, errors


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


async def counted(gateway: Gate, caller: Caller) -> AsyncIterator[callers.Caller]:
    """The same, where answering takes more than a moment: the request counts among those that its caller has under way.
    Raises CallerTooMany."""
    gateway.house.enter(caller.name)
    try:
        yield caller
    finally:
        gateway.house.leave(caller.name)


CountedCaller = Annotated[callers.Caller, Depends(counted)]


def whose(me: callers.Caller, asked: str, what: str) -> str:
    """Whose `what` somebody is shown, "" = everybody's: an administrator sees that, anybody else its own. Raises
    AdminOnly."""
    if me.rights.admin:
        return asked
    if asked not in ("", me.name):
        raise errors.AdminOnly(f"the key of {me.name} sees the {what} of {me.name} only")
    return me.name


def admin_of(caller: Caller) -> callers.Caller:
    """The same, where only an administrator may; raises AdminOnly."""
    if not caller.rights.admin:
        raise errors.AdminOnly(f"the key of {caller.name} has no administrator's rights")
    return caller


Admin = Annotated[callers.Caller, Depends(admin_of)]
