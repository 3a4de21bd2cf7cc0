"""Every client against one gateway: answers, errors, retries, hang-ups and cold starts, as the client shows them."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.conformance.clients.conftest import Drive
from tests.conformance.clients.environments import PINS
from tests.conformance.clients.table import CLIENTS, Client, rows
from tests.support import scripted_answers as scripted
from tests.support.clients import user
from tests.support.gateway_process import House
from tests.support.waiting import block_until
from tests.support.wire import Beside, Wire
from tests.support.worker_world import eventually, words

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]  # the first use of a client installs it

REFUSALS = (503, 529)  # the latter is how Anthropic says it
FINISHED = {"length", "max_tokens", "stop", "end_turn"}


@pytest.mark.parametrize("client", rows("chat"))
def test_a_whole_answer(client: Client, drive: Drive, up: House) -> None:
    answer = drive(client).run("chat", up.url, "pretend", max_tokens=7).answer
    assert words(7) in answer["text"]
    assert answer["finish"] in FINISHED
    if client.name != "aider":
        assert (answer["text"], answer["tokens"]) == (words(7), 7)
        assert answer["model"] == "pretend"
        real = drive(client).run("chat", up.url, "tiny", max_tokens=7).answer
        assert real["tokens"] == 7 and real["text"]


@pytest.mark.parametrize("client", rows("stream"))
def test_a_streamed_answer(client: Client, drive: Drive, up: House) -> None:
    """Its pieces are the answer; none is missing and none comes twice."""
    seen = drive(client).run("stream", up.url, "pretend", max_tokens=12)
    assert words(12) in seen.answer["text"]
    if client.name != "aider":
        assert seen.pieces == seen.answer["text"] == words(12)
        assert len(seen.of("piece")) > 1
        real = drive(client).run("stream", up.url, "tiny", max_tokens=12)
        assert real.pieces == real.answer["text"] != ""


@pytest.mark.parametrize("client", rows("schema"))
def test_an_answer_keeps_to_a_schema(client: Client, drive: Drive, up: House) -> None:
    """Random weights say `{"ok": …}` only where the grammar reached the runtime."""
    found = json.loads(drive(client).run("schema", up.url, "tiny", max_tokens=200).answer["text"])
    assert found in ({"ok": True}, {"ok": False})


@pytest.mark.parametrize("client", rows("embed"))
def test_vectors(client: Client, drive: Drive, up: House) -> None:
    [vectors] = drive(client).run("embed", up.url, "embed-small").events
    assert (vectors["saw"], vectors["count"], vectors["width"]) == ("vectors", 2, 64)


@pytest.mark.parametrize("client", rows("models"))
def test_models_are_listed_page_by_page(client: Client, drive: Drive, up: House) -> None:
    """Anthropic's clients take no list of OpenAI's form; two to a page, they find every name once."""
    names = [model["id"] for model in httpx.get(f"{up.url}/v1/models").json()["data"]]
    seen = drive(client).run("models", up.url, "pretend")
    assert [model["id"] for model in seen.of("model")] == names and len(names) > 2
    assert {model["year"] for model in seen.of("model")} == {1970} and all(m["name"] for m in seen.of("model"))
    assert (seen.answer["id"], seen.answer["type"]) == ("pretend", "model")


@pytest.mark.parametrize("client", rows("tools"))
def test_a_tool_is_called_once_and_whole(client: Client, drive: Drive, up: House) -> None:
    seen = drive(client).run("tools", up.url, "thinker", max_tokens=50)
    assert not seen.of("error"), seen.events
    [call] = seen.of("tool")
    assert (call["name"], call["arguments"]) == ("weather", {"city": "Berlin"})


@pytest.mark.parametrize("client", rows("reasoning"))
def test_thoughts_are_no_part_of_the_answer(client: Client, drive: Drive, up: House) -> None:
    seen = drive(client).run("reasoning", up.url, "thinker", max_tokens=50)
    assert "".join(event["text"] for event in seen.of("thought")) == "".join(scripted.THOUGHTS)
    assert seen.answer["text"] == "".join(scripted.WORDS)


@pytest.mark.parametrize("client", rows("chat"))
def test_a_model_that_nobody_serves(client: Client, drive: Drive, wire: Wire) -> None:
    """An error of the client's own, at the first attempt."""
    error = drive(client).run("chat", wire.url, "nobody").error
    assert error["type"] == client.missing
    assert "nobody" in error["message"]
    if client.name != "aider":
        assert error["status"] == 404
    assert len(wire.requests(client.path)) == 1


@pytest.mark.parametrize("client", rows("late error"))
async def test_a_late_error_is_the_clients_own(client: Client, drive: Drive, up: House, wire: Wire) -> None:
    """After the first token nothing is tried again; what was said so far stays said."""
    runtime = up.runtime("pretend")
    await runtime.break_with(error_in_stream=5, times=1)
    try:
        seen = await asyncio.to_thread(drive(client).run, "stream", wire.url, "pretend", max_tokens=12)
    finally:
        await runtime.break_with(error_in_stream=None, times=None)
    assert seen.error["type"] == client.late
    assert seen.pieces and words(12).startswith(seen.pieces) and seen.pieces != words(12)
    assert len(wire.requests(client.path)) == 1


