"""Judges a policy that works: what will disappoint is a warning.

Each finding is the path of the key to change and the words of one sentence; the caller puts the line before it.
"""

from collections.abc import Callable, Iterator

from broker.policy.checks import Finding, fallback_path
from broker.policy.content import Content, Match, is_loopback
from broker.policy.document import Path
from broker.policy.lanes import CANDIDATES_MAX, Lane, covers, home_of
from broker.policy.long_waits import long_waits, share_a_host
from broker.policy.warm_together import Clash, clashes, with_sizes


def warnings_of(
    content: Content,
    lanes: dict[str, Lane],
    *,
    host_memory_mb: int | None,
    exists: Callable[[str], bool],
    size_of: Callable[[str], int],
) -> list[Finding]:
    """Gives what works but will disappoint."""
    return [
        *_missing_files(content, exists),
        *_idle_hours(content),
        *_open_keys(content),
        *_weak_fallbacks(content, lanes),
        *_late_promotions(content, lanes),
        *_idle_downgrade_keys(content, lanes),
        *_memory(content, lanes, host_memory_mb, size_of),
        *_weak_rules(content),
        *_idle_remote(content),
    ]


def _missing_files(content: Content, exists: Callable[[str], bool]) -> Iterator[Finding]:
    for name, model in content.models.items():
        ours = model.backend == "llama.cpp" and model.url is None
        if ours and (model.command is None or "{model}" in " ".join(model.command)) and not exists(model.model):
            yield ("models", name, "model"), f"there is no file {model.model} on this machine"


def _idle_hours(content: Content) -> Iterator[Finding]:
    for name, model in content.models.items():
        if model.active_hours is not None and not model.keep_warm:
            yield (
                ("models", name, "activeHours"),
                "keeps nothing warm without keepWarm: true; it only holds a slot for interactive work",
            )


def _open_keys(content: Content) -> Iterator[Finding]:
    for name, model in content.models.items():
        if model.api_key_env and str(model.url).startswith("http:") and not is_loopback(str(model.url)):
            yield ("models", name, "url"), "is not https, so everyone on the way can read the key and the prompts"


def _idle_remote(content: Content) -> Iterator[Finding]:
    if "remote" in content.model_fields_set and all(model.trust == "local" for model in content.models.values()):
        yield ("remote",), "has no effect, because no model is remote"
    for name, model in content.models.items():
        for kind in model.remote.allow or () if model.remote is not None else ():
            if kind not in content.remote.allow:
                path: Path = ("models", name, "remote", "allow")
                yield path, f"{kind} does not leave for any model, because `remote:` does not allow it"


def _weak_fallbacks(content: Content, lanes: dict[str, Lane]) -> Iterator[Finding]:
    for lane in lanes.values():
        if lane.fallback is None or not _says_fallback(content, lane.name):
            continue
        path = fallback_path(content, lane.name)
        fallback = lanes[lane.fallback]
        model = content.models[fallback.model]
        if fallback.model == lane.model:
            yield path, f"'{fallback.name}' is served by the same model '{lane.model}', which will be as cold"
        elif model.embeddings and model.model != content.models[lane.model].model:
            yield path, f"'{fallback.model}' must serve the same weights: vectors of two models can't be compared"
        elif lane.trust == "local" and fallback.trust == "remote":
            takes = "it takes requests that may leave while this lane has no place, and no promoted job"
            yield path, f"'{fallback.name}' is remote: {takes}"
        elif not model.keep_warm:
            yield path, f"'{fallback.model}' is not kept warm, so a promoted job may wait for a second cold start"
        if _chain_length(lanes, lane) > CANDIDATES_MAX:
            yield path, f"of this chain of fallbacks only the first {CANDIDATES_MAX} lanes are tried"


def _late_promotions(content: Content, lanes: dict[str, Lane]) -> Iterator[Finding]:
    for lane in lanes.values():
        if lane.fallback is not None and lane.cold_start_budget_ms > lane.max_wait_ms:
            place = "lanes" if lane.name in content.lanes else "models"
            yield (
                (place, lane.name, "coldStartBudgetMs"),
                f"the fallback is never tried, because a job is given up after {lane.max_wait_ms} ms "
                f"and promoted only after {lane.cold_start_budget_ms} ms",
            )


