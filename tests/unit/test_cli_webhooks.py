"""`gateway webhook`: what it prints, and its exit codes, against an api in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from api.cli_webhooks import _last
from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import POLICY, fake_redis, new_namespace
from tests.support.live_api import live_api
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

Command = Callable[..., Awaitable[Ran]]


@pytest_asyncio.fixture
async def store() -> AsyncIterator[Store]:
    store = Store.fake(fake_redis(), namespace=new_namespace())
    yield store
    await store.close()


@pytest_asyncio.fixture
async def run(store: Store, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Command]:
    """Runs a command against a gateway on this machine without keys."""
    await PolicyBook(store).apply(POLICY)
    async with live_api(store) as api:
        monkeypatch.setenv("GATEWAY_URL", api.url)
        yield lambda *words: asyncio.to_thread(gateway, *words)


async def test_secrets_by_hand(run: Command) -> None:
    assert (await run("webhook", "secret", "list")).out == "no secret: `gateway webhook secret new` makes one\n"
    (await run("webhook", "secret", "rotate")).complains(1, "`gateway webhook secret new` makes one")
    made = await run("webhook", "secret", "new")
    assert made.code == 0 and made.out.startswith("whsec_") and made.out.count("\n") == 1
    assert made.err == "Webhooks of anonymous are signed with it; it is shown this once.\n"
    (await run("webhook", "secret", "new")).complains(1, "`gateway webhook secret rotate` makes another")
    other = json.loads((await run("webhook", "secret", "rotate", "--overlap", "12h", "--json")).out)
    listed = (await run("webhook", "secret", "list")).out.splitlines()
    assert listed[0].startswith(other["id"]) and "signs until" not in listed[0] and "signs until 2" in listed[1]
    assert len(json.loads((await run("webhook", "secret", "list", "--json")).out)["data"]) == 2
    assert (await run("webhook", "secret", "rotate", "--overlap", "0")).code == 0
    (only,) = (await run("webhook", "secret", "list")).out.splitlines()
    gone = await run("webhook", "secret", "revoke", only.split()[0])
    assert gone.out == f"{only.split()[0]} signs no more\n"
    (await run("webhook", "secret", "revoke", only.split()[0])).complains(1, "anonymous has no webhook secret")


async def test_deliveries_by_hand(run: Command, store: Store) -> None:
    assert (await run("webhook", "list")).out == "no job with a webhook has ended\n"
    (await run("webhook", "redeliver", "msg_1")).complains(1, "no webhook delivery msg_1")
    told = '{"at": 1790000000000, "status": 500, "ms": 12, "error": "it answered 500"}'
    fields = {"id": "msg_1", "job": "j", "caller": "anonymous", "url": "https://a.example/", "type": "job.done",
              "state": "dead", "attempt": "1", "at": "1790000000000", "history": told}  # fmt: skip
    await store.command("HSET", store.keys.webhook("msg_1"), *(x for pair in fields.items() for x in pair))
    await store.command("ZADD", store.keys.webhook_list("*"), 1, "msg_1")
    listed = (await run("webhook", "list")).out.splitlines()
    assert [line.split()[0] for line in listed] == ["DELIVERY", "msg_1"]
    assert listed[1].split() == "msg_1 job.done dead 2026-09-21 14:13 UTC, it answered 500, 12 ms".split()
    assert json.loads((await run("webhook", "list", "--json")).out)["data"][0]["state"] == "dead"
    assert (await run("webhook", "redeliver", "msg_1")).out == "msg_1 is on its way\n"
    assert json.loads((await run("webhook", "redeliver", "msg_1", "--json")).out)["state"] == "pending"


def test_a_delivery_says_how_it_goes() -> None:
    pending = {"attempts": [], "next_at": 0}
    assert _last(pending) == "none yet"
    tried = {"attempts": [{"at": 0, "status": 0, "ms": 3, "error": "no answer"}], "next_at": 60_000}
    assert _last(tried | {"left_alone_until": 0}) == "1970-01-01 00:00 UTC, no answer, 3 ms, again 1970-01-01 00:01 UTC"
    assert _last(tried | {"left_alone_until": 180_000}) == (
        "1970-01-01 00:00 UTC, no answer, 3 ms, again 1970-01-01 00:03 UTC (its endpoint is left alone until then)"
    )
    over = _last(tried | {"next_at": 180_000, "left_alone_until": 60_000})
    assert over == "1970-01-01 00:00 UTC, no answer, 3 ms, again 1970-01-01 00:03 UTC"


async def test_wrong_usage_asks_nobody(gateway: Gateway) -> None:
    gateway("webhook", "secret", "rotate", "--overlap", "soon").complains(2, "'soon' is no length of time")
    gateway("webhook", "secret", "rotate", "--overlap", "100d").complains(2, "--overlap may be 30d at most")
