"""What every test can count on: a real server to ask for, and no task left behind."""

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Iterator

import hypothesis
import pytest
import pytest_asyncio

from broker.trust import secrets
from tests.support.redis_server import RedisServer, start_server

# Shrinking one failure of the model test has taken minutes: CI reports the failure as found, a developer shrinks it.
hypothesis.settings.register_profile(
    "ci",
    phases=[phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)],
    deadline=None,
    print_blob=True,
)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

DROPPED_WAIT_S = 1.0


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real server for the whole run; whoever uses it takes a namespace of its own, or flushes."""
    server = start_server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server of the module's own: its settings are changed, its connections are cut, it is restarted or killed."""
    server = start_server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def scanner() -> None:
    """Has the scanner for secrets compile its rules before a test counts seconds."""
    secrets.prepare()


@pytest.fixture(autouse=True)
def no_leaked_tasks(request: pytest.FixtureRequest) -> None:
    """Fails a test whose code leaves an asyncio task running."""
    function = getattr(request, "function", None)
    # An ordinary test has no loop, and shouldn't get one for this.
    if inspect.iscoroutinefunction(inspect.unwrap(function) if function else None):
        request.getfixturevalue("_tasks_end_with_the_test")


@pytest_asyncio.fixture
async def _tasks_end_with_the_test() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
    if dropped := {task for task in left if type(task.get_coro()).__name__ == "async_generator_athrow"}:
        # The loop closes a generator that was dropped half-way in a task of its own, which is nobody's leak.
        await asyncio.wait(dropped, timeout=DROPPED_WAIT_S)
    left = {task for task in left if not task.done()}
    for task in left:
        task.cancel()
    assert not left, f"still running: {[task.get_name() for task in left]}"
