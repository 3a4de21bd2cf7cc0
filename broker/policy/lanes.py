"""Which lanes a policy has, and which lane a request goes to.

**Lanes.** Every model has its own lane of its name, and `<model>.batch` for asynchronous work. A name that a routing
rule matches (`fast-edit`) is another name for its target's lane, unless `lanes:` gives the name a stream of its own. An
entry of `lanes:` takes what it leaves out from its model; a batch lane starts from the batch defaults instead: a long
queue, a day to wait, and no fallback.

**Routing.** The name that a client asks for must be a model, an alias, a lane or a name that a rule matches; anything
else is unknown, and no rule can catch it. An alias is replaced by its model first, so a rule for the model holds for
its aliases too. Then the rules are read top-down and the first that fits decides:

- a rule with `lane` fits only a client that asked for that name;
- a rule without `lane` fits whatever known name was asked for (`promptTokensOver: 30000` sends every big prompt to its
  target, also one that asked for another model by name);
- every other key of the match must fit as well.

Where no rule fits, a model or lane gets what asked for it by name. A name that only rules know, and none of them fits,
is unknown to this request. A lane with a stream of its own keeps its requests when the rule leads to its own model.

**Batch.** `priority="batch"`, or asking for a batch lane by name, goes through the same rules and ends in the `.batch`
lane of the model that they chose.
"""

from dataclasses import dataclass, replace

from broker.policy.content import BATCH, Content, LaneEntry, Match, Model, Priority, Trust

CANDIDATES_MAX = 3
BATCH_QUEUE = 10_000
BATCH_WAIT_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Lane:
    """A bounded waiting line, as the broker needs to know it."""

    name: str
    model: str
    max_queue: int
    cold_start_budget_ms: int
    max_wait_ms: int
    priority: Priority
    fallback: str | None
    trust: Trust
    retiring: bool = False


def own_lane(name: str, model: Model) -> Lane:
    """The lane that a model has by itself."""
    return Lane(
        name=name,
        model=name,
        max_queue=model.max_queue,
        cold_start_budget_ms=model.cold_start_budget_ms,
        max_wait_ms=model.max_wait_ms,
        priority="interactive",
        fallback=model.fallback,
        trust=model.trust,
    )


def batch_lane(name: str, model: Model) -> Lane:
    """The lane for a model's asynchronous work: it can wait, and it is not promoted."""
    return Lane(
        name=name + BATCH,
        model=name,
        max_queue=BATCH_QUEUE,
        cold_start_budget_ms=BATCH_WAIT_MS,
        max_wait_ms=BATCH_WAIT_MS,
        priority="batch",
        fallback=None,
        trust=model.trust,
    )


def make_lanes(content: Content) -> dict[str, Lane]:
    """Gives every lane of a policy that has passed its checks, by name."""
    lanes: dict[str, Lane] = {}
    for name, model in content.models.items():
        lanes[name] = own_lane(name, model)
        lanes[name + BATCH] = batch_lane(name, model)
    for name, entry in content.lanes.items():
        model_name = home_of(content, name)
        if model_name is not None:
            lanes[name] = _changed(name, entry, model_name, content.models[model_name])
    return lanes


def _changed(name: str, entry: LaneEntry, model_name: str, model: Model) -> Lane:
    """One entry of `lanes:` on top of what its model gives."""
    batch = entry.priority == "batch" or name == model_name + BATCH
    base = batch_lane(model_name, model) if batch else own_lane(model_name, model)
    fallback = entry.fallback if "fallback" in entry.model_fields_set else base.fallback
    budget_ms = entry.cold_start_budget_ms
    if budget_ms is None:
        budget_ms = model.cold_start_budget_ms if batch and fallback else base.cold_start_budget_ms
    return replace(
        base,
        name=name,
        max_queue=base.max_queue if entry.max_queue is None else entry.max_queue,
        cold_start_budget_ms=budget_ms,
        max_wait_ms=base.max_wait_ms if entry.max_wait_ms is None else entry.max_wait_ms,
        fallback=fallback,
    )


