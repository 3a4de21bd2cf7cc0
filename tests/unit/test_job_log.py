"""A job's story out of lines and a record: what belongs to it, in which order, and what nobody can smuggle in."""

import io
import logging
from pathlib import Path

import pytest

from api import job_log, part_logs
from api.part_logs import PartLog
from broker import log_lines, logs
from broker.inspection.story import Story
from broker.inspection.timeline import timeline
from broker.lifecycle import State
from broker.records import JobRecord
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

JOB = "01J9ZK"
BEGIN = 1_790_000_000_000  # 2026-09-21T14:13:20Z


def at(seconds: float) -> str:
    return f"2026-09-21T14:13:{20 + seconds:06.3f}Z"


WORKER = f"""\
{at(0.5)} INFO warmlane.waker event=model_state model=big from=cold to=waking reason=-
{at(0.6)} DEBUG warmlane.waker event=waker_retry model=big reason=redis away
{at(2)} INFO warmlane.waker event=warm model=big load_ms=1500 first_token_ms=40 state=warm
{at(2)} INFO warmlane.waker event=warm model=other load_ms=1500 first_token_ms=40 state=warm
{at(2.1)} INFO warmlane.lanes event=claim job={JOB} attempt=1 lane=big model=big host=gpu1 waited_ms=2100
{at(2.2)} INFO warmlane.lanes event=claim job=01OTHER attempt=1 lane=big model=big host=gpu1 waited_ms=9
{at(2.5)} ERROR warmlane.attempt event=unexpected job={JOB} attempt=1
builtins.ValueError
  here.py:1 in there
{at(3)} WARNING warmlane.up event=part_ended part=worker reason=was killed by SIGKILL
{at(9)} WARNING warmlane.up event=part_ended part=worker reason=ended long after
"""
API = f"""\
{at(0)} INFO warmlane.lanes event=submit job={JOB} state=queued lane=big asked=big caller=ann tokens=9
{at(1)} WARNING warmlane.readers event=overdue job=01OTHER code=x reason=a job={JOB} event=finish
"""


def lines(text: str, part: str) -> list[log_lines.Line]:
    return list(log_lines.read(io.StringIO(text), part))


def story_of(job: JobRecord, now_ms: int) -> Story:
    return Story(at_ms=now_ms, job=job, steps=tuple(timeline(job, now_ms=now_ms)))


def test_what_all_parts_said_stands_in_the_order_of_time() -> None:
    job = JobRecord(
        id=JOB, state=State.FAILED, lane="big", model="big", asked_model="big", caller="ann", attempt=1,
        submitted_at=BEGIN, claimed_at=BEGIN + 2_100, ended_at=BEGIN + 4_000, error="worker_lost",
    )  # fmt: skip
    told = job_log.gather(JOB, [*lines(WORKER, "worker"), *lines(API, "api")], story_of(job, BEGIN + 60_000))
    assert [(e.part, e.event, e.around) for e in told] == [
        ("api", "submit", False), ("worker", "model_state", True), ("worker", "warm", True), ("worker", "claim", False),
        ("worker", "unexpected", False), ("worker", "part_ended", True), ("record", "failed", False),
    ]  # fmt: skip
    assert told[3].fields["waited_ms"] == 2_100 and told[5].fields["reason"] == "was killed by SIGKILL"
    text = job_log.as_text(told)
    assert "~warm" in text and "    builtins.ValueError\n      here.py:1 in there" in text
    assert "OTHER" not in text and "forged" not in text


def test_nothing_of_a_job_was_before_its_submit() -> None:
    """A worker that is quick writes its line before the api has written its own."""
    api = f"{at(2.2)} INFO warmlane.lanes event=submit job={JOB} state=queued lane=big caller=ann tokens=9\n"
    told = job_log.gather(JOB, [*lines(WORKER, "worker"), *lines(api, "api")], None)
    assert [e.event for e in told if not e.around] == ["submit", "claim", "unexpected"]
    assert told[0].at_ms == told[1].at_ms


def test_lines_alone_tell_a_story_when_the_record_is_gone() -> None:
    told = job_log.gather(JOB, [*lines(WORKER, "worker"), *lines(API, "api")], None)
    assert [e.event for e in told] == ["submit", "model_state", "warm", "claim", "unexpected"]
    assert job_log.as_json(JOB, told, None)["record"] is False
    assert job_log.gather("nobody", lines(WORKER, "worker"), None) == []


def test_the_record_alone_tells_its_steps() -> None:
    job = JobRecord(id=JOB, lane="big", model="big", submitted_at=BEGIN, give_up_at=BEGIN + 9_000)
    told = job_log.gather(JOB, [], story_of(job, BEGIN + 10))
    assert [(e.part, e.event) for e in told] == [("record", "submitted")], "what lies ahead has not happened"


