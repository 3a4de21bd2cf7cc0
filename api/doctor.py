"""What is wrong with a gateway, and how to mend it: one sentence per finding, judged from facts and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from api.status_table import duration, size
from broker.status import HostStatus, ModelStatus, Snapshot

SKEW_MS_MAX = 1_000
"""Instants are Redis'; clocks that differ by more make logs and certificates hard to believe."""

FOR_EVER = timedelta(days=1)
"""A model that Ollama keeps for longer is not about to be unloaded by it."""


_PARALLEL = {
    "ollama": "OLLAMA_NUM_PARALLEL",
    "llama.cpp": "its number of slots (-np)",
    "vllm": "--max-num-seqs",
    "simulated": "its `parallel`",
}
"""What sets how many generations a runtime runs at once."""


_SILENT = (
    "see its machine, its network and the worker's log, and start `gateway worker` there again; one that never comes "
    "back is forgotten after a day"
)


_TOO_OLD = "upgrade it, or take the policy back with `gateway policy rollback VERSION`"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is what to do about it where it is wrong."""

    subject: str
    state: Literal["ok", "wrong", "unknown"]
    said: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What to read."""
        return f"{self.said}: {self.remedy}" if self.remedy else self.said


@dataclass(frozen=True)
class RedisFacts:
    """What is known of the server behind it all; `unfit` are the store's own sentences."""

    version: str = ""
    durability: str = "unknown"
    unfit: tuple[str, ...] = ()
    away: bool = False


@dataclass(frozen=True)
class OllamaModel:
    """A model that Ollama has in memory, and until when."""

    name: str
    expires_at: datetime


@dataclass(frozen=True)
class Facts:
    """All that was found out; None = it could not be."""

    url: str
    problem: str = ""  # why the api does not answer
    redis: RedisFacts | None = None
    shown: Snapshot | None = None
    ollama_url: str = ""
    ollama: Sequence[OllamaModel] | None = None
    now: datetime = field(default=datetime.min)
    api_skew_ms: int = 0
    policy_unread: int = 0  # version of the active policy, where whoever was asked cannot read it


def examine(facts: Facts) -> list[Finding]:
    """Judges everything, in the order in which one would mend it."""
    found = [*_ports(facts), *_redis(facts.redis), *_policy(facts)]
    if facts.shown is None:
        return [*found, Finding("policy", "unknown", "no policy could be read, so models and hosts were not looked at")]
    shown = facts.shown
    return [
        *found,
        *_hosts(shown),
        *_models(shown),
        *_slots(shown),
        *_keep_alive(facts, shown),
        *_memory(shown),
        *_clocks(facts, shown),
    ]


def _ports(facts: Facts) -> Iterator[Finding]:
    if facts.problem:
        said, _, remedy = facts.problem.rstrip(".").rpartition(": ")
        yield Finding("ports", "wrong", said, remedy)
    else:
        yield Finding("ports", "ok", f"a gateway answers at {facts.url}")


def _redis(redis: RedisFacts | None) -> Iterator[Finding]:
    if redis is None:
        yield Finding("redis", "unknown", "Redis was not reached, so its settings were not looked at")
    elif redis.away:
        yield Finding("redis", "wrong", "Redis does not answer the gateway", "start it, or mend GATEWAY_REDIS_URL")
    elif redis.unfit:
        for sentence in redis.unfit:
            said, _, remedy = sentence.partition(": ")
            yield Finding("redis", "wrong", said, remedy)
    else:
        yield Finding("redis", "ok", f"{redis.version or 'Redis'} keeps {redis.durability} and evicts nothing")


def _policy(facts: Facts) -> Iterator[Finding]:
    if facts.policy_unread:
        who = "this command's" if facts.problem else "the api's"
        said = f"policy {facts.policy_unread} is active, and {who} version of warmlane cannot read it"
        yield Finding("policy", "wrong", said, _TOO_OLD)


def _hosts(shown: Snapshot) -> Iterator[Finding]:
    if not shown.hosts:
        yield Finding("hosts", "wrong", "no worker is alive, so nothing can be served", "start `gateway worker`")
    for gone in shown.silent:
        said = f"{gone.name} fell silent {duration(gone.beat_age_ms)} ago, and its worker did not take its leave"
        yield Finding("hosts", "wrong", said, _SILENT)
    for host in shown.hosts:
        if host.draining:
            yield Finding(
                "hosts", "wrong", f"{host.name} takes no new work", f"`gateway undrain {host.name}` ends that"
            )
        if host.policy_unread:
            said = f"{host.name} takes no work, since its version of warmlane cannot read policy {host.policy_unread}"
            yield Finding("hosts", "wrong", said, _TOO_OLD)
        elif host.policy_version != shown.policy_version:
            said = f"{host.name} serves policy {host.policy_version} and {shown.policy_version} is active"
            yield Finding("hosts", "wrong", said, "restart its worker if that lasts longer than a moment")


