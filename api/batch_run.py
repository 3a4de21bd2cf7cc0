"""Runs a file of requests as asynchronous jobs, a bounded number at once. No terminal.

Nothing is kept here that a kill could lose: a line's key is made of the line, so a second run that hands it in again is
led to the job that lives or is done; and a line whose output stands in the file is not handed in at all.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from api.batch_files import Asked, BadLine, Line, Requests, Written
from api.exit_codes import USAGE, Failed
from api.jobs_client import JobsClient, Refusal, Result, param_of
from api.patience import GaveUp, Patience

FORGOTTEN_MAX: Final = 3
"""How often a line is handed in anew because the gateway no longer knows its job."""

_FATAL: Final = {"invalid_api_key": 1, "not_found": 1, "idempotency_mismatch": USAGE}
"""Refusals that any other line would hear too, and the exit codes that they end the run with."""


@dataclass
class Tally:
    """How far a run is."""

    total: int = 0
    done: int = 0  # with an output, those of earlier runs too
    failed: int = 0
    under_way: int = 0  # jobs that were handed in and are not known to have ended

    @property
    def ended(self) -> int:
        return self.done + self.failed

    @property
    def left(self) -> int:
        return self.total - self.ended


@dataclass(frozen=True)
class Options:
    """What all jobs of a run have in common, in the words of POST /v1/jobs, and how many there are at once."""

    concurrency: int = 32
    order: dict[str, Any] = field(default_factory=dict)


class BatchRun:
    """One run: from the lines that are not dealt with to the end of each."""

    def __init__(
        self,
        jobs: JobsClient,
        requests: Requests,
        output: Written,
        errors: Written,
        *,
        options: Options,
        patience: Patience,
        given_up: Mapping[str, str] | None = None,
    ) -> None:
        """`given_up`: jobs of an earlier run that came to nothing, "" = there was none, by the ids of the lines that
        are tried again. Their failures stand in `errors` until these have their new outcomes."""
        self._jobs, self._requests, self._output, self._errors = jobs, requests, output, errors
        self._options, self._patience = options, patience
        self._given_up = given_up or {}
        errors.take_away(output.ids & errors.ids)  # of a run that was killed between the two
        self._ids = {line.id for line in requests.lines}
        done, failed = output.ids & self._ids, (errors.ids & self._ids) - self._given_up.keys()
        self.tally = Tally(len(self._ids), len(done), len(failed))
        self._left = (line for line in requests.lines if line.id not in done | failed)
        self._gave_up: GaveUp | None = None

    @property
    def waits_for(self) -> str:
        """Why nothing goes on just now, "" while something does."""
        return self._patience.waits_for

    async def run(self) -> None:
        """Deals with every line; raises Failed where that cannot be, once what is under way has ended or is lost."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._options.concurrency, self.tally.left)):
                    group.create_task(self._one_after_another(self._left))
        except* Failed as failures:
            raise failures.exceptions[0] from None
        if self._gave_up is not None:
            raise self._gave_up
        self._errors.take_away(self._given_up.keys() - self._ids)  # lines that the file no longer has

    async def _one_after_another(self, lines: Iterator[Line]) -> None:
        for line in lines:
            if self._gave_up is not None:
                return
            try:
                await self._deal_with(line)
            except GaveUp as enough:  # the others may still get on with what they have handed in
                self._gave_up = enough

    async def _deal_with(self, line: Line) -> None:
        try:
            asked = self._requests.read(line)
        except BadLine as bad:
            return self._note_failure(line, {"error": {"code": "invalid_line", "message": str(bad)}})
        for _ in range(FORGOTTEN_MAX):
            try:
                job, result = await self._generated(line, asked)
            except Refusal as refusal:
                if refusal.code == "job_not_found":
                    self.tally.under_way -= 1
                    continue
                if refusal.code in _FATAL:
                    raise Failed(_fatal(refusal, line), _FATAL[refusal.code]) from None
                if param_of(refusal.told) in self._options.order:  # no fault of this line: each has the run's options
                    raise Failed(str(refusal), USAGE) from None
                return self._note_failure(line, _response(asked, "", Result(refusal.status, refusal.told)))
            told = _response(asked, job["id"], result)
            if not result.good:
                return self._note_failure(line, told)
            if before := self._given_up.get(line.id):  # its letter asks for what is done now
                await self._patience.answered(partial(self._jobs.let_go, before))
            return self._note_output(line, told)
        gone = {"code": "job_not_found", "message": "the gateway forgot its job again and again"}
        self._note_failure(line, {"custom_id": asked.custom_id, "error": gone})

    async def _generated(self, line: Line, asked: Asked) -> tuple[dict[str, Any], Result]:
        """Hands a line in, or finds its job, and waits for its end; raises Refusal, GaveUp."""
        order = json.dumps({"endpoint": asked.url, "body": asked.body, **self._options.order}).encode()
        answered = self._patience.answered
        job = await answered(partial(self._jobs.submit, order, key=line.id))
        self.tally.under_way += 1
        job = await self._patience.until_ended(self._jobs, job)
        result = await answered(partial(self._jobs.result, job["id"]))
        self.tally.under_way -= 1
        return job, result

    def _note_output(self, line: Line, told: dict[str, Any]) -> None:
        self._output.add(line.id, told)
        self._errors.take_away([line.id])
        self.tally.done += 1

    def _note_failure(self, line: Line, told: dict[str, Any]) -> None:
        self._errors.add(line.id, {"custom_id": None, "response": None, "error": None} | told)
        self.tally.failed += 1


def _response(asked: Asked, job_id: str, result: Result) -> dict[str, Any]:
    """A line of OpenAI's batch output; the request's id is that of its job."""
    response = {"status_code": result.status, "request_id": job_id, "body": result.body}
    return {"custom_id": asked.custom_id, "response": response, "error": None}


def _fatal(refusal: Refusal, line: Line) -> str:
    if refusal.code == "idempotency_mismatch":
        return (
            f"Line {line.number} was handed in before, from this file or another, with other options: say the same "
            "ones, change its custom_id, or wait until its job is no longer kept."
        )
    if refusal.code == "not_found":
        return "This gateway has no jobs to hand in: it is too old."
    return str(refusal)
