"""One attempt against a runtime that answers as the test says: what is logged, how it ends, what the slot hears."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from broker import errors, frames, lanes
from broker.frames import FrameReader
from broker.lifecycle import State
from broker.records import Frame, JobRecord
from tests.support.broker_world import World, fake_world, hub_of
from tests.support.waiting import until
from tests.support.worker_world import eventually
from workers import attempt as attempt_module
from workers.attempt import Attempt, Ended, Limits
from workers.runtimes.base import Endpoint
from workers.runtimes.http_server import Exchange, HttpServer
from workers.stream_client import StreamClient

Answer = Callable[[Exchange], Awaitable[None]]
BODY = json.dumps({"model": "big", "messages": [], "stream": False}).encode()
ROLE = {"role": "assistant", "content": None}


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "model": "weights", "choices": choices} | more
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def says(*pieces: bytes, cut: bool = False) -> Answer:
    """A runtime that streams these bytes, and then ends the answer or cuts the connection."""

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        for piece in pieces:
            await exchange.write(piece)
        if cut:
            exchange._connection._transport.close()
        else:
            await exchange.end()

    return answer


def refuses(status: int, message: str = "no", kind: str = "") -> Answer:
    async def answer(exchange: Exchange) -> None:
        await exchange.answer({"error": {"message": message, "type": kind}}, status=status)

    return answer


class Bench:
    """A job that is claimed, and a runtime that answers in turn."""

    body = BODY
    endpoint = Endpoint("", model="weights")

    def __init__(self, world: World, url: str, answers: list[Answer]) -> None:
        self.world = world
        self.url = url
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.client = StreamClient()
        self.attempt: Attempt
        self.job_id = ""

    async def claim(self, *, stall_ms: int = 60_000, first_token_ms: int = 60_000, **fields: Any) -> Attempt:
        usual: dict[str, Any] = {"stream": True, "reader": "api1/r1"}
        self.job_id = await self.world.submit("big", body=self.body, **usual | fields)
        waiting = await self.world.waiting(self.job_id)
        claimed = await lanes.claim(self.world.store, self.world.book.active, waiting, host="gpu1", boot="boot1")
        limits = Limits(first_token_ms, stall_ms, max_losses=1)
        endpoint = replace(self.endpoint, base_url=self.url)
        self.attempt = Attempt(self.world.store, self.client, claimed, endpoint, limits, served_by="big@gpu1")
        return self.attempt

    async def run(self, *answers: Answer, **claim: Any) -> Ended:
        self.answers[:] = answers
        return await asyncio.wait_for((await self.claim(**claim)).run(), 10)

    async def record(self) -> JobRecord:
        return await self.world.job(self.job_id)

    async def log(self) -> list[tuple[str, bytes]]:
        return [(frame.kind, frame.data) for frame in await self.world.log(self.job_id)]

    async def said(self) -> dict[str, Any]:
        kind, data = (await self.log())[-1]
        told: dict[str, Any] = {"kind": kind} | json.loads(data)
        return told


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    async with fake_world() as world, runtime() as (url, answers, bodies):
        await world.apply()
        await world.warm(big=2)
        bench = Bench(world, url, answers)
        bench.bodies = bodies
        yield bench
        bench.client.close()


@asynccontextmanager
async def runtime() -> AsyncIterator[tuple[str, list[Answer], list[dict[str, Any]]]]:
    answers: list[Answer] = []
    bodies: list[dict[str, Any]] = []

    async def handle(exchange: Exchange) -> None:
        bodies.append(exchange.json())
        await answers.pop(0)(exchange)

    server = HttpServer(handle)
    async with server.listening() as port:
        yield f"http://127.0.0.1:{port}", answers, bodies


async def never(exchange: Exchange) -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_good_answer(bench: Bench) -> None:
    """Asked with stream and the runtime's model name, told under ours; role and first content are one frame."""
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    parts = [event(ROLE), event({"content": "a"}), event({"content": "b"}), event({}, "stop"), event(usage=usage)]
    ended = await bench.run(says(*parts, b"data: [DONE]\n\n"))

    assert (bench.bodies[0]["model"], bench.bodies[0]["stream"]) == ("weights", True)
    assert (ended.outcome, ended.clean, ended.suspect) == ("done", True, False)
    assert ended.usage is not None and ended.usage["prompt_tokens"] == 7
    assert 0 < ended.first_token_ms <= ended.total_ms
    record = await bench.record()
    assert (record.state, record.served_by) == (State.DONE, "big@gpu1")
    assert json.loads(record.usage)["completion_tokens"] == 2
    log = await bench.log()
    whole = b"".join(data for kind, data in log if kind == "content")
    assert whole == b"".join(parts[:4]).replace(b'"weights"', b'"big"')
    assert log[0][1].count(b"data: ") >= 2, "the role came before the first content"
    assert [kind for kind, _ in log if kind != "content"] == ["done"]


