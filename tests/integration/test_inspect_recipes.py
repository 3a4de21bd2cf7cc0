"""Each recipe of docs/inspect.md is run against a live server, and what it gives is held against `gateway status`."""

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import redis
import yaml

from broker import wake
from broker.keyspace import GROUP
from broker.store import Store
from tests.support.broker_world import new_namespace
from tests.support.live_api import Scene, chat_body, live_scene, until_true
from tests.support.redis_server import RedisServer
from tests.support.redis_words import redis_cli, told

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "inspect.md").read_text()
RECIPES = [line.partition(" #")[0].strip() for line in PAGE.splitlines() if line.startswith("redis-cli ")]

POLICY = """
headerHoldMs: 400
models:
  deep-coder:
    backend: simulated
    model: weights-deep
    maxConcurrent: 2
    maxQueue: 6
    coldStartBudgetMs: 60000
    fallback: coder-small
  coder-small:
    backend: simulated
    model: weights-small
"""


@dataclass
class Seen:
    """A busy gateway as its status tells it, and what a recipe gives of the same moment."""

    url: str
    namespace: str
    status: dict[str, Any]
    jobs: dict[str, dict[str, Any]]
    """Word for a job -> what `GET /v1/jobs/<id>` says of it."""
    now_ms: int
    ran: set[str] = field(default_factory=set)

    def lane(self, name: str = "deep-coder") -> dict[str, Any]:
        return next(lane for lane in self.status["lanes"] if lane["name"] == name)

    def model(self, name: str = "deep-coder") -> dict[str, Any]:
        return next(model for model in self.status["models"] if model["name"] == name)

    @property
    def in_lanes(self) -> int:
        return sum(lane["waiting"] + lane["running"] for lane in self.status["lanes"])

    def run(self, recipe: str) -> list[str]:
        """The lines of a recipe, which must stand on the page."""
        assert recipe in RECIPES, recipe
        self.ran.add(recipe)
        line = recipe.replace("gw:", f"{self.namespace}:").replace("ID", self.jobs["runs"]["id"])
        return redis_cli(self.url, line.replace("DAY", self.day))

    def hash(self, recipe: str) -> dict[str, str]:
        lines = self.run(recipe)
        return dict(zip(lines[::2], lines[1::2], strict=True))

    @property
    def day(self) -> str:
        return datetime.fromtimestamp(self.now_ms / 1000, UTC).strftime("%Y-%m-%d")


@pytest_asyncio.fixture
async def seen(redis_server: RedisServer) -> AsyncIterator[Seen]:
    """Two jobs run, three wait, one starts later, one is done and one dead; a model is being woken."""
    store = await Store.open(redis_server.url, namespace=new_namespace(), name="test-api")
    async with live_scene(store, keys="ann:secret", policy=POLICY) as scene:
        async with httpx.AsyncClient(base_url=scene.api.url, headers={"authorization": "Bearer secret"}) as http:
            jobs = await busy(scene, http)
            assert await wake.take(store, "deep-coder", host="gpu1", boot="boot1") is not None
            status = (await http.get("/v1/status")).json()
            yield Seen(redis_server.url, store.keys.namespace, status, jobs, await store.now_ms())
            scene.go.set()
    await store.close()


