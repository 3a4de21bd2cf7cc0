"""GET /v1/models: every name that a client may ask for, routing names and aliases too."""

from typing import Any

from fastapi import APIRouter

from api.auth import Caller, Gate
from broker import errors
from broker.dialects import openai
from broker.policy.sentences import near_words

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(gateway: Gate, _caller: Caller) -> dict[str, Any]:
    """Lists models, aliases, routing names and lanes."""
    return openai.models_list(gateway.book.active.policy.names())


@router.get("/v1/models/{name:path}")
async def show_model(name: str, gateway: Gate, _caller: Caller) -> dict[str, Any]:
    """Shows one of them."""
    names = gateway.book.active.policy.names()
    if name not in names:
        raise errors.UnknownModel(name, near_words(name, names, most=3))
    found: dict[str, Any] = openai.models_list([name])["data"][0]
    return found
