"""The door out of the machine: what admission writes onto a job that may leave, and what a claim asks of it.

A job carries its consent (`zone`, `exits`) from its first moment to its end, and beside it the last verdict on its
content: the digest of the rules that it was judged by (`judged`), the hash of the copy that would leave (`leaves`), and
what the audit record will say (`left`). A claim that leads out asks for all of them in its script, under the rules in
force. So a changed policy finds no old verdict that it would have to trust.
"""

import asyncio
import json
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from broker import errors
from broker.policies import Active
from broker.policy import Lane, Model, Trust
from broker.policy.remote import Remote
from broker.records import JobRecord
from broker.store import Store
from broker.trust.content import Content, examine, hash_of_copy, redacted
from broker.trust.secrets import CannotScan
from broker.trust.verdict import digest_of, passed, rules_of, why_not

NOWHERE = "-"
"""The digest that no verdict has: of a lane that leads nowhere, or of a runtime that leads elsewhere than its lane."""

REFUSED = "-"
"""What stands before the digest of rules that a job did not pass."""

JUDGE_S_MAX = 30.0
"""How long a request waits for its verdict; the scanner's first one in a process takes seconds."""


@dataclass(frozen=True)
class Verdict:
    """What the rules say to one request and one model; `against` is empty where it may leave."""

    digest: str
    leaves: str
    left: str
    against: tuple[str, ...]

    def onto(self, job: JobRecord) -> JobRecord:
        """The job with the verdict written on it."""
        return replace(job, judged=self.digest, leaves=self.leaves, left=self.left)


def consent(asked: bool | None, *, may_leave: bool, standing: frozenset[str]) -> tuple[Trust, str]:
    """Says whether a request may leave at all, and through which lanes, "" = any: its zone and exits.

    `asked` is what the request itself says, None = nothing. `may_leave` is the right of the caller's key, `standing`
    the lanes for which it allows that without a word, because agents can't send headers.
    """
    if not may_leave or asked is False:
        return "local", ""
    if asked:
        return "remote", ""
    return ("remote", " ".join(sorted(standing))) if standing else ("local", "")


def no_consent(job: JobRecord, lane: Lane, *, may_leave: bool = True) -> errors.TrustZoneRefused | None:
    """Says why a job may not enter a lane that leads out, whatever it holds; None for any other."""
    if lane.trust != "remote":
        return None
    if not may_leave:
        return errors.TrustZoneRefused(
            f"{lane.model} is a remote model, and the key of {job.caller} lets nothing leave the machine"
        )
    if job.zone != "remote":
        return errors.TrustZoneRefused(
            f"{lane.model} is a remote model, and the request does not allow that it leaves "
            "(X-Gateway-Allow-Remote: true)"
        )
    if job.exits and lane.name not in job.exits.split():
        return errors.TrustZoneRefused(
            f"{lane.model} is a remote model, and the key of {job.caller} allows lane {job.exits} only without "
            "X-Gateway-Allow-Remote: true"
        )
    return None


async def look_into(job: JobRecord, body: bytes, remote: Remote) -> Content:
    """Reads what a job would take out; raises CannotScan."""
    try:
        async with asyncio.timeout(JUDGE_S_MAX):
            return await asyncio.to_thread(examine, job.endpoint, body, remote)
    except TimeoutError:
        raise CannotScan(f"it was not looked through within {JUDGE_S_MAX:g} s") from None


def verdict(content: Content, active: Active, lane: Lane) -> Verdict:
    """Asks the rules in force for the model behind a lane."""
    model = active.models()[lane.model]
    rules = rules_of(active.policy.remote, model)
    left = {"bytes": content.size, "passed": passed(content), "redacted": dict(content.redacted)}
    return Verdict(
        digest_of(active.policy.remote, lane.model, model),
        content.copy_hash,
        json.dumps(left, separators=(",", ":")),
        tuple(why_not(content, rules)),
    )


def refusal(lane: Lane, against: tuple[str, ...]) -> errors.TrustZoneRefused:
    """Words for a request whose content keeps it from a lane."""
    return errors.TrustZoneRefused(
        f"{lane.model} is a remote model, and this request may not leave: {'; '.join(against)}"
    )


def asked_at_claim(active: Active, lane: Lane, runtime: Model | None) -> tuple[Trust, str, str]:
    """What a claim must know: where it leads, the digest of the rules in force, and the provider's address.

    `runtime` is the definition by which the worker's runtime runs now, which may be older than the policy's.
    """
    policys = active.models()[lane.model]
    if "remote" not in (lane.trust, runtime.trust if runtime is not None else "local"):
        return "local", NOWHERE, ""
    rules = digest_of(active.policy.remote, lane.model, policys) if lane.trust == "remote" else NOWHERE
    if runtime is not None and digest_of(active.policy.remote, lane.model, runtime) != rules:
        rules = NOWHERE
    return "remote", rules, urlsplit((runtime or policys).url or "").netloc.rpartition("@")[2]


async def judge_anew(store: Store, active: Active, job: JobRecord, lane: Lane) -> bool:
    """Judges a waiting job by the rules in force and writes the verdict on it; False where it may not leave.

    Raises CannotScan, StalePolicy, Moved, NoSuchJob. The job's consent stays as it was given.
    """
    body = await store.command("GET", store.keys.request(job.id))
    if body is None:
        raise errors.NoSuchJob(job.id)
    found = verdict(await look_into(job, body, active.policy.remote), active, lane)
    judged = REFUSED + found.digest if found.against else found.digest
    await store.run(
        "judge",
        [store.keys.job(job.id), store.keys.policy],
        [active.version, job.lane, job.entry, judged, found.leaves, found.left],
    )
    return not found.against


async def copy_that_leaves(body: bytes, remote: Remote, leaves: str) -> bytes:
    """Gives what is sent instead of the body; raises TrustZoneRefused where that is not what was judged."""
    copy, _ = await asyncio.to_thread(redacted, body, remote) if remote.redact else (body, None)
    if hash_of_copy(copy) != leaves:
        raise errors.TrustZoneRefused("what would leave is not what was judged, so it stays")
    return copy