async def busy(scene: Scene, http: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    async def put(said: str, **more: Any) -> str:
        order = {"body": json.loads(chat_body(said, model="deep-coder")), "priority": "interactive", **more}
        answer = await http.post("/v1/jobs", json=order)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def until(job_id: str, *states: str) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            job: dict[str, Any] = (await http.get(f"/v1/jobs/{job_id}")).json()
            return job if job["state"] in states else None

        found: dict[str, Any] = await until_true(reached, what=f"{job_id} is {states}")
        return found

    done = await until(await put("hello"), "done")
    dead = await until(await put("break_early"), "failed")
    runs = [await until(await put("wait"), "claimed") for _ in range(2)]
    waits = [await until(await put("wait"), "queued") for _ in range(3)]
    later = await until(await put("wait", notBefore="10m"), "scheduled")
    return {"done": done, "dead": dead, "runs": runs[0], "waits": waits[0], "later": later}


def lanes_and_jobs(seen: Seen) -> None:
    lane = seen.lane()
    assert (lane["waiting"], lane["running"]) == (3, 2)
    assert seen.run("redis-cli XLEN gw:lane:deep-coder") == [str(lane["waiting"] + lane["running"])]
    pending = seen.run("redis-cli XPENDING gw:lane:deep-coder workers")
    assert pending[0] == str(lane["running"]) and pending[3:] == ["gpu1", "2"]
    entries = seen.run("redis-cli XRANGE gw:lane:deep-coder - + COUNT 10")
    ids = [value for name, value in pairwise(entries) if name == "job"]
    assert len(ids) == 5 and seen.jobs["runs"]["id"] in ids[:2] and ids[2] == seen.jobs["waits"]["id"]
    full = seen.run("redis-cli XINFO STREAM gw:lane:deep-coder FULL COUNT 3")
    assert full[full.index("length") + 1] == "5" and full[full.index("pel-count") + 1] == str(lane["running"])
    live = seen.run("redis-cli ZCARD gw:due")
    assert live == [str(seen.in_lanes + 1)], "and the one that starts later"
    due = seen.run("redis-cli ZRANGE gw:due 0 9 WITHSCORES")
    assert set(due[::2]) > set(ids) and all(int(score) > seen.now_ms for score in due[1::2])
    assert sorted(due[1::2], key=int) == due[1::2]
    job = seen.hash("redis-cli HGETALL gw:job:ID")
    told = seen.jobs["runs"]
    assert {name: job[name] for name in ("id", "state", "lane", "model", "caller")} == {
        name: told[name] for name in ("id", "state", "lane", "model", "caller")
    }
    assert int(job["submitted_at"]) == told["submitted_at"] and int(job["claimed_at"]) == told["claimed_at"]
    assert seen.run("redis-cli HMGET gw:job:ID state lane attempt owner") == ["claimed", "deep-coder", "1", "gpu1"]
    waits = seen.run("redis-cli ZRANGE gw:waits:ann 0 -1")
    assert len(waits) == lane["waiting"] + 1 and f"deep-coder/{seen.jobs['waits']['id']}" in waits
    lanes = seen.run("redis-cli --scan --pattern 'gw:lane:*'")
    assert lanes == [f"{seen.namespace}:lane:deep-coder"]


def models_and_hosts(seen: Seen) -> None:
    model, (host,) = seen.model(), seen.status["hosts"]
    here = seen.hash("redis-cli HGETALL gw:model:deep-coder:gpu1")
    assert (here["state"], float(here["first_token_ms"])) == (model["state"], model["first_token_ms"])
    assert (int(here["slots_total"]), int(here["memory_bytes"])) == (model["slots_total"], model["memory_bytes"])
    wanted = seen.run("redis-cli HGET gw:model:deep-coder wanted_until")
    assert model["wanted"] and int(wanted[0]) > seen.now_ms
    assert seen.run("redis-cli GET gw:wake:deep-coder") == ["gpu1/boot1/1"]
    assert 0 < int(seen.run("redis-cli PTTL gw:wake:deep-coder")[0]) <= wake.WAKE_TTL_MS
    name, beat = seen.run("redis-cli ZRANGE gw:hosts 0 -1 WITHSCORES")
    assert name == host["name"] and int(beat) <= seen.now_ms
    assert seen.run("redis-cli HGET gw:policy version") == [str(seen.status["policy_version"])]


def what_ended(seen: Seen) -> None:
    assert seen.run("redis-cli XLEN gw:dead") == ["1"]
    letter = seen.run("redis-cli XREVRANGE gw:dead + - COUNT 5")
    assert letter[letter.index("job") + 1] == seen.jobs["dead"]["id"]
    assert letter[letter.index("code") + 1] == seen.jobs["dead"]["error"]["code"]
    assert seen.run("redis-cli ZREVRANGE gw:webhook_list:* 0 9") == [], "nobody wanted one"
    by = seen.run("redis-cli HKEYS gw:usage:DAY")
    assert by == ["ann:deep-coder:deep-coder:deep-coder"]
    figures = seen.hash("redis-cli HGETALL gw:usage:DAY:ann:deep-coder:deep-coder:deep-coder")
    ended = {name.split("/")[0]: int(count) for name, count in figures.items() if "/" in name}
    assert (ended["done"], ended["failed"]) == (1, 1)
    assert int(figures["tokens_in"]) == seen.model()["prompt_tokens"]


@pytest.mark.parametrize("look", [lanes_and_jobs, models_and_hosts, what_ended])
async def test_what_redis_cli_gives_is_what_status_tells(seen: Seen, look: Callable[[Seen], None]) -> None:
    await asyncio.to_thread(look, seen)


async def test_every_recipe_is_run(seen: Seen) -> None:
    for look in (lanes_and_jobs, models_and_hosts, what_ended):
        await asyncio.to_thread(look, seen)
    assert len(RECIPES) > 20 and seen.ran == set(RECIPES)


# --- RedisInsight ------------------------------------------------------------------------------------------------

ASKED_BY_INSIGHT = """
PING
INFO server
SELECT 0
CLIENT SETNAME redisinsight
COMMAND COUNT
DBSIZE
SCAN 0 MATCH gw:* COUNT 500
SCAN 0 MATCH gw:* COUNT 500 TYPE stream
TYPE gw:lane:deep-coder
TTL gw:lane:deep-coder
MEMORY USAGE gw:lane:deep-coder
XINFO STREAM gw:lane:deep-coder
XRANGE gw:lane:deep-coder - + COUNT 500
XINFO GROUPS gw:lane:deep-coder
XINFO CONSUMERS gw:lane:deep-coder workers
XPENDING gw:lane:deep-coder workers - + 500
HLEN gw:job:ID
HSCAN gw:job:ID 0 COUNT 500
ZCARD gw:due
ZSCAN gw:due 0 COUNT 500
ZRANGE gw:due 0 499 WITHSCORES
GET gw:wake:deep-coder
STRLEN gw:wake:deep-coder
"""
"""What its browser asks to show a tree, a stream, a group, a hash, a set and a string."""

REFUSED_TO_INSIGHT = """
XACK gw:lane:deep-coder workers 1-1
XCLAIM gw:lane:deep-coder workers insight 0 1-1
XDEL gw:lane:deep-coder 1-1
DEL gw:job:ID
HSET gw:job:ID state done
EXPIRE gw:job:ID 1
FLUSHALL
CONFIG GET *
KEYS *
"""


async def test_redis_insight_may_look_and_nothing_else(seen: Seen, redis_server: RedisServer) -> None:
    """Its buttons send what is refused here. That the program itself starts is nothing that a test here can see."""
    words = next(line.strip() for line in PAGE.splitlines() if line.strip().startswith("ACL SETUSER insight"))
    words = words.replace("SECRET", "secret").replace("~gw:", f"~{seen.namespace}:")

    def look() -> None:
        def lines(text: str) -> list[list[str]]:
            named = text.replace("gw:", f"{seen.namespace}:").replace("ID", seen.jobs["runs"]["id"])
            return [shlex.split(line) for line in named.strip().splitlines()]

        with redis.Redis.from_url(seen.url, protocol=2) as owner:
            told(owner, *shlex.split(words))
            try:
                with redis.Redis(port=redis_server.port, username="insight", password="secret", protocol=2) as client:
                    answers = {" ".join(line[:2]): told(client, *line) for line in lines(ASKED_BY_INSIGHT)}
                    for line in lines(REFUSED_TO_INSIGHT):
                        with pytest.raises(redis.exceptions.NoPermissionError):
                            told(client, *line)
            finally:
                told(owner, "ACL", "DELUSER", "insight")
        (group,) = answers["XINFO GROUPS"]
        facts = dict(zip(group[::2], group[1::2], strict=True))
        assert (facts[b"name"], facts[b"pending"]) == (GROUP.encode(), seen.lane()["running"])
        (consumer,) = answers["XINFO CONSUMERS"]
        assert consumer[1].decode() == seen.status["hosts"][0]["name"]

    await asyncio.to_thread(look)


# --- redis_exporter and KEDA -------------------------------------------------------------------------------------


def block(language: str, word: str) -> str:
    """The block of the page that begins with this word."""
    found = re.search(rf"```{language}\n({word}.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_exporter_would_read_what_status_tells(seen: Seen) -> None:
    """Its figures are XINFO STREAM's length, XINFO GROUPS' pending and the sizes of the keys that are named."""
    words = shlex.split(block("sh", "redis_exporter").replace("\\\n", ""))
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
    streams, keys = options["check-single-streams"].split(","), options["check-single-keys"].split(",")
    assert [stream.removeprefix("gw:lane:") for stream in streams] == [m["name"] for m in seen.status["models"]]
    assert keys == ["gw:due", "gw:dead"] and "streams-exclude-consumer-metrics" in options

    def look() -> None:
        with redis.Redis.from_url(seen.url, protocol=2) as client:
            stream = streams[0].replace("gw:", f"{seen.namespace}:")
            length, (group,) = client.xinfo_stream(stream)["length"], client.xinfo_groups(stream)
            lane = seen.lane()
            assert length - group["pending"] == lane["waiting"] and group["pending"] == lane["running"]
            assert client.zcard(keys[0].replace("gw:", f"{seen.namespace}:")) == seen.in_lanes + 1
            assert client.xlen(keys[1].replace("gw:", f"{seen.namespace}:")) == 1
            assert not client.exists(streams[1].replace("gw:", f"{seen.namespace}:")), "nobody has used it"

    await asyncio.to_thread(look)


async def test_keda_would_count_waiting_and_running_jobs(seen: Seen) -> None:
    (trigger,) = yaml.safe_load(block("yaml", "apiVersion: keda"))["spec"]["triggers"]
    spec = yaml.safe_load(block("yaml", "apiVersion: keda"))["spec"]
    asks = trigger["metadata"]
    assert trigger["type"] == "redis-streams" and "consumerGroup" not in asks and "lagCount" not in asks
    assert spec["minReplicaCount"] >= 1, "from none nothing scales up: what no host can serve is refused at the door"
    lane = seen.lane(asks["stream"].removeprefix("gw:lane:"))

    def length() -> int:
        with redis.Redis.from_url(seen.url, protocol=2) as client:
            return int(client.xlen(asks["stream"].replace("gw:", f"{seen.namespace}:")))

    counted = await asyncio.to_thread(length)
    assert counted == lane["waiting"] + lane["running"] == 5
    assert -(-counted // int(asks["streamLength"])) == 1


async def test_from_no_worker_nothing_scales_up(redis_server: RedisServer) -> None:
    """Why `minReplicaCount` is 1: the lane stays empty, since requests for it are refused."""
    store = await Store.open(redis_server.url, namespace=new_namespace(), name="test-api")
    async with live_scene(store, policy=POLICY) as scene:
        for model in scene.worker.models:
            await store.command("DEL", store.keys.model_on_host(model, "gpu1"))
        await store.command("DEL", store.keys.host("gpu1"))
        await scene.api.gateway.fleet.look()
        async with httpx.AsyncClient(base_url=scene.api.url) as http:
            answer = await http.post("/v1/chat/completions", content=chat_body("hello", model="deep-coder"))
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_unavailable"
        assert await store.command("XLEN", store.keys.lane("deep-coder")) == 0
    await store.close()
