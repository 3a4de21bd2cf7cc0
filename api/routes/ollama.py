"""What clients of the Ollama dialect ask about models, and the two pages by which they learn that an Ollama is there.

Everything is said out of the policy and of what the hosts last told; no runtime is asked.
"""

from typing import Any

from fastapi import APIRouter, Request

from api.auth import Caller, Gate
from api.described import Described, described, says
from api.gateway import Gateway
from api.small_body import small_body
from broker import callers, errors, requests
from broker.dialects import ollama, ollama_models, ollama_stream
from broker.dialects.ollama_models import Shown
from broker.policies import Active
from broker.policy.sentences import near_words
from broker.records import ModelFacts, ModelOnHost

router = APIRouter(tags=["ollama"])

RESIDENT = ("warm", "degraded")
FRESH_S = 0.1
"""A model that has just loaded is looked for right away."""

FOR_EVER_MS = 100 * 365 * 86_400_000
"""How much longer a model stays of which the policy says no end."""


@router.api_route("/api/version", methods=["GET", "HEAD"])
@described(Described("Whose api this is", "ollama", says("Both versions.", "OllamaVersion"), keyless=True))
async def version(gateway: Gate) -> dict[str, str]:
    """Tells whose API this is; clients refuse one that is too old for them."""
    return {"version": ollama_models.VERSION, "warmlane": gateway.version}


@router.api_route("/api/tags", methods=["GET", "HEAD"])
@described(Described("What can be asked for", "ollama", says("Names.", "OllamaTags"), fails=(errors.ModelUnavailable,)))
async def tags(gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Lists every name that a client may ask for."""
    active = gateway.book.active
    found = (_shown(gateway, active, name, caller) for name in active.policy.names())
    return ollama_models.tags(shown for shown in found if shown is not None)


@router.get("/api/ps")
@described(
    Described(
        "What is loaded", "ollama", says("Models and their memory.", "OllamaRunning"),
        fails=(errors.ModelUnavailable, errors.BrokerUnavailable),
    )
)  # fmt: skip
async def running(gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Lists the models that are loaded, with the memory that they hold on all hosts."""
    active = gateway.book.active
    await gateway.fleet.look_again(older_than_s=FRESH_S)
    told = []
    for model in active.models():
        loaded = [m for m in gateway.fleet.picture.on_host.get(model, {}).values() if m.state in RESIDENT]
        if loaded and caller.rights.may_ask_for(model):
            size = sum(map(_size, loaded))
            told.append((_of_model(gateway, active, model, model), size, _expires_at(gateway, active, model)))
    return ollama_models.running(told)


@router.post("/api/show")
@described(
    Described(
        "What a model can do", "ollama", says("As far as the policy knows.", "OllamaShown"), body="OllamaShowRequest",
        fails=(errors.BadRequest, errors.UnknownModel, errors.BodyTooLarge, errors.ModelUnavailable),
    )
)  # fmt: skip
async def show(request: Request, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Tells what a model can do, as far as the policy knows."""
    asked = ollama_models.asked_to_show(await small_body(request))
    active = gateway.book.active
    shown = _shown(gateway, active, requests.known_name(active.policy, asked), caller)
    if shown is None:
        names = [name for name in active.policy.names() if caller.rights.may_ask_for(name)]
        raise errors.UnknownModel(asked, near_words(asked, names, most=3))
    return ollama_models.show(shown)


def _shown(gateway: Gateway, active: Active, name: str, caller: callers.Caller) -> Shown | None:
    """Describes the model that a short request of this caller would go to; None where the name leads it nowhere."""
    try:
        lane = requests.lane_of(active.policy, caller, name, endpoint=ollama.CHAT)
    except (errors.UnknownModel, errors.LaneForbidden):
        return None
    return _of_model(gateway, active, name, lane.model)


def _of_model(gateway: Gateway, active: Active, name: str, model: str) -> Shown:
    definition = active.models()[model]
    picture = gateway.fleet.picture
    on_hosts = picture.on_host.get(model, {}).values()
    sizes = [_size(m) for m in on_hosts] + [picture.facts.get(model, ModelFacts()).footprint_bytes]
    return Shown(
        name=name,
        digest=ollama_models.digest(
            definition.model_dump(mode="json", include={"backend", "model", "url", "command", "options"})
        ),
        size_bytes=max(sizes) or (definition.memory_mb or 0) << 20,
        file_format="gguf" if definition.backend in ("llama.cpp", "ollama") else "",
        embeddings=definition.embeddings,
        context_tokens=definition.context_tokens,
        backend=definition.backend,
    )


def _size(m: ModelOnHost) -> int:
    return m.memory_bytes or m.footprint_bytes


def _expires_at(gateway: Gateway, active: Active, model: str) -> str:
    """Until when it stays if nobody asks for it, as an Ollama tells it."""
    definition = active.models()[model]
    facts = gateway.fleet.picture.facts.get(model, ModelFacts())
    stays = definition.keep_warm or facts.pinned or definition.backend == "openai"
    left_ms = FOR_EVER_MS if stays else definition.idle_unload_ms
    return ollama_stream.instant((gateway.fleet.picture.at_ms + left_ms) * 1_000_000)
