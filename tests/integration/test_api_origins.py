"""A web page in a teammate's browser cannot drive a gateway without keys, nor read it under a name of its own."""

import httpx
import pytest

from api.door import Door
from broker.store import Store
from tests.support.live_api import RawClient, Scene, chat_body, live_scene
from tests.support.waiting import until

HOT = "/v1/chat/completions"
PLAIN = {"content-type": "text/plain"}
"""A page may send this anywhere, without asking first."""


@pytest.fixture
def store(fake_store: Store) -> Store:
    """The door asks no Redis: one server will do."""
    return fake_store


@pytest.mark.parametrize("path", [HOT, "/v1/messages", "/api/chat", "/v1/models/big/unload", "/v1/hosts/h/drain"])
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null", "http://evil.example"])
async def test_a_page_of_another_origin_reaches_no_handler(scene: Scene, path: str, origin: str) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        answer = await http.post(path, content=chat_body("hello"), headers={"origin": origin, **PLAIN})
    assert answer.status_code == 403 and "origin_refused" in answer.text
    assert scene.worker.seen == []
    assert await scene.store.command("ZCARD", scene.store.keys.due) == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example"]
)
async def test_a_name_that_is_not_ours_is_not_answered(scene: Scene, host: str) -> None:
    """What a page sees as its own host once its name resolves to this machine: same origin, but not by our name."""
    headers = {"host": host, "origin": f"http://{host}"}
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        for answer in (
            await http.post(HOT, content=chat_body("hello"), headers=headers),
            await http.get("/v1/status", headers={"host": host}),
        ):
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_refused"
    assert scene.worker.seen == []


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8400", "[::1]:8400", "gw.localhost", "host.docker.internal:8400"]
)
async def test_by_our_own_names_and_addresses_it_answers(scene: Scene, host: str) -> None:
    """Also a page of ours, whose origin is the very host that it calls."""
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
            assert (await http.post(HOT, content=chat_body("hello"), headers=headers)).status_code == 200


async def test_with_keys_any_host_will_do(store: Store) -> None:
    """A proxy in front has a name of its own; whoever calls has a key, and no page has."""
    async with live_scene(store, keys="ann:secret-a") as scene, httpx.AsyncClient(base_url=scene.api.url) as http:
        headers = {"host": "gateway.example.org", "authorization": "Bearer secret-a"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        headers["origin"] = "https://evil.example"
        assert (await http.get("/v1/models", headers=headers)).status_code == 403


def test_names_that_are_remembered_are_bounded() -> None:
    """Whoever calls may choose the port that it writes."""
    door = Door([])
    for port in range(1_000):
        scope = {"headers": [(b"host", b"localhost:%d" % port)], "http_version": "1.1"}
        assert door.wrong_with(scope, anonymous=True) is None
    assert len(door._hosts) <= 64


async def test_a_client_that_hangs_up_in_its_body_is_no_fault_of_ours(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """It was logged as an error that nobody foresaw, with a traceback: whoever wished could fill the disk with them."""

    client = await RawClient.open(scene.api)
    client.writer.write(b"POST /api/show HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    state = scene.api.server.server_state
    await until(lambda: len(state.tasks) == 1, what="it is being served")
    client.close()
    await until(lambda: not state.tasks, what="it has been let go")
    assert "unexpected" not in caplog.text
