"""`webhooks:`, where webhooks may go beside the public internet."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.json_schema import WithJsonSchema

from broker.policy.part import Part

PLACES_MAX = 100

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})?(\.[a-z0-9_]([a-z0-9_-]{0,62})?)*")


def _place(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        if "/" in value or value.replace(".", "").isdigit() or ":" in value:
            raise ValueError(f"is no network: {error}") from None
        if not _HOST.fullmatch(value):
            raise ValueError("is neither a network such as 10.0.0.0/8 nor a host's name in lower case") from None
    return value


Place = Annotated[str, AfterValidator(_place), WithJsonSchema({"type": "string", "minLength": 1})]


class Webhooks(Part):
    """Where webhooks may go beside the public internet."""

    allow: list[Place] = Field(
        default_factory=list,
        max_length=PLACES_MAX,
        description="Networks (10.0.0.0/8), addresses and hosts that webhooks may reach although they are private.",
    )
