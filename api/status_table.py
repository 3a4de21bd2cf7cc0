"""The text of `gateway status`, made of a snapshot and nothing else."""

from api.terminal import harmless, text_of
from broker.status import HostStatus, ModelStatus, SilentHost, Snapshot

_HEAD = ("MODEL", "STATE", "FIRST TOKEN", "QUEUE", "MEM")
_GAPS = (2, 3, 3, 3, 3, 3, 3, 0)
_WIDE = ("SLOTS", "LAST LOAD", "CACHED")
_BAR = 20
_GIB = 1 << 30
_MIB = 1 << 20


def status_table(shown: Snapshot, *, wide: bool = False) -> str:
    """Gives the table of models, then the policy, the hosts, and a line for whatever needs a word.

    `wide` adds the slots in use, how long the last load took, and how much of the day's prompts was in a cache.
    """
    cells = [_HEAD + _WIDE * wide, *(_row(model) + _more(model) * wide for model in shown.models)]
    rows = [tuple(map(harmless, row)) for row in cells]
    widths = [max(map(len, column)) + gap for column, gap in zip(zip(*rows, strict=True), _GAPS, strict=False)]
    lines = ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"policy: {line}" for line in shown.policy_lines]
    lines += _other_lanes(shown)
    lines += [_host(host) for host in shown.hosts] or ["host: none is alive, so nothing can be served"]
    lines += [_silent(host) for host in shown.silent]
    lines += [f"note: {shown.redis_note}"] if shown.redis_note else []
    lines += [f"note: host {host.name}: {host.memory_note}" for host in shown.hosts if host.memory_note]
    lines += [f"note: {_name(model)} {words}" for model in shown.models for words in _notes(model)]
    if shown.policy_unread:
        lines.append(
            f"note: policy {shown.policy_unread} is active, and the api's version of warmlane cannot read it: it lets "
            f"nothing in, and shows policy {shown.policy_version}"
        )
    if shown.made_up:
        lines.append("note: this policy was made up by `gateway up`, since none was given")
    return text_of(lines)


def size(value: int) -> str:
    """Writes bytes the short way: 31.8G, 640M, - for nothing."""
    if value <= 0:
        return "-"
    return f"{value / _GIB:.1f}G" if value >= _GIB else f"{max(1, round(value / _MIB))}M"


def duration(value_ms: float) -> str:
    """Writes an age the short way: 850ms, 12s, 4m, 2h."""
    if value_ms < 1_000:
        return f"{value_ms:.0f}ms"
    if value_ms < 120_000:
        return f"{value_ms / 1_000:.0f}s"
    return f"{value_ms / 60_000:.0f}m" if value_ms < 7_200_000 else f"{value_ms / 3_600_000:.0f}h"


def _row(model: ModelStatus) -> tuple[str, ...]:
    first_token = f"{model.first_token_ms:.0f}ms" if model.first_token_ms else "-"
    return (_name(model), model.state, first_token, f"{model.waiting}/{model.max_queue}", size(model.memory_bytes))


def _more(model: ModelStatus) -> tuple[str, ...]:
    load_ms, share = model.last_load_ms or model.load_ms, model.cached_share
    return (
        f"{model.slots_used}/{model.slots_total}",
        duration(load_ms) if load_ms else "-",
        "-" if share is None else f"{share:.0%}",
    )


def standing(host: HostStatus) -> str:
    """Whether a live host takes work, in a word or a few."""
    if host.policy_unread:
        return f"too old for policy {host.policy_unread}"
    return "draining" if host.draining else "up"


def loading(model: ModelStatus) -> str:
    """Says how far a load is: by the runtime's own figures where it has some, else by how long it takes as a rule."""
    after = duration(model.state_ms)
    if model.reason:  # it waits: no load has begun
        return f"{model.reason}, for {after}"
    if model.progress >= 0:
        return f"{_bar(model.progress)} {model.progress:.0%} after {after}"
    if model.load_ms:
        return f"{_bar(min(0.99, model.state_ms / model.load_ms))} {after} of about {duration(model.load_ms)}"
    return f"for {after}"


def _bar(part: float) -> str:
    full = int(_BAR * part)
    return f"[{'#' * full}{'.' * (_BAR - full)}]"


def _name(model: ModelStatus) -> str:
    return model.label or model.name


def _other_lanes(shown: Snapshot) -> list[str]:
    """Lanes beside the models' own: where somebody waits or runs, and those on their way out."""
    own = {model.name for model in shown.models}
    lines = []
    for lane in shown.lanes:
        if (lane.name in own and not lane.retiring) or not (lane.waiting or lane.running or lane.retiring):
            continue
        words = f"lane: {lane.name} {lane.waiting}/{lane.max_queue} waiting, {lane.running} running on {lane.model}"
        if lane.oldest_waiting_ms:
            words += f", the oldest for {duration(lane.oldest_waiting_ms)}"
        lines.append(words + (", retiring" if lane.retiring else ""))
    return lines


def _host(host: HostStatus) -> str:
    words = f"host: {host.name} {standing(host)}"
    if host.draining or host.policy_unread:
        words += f" ({host.running} still running)" if host.running else " (nothing runs)"
    if host.memory_total:
        of = f"{size(host.memory_total)} GPU memory" if host.memory_source == "gpu" else size(host.memory_total)
        words += f", {size(host.memory_used)} of {of} used, headroom {size(host.memory_headroom)}"
    return words


def _silent(host: SilentHost) -> str:
    age = duration(host.beat_age_ms)
    return f"host: {host.name} silent for {age}, its worker sends no heartbeat and did not take its leave"


def _notes(model: ModelStatus) -> list[str]:
    words = []
    if model.simulated:
        words.append("is simulated: its answers mean nothing")
    if model.state == "waking":
        words.append(f"is waking: {loading(model)}")
    elif model.reason:
        left = f", for {duration(model.quarantine_ms)} more" if model.quarantine_ms else ""
        words.append(f"is {model.state}: {model.reason}{left}")
    if model.parallel:
        words.append(f"runs {model.parallel} of {model.max_concurrent} in parallel, so it has {model.parallel} slots")
    if model.outside_hours and model.state == "cold":
        words.append(f"is not kept warm now: its activeHours are {model.outside_hours}")
    if model.sessions_on_fallback:
        count = model.sessions_on_fallback
        words.append(f"has {count} session{'s'[: count != 1]} that stay{'s'[: count == 1]} on its fallback for a while")
    if model.downgraded:
        words.append(f"had {model.downgraded} of its last {model.asked} jobs served by another model")
    if model.pinned:
        words.append("is pinned")
    if model.unloaded_ms and model.keep_warm:
        words.append(f"was unloaded by hand and is not kept warm for {duration(model.unloaded_ms)}")
    if model.slots_settling:
        words.append(f"has {model.slots_settling} of {model.slots_total} slots settling after a cancel")
    return words
