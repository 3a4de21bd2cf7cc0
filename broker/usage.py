"""What was used: by whom, in which lane, of which model, on which day (UTC). How the counters are read and kept.

A job is counted once and whole, by the script that ends it, on the day of its end. Its figures stand under its caller,
its last lane, the model that it asked for and the one that served it: whatever is added up over any of these gives the
same total. Slot time before a put-back is counted when the job is put back. Refusals: `refusals.py`.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Protocol

from broker import errors
from broker.figures import By, Count, Day, counts
from broker.store import Store

DAYS_MAX = 400
"""How many days one question may be about."""

_ONE_DAY = timedelta(days=1)
_DAY_MS = 86_400_000
_PAGE = 32


async def today(store: Store) -> Day:
    """Gives the counters of the day, as the scripts that ended, moved and recovered jobs wrote them."""
    day = _day_of(await store.now_ms()).isoformat()
    return [row async for page in _pages(store, day) for row in page]


async def days(store: Store, since: str, until: str) -> tuple[date, date]:
    """Reads a span, both days included: `7d`, `2w` or a date until a date, today where nothing is said.

    `7d` are the last day and the six before it. Raises BadRequest.
    """
    last = _date(until, "until") if until else _day_of(await store.now_ms())
    number, unit = since[:-1], since[-1:]
    if unit in ("d", "w") and number.isascii() and number.isdigit():
        count = int(number[:6]) * (7 if unit == "w" else 1)
        if not 0 < count <= min(DAYS_MAX, last.toordinal()):
            raise errors.BadRequest(f"since is from 1 to {DAYS_MAX} days back", "since")
        return last - (count - 1) * _ONE_DAY, last
    first = _date(since, "since")
    if first > last:
        raise errors.BadRequest(f"since ({first}) comes after until ({last})", "since")
    if (last - first).days >= DAYS_MAX:
        raise errors.BadRequest(f"from {first} to {last} are more than {DAYS_MAX} days", "since")
    return first, last


class Counting(Protocol):
    """Adds counters of days up."""

    def count(self, day: date, one: Count) -> None: ...


async def tell(store: Store, report: Counting, first: date, last: date) -> None:
    """Adds the days' counters to a report."""
    for number in range((last - first).days + 1):
        day = first + number * _ONE_DAY
        async for page in _pages(store, day.isoformat()):
            for one in counts(page):
                report.count(day, one)


async def keep(store: Store, *, usage_days: int) -> None:
    """Lets each day's counters go so many days after its end, also where a policy said otherwise when they began."""
    now = await store.now_ms()
    async for key in store.scan(store.keys.usage("*")):
        day = store.keys.usage_day_of(key)
        try:
            begins_ms = int(datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC).timestamp() * 1000)
        except ValueError:
            continue  # not ours
        await store.command("PEXPIRE", key, max(1, begins_ms + (1 + usage_days) * _DAY_MS - now))


async def _pages(store: Store, day: str) -> AsyncIterator[list[tuple[By, dict[bytes, bytes]]]]:
    """Gives a day's hashes in pieces, so that nobody else waits for a large day."""
    spelled = await store.command("HKEYS", store.keys.usage(day))
    names = [by for by in map(By.read, spelled) if by is not None]
    for start in range(0, len(names), _PAGE):
        page = names[start : start + _PAGE]
        found = await asyncio.gather(*(store.hash(store.keys.figures(day, by.spelled)) for by in page))
        yield list(zip(page, found, strict=True))


def _day_of(ms: int) -> date:
    return datetime.fromtimestamp(ms / 1000, UTC).date()


def _date(text: str, name: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        words = f"{name} is a date like 2026-11-22" + (", or days or weeks back like 7d or 2w" * (name == "since"))
        raise errors.BadRequest(words, name) from None
