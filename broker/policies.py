"""The active policy: Redis holds it, every process reads it from there and follows it without a restart.

One that is of a later version of ours, with words that this one does not know, changes nothing here: a part goes on by
the policy that it has, and what must be decided under the active one waits until it is upgraded or the policy is
another.

A lane that a new policy no longer has is *retiring*: it admits nothing, its waiting jobs are promoted where they may
be, or served from its last definition, and it goes when it is empty.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from broker import errors
from broker.policy import Lane, Model, Policy
from broker.store import Store

log = logging.getLogger("warmlane.policy")

FOLLOW_EVERY_S = 0.4
HISTORY_KEPT = 20
APPLY_TRIES = 5


@dataclass(frozen=True)
class Active:
    """The policy as of one version, together with the lanes that are on their way out."""

    policy: Policy
    version: int
    revision: int = 0
    made_up: bool = False
    retiring: dict[str, tuple[Lane, Model]] = field(default_factory=dict)

    def lane(self, name: str) -> Lane | None:
        """Finds a lane, retiring ones included."""
        return self._lanes.get(name)

    def lanes(self) -> dict[str, Lane]:
        """Every lane that may hold jobs."""
        return dict(self._lanes)

    def model(self, name: str) -> Model | None:
        """Finds a model, those of retiring lanes included."""
        return self._models.get(name)

    def models(self) -> dict[str, Model]:
        """Every model that may have to serve."""
        return dict(self._models)

    def wakes(self, model: str, *, priority: str, now_ms: int) -> bool:
        """Whether a job of this priority wakes a model that is cold."""
        known = self._models.get(model)
        return priority != "batch" or known is None or known.wakes_for_batch(now_ms)

    def lanes_of(self, model: str) -> list[str]:
        """The lanes that lead to a model, in a fixed order: the scripts count its running jobs over them."""
        return self._lanes_of.get(model, [])

    # asked for several times per request, and never different for one version

    @cached_property
    def _lanes(self) -> dict[str, Lane]:
        return {name: lane for name, (lane, _) in self.retiring.items()} | self.policy.all_lanes()

    @cached_property
    def _models(self) -> dict[str, Model]:
        return {lane.model: model for lane, model in self.retiring.values()} | dict(self.policy.models)

    @cached_property
    def _lanes_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self._lanes):
            found.setdefault(self._lanes[name].model, []).append(name)
        return found


class PolicyBook:
    """Reads, follows and changes the active policy."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.unreadable: errors.PolicyUnreadable | None = None
        """Why the active policy is not the one at hand."""
        self._active: Active | None = None
        self._seen: int | None = None  # the revision that was read last, or could not be
        self._listeners: list[Callable[[Active], None]] = []
        self._past: list[tuple[int, Policy | None]] = []
        self._past_of: Active | None = None
        self._reading = asyncio.Lock()  # of two reads at once, the later to end may have read the older policy

    @property
    def active(self) -> Active:
        """The policy that this process has: the active one, unless that is unreadable."""
        if self._active is None and self.unreadable is not None:
            raise errors.ModelUnavailable(str(self.unreadable))
        if self._active is None:
            raise errors.ModelUnavailable("no policy has been applied yet: run `gateway policy apply FILE`")
        return self._active

    @property
    def present(self) -> bool:
        """Whether any policy was ever read."""
        return self._active is not None

    def on_change(self, listener: Callable[[Active], None]) -> None:
        """Calls `listener` after each change, and at once if there is a policy already."""
        self._listeners.append(listener)
        if self._active is not None:
            listener(self._active)

    @property
    def unread(self) -> int:
        """The version of an active policy that cannot be read here, 0 = it can."""
        return self.unreadable.version if self.unreadable is not None else 0

    @contextmanager
    def deciding(self) -> Iterator[Active]:
        """Gives the policy to judge a request by. What an older one than the active one refuses, that may let in: then
        its refusal is none, and PolicyUnreadable says to come back."""
        try:
            yield self.active
        except errors.Refused:
            if self.unreadable is not None:
                raise self.unreadable.anew() from None
            raise

    async def reload(self) -> Active | None:
        """Reads the active policy if it changed; None while there is none. Raises PolicyUnreadable."""
        found = await self.catch_up()
        if self.unreadable is not None:
            raise self.unreadable.anew()
        return found

    async def catch_up(self) -> Active | None:
        """The same, but one that cannot be read leaves the policy at hand, and is told in `unreadable`."""
        async with self._reading:
            store = self._store
            revision = await store.command("HGET", store.keys.policy, "revision")
            if revision is None:
                self.unreadable, self._seen = None, None
            if revision is None or int(revision) == self._seen:
                return self._active
            fields = {k.decode(): v.decode() for k, v in (await store.hash(store.keys.policy)).items()}
            try:
                self._active = await asyncio.to_thread(_parse, fields)
            except (TypeError, ValueError, KeyError) as e:  # written by another version, or by hand
                self.unreadable = _unreadable(fields, [str(e)])
            except errors.PolicyInvalid as e:
                self.unreadable = _unreadable(fields, e.problems)
            else:
                self.unreadable = None
            self._seen = int(fields.get("revision", revision))
        if self.unreadable is None and self._active is not None:
            for listener in self._listeners:
                listener(self._active)
        return self._active

    async def follow(self) -> None:
        """Keeps up with changes until cancelled; a new policy is in force here within half a second."""
        told: errors.PolicyUnreadable | None = None
        while True:
            try:
                await self.catch_up()
            except errors.BrokerUnavailable as e:
                log.debug("event=policy_retry reason=%s", e)
            if self.unreadable is not told:
                told = self.unreadable
                self._tell(told)
            await asyncio.sleep(FOLLOW_EVERY_S)

    def _tell(self, unreadable: errors.PolicyUnreadable | None) -> None:
        here = self._active.version if self._active is not None else None
        if unreadable is None:
            log.info("event=policy_readable version=%s", here)
        else:
            why = "; ".join(unreadable.problems)
            log.error("event=policy_unreadable version=%d version_kept=%s reason=%s", unreadable.version, here, why)

    async def apply(self, text: str, *, by: str = "cli", made_up: bool = False) -> int:
        """Validates a policy and makes it the active one; gives its version. The same policy again changes nothing. One
        that cannot be read is replaced as if there had been none: a lane that only it had does not retire."""
        policy = Policy.parse(text)
        store = self._store
        for _ in range(APPLY_TRIES):
            before = await self.catch_up()
            known = self.unread or (before.version if before is not None else 0)
            anew = self.unreadable is not None
            retiring = _retiring(before, policy) if before is not None and not anew else {}
            flat = [x for name, kept in retiring.items() for x in (name, kept)]
            version_read = int(await store.command("HGET", store.keys.policy, "version") or 0)
            if known and version_read not in (0, known):  # 0: a Redis that lost it all
                continue
            args = [store.now_arg(), version_read, text, policy.digest, by, int(made_up), HISTORY_KEPT, int(anew)]
            try:
                version = await store.run("policy_apply", [store.keys.policy], [*args, *flat])
            except errors.StalePolicy:
                continue
            await self.reload()
            return int(version)
        raise errors.StalePolicy("the policy changes faster than this one could be applied; try again")

    async def history(self) -> list[dict[str, Any]]:
        """Lists the last versions, newest first: version, applied_at (ms), applied_by, digest, text."""
        fields = await self._store.hash(self._store.keys.policy)
        found = [json.loads(v) for k, v in fields.items() if k.startswith(b"history:")]
        return sorted(found, key=lambda h: -int(h["version"]))

    async def since(self, at_ms: int) -> list[Policy]:
        """Gives the earlier policies that were in force at that moment or after it, newest first, as far as the history
        goes back."""
        active = self.active
        if self._past_of is not active:
            history = [past for past in await self.history() if int(past["version"]) <= active.version]
            self._past = await asyncio.to_thread(_read_again, history)
            self._past_of = active
        begun = [applied_at <= at_ms for applied_at, _ in self._past]
        until = begun.index(True) + 1 if True in begun else len(begun)
        return [policy for _, policy in self._past[1:until] if policy is not None]

    async def rollback(self, version: int, *, by: str = "cli") -> int:
        """Makes the text of an earlier version the active one, as a new version."""
        for past in await self.history():
            if int(past["version"]) == version:
                return await self.apply(past["text"], by=by)
        raise errors.BadRequest(
            f"version {version} is not in the history (the last {HISTORY_KEPT} are kept)", "version"
        )


