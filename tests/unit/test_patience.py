"""How long a command goes on: pauses that grow, a Retry-After that is kept, and a limit from the last good answer."""

import pytest

from api.exit_codes import BUSY, UNREACHABLE
from api.jobs_client import Away, Busy
from api.patience import PAUSE_S_MAX, GaveUp, Patience


class Time:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, length_s: float) -> None:
        self.slept.append(length_s)
        self.now += length_s


class Gateway:
    """Fails as it is told, then answers."""

    def __init__(self, *fails: Exception) -> None:
        self.fails = list(fails)

    async def __call__(self) -> str:
        if self.fails:
            raise self.fails.pop(0)
        return "here"


async def test_an_outage_is_waited_for_with_growing_pauses() -> None:
    time = Time()
    patience = Patience(900, clock=time, sleep=time.sleep)
    assert await patience.answered(Gateway(*[Away("refused")] * 8)) == "here"
    bases = [0.5, 1, 2, 4, 8, 15, 15, 15]
    assert all(base <= slept <= base * 1.25 for base, slept in zip(bases, time.slept, strict=True))
    assert max(time.slept) <= PAUSE_S_MAX * 1.25 and patience.waits_for == ""


async def test_patience_ends_and_says_how_to_go_on() -> None:
    time = Time()
    patience = Patience(60, clock=time, sleep=time.sleep)
    with pytest.raises(GaveUp, match="can't be reached") as failure:
        await patience.answered(Gateway(*[Away("refused")] * 100))
    assert failure.value.code == UNREACHABLE and sum(time.slept) <= 60
    assert patience.waits_for == "refused"


async def test_who_is_told_to_come_back_comes_back_then() -> None:
    time = Time()
    patience = Patience(60, clock=time, sleep=time.sleep)
    assert await patience.answered(Gateway(Busy("full", 20), Busy("full", 20))) == "here"
    assert all(20 <= slept <= 25 for slept in time.slept)


async def test_a_quota_of_tomorrow_is_not_waited_for() -> None:
    time = Time()
    with pytest.raises(GaveUp, match="try again in 40000 s") as failure:
        await Patience(900, clock=time, sleep=time.sleep).answered(Gateway(Busy("used", 40_000)))
    assert failure.value.code == BUSY and time.slept == []


async def test_the_limit_counts_from_the_last_good_answer_of_anybody() -> None:
    time = Time()
    patience = Patience(60, clock=time, sleep=time.sleep)
    for _ in range(5):
        time.now += 50
        assert await patience.answered(Gateway()) == "here"
    time.now += 50
    assert await patience.answered(Gateway(Busy("full", 5))) == "here"


async def test_one_try_is_one_try() -> None:
    time = Time()
    with pytest.raises(GaveUp):
        await Patience(0, clock=time, sleep=time.sleep).answered(Gateway(Away("refused")))
    assert time.slept == []
