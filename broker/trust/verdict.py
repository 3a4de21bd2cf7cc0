"""Asks the policy's `remote:` rules whether a request may go to one model, and names the rules by a digest. Pure."""

import hashlib
import json
from collections.abc import Iterable

from broker.policy import Model
from broker.policy.remote import Remote, narrowed
from broker.trust.content import Content, Noted
from broker.trust.secrets import CONFIDENCE, scanner_version

JUDGE = 1
"""Raised when the judge itself comes to judge differently: what an older one let pass is judged anew."""

NAMED_MAX = 3

_WORDS = {
    "systemPrompts": "a system prompt",
    "toolOutput": "tool output",
    "fileContext": "file context",
    "images": "an image",
}


def rules_of(remote: Remote, model: Model) -> Remote:
    """The rules for one model."""
    return narrowed(remote, model.remote)


def digest_of(remote: Remote, name: str, model: Model) -> str:
    """Names the rules for one model and where it leads: a verdict holds under this digest and under no other."""
    said = {
        "judge": [JUDGE, scanner_version(), CONFIDENCE],
        "rules": rules_of(remote, model).model_dump(mode="json"),
        "to": [name, model.backend, model.url, model.model],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def why_not(content: Content, rules: Remote) -> list[str]:
    """Says what keeps a request from leaving, as parts of a sentence; none = it may leave."""
    found = []
    if content.size > rules.max_bytes:
        found.append(f"its body is longer ({content.size} bytes) than may leave (remote.maxBytes {rules.max_bytes})")
    if content.secrets:
        found.append(f"it seems to hold a secret: {_places(content.secrets, kinds=True)}")
    if unread := content.of("unreadable"):
        found.append(f"it holds what cannot be looked into: {_places(unread)}")
    for kind, words in _WORDS.items():
        if kind not in rules.allow and (held := content.of(kind)):
            found.append(f"it holds {words}, which the policy does not let out (remote.allow): {_places(held)}")
    return found


def passed(content: Content) -> list[str]:
    """Names the rules that a request has passed, for the audit record."""
    return ["maxBytes", "secrets", *(kind for kind in content.kinds if kind in _WORDS)]


def _places(noted: Iterable[Noted], *, kinds: bool = False) -> str:
    words = [f"{one.kind} at {one}" if kinds else str(one) for one in noted]
    more = f" and {len(words) - NAMED_MAX} more" if len(words) > NAMED_MAX else ""
    return ", ".join(words[:NAMED_MAX]) + more
