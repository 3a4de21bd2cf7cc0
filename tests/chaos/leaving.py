"""Carries out what `leavers` draws against one gateway, and says what of it was not as it should be."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from broker.frames import replay
from broker.lifecycle import State
from broker.records import JobRecord
from broker.store import Store
from tests.chaos.leavers import RETRY_AFTER_S, STAY, Answer, Call, Leave, Plan, ask, request
from tests.support.heard import CHAT, COMPLETIONS, RESPONSES, STREAMING, Heard, hear

AT_ONCE = 32
PIECE_BYTES = 160
"""About what a piece of an answer takes on the wire."""
WAITS_S = 0.4
GONE_MS_MAX = 2_500
"""A job that nobody waits for has ended after its grace and this: a second is promised, the rest is a busy machine."""


@dataclass
class Outcome:
    """What one client did and heard."""

    plan: Plan
    answers: list[Answer] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    served: bool = False
    beats: int = 0
    deleted: bool = False
    gone_at_ms: float = 0.0
    """When its last connection was closed, by the clock that Redis has too."""
    requests: int = 1
    resumed: int = 0

    def wrong(self, words: str) -> None:
        plan = self.plan
        self.found.append(f"{plan.told.tag} ({plan.way}, {plan.path}, stream={plan.stream}, {plan.headers}): {words}")


@dataclass
class Leaving:
    """Many clients at once, and what they heard."""

    url: str
    store: Store
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, numbers: range) -> None:
        """Lets these clients come and go, some at once, each when one before it has gone."""
        left = iter(numbers)

        async def one_by_one() -> None:
            for number in left:
                self.outcomes.append(await self.go(Plan.drawn(self.seed, number)))

        async with asyncio.TaskGroup() as tasks:
            for runner in range(AT_ONCE):
                tasks.create_task(one_by_one(), name=f"leaver {runner}")

    async def go(self, plan: Plan) -> Outcome:
        """Carries out one plan."""
        outcome = Outcome(plan)
        way = _WAYS[plan.way]
        await way(self, outcome)
        outcome.gone_at_ms = time.time() * 1000
        for answer in outcome.answers:
            await self._judge(outcome, answer)
        return outcome

    @property
    def wrong(self) -> list[str]:
        return [words for outcome in self.outcomes for words in outcome.found]

    def figures(self) -> dict[str, object]:
        """What happened, in numbers."""
        answers = [answer for outcome in self.outcomes for answer in outcome.answers]
        return {
            "clients": len(self.outcomes),
            "connections": len(answers),
            "served": sum(outcome.served for outcome in self.outcomes),
            "heartbeats": sum(outcome.beats for outcome in self.outcomes),
            "left": sum(answer.left for answer in answers),
            "resumed": sum(outcome.resumed for outcome in self.outcomes),
            "more requests": sum(outcome.requests - 1 for outcome in self.outcomes),
            "ways": dict(Counter(outcome.plan.way for outcome in self.outcomes)),
        }

    async def _stay(self, outcome: Outcome) -> None:
        call = await Call.to(self.url)
        await call.send(_bytes(outcome.plan))
        outcome.answers.append(await call.answer())
        call.leave(rst=outcome.plan.rst)

    async def _twice(self, outcome: Outcome) -> None:
        """A second request on the same connection, which is not waited for."""
        plan = outcome.plan
        call = await Call.to(self.url)
        await call.send(_bytes(plan))
        outcome.answers.append(await call.answer())
        if outcome.answers[-1].whole:
            outcome.requests += 1
            await call.send(request("POST", plan.path, plan.body, {"x-session-affinity": plan.told.tag}))
            await call.answer(Leave(after_s=0.001 + plan.at * WAITS_S))
        call.leave(rst=plan.rst)

    async def _in_the_head(self, outcome: Outcome) -> None:
        plan = outcome.plan
        await self._cut_short(outcome, round(plan.at * (len(_bytes(plan)) - len(plan.body))))

    async def _in_the_body(self, outcome: Outcome) -> None:
        plan = outcome.plan
        await self._cut_short(outcome, len(_bytes(plan)) - round((1 - plan.at) * len(plan.body)) - 1)

    async def _cut_short(self, outcome: Outcome, size: int) -> None:
        call = await Call.to(self.url)
        await call.send(_bytes(outcome.plan)[:size])
        await asyncio.sleep(outcome.plan.dice.choice((0, 0.01)))
        call.leave(rst=outcome.plan.rst)

    async def _behind_it(self, outcome: Outcome) -> None:
        await self._visit(outcome, Leave(after_s=outcome.plan.dice.choice((0.0005, 0.002, 0.005))))

    async def _while_it_waits(self, outcome: Outcome) -> None:
        await self._visit(outcome, Leave(after_s=0.001 + outcome.plan.at * WAITS_S))

    async def _at_the_first_byte(self, outcome: Outcome) -> None:
        await self._visit(outcome, Leave(after_bytes=1))

    async def _in_the_answer(self, outcome: Outcome) -> None:
        await self._visit(outcome, _somewhere(outcome.plan))

    async def _half(self, outcome: Outcome) -> None:
        """Closes its half while it waits: the api takes that for a hang-up, and need not answer any more."""
        plan = outcome.plan
        call = await Call.to(self.url)
        await call.send(_bytes(plan))
        answer = await call.answer(Leave(after_s=0.001 + plan.at * WAITS_S))
        if not answer.whole:
            call.half_close()
            await call.answer()
            answer.left = not answer.whole
        outcome.answers.append(answer)
        call.leave(rst=plan.rst)

    async def _delete(self, outcome: Outcome) -> None:
        plan = outcome.plan
        call = await Call.to(self.url)
        await call.send(_bytes(plan))
        reading = asyncio.create_task(call.answer(), name="reads what is deleted")
        if job_id := await self._job_of(call, outcome, reading):
            await asyncio.sleep(plan.at * min(1.0, plan.lasts_s + 0.1))
            outcome.deleted = True
            told = await ask(self.url, "DELETE", f"/v1/jobs/{job_id}")
            if told.status != 200:
                outcome.wrong(f"DELETE of job {job_id} answered {told.status}: {told.body!r}")
        outcome.answers.append(await reading)
        call.leave(rst=plan.rst)

    async def _follow(self, outcome: Outcome) -> None:
        """Leaves the answer, and reads the job's events instead; now and then they are read before it has left."""
        plan = outcome.plan
        call = await Call.to(self.url)
        await call.send(_bytes(plan))
        reading = asyncio.create_task(call.answer(_somewhere(plan)), name="reads what is followed")
        job_id = await self._job_of(call, outcome, reading)
        if plan.dice.random() < 0.5:
            await reading
            call.leave(rst=plan.rst)
        follows = self._events(outcome, job_id) if job_id else asyncio.sleep(0)
        await asyncio.gather(follows, self._end_of(call, outcome, reading))

    async def _end_of(self, call: Call, outcome: Outcome, reading: asyncio.Task[Answer]) -> None:
        outcome.answers.append(await reading)
        call.leave(rst=outcome.plan.rst)

    async def _try_again(self, outcome: Outcome) -> None:
        """Leaves, and comes back as an SDK does: at once or soon, with its key or with the number of its try."""
        plan = outcome.plan
        leaves = [
            Leave(after_s=0.0015),
            Leave(after_s=0.001 + plan.at * WAITS_S),
            Leave(after_bytes=1),
            _somewhere(plan),
        ]
        await self._visit(outcome, plan.dice.choices(leaves, weights=[2, 5, 1, 2])[0])
        while not outcome.answers[-1].whole:
            await asyncio.sleep(plan.dice.choice(RETRY_AFTER_S))
            leave = plan.dice.choice((STAY, STAY, leaves[1])) if outcome.requests < 4 else STAY
            headers = plan.headers
            if "x-stainless-retry-count" in headers:
                headers = headers | {"x-stainless-retry-count": str(outcome.requests)}
            outcome.requests += 1
            await self._visit(outcome, leave, again=replace(plan, headers=headers))
            if outcome.answers[-1].wrong:
                return

    async def _visit(self, outcome: Outcome, leave: Leave, *, again: Plan | None = None) -> None:
        call = await Call.to(self.url)
        await call.send(_bytes(again or outcome.plan))
        outcome.answers.append(await call.answer(leave))
        call.leave(rst=outcome.plan.dice.random() < 0.5)

    async def _job_of(self, call: Call, outcome: Outcome, reading: asyncio.Task[Answer]) -> str:
        """Finds a request's job: by the head of its answer, or earlier by its session, as an operator would."""
        plan = outcome.plan
        looks = not plan.stream or plan.dice.random() < 0.3
        while not (call.heard.job_id or reading.done()):
            if looks and (found := await self._live_job(plan.told.tag)):
                return found
            await asyncio.sleep(0.01)
        return call.heard.job_id

    async def _live_job(self, tag: str) -> str:
        keys = self.store.keys
        for job in await self.store.command("ZRANGE", keys.due, 0, -1):
            if await self.store.command("HGET", keys.job(job.decode()), "session") == tag.encode():
                return str(job.decode())
        return ""

    async def _events(self, outcome: Outcome, job_id: str) -> None:
        """Follows a job over several connections, mostly to its end; nothing may be missing between them."""
        plan, after, frames, end = outcome.plan, "", "", ""
        goes, sizes = (2, (1, 400)) if plan.dice.random() < 0.5 else (1000, (1 << 30, 400, 2000, 9000))
        while not end and goes > 0:
            goes -= 1
            call = await Call.to(self.url)
            head = {"last-event-id": after} if after else {}
            await call.send(request("GET", f"/v1/jobs/{job_id}/events", headers=head))
            size = plan.dice.choice(sizes)
            answer = await call.answer(Leave(after_bytes=size) if outcome.resumed < 12 else STAY)
            call.leave(rst=plan.dice.random() < 0.5)
            if answer.status == 204 or answer.wrong:
                outcome.wrong(f"events after {after or 'nothing'}: {answer.status} {answer.wrong}")
                return
            outcome.resumed += 1
            for block in answer.body.split(b"\n\n")[:-1]:
                told = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
                if not told:
                    continue
                if told["event"] not in ("frame", "end") or not _follows(after, told.get("id", ""), told["event"]):
                    outcome.wrong(f"event {told['event']} {told.get('id')} after {after or 'nothing'}")
                    return
                after = told["id"]
                said = json.loads(told["data"])
                if told["event"] == "frame":
                    frames += said["data"]
                else:
                    end = said["kind"]
        await self._judge_frames(outcome, job_id, frames.encode(), end)

    async def _judge_frames(self, outcome: Outcome, job_id: str, frames: bytes, end: str) -> None:
        plan = outcome.plan
        log = b"".join([frame.data async for frame in replay(self.store, job_id) if not frame.terminal])
        if frames != log if end else not log.startswith(frames):
            outcome.wrong(f"followed frames of {len(frames)} bytes, the log has {len(log)}")
        if end not in ("done", "cancelled", "") or (
            end == "cancelled" and plan.headers["x-gateway-on-disconnect"] == "keep"
        ):
            outcome.wrong(f"the followed job ended {end}")
        heard = hear(plan.path, frames + _last(plan.path, end), stream=plan.path in STREAMING, cut=end != "done")
        self._compare(outcome, heard)

    async def _judge(self, outcome: Outcome, answer: Answer) -> None:
        plan = outcome.plan
        if answer.wrong or answer.messages > 1:
            return outcome.wrong(answer.wrong or f"{answer.messages} answers to one request")
        if not answer.whole and not answer.left:
            return outcome.wrong(f"the gateway cut the answer: {answer.status} {answer.body[-80:]!r}")
        try:
            heard = hear(plan.path, answer.body, status=answer.status, stream=plan.stream, cut=not answer.whole)
            self._compare(outcome, heard)
        except (AssertionError, ValueError, KeyError) as problem:
            return outcome.wrong(f"{type(problem).__name__}: {problem}")
        if heard.error and not (outcome.deleted and heard.error == "cancelled"):
            outcome.wrong(f"was told {answer.status} {heard.error} {answer.body[-200:]!r}")
        if heard.whole and plan.stream:
            frames = [frame.data async for frame in replay(self.store, answer.job_id) if not frame.terminal]
            whole = b"".join(frames) + _last(plan.path, "done")
            same = answer.body.endswith(whole) if plan.path != RESPONSES else not heard.beats or answer.body == whole
            if not same and not (plan.path == RESPONSES and heard.beats):
                outcome.wrong(f"heard {len(answer.body)} bytes that are not the {len(whole)} of the job's log")
        outcome.served = outcome.served or heard.whole
        outcome.beats += heard.beats

    def _compare(self, outcome: Outcome, heard: Heard) -> None:
        expected = outcome.plan.expected
        if heard.text != expected if heard.whole else not expected.startswith(heard.text):
            outcome.wrong(f"heard {heard.text[-60:]!r} for {expected[max(0, len(heard.text) - 60) :][:80]!r}")


