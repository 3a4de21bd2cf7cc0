"""`gateway key`: what it prints, and its exit codes, against an api in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from broker.policies import PolicyBook
from broker.store import Store
from tests.support.broker_world import POLICY, fake_redis, new_namespace
from tests.support.live_api import live_api
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

Command = Callable[..., Awaitable[Ran]]


@pytest_asyncio.fixture
async def run(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Command]:
    """Runs a command against a gateway on this machine that has no key yet."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    await PolicyBook(store).apply(POLICY)
    async with live_api(store) as api:
        monkeypatch.setenv("GATEWAY_URL", api.url)
        yield lambda *words: asyncio.to_thread(gateway, *words)
    await store.close()


async def test_from_no_key_to_one_that_is_gone(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await run("key", "list")).out.startswith("no keys: everybody on the gateway's own machine may call")
    (await run("key", "new", "laptop-3")).complains(1, "the first key must be an administrator's", "--admin")
    boss = await run("key", "new", "boss", "--admin")
    assert boss.code == 0 and boss.out.startswith("wl_") and boss.out.count("\n") == 1
    assert boss.err == "This is the key of boss; it is shown this once.\n"
    (await run("key", "list")).complains(1, "this gateway needs a key")
    monkeypatch.setenv("GATEWAY_KEY", "wl_another")
    (await run("key", "list")).complains(1, "not one of this gateway's (it stands in GATEWAY_KEY)")
    monkeypatch.setenv("GATEWAY_KEY", boss.out.strip())
    made = await run(
        "key", "new", "bot", "--lanes", "fast-edit, small", "--priority", "batch", "--expires", "90d", "--json"
    )
    told = json.loads(made.out)
    assert told["name"] == "bot" and told["key"].startswith(f"wl_{told['id']}_") and told["expires_at"] > 0
    listed = (await run("key", "list")).out.splitlines()
    assert [line.split()[0] for line in listed] == ["CALLER", "boss", "bot"]
    assert "ask for everything, administer" in listed[1]
    assert "ask for fast-edit, small, as batch only" in listed[2] and f"{told['id']} until 2" in listed[2]
    assert told["key"] not in (await run("key", "list", "--json")).out

    rotated = await run("key", "rotate", "bot", "--keep-old", "24h")
    assert rotated.out.startswith("wl_") and "ends" in rotated.err
    assert (await run("key", "list")).out.count(" until ") == 2
    gone = await run("key", "revoke", "bot")
    assert gone.out.startswith("bot may not call any more (")
    (await run("key", "revoke", "bots")).complains(1, "no caller is called 'bots'")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("new", "bot", "--expires", "soon"), "'soon' is no length of time"),
        (("new", "bot", "--expires", "0d"), "'0d' is no length of time"),
        (("new", "bot", "--remote-lanes", "far"), "add --remote"),
        (("new", "bot", "--max-waiting", "0"), "--max-waiting is at least 1; leave it out for no limit"),
        (("new", "bot", "--max-running", "0"), "--max-running is at least 1; leave it out for no limit"),
        (("new", "bot", "--tokens-per-day", "-1"), "--tokens-per-day is at least 1; leave it out for no limit"),
        (("rotate", "bot", "--keep-old", "a while"), "no length of time"),
    ],
)
async def test_wrong_usage_asks_nobody(gateway: Gateway, words: tuple[str, ...], complaint: str) -> None:
    gateway("key", *words).complains(2, complaint)
