"""The garbage collector's pauses: a process that streams tokens keeps them few and short."""

import gc

LOOK_AFTER = 5_000
"""New objects before the collector looks: at the default it looks hundreds of times a second under load, and ten times
as many make each pause ten times as long."""


def settle() -> None:
    """Has the collector leave alone what exists now; call it once, when everything that stays has been made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(LOOK_AFTER)
