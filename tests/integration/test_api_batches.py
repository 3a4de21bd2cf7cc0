"""Batches by OpenAI's own client, before a worker that does what the test says and the scheduler's rounds."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from broker import batches, errors, files, jobs, lanes
from broker.callers import Rights
from broker.lifecycle import State
from broker.policies import PolicyBook
from broker.records import BatchRecord, FileRecord, JobRecord
from broker.store import Store
from tests.support.batch_files import CHAT, jsonl, line, read
from tests.support.broker_world import a_later_version_applies
from tests.support.heard import RESPONSES
from tests.support.invariants import take, violated
from tests.support.live_api import POLICY, RawClient, Scene, live_scene, until_true
from tests.support.scripted_worker import Turn
from workers import batch_answers, batch_reading
from workers import batches as worked_off
from workers.batches import WINDOW, WINDOW_OF_CALLER, Expander

Clients = Callable[..., openai.AsyncOpenAI]


@pytest.fixture
async def client_of() -> AsyncIterator[Clients]:
    """Gives clients of a scene, by the key that they carry."""
    async with AsyncExitStack() as opened:

        def client(scene: Scene, key: str = "secret-a") -> openai.AsyncOpenAI:
            made = scene.client(api_key=key)
            opened.push_async_callback(made.close)
            return made

        yield client


@pytest_asyncio.fixture
async def keyed(store: Store) -> AsyncIterator[Scene]:
    """A gateway with keys; `ann`'s is of the environment."""
    async with live_scene(store, keys="ann:secret-a") as scene:
        yield scene


@asynccontextmanager
async def rounds(store: Store, count: int = 1) -> AsyncIterator[list[Expander]]:
    """So many schedulers' rounds, over and over, until the block ends."""
    book = PolicyBook(store)
    await book.reload()
    found = [Expander(store, book) for _ in range(count)]

    async def work(expander: Expander) -> None:
        while True:
            await expander.round()
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(one), name="rounds") for one in found]
    try:
        yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def begin(client: openai.AsyncOpenAI, content: bytes, **more: Any) -> Any:
    """Sends a file and makes a batch of it."""
    sent = await client.files.create(file=("in.jsonl", content), purpose="batch")
    asked: Any = {"endpoint": CHAT, "completion_window": "24h", **more}
    return await client.batches.create(input_file_id=sent.id, **asked)


async def ended(client: openai.AsyncOpenAI, batch_id: str, *, timeout_s: float = 30) -> Any:
    """Waits for a batch to end."""

    async def over() -> Any:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return await until_true(over, what=f"{batch_id} has ended", timeout_s=timeout_s)