def judge_jobs(leaving: Leaving, jobs: list[JobRecord]) -> tuple[list[str], Counter[str]]:
    """What the records say of the tries: no two jobs of one request live at once where a retry should have attached.

    Gives what is wrong, and how many tries came back to their job.
    """
    of: dict[str, list[JobRecord]] = {}
    for job in sorted(jobs, key=lambda job: job.submitted_at):
        of.setdefault(job.session, []).append(job)
    found, figures = [], Counter[str]()
    for outcome in leaving.outcomes:
        plan, mine = outcome.plan, of.get(outcome.plan.told.tag, [])
        for job in mine:
            late_ms = job.ended_at - outcome.gone_at_ms - max(0, job.grace_ms)
            if job.grace_ms >= 0 and late_ms > GONE_MS_MAX:
                found.append(f"{plan.told.tag}: job {job.id} lived for {late_ms:.0f} ms when nobody could want it")
        if len(mine) > outcome.requests:
            found.append(f"{plan.told.tag}: {len(mine)} jobs of {outcome.requests} requests")
        if plan.way != "try again":
            continue
        for earlier, later in pairwise(mine):
            if "idempotency-key" in plan.headers and later.submitted_at < earlier.ended_at:
                found.append(f"{plan.told.tag}: jobs {earlier.id} and {later.id} of one Idempotency-Key at once")
            if "idempotency-key" in plan.headers and earlier.state is State.DONE:
                found.append(f"{plan.told.tag}: job {later.id} for a key whose job {earlier.id} is done")
        figures["retries"] += outcome.requests - 1
        figures["came back"] += outcome.requests - len(mine) if mine else 0
    return found, figures


