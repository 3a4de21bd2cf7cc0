"""How `gateway` ends: the codes that a pipeline can branch on, and the failure that carries one. One table, told in
docs/ci.md as it stands here.
"""

from typing import Final

OK: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
FAILED: Final = 4
BUSY: Final = 5
UNFINISHED: Final = 6
CANCELLED: Final = 7
EXPIRED: Final = 8
UNWRITTEN: Final = 9
INTERRUPTED: Final = 130
TERMINATED: Final = 143

MEANINGS: Final[dict[int, str]] = {
    OK: "done",
    REFUSED: "the gateway refused it, for good (or a look found something wrong); its sentence is on stderr",
    USAGE: "wrong words on the command line, a file that can't be used, an invalid policy",
    UNREACHABLE: "the gateway, or its Redis, can't be reached",
    FAILED: "the job ended without an answer; of a batch: all lines are dealt with, some of them failed",
    BUSY: "no place now, or the key has used what it may (503, 429): the same again later",
    UNFINISHED: "the time given to wait is over; the job goes on",
    CANCELLED: "somebody cancelled the job",
    EXPIRED: "the job was not served before it expired",
    UNWRITTEN: "stdout or a file takes no more (a full disk, or closed); what was handed in goes on; stderr names it",
    INTERRUPTED: "Ctrl-C; what was handed in goes on",
    TERMINATED: "SIGTERM; what was handed in goes on",
}

_OF_STATE: Final = {"done": OK, "failed": FAILED, "cancelled": CANCELLED, "expired": EXPIRED}


class Failed(Exception):
    """A sentence for the person, and the exit code."""

    def __init__(self, sentence: str, code: int = REFUSED) -> None:
        super().__init__(sentence)
        self.code = code


def of_state(state: str) -> int:
    """The exit code that says how a job stands."""
    return _OF_STATE.get(state, UNFINISHED)


def of_status(status: int) -> int:
    """The exit code of a refusal over HTTP."""
    return BUSY if status in (429, 503) else REFUSED


def as_markdown() -> str:
    """The table for people."""
    rows = [f"| {code} | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join(["| code | meaning |", "|---|---|", *rows])
