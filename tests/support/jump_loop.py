"""An event loop whose clock jumps: nothing sleeps, hours pass in milliseconds, and every run is the same."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Jump(selectors.DefaultSelector):
    """Never waits: where the loop would sleep until its next timer, the time is there at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing is due and nothing can come: everybody waits for somebody"
            self.now += timeout
        return ready


async def passes(seconds: float) -> None:
    """Lets virtual time pass; no real time does, so this is no wait for luck."""
    loop = asyncio.get_running_loop()
    assert isinstance(getattr(loop, "_selector", None), _Jump), "this loop's time is real"
    await asyncio.sleep(seconds)


def run_in_virtual_time(main: Coroutine[Any, Any, Result], *, at_most_s: float = 1e9) -> Result:
    """Runs `main` on a loop of its own; fails when it takes more than so many virtual seconds."""
    jump = _Jump()
    loop = asyncio.SelectorEventLoop(jump)
    loop.time = lambda: jump.now  # type: ignore[method-assign]
    loop._clock_resolution = 1e-6  # type: ignore[attr-defined]
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(asyncio.wait_for(main, at_most_s))
    finally:
        loop.close()
