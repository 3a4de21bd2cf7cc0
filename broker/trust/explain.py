"""A dry run: which lanes a request may use now, and why not the others. Nothing is submitted, woken or written down."""

from dataclasses import dataclass

from broker import admission, errors
from broker.hosts import Fleet
from broker.policies import Active
from broker.policy import Lane
from broker.records import JobRecord
from broker.trust import door
from broker.trust.content import Content
from broker.trust.secrets import CannotScan
from broker.trust.verdict import passed


@dataclass(frozen=True)
class Word:
    """What admission would say to one lane. `may` = it may be used; whether there is room decides the moment."""

    lane: str
    model: str
    trust: str
    may: bool
    code: str
    why: str


@dataclass(frozen=True)
class Explained:
    """The lanes in the order in which they are tried, and what the request holds, where that was looked into."""

    asked: str
    lanes: tuple[Word, ...]
    holds: tuple[str, ...]


async def explain(active: Active, fleet: Fleet, job: JobRecord, body: bytes, *, may_leave: bool = True) -> Explained:
    """Says it; raises UnknownModel. A remote lane is looked at even where the request gives no consent: the content's
    verdict is what somebody asks for who thinks of giving it."""
    asked = active.policy.route(
        job.asked,
        caller=job.caller,
        endpoint=job.endpoint,
        prompt_tokens=job.longest or job.tokens,
        priority="batch" if job.priority == "batch" else "interactive",
    )
    lanes = active.policy.candidates(asked)
    content, cannot = None, ""
    if any(lane.trust == "remote" for lane in lanes):
        try:
            content = await door.look_into(job, body, active.policy.remote)
        except CannotScan as why:
            cannot = str(why)
    surely = not admission.somewhere_at_ease(active, fleet, job, lanes, may_leave=may_leave)
    words = [_word(active, fleet, job, lane, content, cannot, may_leave=may_leave, surely=surely) for lane in lanes]
    return Explained(asked.name, tuple(words), _holds(content))


def _word(
    active: Active, fleet: Fleet, job: JobRecord, lane: Lane, content: Content | None, cannot: str, *,
    may_leave: bool, surely: bool,
) -> Word:  # fmt: skip
    refusals: list[errors.Refused] = []
    if lane.trust == "remote":
        if consent := door.no_consent(job, lane, may_leave=may_leave):
            refusals.append(consent)
        against = door.verdict(content, active, lane).against if content is not None else (cannot,)
        if against:
            refusals.append(door.refusal(lane, against))
    other = admission.refuses(active, fleet, job, lane, may_leave=may_leave, surely=surely)
    if other is not None and not isinstance(other, errors.TrustZoneRefused):
        refusals.append(other)
    if refusals:
        code = refusals[0].code
        return Word(lane.name, lane.model, lane.trust, False, code, "; ".join(str(refusal) for refusal in refusals))
    why = f"{lane.model} is {fleet.view(lane.name, active).availability}"
    if content is not None and lane.trust == "remote":
        why += f", and the request passes {', '.join(passed(content))}"
    return Word(lane.name, lane.model, lane.trust, True, "", why)


def _holds(content: Content | None) -> tuple[str, ...]:
    if content is None:
        return ()
    found = [f"{content.size} bytes", *(f"{noted.kind}: {noted}" for noted in content.held)]
    found += [f"secret: {noted.kind} at {noted}" for noted in content.secrets]
    return (*found, *(f"redacted: {name} x{count}" for name, count in content.redacted))