async def test_an_answer_that_is_only_a_finish_reason_is_one(bench: Bench) -> None:
    """Its client gets the role and the finish reason, not an empty stream that looks clean."""
    ended = await bench.run(says(event(ROLE), event({}, "stop")))
    assert ended.outcome == "done"
    log = await bench.log()
    assert [kind for kind, _ in log] == ["content", "done"]
    assert log[0][1] == (event(ROLE) + event({}, "stop")).replace(b'"weights"', b'"big"')


async def test_a_last_event_without_its_blank_line_is_not_lost(bench: Bench) -> None:
    """Some proxies cut it off; the finish reason is in it."""
    parts = [event(ROLE), event({"content": "a"}), event({}, "stop")]
    ended = await bench.run(says(b"".join(parts).removesuffix(b"\n\n")))
    assert ended.outcome == "done"
    whole = b"".join(data for kind, data in await bench.log() if kind == "content")
    assert whole == b"".join(parts).replace(b'"weights"', b'"big"')


async def test_a_finish_without_an_end_counts_after_a_moment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps the connection open: the answer is whole, but its slot is not known to be free."""
    monkeypatch.setattr(attempt_module, "LAST_BYTES_S", 0.1)
    monkeypatch.setattr(attempt_module, "LOOK_EVERY_S", 0.05)

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(event({"content": "a"}) + event({}, "stop"))
        await never(exchange)

    ended = await bench.run(answer)
    assert (ended.outcome, ended.clean) == ("done", False)
    assert (await bench.record()).state is State.DONE


async def test_one_very_large_event_is_not_waited_for_for_ever(bench: Bench) -> None:
    """Its first half is more than may wait for Redis, and nothing of it can be written before the second half."""
    text = "x" * (3 * attempt_module.BUFFER_BYTES)
    whole = event({"content": text})
    parts = [whole[: at + 100_000][at:] for at in range(0, len(whole), 100_000)]
    ended = await bench.run(says(*parts, event({}, "stop")))
    assert ended.outcome == "done"
    assert sum(len(data) for _, data in await bench.log()) > 3 * attempt_module.BUFFER_BYTES


@pytest.mark.parametrize(
    ("status", "kind", "code", "said"),
    [
        (400, "", "runtime_refused", 400),
        (404, "", "runtime_refused", 404),
        (422, "", "runtime_refused", 422),
        (400, "exceed_context_size_error", "context_length_exceeded", None),
        (401, "", "runtime_failed", 502),
    ],
)
async def test_what_the_runtime_refuses_is_not_tried_again(
    bench: Bench, status: int, kind: str, code: str, said: int | None
) -> None:
    ended = await bench.run(refuses(status, "because", kind))
    assert (ended.outcome, ended.clean, ended.suspect) == ("failed", True, False)
    told = await bench.said()
    assert (told["kind"], told["code"], told.get("status")) == ("failed", code, said)
    assert "because" in told["message"]
    assert len(bench.bodies) == 1


@pytest.mark.parametrize(
    "words",
    [
        "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
        "Failed to parse messages: Missing 'role' in message: {}",
        "While executing CallExpression at line 4: Error: Jinja Exception: roles must alternate",
    ],
)
async def test_llama_servers_500_for_a_wrong_request_is_not_tried_again(bench: Bench, words: str) -> None:
    """Three more tries would end the same way, and each has everybody's next request wait for a probe."""
    ended = await bench.run(refuses(500, words, "server_error"))
    assert (ended.outcome, ended.clean, ended.suspect) == ("failed", True, False)
    told = await bench.said()
    assert (told["code"], told["status"], told["message"]) == ("runtime_refused", 400, words)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_the_runtime_could_not_do_now_goes_back_until_it_is_too_often(bench: Bench, status: int) -> None:
    ended = await bench.run(refuses(status))
    assert (ended.outcome, ended.clean, ended.suspect) == ("released", True, status >= 500)
    record = await bench.record()
    assert (record.state, record.losses, record.attempt) == (State.QUEUED, 1, 1)
    assert await bench.log() == []

    waiting = await bench.world.waiting(bench.job_id)
    claimed = await lanes.claim(bench.world.store, bench.world.book.active, waiting, host="gpu1", boot="boot1")
    bench.answers.append(refuses(status))
    again = Attempt(
        bench.world.store, bench.client, claimed, Endpoint(bench.url), Limits(9000, 9000, 1), served_by="big@gpu1"
    )
    assert (await again.run()).outcome == "failed"
    assert (await bench.said())["code"] == "runtime_failed"


