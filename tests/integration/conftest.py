"""Broker tests run on both servers: fakeredis, and a real one in a namespace of its own."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.broker_world import World, fake_world, real_world


@pytest_asyncio.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world with the test policy applied and no host alive yet."""
    opened = fake_world() if request.param == "fake" else real_world(request.getfixturevalue("redis_server").url)
    async with opened as world:
        await world.apply()
        yield world