def _idle_downgrade_keys(content: Content, lanes: dict[str, Lane]) -> Iterator[Finding]:
    for name, model in content.models.items():
        if any(lane.model == name and lane.fallback for lane in lanes.values()):
            continue
        if model.max_downgrade_share < 1:
            yield ("models", name, "maxDowngradeShare"), "has no effect, because the model has no fallback"
        if model.sticky_promotion_ms:
            yield ("models", name, "stickyPromotionMs"), "has no effect, because the model has no fallback"


def _memory(
    content: Content, lanes: dict[str, Lane], host_memory_mb: int | None, size_of: Callable[[str], int]
) -> Iterator[Finding]:
    if host_memory_mb is None:
        return
    models = with_sizes(content.models, size_of)

    def words(name: str, mb: int) -> str:
        return f"{'' if content.models[name].memory_mb else 'about '}{mb} MB"

    for name, model in content.models.items():
        fallback = lanes[name].fallback
        other = name if fallback is None else lanes[fallback].model
        if other == name or not share_a_host(model, content.models[other]):
            continue
        mine, theirs = models[name].memory_mb, models[other].memory_mb
        if mine is not None and theirs is not None and mine + theirs > host_memory_mb:
            yield (
                fallback_path(content, name),
                f"'{name}' ({words(name, mine)}) and its fallback '{other}' ({words(other, theirs)}) do not fit "
                f"together into {host_memory_mb} MB",
            )
    for clash in clashes(models, host_memory_mb):
        yield ("models",), _too_warm(clash, host_memory_mb, words)
    for wait in long_waits(content.models, lanes.values(), host_memory_mb):
        yield _max_wait_path(content, wait.lane), wait.sentence(host_memory_mb)


def _max_wait_path(content: Content, lane: str) -> Path:
    if lane in content.lanes and content.lanes[lane].max_wait_ms is not None:
        return ("lanes", lane, "maxWaitMs")
    return ("models", home_of(content, lane) or lane, "maxWaitMs")


def _too_warm(clash: Clash, host_memory_mb: int, words: Callable[[str, int], str]) -> str:
    sizes = ", ".join(f"'{name}' ({f'{n} x ' if n > 1 else ''}{words(name, size)})" for name, size, n in clash.models)
    there = "a host has" if clash.hosts == 1 else f"{clash.hosts} hosts have"
    each = "" if clash.hosts == 1 else " each"
    when = f" on {clash.when}" if clash.when else " at once"
    if len(clash.models) == 1:
        return f"the model to keep warm, {sizes}, does not fit: {there} {host_memory_mb} MB{each}"
    return (
        f"the models to keep warm, {sizes}, do not fit together: they need {clash.need_mb} MB{when}, and {there} "
        f"{host_memory_mb} MB{each}; keep exactly one high-value coder warm, and let the others wake on demand"
    )


def _weak_rules(content: Content) -> Iterator[Finding]:
    rules = content.routing
    for index, rule in enumerate(rules):
        for earlier in range(index):
            if covers(rules[earlier].match, rule.match):
                yield ("routing", index), f"is never reached, because rule {earlier + 1} matches all that this one does"
                break
    for name in dict.fromkeys(rule.match.lane for rule in rules if rule.match.lane):
        if name in content.models or name in content.lanes:
            continue
        if not any(covers(rule.match, Match(lane=name)) for rule in rules):
            index = next(i for i, rule in enumerate(rules) if rule.match.lane == name)
            yield ("routing", index, "match", "lane"), f"'{name}' is unknown to requests that fit no rule"


def _says_fallback(content: Content, lane: str) -> bool:
    """Tells a lane with a fallback of its own from one that inherits it, so that a warning comes once."""
    return lane in content.models or fallback_path(content, lane)[0] == "lanes"


def _chain_length(lanes: dict[str, Lane], lane: Lane) -> int:
    length = 1
    while lane.fallback is not None:
        lane = lanes[lane.fallback]
        length += 1
    return length
