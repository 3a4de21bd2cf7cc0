"""What tests of several commands stand before."""

from collections.abc import AsyncIterator

import pytest_asyncio

from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import Scene, live_scene


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    """A gateway with a scripted worker, before a Redis in memory."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    async with live_scene(store) as found:
        yield found
    await store.close()
