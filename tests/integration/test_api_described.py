"""Every answer that the OpenAPI document describes is real: each status, code and media type of each endpoint is
provoked here, and is as it is described. One that nobody can provoke fails, and so does one that is not described.

A new endpoint, or an error that it may tell, wants a row of `PROVOKED` or of `Rest`.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import app, letting_in
from api.limits import Limits
from broker import errors, files, jobs, lanes, operator, webhooks
from broker.callers import Rights
from broker.capabilities import EMBEDDING_ENDPOINTS
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import JobRecord
from broker.store import Store
from tests.support.broker_world import a_later_version_applies, new_namespace
from tests.support.described import Book
from tests.support.live_api import LiveApi, RawClient, live_api, until_true
from tests.support.redis_server import RedisServer, start_server
from tests.support.scripted_worker import ScriptedWorker, Turn
from tests.support.worker_world import policy, simulated, worker_world

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SLOTS = 2  # of each model of a scripted worker; a lane that waits for them takes as many jobs more
KEYS = "ann:secret-a"
A_FILE: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"{}\n")}}
KEY = {"authorization": "Bearer secret-a"}
AS_ANTHROPIC = {"anthropic-version": "2023-06-01"}
RIGHTS = {
    "bob": Rights(),
    "fenced": Rights(lanes=("plain", "vec-plain")),
    "modest": Rights(max_waiting=1),
    "spent": Rights(tokens_per_day=1),
}
"""Named callers beside ann; what they may makes them fail."""
# --- generations -------------------------------------------------------------------------------------------------

COMPLETIONS, COUNT = "/v1/completions", "/v1/messages/count_tokens"
GENERATIONS = [kind.path for kind in app.HOT if kind.path != COUNT]
REFUSES = {f"refuses-{status}": status for status in errors.RuntimeRefused.STATUSES}
ENDS = ("completes", "breaks", "slow", "lost", *REFUSES)
ASK: dict[str, Callable[[str], dict[str, Any]]] = {
    COMPLETIONS: lambda said: {"prompt": said},
    "/v1/embeddings": lambda said: {"input": said},
    "/v1/responses": lambda said: {"input": said},
    "/api/generate": lambda said: {"prompt": said, "stream": False},
    "/api/embed": lambda said: {"input": said},
    "/api/embeddings": lambda said: {"prompt": said},
}


def ask(path: str, model: str, said: str = "Hi", **more: Any) -> dict[str, Any]:
    """A request of this endpoint; its model is the one of that name which gives the endpoint's kind of answer."""
    shape = ASK.get(path, lambda said: {"messages": [{"role": "user", "content": said}], "stream": False})
    return {"model": f"vec-{model}" if path in EMBEDDING_ENDPOINTS else model, **shape(said), **more}


def models() -> dict[str, Any]:
    """Two of each: one for text, one for vectors."""
    roomy = {"maxQueue": 50, "maxConcurrent": 50}
    one = {
        name: simulated(**roomy) for name in ("plain", "waits", "completes", "breaks", "slow", "lost", "gone", *REFUSES)
    }
    one |= {
        "full": simulated(maxQueue=1),
        "shared": simulated(maxQueue=4),
        "narrow": simulated(contextTokens=10, **roomy),
        "hasty": simulated(maxWaitMs=200, **roomy),
        "cold": simulated(maxWaitMs=200, **roomy),
        "far": {"backend": "openai", "model": "far", "url": "http://127.0.0.1:9", "trust": "remote", **roomy},
    }
    return one | {f"vec-{name}": {**model, "embeddings": True} for name, model in one.items()}


class Worker(ScriptedWorker):
    """The model's name says what becomes of its jobs; what must wait is never claimed."""

    def _free(self, model: str) -> bool:
        return _plain(model) in ENDS

    async def _run(self, turn: Turn) -> None:
        name = _plain(turn.record.model)
        if name == "completes":
            await jobs.first_token(turn.store, turn.held, completed("It is"))
            return await jobs.end(turn.store, turn.held, "finish", seq=2, data=completed(" so.", finish="stop"))
        ends: dict[str, errors.BrokerError] = {
            "breaks": errors.RuntimeFailed("the runtime closed the connection"),
            "slow": errors.RuntimeFailed("no first token within 1 s", status=504),
            "lost": errors.WorkerLost("Redis lost a part of this answer"),
        }
        status = REFUSES.get(name, 400)
        await turn.fail(ends.get(name) or errors.RuntimeRefused("the runtime does not like it", status=status))


