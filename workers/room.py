"""Room for loads on one host: no load starts before the memory for it is there.

A load that was let in is promised its memory until it is over, so that loads may overlap: a small fallback need not
wait until the big model has loaded. What decides is read anew each time, and the promise is made in the same breath,
with no await between. Memory comes back late after an unload, so the machine is believed, not the runtime's answer.

Who waits for memory to come back is in line. The others see what will be left when it has got what it was promised:
they neither take the memory that was freed for it nor evict models that go for it already; everything else they may.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from workers.memory import SAFETY, HostMemory, Resident, evictions, fits, may_go
from workers.runtimes.base import LoadFailed, Runtime

log = logging.getLogger("warmlane.room")

ROOM_LOOK_S = 0.25
ROOM_WAIT_S = 20.0
"""How long freed memory may take to come back, at most."""

ROOM_STILL_S = 6.0
"""Memory that has not moved for this long will not come: a runtime itself polls for five seconds after an unload."""

STILL_BYTES = 16 << 20
TURN_WAIT_S = 60.0
"""How long a load waits for one of unknown size, or such a one for others, before its requests may go elsewhere."""

ROOM_TRIES = 5
"""How often one load makes room anew: who was chosen to go went back to work, or somebody else took the memory."""


class NoRoom(LoadFailed):
    """The model does not fit beside those that may not go now: no failure of its own."""


@dataclass(frozen=True)
class Look:
    """Memory at one moment, bytes: the host's, and what loads under way occupy of it already."""

    memory: HostMemory
    taken: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Claim:
    """One load's place in line, then its promise of memory."""

    name: str
    need: int = 0  # bytes; 0 = nothing is known of its size
    demanded: bool = False
    alone: bool = False  # no other load may begin beside it
    granted: bool = False
    going: dict[str, int] = field(default_factory=dict)  # models that go for it -> bytes they will leave
    expected: int = 0  # headroom once all of these is back
    room: "Room | None" = None  # None = its memory is no concern of this host
    there: bool = False  # it is in memory already
    waits: Callable[[str], None] = lambda words: None  # hears what it waits for, "" = for nothing any more

    def owed(self, look: Look) -> float:
        """What it has yet to take of its promise."""
        return max(0.0, self.need * SAFETY - look.taken.get(self.name, 0))

    def returning(self, look: Look) -> int:
        """What is on its way back for it."""
        return 0 if self.granted else min(sum(self.going.values()), max(0, self.expected - look.memory.headroom))

    def grant(self) -> None:
        """Lets the load begin."""
        self.granted, self.going = True, {}
        self.waits("")

    async def load(self, runtime: Runtime, *, timeout_s: float) -> float:
        """Loads, and once more after making all the room there is if memory ran out; gives the ms of the load, 0 = it
        was there already, which says nothing of how long a load takes."""
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            await runtime.load(timeout_s=timeout_s)
        except LoadFailed as error:
            if not error.oom or self.room is None:
                raise
            log.warning("event=out_of_memory model=%s reason=%s", self.name, error)
            await self.room.clear_for(self)
            started = clock()
            await runtime.load(timeout_s=timeout_s)
        return 0.0 if self.there else (clock() - started) * 1000


