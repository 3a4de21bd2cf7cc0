"""The query of our own endpoints: a filter with a slip in its name must not list everything."""

import re
from typing import Any

from fastapi import Depends, Request

from api.auth import Caller
from api.described import Described
from broker import errors
from broker.policy.sentences import meant_or_known

_any_key = re.compile(r"([a-z]+)\[.{1,64}\]").fullmatch


async def known(request: Request, _caller: Caller) -> None:
    """Raises BadRequest for a parameter that the endpoint's description does not name; `metadata[key]` there stands for
    one of any key."""
    endpoint: Any = request.scope["endpoint"]
    described: Described = endpoint.described
    for name in request.query_params:
        of_a_key = _any_key(name)
        if (f"{of_a_key[1]}[key]" if of_a_key else name) not in described.query:
            shown = name[: errors.NAME_SHOWN]
            raise errors.BadRequest(f"unknown parameter {shown!r}{meant_or_known(name, described.query)}", shown)


KNOWN = [Depends(known)]
"""The dependencies of an endpoint that takes no other parameters than those of its description."""
