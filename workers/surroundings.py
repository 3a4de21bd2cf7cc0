"""What a waker must know beyond its own model: the other models of this host, the other hosts, Redis' clock."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from broker.records import Learned, ModelFacts
from workers.room import Claim


@dataclass
class Surroundings:
    """Asked anew at each step; the first argument is always the model's name."""

    now_ms: Callable[[], Awaitable[int]]
    facts: Callable[[str], ModelFacts]
    look: Callable[[], Awaitable[object]]  # makes the facts and the picture of other hosts fresh
    warm_elsewhere: Callable[[str], bool]
    waited_for: Callable[[str], bool]  # whether jobs wait for the model now
    drained: Callable[[], bool]  # whether an operator has set this host aside
    room_for: Callable[[str, bool], AbstractAsyncContextManager[Claim]]  # raises NoRoom; True = a request waits for it
    lacks_room: Callable[[str, bool], Awaitable[str]]  # why there is none, "" = there is; claims nothing
    occupied: Callable[[str], Awaitable[int]]  # bytes of this host's memory that the model holds, 0 = nobody can tell
    loaded: Callable[[str, float, int], Awaitable[None]]  # learns from a load: ms, bytes
    learned: Callable[[str], Learned]  # what loads on this host have shown
    given_room: Callable[[str], bool]  # whether a model claims no more, to make room for it
    held_up: Callable[[str], tuple[str, int]]  # whose memory it must wait for ("" = nobody's), until when at least
    learn: Callable[..., Awaitable[None]]
    count: Callable[..., Awaitable[None]]  # adds to what is counted of its wakes
    tell: Callable[[], Awaitable[None]]  # a heartbeat now
    changed: Callable[[], None]
    outdone: Callable[[str], bool] = lambda _model: False  # whether another host has become warm after this one
