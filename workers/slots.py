"""The slots of one model on one host: who uses one, and which are still settling.

A slot whose answer was closed early is *settling* until the runtime itself says that it is idle: a runtime may take
seconds to notice a closed connection, and a job claimed for that slot would wait inside the runtime, unseen. Past the
limit the slot counts as lost: still not claimable, until the runtime says idle or is restarted.
"""

import math
from dataclasses import dataclass, field

ON_ITS_WAY_S = 0.5
"""How long a claim and its request may take to reach the runtime."""


@dataclass
class Slots:
    """Counts; `total` is the policy's maxConcurrent."""

    total: int
    using: set[str] = field(default_factory=set)  # who is in flight, claims under way included
    _since: dict[str, float] = field(default_factory=dict)  # loop time at which each took its slot
    settling: list[float] = field(default_factory=list)  # loop times at which answers were closed early

    @property
    def free(self) -> int:
        """Slots that a job may be claimed for now."""
        return max(0, self.total - len(self.using) - len(self.settling))

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing settles."""
        return not self.using and not self.settling

    def take(self, user: str, *, now_s: float = 0.0) -> None:
        """Gives a slot away; a job that comes back while its last attempt still ends is another user."""
        self.using.add(user)
        self._since[user] = now_s

    def give_back(self, user: str, *, clean: bool, now_s: float) -> None:
        """Takes the slot back; not clean = the runtime may still be at it."""
        self.using.discard(user)
        self._since.pop(user, None)
        if not clean:
            self.settling.append(now_s)

    def settled(self, busy: int, *, asked_s: float = math.inf) -> bool:
        """Notes that the runtime itself says how many generations run; True if a slot became free by that.

        Who took a slot just before the question may not have reached the runtime yet: what is busy may not be theirs.
        """
        before = len(self.settling)
        there = sum(since < asked_s - ON_ITS_WAY_S for since in self._since.values())
        self.settling = self.settling[: max(0, min(before, busy - there))]
        return len(self.settling) < before

    def expire(self, before_s: float) -> bool:
        """Gives up on slots that settle since before an instant, where the runtime cannot tell; True if there were."""
        left = [since for since in self.settling if since > before_s]
        gone, self.settling = len(self.settling) - len(left), left
        return gone > 0

    def wedged(self, before_s: float) -> bool:
        """Whether every slot has been settling since before an instant: the runtime is stuck, and no probe can tell."""
        return len(self.settling) >= self.total and all(since <= before_s for since in self.settling)

    def restarted(self) -> None:
        """Notes that the runtime is a new one: nothing settles any more."""
        self.settling.clear()
