"""A log tells what happened and where, in one line for each event, and never what a client said."""

import io
import logging
import sys

import pytest

from broker import errors, logs


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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x1b[2J", "\x85", "\u2028"])
def test_nobody_writes_a_line_of_ours(log: tuple[logging.Logger, io.StringIO], end: str) -> None:
    logger, out = log
    logger.warning("event=refused reason=%s", f"a{end}2026-01-01 00:00:00,000 INFO warmlane.api event=forged")
    assert out.getvalue().splitlines()[0].endswith("event=forged") and len(out.getvalue().splitlines()) == 1


def test_an_error_that_ends_a_process_is_told_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    logs.begin("INFO", io.StringIO())
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
