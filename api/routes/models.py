"""GET /v1/models: every name that a client may ask for, routing names and aliases too."""

from typing import Any

from fastapi import APIRouter

from api.auth import Caller, Gate
from api.gateway import Gateway
from broker import callers, errors
from broker.dialects import openai
from broker.policy.sentences import near_words

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Lists models, aliases, routing names and lanes, as far as the caller may ask for them."""
    return openai.models_list(_names(gateway, caller))


@router.get("/v1/models/{name:path}")
async def show_model(name: str, gateway: Gate, caller: Caller) -> dict[str, Any]:
    """Shows one of them."""
    names = _names(gateway, caller)
    if name not in names:
        raise errors.UnknownModel(name, near_words(name, names, most=3))
    found: dict[str, Any] = openai.models_list([name])["data"][0]
    return found


def _names(gateway: Gateway, caller: callers.Caller) -> list[str]:
    return [name for name in gateway.book.active.policy.names() if caller.rights.may_ask_for(name)]
