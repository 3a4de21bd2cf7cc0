"""What may leave by a policy, as a second opinion, and mistakes that somebody could make in each guard of the door.

The second opinion knows what each request holds, because it made it; it reads no body and asks no code of ours.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from broker import due, lanes
from broker.policy.remote import Remote
from broker.trust import content, door, secrets
from tests.model.faults import Fault, planted
from tests.support.made_up_secrets import KINDS

NEVER = "never"
HOLDS = {
    "plain": "", "system": "systemPrompts", "tool": "toolOutput", "file": "fileContext", "image": "images",
    "secret": NEVER, "strange": NEVER, "long": "long",
}  # fmt: skip
"""What each kind of request holds, as the policy's `allow` has it."""

LONG_BYTES = 3_000

TOLD = "half of an answer"
FRAME = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":"%s"}}]}\n\n' % TOLD.encode()
"""What a worker has told a client when it is lost."""


@dataclass(frozen=True)
class Rules:
    """One policy: its text, and what it says, said once more."""

    allow: tuple[str, ...] = ()
    far_only: tuple[str, ...] | None = None  # what the model `far` narrows that to
    max_bytes: int = 100_000
    redact: bool = False
    url: str = "https://one.example"
    remote: tuple[str, ...] = ("far", "cloud")

    @property
    def text(self) -> str:
        def model(name: str, **more: Any) -> dict[str, Any]:
            if name not in self.remote:
                return {"backend": "simulated", "model": name, "maxQueue": 3, "onLoss": "continue", **more}
            narrow = {"remote": {"allow": list(self.far_only)}} if name == "far" and self.far_only is not None else {}
            far = {"backend": "openai", "model": name, "url": self.url, "trust": "remote", "maxQueue": 2}
            return far | narrow | more

        models = {
            "near": model("near", fallback="far", coldStartBudgetMs=1000, maxWaitMs=60_000),
            "far": model("far", fallback="home", coldStartBudgetMs=1000, maxWaitMs=60_000),
            "home": model("home", fallback="cloud", coldStartBudgetMs=1000, maxWaitMs=60_000),
            "cloud": model("cloud", maxWaitMs=60_000),
        }
        redact = [{"name": "customer", "pattern": "ACME"}] if self.redact else []
        rules = {"allow": list(self.allow), "maxBytes": self.max_bytes, "redact": redact}
        return json.dumps({"models": models, "remote": rules, "maxLosses": 9})

    def lets(self, kind: str, lane: str) -> bool:
        """Whether a request of this kind may leave by a lane, as far as its content goes."""
        allowed = set(self.allow)
        if lane == "far" and self.far_only is not None:
            allowed &= set(self.far_only)
        holds = HOLDS[kind]
        if holds == "long":
            return self.max_bytes > LONG_BYTES + 500
        return holds == "" or holds in allowed


ALL = ("systemPrompts", "toolOutput", "fileContext", "images")
RULES = (
    Rules(),
    Rules(allow=ALL, far_only=("systemPrompts", "images")),
    Rules(allow=("systemPrompts", "toolOutput"), far_only=("systemPrompts",)),
    Rules(max_bytes=LONG_BYTES),
    Rules(redact=True, allow=("images",)),
    Rules(url="https://two.example"),
    Rules(remote=("near", "far", "cloud"), allow=ALL),
    Rules(remote=("cloud",)),
    Rules(remote=("home", "near"), allow=("toolOutput",), redact=True),
)


@dataclass(frozen=True)
class Request:
    """One request as a test makes it."""

    kind: str
    body: bytes
    zone: str
    exits: str

    def consents(self, lane: str) -> bool:
        return self.zone == "remote" and (not self.exits or lane in self.exits.split())