def _plain(model: str) -> str:
    return model.removeprefix("vec-")


def completed(text: str, *, finish: str | None = None) -> bytes:
    """What a worker passes on of a runtime's completions, which the simulated one does not know."""
    said = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "completes"}
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps({**said, "choices": [choice]}).encode() + b"\n\n"


class Stage:
    """An api and a scripted worker, and whoever asks."""

    def __init__(self, api: LiveApi, book: Book, http: httpx.AsyncClient) -> None:
        self.api = api
        self.book = book
        self.http = http
        self.keys: dict[str, dict[str, str]] = {"ann": KEY}

    async def name_callers(self) -> None:
        """Gives everybody of RIGHTS a key; one of them has spent its tokens of the day."""
        gateway = self.api.gateway
        for name, rights in RIGHTS.items():
            made = await gateway.keys.new(name, rights, by="ann")
            self.keys[name] = {"authorization": f"Bearer {made.shown}"}
        today = datetime.now(UTC)
        for day in (today, today + timedelta(days=1)):
            await gateway.store.command("SET", gateway.store.keys.spent("spent", f"{day:%Y-%m-%d}"), 1)

    async def fill(self) -> None:
        """Lets jobs wait: `full` has no place left, ann has her share of `shared`, modest his one job."""
        waits = [("ann", "full")] * (SLOTS + 1) + [("bob", "shared")] + [("ann", "shared")] * ((SLOTS + 4) // 2)
        store, paths = self.api.gateway.store, ("/v1/chat/completions", "/v1/embeddings")
        filled = [(who, model, path) for path in paths for who, model in waits] + [("modest", "waits", paths[0])]
        for number, (who, model, path) in enumerate(filled, start=1):
            client = await RawClient.open(self.api)
            await client.send("POST", path, json.dumps(ask(path, model)).encode(), **self.keys[who])

            async def waits_too(number: int = number) -> bool:
                return int(await store.command("ZCARD", store.keys.due)) == number

            await until_true(waits_too, what=f"the job of {who} for {model} waits")

    async def ask(self, method: str, path: str, at: str = "", **more: Any) -> httpx.Response:
        """Asks `at`, which is a place of the described `path`; judges the answer."""
        headers = KEY | more.pop("headers", {})
        answer = await self.http.request(method, at or path, headers=headers, **more)
        self.book.judge(method.lower(), path, answer)
        return answer

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return await self.ask("POST", path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    async def first_event(self, path: str) -> None:
        """Reads the beginning of a stream that has no end."""
        async with self.http.stream("GET", path, headers=KEY) as answer:
            event = await anext(answer.aiter_text())
            self.book.judge("get", path, httpx.Response(answer.status_code, headers=answer.headers, text=event))

    async def unfinished(self, path: str, sent: bytes = b"", *, size: int = 50_000_000) -> None:
        """Says how large its body is, and is answered before it has sent more of it than this."""
        client = await RawClient.open(self.api)
        lines = [
            f"POST {path} HTTP/1.1",
            "host: t",
            f"authorization: {KEY['authorization']}",
            f"content-length: {size}",
        ]
        client.writer.write("\r\n".join([*lines, "", ""]).encode() + sent)
        status = await client.head()
        answer = httpx.Response(status, headers=client.headers, content=await client.body())
        client.close()
        self.book.judge("post", path, answer)


@asynccontextmanager
async def stage(store: Store, book: Book | None = None, limits: Limits | None = None) -> AsyncIterator[Stage]:
    async with (
        live_api(store, keys=KEYS, limits=limits) as api,
        httpx.AsyncClient(base_url=api.url, timeout=30) as http,
    ):
        book = book or Book((await http.get("/openapi.json")).json())
        yield Stage(api, book, http)


async def refused_generation(on: Stage, path: str) -> None:
    """Provokes whatever a generation of this endpoint may be refused with, or end with."""
    wrong_kind = ask("/v1/embeddings" if path not in EMBEDDING_ENDPOINTS else "/v1/chat/completions", "plain")["model"]
    long = "word " * 100
    await on.ask("POST", path, json=ask(path, "plain"), headers={"authorization": "Bearer nonsense"})
    await on.post(path, {"model": 7})
    await on.post(path, ask(path, "plain") | {"model": wrong_kind})
    await on.post(path, ask(path, "narrow", long))
    await on.post(path, ask(path, "far"))
    await on.post(path, ask(path, "nobody"))
    await on.post(path, ask(path, "plain"), x_gateway_lane="nowhere")
    await on.post(path, ask(path, "full"))
    await on.post(path, ask(path, "shared"))
    for name, model in (("fenced", "far"), ("modest", "plain"), ("spent", "plain")):
        await on.ask("POST", path, json=ask(path, model), headers=on.keys[name])
    await on.post(path, ask(path, "gone"))
    await on.unfinished(path)
    for model in ("breaks", "slow", "lost", "hasty", "cold", *REFUSES):
        await on.post(path, ask(path, model))
    key = f"key{path.replace('/', '-')}"
    waiting = asyncio.create_task(on.post(path, ask(path, "waits"), idempotency_key=key), name=f"waits at {path}")
    store = on.api.gateway.store
    bound = store.keys.idem("ann", key)
    job_id = (await until_true(lambda: store.command("GET", bound), what="the key is bound")).decode()
    await on.post(path, ask(path, "waits", "something else"), idempotency_key=key)
    await on.ask("DELETE", "/v1/jobs/{job_id}", f"/v1/jobs/{job_id.split()[0].split(':')[0]}")
    assert (await waiting).status_code == 499


# --- all other endpoints -----------------------------------------------------------------------------------------


RESPONSE = "/v1/responses/{response_id}"
RESPONSES = [("GET", ""), ("POST", "/cancel"), ("DELETE", "")]


async def background(on: Stage, model: str) -> str:
    """Has a response made in the background; gives its place."""
    made = await on.post("/v1/responses", ask("/v1/responses", model, background=True))
    return f"/v1/responses/{made.json()['id']}"


async def refused_rest(on: Stage) -> None:
    """Provokes what the others refuse while a policy is there and Redis answers."""
    for path, item in on.book.document["paths"].items():
        for method in item:
            if "401" in item[method]["responses"]:
                await on.ask(method.upper(), path, re.sub("{.*?}", "x", path), headers={"authorization": ""})
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/result"), ("POST", "/retry")):
        await on.ask(method, "/v1/jobs/{job_id}" + end, "/v1/jobs/nobody" + end)
    for method, end in RESPONSES:
        await on.ask(method, RESPONSE + end, "/v1/responses/resp_nobody" + end)
    at = await background(on, "waits")
    await on.ask("GET", RESPONSE, f"{at}?starting_after=1")
    await on.ask("GET", RESPONSE, f"{at}?stream=true&starting_after=7")
    for method, end in (("GET", ""), ("DELETE", ""), ("POST", "/retry")):
        await on.ask(method, "/v1/dead/{letter}" + end, "/v1/dead/nobody" + end)
    for path in ("/v1/jobs", "/v1/dead"):
        await on.ask("GET", path, f"{path}?limit=0")
        await on.ask("GET", path, f"{path}?caller=ann", headers=on.keys["bob"])
    await on.ask("GET", "/v1/models/{name}", "/v1/models/nobody")
    await on.ask("GET", "/page/{name}", "/page/nothing.js")
    await on.ask("GET", "/v1/usage", "/v1/usage?by=modle")
    for wrong in ("after=the-last", "since_ms=0"):
        await on.ask("GET", "/v1/audit", f"/v1/audit?{wrong}")
    await on.ask("GET", "/v1/models", "/v1/models?limit=none", headers=AS_ANTHROPIC)
    await on.ask("GET", "/v1/models", headers=AS_ANTHROPIC)
    for name in ("plain", "nobody"):
        await on.ask("GET", "/v1/models/{name}", f"/v1/models/{name}", headers=AS_ANTHROPIC)
    models, hosts = "/v1/models/{name}/{verb}", "/v1/hosts/{host}/{verb}"
    for path, at in (
        (models, "/v1/models/plain/worm"),
        (models, "/v1/models/nobody/warm"),
        (models, "/v1/models/far/unload"),
        (hosts, "/v1/hosts/gpu1/drown"),
        (hosts, "/v1/hosts/nobody/drain"),
        (hosts, "/v1/hosts/gpu1/drain"),  # its worker is deaf
    ):
        await on.ask("POST", path, at)
    await on.ask("GET", "/v1/usage", "/v1/usage?caller=ann", headers=on.keys["bob"])
    await on.ask("GET", "/v1/audit", headers=on.keys["bob"])
    await on.ask("GET", "/v1/tune", headers=on.keys["bob"])
    await on.ask("GET", "/v1/tune", "/v1/tune?since=tomorrow")
    for path, at in ((models, "/v1/models/plain/pin"), (hosts, "/v1/hosts/gpu1/drain")):
        await on.ask("POST", path, at, headers=on.keys["bob"])
    await refused_keys(on)
    made = (await on.ask("POST", SECRETS)).json()
    await refused_jobs(on)
    await refused_retries(on)
    await on.ask("DELETE", SECRET, f"{SECRETS}/{made['id']}")
    await failed_results(on)
    await refused_webhooks(on)
    await on.ask("POST", COUNT, json=ask("/v1/messages", "narrow"), headers=on.keys["fenced"])
    for path in ("/api/show", COUNT):
        await on.post(path, {})
        await on.post(path, ask("/v1/messages", "nobody"))
    await on.unfinished(COUNT)
    await on.ask("POST", "/api/show", content=b" " * 70_000)
    await refused_files(on)
    await refused_batches(on)


async def refused_batches(on: Stage) -> None:
    """Provokes what batches are refused with."""
    for method, end in (("GET", ""), ("POST", "/cancel")):
        await on.ask(method, "/v1/batches/{batch_id}" + end, "/v1/batches/batch_nobody" + end)
    await on.ask("GET", "/v1/batches", "/v1/batches?limit=0")
    await on.ask("POST", "/v1/batches", content=b" " * 70_000)
    store, made = on.api.gateway.store, await on.ask("POST", "/v1/files", **A_FILE)
    asked = a_batch(made.json()["id"])
    await on.post("/v1/batches", {})
    await on.post("/v1/batches", a_batch("file-nobody"))
    await on.post("/v1/batches", asked, x_gateway_lane="nowhere")
    for window in ("1h", "2h"):
        await on.post("/v1/batches", {**asked, "completion_window": window}, idempotency_key="once")
    await on.ask("POST", "/v1/batches", json=asked, headers={**on.keys["fenced"], "x-gateway-lane": "far"})
    until = await store.now_ms() + 600_000
    await store.command("ZADD", store.keys.batches_of("ann"), *(x for n in range(1_000) for x in (until, f"b{n}")))
    await on.post("/v1/batches", asked)


def a_batch(file_id: str) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


async def refused_files(on: Stage) -> None:
    """Provokes what files are refused with."""
    file, content = "/v1/files/{file_id}", "/v1/files/{file_id}/content"
    for method, path in (("GET", file), ("GET", content), ("DELETE", file)):
        await on.ask(method, path, path.replace("{file_id}", "file-nobody"))
    await on.ask("GET", "/v1/files", "/v1/files?limit=0")
    await on.ask("POST", "/v1/files", content=b"no form")
    await on.unfinished("/v1/files", size=200_000_000)
    store, made = on.api.gateway.store, await on.ask("POST", "/v1/files", **A_FILE)
    await store.command("HSET", store.keys.file(made.json()["id"]), "uses", 1)
    await on.ask("DELETE", file, f"/v1/files/{made.json()['id']}")
    await store.command("HSET", store.keys.files("ann"), "file-large", f"{10**12} {10**15}")
    await on.ask("POST", "/v1/files", **A_FILE)
    await store.command("HDEL", store.keys.files("ann"), "file-large")


JOBS, RETRIES = "/v1/jobs", ("/v1/jobs/{job_id}/retry", "/v1/dead/{letter}/retry")
CHAT = "/v1/chat/completions"


INNER = "http://127.0.0.1/hook"
"""Where this policy lets no webhook go."""


async def refused_jobs(on: Stage) -> None:
    """Provokes what a job that nobody waits for is refused with: what its generation would be, on its way in."""

    async def hand_in(model: str, *, who: str = "ann", said: str = "Hi", at_once: bool = True, **more: Any) -> None:
        order = {"body": ask(CHAT, model, said), "priority": "interactive" if at_once else "batch", **more}
        await on.ask("POST", JOBS, json=order, headers=on.keys[who] | ({"idempotency-key": "j"} if not at_once else {}))

    await hand_in("plain", body=7)
    await hand_in("plain", webhook=INNER)
    await hand_in("vec-plain")
    await hand_in("narrow", said="word " * 100)
    for model in ("far", "nobody", "full", "shared", "gone"):
        await hand_in(model)
    await hand_in("plain", lane="nowhere")
    for who, model in (("fenced", "far"), ("modest", "plain"), ("spent", "plain")):
        await hand_in(model, who=who)
    for _ in range(2):
        await hand_in("full", notBefore="1h")
    for said in ("one", "another"):
        await hand_in("waits", said=said, at_once=False)
    await on.unfinished(JOBS)


async def dead_job(store: Store, asked: str, *, caller: str = "ann", said: str = "Hi", **more: Any) -> str:
    number = await store.command("INCR", "dead-jobs-of-this-test")
    told = {"job": f"dead{number}", "caller": caller}
    letter = await store.command("XADD", store.keys.dead, "*", *(word for pair in told.items() for word in pair))
    more = {"state": State.FAILED, "mode": "async", "letter": letter.decode()} | more
    job = JobRecord(id=told["job"], caller=caller, asked=asked, **more)
    await store.command("HSET", store.keys.job(job.id), *(word for pair in job.to_hash().items() for word in pair))
    await store.command("SET", store.keys.request(job.id), json.dumps(ask(CHAT, "plain", said)))
    return job.id


async def refused_retries(on: Stage) -> None:
    """The same for jobs that are tried again, as if what is refused now had been taken then."""
    store = on.api.gateway.store
    dead = partial(dead_job, store)

    async def retry(job_id: str, who: str = "ann") -> None:
        for path in RETRIES:
            await on.ask("POST", path, re.sub("{.*?}", job_id, path), headers=on.keys[who])

    for asked in ("vec-plain", "far", "nowhere", "full", "shared", "gone"):
        await retry(await dead(asked))
    await retry(await dead("narrow", said="word " * 100))
    for who, asked in (("fenced", "far"), ("modest", "plain"), ("spent", "plain")):
        await retry(await dead(asked, caller=who), who)
    start = await store.now_ms() + 3_600_000
    for _ in range(2):
        await retry(await dead("full", not_before=start, give_up_at=start + 60_000))
    await retry(await dead("plain", caller="stranger"))
    await retry(await dead("plain", state=State.DONE))
    await retry(await dead("plain", webhook=INNER))


async def failed_results(on: Stage) -> None:
    """Provokes every way in which a job that nobody waits for may have ended, or not yet."""
    path = "/v1/jobs/{job_id}/result"
    for model in ("breaks", "slow", "lost", "hasty", "cold", *REFUSES, "waits"):
        order = {"body": ask(CHAT, model), "expiresAfter": "1s"}
        told = (await on.ask("POST", JOBS, json=order)).json()
        at = f"/v1/jobs/{told['id']}"
        if model == "waits":
            await on.ask("GET", path, at + "/result")
            await on.ask("DELETE", "/v1/jobs/{job_id}", at)
        else:
            await on.ask("GET", "/v1/jobs/{job_id}", at + "?wait=10s")
        await on.ask("GET", path, at + "/result")
    store, later = on.api.gateway.store, {"body": ask(CHAT, "plain"), "notBefore": "1h"}
    job = await jobs.read(store, (await on.ask("POST", JOBS, json=later)).json()["id"])
    await lanes.expire(store, job, errors.ModelUnavailable("its lane was removed"), early=True)
    await on.ask("GET", path, f"/v1/jobs/{job.id}/result")
    await on.ask("GET", "/v1/jobs/{job_id}", f"{at}?wait=soon")


async def refused_keys(on: Stage) -> None:
    """Provokes what changes of keys are refused with."""
    rotate, revoke = "/v1/keys/{name}/rotate", "/v1/keys/{name}"
    for method, path, at, body in (
        ("GET", "/v1/keys", "", None),
        ("POST", "/v1/keys", "", {"name": "me"}),
        ("POST", rotate, "/v1/keys/bob/rotate", None),
        ("DELETE", revoke, "/v1/keys/bob", None),
    ):
        await on.ask(method, path, at, json=body, headers=on.keys["bob"])
    await on.post("/v1/keys", {})
    await on.post("/v1/keys", {"name": "ann"})
    for path, at in (("/v1/keys", ""), (rotate, "/v1/keys/bob/rotate")):
        await on.ask("POST", path, at, content=b" " * 70_000)
    await on.ask("POST", rotate, "/v1/keys/bob/rotate", json={"keepOldS": -1})
    for name in ("ann", "nobody"):
        await on.ask("POST", rotate, f"/v1/keys/{name}/rotate")
        await on.ask("DELETE", revoke, f"/v1/keys/{name}")


SECRETS, SECRET = "/v1/webhooks/secrets", "/v1/webhooks/secrets/{secret_id}"
DELIVERIES, AGAIN = "/v1/webhooks/deliveries", "/v1/webhooks/deliveries/{delivery_id}/redeliver"


async def refused_webhooks(on: Stage) -> None:
    """Provokes what asking about webhooks is refused with."""
    await on.post(SECRETS, {"rotate": True})
    await on.post(SECRETS, {"overlapS": -1})
    await on.ask("POST", SECRETS, content=b" " * 70_000)
    await on.ask("DELETE", SECRET, f"{SECRETS}/nobody")
    for wrong in ("limit=0", "after=nobody"):
        await on.ask("GET", DELIVERIES, f"{DELIVERIES}?{wrong}")
    await on.ask("POST", AGAIN, f"{DELIVERIES}/nobody/redeliver")


async def answered_webhooks(on: Stage) -> None:
    """Provokes its good answers: a job with a webhook has ended."""
    made = (await on.ask("POST", SECRETS)).json()
    await on.ask("GET", SECRETS)
    gateway = on.api.gateway
    lane = gateway.book.active.lane("plain")
    assert lane is not None
    job = JobRecord(id="told", caller="ann", mode="async", webhook="https://ci.example.com/")
    await lanes.submit(gateway.store, gateway.book.active, gateway.fleet, job, lane, b"{}", wanted=False)
    with suppress(errors.AlreadyEnded):
        await jobs.cancel(gateway.store, "told")
    await webhooks.gather(gateway.store, limit=9)
    (told,) = (await on.ask("GET", DELIVERIES)).json()["data"]
    await on.ask("POST", AGAIN, f"{DELIVERIES}/{told['id']}/redeliver")
    await on.ask("DELETE", SECRET, f"{SECRETS}/{made['id']}")


async def too_much(store: Store, book: Book) -> None:
    """Provokes what is refused while a caller, or all together, hold as much as they may."""
    async with stage(store, book, Limits(bodies_bytes=0)) as on:
        await all_of(on.unfinished(path, b"{", size=2) for path in (JOBS, *(kind.path for kind in app.HOT)))
        await on.ask("POST", "/v1/files", **A_FILE)
    async with stage(store, book, Limits(connections_of_caller=0)) as on:
        await all_of(on.post(kind.path, {}) for kind in app.HOT)
        await on.ask("POST", "/v1/files", **A_FILE)
        job = JobRecord(id="followed", caller="ann", state=State.QUEUED, endpoint="/v1/responses", mode="async")
        await store.command("HSET", store.keys.job(job.id), *(word for pair in job.to_hash().items() for word in pair))
        await on.ask("GET", "/v1/jobs/{job_id}/events", f"/v1/jobs/{job.id}/events")
        await on.ask("GET", RESPONSE, f"/v1/responses/resp_{job.id}?stream=true")
        await on.ask("GET", "/v1/jobs/{job_id}", f"/v1/jobs/{job.id}?wait=1s")
        await on.post("/v1/jobs", {})
        await all_of(on.ask("GET", path, path) for path in ("/v1/jobs", "/v1/dead", "/v1/status/events"))
        upload = files.Upload(store, on.api.gateway.book.active, "ann")
        await upload.write(b"{}\n")
        sent = await upload.finish("in.jsonl")
        await on.ask("GET", "/v1/files/{file_id}/content", f"/v1/files/{sent.id}/content")
        await all_of(on.ask("POST", path, re.sub("{.*?}", "x", path)) for path in RETRIES)


NEED_A_POLICY = [
    ("GET", "/api/ps", ""), ("GET", "/api/tags", ""), ("HEAD", "/api/tags", ""), ("GET", "/readyz", ""),
    ("HEAD", "/readyz", ""), ("GET", "/v1/models", ""), ("GET", "/v1/models/{name}", "/v1/models/plain"),
    ("GET", "/v1/status", ""), ("GET", "/v1/tune", ""),
    ("POST", "/v1/models/{name}/{verb}", "/v1/models/plain/warm"),
    ("POST", "/v1/hosts/{host}/{verb}", "/v1/hosts/gpu1/drain"),
]  # fmt: skip
NEED_REDIS = [
    ("GET", "/v1/batches", ""), ("GET", "/v1/batches/{batch_id}", "/v1/batches/batch_x"),
    ("POST", "/v1/batches/{batch_id}/cancel", "/v1/batches/batch_x/cancel"),
    ("GET", "/v1/files", ""), *((method, "/v1/files/{file_id}" + end, "/v1/files/file-x" + end) for method, end in (
        ("GET", ""), ("GET", "/content"), ("DELETE", ""))),
    ("GET", "/v1/status", ""), ("GET", "/v1/audit", ""), ("GET", "/v1/tune", ""),
    ("GET", "/v1/jobs/{job_id}", "/v1/jobs/x"),
    ("DELETE", "/v1/jobs/{job_id}", "/v1/jobs/x"), ("GET", "/v1/jobs/{job_id}/events", "/v1/jobs/x/events"),
    ("POST", "/v1/models/{name}/{verb}", "/v1/models/plain/warm"),
    *((method, RESPONSE + end, "/v1/responses/resp_x" + end) for method, end in RESPONSES),
    ("POST", "/v1/hosts/{host}/{verb}", "/v1/hosts/gpu1/drain"), ("GET", "/v1/keys", ""), ("GET", "/v1/usage", ""),
    ("POST", "/v1/keys/{name}/rotate", "/v1/keys/bob/rotate"), ("DELETE", "/v1/keys/{name}", "/v1/keys/bob"),
    ("GET", "/v1/jobs/{job_id}/result", "/v1/jobs/x/result"), ("POST", "/v1/jobs/{job_id}/retry", "/v1/jobs/x/retry"),
    ("GET", "/v1/jobs", ""), ("GET", "/v1/dead", ""), ("GET", "/v1/dead/{letter}", "/v1/dead/1-1"),
    ("DELETE", "/v1/dead/{letter}", "/v1/dead/1-1"), ("POST", "/v1/dead/{letter}/retry", "/v1/dead/1-1/retry"),
    ("GET", SECRETS, ""), ("POST", SECRETS, ""), ("DELETE", SECRET, f"{SECRETS}/x"), ("GET", DELIVERIES, ""),
    ("POST", AGAIN, f"{DELIVERIES}/x/redeliver"),
]  # fmt: skip


async def all_of(asking: Iterable[Awaitable[Any]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for one in asking:
            tasks.create_task(_awaited(one), name="asks")


async def _awaited(one: Awaitable[Any]) -> None:
    await one


async def answered(on: Stage) -> None:
    """Provokes every good answer, before a worker with simulated models."""
    job_id = ""
    for path in GENERATIONS:
        if path == COMPLETIONS:
            continue
        whole = await on.post(path, ask(path, "plain"))
        job_id = whole.headers["x-gateway-job"]
        if path not in EMBEDDING_ENDPOINTS:
            streamed = await on.post(path, ask(path, "plain", stream=True))
            assert streamed.headers["content-type"] != whole.headers["content-type"]
    await on.post(COUNT, ask("/v1/messages", "plain"))
    at = await background(on, "plain")
    for method, end in (("GET", ""), ("GET", "?stream=true"), *RESPONSES[1:]):
        await on.ask(method, RESPONSE + end.partition("?")[0], at + end)
    at = f"/v1/jobs/{job_id}"
    await on.ask("GET", "/v1/jobs/{job_id}", at)
    await on.ask("DELETE", "/v1/jobs/{job_id}", at)
    handed_in = (await on.post(JOBS, {"body": ask(CHAT, "plain")})).json()
    await on.ask("GET", "/v1/jobs/{job_id}", f"/v1/jobs/{handed_in['id']}?wait=10s")
    await on.ask("GET", "/v1/jobs/{job_id}/result", handed_in["links"]["result"])
    store = on.api.gateway.store
    for path in RETRIES:
        told = (await on.post(JOBS, {"body": ask(CHAT, "plain"), "notBefore": "1h"})).json()
        letter = await store.command("XADD", store.keys.dead, "*", "job", told["id"], "caller", "ann")
        await store.command("HSET", store.keys.job(told["id"]), "letter", letter)
        await on.ask("DELETE", "/v1/jobs/{job_id}", f"/v1/jobs/{told['id']}")
        for method in ("GET", "POST"):
            at_it = path.removesuffix("/retry") if method == "GET" else path
            await on.ask(method, at_it, re.sub("{.*?}", told["id"], at_it))
    letter = await store.command("XADD", store.keys.dead, "*", "job", "gone", "caller", "ann")
    for method in ("GET", "DELETE"):
        await on.ask(method, "/v1/dead/{letter}", f"/v1/dead/{letter.decode()}")
    followed = await on.ask("GET", "/v1/jobs/{job_id}/events", at + "/events")
    last = re.findall(r"^id: (\S+)$", followed.text, re.MULTILINE)[-1]
    for seen in (last, "the last"):
        await on.ask("GET", "/v1/jobs/{job_id}/events", at + "/events", headers={"last-event-id": seen})
    made = await on.ask("POST", "/v1/files", **A_FILE)
    batch = await on.post("/v1/batches", a_batch(made.json()["id"]))
    for method, end in (("GET", ""), ("POST", "/cancel")):
        await on.ask(method, "/v1/batches/{batch_id}" + end, f"/v1/batches/{batch.json()['id']}{end}")
    made = await on.ask("POST", "/v1/files", **A_FILE)
    for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        await on.ask(method, "/v1/files/{file_id}" + end, f"/v1/files/{made.json()['id']}{end}")
    await on.ask("GET", "/v1/models/{name}", "/v1/models/plain")
    await on.ask("POST", "/v1/models/{name}/{verb}", "/v1/models/plain/pin")
    for verb in ("drain", "undrain"):
        await on.ask("POST", "/v1/hosts/{host}/{verb}", f"/v1/hosts/gpu1/{verb}")
    await on.post("/api/show", {"model": "plain"})
    await answered_webhooks(on)
    await on.post("/v1/keys", {"name": "guest"})
    await on.ask("POST", "/v1/keys/{name}/rotate", "/v1/keys/guest/rotate")
    await on.ask("DELETE", "/v1/keys/{name}", "/v1/keys/guest")
    for method in ("GET", "HEAD"):
        await on.ask(method, "/", headers={"accept": "text/html"})
    for name in ("index.html", "page.css", "page.js", "icon.svg"):
        await on.ask("GET", "/page/{name}", f"/page/{name}")
    await on.first_event("/v1/status/events")
    await on.ask("GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    for path, item in on.book.document["paths"].items():
        for method in item:
            if method != "post" and "{" not in path and path != "/v1/status/events":
                await on.ask(method.upper(), path)


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that the test may kill."""
    server = start_server()
    yield server
    server.close()


async def test_every_described_answer_is_real(
    own_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "HEARD_S_MAX", 0.3)
    monkeypatch.setattr(letting_in, "DOOR_OUTAGE_S", 0.3)
    store = await Store.open(own_server.url, namespace=new_namespace(), name="test-api")
    async with stage(store) as on:
        book = on.book
        for method, path, at in NEED_A_POLICY:
            await on.ask(method, path, at)
        for path, at in (("/v1/models", ""), ("/v1/models/{name}", "/v1/models/plain")):
            await on.ask("GET", path, at, headers=AS_ANTHROPIC)
        await on.ask("POST", "/v1/files", **A_FILE)
        await on.post("/v1/batches", a_batch("file-nobody"))
        for path, body in ((COUNT, ask("/v1/messages", "x")), ("/api/show", {"model": "x"})):
            await on.post(path, body)

    async with worker_world(own_server.socket_url, tmp_path) as world:
        await world.apply({"plain": simulated(), "vec-plain": simulated(embeddings=True)})
        await world.warm_host()
        monkeypatch.setattr(operator, "HEARD_S_MAX", 5)
        async with stage(await world._open("api"), book) as on:
            await answered(on)
        monkeypatch.setattr(operator, "HEARD_S_MAX", 0.3)

    policies = PolicyBook(store)
    await policies.apply(policy(models()))
    worker = Worker(store, policies)
    async with worker.running(), stage(store, book) as on:
        states = {"gone": "quarantined", "vec-gone": "quarantined", "cold": "waking", "vec-cold": "waking"}
        await worker.beat(**states)
        await on.api.gateway.fleet.look()
        await on.name_callers()
        await on.fill()
        await all_of(refused_generation(on, path) for path in GENERATIONS)
        await refused_rest(on)
        for stream in (False, True):
            await on.post(COMPLETIONS, ask(COMPLETIONS, "completes", stream=stream))
        await too_much(store, book)
        await a_later_version_applies(store)
        await all_of(on.post(path, ask(path, "plain")) for path in GENERATIONS)
        await on.post(JOBS, {"body": ask(CHAT, "plain")})
        dead = await dead_job(store, "plain")
        await all_of(on.ask("POST", path, re.sub("{.*?}", dead, path)) for path in RETRIES)
        own_server.kill()
        await all_of(on.ask(method, path, at) for method, path, at in NEED_REDIS)
        await on.post("/v1/keys", {"name": "guest"})
        await on.post(JOBS, {"body": ask(CHAT, "plain")})
        await on.ask("POST", "/v1/files", **A_FILE)
        await on.post("/v1/batches", a_batch("file-nobody"))
        await all_of(on.post(path, ask(path, "plain")) for path in GENERATIONS)

        async def out_of_date() -> bool:
            return (await on.ask("GET", "/api/ps")).status_code == 503

        await until_true(out_of_date, what="the picture is too old for /api/ps")
    await store.close()
    assert book.seen == book.described()