@pytest.mark.parametrize("how", ["cut", "no finish", "error"])
async def test_a_broken_answer_is_told_to_who_has_seen_it_and_started_again_for_who_has_not(
    bench: Bench, how: str
) -> None:
    pieces = [event({"content": "a"}), event({"content": "b"})]
    if how == "error":
        pieces.append(b'data: {"error":{"message":"broken"}}\n\n')
    answer = says(*pieces, cut=how == "cut")

    ended = await bench.run(answer)
    assert ended.outcome == "failed"
    assert (await bench.record()).state is State.FAILED
    assert (await bench.said())["code"] == "runtime_failed"
    assert b'"content":"b"' in b"".join(data for _, data in await bench.log())

    ended = await bench.run(answer, stream=False)
    assert ended.outcome == "released"
    assert ((await bench.record()).state, await bench.log()) == (State.QUEUED, [])


async def test_nobody_listens(bench: Bench) -> None:
    attempt = await bench.claim()
    attempt._endpoint = Endpoint("http://127.0.0.1:1", model="weights")
    ended = await attempt.run()
    assert (ended.outcome, ended.clean, ended.suspect) == ("released", True, True)


async def test_an_old_connection_that_died_costs_no_attempt(bench: Bench) -> None:
    """The runtime closed it after its last answer: the request goes out again on a new one, unseen by anybody."""

    async def hangs_up(exchange: Exchange) -> None:
        exchange._connection._transport.close()

    good = says(event({"content": "a"}), event({}, "stop"))
    await bench.run(good)
    ended = await bench.run(hangs_up, good)
    assert (ended.outcome, len(bench.bodies)) == ("done", 3)
    assert (await bench.record()).attempt == 1


async def running(bench: Bench, answer: Answer, **claim: Any) -> "asyncio.Task[Ended]":
    bench.answers.append(answer)
    attempt = await bench.claim(**claim)
    task = asyncio.create_task(attempt.run(), name="attempt")
    await until(lambda: bench.bodies, what="the runtime was asked")
    return task


@asynccontextmanager
async def streaming(bench: Bench, **claim: Any) -> AsyncIterator[tuple["asyncio.Task[Ended]", asyncio.Event]]:
    """An attempt in the middle of its answer; the event says that the runtime saw its request closed."""
    closed = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(event({"content": "a"}))
        try:
            await never(exchange)
        finally:
            closed.set()

    task = await running(bench, answer, **claim)
    await until(lambda: bench.attempt.delivered, what="the first token")
    try:
        yield task, closed
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            task.cancel()
            await task


async def test_told_to_stop_it_closes_at_once_and_says_nothing(bench: Bench) -> None:
    async with streaming(bench) as (task, closed):
        before = await bench.log()
        bench.attempt.stop()
        ended = await asyncio.wait_for(task, 1)
        await asyncio.wait_for(closed.wait(), 1)
        assert (ended.outcome, ended.clean, ended.suspect) == ("stopped", False, False)
        assert await bench.log() == before
        assert (await bench.record()).state is State.STREAMING


@pytest.mark.parametrize(("stream", "state"), [(True, State.FAILED), (False, State.QUEUED)])
async def test_a_drain_tells_the_seen_and_gives_the_unseen_back_without_a_loss(
    bench: Bench, stream: bool, state: State
) -> None:
    async with streaming(bench, stream=stream) as (task, _closed):
        bench.attempt.stop(errors.WorkerLost("stopped"))
        await asyncio.wait_for(task, 1)
        record = await bench.record()
        assert (record.state, record.losses) == (state, 0)
        if stream:
            assert (await bench.said())["code"] == "worker_lost"


