"""Judges a policy as a whole: what cannot work is a problem. What will only disappoint is in `warnings`.

Each finding is the path of the key to change and the words of one sentence; the caller puts the line before it.
"""

from collections.abc import Iterator

from broker.policy.content import BATCH, Content, Match, Model
from broker.policy.document import Path
from broker.policy.lanes import Lane, home_of, make_lanes
from broker.policy.sentences import did_you_mean

Finding = tuple[Path, str]


def problems(content: Content) -> list[Finding]:
    """Gives everything that keeps the policy from working; circles are sought only where all names are known."""
    found = [
        *_models(content),
        *_aliases(content),
        *_lanes(content),
        *_routing(content),
        *_fallbacks(content),
        *_redactions(content),
    ]
    return found or list(_circles(content, make_lanes(content)))


def _models(content: Content) -> Iterator[Finding]:
    for name, model in content.models.items():
        path: Path = ("models", name)
        if model.command is not None and model.url is not None:
            yield (*path, "command"), "command and url exclude each other: we start the server, or it runs already"
        if model.command is not None and model.backend != "llama.cpp":
            yield (*path, "command"), f"only a llama.cpp model is started by a command, and this one is {model.backend}"
        if model.url is not None and model.backend == "simulated":
            yield (*path, "url"), "a simulated model has no url"
        if model.backend == "vllm" and model.url is None:
            yield path, "a vllm model needs a url: vLLM is started by you, and asked to sleep and wake by us"
        yield from _options(path, model)
        if model.hosts == []:
            yield (*path, "hosts"), "names no host; leave the key out to allow all"
        if model.command is not None and "{port}" not in " ".join(model.command):
            yield (*path, "command"), "must hold {port}, because we choose where the server listens"
        if model.wake_for_batch == "outsideHours" and model.active_hours is None:
            yield (*path, "wakeForBatch"), "outsideHours needs activeHours to be outside of"
        if model.shared and model.replicas > 1:
            yield (*path, "replicas"), "all hosts reach the same runtime, so only one of them serves it"
        if model.on_loss == "continue" and model.embeddings:
            yield (*path, "onLoss"), "must be error, because vectors cannot be gone on with in the middle"
        yield from _remote(path, model)


def _remote(path: Path, model: Model) -> Iterator[Finding]:
    """What a remote provider must say, and what only it may say."""
    if model.remote is not None and model.trust != "remote":
        yield (*path, "remote"), "narrows what leaves, and this model is local"
    if model.backend != "openai":
        if model.on_loss == "continue" and model.trust == "remote":
            words = "must be error, because a request is judged before it leaves, and its half-told answer is not"
            yield (*path, "onLoss"), words
        if model.api_key_env is not None:
            yield (*path, "apiKeyEnv"), f"only an openai model has a key, and this one is {model.backend}"
        return
    if model.on_loss == "continue":
        yield (
            (*path, "onLoss"),
            "must be error, because a provider begins a new turn instead of going on with an answer",
        )
    if model.trust != "remote":
        yield (*path, "trust"), "must be remote, because prompts for an openai model leave the machine"
    if model.url is None:
        yield (*path, "url"), "is missing: where does the provider listen? https://api.openai.com, for one"


def _redactions(content: Content) -> Iterator[Finding]:
    names: set[str] = set()
    for index, redaction in enumerate(content.remote.redact):
        if redaction.name in names:
            yield ("remote", "redact", index, "name"), f"there are two redactions '{redaction.name}'"
        names.add(redaction.name)


def _options(path: Path, model: Model) -> Iterator[Finding]:
    """Refuses options that would be accepted without effect, or with one that nobody wants."""
    if not model.options or model.backend == "simulated":
        return
    where: Path = (*path, "options")
    if model.backend == "ollama":
        yield (
            where,
            (
                "an Ollama model takes no options, because Ollama would load it again for each request without them; "
                "write them into a Modelfile (PARAMETER num_ctx 16384) or set OLLAMA_CONTEXT_LENGTH"
            ),
        )
    elif model.backend == "openai":
        yield where, "an openai model has none; clients send what they want"
    elif model.backend == "llama.cpp":
        yield where, "a llama.cpp model takes no options; write them into its command"
    else:
        for key in model.options.keys() - {"sleepLevel"}:
            yield (*where, key), "a vllm model has one option, sleepLevel"
        level = model.options.get("sleepLevel", 1)
        if isinstance(level, bool) or level not in (1, 2):
            yield (
                (*where, "sleepLevel"),
                "must be 1 (asleep, the weights are kept in host memory) or 2 (they are read again at each wake)",
            )


def _aliases(content: Content) -> Iterator[Finding]:
    owners: dict[str, str] = {}
    for name, model in content.models.items():
        for index, alias in enumerate(model.aliases):
            path: Path = ("models", name, "aliases", index)
            if alias in content.models:
                yield path, f"alias '{alias}' is already the name of a model"
            elif alias in content.lanes or alias.removesuffix(BATCH) in content.models:
                yield path, f"alias '{alias}' is already the name of a lane"
            elif alias in owners:
                yield path, f"alias '{alias}' is already an alias of '{owners[alias]}'"
            owners.setdefault(alias, name)


