"""What an operator asks for by hand: a model warm, unloaded, reset or pinned, a host drained.

What must outlive a moment is a wish in the model's own hash, where every worker reads it: `wanted_until` for warm (an
instant), `unloaded_until` for an unload (an instant: keep-warm pauses until then or until somebody asks), `pinned`.
What only the worker can do travels on its control channel, and is believed when its heartbeat shows it: a message may
be lost, so it is said again until then.
"""

import asyncio
from collections.abc import Callable, Mapping

from broker import errors
from broker.hosts import NOT_FAILED, Fleet, Picture
from broker.lanes import WANTED_FOR_MS
from broker.policies import Active
from broker.policy.sentences import near_words
from broker.records import ModelFacts, ModelOnHost, without_name
from broker.status import stays_cold
from broker.store import Store

UNLOADED_FOR_MS = 3_600_000
"""How long keep-warm leaves a model alone that was unloaded by hand, unless somebody asks for it."""

HEARD_S_MAX = 5.0
"""How long a worker may take to show that it heard."""

BUSY_S_MAX = 1.0
"""A model that is at work for longer than one probe is busy."""

SAY_EVERY_S = 1.0
LOOK_EVERY_S = 0.1

RESIDENT = ("warm", "degraded")


def model_named(active: Active, name: str) -> str:
    """Finds the model that a name means: its own, an alias, a label, or one that routing or a lane leads to it.

    Raises UnknownModel, and BadRequest where the name leads to several models.
    """
    models = active.models()
    if name in models:
        return name
    meant = {key for key, model in models.items() if name in model.aliases}
    meant = meant or {key for key, model in models.items() if name == model.label}
    if not meant:
        targets = [rule.target for rule in active.policy.routing if rule.match.lane == name]
        meant = {lane.model for lane in map(active.lane, [name, *targets]) if lane is not None}
    if not meant:
        labels = [model.label for model in models.values() if model.label]
        raise errors.UnknownModel(name, near_words(name, [*active.policy.names(), *labels], most=3))
    if len(meant) > 1:
        raise errors.BadRequest(f"{name!r} leads to {' and '.join(sorted(meant))}: name one of them", "model")
    return meant.pop()


async def warm(store: Store, active: Active, fleet: Fleet, model: str) -> None:
    """Wants a model for one whole wake and a minute more; raises WishRefused while it is quarantined, and where none of
    its hosts takes new work: it would be loaded as soon as one does, when nobody thinks of it any more."""
    picture = await fleet.look()
    facts, on_host = picture.facts.get(model, ModelFacts()), picture.on_host.get(model, {})
    left_ms = facts.quarantined_until - picture.at_ms
    is_there = any(m.state in RESIDENT for m in on_host.values())
    there = [picture.hosts[name] for name in on_host if name in picture.hosts]
    if there and not any(host.takes_work for host in there) and not is_there:
        raise errors.WishRefused(stays_cold(model, there))
    if left_ms > 0 and not is_there:
        words = f"{model} is quarantined for {left_ms / 1000:.0f} s more: {without_name(model, facts.failure)}"
        raise errors.WishRefused(f"{words}; `gateway model reset {model}` has it tried now")
    definition = active.models()[model]
    await _wish(store, model, {"unloaded_until": 0}, want_ms=definition.wake_timeout_ms + WANTED_FOR_MS)


async def reset(store: Store, fleet: Fleet, model: str) -> None:
    """Ends a quarantine and forgets the failures that led to it; returns when its hosts show it, or soon after."""
    await _wish(store, model, NOT_FAILED)
    end = asyncio.get_running_loop().time() + HEARD_S_MAX
    while any(m.state == "quarantined" for m in (await fleet.look()).on_host.get(model, {}).values()):
        if asyncio.get_running_loop().time() > end:
            return
        await asyncio.sleep(LOOK_EVERY_S)