def _models(shown: Snapshot) -> Iterator[Finding]:
    wrong = False
    for model in shown.models:
        if model.state == "absent" and shown.hosts:
            remedy = "start a worker on a host that the policy names, or change `hosts`"
            yield Finding("models", "wrong", f"{model.name} is served by no live host", remedy)
        elif model.state == "quarantined" or (model.state == "cold" and model.failures):
            remedy = f"mend that, then `gateway model reset {model.name}`"
            yield Finding("models", "wrong", f"{model.name} does not load ({model.reason.rstrip('.')})", remedy)
        elif model.state == "degraded":
            remedy = "see what else uses the machine, or raise firstTokenBudgetMs"
            yield Finding("models", "wrong", f"{model.name} answers slowly ({model.reason})", remedy)
        else:
            continue
        wrong = True
    if not wrong and shown.hosts:
        yield Finding("models", "ok", "no model is quarantined, degraded, without a host or cold after a failed load")


def _slots(shown: Snapshot) -> Iterator[Finding]:
    capped = [model for model in shown.models if model.parallel]
    for model in capped:
        more = _PARALLEL.get(model.runtime, "what it runs at once")
        said = f"{model.name} offers {model.max_concurrent} slots and its runtime runs {model.parallel} at once"
        remedy = f"raise {more} to {model.max_concurrent}, or set maxConcurrent to {model.parallel}"
        yield Finding("slots", "wrong", said, remedy)
    if not capped:
        yield Finding("slots", "ok", "no runtime is known to run fewer generations at once than the policy offers")


def _keep_alive(facts: Facts, shown: Snapshot) -> Iterator[Finding]:
    ours = {_full(model.weights): model for model in shown.models if model.runtime == "ollama" and model.keep_warm}
    if not ours:
        return
    if facts.ollama is None:
        said = f"no Ollama answers at {facts.ollama_url} from here, so its keep-alive was not looked at"
        yield Finding("keep-alive", "unknown", said)
        return
    short = [one for one in facts.ollama if _full(one.name) in ours and one.expires_at - facts.now < FOR_EVER]
    for one in short:
        left_ms = max(0.0, (one.expires_at - facts.now) / timedelta(milliseconds=1))
        said = f"Ollama unloads {one.name} in {duration(left_ms)} though the policy keeps it warm"
        remedy = "some client talks to Ollama itself and sets its own keep_alive; have it ask the gateway"
        yield Finding("keep-alive", "wrong", said, remedy)
    if not short:
        yield Finding("keep-alive", "ok", "Ollama is about to unload none of the models that the policy keeps warm")


def _full(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _memory(shown: Snapshot) -> Iterator[Finding]:
    if not any(host.memory_total for host in shown.hosts):
        return
    kept = [model for model in shown.models if model.keep_warm and model.footprint_bytes]
    unknown = [model.name for model in shown.models if model.keep_warm and not model.footprint_bytes]
    wrong = False
    for model in shown.models:
        places = [host for host in shown.hosts if host.name in model.hosts]
        largest = max((host.memory_total for host in places), default=0)
        if largest and model.footprint_bytes > largest:
            wrong = True
            said = f"{model.name} needs {size(model.footprint_bytes)} and its largest host has {size(largest)}"
            yield Finding("memory", "wrong", said, "take a smaller quantization or a shorter context")
    need, there = sum(model.footprint_bytes for model in kept), _total(shown.hosts, kept)
    if need > there and len(kept) > 1:
        names = ", ".join(f"{model.name} {size(model.footprint_bytes)}" for model in kept)
        said = f"the models to keep warm need {size(need)} together ({names}) and their hosts have {size(there)}"
        yield Finding("memory", "wrong", said, "keep only the most valuable one warm")
    elif not wrong:
        said = f"the models to keep warm need {size(need)} together and their hosts have {size(there)}"
        doubt = f" (not known yet: {', '.join(unknown)})" if unknown else ""
        yield Finding("memory", "ok", said + doubt)


def _total(hosts: Sequence[HostStatus], models: Sequence[ModelStatus]) -> int:
    places = {name for model in models for name in model.hosts}
    return sum(host.memory_total for host in hosts if host.name in places or not models)


def _clocks(facts: Facts, shown: Snapshot) -> Iterator[Finding]:
    clocks = {"the api's machine": facts.api_skew_ms, **{host.name: host.skew_ms for host in shown.hosts}}
    wrong = {name: skew for name, skew in clocks.items() if abs(skew) > SKEW_MS_MAX}
    for name, skew in wrong.items():
        said = f"the clock of {name} is {duration(abs(skew))} {'behind' if skew > 0 else 'ahead of'} Redis'"
        yield Finding("clock", "wrong", said, "run an NTP service on both")
    if not wrong:
        most = max((abs(skew) for skew in clocks.values()), default=0)
        yield Finding("clock", "ok", f"all clocks are within {max(1, most)}ms of Redis'")
