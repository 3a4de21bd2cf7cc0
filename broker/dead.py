"""Dead letters: jobs that were given up on, and why. `close.lua` writes one, whoever tries the job again takes it out.

A letter outlives its job, whose request is kept for a while: until then the job can be tried again.
"""

import re
from dataclasses import dataclass
from typing import Any

from broker import errors
from broker.records import decode_hash
from broker.store import Store

PAGE_MAX = 100
LOOKED_AT_MAX = 2_000
"""Letters that one request looks at, whosever they are; the next one goes on from there."""
_CHUNK = 500

_id = re.compile(r"\d{1,19}-\d{1,19}").fullmatch


@dataclass(frozen=True)
class Letter:
    """One job that was given up on. `at` in ms of Redis' clock."""

    id: str
    at: int
    job: str
    caller: str
    lane: str
    model: str
    mode: str
    state: str
    code: str
    message: str
    losses: int

    @classmethod
    def from_entry(cls, entry_id: Any, values: Any) -> "Letter":
        """Reads an entry of the stream."""
        f, letter_id = decode_hash(values), entry_id.decode()
        return cls(
            id=letter_id,
            at=int(letter_id.partition("-")[0]),
            losses=int(f.get("losses") or 0),
            **{
                name: f.get(name, "") for name in ("job", "caller", "lane", "model", "mode", "state", "code", "message")
            },
        )


@dataclass(frozen=True)
class Letters:
    """A page of them, newest first, and the `after` of the next one, "" where this is the last."""

    letters: list[Letter]
    next: str


def is_id(name: str) -> bool:
    """Whether this is how a letter is called."""
    return _id(name) is not None


async def page(store: Store, *, caller: str = "", after: str = "", limit: int = PAGE_MAX) -> Letters:
    """Gives the letters of a caller, "" = of everybody, from behind the letter `after`."""
    found: list[Letter] = []
    for _ in range(LOOKED_AT_MAX // _CHUNK):
        newest = f"({after}" if after else "+"
        entries = await store.command("XREVRANGE", store.keys.dead, newest, "-", "COUNT", _CHUNK) or []
        for entry, values in entries:
            letter = Letter.from_entry(entry, values)
            if caller in ("", letter.caller):
                found.append(letter)
                if len(found) == limit:
                    return Letters(found, letter.id)
        if len(entries) < _CHUNK:
            return Letters(found, "")
        after = entries[-1][0].decode()
    return Letters(found, after)


async def find(store: Store, name: str, *, caller: str = "") -> Letter:
    """Finds a caller's letter by its own id or by that of its job; raises NoSuchLetter."""
    letter_id = name
    if not is_id(name):
        told = await store.command("HGET", store.keys.job(name), "letter")
        letter_id = told.decode() if told else ""
    entries = await store.command("XRANGE", store.keys.dead, letter_id, letter_id) if letter_id else None
    if not entries:
        raise errors.NoSuchLetter(name)
    letter = Letter.from_entry(*entries[0])
    if caller not in ("", letter.caller):
        raise errors.NoSuchLetter(name)
    return letter


async def drop(store: Store, letter: Letter) -> None:
    """Takes a letter out; the job itself stays for as long as it is kept."""
    await store.command("XDEL", store.keys.dead, letter.id)