@pytest.mark.parametrize("client", rows("cancel"))
async def test_a_hang_up_is_heard_by_the_runtime(client: Client, drive: Drive, up: House) -> None:
    runtime = up.runtime("pretend")
    before = (await runtime.stats())["requests_aborted"]
    await asyncio.to_thread(drive(client).run, "stream", up.url, "pretend", max_tokens=3000, hang_up_after=3)

    async def heard() -> bool:
        return bool((await runtime.stats())["requests_aborted"] > before)

    await eventually(heard, what="the runtime hears of the hang-up", timeout_s=2.0)
    assert (await runtime.stats())["requests_aborted"] == before + 1


@pytest.mark.parametrize("client", [row for row in rows("chat") if row.values[0].retries])
async def test_a_full_lane_is_tried_again_when_it_said_so(client: Client, drive: Drive, up: House, wire: Wire) -> None:
    """It waits as long as Retry-After says, is served then, and once."""
    driver, runtime = await asyncio.to_thread(drive, client), up.runtime("narrow")

    def refused() -> bool:
        return any(reply.status in REFUSALS for reply in wire.replies)

    def ask() -> None:
        with held(up, "narrow"), held(up, "narrow"):
            driver.order("chat", wire.url, "narrow", max_tokens=2)
            block_until(refused, what="a refusal", timeout_s=60)

    await asyncio.to_thread(ask)
    before = (await runtime.stats())["requests_finished"]
    seen = await asyncio.to_thread(driver.hear)
    assert words(2) in seen.answer["text"]
    first, second = wire.requests(client.path)
    [refusal] = [reply for reply in wire.replies if reply.status in REFUSALS]
    assert first <= refusal.at_s
    assert 1 <= int(refusal.retry_after) <= 30
    if client.name != "aider":  # its own loop does not read the header
        assert int(refusal.retry_after) <= second - refusal.at_s < int(refusal.retry_after) + 3
    assert (await runtime.stats())["requests_finished"] == before + 1


@pytest.mark.parametrize("client", rows("come back"))
async def test_a_try_whose_connection_broke_is_come_back_to(
    client: Client, drive: Drive, up: House, wire: Wire, beside: Beside
) -> None:
    """The network cuts its first try off: the next gets what that one began, and the runtime generates once."""
    driver, runtime = await asyncio.to_thread(drive, client), up.runtime("pretend")
    before = (await runtime.stats())["requests_started"]
    driver.order("chat", wire.url, "pretend", max_tokens=200, prompt=f"{client.name} comes back")

    async def begun() -> bool:
        return bool((await runtime.stats())["requests_started"] > before)

    await eventually(begun, what="the runtime has the request", timeout_s=20)
    await asyncio.to_thread(beside.call, wire.cut())
    seen = await asyncio.to_thread(driver.hear)
    assert seen.answer["text"] == words(200)
    assert len(wire.requests(client.path)) == 2
    assert (await runtime.stats())["requests_started"] == before + 1


@contextmanager
def held(up: House, model: str) -> Iterator[None]:
    """A stream that holds a slot or a place in the lane until the block ends."""
    asked = {"model": model, "messages": user("hold"), "max_tokens": 3000, "stream": True}
    with httpx.Client(timeout=30) as http, http.stream("POST", f"{up.url}/v1/chat/completions", json=asked) as response:
        assert response.status_code == 200
        yield


# --- cold starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["chat", "stream"])
@pytest.mark.parametrize("client", rows("chat"))
async def test_a_cold_model_is_waited_for(client: Client, do: str, drive: Drive, up: House, wire: Wire) -> None:
    await wait_for_cold(client, do, drive, up, wire, word=f"cold-{do}")


@pytest.mark.parametrize("client", rows("chat", slow=True))
async def test_a_cold_start_of_twenty_seconds(client: Client, drive: Drive, up: House, wire: Wire) -> None:
    await wait_for_cold(client, "stream", drive, up, wire, word="long")


@pytest.mark.parametrize("client", rows("timeout"))
async def test_a_timeout_shorter_than_the_cold_start(client: Client, drive: Drive, up: House, wire: Wire) -> None:
    """Each SDK says its request's timeout; what comes within it keeps it waiting, for longer than it in all."""
    await wait_for_cold(client, "chat", drive, up, wire, word="impatient", timeout_s=2)


async def wait_for_cold(
    client: Client, do: str, drive: Drive, up: House, wire: Wire, *, word: str, **more: float
) -> None:
    """No timeout, no error, no second attempt; the runtime generates as often as for one plain request."""
    driver = await asyncio.to_thread(drive, client)
    model = f"{word}-{client.name}"
    seen = await asyncio.to_thread(driver.run, do, wire.url, model, max_tokens=6, **more)
    assert words(6) in seen.answer["text"]
    if client.name != "aider":
        assert seen.answer["text"] == words(6)
    assert len(wire.requests(client.path)) == 1
    ours = (await up.runtime(model).stats())["requests_started"]
    assert ours == await generations_of_one_request(up)


async def generations_of_one_request(up: House) -> int:
    """Of a cold model that was asked once by hand: its probes and the answer."""
    asked = {"model": "cold-chat-control", "messages": user("hi"), "max_tokens": 6}
    if not (up.data / "cold-chat-control.log").exists():
        async with httpx.AsyncClient(timeout=60) as http:
            (await http.post(f"{up.url}/v1/chat/completions", json=asked)).raise_for_status()
    return int((await up.runtime("cold-chat-control").stats())["requests_started"])


def test_every_client_has_its_pins() -> None:
    """Exact ones, and nothing else: no ranges, no addresses."""
    for client in CLIENTS:
        pins = (PINS / f"{client.name}.{'json' if client.is_node else 'txt'}").read_text()
        assert not set("^~><*") & set(pins) and "://" not in pins, client.name
