"""Web pages of other origins: they may call where the operator names them, and nowhere else."""

from collections.abc import AsyncIterator

import httpx
import pytest

from api.settings import ApiSettings
from broker.policies import PolicyBook
from broker.store import Store
from tests.support.live_api import POLICY, LiveApi, Scene, chat_body, live_api
from tests.support.scripted_worker import ScriptedWorker

PAGE = "https://chat.example.org"
HOT, REST = "/v1/chat/completions", "/v1/models"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-gateway-lane"}


@pytest.fixture
async def open_api(store: Store) -> AsyncIterator[LiveApi]:
    book = PolicyBook(store)
    await book.apply(POLICY)
    async with ScriptedWorker(store, book).running(), live_api(store, keys="a:secret", origins=PAGE) as running:
        yield running


def told(answer: httpx.Response) -> dict[str, str]:
    start = "access-control-"
    return {name.removeprefix(start): value for name, value in answer.headers.items() if name.startswith(start)}


@pytest.mark.parametrize("path", [HOT, REST, "/v1/messages", "/api/chat"])
async def test_a_preflight_is_answered_without_a_key(open_api: LiveApi, path: str) -> None:
    async with httpx.AsyncClient(base_url=open_api.url) as client:
        answer = await client.options(path, headers={"origin": PAGE, **ASKS})
        stranger = await client.options(path, headers={"origin": "https://evil.example", **ASKS})
    assert answer.status_code == 204 and "POST" in told(answer)["allow-methods"]
    assert told(answer)["allow-origin"] == PAGE
    assert told(answer)["allow-headers"] == ASKS["access-control-request-headers"]
    assert told(stranger) == {}


@pytest.mark.parametrize(("key", "status"), [("secret", 200), ("wrong", 401)])
async def test_answers_and_errors_can_be_read_with_our_headers(open_api: LiveApi, key: str, status: int) -> None:
    headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=open_api.url, headers=headers) as client:
        hot = await client.post(HOT, content=chat_body("hello"))
        for answer in (hot, await client.get(REST)):
            assert answer.status_code == status and told(answer)["allow-origin"] == PAGE
            assert "X-Gateway-Job" in told(answer)["expose-headers"] and "Retry-After" in told(answer)["expose-headers"]
            assert answer.headers["vary"] == "Origin"
        stranger = await client.get(REST, headers={"origin": "https://evil.example"})
    assert told(stranger) == {}
    assert (b"[DONE]" in hot.content) == (status == 200)


async def test_it_is_off_unless_it_is_asked_for(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url, headers={"origin": PAGE}) as client:
        for answer in (await client.get(REST), await client.options(HOT, headers=ASKS)):
            assert told(answer) == {} and answer.status_code == 403


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", set()),
        ("*", {"*"}),
        (" https://a.example , http://localhost:3000,", {"https://a.example", "http://localhost:3000"}),
        ("app://obsidian.md,http://[::1]:8", {"app://obsidian.md", "http://[::1]:8"}),
    ],
)
def test_origins_are_read(text: str, origins: set[str]) -> None:
    assert ApiSettings(cors_origins=text).origins == origins


@pytest.mark.parametrize("text", ["chat.example.org", "https://a.example/", "https://a.example/path", "null"])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is none"):
        ApiSettings(cors_origins=text)
