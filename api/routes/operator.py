"""What an operator asks for: POST /v1/models/<name>/<verb> and /v1/hosts/<host>/<verb>; an administrator's key may."""

from typing import Any

from fastapi import APIRouter

from api.auth import Admin, Gate
from api.described import Described, described, says
from api.gateway import Gateway
from broker import errors, operator
from broker.dialects.json_schema import one_of, text
from broker.policy.sentences import near_words

router = APIRouter(tags=["operator"])

MODEL_VERBS = ("warm", "unload", "reset", "pin", "unpin")
HOST_VERBS = ("drain", "undrain")


@router.post("/v1/models/{name:path}/{verb}")
@described(
    Described(
        "Warm, unload, reset, pin or unpin a model", "operator", says("The model's status then.", "ModelStatus"),
        within={
            "name": text("A model, or a name that leads to one; it may hold slashes."),
            "verb": one_of(*MODEL_VERBS),
        },
        fails=(
            errors.AdminOnly, errors.BadRequest, errors.UnknownModel, errors.WishRefused, errors.ModelUnavailable,
            errors.BrokerUnavailable,
        ),
    )
)  # fmt: skip
async def ask_of_model(name: str, verb: str, gateway: Gate, _admin: Admin) -> dict[str, Any]:
    """Does it, or begins it; gives the model's status as it is then."""
    _known_verb(verb, MODEL_VERBS)
    store, active = gateway.store, gateway.book.active
    model = operator.model_named(active, name)
    match verb:
        case "warm":
            await operator.warm(store, active, gateway.fleet, model)
        case "unload":
            await operator.unload(store, active, gateway.fleet, model)
        case "reset":
            await operator.reset(store, gateway.fleet, model)
        case "pin" | "unpin":
            await operator.pin(store, model, pinned=verb == "pin")
    return await _shown(gateway, "models", model)


@router.post("/v1/hosts/{host}/{verb}")
@described(
    Described(
        "Drain or undrain a host", "operator", says("The host's status then.", "HostStatus"),
        within={"host": text("A live host, as /v1/status names it."), "verb": one_of(*HOST_VERBS)},
        fails=(
            errors.AdminOnly, errors.BadRequest, errors.UnknownHost, errors.WishRefused, errors.ModelUnavailable,
            errors.BrokerUnavailable,
        ),
    )
)  # fmt: skip
async def ask_of_host(host: str, verb: str, gateway: Gate, _admin: Admin) -> dict[str, Any]:
    """Does it once the host's worker shows that it heard; gives the host's status as it is then."""
    _known_verb(verb, HOST_VERBS)
    await operator.drain(gateway.store, gateway.fleet, host, drained=verb == "drain")
    return await _shown(gateway, "hosts", host)


def _known_verb(verb: str, known: tuple[str, ...]) -> None:
    if verb not in known:
        near = near_words(verb, known, most=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise errors.BadRequest(f"{verb[:40]!r} is none of {', '.join(known)}{hint}", "verb")


async def _shown(gateway: Gateway, kind: str, name: str) -> dict[str, Any]:
    told = (await gateway.snapshots.latest()).as_json()
    found: dict[str, Any] = next((x for x in told[kind] if x["name"] == name), {"name": name})
    return found
