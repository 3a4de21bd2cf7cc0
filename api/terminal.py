"""What may be printed for people: nobody's words move their cursor, write to their clipboard or make up a line. Pure.

What is shown is often not ours: the words of a runtime's log, a dead letter, the name of a foreign key.
"""

from collections.abc import Iterable

from broker.logs import CONTROLS


def harmless(text: str) -> str:
    """Spells out what would end a line, command a terminal, turn text round, or what no encoding has a byte for."""
    return text.translate(CONTROLS).encode(errors="backslashreplace").decode()


def text_of(lines: Iterable[str]) -> str:
    """Makes a text of lines; whatever stands in one of them, it stays one."""
    return "\n".join(map(harmless, lines))