async def test_a_drain_before_the_first_token_shows_nobody_anything(bench: Bench) -> None:
    """The first content has arrived and is not written yet: unwritten, it can start again for a seeing reader too."""
    more = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await more.wait()

    task = await running(bench, answer)
    await until(lambda: bench.attempt._exchange and bench.attempt._exchange.status, what="the head of the answer")
    bench.attempt._on_data(event({"content": "a"}))
    bench.attempt.stop(errors.WorkerLost("stopped"))
    ended = await asyncio.wait_for(task, 1)
    assert ended.outcome == "released"
    record = await bench.record()
    assert (record.state, record.seen, await bench.log()) == (State.QUEUED, True, [])


async def test_silence(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "LOOK_EVERY_S", 0.05)
    ended = await bench.run(never, first_token_ms=150)
    assert (ended.outcome, ended.clean, ended.suspect) == ("failed", False, True)
    assert await bench.said() == {
        "kind": "failed", "code": "runtime_failed", "message": "no first token within 0.15 s", "status": 504
    }  # fmt: skip

    async def stalls(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(event({"content": "a"}))
        await never(exchange)

    await bench.run(stalls, stall_ms=150)
    assert (await bench.said())["message"] == "the runtime was silent for 0.15 s"


async def test_a_stale_attempt_writes_nothing_more(bench: Bench) -> None:
    """Somebody recovered its job and another attempt has it: the first write that is refused ends it."""
    more = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(event({"content": "a"}))
        await more.wait()
        await exchange.write(event({"content": "b"}) + event({}, "stop"))
        await exchange.end()

    task = await running(bench, answer, stream=False)
    await until(lambda: bench.attempt.delivered, what="the first token")
    bench.world.now += 20_000
    assert await bench.world.recover(bench.job_id)
    new = await bench.world.stream(bench.job_id, b"new")
    more.set()
    ended = await asyncio.wait_for(task, 2)

    assert (ended.outcome, ended.suspect) == ("stopped", False)
    assert [data for _, data in await bench.log()] == [b"new"]
    record = await bench.record()
    assert (record.state, record.attempt) == (State.STREAMING, new.attempt)


def dictated(pieces: "asyncio.Queue[bytes]") -> Answer:
    """A runtime that streams what the test gives it, when the test gives it."""

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        while True:
            await exchange.write(await pieces.get())

    return answer


async def lose_last_frame(bench: Bench) -> None:
    """Has Redis come back as it was a frame ago: killed, with what it wrote last not on the disk yet."""
    command, key = bench.world.store.command, bench.world.store.keys.frames(bench.job_id)
    *kept, _lost = await bench.world.log(bench.job_id)
    await command("DEL", key)  # a stream remembers the id of an entry that is only deleted
    for frame in kept:
        await command("XADD", key, f"{frame.attempt}-{frame.seq}", "kind", frame.kind, "data", frame.data)
    await command("HSET", bench.world.store.keys.job(bench.job_id), "last_seq", len(kept))


@pytest.mark.parametrize(
    ("stream", "outcome", "state"), [(True, "failed", State.FAILED), (False, "released", State.QUEUED)]
)
async def test_frames_that_redis_lost_end_the_attempt(bench: Bench, stream: bool, outcome: str, state: State) -> None:
    """It cannot go on behind a hole: who has seen a part is told, who has not gets another attempt without a loss."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    task = await running(bench, dictated(pieces), stream=stream)
    for count, text in enumerate("ab", start=1):
        pieces.put_nowait(event({"content": text}))
        await logged(bench, count)

    await lose_last_frame(bench)
    pieces.put_nowait(event({"content": "c"}))
    ended = await asyncio.wait_for(task, 2)

    record = await bench.record()
    assert (ended.outcome, record.state, record.losses) == (outcome, state, 0)
    if stream:
        told = {"kind": "failed", "code": "worker_lost", "message": "Redis lost a part of this answer"}
        assert await bench.said() == told
        assert [kind for kind, _ in await bench.log()] == ["content", "failed"]
    else:
        assert await bench.log() == []


async def test_who_reads_along_hears_of_the_frames_that_redis_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is numbered from before what the client was given already; it must not be taken for a repeat."""
    monkeypatch.setattr(frames, "CHECK_EVERY_S", 60.0)
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    async with hub_of(bench.world) as hub:
        task = await running(bench, dictated(pieces))
        live, late = hub.open(bench.job_id), hub.open(bench.job_id)
        for count, text in enumerate("ab", start=1):
            pieces.put_nowait(event({"content": text}))
            await logged(bench, count)
        for reader in (live, late):
            assert [(await read(reader)).id for _ in range(2)] == ["1-1", "1-2"]
        hub.close(late)  # it hears nothing more, and finds the end in the log
        await lose_last_frame(bench)
        pieces.put_nowait(event({"content": "c"}))
        await asyncio.wait_for(task, 2)
        late.look()
        for reader in (live, late):
            end = await read(reader)
            assert (end.id, end.kind) == ("1-2", "failed")


async def test_an_answer_with_a_hole_is_not_done_when_nothing_is_left_to_write(bench: Bench) -> None:
    """Its last bytes were in the frame that Redis lost: the end alone would look whole."""
    over = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(event({"content": "a"}))
        await logged(bench, 1)
        await exchange.write(event({"content": "b"}) + event({}, "stop"))
        await over.wait()
        await exchange.end()

    task = await running(bench, answer)
    await logged(bench, 2)
    await lose_last_frame(bench)
    over.set()

    assert (await asyncio.wait_for(task, 2)).outcome == "failed"
    assert (await bench.said())["code"] == "worker_lost"


async def test_who_has_seen_a_part_is_told_even_if_redis_lost_that_there_was_one(bench: Bench) -> None:
    """Back at `claimed` with an empty log, the job looks as if it could start again."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    task = await running(bench, dictated(pieces))
    pieces.put_nowait(event({"content": "a"}))
    await logged(bench, 1)
    await lose_last_frame(bench)
    job = bench.world.store.keys.job(bench.job_id)
    await bench.world.store.command("HSET", job, "state", "claimed", "first_token_at", "0", "last_seq", "0")
    pieces.put_nowait(event({"content": "b"}))

    ended = await asyncio.wait_for(task, 2)
    assert (ended.outcome, ended.suspect) == ("failed", False)  # the runtime is not to blame
    assert (await bench.record()).error == "worker_lost"


async def test_an_attempt_that_is_stopped_before_it_runs_asks_nobody(bench: Bench) -> None:
    attempt = await bench.claim()
    attempt.stop()
    assert (await attempt.run()).outcome == "stopped"
    assert bench.bodies == []


async def read(reader: FrameReader) -> Frame:
    found = await reader.next(timeout_s=5)
    assert isinstance(found, Frame)
    return found


async def logged(bench: Bench, count: int) -> None:
    """Waits until so many frames are in the log."""

    async def check() -> bool:
        return len(await bench.log()) == count

    await eventually(check, what=f"{count} frames are in the log")


@pytest.mark.parametrize("broken", ["workers.asking.Asking.request", "broker.continuing.judge"])
async def test_a_request_that_breaks_our_own_code_ends_and_its_worker_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """`"think": []` ended the worker's process, and each worker after it that recovered the job."""

    def breaks(*_: Any) -> bytes:
        raise KeyError("zebra")

    monkeypatch.setattr(broken, breaks)
    ended = await bench.run(says(event({"content": "Hi"}), cut=True))
    assert ended.outcome == "failed" and not ended.suspect
    assert (await bench.record()).state is State.FAILED
    assert (await bench.said())["code"] == "runtime_failed" and "zebra" not in str(await bench.said())
    assert "event=unexpected" in caplog.text


@pytest.mark.parametrize("status", [400, 501])
async def test_the_words_of_a_runtime_reach_its_client_only(
    bench: Bench, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """They may repeat the prompt, as llama-server's do that cannot parse one."""
    caplog.set_level("DEBUG")
    await bench.run(refuses(status, "Failed to parse input: zebra"))
    assert "zebra" in (await bench.said())["message"]
    assert "event=fail" in caplog.text or "event=release" in caplog.text
    assert "zebra" not in caplog.text
    dead = await bench.world.store.command("XRANGE", bench.world.store.keys.dead, "-", "+")
    assert "zebra" not in str(dead) and len(dead) == (status == 501)
