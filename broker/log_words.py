"""The words of the log that concern a job: one line for each transition, and one for what else happens to it.

A line is `event=WORD job=ID …`. docs/inspect.md prints this table, and a test holds every line of the code against it.
"""

TRANSITIONS: dict[str, str] = {
    "submit": "it was let into a lane, or into the schedule (`state=scheduled`); `spilled`: why into a fallback",
    "release_due": "its start had come: it entered its lane",
    "claim": "a worker took it; `attempt` numbers the claims",
    "first_token": "its first token is in the log",
    "promote": "it moved to its lane's fallback lane, `late_ms` after its deadline (0 = before it)",
    "put_back": "batch work that made way for interactive work: it waits again",
    "release": "its worker gave it back: `outcome` says whether it waits again or has failed",
    "recover": "its worker is lost: `outcome` says whether it waits again or has failed",
    "finish": "it is done",
    "fail": "it ended with an error, `code`",
    "cancel": "it was cancelled while it was `was`",
    "expire": "it was given up on, having waited until its end",
}
"""One line each, from the process that made the transition, at INFO or above."""

OTHERS: dict[str, str] = {
    "attach": "a repeated request was led to it",
    "told": "its worker heard that it is another's or nobody's now",
    "stop": "an attempt ended without a word of its own: the job had been taken from it",
    "go_on": "an attempt goes on with the answer of an earlier one",
    "stays": "it may not leave the machine, and waits or ends here",
    "judge_later": "whether it may leave could not be judged now",
    "claim_lost": "somebody else was faster",
    "claim_retry": "Redis did not answer the claim; whether it was made is looked for",
    "overdue": "an api looked after it, since no scheduler had",
    "look_raced": "it had moved before whoever looked could act",
    "look_failed": "looking after it failed",
    "look_retry": "Redis refused what was to be done, or did not answer: it is looked at again",
    "enter_anew": "Redis came back without it: it was submitted once more",
    "leave_later": "its client has left, which could not be written yet",
    "refill_retry": "a reader of it waits for Redis",
    "renew_retry": "its lease could not be renewed yet",
    "spend_lost": "what its cancelled answer cost was not counted",
    "not_put_back": "it does not make way, and runs on",
    "frames_lost": "Redis came back without a part of its answer",
    "lost_redis": "Redis was away for too long: the attempt ended, and the lease will tell",
    "answer_unreadable": "its answer, as a line of a batch, could not be put together by our own fault",
    "trace_lost": "what it came to could not be told to its trace",
    "unexpected": "something of ours broke over it",
}


def as_markdown() -> str:
    """The table for people."""
    rows = [f"| `{word}` | {meaning} |" for word, meaning in (TRANSITIONS | OTHERS).items()]
    return "\n".join(["| event | what it says of the job |", "|---|---|", *rows])