def home_of(content: Content, name: str) -> str | None:
    """Says which model serves an entry of `lanes:`, or None where the file does not say it.

    That is the model whose lane it is, else its `target`, else the target of the first rule that asks for nothing but
    this name, else the one target that all rules for this name share.
    """
    if name in content.models:
        return name
    if name.endswith(BATCH):
        model = name.removesuffix(BATCH)
        return model if model in content.models else None
    target = content.lanes[name].target
    if target is not None:
        return target if target in content.models else None
    rules = [rule for rule in content.routing if rule.match.lane == name]
    plain = [rule.target for rule in rules if _conditions(rule.match) == {"lane"}]
    targets = set(plain[:1]) or {rule.target for rule in rules}
    return targets.pop() if len(targets) == 1 and targets <= content.models.keys() else None


def known_names(content: Content) -> list[str]:
    """Every name that a client is offered: models, aliases, routing names, lanes; no batch lanes of models."""
    names = dict.fromkeys(content.models)
    names.update(dict.fromkeys(alias for model in content.models.values() for alias in model.aliases))
    names.update(dict.fromkeys(rule.match.lane for rule in content.routing if rule.match.lane))
    names.update(dict.fromkeys(name for name in content.lanes if not name.endswith(BATCH)))
    return list(names)


def choose(
    content: Content,
    lanes: dict[str, Lane],
    asked: str,
    *,
    caller: str,
    endpoint: str,
    prompt_tokens: int,
    batch: bool,
) -> Lane | None:
    """Gives the lane of a request, or None where the name is unknown to it."""
    name = next((key for key, model in content.models.items() if asked in model.aliases), asked)
    if name in lanes and lanes[name].priority == "batch":
        batch = True
        if name not in content.lanes or name.endswith(BATCH):
            name = lanes[name].model
    if name not in lanes and not any(rule.match.lane == name for rule in content.routing):
        return None
    lane = lanes.get(name)
    for rule in content.routing:
        if fits(rule.match, name, caller=caller, endpoint=endpoint, prompt_tokens=prompt_tokens):
            stays = lane is not None and rule.target in content.models and lane.model == rule.target
            lane = lane if stays else lanes[rule.target]
            break
    if lane is not None and batch and lane.priority != "batch":
        return lanes[lane.model + BATCH]
    return lane


def fits(match: Match, asked: str, *, caller: str, endpoint: str, prompt_tokens: int) -> bool:
    """Says whether a request looks like a rule's match."""
    return (
        (match.lane is None or match.lane == asked)
        and (match.caller is None or match.caller == caller)
        and (match.endpoint is None or match.endpoint == endpoint)
        and (match.prompt_tokens_over is None or prompt_tokens > match.prompt_tokens_over)
        and (match.prompt_tokens_under is None or prompt_tokens < match.prompt_tokens_under)
    )


def candidates(lanes: dict[str, Lane], lane: Lane) -> list[Lane]:
    """Gives a lane, its fallback and that one's fallback, in the order in which they are tried."""
    found = [lane]
    while len(found) < CANDIDATES_MAX:
        name = found[-1].fallback
        if name is None or name not in lanes or lanes[name] in found:
            break
        found.append(lanes[name])
    return found


def covers(wide: Match, narrow: Match) -> bool:
    """Says whether every request that fits `narrow` fits `wide` as well."""
    for key in ("lane", "caller", "endpoint"):
        if getattr(wide, key) not in (None, getattr(narrow, key)):
            return False
    over, under = wide.prompt_tokens_over, wide.prompt_tokens_under
    if over is not None and (narrow.prompt_tokens_over is None or narrow.prompt_tokens_over < over):
        return False
    return under is None or (narrow.prompt_tokens_under is not None and narrow.prompt_tokens_under <= under)


def _conditions(match: Match) -> set[str]:
    return {key for key, value in match if value is not None}
