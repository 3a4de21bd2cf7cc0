"""A log tells what happened and where, in one line for each event, and never what a client said."""

import ast
import asyncio
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from broker import errors, log_words, log_writer, logs
from broker.lifecycle import Event
from broker.log_writer import Writer
from broker.settings import BrokerSettings, SettingsInvalid, read_settings
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`begin` is for a whole process, and this one goes on."""
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile"):
        monkeypatch.setattr(logging, name, getattr(logging, name, True), raising=False)


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO]:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.Formatter(logs.FORMAT))
    logger = logging.getLogger("test of logs")
    logger.handlers[:], logger.propagate = [handler], False
    return logger, out


def failing() -> None:
    try:
        {}["zebra in a key"]
    except KeyError as first:
        raise ValueError("zebra in a value") from first


def test_of_an_error_only_kinds_and_places_are_told(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = log
    try:
        failing()
    except ValueError as error:
        logger.error("event=unexpected", exc_info=ExceptionGroup("zebra in a group", [error]))
    told = out.getvalue()
    assert "zebra" not in told
    for words in (
        "builtins.ExceptionGroup",
        "one of them: builtins.ValueError",
        "after: builtins.KeyError",
        "in failing",
    ):
        assert words in told, told


def test_our_own_errors_keep_their_words(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = log
    try:
        raise errors.WorkerLost("the worker\nwent away")
    except errors.WorkerLost as error:
        logger.error("event=x", exc_info=error)
    assert "WorkerLost: the worker\\x0awent away" in out.getvalue()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x1b[2J", "\x85", "\u2028", "\x9b2J", "\u202e"])
def test_nobody_writes_a_line_of_ours(log: tuple[logging.Logger, io.StringIO], end: str) -> None:
    logger, out = log
    logger.warning("event=refused reason=%s", f"a{end}2026-01-01 00:00:00,000 INFO warmlane.api event=forged")
    assert out.getvalue().splitlines()[0].endswith("event=forged") and len(out.getvalue().splitlines()) == 1
    assert end not in out.getvalue()[:-1]


def test_an_error_that_ends_a_process_is_told_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    logs.begin("INFO", stream=io.StringIO())
    sys.excepthook(ValueError, ValueError("zebra"), None)
    assert "event=broke" in caplog.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RuntimeRefused("zebra"), "the runtime refused the request (runtime_refused)"),
        (errors.ContextTooLong("zebra"), "the runtime refused the request (context_length_exceeded)"),
        (errors.RuntimeFailed("the runtime answered 500: zebra"), "the runtime answered 500"),
        (errors.WorkerLost("the worker left: no more"), "the worker left: no more"),
    ],
)
def test_a_runtimes_words_are_left_out(error: errors.BrokerError, words: str) -> None:
    assert errors.without_quotes(error) == words


# --- as JSON -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_json(log: tuple[logging.Logger, io.StringIO]) -> tuple[logging.Logger, io.StringIO]:
    log[0].handlers[0].setFormatter(logs.JsonFormatter("worker"))
    return log


def test_a_line_of_json_has_the_fields_of_the_event(as_json: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = as_json
    logger.warning("event=%s job=%s late_ms=%d load_s=%.1f late=%s", "promote", "01J9", 140, 2.25, None)
    told = json.loads(out.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("at"))
    assert told == {
        "level": "WARNING", "part": "worker", "module": "test of logs", "event": "promote", "job": "01J9",
        "late_ms": 140, "load_s": 2.2, "late": None,
    }  # fmt: skip


def test_no_value_makes_up_a_field(as_json: tuple[logging.Logger, io.StringIO]) -> None:
    """What somebody wrote stays in the field that it was logged as, whatever it looks like."""
    logger, out = as_json
    logger.setLevel(logging.INFO)
    logger.info("event=refused reason=%s, so it waits", 'a"\n job=forged event=forged %s')
    logger.info("event=stays job=%s reason=it does not pass the rules in force", "01J9")
    logger.info("no event at %s", "all")
    first, second, third = (json.loads(line) for line in out.getvalue().splitlines())
    assert first["reason"] == 'a"\n job=forged event=forged %s, so it waits' and "job" not in first
    assert second["reason"] == "it does not pass the rules in force"
    assert third["message"] == "no event at all" and "event" not in third


def test_an_error_in_json_is_told_in_the_same_words(as_json: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = as_json
    try:
        failing()
    except ValueError as error:
        logger.error("event=unexpected", exc_info=error)
    told = json.loads(out.getvalue())
    assert told["trace"][0] == "builtins.ValueError" and "zebra" not in out.getvalue()


# --- settings ----------------------------------------------------------------------------------------------------


def test_modules_have_levels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    out, due, store = io.StringIO(), logging.getLogger("warmlane.due"), logging.getLogger("warmlane.store")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    monkeypatch.setattr(sys, "excepthook", None)
    try:
        logs.begin("warning, due=debug,store=ERROR", "json", part="api", stream=out)
        due.debug("event=a")
        store.warning("event=b")
        logging.getLogger("warmlane.api").info("event=c")
        logging.getLogger("warmlane.api").warning("event=d")
    finally:
        due.setLevel(logging.NOTSET)
        store.setLevel(logging.NOTSET)
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["a", "d"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("LEVEL", "LOUD", "GATEWAY_LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, and module=LEVEL"),
        ("LEVEL", "INFO,eud=DEBUG", "GATEWAY_LOG_LEVEL names modules of the log, like due=DEBUG: there are admission"),
        ("FORMAT", "xml", "GATEWAY_LOG_FORMAT must be human or json"),
    ],
)
def test_a_wrong_setting_is_a_sentence(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GATEWAY_LOG_{name}", value)
    with pytest.raises(SettingsInvalid, match=re.escape(words)):
        read_settings(BrokerSettings)


# --- when it is written ------------------------------------------------------------------------------------------


class Pipe(io.StringIO):
    """A stream that counts its writes, and breaks when told."""

    writes, broken = 0, False

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError
        self.writes += 1
        return super().write(text)


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, Pipe]]:
    pipe = Pipe()
    handler = Writer(pipe)
    handler.setFormatter(logs.Formatter("%(message)s"))
    logger = logging.getLogger("test of the writer")
    logger.handlers[:], logger.propagate, logger.level = [handler], False, logging.INFO
    yield logger, pipe
    handler.close()


async def test_lines_wait_for_each_other_and_are_written_together(written: tuple[logging.Logger, Pipe]) -> None:
    logger, pipe = written
    for number in range(5):
        logger.info("event=a number=%d", number)
    assert pipe.getvalue() == ""
    await until(lambda: pipe.getvalue(), what="the lines are written", timeout_s=2)
    assert pipe.getvalue().count("\n") == 5 and pipe.writes == 1
    logger.info("event=b")
    await until(lambda: "event=b" in pipe.getvalue(), what="the next one too", timeout_s=2)


async def test_trouble_is_written_at_once_behind_what_came_before(written: tuple[logging.Logger, Pipe]) -> None:
    logger, pipe = written
    logger.info("event=a")
    logger.warning("event=b")
    assert pipe.getvalue() == "event=a\nevent=b\n" and pipe.writes == 1


async def test_no_more_lines_wait_than_may(
    written: tuple[logging.Logger, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, pipe = written
    monkeypatch.setattr(log_writer, "WAITING_MAX", 3)
    for _ in range(4):
        logger.info("event=a")
    assert pipe.getvalue().count("\n") == 4


async def test_the_end_of_a_process_writes_what_waits(written: tuple[logging.Logger, Pipe]) -> None:
    logger, pipe = written
    logger.info("event=a")
    logger.handlers[0].flush()  # as `logging.shutdown` does
    assert pipe.getvalue() == "event=a\n"


def test_outside_of_a_loop_nothing_waits(written: tuple[logging.Logger, Pipe]) -> None:
    logger, pipe = written
    logger.info("event=a")
    assert pipe.getvalue() == "event=a\n"


def test_a_line_that_cannot_be_told_or_that_nobody_hears_ends_nobody(
    written: tuple[logging.Logger, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, pipe = written
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger.info("event=a number=%d", "none")
    pipe.broken = True
    logger.info("event=b")
    pipe.broken = False
    logger.info("event=c")
    assert pipe.getvalue() == "event=c\n"


# --- the vocabulary ----------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str]]:
    """Every message that the code logs, and where."""
    for room in ("api", "broker", "workers"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                    continue
                of: Any = node.func.value
                spoken = node.func.attr in ("debug", "info", "warning", "error", "exception", "critical")
                if getattr(of, "id", "") == "log" and spoken and isinstance(node.args[0], ast.Constant):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", str(node.args[0].value)


LINES = dict(calls())


def test_every_line_is_an_event_with_named_values() -> None:
    assert len(LINES) > 80
    for place, message in LINES.items():
        assert re.match(r"event=(%s|[a-z_]+)( [a-z_]+=|$)", message), f"{place}: {message}"


def test_every_line_that_concerns_a_job_says_which_and_is_in_the_vocabulary() -> None:
    known = log_words.TRANSITIONS | log_words.OTHERS
    said = {message.split()[0].removeprefix("event="): (place, message) for place, message in LINES.items()}
    of_jobs = {word for word, (_, message) in said.items() if " job=" in message}
    assert known.keys() == of_jobs | {"unexpected"} and "%s" not in of_jobs
    for place, message in LINES.items():
        word = message.split()[0].removeprefix("event=")
        if word in known and word != "unexpected":  # which may also be over a request that is no job yet
            assert message.startswith(f"event={word} job="), f"{place}: {message}"


def test_each_transition_of_the_table_has_its_line_in_one_place() -> None:
    """One line for each, whoever asks for it: the noun that runs the verb logs it."""
    events = {event.value for event in Event}
    assert log_words.TRANSITIONS.keys() == events | {"submit", "put_back"}
    for word in log_words.TRANSITIONS:
        places = [place for place, message in LINES.items() if message.startswith(f"event={word} ")]
        assert len(places) == 1 and places[0].startswith(("broker/lanes.py", "broker/jobs.py")), (word, places)


def test_every_module_can_have_a_level() -> None:
    code = "".join(path.read_text() for room in ("api", "broker", "workers") for path in (ROOT / room).rglob("*.py"))
    named = re.findall(r'getLogger\("warmlane\.(\w+)"\)', code)
    assert sorted(set(named)) == logs.MODULES and "getLogger(__name__)" not in code


async def test_a_thread_beside_the_loop_leaves_the_loops_timer_alone() -> None:
    """It is the loop's alone to cancel: uvloop's would be broken by another thread. The line is out at once all the
    same, and those that waited with it."""
    out = io.StringIO()
    writer = Writer(out)
    writer.setFormatter(logs.Formatter("%(message)s"))
    cancelled_in: list[str] = []

    class Timer:
        def cancel(self) -> None:
            cancelled_in.append(threading.current_thread().name)

        def cancelled(self) -> bool:
            return False

    loop = asyncio.get_running_loop()
    with mock.patch.object(loop, "call_later", lambda *_: Timer()):
        writer.handle(logging.makeLogRecord({"msg": "from the loop", "levelno": logging.INFO}))
        assert out.getvalue() == ""
        thread = threading.Thread(
            target=writer.handle, args=(logging.makeLogRecord({"msg": "from beside", "levelno": logging.WARNING}),)
        )
        thread.start()
        await asyncio.to_thread(thread.join)
    assert out.getvalue() == "from the loop\nfrom beside\n" and not cancelled_in
    writer.handle(logging.makeLogRecord({"msg": "later", "levelno": logging.WARNING}))
    assert out.getvalue().endswith("later\n") and cancelled_in == [threading.current_thread().name]
