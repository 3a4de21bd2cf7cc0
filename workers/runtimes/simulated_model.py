"""The pretended model inside the simulated server: its slots, prompt cache, words and faults. No network."""

import asyncio
import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from itertools import takewhile
from typing import NoReturn

CHARS_PER_TOKEN = 4
DIED = 1


class SilentEnd(Exception):
    """The stream stops cleanly and without a finish, as some runtimes do."""


class ErrorInStream(Exception):
    """The stream carries an error and stops."""


@dataclass
class Faults:
    """How generations break; None, False or 0 = not at all. `times` counts the generations that still break."""

    never_first_token: bool = False
    ready_but_mute: bool = False
    oom: bool = False
    die_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    silent_end_after_tokens: int | None = None
    error_in_stream: int | None = None
    error_status: int | None = None
    first_token_delay_ms: float = 0.0
    echo: bool = False  # a continued answer begins with what it continues, as some versions of llama-server do
    times: int | None = None

    def change(self, wanted: object) -> None:
        """Takes over the named faults; raises ValueError with a sentence and changes nothing if one is wrong."""
        if not isinstance(wanted, dict):
            raise ValueError("faults are an object: {name: value}")
        none = Faults()
        values: dict[str, object] = {}
        for name, value in wanted.items():
            if name in ("load_fails", "cold_start_ms"):
                raise ValueError(f"{name} acts while the server starts: give it as a flag")
            if not hasattr(none, name):
                raise ValueError(f"there is no fault '{name}'; there are {', '.join(dataclasses.asdict(none))}")
            if not isinstance(value, bool | int | float | None):
                raise ValueError(f"the value of '{name}' is a number, true, false or null")
            off = getattr(none, name)
            values[name] = off if value is None or value is False else 1 if value is True and off is None else value
        for name, value in values.items():
            setattr(self, name, value)

    def take(self) -> "Faults":
        """Gives the faults for one generation and counts it."""
        taken = dataclasses.replace(self)
        if self.times is not None:
            self.times -= 1
            if self.times <= 0:
                self.change(dataclasses.asdict(Faults()))
        return taken

    async def strike(self, tokens: int) -> None:
        """Lets the fault happen whose token count is reached."""
        if self.die_after_tokens == tokens:
            die(f"simulated fault: died after {tokens} tokens")
        if self.stall_after_tokens == tokens:
            await for_ever()
        if self.silent_end_after_tokens == tokens:
            raise SilentEnd
        if self.error_in_stream == tokens:
            raise ErrorInStream


@dataclass
class Slot:
    """A place for one generation, with the prompt that it still has in its cache."""

    number: int
    cached: str = ""
    busy: bool = False
    used: int = 0


class Slots:
    """Hands out slots, longest cached prefix first; whoever finds none waits in line and is served in turn."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(number) for number in range(count)]
        self.max_waiting = 0
        self._line: deque[tuple[int | None, asyncio.Future[Slot]]] = deque()
        self._turn = 0

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def busy(self) -> int:
        return sum(slot.busy for slot in self.slots)

    async def acquire(self, prompt: str, wanted: int | None) -> Slot:
        free = [slot for slot in self.slots if not slot.busy and wanted in (None, slot.number)]
        if free:
            slot = max(free, key=lambda s: (_common_prefix(s.cached, prompt), -s.used))
        else:
            slot = await self._wait(wanted)
        self._turn += 1
        slot.busy, slot.used = True, self._turn
        return slot

    def release(self, slot: Slot) -> None:
        """Gives the slot to the first in line who may have it; it is not free for newcomers in between."""
        for entry in self._line:
            wanted, place = entry
            if wanted in (None, slot.number) and not place.done():
                self._line.remove(entry)
                place.set_result(slot)
                return
        slot.busy = False

    async def _wait(self, wanted: int | None) -> Slot:
        place: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        entry = wanted, place
        self._line.append(entry)
        self.max_waiting = max(self.max_waiting, len(self._line))
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result())  # It was handed to one who has just hung up.
            else:
                self._line.remove(entry)
            raise


@dataclass
class Generation:
    """One request on its way: what it asked for and how far it is."""

    number: int
    model: str
    prompt: str
    limit: int
    finish_reason: str
    stream: bool
    include_usage: bool
    cache_prompt: bool
    slot: int | None
    begun: str = ""  # how the answer begins that is to be gone on with
    of_text: bool = False  # it goes on with a text, and answers no chat
    step: str = "waiting"
    tokens: int = 0
    cached_tokens: int = 0
    prompt_ms: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // CHARS_PER_TOKEN + 1

    async def pieces(
        self, slot: Slot, faults: Faults, *, prefill_tps: float, decode_tps: float
    ) -> AsyncGenerator[str, None]:
        """Makes the words of the answer at the pretended speeds (0 = at once), and breaks where a fault says so."""
        await self._prefill(slot, faults, prefill_tps)
        self.step = "decoding"
        began, per_token_s = time.perf_counter(), 1 / decode_tps if decode_tps else 0.0
        told = len(self.begun.split())
        if faults.echo and self.begun:
            yield self.begun
        while self.tokens < self.limit:
            await faults.strike(self.tokens)
            # Against the clock and not after each other, so that a late timer does not slow the whole answer down.
            await asyncio.sleep(max(0.0, began + self.tokens * per_token_s - time.perf_counter()))
            piece = f" {told + self.tokens}" if told + self.tokens else "simulated"
            self.tokens += 1
            slot.cached += piece
            yield piece
        await faults.strike(self.tokens)

    async def _prefill(self, slot: Slot, faults: Faults, tps: float) -> None:
        self.step = "prefill"
        cached = _common_prefix(slot.cached, self.prompt) // CHARS_PER_TOKEN if self.cache_prompt else 0
        self.cached_tokens = min(cached, self.prompt_tokens - 1)  # The last prompt token is always evaluated.
        slot.cached = self.prompt
        if tps:
            self.prompt_ms = 1000 * (self.prompt_tokens - self.cached_tokens) / tps
        await asyncio.sleep((self.prompt_ms + faults.first_token_delay_ms) / 1000)
        if faults.never_first_token:
            await for_ever()


async def for_ever() -> None:
    """Waits until the client gives up."""
    await asyncio.get_running_loop().create_future()


def die(last_words: str) -> NoReturn:
    """Ends the process as a crash does: at once, in the middle of everything."""
    print(last_words, file=sys.stderr, flush=True)
    os._exit(DIED)


def _common_prefix(left: str, right: str) -> int:
    if left == right[: len(left)]:  # The usual case in a long conversation, and much faster than counting.
        return len(left)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