def body_of(kind: str, number: int, model: str) -> bytes:
    """A chat request that holds what its kind says, and a word by which it is known wherever it turns up."""
    words = f"word-{number} for ACME"
    messages: list[dict[str, Any]] = [{"role": "user", "content": words}]
    match kind:
        case "system":
            messages.insert(0, {"role": "system", "content": "be kind"})
        case "tool":
            messages.append({"role": "tool", "tool_call_id": "c", "content": words})
        case "file":
            messages[0]["content"] = f"src/app.py\n```\n{words}\n```"
        case "image":
            messages[0]["content"] = [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": "x"}}]
        case "secret":
            messages[0]["content"] = f"{words}: {KINDS['github token'](random.Random(number))}"
        case "strange":
            messages[0]["content"] = [{"type": "hologram", "text": words}]
        case "long":
            messages[0]["content"] = words + " and so on" * (LONG_BYTES // 10)
    return json.dumps({"model": model, "messages": messages}).encode()


Plant = Callable[[], AbstractContextManager[object]]


def _in_lua(name: str, verb: str, right: str, wrong: str = "") -> tuple[str, Plant]:
    return name, lambda: planted(Fault(name, (verb,), right, wrong))


def _in_python(name: str, owner: object, attribute: str, wrong: object) -> tuple[str, Plant]:
    return name, lambda: mock.patch.object(owner, attribute, wrong)


async def _sends_the_body(body: bytes, _remote: Remote, _leaves: str) -> bytes:
    return body


def _asks_the_policy_only(active: Any, lane: Any, _runtime: Any) -> Any:
    return _asked_at_claim(active, lane, None)


def _no_secrets(_text: bytes) -> list[secrets.Match]:
    return []


def _no_consent_by_key(endpoint: str, body: bytes, consent: str = "", asked: str = "") -> str:
    return _hash_of(endpoint, body, consent if asked else "local", asked)


def _no_consent_of_sdks(endpoint: str, body: bytes, consent: str = "", asked: str = "") -> str:
    return _hash_of(endpoint, body, "local" if asked else consent, asked)


@contextmanager
def _judges_once() -> Iterator[None]:
    """A worker that writes the digest of the rules in force onto whatever it should judge."""
    verdict = door.verdict

    async def anew(store: Any, active: Any, job: Any, lane: Any) -> bool:
        body = await store.command("GET", store.keys.request(job.id))
        found = verdict(await door.look_into(job, body, active.policy.remote), active, lane)
        keys = [store.keys.job(job.id), store.keys.policy]
        await store.run("judge", keys, [active.version, job.lane, job.entry, found.digest, found.leaves, found.left])
        return True

    with mock.patch.object(door, "judge_anew", anew):
        yield


def _enters_remote(self: Any, job: Any, lane: Any) -> bool:
    return True


_asked_at_claim, _hash_of = door.asked_at_claim, lanes.hash_of

FAULTS: dict[str, Plant] = dict(
    [
        _in_lua("the claim does not ask for consent", "claim", re.escape('if zone ~= "remote" then') + ".*\n"),
        _in_lua("the claim does not ask by which lane", "claim", r'if exits ~= "" and not (.*\n){3}'),
        _in_lua("the claim does not ask by which rules", "claim", r"  if judged ~= rules then .*\n"),
        _in_lua("the claim does not ask for a begun answer", "claim", r"  if tonumber\(f\[3\] or 0\) > 0 then .*\n"),
        _in_lua("the claim leaves no record", "claim", r"  redis\.call\(\"XADD\", audit(.*\n){2}"),
        _in_lua("a promotion leads out", "promote", r'if ARGV\[12\] == "remote" then .*\n(.*\n){2}'),
        _in_python("due tries to promote out", due.Due, "_may_enter", _enters_remote),
        _in_python("admission does not ask for consent", door, "no_consent", lambda *_a, **_k: None),
        _in_python("admission does not ask the rules", door, "why_not", lambda *_a: []),
        _in_python("nobody looks for secrets", secrets, "scan", _no_secrets),
        _in_python("nobody looks for files in messages", content, "file_in", lambda _text: ""),
        _in_python("a model's own rules are not asked", door, "rules_of", lambda remote, _model: remote),
        _in_python("the runtime that is held is not asked", door, "asked_at_claim", _asks_the_policy_only),
        _in_python("the body itself is sent", door, "copy_that_leaves", _sends_the_body),
        _in_python("a retry joins whatever has its key", lanes, "hash_of", _no_consent_by_key),
        _in_python("an SDK joins whatever has its body", lanes, "hash_of", _no_consent_of_sdks),
        ("who judges anew lets all pass", _judges_once),
    ]
)