def _bytes(plan: Plan) -> bytes:
    return request("POST", plan.path, plan.body, plan.headers)


def _somewhere(plan: Plan) -> Leave:
    """A place in the answer: after so many bytes of a stream, or a while into the making of an object."""
    if plan.stream:
        return Leave(after_bytes=1 + round(plan.at * plan.told.pieces * PIECE_BYTES))
    return Leave(after_s=0.001 + plan.at * (plan.lasts_s + 0.1))


def _last(path: str, end: str) -> bytes:
    """What the api adds to the frames of a whole answer."""
    return b"data: [DONE]\n\n" if end == "done" and path in (CHAT, COMPLETIONS) else b""


def _follows(after: str, now: str, event: str) -> bool:
    """Whether a frame's id comes next; a job that ended before it was claimed has its end alone, as `0-1`."""
    if not after:
        return now == "1-1" or (event, now) == ("end", "0-1")
    attempt, _, seq = after.partition("-")
    return now == f"{attempt}-{int(seq) + 1}"


_WAYS: dict[str, Callable[[Leaving, Outcome], Awaitable[None]]] = {
    "stay": Leaving._stay,
    "in the head": Leaving._in_the_head,
    "in the body": Leaving._in_the_body,
    "behind it": Leaving._behind_it,
    "while it waits": Leaving._while_it_waits,
    "at the first byte": Leaving._at_the_first_byte,
    "in the answer": Leaving._in_the_answer,
    "half": Leaving._half,
    "delete": Leaving._delete,
    "follow": Leaving._follow,
    "try again": Leaving._try_again,
    "twice": Leaving._twice,
}
