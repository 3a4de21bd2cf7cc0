"""GET /v1/models: every name that a client may ask for, routing names and aliases too.

OpenAI's list and Anthropic's have one address; a client of the latter says its version.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query

from api.auth import Caller, Gate
from api.described import Described, described, says
from api.errors import VERSION
from api.gateway import Gateway
from broker import callers, errors, requests
from broker.dialects import anthropic, anthropic_models, openai
from broker.dialects.json_schema import text
from broker.policy.sentences import near_words

router = APIRouter(tags=["models"])

Version = Annotated[str, Header(alias=VERSION)]
Of = Annotated[str, Query()]
IN_ITS_FORM = text("Of a client of Anthropic: the answer has Anthropic's form, and so has an error.")


@router.get("/v1/models")
@described(
    Described(
        "What can be asked for", "openai", says("Names.", "ModelList", "AnthropicModelPage"),
        headers={VERSION: IN_ITS_FORM},
        query={
            "limit": text("Names of a page of Anthropic's form, 1 to 1000; 20 unless it is said."),
            "after_id": text("The name after which a page of Anthropic's form begins."),
            "before_id": text("The name before which it ends."),
        },
        fails=(errors.BadRequest, errors.ModelUnavailable),
    )
)  # fmt: skip
async def list_models(
    gateway: Gate,
    caller: Caller,
    anthropic_version: Version = "",
    limit: Of = "",
    after_id: Of = "",
    before_id: Of = "",
) -> dict[str, Any]:
    """Lists what the caller may ask for: models, aliases, routing names, lanes; in pages for a client of Anthropic."""
    names = _names(gateway, caller)
    if not anthropic_version:
        return openai.models_list(names)
    asked = {"limit": limit, "after_id": after_id, "before_id": before_id}
    page, has_more = anthropic_models.page_of(names, asked)
    return anthropic_models.models_page([_for_anthropic(gateway, name, caller) for name in page], has_more=has_more)


@router.get("/v1/models/{name:path}")
@described(
    Described(
        "One of the names", "openai", says("It can be asked for.", "ListedModel", "AnthropicModel"),
        within={"name": text("A model, alias or routing name; it may hold slashes.")},
        headers={VERSION: IN_ITS_FORM},
        fails=(errors.UnknownModel, errors.ModelUnavailable),
    )
)  # fmt: skip
async def show_model(name: str, gateway: Gate, caller: Caller, anthropic_version: Version = "") -> dict[str, Any]:
    """Shows one of them."""
    names = _names(gateway, caller)
    if name not in names:
        raise errors.UnknownModel(name, near_words(name, names, most=3))
    if anthropic_version:
        return _for_anthropic(gateway, name, caller)
    found: dict[str, Any] = openai.models_list([name])["data"][0]
    return found


def _names(gateway: Gateway, caller: callers.Caller) -> list[str]:
    return [name for name in gateway.book.active.policy.names() if caller.rights.may_ask_for(name)]


def _for_anthropic(gateway: Gateway, name: str, caller: callers.Caller) -> dict[str, Any]:
    """Describes the model that a short request of this caller would go to."""
    active = gateway.book.active
    models = active.models()
    try:
        lane = requests.lane_of(active.policy, caller, name, endpoint=anthropic.PATH)
        context_tokens = models[lane.model].context_tokens
    except (errors.UnknownModel, errors.LaneForbidden):
        context_tokens = None
    label = models[name].label if name in models else None
    return anthropic_models.model(name, display_name=label or name, context_tokens=context_tokens)