def _lanes(content: Content) -> Iterator[Finding]:
    for name, entry in content.lanes.items():
        path: Path = ("lanes", name)
        if name.endswith(BATCH) and name.removesuffix(BATCH) not in content.models:
            unknown = name.removesuffix(BATCH)
            yield path, f"unknown model '{unknown}'{did_you_mean(unknown, content.models)}"
            continue
        owner = name.removesuffix(BATCH)
        if owner in content.models:
            if entry.target not in (None, owner):
                yield (*path, "target"), f"the lane '{name}' belongs to the model '{owner}' and has no other target"
            if entry.priority == "batch" and name == owner:
                yield (*path, "priority"), f"a model's own lane is interactive; its batch lane is '{name}{BATCH}'"
            if entry.priority == "interactive" and name != owner:
                yield (*path, "priority"), f"a batch lane is not interactive; the interactive lane is '{owner}'"
        elif entry.target is not None:
            if entry.target not in content.models:
                yield (*path, "target"), _unknown(content, "model", entry.target, list(content.models))
        elif home_of(content, name) is None:
            yield from _homeless(content, name, path)


def _homeless(content: Content, name: str, path: Path) -> Iterator[Finding]:
    targets = {rule.target for rule in content.routing if rule.match.lane == name}
    if not targets:
        names = [*content.models, *(rule.match.lane for rule in content.routing if rule.match.lane)]
        meant = did_you_mean(name, names)
        yield path, f"'{name}' is neither a model nor a routing name, so it needs a target{meant}"
    elif targets <= set(_lane_names(content)):  # a target that nobody knows has a sentence of its own
        yield path, f"the rules do not send '{name}' to one model, so it needs a target"


def _routing(content: Content) -> Iterator[Finding]:
    known = _lane_names(content)
    aliases = _alias_owners(content)
    for index, rule in enumerate(content.routing):
        path: Path = ("routing", index)
        match = rule.match
        if not any(value is not None for _, value in match):
            yield (*path, "match"), "matches every request; name a lane, caller, endpoint or prompt length"
        if match.lane in aliases:
            owner = aliases[match.lane]
            yield (*path, "match", "lane"), f"'{match.lane}' is an alias of '{owner}'; match the model's name instead"
        if match.lane is not None and match.lane.endswith(BATCH):
            plain = match.lane.removesuffix(BATCH)
            yield (
                (*path, "match", "lane"),
                f"a rule names no batch lane; one for '{plain}' holds for its batch work too",
            )
        if _impossible(match):
            yield (
                (*path, "match", "promptTokensUnder"),
                f"no prompt has more than {match.prompt_tokens_over} and fewer than {match.prompt_tokens_under} tokens",
            )
        if rule.target not in known:
            yield (*path, "target"), _unknown(content, "target", rule.target, known)


def _impossible(match: Match) -> bool:
    over, under = match.prompt_tokens_over, match.prompt_tokens_under
    return over is not None and under is not None and under <= over + 1


def _fallbacks(content: Content) -> Iterator[Finding]:
    known = _lane_names(content)
    entries = [(("models", name, "fallback"), False, model.fallback) for name, model in content.models.items()]
    entries += [
        (("lanes", name, "fallback"), _is_batch(content, name), lane.fallback) for name, lane in content.lanes.items()
    ]
    for path, batch, fallback in entries:
        if fallback is None:
            continue
        if fallback not in known:
            yield path, _unknown(content, "fallback", fallback, known)
        elif _is_batch(content, fallback) and not batch:
            yield path, f"'{fallback}' is a batch lane, where an interactive job would wait behind all others"
        else:
            yield from _other_kind(content, path, fallback)


def _other_kind(content: Content, path: Path, fallback: str) -> Iterator[Finding]:
    """A fallback that gives vectors where text is asked for, or the other way round."""
    here, there = home_of(content, str(path[1])), home_of(content, fallback)
    if here is None or there is None:
        return  # which has a sentence of its own
    one, other = content.models[here].embeddings, content.models[there].embeddings
    if one != other:
        gives = {True: "vectors", False: "text"}
        yield path, f"'{fallback}' gives {gives[other]} and '{path[1]}' gives {gives[one]}"


def _circles(content: Content, lanes: dict[str, Lane]) -> Iterator[Finding]:
    told: set[str] = set()
    for name in lanes:
        trail: list[str] = []
        step: str | None = name
        while step is not None and step not in trail:
            trail.append(step)
            step = lanes[step].fallback
        if step is None or told & set(trail):
            continue
        circle = trail[trail.index(step) :]
        told.update(circle)
        yield fallback_path(content, step), f"fallbacks go in a circle: {' -> '.join([*circle, step])}"


def fallback_path(content: Content, lane: str) -> Path:
    """Gives the key that says a lane's fallback: its own, else the one of its model."""
    if lane in content.lanes and "fallback" in content.lanes[lane].model_fields_set:
        return ("lanes", lane, "fallback")
    return ("models", home_of(content, lane) or lane, "fallback")


def _is_batch(content: Content, lane: str) -> bool:
    return lane.endswith(BATCH) or (lane in content.lanes and content.lanes[lane].priority == "batch")


def _lane_names(content: Content) -> list[str]:
    return list(dict.fromkeys([*content.models, *content.lanes, *(name + BATCH for name in content.models)]))


def _alias_owners(content: Content) -> dict[str, str]:
    return {alias: name for name, model in content.models.items() for alias in model.aliases}


def _unknown(content: Content, what: str, name: str, known: list[str]) -> str:
    """Says that a name is unknown, and which one was meant: an alias or routing name leads to what it stands for."""
    stands_for = _alias_owners(content).get(name)
    if stands_for is None:
        stands_for = next((rule.target for rule in content.routing if rule.match.lane == name), None)
    if stands_for in known:
        return f"unknown {what} '{name}', did you mean '{stands_for}'?"
    return f"unknown {what} '{name}'{did_you_mean(name, known)}"