def _retiring(before: Active, policy: Policy) -> dict[str, str]:
    """Last definitions of the lanes that `policy` no longer has, as stored: one JSON object each."""
    lanes = policy.all_lanes()
    gone: dict[str, str] = {}
    for name, lane in before.lanes().items():
        if name in lanes:
            continue
        model = before.model(lane.model)
        if model is None:
            continue
        definition = {"lane": asdict(replace(lane, retiring=True)), "model": model.model_dump(by_alias=True)}
        gone[name] = json.dumps(definition)
    return gone


def _unreadable(fields: dict[str, str], problems: list[str]) -> errors.PolicyUnreadable:
    version = fields.get("version", "")
    return errors.PolicyUnreadable(int(version) if version.isdigit() else 0, problems)


def _read_again(history: list[dict[str, Any]]) -> list[tuple[int, Policy | None]]:
    """When each version came into force and what it said, None where this version of the gateway cannot read it."""
    found: list[tuple[int, Policy | None]] = []
    for past in history:
        try:
            policy = Policy.parse(past["text"])
        except errors.PolicyInvalid:
            policy = None
        found.append((int(past["applied_at"]), policy))
    return found


def _parse(fields: dict[str, str]) -> Active:
    retiring = {}
    for name, value in fields.items():
        if name.startswith("retiring:"):
            kept = json.loads(value)
            retiring[name.removeprefix("retiring:")] = (Lane(**kept["lane"]), Model.model_validate(kept["model"]))
    return Active(
        policy=Policy.parse(fields["text"]),
        version=int(fields["version"]),
        revision=int(fields["revision"]),
        made_up=fields.get("made_up") == "1",
        retiring=retiring,
    )