@pytest.mark.parametrize("form", ["human", "json"])
def test_what_a_process_writes_is_read_back(form: str) -> None:
    """Each in its own form, behind the prefix of a supervisor as well."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter("worker") if form == "json" else logs.Formatter(logs.FORMAT))
    logger = logging.getLogger("warmlane.due")
    record = logger.makeRecord(
        logger.name, logging.INFO, "f", 1, "event=promote job=%s late_ms=%d reason=%s", (JOB, 7, "x event=y"), None
    )
    handler.emit(record)
    for prefix in ("", "worker    | ", "Nov 29 08:00:00 box warmlane-worker[12]: "):
        line = log_lines.parse(prefix + out.getvalue().rstrip("\n"), "worker")
        assert line is not None and abs(line.at_ms - record.created * 1_000) <= 1
        assert (line.part, line.level, line.module, line.event, line.job) == ("worker", "INFO", "due", "promote", JOB)
        assert line.fields["late_ms"] == 7 and line.fields["reason"] == "x event=y"


@pytest.mark.parametrize("text", ["", "hello", '{"at": "soon"}', '{"at": "x', '{"at": "2026-09-21T14:13:20.000Z"}'])
def test_what_is_no_line_of_ours_is_none(text: str) -> None:
    assert log_lines.parse(text) is None


@pytest.mark.parametrize(
    "field", ['"trace": 5', '"trace": null', '"trace": {"a": 1}', '"model": ["big"]', '"attempt": {}']
)
def test_a_json_line_that_nobody_of_us_wrote_that_way_is_told(field: str) -> None:
    text = f'{{"at": "{at(1)}", "level": "INFO", "module": "x", "event": "claim", "job": "{JOB}", {field}}}'
    told = job_log.gather(JOB, lines(f"{WORKER}{text}\n", "worker"), None)
    assert f"{at(1)[11:-1]}" in job_log.as_text(told)


def test_a_line_too_deep_to_be_read_is_none() -> None:
    assert log_lines.parse('{"at": "' + f'{at(1)}", "x": ' + "[" * 200_000) is None


# --- the files ---------------------------------------------------------------------------------------------------


def test_a_file_is_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    log = PartLog(tmp_path, "worker", bytes_max=100)
    for number in range(100):
        log.write(f"line {number:03d} " + "x" * 20)
    log.close()
    found = list(part_logs.files(tmp_path))
    assert [path.name for _, path in found] == ["worker.log.3", "worker.log.2", "worker.log.1", "worker.log"]
    assert {part for part, _ in found} == {"worker"}
    said = "".join(path.read_text() for _, path in found).splitlines()
    assert said[-1].startswith("line 099") and said == sorted(said) and len(said) <= 20
    assert all(path.stat().st_size <= 140 and path.stat().st_mode & 0o077 == 0 for _, path in found)


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / part_logs.FOLDER).write_text("in the way")
    log = PartLog(tmp_path, "worker")
    log.write("lost")
    (tmp_path / part_logs.FOLDER).unlink()
    log.write("kept")
    log.close()
    assert [path.read_text() for _, path in part_logs.files(tmp_path)] == ["kept\n"]


# --- the command -------------------------------------------------------------------------------------------------


def test_files_can_be_named_and_redis_may_be_away(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://127.0.0.1:9/0")
    worker, api = tmp_path / "worker.log", tmp_path / "api.log"
    worker.write_text(WORKER)
    api.write_text(API)
    ran = gateway("logs", JOB, "--file", str(worker), "--file", str(api))
    assert ran.code == 0 and "Redis does not answer at 127.0.0.1:9" in ran.err
    assert [line.split()[2:4] for line in ran.out.splitlines()[1:3]] == [["api", "submit"], ["worker", "~model_state"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(API))
    ran = gateway("logs", JOB, "--file", "-", "--json")
    assert ran.code == 0 and '"event": "submit"' in ran.out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n" + API.encode()), encoding="utf-8"))
    ran = gateway("logs", JOB, "--file", "-")
    assert ran.code == 0 and "submit" in ran.out, "what is no UTF-8 in it keeps nobody from the rest"
    ran = gateway("logs", "nobody", "--file", str(api))
    assert ran.code == 1 and "Nothing is known of job nobody" in ran.err
    ran = gateway("logs", "\x1b]0;mine\x07", "--file", str(api))
    assert ran.code == 1 and r"job \x1b]0;mine\x07:" in ran.err, "no sentence repeats a command to a terminal either"
    ran = gateway("logs", JOB, "--file", str(tmp_path / "none"))
    assert ran.code == 2 and "No such file" in ran.err
