"""Reads a request as its own route would, and says which lanes it may use; nobody sends it anywhere.

Apart from `cli_explain`, because `visit` brings half of the api with it, and other commands need none of that.
"""

from collections.abc import Iterable

from api.visit import Wishes
from broker import errors, requests
from broker.callers import Caller
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.store import Store
from broker.trust.explain import Explained, explain


class Headers:
    """The headers of a request that nobody sent."""

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        self.headers = {name.lower().encode(): value.encode() for name, value in lines}

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")


async def dry_run(
    store: Store, book: PolicyBook, *, endpoint: str, body: bytes, headers: Iterable[tuple[str, str]], caller: Caller
) -> Explained:
    """Says it under the active policy; raises Refused with what the route itself would refuse."""
    await book.reload()
    active, fleet = book.active, Fleet(store, book)
    await fleet.look()
    wishes, asked = Wishes.of(Headers(headers)), requests.ENDPOINTS[endpoint].read(body)
    if asked.nothing is not None:
        raise errors.BadRequest("the gateway answers this request itself: it enters no lane")
    job = requests.job_of(endpoint, asked, active, caller, lane=wishes.lane, session=wishes.session, leave=wishes.leave)
    return await explain(active, fleet, job, body, may_leave=caller.rights.remote)
