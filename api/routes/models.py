"""GET /v1/models: every name that a client may ask for, routing names and aliases too."""

from typing import Any

from fastapi import APIRouter

from api.auth import Caller, Gate
from api.described import Described, described, says
from broker import errors
from broker.dialects import openai
from broker.dialects.json_schema import text
from broker.policy.sentences import near_words

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@described(Described("What can be asked for", "openai", says("Names.", "ModelList"), fails=(errors.ModelUnavailable,)))
async def list_models(gateway: Gate, _caller: Caller) -> dict[str, Any]:
    """Lists models, aliases, routing names and lanes."""
    return openai.models_list(gateway.book.active.policy.names())


@router.get("/v1/models/{name:path}")
@described(
    Described(
        "One of the names", "openai", says("It can be asked for.", "ListedModel"),
        within={"name": text("A model, alias or routing name; it may hold slashes.")},
        fails=(errors.UnknownModel, errors.ModelUnavailable),
    )
)  # fmt: skip
async def show_model(name: str, gateway: Gate, _caller: Caller) -> dict[str, Any]:
    """Shows one of them."""
    names = gateway.book.active.policy.names()
    if name not in names:
        raise errors.UnknownModel(name, near_words(name, names, most=3))
    found: dict[str, Any] = openai.models_list([name])["data"][0]
    return found
