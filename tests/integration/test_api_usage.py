"""GET /v1/usage over a live api: what clients got is what it tells, refusals included, and to each only its own."""

import csv
import io
from typing import Any

import httpx
import pytest

from api.usage_table import usage_csv
from broker.store import Store
from tests.support.live_api import Scene, chat_body, live_scene

KEYS = "boss:boss-secret"
BOSS = {"authorization": "Bearer boss-secret"}


Headers = dict[str, str]


async def ask(http: httpx.AsyncClient, said: str, key: Headers | None = None, **words: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", content=chat_body(said, stream=False, **words), headers=key)


async def usage(http: httpx.AsyncClient, question: str = "", key: Headers | None = None) -> dict[str, Any]:
    found = await http.get(f"/v1/usage{question}", headers=key)
    assert found.status_code == 200, found.text
    told: dict[str, Any] = found.json()
    return told


async def test_it_tells_what_each_client_got_and_to_each_only_its_own(store: Store) -> None:
    async with live_scene(store, keys=KEYS) as scene, httpx.AsyncClient(base_url=scene.api.url) as http:
        await scene.api.name("ann", "ci")
        ann, bot = scene.api.bearer("ann"), scene.api.bearer("ci")
        for _ in range(3):
            assert (await ask(http, "hello", ann)).status_code == 200
        assert (await ask(http, "hello", bot, model="fast-edit")).status_code == 200
        assert (await ask(http, "refuse", ann)).status_code == 422
        refusals = [
            await ask(http, "hello", ann, model="nothing-of-the-kind"),
            await ask(http, "word " * 2_000, ann, model="hasty"),
            await http.post("/v1/chat/completions", content=b"{", headers=ann),
            await ask(http, "hello"),
            await ask(http, "hello", scene.api.bearer("somebody-else")),
        ]
        nothing = await http.post("/v1/messages/count_tokens", content=b"{}", headers=ann)
        assert nothing.status_code == 400, "it is refused, and it asked for no generation"
        assert [answer.status_code for answer in refusals] == [404, 400, 400, 401, 401]
        await scene.api.gateway.refusals.write()
        codes = {"context_length_exceeded": 1, "invalid_request": 1, "model_not_found": 1}

        mine = await usage(http, "?by=model", ann)
        assert mine["caller"] == "ann" and mine["total"]["refused_by"] == codes
        assert {row["model"]: (row["asked"], row["done"], row["failed"]) for row in mine["rows"]} == {
            "big": (4, 3, 1), "hasty": (1, 0, 0), "-": (2, 0, 0),
        }  # fmt: skip
        assert (mine["total"]["tokens_in"], mine["total"]["tokens_out"]) == (9, 6)
        assert mine["total"]["failed_by"] == {"runtime_refused": 1}
        ci = await usage(http, "?caller=ci&since=1d&by=lane,model", bot)
        assert [(row["lane"], row["model"], row["done"], row["in_time"]) for row in ci["rows"]] == [
            ("small", "small", 1, 1)
        ]
        others = await http.get("/v1/usage?caller=ci", headers=ann)
        nobodys = await http.get("/v1/usage?caller=nobody", headers=ann)
        assert others.status_code == nobodys.status_code == 403 and others.content == nobodys.content
        everybody = await usage(http, "?by=caller", BOSS)
        assert [(row["caller"], row["asked"]) for row in everybody["rows"]] == [("-", 2), ("ann", 7), ("ci", 1)]
        assert (await usage(http, "?caller=ci", BOSS))["total"] == ci["total"]
        assert (await http.get("/v1/usage")).status_code == 401


async def test_without_keys_everybody_on_this_machine_sees_everything(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        assert (await usage(http))["rows"] == []
        await ask(http, "hello")
        told = await usage(http, "?since=2w&by=day,caller")
        [row] = told["rows"]
        assert (row["caller"], row["done"], told["caller"]) == ("anonymous", 1, None)
        assert (await usage(http, "?caller=ann"))["total"]["asked"] == 0


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("?by=modle", "'modle' is none of day, caller, lane, model; did you mean model?"),
        ("?since=soon", "since is a date like 2026-11-22, or days or weeks back like 7d or 2w"),
        ("?until=soon", "until is a date like 2026-11-22"),
        ("?since=1000d", "since is from 1 to 400 days back"),
    ],
)
async def test_a_question_that_makes_no_sense_is_a_sentence(scene: Scene, question: str, words: str) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        answer = await http.get(f"/v1/usage{question}")
    assert answer.status_code == 400 and answer.json()["error"]["message"] == words


async def test_refusals_are_written_about_every_second_and_at_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of them makes no trips of its own; what an orderly stop finds is not lost."""
    async with live_scene(store) as scene, httpx.AsyncClient(base_url=scene.api.url) as http:
        trips: list[str] = []
        run = Store.run

        async def spy(self: Store, verb: str, *words: Any) -> Any:
            trips.append(verb)
            return await run(self, verb, *words)

        monkeypatch.setattr(Store, "run", spy)
        for _ in range(20):
            assert (await ask(http, "hello", model="nothing")).status_code == 404
        assert trips.count("count_refusals") <= 5 and "submit" not in trips
    async with live_scene(store) as scene, httpx.AsyncClient(base_url=scene.api.url) as http:
        assert (await usage(http))["total"]["refused_by"] == {"model_not_found": 20}


async def test_the_csv_of_a_live_answer_is_csv(scene: Scene) -> None:
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        await ask(http, "hello")
        told = await usage(http, "?by=caller,lane")
    [row] = csv.DictReader(io.StringIO(usage_csv(told)))
    assert (row["caller"], row["lane"], row["day"], row["done"]) == ("anonymous", "big", "", "1")
