"""Ctrl-C and SIGTERM, heard as events."""

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

INTERRUPT_DRAIN_S = 5.0
"""What the worker's running jobs get after Ctrl-C; a second Ctrl-C ends them at once."""
TERMINATE_DRAIN_S = 35.0
"""What they get after SIGTERM: the default drain timeout of a policy and a little more."""

_T = TypeVar("_T")


class StopRequests:
    """Ctrl-C and SIGTERM, as events: the first asks for an orderly end, a Ctrl-C after it for an end at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        self.drain_s = TERMINATE_DRAIN_S

    def hear(self, number: int) -> None:
        if number == signal.SIGINT:
            if self.asked.is_set():
                self.hurry.set()
            self.drain_s = INTERRUPT_DRAIN_S
        self.asked.set()

    async def unless(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does the work; raises Stopped where somebody asks us to stop first."""
        doing = asyncio.create_task(work, name="starting")
        asked = asyncio.create_task(self.asked.wait(), name="stop request")
        try:
            await asyncio.wait((doing, asked), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise Stopped
        finally:
            doing.cancel()
            asked.cancel()
            await asyncio.wait((doing, asked))


class Stopped(Exception):
    """Somebody asked us to stop before everything ran."""


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    loop = asyncio.get_running_loop()
    requests = StopRequests()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, requests.hear, number)
    try:
        yield requests
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
