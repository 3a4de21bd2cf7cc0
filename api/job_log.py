"""A job's story out of what its record and the logs of all parts tell, in the order of time. Pure."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from api.inspect_text import instant, table
from api.status_table import duration
from api.terminal import text_of
from broker.inspection.story import Story
from broker.log_lines import Line

_EVENT_OF_STEP = {
    "submitted": "submit", "started": "release_due", "moved": "promote", "claimed": "claim",
    "first token": "first_token", "done": "finish", "failed": "fail", "cancelled": "cancel", "expired": "expire",
}  # fmt: skip

PART_ENDED = "part_ended"
RECORD = "record"
"""What stands in the place of a part where the job's record tells a step that no line does."""


@dataclass(frozen=True)
class Entry:
    """One thing that happened. `around`: it was not of the job, but of its model or of a part while the job lived."""

    at_ms: int
    part: str
    event: str
    fields: dict[str, Any]
    more: list[str] = field(default_factory=list)
    around: bool = False


def may_matter(text: str, job_id: str) -> bool:
    """Whether a line may belong to the story, by a glance at it: most of a long log does not."""
    if job_id in text or PART_ENDED in text:
        return True
    return ("model" in text) and " job=" not in text and '"job": ' not in text


def gather(job_id: str, lines: Iterable[Line], story: Story | None) -> list[Entry]:
    """Puts the lines of the job, the steps that only its record tells, and what happened around it in order."""
    kept = list(lines)
    own = [line for line in kept if line.job == job_id]
    steps = _steps_without_line(own, story)
    entries = [Entry(line.at_ms, line.part, line.event, _told(line), line.more) for line in own] + steps
    if not entries:
        return []
    first_ms = min(entry.at_ms for entry in entries)  # an api may write its line after a worker that was quick
    entries = [replace(entry, at_ms=first_ms) if entry.event == "submit" else entry for entry in entries]
    begin, end = min(e.at_ms for e in entries), max(e.at_ms for e in entries)
    if story is not None:
        begin = min(begin, story.job.submitted_at)
        end = max(end, story.at_ms if story.job.live else story.job.ended_at)
    models = {line.fields["model"] for line in own if "model" in line.fields}
    if story is not None:
        models |= {story.job.model, story.job.asked_model} - {""}
    for line in kept:
        of_model = line.fields.get("model") in models and line.level != "DEBUG"
        if not line.job and begin <= line.at_ms <= end and (of_model or line.event == PART_ENDED):
            entries.append(Entry(line.at_ms, line.part, line.event, _told(line), line.more, around=True))
    return sorted(entries, key=lambda entry: (entry.at_ms, entry.event != "submit"))


def as_json(job_id: str, entries: list[Entry], story: Story | None) -> dict[str, Any]:
    """Gives plain data."""
    return {
        "job": job_id,
        "record": story is not None,
        "entries": [{name: value for name, value in asdict(e).items() if value not in ([], False)} for e in entries],
    }


def as_text(entries: list[Entry]) -> str:
    """One line for each entry; those around the job are marked."""
    first = entries[0].at_ms
    rows = [
        (
            instant(entry.at_ms),
            duration(entry.at_ms - first),
            entry.part or "-",
            ("~" if entry.around else "") + entry.event,
            " ".join(f"{name}={value}" for name, value in entry.fields.items()),
        )
        for entry in entries
    ]
    head, *lines = table(("AT (UTC)", "AFTER", "PART", "EVENT", ""), rows)
    out = [head]
    for line, entry in zip(lines, entries, strict=True):
        out += [line, *(f"    {more}" for more in entry.more)]
    if any(entry.around for entry in entries):
        out.append("note: ~ was not of the job itself: its model, or a part that ended")
    return text_of(out)


def _told(line: Line) -> dict[str, Any]:
    """The fields but those that every line of the story shares."""
    return {name: value for name, value in line.fields.items() if name not in ("event", "job")}


def _steps_without_line(own: list[Line], story: Story | None) -> list[Entry]:
    """The steps of the record that no line tells: the logs of that time are gone, or lie on another machine."""
    if story is None:
        return []
    said = {(line.event, line.fields.get("attempt")) for line in own} | {(line.event, None) for line in own}
    said |= {("fail", None) for line in own if line.fields.get("outcome") == "failed"}
    found = []
    for step in story.steps:
        attempt = story.job.attempt if step.step == "claimed" else None
        if not step.ahead and (_EVENT_OF_STEP.get(step.step, ""), attempt) not in said:
            found.append(Entry(step.at_ms, RECORD, step.step, {"tells": step.words} if step.words else {}))
    return found
