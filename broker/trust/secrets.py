"""Finds secrets in text: the scanner that others maintain, and a few rules of ours beside its own (`secrets.yml`).

It reads some tens of MB a second without Python's lock, so it runs in a thread beside the loop. Its rules are compiled
once for each process, which takes seconds where no earlier process left them in the machine's cache.
"""

import threading
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from typing import Any, Final

SCAN_S_MAX = 10.0
"""What takes longer to scan does not leave."""

OURS: Final = "warmlane."
CONFIDENCE: Final = "medium"

_compiling = threading.Lock()


@dataclass(frozen=True)
class Match:
    """One secret: of which kind, and the bytes of the text that it takes."""

    kind: str
    start: int
    end: int


class CannotScan(Exception):
    """The text was not scanned, so nobody knows what is in it; the words say why, and nothing of the text."""


def scan(text: bytes) -> list[Match]:
    """Gives the secrets in a UTF-8 text; raises CannotScan. It may take seconds: call it in a thread."""
    try:
        found = _scanner().scan(text, timeout=SCAN_S_MAX)
    except TimeoutError:
        raise CannotScan(f"the scan for secrets took longer than {SCAN_S_MAX:g} s") from None
    except (ImportError, OSError, RuntimeError, ValueError, metadata.PackageNotFoundError) as error:
        raise CannotScan(f"the scanner for secrets does not work here ({type(error).__name__})") from None
    matches = []
    for one in sorted(found, key=lambda one: one.rule_id.startswith(OURS)):  # its own words say more
        if one.visible:  # the others are halves of pairs, of which one half alone says nothing
            place = one.location
            matches.append(Match(one.rule_id.rpartition(".")[2], place["start_offset"], place["end_offset"]))
    return matches


def prepare() -> None:
    """Compiles the rules now, so that no request has to wait for it; what goes wrong shows with the first scan."""
    try:
        scan(b"")
    except CannotScan:
        return


@cache
def scanner_version() -> str:
    """Which rules it has: what was judged under others is judged anew."""
    try:
        return metadata.version("kingfisher-secret-scanner")
    except metadata.PackageNotFoundError:
        return ""


def _scanner() -> Any:
    with _compiling:
        return _made()


@cache
def _made() -> Any:
    from kingfisher_sdk import Rules, Scanner

    with resources.as_file(resources.files("broker.trust").joinpath("secrets.yml")) as ours:
        return Scanner(Rules([str(ours)], confidence=CONFIDENCE))