class Room:
    """Who may load now, and who must go for it."""

    def __init__(
        self,
        *,
        read: Callable[[Collection[str]], Awaitable[Look]],
        residents: Callable[[str, bool], list[Resident]],
        unload: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        """`read` looks at memory, given the loads under way; `residents` lists who occupies it, as seen by the model
        that asks and whether a request waits for that; `unload` unloads one for another, False = it is at work again.
        """
        self._read = read
        self._residents = residents
        self._unload = unload
        self._claims: dict[str, Claim] = {}  # in line, the first first
        self._ended = asyncio.Event()  # replaced each time that a claim ends

    @property
    def loading(self) -> list[str]:
        """The loads under way, and those that wait for memory."""
        return list(self._claims)

    @asynccontextmanager
    async def hold(
        self, name: str, need: int, *, demanded: bool, waits: Callable[[str], None] = lambda words: None
    ) -> AsyncIterator[Claim]:
        """Makes room for a load and keeps it until the load is over; raises NoRoom. `demanded` = a request waits;
        `waits` hears for what the load has to wait, "" when it may begin.

        A load of unknown size (`need` 0) goes on alone: it waits until no other load is under way, and the others wait
        for it. Idle models stay: only if memory runs out they go.
        """
        claim = Claim(name, need, demanded, alone=not need, room=self, waits=waits)
        try:
            await self._let_in(claim)
            yield claim
        finally:
            if self._claims.pop(name, None) is not None:
                self._ended.set()
                self._ended = asyncio.Event()

    async def look(self) -> Look:
        """Reads memory; anew if a load ended meanwhile, whose memory would be counted neither as used nor as owed."""
        while True:
            ended = self._ended
            look = await self._read(self.loading)
            if ended is self._ended:
                return look

    async def lacks(self, name: str, need: int, *, demanded: bool) -> str:
        """Says why a load would not be let in now, "" = it would, or would have to wait for others first."""
        claim, look = Claim(name, need, demanded, alone=not need), await self.look()
        if claim.alone or self._must_wait(claim):
            return ""
        found = evictions(need, self._left(look, claim), self._able(claim))
        return self._words(claim, look) if found is None else ""

    def left(self, look: Look) -> float:
        """What will be left, in bytes, when every load in line has got what it was promised."""
        return self._left(look, Claim(""))

    async def clear_for(self, claim: Claim) -> None:
        """Unloads every model that may go, for a load that ran out of memory, and waits until no more comes back.

        It needs more than was predicted, nobody knows how much: what went may not come back before it is over.
        """
        claim.alone = True
        claim.waits("ran out of memory, and waits for that of the others")
        for resident in may_go(self._able(claim)):
            claim.going[resident.name] = resident.footprint
            await self._unload(resident.name, claim.name)
        if not await self._is_back(claim, settle=True):
            raise NoRoom(self._words(claim, await self.look()))

    async def _let_in(self, claim: Claim) -> None:
        for _ in range(ROOM_TRIES):
            await self._turn(claim)
            if claim.alone:
                self._claims[claim.name] = claim
                claim.grant()
                return
            look = await self.look()
            if self._must_wait(claim):
                continue  # a load of unknown size has begun meanwhile
            able = self._able(claim)
            going = evictions(claim.need, self._left(look, claim), able)
            if going is None:
                raise NoRoom(self._words(claim, look))
            self._claims[claim.name] = claim
            claim.going = {r.name: r.footprint for r in able if r.name in going}
            claim.expected = look.memory.headroom + sum(claim.going.values())
            if not going and self._is_there(claim, look):
                claim.grant()
                return
            claim.waits(f"waits for the memory of {', '.join(going)}" if going else "waits for memory to come back")
            gone = [await self._unload(name, claim.name) for name in going]
            if all(gone) and await self._is_back(claim):
                return
            claim.going = {}
        raise NoRoom(f"{self._words(claim, await self.look())}, and what was freed did not come back")

    async def _turn(self, claim: Claim) -> None:
        """Waits while a load of unknown size is under way, or, for such a load, any; TURN_WAIT_S at most."""
        try:
            async with asyncio.timeout(TURN_WAIT_S):
                while others := self._must_wait(claim):
                    unknown = "it needs beside it" if claim.alone else "that needs"
                    claim.waits(f"waits for {', '.join(others)} to load: nobody knows how much memory {unknown}")
                    await self._ended.wait()
        except TimeoutError:
            others = self._must_wait(claim)
            words = f"{claim.name} waits for the load of {', '.join(others)}"
            raise NoRoom(f"{words}: nobody knows what both will need") from None

    def _must_wait(self, claim: Claim) -> list[str]:
        """For whose loads it must wait before it may ask for memory."""
        others = [c for c in self._claims.values() if c is not claim]
        return [c.name for c in others if claim.alone or c.alone]

    async def _is_back(self, claim: Claim, *, settle: bool = False) -> bool:
        """Waits until two looks in a row show room (a single one may catch a moment), or no more comes back; then the
        claim is granted. With `settle`, waits in any case until memory has stood still."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + ROOM_WAIT_S
        stood_at, stood_since, seen = -STILL_BYTES, loop.time(), 0
        while True:
            look = await self.look()
            now, there = loop.time(), self._is_there(claim, look)
            if abs(look.memory.headroom - stood_at) > STILL_BYTES:
                stood_at, stood_since = look.memory.headroom, now
            still = now - stood_since >= ROOM_STILL_S or now >= give_up_at
            seen = seen + 1 if there else 0
            if seen >= 2 and (still or not settle):
                claim.grant()
                return True
            if still and not there:
                log.warning(
                    "event=memory_not_back model=%s need_mb=%d headroom_mb=%d",
                    claim.name, claim.need >> 20, look.memory.headroom >> 20,
                )  # fmt: skip
                return False
            await asyncio.sleep(ROOM_LOOK_S)

    def _is_there(self, claim: Claim, look: Look) -> bool:
        """Whether the memory is there now: beside what loads under way have yet to take, and not out of what came back
        for somebody further ahead in line."""
        under_way = sum(c.owed(look) for c in self._claims.values() if c.granted and c is not claim)
        now = look.memory.headroom - under_way
        return fits(claim.need, now) and fits(claim.need, self._left(look, claim))

    def _left(self, look: Look, claim: Claim) -> float:
        """What will be left when all who are ahead in line have got what they were promised."""
        left: float = look.memory.headroom
        in_line = list(self._claims.values())
        ahead = in_line[: in_line.index(claim)] if claim in in_line else in_line
        for other in in_line:
            if other is not claim and (other.granted or other in ahead):
                left += other.returning(look) - other.owed(look)
        return left

    def _able(self, claim: Claim) -> list[Resident]:
        """Who occupies memory and does not go for somebody else already."""
        going = {name for c in self._claims.values() if c is not claim for name in c.going}
        return [r for r in self._residents(claim.name, claim.demanded) if r.name not in going]

    def _words(self, claim: Claim, look: Look) -> str:
        free = max(0, int(self._left(look, claim)))
        words = f"{claim.name} needs {claim.need >> 20} MB and {free >> 20} MB are free"
        return f"{words}; no idle model that is wanted less can make room"
