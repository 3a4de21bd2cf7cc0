"""How far a load is, by the runtime's own figures."""

import asyncio

import pytest

from tests.support.waiting import until
from workers import progress


class Loading:
    """A runtime that tells these figures in turn, then breaks."""

    kind = "pretended"

    def __init__(self, *told: float | None) -> None:
        self._told = list(told)

    async def progress(self) -> float | None:
        if not self._told:
            raise ValueError("it answers what nobody foresaw")
        return self._told.pop(0)


async def test_figures_are_noted_and_a_broken_one_ends_no_load() -> None:
    """A runtime that says nothing leaves the last figure; one that says nonsense stays between nothing and whole."""
    noted: list[float] = []
    runtime = Loading(0.1, None, 1.7, -3.0)
    await asyncio.wait_for(progress.follow(runtime, noted.append, every_s=0), 10)  # type: ignore[arg-type]
    assert noted == [0.1, 1.0, 0.0]


async def test_it_goes_on_until_it_is_cancelled() -> None:
    noted: list[float] = []
    runtime = Loading(*[0.5] * 100_000)
    task = asyncio.create_task(progress.follow(runtime, noted.append, every_s=0))  # type: ignore[arg-type]
    await until(lambda: len(noted) > 2, what="figures")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
