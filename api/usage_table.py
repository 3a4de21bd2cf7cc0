"""The text of `gateway usage`: a table for people, or CSV, made of what `GET /v1/usage` told and nothing else."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from api.status_table import duration
from broker.figures import NOBODY
from broker.usage_report import BY, Used

_HEAD = (
    "ASKED",
    "DONE",
    "NOT DONE",
    "REFUSED",
    "PROMOTED",
    "IN TIME",
    "AS ASKED",
    "FIRST TOKEN",
    "PROMPT",
    "CACHED",
    "ANSWER",
    "SLOT TIME",
)
_GAP = 2


def usage_table(told: Mapping[str, Any]) -> str:
    """Gives a row for each caller, lane, model or day, the total, and a line for whatever needs a word.

    IN TIME is the share of judged jobs whose first token was in time from any model, AS ASKED that from the model asked
    for; PROMOTED counts moves to a fallback lane; FIRST TOKEN is p50/p95 of interactive jobs; SLOT TIME how long jobs
    held slots.
    """
    by: Sequence[str] = told["by"]
    heads = tuple(name.upper() for name in by) or ("",)
    rows = [(*heads, *_HEAD)]
    rows += [(*(_name(row[name]) for name in by), *_figures(row)) for row in told["rows"] if by]
    rows.append((*("total", *[""] * (len(by) - 1)), *_figures(told["total"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(heads)  # names are read from the left, figures from the right
    lines = [
        (" " * _GAP)
        .join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]
    whose = f" of {told['caller']}" if told["caller"] else ""
    lines.insert(0, f"usage{whose} from {told['since']} to {told['until']} (days of {told['zone']})")
    return "\n".join([*lines, *(f"note: {words}" for words in [*_notes(told["total"]), *_of_lanes(told)])])


def usage_csv(told: Mapping[str, Any]) -> str:
    """Gives the rows as CSV, always with the same columns; without the total, which is their sum."""
    columns = [*BY, *Used().as_json()]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["since", "until", *columns])
    for row in told["rows"]:
        table.writerow([told["since"], told["until"], *(_cell(row.get(column)) for column in columns)])
    return text.getvalue()


def count(value: int) -> str:
    """Writes a number the short way, rounded down: 950, 12.3k, 4.6M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 10 * size or (value >= size and unit != "k"):
            return f"{value * 10 // size / 10:.1f}{unit}"
    return str(value)


def _figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    p50, p95 = row["first_token_p50_ms"], row["first_token_p95_ms"]
    return (
        count(row["asked"]),
        count(row["done"]),
        count(row["failed"] + row["cancelled"] + row["expired"]),
        count(row["refused"]),
        count(row["promotions"]),
        _share(row["in_time"], row["judged"]),
        _share(row["in_time_asked"], row["judged"]),
        "-" if p50 is None else f"{_time(p50)}/{_time(p95)}",
        count(row["tokens_in"]),
        _share(row["tokens_cached"], row["tokens_in"]),
        count(row["tokens_out"]),
        duration(row["running_ms"]) if row["running_ms"] else "-",
    )


def _notes(total: Mapping[str, Any]) -> list[str]:
    words = []
    if total["refused"]:
        words.append(f"{_so_many(total['refused'], 'request')} refused: {_codes(total['refused_by'])}")
    if total["failed"]:
        words.append(f"{_so_many(total['failed'], 'job')} answered with an error: {_codes(total['failed_by'])}")
    if total["expired"]:
        words.append(f"{_so_many(total['expired'], 'job')} told that the wait was in vain (`expired`)")
    if total["cancelled"]:
        why = "by request, for a client that hung up, or with a revoked key"
        words.append(f"{_so_many(total['cancelled'], 'job')} cancelled: {why}")
    if total["by_other"]:
        words.append(f"{_so_many(total['by_other'], 'job')} answered by another model than the one asked for")
    if total["untold"]:
        words.append(f"{_so_many(total['untold'], 'answer')} counted without tokens: the runtime told none")
    return words


def _of_lanes(told: Mapping[str, Any]) -> list[str]:
    """A word on where jobs stand that did not stay in their lane, where rows are of lanes and there were any."""
    if "lane" not in told["by"] or not (told["total"]["promotions"] or told["total"]["by_other"]):
        return []
    return [
        "a job stands under the lane where it ended: one that moved or spilled into a fallback is not in the row of "
        "the lane that it asked for (`--by model` has it under the model that it asked for)"
    ]


def _so_many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s were' if number != 1 else ' was'}"


def _codes(by: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {number:,}" for code, number in sorted(by.items(), key=lambda pair: (-pair[1], pair[0])))


def _share(part: int, whole: int) -> str:
    """A share in per cent, rounded down: 100 % means all of them."""
    return f"{part * 1000 // whole / 10:.1f}%" if whole else "-"


def _time(value_ms: int) -> str:
    return (
        f"{value_ms}ms" if value_ms < 1_000 else f"{value_ms / 1000:.1f}s" if value_ms < 100_000 else duration(value_ms)
    )


def _name(name: str) -> str:
    return "(unknown)" if name == NOBODY else name


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{code}={number}" for code, number in value.items())
    return "" if value is None else round(value, 4) if isinstance(value, float) else value
