"""The OpenAPI document is made of the routes: none is left out, none made up, and whatever it points at is there."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from api import app, connection, door, openapi
from api.described import WISHES
from api.exchange import Exchange
from api.gateway import Gateway
from api.openapi import Document
from api.visit import Wishes
from broker.callers import Keys
from broker.errors import BadRequest
from broker.store import Store
from tests.support.broker_world import fake_redis

ROOT = Path(__file__).parents[2]


def written(*routes: Any, with_keys: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Document(routes, version="1.2.3").read(with_keys=with_keys))
    return found


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return written(*app.HOT, *(route for router in app.REST for route in router.routes))


async def test_what_is_served_is_described_and_the_other_way_round() -> None:
    """Taken from the application itself: an endpoint that somebody adds in a new way must not slip by."""
    rest = app.rest_of(Gateway(Store.fake(fake_redis()), Keys.parse(""), version="1.2.3"))
    served = {("post", kind.path) for kind in app.HOT}
    for route in flat(rest.routes):
        assert isinstance(route, APIRoute), f"{route} is no endpoint that can be described"
        served |= {(method.lower(), re.sub(r":\w+}", "}", route.path)) for method in route.methods}
    found = json.loads(rest.state.document.read(with_keys=True))
    assert {(method, path) for path, item in found["paths"].items() for method in item} == served
    assert found["info"]["version"] == "1.2.3"


def flat(routes: list[Any]) -> Iterator[Any]:
    """A newer FastAPI keeps an included router as one route, an older one takes its routes over."""
    for route in routes:
        router = getattr(route, "original_router", None)
        yield from [route] if router is None else flat(router.routes)


def test_a_route_without_a_description_is_found() -> None:
    router = APIRouter()

    @router.get("/v1/new")
    async def new() -> None: ...

    with pytest.raises(AttributeError, match="described"):
        written(*router.routes)


def test_whatever_it_points_at_is_there_and_nothing_lies_about(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    pointed = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert pointed == schemas.keys()
    for name in schemas:
        jsonschema_rs.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids)) > 30
    for at, item in document["paths"].items():
        for operation in item.values():
            within = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert within == set(re.findall(r"{(\w+)}", at))


def test_without_keys_nobody_needs_one(document: dict[str, Any]) -> None:
    assert {} not in document["security"]
    assert {} in written(*app.HOT, with_keys=False)["security"]
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_it_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once: a gateway that nobody asks does not pay for it."""
    made: list[str] = []
    monkeypatch.setattr(openapi, "document", lambda found, *, with_keys, **_: made.append(f"{with_keys}") or {})
    lazy = Document(app.HOT, version="1")
    assert made == []
    assert lazy.read(with_keys=False) is lazy.read(with_keys=False) and made == ["False"]
    assert lazy.read(with_keys=True) and made == ["False", "True"]  # somebody has made the first key meanwhile


SAID = {
    "X-Gateway-Lane": ["fast-edit"],
    "X-Session-Affinity": ["tab-7", "", "a b", "x" * 128, "x" * 129, "ü"],
    "X-SLO-TTFT-Ms": ["1", "86400000", "86400001", "0", "-1", "soon", "1.5", "123456789"],
    "X-Gateway-Allow-Remote": ["true", "false", "yes"],
    "X-Gateway-On-Disconnect": ["keep", "cancel", "stay"],
    "Idempotency-Key": ["k", "", "k" * 255, "k" * 256, "a b", "ü"],
    "traceparent": ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "", "none"],
    "X-Stainless-Retry-Count": ["0", "1", "many"],
    "X-Stainless-Read-Timeout": ["600", "2.5", "never"],
}


@pytest.mark.parametrize("name", WISHES)
async def test_headers_are_judged_as_they_are_described(name: str) -> None:
    validator = jsonschema_rs.Draft202012Validator(WISHES[name])
    for text in SAID[name]:
        scope = {"method": "POST", "path": "/", "headers": [(name.lower().encode(), text.encode("latin-1"))]}
        try:
            Wishes.of(Exchange(scope, None, None))  # type: ignore[arg-type]  # nothing is received or sent
            taken = True
        except BadRequest:
            taken = False
        value = int(text) if WISHES[name].get("type") == "integer" and text.lstrip("-").isdigit() else text
        assert validator.is_valid(value) == taken, text


def test_what_the_door_refuses_is_described_in_words() -> None:
    """It stands at no route: whatever is asked, a request may end there."""
    source = inspect.getsource(connection) + inspect.getsource(door)
    codes = set(re.findall(r'Wrong\(\s*"(\w+)"', source))
    assert len(codes) >= 8
    for text in (openapi._ABOUT, (ROOT / "README.md").read_text()):
        assert [code for code in codes if f"`{code}`" not in text] == []
