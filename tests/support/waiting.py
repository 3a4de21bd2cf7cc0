"""Waits for something that nobody announces, such as another process getting ready; never longer than it is told."""

import asyncio
import time
from collections.abc import Callable

POLL_S = 0.02


async def until(seen: Callable[[], object], *, what: str, timeout_s: float = 10.0) -> None:
    """Returns once `seen()` is true, and fails with `what` if it never is."""
    end = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


def block_until(seen: Callable[[], object], *, what: str, timeout_s: float = 10.0) -> None:
    """The same for code without an event loop."""
    end = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
