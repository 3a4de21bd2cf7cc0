"""How a part starts as a process: settings, logging, the loop, and exit codes with one sentence for each."""

import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import uvloop

from broker import collector, errors, logs, tracing
from broker.settings import SettingsInvalid, read_settings
from workers.settings import WorkerSettings

BAD_SETTING_EXIT = 2
NO_REDIS_EXIT = 3


def run(serve: Callable[[WorkerSettings], Awaitable[int]], *, part: str, quiet: Sequence[str]) -> NoReturn:
    """Runs a part until it ends, and exits with its code; the loggers in `quiet` tell only of trouble."""
    try:
        settings = read_settings(WorkerSettings)
    except SettingsInvalid as problem:
        print(problem, file=sys.stderr)
        raise SystemExit(BAD_SETTING_EXIT) from None
    logs.begin(settings.log_level, settings.log_format, part=part)
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)
    collector.settle()

    async def whole() -> int:
        return await serve(settings)

    try:
        with tracing.exporting(os.environ, part=part):
            raise SystemExit(uvloop.run(whole()))
    except errors.BrokerUnavailable as e:
        print(e, file=sys.stderr)
        raise SystemExit(NO_REDIS_EXIT) from None
