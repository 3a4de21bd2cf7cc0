"""How every process logs: one line for each event, and nothing in it that a client has said.

A line says `event=WORD name=value …`, the same for people and as JSON. The values of a JSON line come from what was
logged, not from its text, so nobody's words make up a field.

An exception's message may hold what it stumbled over: a key of a dictionary, a number that is none, a piece of a
prompt. So of an error that is not our own only the kind and the places in the code are told.
"""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TextIO

from broker.errors import BrokerError
from broker.log_writer import Writer

Format = Literal["human", "json"]

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
ROOT = "warmlane"

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

MODULES = (
    "admission alive api attempt batches chores clockwork counting dispatcher due errands frames host hosts inspection "
    "jobs keys lanes llama_server meter ollama overlap picture policy process progress put_back quarantine readers "
    "refusals residents room scheduler store swaps traces upkeep vllm wake waker webhooks"
).split()
"""What a level may be set for, beside the whole. Each is a logger `warmlane.<module>`."""

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
"""What ends a line for somebody, commands a terminal, or has it show text in another order than it stands."""


class Formatter(logging.Formatter):
    """One event, one line; a traceback without the words of its errors. Instants are UTC, to the ms."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Writes when it happened so that lines of several machines can be put in order."""
        return _instant(record.created)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Keeps whatever a message repeats from looking like a line of ours."""
        return super().formatMessage(record).translate(CONTROLS)

    def formatException(self, ei: object) -> str:
        """Tells kinds and places, and the words of our own errors only."""
        error = ei[1] if isinstance(ei, tuple) else None
        return "\n".join(_told(error)) if isinstance(error, BaseException) else ""


class JsonFormatter(Formatter):
    """The same as one JSON object a line: at, level, module, then the fields of the event."""

    def __init__(self, part: str = "") -> None:
        super().__init__(FORMAT)
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        """Writes one object."""
        line: dict[str, Any] = {"at": _instant(record.created), "level": record.levelname}
        if self._part:
            line["part"] = self._part
        line["module"] = record.name.removeprefix(ROOT + ".")
        line |= fields_of(record)
        if record.exc_info and record.exc_info[1] is not None:
            line["trace"] = _told(record.exc_info[1])
        return _json(line)


_json = json.JSONEncoder(default=str).encode


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Gives the names and values of an event as they were logged; of any other line its message."""
    args = record.args
    if not isinstance(record.msg, str) or not record.msg.startswith("event=") or isinstance(args, Mapping):
        return {"message": record.getMessage()}
    found: dict[str, Any] = {}
    left = list(args or ())
    for name, template, count, kind in _pieces(record.msg):
        own, left = left[:count], left[count:]
        found[name] = _value(template, kind, own)
    return found


@lru_cache(maxsize=512)
def _pieces(message: str) -> tuple[tuple[str, str, int, str], ...]:
    """The fields of a message: name, what is written for its value, how many arguments that takes, and of what kind
    the value is where it is an argument and nothing else (`s`, `d`, `f`)."""
    parts = re.split(r"(?:^| )([a-z_]+)=", message)[1:]
    found = []
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        kind = value[-1] if _SPEC.fullmatch(value) else ""
        found.append((name, value, len(_SPEC.findall(value)), kind))
    return tuple(found)


_SPEC = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z]")


def _value(template: str, kind: str, args: list[Any]) -> Any:
    if template == "%s" and isinstance(args[0], str):
        return str(args[0])  # a state is a word too
    if template == "%s" and isinstance(args[0], bool | int | float | None):
        return args[0]
    if kind == "d":
        return int(args[0])
    if kind == "f":
        return float(template % args[0])
    return template % tuple(args) if args else template


def begin(level: str, form: Format = "human", *, part: str = "", stream: TextIO | None = None) -> None:
    """Sets the process's logging up. `level` is one for all, and `module=LEVEL` for some, with commas between."""
    handler = Writer(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(part) if form == "json" else Formatter(FORMAT))
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, name, False)  # none of it is in a line
    logging._srcfile = None  # nor where in the code it was said
    whole, of_modules = read_levels(level)
    logging.basicConfig(level=whole, handlers=[handler])
    for module, own in of_modules.items():
        logging.getLogger(f"{ROOT}.{module}").setLevel(own)
    sys.excepthook = _last_words


def read_levels(text: str) -> tuple[str, dict[str, str]]:
    """Reads `INFO` or `INFO,due=DEBUG,store=ERROR`: the level of all, and those of modules; raises ValueError with a
    sentence."""
    whole, of_modules = "INFO", dict[str, str]()
    for word in filter(None, (word.strip() for word in text.split(","))):
        module, named, level = word.rpartition("=")
        if level.upper() not in LEVELS:
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR, and module=LEVEL for some with commas between")
        if named and module not in MODULES:
            raise ValueError(f"names modules of the log, like due=DEBUG: there are {', '.join(MODULES)}")
        if named:
            of_modules[module] = level.upper()
        else:
            whole = level.upper()
    return whole, of_modules


def line(level: str, module: str, message: str) -> str:
    """Writes a line for people, where no logger is."""
    return f"{_instant(time.time())} {level} {ROOT}.{module} {message}"


def _instant(created_s: float) -> str:
    return datetime.fromtimestamp(created_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def kind_of(error: BaseException) -> str:
    """Says what an error is, in the words of a line: with its message if it is ours, else by its kind alone."""
    return str(error) if isinstance(error, BrokerError) else type(error).__qualname__


def _last_words(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """Tells of an error that ends the process, in the same words as of any other."""
    logging.getLogger("warmlane").critical("event=broke", exc_info=error)


def _told(error: BaseException) -> list[str]:
    lines: list[str] = []
    seen: set[int] = set()
    left: list[tuple[str, BaseException]] = [("", error)]
    while left:
        how, one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        lines.append(f"{how}{type(one).__module__}.{type(one).__qualname__}" + _words_of(one))
        lines += [
            f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(one.__traceback__)
        ]
        if isinstance(one, BaseExceptionGroup):
            left += [("one of them: ", inner) for inner in one.exceptions]
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if before is not None:
            left.append(("after: ", before))
    return lines


def _words_of(error: BaseException) -> str:
    if isinstance(error, BrokerError):
        return f": {str(error).translate(CONTROLS)}"
    number = error.errno if isinstance(error, OSError) else None
    return f" ({number})" if number is not None else ""