async def waits(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    """What a batch tells of what its lines wait for, as soon as it tells of something."""

    async def told() -> Any:
        return (await client.batches.retrieve(batch_id)).model_extra["wait"]

    return await until_true(told, what="the batch says what it waits for")


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    return read((await client.files.content(file_id)).content) if file_id else {}


async def test_a_batch_from_its_file_to_its_answers(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    names = [f"request-{n}" for n in range(60)]  # more than a window
    batch = await begin(client, jsonl(*(line(name) for name in names)), metadata={"night": "7"})
    assert (batch.status, batch.request_counts.total, batch.metadata) == ("validating", 60, {"night": "7"})
    assert batch.expires_at - batch.created_at == 86_400
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (60, 0)
    assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
    answers = await lines_of(client, batch.output_file_id)
    assert answers.keys() == set(names)
    one = answers["request-7"]
    assert one["error"] is None and one["response"]["status_code"] == 200
    assert one["response"]["body"]["choices"][0]["message"]["content"] == "Hello world"
    job = await jobs.read(scene.store, one["response"]["request_id"])
    assert (job.mode, job.priority, job.lane, job.state) == ("async", "batch", "big.batch", State.DONE)
    kept = [
        await scene.store.command("PTTL", key(job.id)) for key in (scene.store.keys.frames, scene.store.keys.request)
    ]
    assert all(0 < ms <= 60_000 for ms in kept)  # what it answered stands in the file now
    assert len(scene.worker.seen) == 60
    assert [found.id async for found in client.batches.list()] == [batch.id]
    output = await client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert await violated(scene.store) == []
    assert (await client.files.delete(batch.input_file_id)).deleted
    picture = await take(scene.store)
    assert not picture.of("batch:<id>:window") and not picture.of("batch:<id>:names") and not picture.of("batches")


WRONG: dict[str, Any] = {
    "invalid_json_line": b'{"custom_id": "cut',
    "invalid_custom_id": {"method": "POST", "url": CHAT, "body": {}},
    "invalid_method": line("get") | {"method": "GET"},
    "invalid_url": line("other", url="/v1/embeddings"),
    "invalid_body": line("bodyless") | {"body": [1]},
    "duplicate_custom_id": line("first"),
    "model_not_found": line("nobody", model="nobody"),
    "invalid_request": line("odd") | {"body": {"model": "big", "messages": "what"}},
    "context_length_exceeded": line("long", model="hasty", said="word " * 100),
}


async def test_a_bad_line_is_a_line_of_the_error_file_and_the_others_go_on(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    content = jsonl(line("first"), *WRONG.values(), b"", b"  ", line("refused", said="refuse"), line("last"))
    batch = await begin(client, content)
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (len(WRONG) + 3, 2, len(WRONG) + 1)
    assert (await lines_of(client, batch.output_file_id)).keys() == {"first", "last"}
    content = (await client.files.content(batch.error_file_id)).content
    told = [json.loads(one) for one in content.splitlines()]
    codes = [one["error"]["code"] for one in told if one["error"]]
    assert sorted(codes) == sorted(WRONG)
    assert next(one for one in told if one["error"]["code"] == "invalid_method")["error"]["message"].startswith(
        "line 4"
    )
    (refused,) = [one for one in told if one["response"]]
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("refused", 422)
    assert refused["response"]["body"]["error"]["code"] == "runtime_refused"
    # a batch tells of its lines itself: they are among nobody's jobs and no dead letters
    assert await scene.store.command("XLEN", scene.store.keys.dead) == 0
    assert await scene.store.command("ZCARD", scene.store.keys.jobs("anonymous")) == 0
    assert await violated(scene.store) == []


@pytest.mark.parametrize(
    ("content", "code", "line_number"),
    [
        (b"no json\n{}\n", "invalid_json_line", 1),
        (b"\n\n \n", "empty_file", None),
        (b"\n" * 3 + b"x\n" * 50_001, "too_many_lines", None),
    ],
    ids=["nothing right in it", "blank", "too long"],
)
async def test_a_file_without_a_request_fails_as_a_whole(
    scene: Scene, client_of: Clients, content: bytes, code: str, line_number: int | None
) -> None:
    client = client_of(scene)
    batch = await begin(client, content)
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, line_number)
    assert batch.failed_at
    assert (await client.files.delete(batch.input_file_id)).deleted
    assert await violated(scene.store) == []


async def test_the_input_of_a_batch_is_not_deleted_before_its_end(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    batch = await begin(client, jsonl(line("waits", said="wait")))
    with pytest.raises(openai.ConflictError, match="in use"):
        await client.files.delete(batch.input_file_id)
    async with rounds(scene.store):
        scene.go.set()
        await ended(client, batch.id)
    await client.files.delete(batch.input_file_id)


async def test_batches_of_two_bots_advance_side_by_side(keyed: Scene, client_of: Clients) -> None:
    """The first has many lines, the second few: it does not wait for the end of the first."""
    await keyed.api.name("bob")
    ann, bob = client_of(keyed), client_of(keyed, keyed.api.keys["bob"])
    many = await begin(ann, jsonl(*(line(f"a{n}") for n in range(300))))
    few = await begin(bob, jsonl(*(line(f"b{n}") for n in range(20))))
    async with rounds(keyed.store):
        assert (await ended(bob, few.id)).request_counts.completed == 20
        assert (await ann.batches.retrieve(many.id)).status == "in_progress"
        await ended(ann, many.id)
    of_bob = [record.id.startswith(few.id) for record in keyed.worker.seen]
    assert of_bob.count(True) == 20 and of_bob.index(True) < 80
    for other in (bob.batches.retrieve(many.id), bob.batches.cancel(many.id)):
        with pytest.raises(openai.NotFoundError, match="no batch"):
            await other
    assert [found.id async for found in bob.batches.list()] == [few.id]
    assert await violated(keyed.store) == []


async def test_a_caller_has_so_many_lines_at_once_over_all_its_batches(scene: Scene, client_of: Clients) -> None:
    """Also where they all begin in the same round."""
    client = client_of(scene)
    content = jsonl(*(line(f"r{n}", said="wait") for n in range(WINDOW)))
    made = [await begin(client, content) for _ in range(WINDOW_OF_CALLER // WINDOW + 2)]
    book = PolicyBook(scene.store)
    await book.reload()
    expander = Expander(scene.store, book)
    for _ in range(2):
        await expander.advance(await batches.live(scene.store))
        windows = [len(await batches.window(scene.store, batch.id)) for batch in made]
        assert sum(windows) == WINDOW_OF_CALLER


async def test_batches_that_cannot_go_on_hold_no_other_of_their_caller_up(scene: Scene, client_of: Clients) -> None:
    """Their model may be away for days. Once it is back, all of them together ask for no more than before."""
    client = client_of(scene)
    await scene.beat(hasty="quarantined")
    content = jsonl(*(line(f"r{n}", said="wait", model="hasty") for n in range(WINDOW)))
    stuck = [(await begin(client, content)).id for _ in range(WINDOW_OF_CALLER // WINDOW + 1)]
    other = await begin(client, jsonl(*(line(f"r{n}", model="small") for n in range(40))))
    async with rounds(scene.store):
        assert (await ended(client, other.id)).request_counts.completed == 40
        for one in stuck:
            assert "hasty cannot serve now" in (await waits(client, one))["message"]
    book = PolicyBook(scene.store)
    await book.reload()
    expander = Expander(scene.store, book)

    async def asked_for() -> int:
        await expander.advance(await batches.live(scene.store))
        return sum(job.live for job in (await take(scene.store)).jobs.values())

    assert await asked_for() == 0
    assert [len(await batches.window(scene.store, one)) for one in stuck] == [WINDOW] * len(stuck)
    await scene.beat()
    expander = Expander(scene.store, book)  # none rests
    assert [await asked_for() for _ in range(2)] == [WINDOW_OF_CALLER] * 2


async def test_a_list_of_batches_goes_on_behind_those_that_are_kept_no_more(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    made = [(await begin(client, jsonl(line("a")))).id for _ in range(6)]
    for gone in made[2:5]:  # kept for an hour, say, where the others are for a week
        await scene.store.command("DEL", scene.store.keys.batch(gone))
        await scene.store.command("ZADD", scene.store.keys.batches_of("anonymous"), await scene.store.now_ms(), gone)
    assert [found.id async for found in client.batches.list(limit=2)] == [made[5], made[1], made[0]]


async def test_a_batch_whose_answer_got_lost_is_made_once(scene: Scene, client_of: Clients) -> None:
    """The SDK asks again by itself, and says so; whoever asks for two batches of a file gets two."""
    client = client_of(scene)
    sent = await client.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")

    async def make(tries: int, **more: Any) -> str:
        asked: Any = {"endpoint": CHAT, "completion_window": "24h", **more}
        headers = {"x-stainless-retry-count": str(tries)}
        return (await client.batches.create(input_file_id=sent.id, extra_headers=headers, **asked)).id

    first = await make(0)
    assert [await make(1), await make(2)] == [first, first]
    other = [await make(0), await make(1, metadata={"night": "7"}), await make(1, completion_window="1h")]
    assert len({first, *other}) == 4
    assert await make(1, completion_window="1h") == other[-1]
    assert (await files.read(scene.store, sent.id)).uses == 4
    assert await violated(scene.store) == []


async def test_an_idempotency_key_makes_one_batch(scene: Scene, client_of: Clients) -> None:
    """For its caller alone, whatever jobs have the same key, and until that batch ends badly."""
    client = client_of(scene)
    sent = await client.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")

    async def make(key: str, **more: Any) -> str:
        asked: Any = {"endpoint": CHAT, "completion_window": "24h", **more}
        return (await client.batches.create(input_file_id=sent.id, extra_headers={"idempotency-key": key}, **asked)).id

    first = await make("night-7")
    assert await make("night-7") == first
    assert await make("night-8") != first
    with pytest.raises(openai.UnprocessableEntityError, match=f"used for {first} with another request"):
        await make("night-7", completion_window="1h")
    with pytest.raises(openai.BadRequestError, match="visible characters"):
        await make("night 7")
    body = {"endpoint": CHAT, "body": {"model": "big", "messages": [{"role": "user", "content": "hello"}]}}
    async with httpx.AsyncClient(base_url=scene.api.url) as http:
        assert (await http.post("/v1/jobs", json=body, headers={"idempotency-key": "night-7"})).status_code == 202
    await client.batches.cancel(first)
    again = await make("night-7")
    assert again != first and await make("night-7") == again, "one that is to end early is none"
    async with rounds(scene.store):
        assert (await ended(client, first)).status == "cancelled"
        assert (await ended(client, again)).status == "completed"
    await client.files.delete(sent.id)
    assert await make("night-7") == again, "done is done"
    assert await violated(scene.store) == []


async def test_a_repeat_is_known_by_what_its_client_said(scene: Scene, client_of: Clients) -> None:
    """Not by what the policy or we made of it, nor by how it was written; a key counts for more than an SDK's retry."""
    client = client_of(scene)
    sent = await client.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch")

    async def make(key: str = "", window: Any = "24h", tries: int = 0, **more: Any) -> str:
        headers = {"x-stainless-retry-count": str(tries)} | ({"idempotency-key": key} if key else {})
        asked: Any = {"input_file_id": sent.id, "endpoint": CHAT, "completion_window": window}
        return (await client.batches.create(**asked, extra_headers=headers, **more)).id

    first, plain = await make("a", metadata={"x": "1", "y": "2"}), await make()
    await scene.api.gateway.book.apply(POLICY + "fileDays: 3\n")
    assert await make("a", "1d", metadata={"y": "2", "x": "1"}) == first
    assert await make(tries=1, metadata={}) == plain
    other = await make("b", tries=1)
    assert other not in (first, plain) and await make("b") == other


async def test_a_full_lane_is_waited_for_and_no_line_is_lost(store: Store, client_of: Clients) -> None:
    tight = POLICY + "lanes:\n  big.batch:\n    maxQueue: 1\n"
    async with live_scene(store, policy=tight) as scene:
        client = client_of(scene)
        batch = await begin(client, jsonl(*(line(f"r{n}", said="wait") for n in range(12))))
        async with rounds(scene.store):

            async def full() -> bool:
                return len(scene.worker.seen) == 2

            await until_true(full, what="as many run as may")
            scene.go.set()
            batch = await ended(client, batch.id, timeout_s=60)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (12, 0)
    assert len(scene.worker.seen) == 12


WITHOUT_SMALL = POLICY[: POLICY.index("  small:")] + POLICY[POLICY.index("  hasty:") : POLICY.index("routing:")]
WITHOUT_SMALL = WITHOUT_SMALL.replace("    fallback: small\n", "")


async def test_lines_whose_model_leaves_the_policy_wait_for_it_to_come_back(scene: Scene, client_of: Clients) -> None:
    """They were right when the batch was made, and a policy may be a slip of a moment. A name that nobody ever knew is
    wrong at once, and so is one that had gone before the batch came."""
    client, book = client_of(scene), scene.worker.book
    right = [line(f"r{n}", model="small") for n in range(40)]
    batch = await begin(client, jsonl(line("wrong", model="nobody"), *right))
    assert batch.model_extra["wait"] is None
    await book.apply(WITHOUT_SMALL)
    later = await begin(client, jsonl(line("late", model="small"), line("fast", model="fast-edit")))
    async with rounds(scene.store):
        assert (await ended(client, later.id)).request_counts.failed == 2
        told = await waits(client, batch.id)
        assert told["code"] == "model_unavailable"
        assert told["message"].startswith("'small' has left the policy since the batch was made, and")
        assert (await client.batches.retrieve(batch.id)).request_counts.failed == 1
        await book.rollback(1)
        over = await ended(client, batch.id)
    assert (over.request_counts.completed, over.request_counts.failed, over.model_extra["wait"]) == (40, 1, None)
    for one in (over, await client.batches.retrieve(later.id)):
        errors = await lines_of(client, one.error_file_id)
        assert {said["error"]["code"] for said in errors.values()} == {"model_not_found"}
    assert await violated(scene.store) == []


async def test_what_a_batch_waited_for_in_vain_is_told_with_each_line(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    batch = await begin(client, jsonl(*(line(f"r{n}", model="small") for n in range(WINDOW + 9))))
    await scene.api.gateway.book.apply(WITHOUT_SMALL)
    async with rounds(scene.store):
        told = await waits(client, batch.id)
        await scene.store.command("HSET", scene.store.keys.batch(batch.id), "expires_at", await scene.store.now_ms())
        over = await ended(client, batch.id)
    said = [one["error"] for one in (await lines_of(client, over.error_file_id)).values()]
    assert len(said) == WINDOW + 9 and {one["code"] for one in said} == {"batch_expired"}
    assert all(one["message"].endswith(f"; its lines waited last for this: {told['message']}") for one in said)
    assert over.model_extra["wait"] is None


async def test_a_full_lane_is_nothing_that_a_batch_tells_of(store: Store, client_of: Clients) -> None:
    tight = POLICY + "lanes:\n  big.batch:\n    maxQueue: 1\n"
    async with live_scene(store, policy=tight) as scene:
        client = client_of(scene)
        batch = await begin(client, jsonl(*(line(f"r{n}", said="wait") for n in range(12))))
        async with rounds(scene.store) as (expander,):

            async def rests() -> bool:
                return expander.rests(await batches.read(scene.store, batch.id))

            await until_true(rests, what="there is no more place")
            assert (await client.batches.retrieve(batch.id)).model_extra["wait"] is None


async def test_a_batch_that_comes_right_behind_its_model_is_not_told_that_there_is_none(
    scene: Scene, client_of: Clients
) -> None:
    """The scheduler hears of a new policy within half a second, and a bot makes its batch at once."""
    client = client_of(scene)
    async with rounds(scene.store):
        await scene.worker.book.apply(POLICY.replace("  hasty:", "  swift:"))
        await scene.beat()
        batch = await ended(client, (await begin(client, jsonl(line("a", model="swift")))).id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 0)


async def test_answers_that_fill_the_place_for_files_hold_a_batch_up(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has an end, and a few bytes that are asked for can mean megabytes of vectors."""
    client = client_of(scene)
    batch = await begin(client, jsonl(*(line(f"r{n}") for n in range(70))))
    monkeypatch.setattr(files, "MB", 10)  # a thousand of them make some twenty answers
    async with rounds(scene.store) as (expander,):

        async def held_up() -> bool:
            now = await batches.read(scene.store, batch.id)
            return now.completed == len(scene.worker.seen) > 0 and expander.rests(now)

        await until_true(held_up, what="nothing more is asked for", timeout_s=20)
        assert (await waits(client, batch.id))["code"] == "files_full"
        assert len(scene.worker.seen) < 70
        monkeypatch.undo()
        batch = await ended(client, batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (70, 0)


async def test_a_long_answer_is_kept_in_parts_that_are_read_one_by_one(scene: Scene, client_of: Clients) -> None:
    async def much(turn: Turn) -> None:
        for _ in range(3):
            await turn.say("x" * files.PART_BYTES)
        await turn.finish()

    scene.worker.scripts["much"] = much
    client = client_of(scene)
    batch = await begin(client, jsonl(line("long", said="much"), line("short")))
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    parts = await scene.store.command("LRANGE", scene.store.keys.parts(batch.output_file_id), 0, -1)
    assert max(map(len, parts)) == files.PART_BYTES and len(parts) == 5
    answers = await lines_of(client, batch.output_file_id)
    assert answers["long"]["response"]["body"]["choices"][0]["message"]["content"] == "x" * files.PART_BYTES * 3
    assert await violated(scene.store) == []


async def test_an_answer_that_cannot_be_put_together_is_an_error_of_its_line(scene: Scene, client_of: Clients) -> None:
    """Runtimes write odd chunks that a stream's client never minds, and the batch has to end all the same."""

    async def odd(turn: Turn) -> None:
        await turn.say("Hello")
        turn.seq += 1
        data = b'data: {"choices": [{"index": null, "delta": {"tool_calls": [null]}}]}\n\n'
        await jobs.emit(turn.store, turn.held, turn.seq, data)
        await turn.finish()

    scene.worker.scripts["odd"] = odd
    client = client_of(scene)
    batch = await begin(client, jsonl(line("odd", said="odd"), line("plain")))
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    assert (await lines_of(client, batch.error_file_id))["odd"]["error"]["code"] == "runtime_failed"


async def test_an_answer_that_breaks_our_own_reader_ends_its_batch_all_the_same(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_parts: list[bytes]) -> bytes:
        raise KeyError("nobody foresaw it")

    monkeypatch.setitem(batch_answers.FOLDS, CHAT, broken)
    client = client_of(scene)
    batch = await begin(client, jsonl(line("plain")))
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 0, 1)


async def test_a_cancelled_batch_keeps_what_was_done(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    batch = await begin(client, jsonl(line("done"), *(line(f"r{n}", said="wait") for n in range(100))))
    async with rounds(scene.store):

        async def one_done() -> bool:
            now = await client.batches.retrieve(batch.id)
            return bool(now.request_counts and now.request_counts.completed)

        await until_true(one_done, what="the first is done")
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        over = await ended(client, batch.id)
        assert (await client.batches.cancel(batch.id)).status == "cancelled"
    assert over.status == "cancelled" and over.cancelling_at and over.cancelled_at
    assert (await lines_of(client, over.output_file_id)).keys() == {"done"}
    assert (over.error_file_id, over.request_counts.completed, over.request_counts.failed) == (None, 1, 0)
    live = [job for job in (await take(scene.store)).jobs.values() if job.live]
    assert live == []
    assert await violated(scene.store) == []


async def test_the_response_of_a_line_is_its_batchs(scene: Scene, client_of: Clients) -> None:
    """To delete it would have the line answered again, and charged twice."""
    client = client_of(scene)
    ask = {"custom_id": "a", "method": "POST", "url": RESPONSES, "body": {"model": "big", "input": "wait"}}
    batch = await begin(client, jsonl(ask), endpoint=RESPONSES)
    async with rounds(scene.store):
        job = await until_true(lambda: _live_job(scene), what="the line has a job")
        for asked in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="output file"):
                await asked(f"resp_{job.id}")
        await client.batches.cancel(batch.id)
        assert (await ended(client, batch.id)).status == "cancelled"


async def _live_job(scene: Scene) -> JobRecord | None:
    return next((job for job in (await take(scene.store)).jobs.values() if job.live), None)


async def test_what_has_no_answer_in_time_is_told_so(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    batch = await begin(client, jsonl(line("done"), *(line(f"r{n}", said="wait") for n in range(99)), b"nonsense"))
    async with rounds(scene.store):

        async def one_done() -> bool:
            now = await client.batches.retrieve(batch.id)
            return bool(now.request_counts and now.request_counts.completed)

        await until_true(one_done, what="the first is done")
        await scene.store.command("HSET", scene.store.keys.batch(batch.id), "expires_at", await scene.store.now_ms())
        over = await ended(client, batch.id)
    assert over.status == "expired" and over.expired_at
    assert (over.request_counts.completed, over.request_counts.failed) == (1, 100)
    errors = await lines_of(client, over.error_file_id)
    codes = [one["error"]["code"] for one in errors.values()]
    assert codes.count("batch_expired") == 99 and codes.count("invalid_json_line") == 1
    assert not [job for job in (await take(scene.store)).jobs.values() if job.live]


async def test_a_line_that_was_given_up_on_before_its_batchs_time_was_over_is_told_why(
    scene: Scene, client_of: Clients
) -> None:
    """Its job is gone after a minute: nowhere else would anybody learn that the model does not load."""
    client = client_of(scene)
    batch = await begin(client, jsonl(*(line(f"r{n}", said="wait") for n in range(3))))
    async with rounds(scene.store):

        async def the_third_waits() -> Any:
            return await scene.store.command("EXISTS", scene.store.keys.job(batches.job_id_of(batch.id, 3)))

        await until_true(the_third_waits, what="there is no slot for the third")
        why = errors.ColdStartDeadline("big does not load, and is not tried again in time: the GGUF is broken")
        job = await jobs.read(scene.store, batches.job_id_of(batch.id, 3))
        await lanes.expire(scene.store, job, why, early=True)
        scene.go.set()
        over = await ended(client, batch.id)
    assert (over.status, over.request_counts.completed, over.request_counts.failed) == ("completed", 2, 1)
    (told,) = (await lines_of(client, over.error_file_id)).values()
    assert (told["error"]["code"], told["error"]["message"]) == (why.code, str(why))


async def test_a_batch_ends_with_the_key_of_its_caller(keyed: Scene, client_of: Clients) -> None:
    await keyed.api.name("ci", rights=Rights(lanes=("big",)))
    client, admin = client_of(keyed, keyed.api.keys["ci"]), client_of(keyed)
    batch = await begin(
        client, jsonl(line("done"), line("elsewhere", model="small"), *(line(f"r{n}", said="wait") for n in range(50)))
    )
    async with rounds(keyed.store):

        async def begun() -> bool:
            now = await client.batches.retrieve(batch.id)
            return bool(now.request_counts and now.request_counts.completed and now.request_counts.failed)

        await until_true(begun, what="it has begun")
        await keyed.api.gateway.keys.revoke("ci", by="ann")
        over = await ended(admin, batch.id)
    assert over.status == "cancelled"
    assert (await lines_of(admin, over.error_file_id))["elsewhere"]["error"]["code"] == "lane_forbidden"
    assert not [job for job in (await take(keyed.store)).jobs.values() if job.live]


async def test_a_batch_that_comes_while_keys_change_has_its_callers_rights_and_no_more(
    keyed: Scene, client_of: Clients
) -> None:
    """Whoever sends the rest of the request after that was somebody else's change must not gain by it."""
    await keyed.api.name("ci", rights=Rights(lanes=("big",)))
    client, admin = client_of(keyed, keyed.api.keys["ci"]), client_of(keyed)
    sent = await client.files.create(file=("in", jsonl(line("elsewhere", model="small"))), purpose="batch")
    body = json.dumps({"input_file_id": sent.id, "endpoint": CHAT, "completion_window": "24h"}).encode()
    raw = await RawClient.open(keyed.api)
    head = ["POST /v1/batches HTTP/1.1", "host: localhost", f"content-length: {len(body)}", "expect: 100-continue"]
    head.append(f"authorization: {keyed.api.bearer('ci')['authorization']}")
    raw.writer.write("\r\n".join([*head, "", ""]).encode())
    assert await raw.head() == 100  # from here on its key is not looked at again
    await keyed.api.name("another")
    raw.writer.write(body)
    assert await raw.head() == 200
    batch_id = json.loads(await raw.body())["id"]
    async with rounds(keyed.store):
        over = await ended(admin, batch_id)
    assert (await lines_of(admin, over.error_file_id))["elsewhere"]["error"]["code"] == "lane_forbidden"
    assert over.output_file_id is None


async def test_several_schedulers_at_one_batch_do_nothing_twice(scene: Scene, client_of: Clients) -> None:
    client = client_of(scene)
    names = {f"r{n}" for n in range(150)}
    batch = await begin(client, jsonl(*(line(name) for name in sorted(names)), b"nonsense", line("r1")))
    async with rounds(scene.store, count=4):
        batch = await ended(client, batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (150, 2)
    assert (await lines_of(client, batch.output_file_id)).keys() == names
    assert len(await lines_of(client, batch.error_file_id)) == 2
    assert len(scene.worker.seen) == 150
    assert await violated(scene.store) == []


async def test_a_scheduler_that_comes_too_late_asks_for_no_line_of_a_batch_that_is_over(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the batch was cancelled, and goes on after another one has ended it."""
    client = client_of(scene)
    batch = await begin(client, jsonl(*(line(f"r{n}", said="wait") for n in range(40))))
    book = PolicyBook(scene.store)
    await book.reload()
    slow, quick = Expander(scene.store, book), Expander(scene.store, book)
    await slow.advance(await batches.live(scene.store))
    looked, ended_meanwhile, admit = asyncio.Event(), asyncio.Event(), slow.admit

    async def late(*args: Any, **more: Any) -> None:
        looked.set()
        await ended_meanwhile.wait()
        await admit(*args, **more)

    monkeypatch.setattr(slow, "admit", late)
    advancing = asyncio.create_task(slow.advance(await batches.live(scene.store)))
    await looked.wait()
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    while live := await batches.live(scene.store):
        await quick.advance(live)
    ended_meanwhile.set()
    await advancing
    assert (await client.batches.retrieve(batch.id)).status == "cancelled"
    assert (await take(scene.store)).jobs == {} and scene.worker.seen == []


async def test_a_batch_that_takes_long_keeps_no_other_from_its_turn(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are cut off when they last too long; the next one begins behind the batch that it was at."""
    client = client_of(scene)
    first, *others = [await begin(client, jsonl(line("a", said="wait"))) for _ in range(3)]
    why_failed = batch_reading.why_failed

    async def forever(store: Store, batch: BatchRecord, record: FileRecord) -> Any:
        if batch.id == first.id:
            await asyncio.Event().wait()
        return await why_failed(store, batch, record)

    monkeypatch.setattr(worked_off, "why_failed", forever)
    book = PolicyBook(scene.store)
    await book.reload()
    expander = Expander(scene.store, book)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(expander.advance(await batches.live(scene.store)), 0.5)
    for other in others:
        assert len(await batches.window(scene.store, other.id)) == 1


async def test_much_is_read_a_little_at_a_time(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step reads a line at least, and else so many bytes; a file is no less read to its end for that."""
    monkeypatch.setattr(batch_reading, "BYTES_AT_ONCE", 1_000)
    client = client_of(scene)
    names = {f"r{n}" for n in range(40)}
    batch = await begin(client, jsonl(*[b"nonsense"] * 300, *(line(name) for name in sorted(names)), b"", b"nonsense"))
    record, found = await files.read(scene.store, batch.input_file_id), await batches.read(scene.store, batch.id)
    told = await batch_reading.next_lines(scene.store, found, record, most=WINDOW)
    assert 100 < told.taken < 200 and not told.read_all
    async with rounds(scene.store):
        batch = await ended(client, batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (40, 301)
    assert (await lines_of(client, batch.output_file_id)).keys() == names
    assert await violated(scene.store) == []


class Killed(BaseException):
    """The scheduler ends here and now."""


async def test_a_scheduler_that_is_killed_after_any_step_loses_and_repeats_no_line(
    scene: Scene, client_of: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round ends right after one more verb, whose reply it never sees; a new scheduler goes on."""
    client = client_of(scene)
    names = [f"r{n}" for n in range(70)]
    batch = await begin(client, jsonl(*(line(name) for name in names), b"nonsense", line("r3")))
    book = PolicyBook(scene.store)
    await book.reload()
    run, left = Store.run, [0]

    async def dying(self: Store, verb: str, keys: Any, args: Any) -> Any:
        reply = await run(self, verb, keys, args)
        if verb.startswith(("batch_", "submit")) and asyncio.current_task().get_name() == "doomed":  # type: ignore[union-attr]
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return reply

    monkeypatch.setattr(Store, "run", dying)
    deaths = 0
    for number in range(2_000):
        left[0] = number % 4
        expander = Expander(scene.store, book)
        live = await batches.live(scene.store)
        if not live:
            break
        task = asyncio.create_task(expander.advance(live), name="doomed")
        await asyncio.wait({task})
        deaths += isinstance(task.exception(), Killed)
        assert await violated(scene.store) == []
    assert deaths > 30
    batch = await client.batches.retrieve(batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 70, 2)
    assert (await lines_of(client, batch.output_file_id)).keys() == set(names)
    assert len(scene.worker.seen) == 70


@pytest.mark.parametrize(
    ("window", "seconds"), [("120m", 7_200), ("100h", 360_000), ("168h", 604_800), ("90s", 90), ("1w", 604_800)]
)
async def test_a_window_is_any_length_of_time(scene: Scene, client_of: Clients, window: Any, seconds: int) -> None:
    """As lengths are written everywhere here; it is told as it was asked for."""
    batch = await begin(client_of(scene), jsonl(line("a")), completion_window=window)
    assert (batch.expires_at or 0) - batch.created_at == seconds
    assert batch.completion_window == window


async def test_a_window_that_may_not_be_is_told_with_its_bounds(scene: Scene, client_of: Clients) -> None:
    said = {
        "8d": "completion_window must be 1m to 7d",
        "59s": "completion_window must be 1m to 7d",
        "soon": "completion_window: 'soon' is no length of time: write it like 90d, 12h or 30m",
    }
    for window, sentence in said.items():
        asked: Any = {"completion_window": window}
        with pytest.raises(openai.BadRequestError) as refused:
            await begin(client_of(scene), jsonl(line("a")), **asked)
        error: Any = refused.value.body
        assert (error["message"], error["param"]) == (sentence, "completion_window")


@pytest.mark.parametrize(
    "more",
    [
        {"endpoint": "/v1/moderations"}, {"completion_window": "8d"}, {"completion_window": "soon"},
        {"metadata": {"k" * 65: "v"}}, {"extra_headers": {"X-Gateway-Allow-Remote": "perhaps"}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
    ],
)  # fmt: skip
async def test_what_a_batch_may_not_be_is_refused_at_once(scene: Scene, client_of: Clients, more: Any) -> None:
    client = client_of(scene)
    with pytest.raises(openai.BadRequestError):
        await begin(client, jsonl(line("a")), **more)
    with pytest.raises(openai.NotFoundError, match="no file"):
        await client.batches.create(input_file_id="file-nobody", endpoint=CHAT, completion_window="24h")
    assert (await take(scene.store)).of("batch:<id>") == {}


@pytest.mark.parametrize("known", ["big", "new"])
async def test_lines_wait_for_a_policy_that_can_be_read(scene: Scene, client_of: Clients, known: str) -> None:
    """A newer part applied one that the scheduler cannot read: none of them is wrong for that, whatever model it is
    for."""
    client, book = client_of(scene), PolicyBook(scene.store)
    await book.reload()
    expander = Expander(scene.store, book)
    made = await begin(client, jsonl(*(line(f"r{n}", model=known) for n in range(3))))
    await a_later_version_applies(scene.store)
    await book.catch_up()
    for _ in range(4):
        await expander.advance(await batches.live(scene.store))
    record = await batches.read(scene.store, made.id)
    assert (record.state, record.failed) == ("in_progress", 0)
    await scene.worker.book.apply(POLICY.replace('"qwen/coder:32b"', '"qwen/coder:32b", "new"'))
    async with rounds(scene.store):
        counts = (await ended(client, made.id)).request_counts
        assert (counts.completed, counts.failed) == (3, 0)