async def pin(store: Store, model: str, *, pinned: bool) -> None:
    """Keeps a model in memory once it is there, or lets it go again: no eviction, no unload for being idle."""
    await _wish(store, model, {"pinned": int(pinned)})


async def unload(store: Store, active: Active, fleet: Fleet, model: str) -> None:
    """Takes a model out of memory on every host; raises WishRefused while it is at work, or where it is not ours to.

    Returns once every worker has begun; the unload itself may take longer.
    """
    if active.models()[model].trust == "remote":
        raise errors.WishRefused(f"{model} is a remote provider's, so there is nothing here to unload")
    loop = asyncio.get_running_loop()
    started, said_at = loop.time(), 0.0
    while True:
        there = (await fleet.look()).on_host.get(model, {})
        resident = {host: m for host, m in there.items() if m.state in RESIDENT}
        if not resident and not any(m.state == "waking" for m in there.values()):
            if not said_at:  # nobody had it: it shall not be kept warm either
                await _wish(store, model, {"unloaded_until": await store.now_ms() + UNLOADED_FOR_MS})
            return
        waited_s = loop.time() - started
        why_not, passes = why_not_unload(model, there)
        if why_not and (not passes or waited_s > BUSY_S_MAX):
            raise errors.WishRefused(why_not)
        if waited_s > HEARD_S_MAX:
            raise errors.WishRefused(f"{', '.join(sorted(resident))} did not unload {model} within {HEARD_S_MAX:g} s")
        if not why_not and loop.time() - said_at >= SAY_EVERY_S:
            said_at = loop.time()
            for host in resident:
                await store.command("PUBLISH", store.keys.control_channel(host), f"unload {model}")
        await asyncio.sleep(LOOK_EVERY_S)


def why_not_unload(model: str, there: Mapping[str, ModelOnHost]) -> tuple[str, bool]:
    """Says why a model cannot be unloaded, "" if it can, and whether that may pass within a moment."""
    for host, m in sorted(there.items()):
        if m.state == "waking":
            return f"{model} is being loaded on {host}; unload it when it is warm", False
        if m.state in RESIDENT and not m.manageable:
            return f"{model} runs on {host} at a url, so it is not ours to unload; stop it there", False
    used = sum(m.slots_used for m in there.values())
    settling = sum(m.slots_settling for m in there.values())
    if used:
        return f"{model} is at work in {used} slot{'s'[: used > 1]}; try again when it is idle", True
    if settling:
        return f"{model} still works on answers that were closed; try again when it is idle", True
    return "", True


async def drain(store: Store, fleet: Fleet, host: str, *, drained: bool) -> None:
    """Has a host claim no more until it is undrained or its worker restarts; what runs goes on.

    Raises UnknownHost, and WishRefused where its worker does not show within HEARD_S_MAX that it heard.
    """

    def heard(picture: Picture) -> bool:
        if host not in picture.hosts:
            raise errors.UnknownHost(host, near_words(host, picture.hosts, most=3))
        return picture.hosts[host].draining == drained

    word = "drain" if drained else "undrain"
    await _say(store, fleet, host, word, heard)


async def _say(store: Store, fleet: Fleet, host: str, message: str, heard: Callable[[Picture], bool]) -> None:
    loop = asyncio.get_running_loop()
    started, said_at = loop.time(), -SAY_EVERY_S
    while not heard(await fleet.look()):
        if loop.time() - started > HEARD_S_MAX:
            raise errors.WishRefused(f"the worker on {host} did not {message} within {HEARD_S_MAX:g} s; it may be gone")
        if loop.time() - said_at >= SAY_EVERY_S:
            said_at = loop.time()
            await store.command("PUBLISH", store.keys.control_channel(host), message)
        await asyncio.sleep(LOOK_EVERY_S)


async def _wish(store: Store, model: str, facts: Mapping[str, int | str], *, want_ms: int = 0) -> None:
    flat = [x for name, value in facts.items() for x in (name, value)]
    await store.run("wish", [store.keys.model(model)], [store.now_arg(), want_ms, *flat])
