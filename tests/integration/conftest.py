"""Broker and api tests run on both servers: fakeredis, and a real one in a namespace of its own.

The api's ask nothing of the scripts that the broker's do not: on fakeredis they are in the long form only.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from api import stream as stream_module
from api.routes import chat as chat_module
from broker.store import Store
from tests.support.broker_world import World, fake_redis, fake_world, new_namespace, real_world
from tests.support.live_api import Scene, live_scene

REAL = pytest.param("real", marks=pytest.mark.real)
BOTH_SERVERS = ["fake", REAL]


@pytest.fixture(scope="session", autouse=True)
def _scanner_is_ready(scanner: None) -> None:
    """A request that may leave waits for the scanner, and a test for the request."""


@pytest_asyncio.fixture(params=BOTH_SERVERS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world with the test policy applied and no host alive yet."""
    opened = fake_world() if request.param == "fake" else real_world(request.getfixturevalue("redis_server").url)
    async with opened as world:
        await world.apply()
        yield world


@pytest_asyncio.fixture(params=[pytest.param("fake", marks=pytest.mark.long), REAL])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """What an api process opens."""
    if request.param == "fake":
        opened = Store.fake(fake_redis(), namespace=new_namespace())
    else:
        url = request.getfixturevalue("redis_server").url
        opened = await Store.open(url, namespace=new_namespace(), name="test-api")
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def fake_store() -> AsyncIterator[Store]:
    """The same on fakeredis alone, for what happens before anybody asks Redis."""
    opened = Store.fake(fake_redis(), namespace=new_namespace())
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def scene(store: Store) -> AsyncIterator[Scene]:
    """A live api and a worker that does what the test says; everything warm, nothing asked for yet."""
    async with live_scene(store) as scene:
        yield scene


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and holds that a test can wait for."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.15)
    monkeypatch.setattr(chat_module, "WHOLE_HOLD_S", 0.3)
