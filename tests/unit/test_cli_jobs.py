"""`gateway submit` and `gateway job`: what they print, and the codes that a pipeline branches on."""

import asyncio
import io
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from api import cli_answer, client, exit_codes
from api.exit_codes import Failed
from api.jobs_client import Event, JobsClient
from broker import errors, lanes
from broker.lifecycle import State
from tests.support.live_api import Scene, until_true
from tests.support.waiting import until
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]

Command = Callable[..., Awaitable[Ran]]


@pytest_asyncio.fixture
async def run(scene: Scene, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command against that gateway, beside the loop that serves it."""
    monkeypatch.setenv("GATEWAY_URL", scene.api.url)
    return lambda *words: asyncio.to_thread(gateway, *words)


@pytest.fixture
def prompt(tmp_path: Path) -> Callable[[str], str]:
    """A file with these words."""

    def written(said: str) -> str:
        file = tmp_path / f"{said.split()[0]}.md"
        file.write_text(said)
        return str(file)

    return written


Prompt = Callable[[str], str]


async def test_hand_in_look_and_fetch(run: Command, prompt: Prompt, scene: Scene) -> None:
    taken = await run("submit", "--model", "big", "-f", prompt("hello you"), "--metadata", "build=17")
    assert taken.code == 0 and taken.err == "" and taken.out.count("\n") == 1
    job_id = taken.out.strip()
    result = await run("job", "result", "--wait", job_id)
    assert (result.code, result.out) == (0, "Hello world\n")
    whole = json.loads((await run("job", "result", job_id, "--json")).out)
    assert whole["object"] == "chat.completion" and whole["choices"][0]["message"]["content"] == "Hello world"
    shown = await run("job", "show", job_id)
    words = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert (words["job"], words["state"], words["metadata"]) == (job_id, "done", "build=17")
    listed = (await run("job", "list", "--metadata", "build=17")).out.splitlines()
    assert listed[0].split()[:2] == ["JOB", "STATE"] and listed[1].split()[:3] == [job_id, "done", "big"]
    assert listed[1].endswith("build=17") and len(listed) == 2
    assert (await run("job", "list", "--state", "failed")).out == "no such jobs\n"
    assert [job["id"] for job in json.loads((await run("job", "list", "--json")).out)["data"]] == [job_id]
    (await run("job", "list", "--state", "gone")).complains(1, "state must be one of")
    second = (await run("submit", "--model", "big", "-f", prompt("hello again"))).out.strip()
    newest = await run("job", "list", "--limit", "1")
    assert second in newest.out and newest.err.startswith("note: there are older ones;")
    rest = await run("job", "list", "--limit", "1", "--after", newest.err.split("--after ")[1].split()[0])
    assert job_id in rest.out and rest.err == ""


async def test_wait_prints_the_answer_and_nothing_else(run: Command, prompt: Prompt) -> None:
    ran = await run("submit", "-m", "big", "-f", prompt("hello"), "--wait")
    assert (ran.code, ran.out) == (0, "Hello world\n") and ran.err.startswith("job 0")
    told = json.loads((await run("submit", "-m", "big", "-f", prompt("hello"), "--wait", "--json")).out)
    assert told["choices"][0]["message"]["content"] == "Hello world"


async def test_stream_prints_the_words_as_they_come(run: Command, prompt: Prompt, scene: Scene) -> None:
    ran = await run("submit", "-m", "big", "-f", prompt("hello"), "--stream")
    assert (ran.code, ran.out) == (0, "Hello world\n")
    lines = (await run("submit", "-m", "big", "-f", prompt("hello"), "--stream", "--json")).out.splitlines()
    assert [json.loads(line)["object"] for line in lines] == ["chat.completion.chunk"] * 3
    job_id = scene.worker.seen[-1].id
    assert (await run("job", "tail", job_id)).out == "Hello world\n"


async def test_an_answer_that_begins_anew_is_said_so(run: Command, prompt: Prompt, scene: Scene) -> None:
    """What was printed cannot be taken back; what is whole comes last, and --wait never shows the rest."""
    streaming = asyncio.create_task(run("submit", "-m", "big", "-f", prompt("restart"), "--stream"))
    await until(lambda: scene.worker.seen, what="the job runs")
    await scene.until_state(scene.worker.seen[0].id, State.STREAMING)
    waiting = asyncio.create_task(run("job", "result", "--wait", scene.worker.seen[0].id))
    scene.go.set()
    waited, ran = await asyncio.gather(waiting, streaming)
    assert (waited.code, ran.code) == (0, 0)
    out, err = waited.out + ran.out, waited.err + ran.err  # one stdout for both: either may be read with the other
    assert out.count("Hello world\n") == 2
    if rest := out.replace("Hello world\n", ""):  # the stream was there in time to see the first attempt
        assert rest == "never to be seen\n" and "The answer begins anew.\n" in err


async def test_how_a_job_ends_is_the_exit_code(run: Command, prompt: Prompt, scene: Scene) -> None:
    failed = await run("submit", "-m", "big", "-f", prompt("break_early"), "--wait")
    assert (failed.code, failed.out) == (exit_codes.FAILED, "") and "failed: the runtime closed" in failed.err
    refused = await run("submit", "-m", "big", "-f", prompt("refuse"), "--wait", "--json")
    assert refused.code == exit_codes.FAILED and json.loads(refused.out)["error"]["code"] == "runtime_refused"
    assert "temperature must be below 2" in refused.err
    again = await run("job", "retry", scene.worker.seen[0].id)
    assert again.code == 0 and again.out.strip() != scene.worker.seen[0].id
    assert (await run("job", "result", "--wait", again.out.strip())).code == exit_codes.FAILED
    shown = await run("job", "show", scene.worker.seen[0].id)
    assert again.out.strip() in shown.out and "runtime_failed" in shown.out

    waits = (await run("submit", "-m", "big", "-f", prompt("wait"))).out.strip()
    unfinished = await run("job", "result", waits)
    unfinished.complains(exit_codes.UNFINISHED, "no answer yet")
    late = await run("submit", "-m", "big", "-f", prompt("wait"), "--timeout", "300ms")
    assert (late.code, late.out) == (exit_codes.UNFINISHED, "") and "goes on; `gateway job result --wait" in late.err
    tailed = await run("job", "tail", waits, "--timeout", "300ms")
    assert tailed.code == exit_codes.UNFINISHED
    assert json.loads((await run("job", "cancel", waits, "--json")).out)["state"] == "cancelled"
    cancelled = await run("job", "result", waits)
    assert cancelled.code == exit_codes.CANCELLED and "was cancelled" in cancelled.err
    (await run("job", "retry", late.err.split()[1])).complains(1, "")


@pytest.mark.parametrize(
    ("words", "stop", "code"),
    [
        (("submit", "-m", "big", "--wait", "-f", "FILE"), signal.SIGTERM, exit_codes.TERMINATED),
        (("submit", "-m", "big", "--stream", "-f", "FILE"), signal.SIGINT, exit_codes.INTERRUPTED),
        (("job", "tail", "JOB"), signal.SIGTERM, exit_codes.TERMINATED),
        (("job", "tail", "JOB"), signal.SIGINT, exit_codes.INTERRUPTED),
    ],
)
async def test_whoever_is_stopped_says_how_to_come_back(
    run: Command, prompt: Prompt, scene: Scene, words: tuple[str, ...], stop: signal.Signals, code: int
) -> None:
    job_id = (await run("submit", "-m", "big", "-f", prompt("pause"))).out.strip() if "JOB" in words else ""
    known = {"JOB": job_id, "FILE": prompt("pause")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", "from api.entry import main; main()", *(known.get(word, word) for word in words)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # a shell's background job ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stderr is not None
    if not job_id:
        job_id = (await asyncio.wait_for(process.stderr.readline(), 20)).decode().removeprefix("job ").strip()
    if "--wait" not in words:
        assert await asyncio.wait_for(process.stdout.readexactly(5), 20) == b"Hello"
    process.send_signal(stop)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == code
    assert err.decode() == f"Job {job_id} goes on; `gateway job result --wait {job_id}` waits for it again.\n"


async def test_what_has_ended_is_printed_without_a_limit(run: Command, prompt: Prompt, scene: Scene) -> None:
    """There is nothing to wait for, however long its answer takes to print; nor does it go on."""
    job_id = (await run("submit", "-m", "big", "-f", prompt("pause"))).out.strip()
    await scene.until_state(job_id, State.STREAMING)
    await run("job", "cancel", job_id)
    ran = await run("job", "tail", job_id, "--timeout", "1ms")
    assert ran.code == exit_codes.CANCELLED and ran.out.startswith("Hello") and "was cancelled" in ran.err
    assert "goes on" not in ran.err


async def test_a_limit_that_passes_as_the_job_ends_does_not_say_that_it_goes_on() -> None:
    """All of its words were not there yet when the time was over, but its end was."""
    job = {"id": "01J", "state": "streaming", "endpoint": "/v1/chat/completions"}
    with pytest.raises(Failed, match=r"^Job 01J has ended; `gateway job result 01J`") as late:
        await cli_answer.tell_as_it_comes(cast(JobsClient, SilentJobs()), job, as_json=False, timeout_s=0.01)
    assert late.value.code == exit_codes.UNFINISHED


class SilentJobs:
    """A gateway whose only job has ended, and which never tells a word of its answer."""

    async def look(self, job_id: str) -> dict[str, Any]:
        return {"id": job_id, "state": "cancelled"}

    @asynccontextmanager
    async def events(self, job_id: str, after: str = "") -> AsyncIterator[AsyncIterator[Event]]:
        async def never() -> AsyncIterator[Event]:
            await asyncio.Event().wait()
            yield Event("end", "", {})

        yield never()


async def test_expired_is_a_code_of_its_own(run: Command, prompt: Prompt, scene: Scene) -> None:
    await scene.beat(big="cold", small="cold", hasty="cold")
    job_id = (await run("submit", "-m", "big", "-f", prompt("hello"), "--expires-after", "1s")).out.strip()

    async def expired() -> bool:
        """Does what a scheduler does once the instant has passed."""
        with suppress(errors.NotDue):
            await lanes.expire(scene.store, await scene.job(job_id), errors.JobExpired("it waited too long"))
        return not (await scene.job(job_id)).live

    await until_true(expired, what="it expires")
    ran = await run("job", "result", job_id)
    assert ran.code == exit_codes.EXPIRED and "expired: it waited too long" in ran.err


async def test_a_busy_gateway_is_a_5_and_may_be_waited_for(
    run: Command, prompt: Prompt, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job holds the only place that its key may have."""
    monkeypatch.setenv("GATEWAY_KEY", await key_with(run, max_waiting=1))
    await scene.beat(big="cold", small="cold", hasty="cold")
    first = await run("submit", "-m", "big", "-f", prompt("hello"))
    assert first.code == 0, first.err
    full = await run("submit", "-m", "big", "-f", prompt("hello"))
    full.complains(exit_codes.BUSY, "takes nothing now", "try again in")
    patient = asyncio.create_task(run("submit", "-m", "big", "-f", prompt("hello"), "--patience", "30s", "--wait"))
    await scene.beat()
    ran = await patient
    assert (ran.code, ran.out) == (0, "Hello world\n"), ran.err


async def key_with(run: Command, *, max_waiting: int) -> str:
    """The key of a bot on a gateway that had none."""
    boss = (await run("key", "new", "boss", "--admin")).out.strip()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GATEWAY_KEY", boss)
        return (await run("key", "new", "bot", "--max-waiting", str(max_waiting))).out.strip()


async def test_the_whole_request_reaches_the_job(
    run: Command, prompt: Prompt, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From stdin with a system prompt, or as a body of another endpoint; the same key leads to the same job."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("hello ü".encode())))
    words = ("submit", "-m", "fast-edit", "-f", "-", "--system", prompt("rules"), "--max-tokens", "7", "--json")
    told = json.loads((await run(*words, "--priority", "interactive", "--idempotency-key", "once")).out)
    assert (told["asked"], told["priority"], told["max_tokens"]) == ("fast-edit", "interactive", 7)
    assert told["links"]["result"] == f"/v1/jobs/{told['id']}/result"
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "nobody", "input": "hello"}))
    given = ("submit", "--body", str(body), "--endpoint", "/v1/responses", "-m", "small", "--not-before", "2h")
    later = json.loads((await run(*given, "--json", "--idempotency-key", "a", "--lane", "big")).out)
    assert (later["state"], later["endpoint"], later["asked"]) == ("scheduled", "/v1/responses", "big")
    assert "starts" in (await run("job", "show", later["id"])).out
    await scene.store.command("HSET", scene.store.keys.job(later["id"]), "spilled", "lane_full")
    assert "spilled      at once (lane_full)" in (await run("job", "show", later["id"])).out
    same = await run(*given, "--idempotency-key", "a", "--lane", "big")
    assert same.out.strip() == later["id"]
    (await run(*given, "--idempotency-key", "a")).complains(1, "Idempotency-Key")


async def test_a_start_may_be_seconds_since_1970(run: Command, prompt: Prompt) -> None:
    """As `date +%s` prints them."""
    at = int(time.time()) + 7_200
    told = await run("submit", "-m", "big", "-f", prompt("hello"), "--not-before", str(at), "--json")
    assert json.loads(told.out)["not_before"] == at * 1_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "big"], "Say what to ask"), (["-f", "FILE"], "Say whom to ask"),
        (["-m", "big", "-f", "FILE", "--body", "FILE"], "Either -f"), (["--body", "FILE"], "is no JSON"),
        (["--body", "FILE", "--system", "FILE"], "--system and --max-tokens go with -f"),
        (["--body", "FILE", "--max-tokens", "3"], "--system and --max-tokens go with -f"),
        (["-m", "big", "-f", "nothing.md"], "can't be read"),
        (["-m", "big", "-f", "FILE", "--timeout", "7"], "no length"),
        (["-m", "big", "-f", "FILE", "--metadata", "x"], "KEY=VALUE"),
        (["-m", "big", "-f", "FILE", "--idempotency-key", "für-immer"], "ASCII"),
        (["-m", "big", "-f", "FILE", "--idempotency-key", "a b"], "visible characters"),
        (["-m", "big", "-f", "FILE", "--expires-after", "5"], "no length"),
        (["-m", "big", "-f", "FILE", "--expires-after", "31d"], "1s to 30d"),
        (["-m", "big", "-f", "FILE", "--not-before", "yesterday"], "--not-before must be an instant"),
        (["-m", "big", "-f", "FILE", "--not-before", "31d"], "30 days ahead"),
    ],
)  # fmt: skip
async def test_wrong_words_are_a_2(words: list[str], said: str, run: Command, prompt: Prompt) -> None:
    file = prompt("hello")
    ran = await run("submit", *[file if word == "FILE" else word for word in words])
    assert (ran.code, ran.out) == (exit_codes.USAGE, "") and said in ran.err


async def test_what_the_gateway_refuses_is_a_1_in_its_words(run: Command, prompt: Prompt, tmp_path: Path) -> None:
    (await run("submit", "-m", "bigg", "-f", prompt("hello"))).complains(1, "bigg", "big")
    (await run("job", "tail", "01JZZZZZZZZZZZZZZZZZZZZZZZ")).complains(1, "no job")
    (tmp_path / "body.json").write_text('{"model": "big", "input": "x"}')
    (await run("submit", "--body", str(tmp_path / "body.json"), "--endpoint", "/v1/embeddings")).complains(
        1, "/v1/embeddings"
    )


@pytest.mark.parametrize("words", [["submit", "-m", "big", "-f"], ["submit", "-m", "big", "--wait", "-f"]])
def test_a_gateway_that_is_away_is_a_3(words: list[str], gateway: Gateway, prompt: Prompt) -> None:
    gateway(*words, prompt("hello")).complains(exit_codes.UNREACHABLE, "can't be reached")
    for name in ("tail", "result", "retry", "list"):
        gateway("job", name, *(["x"] if name != "list" else [])).complains(exit_codes.UNREACHABLE, "can't be reached")


@pytest.mark.parametrize("key", ["wl_abc\x07secret", "wl_abc\nsecret", "wl_äsecret"])
def test_a_key_that_no_header_carries_is_not_repeated(
    key: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads a pipeline's log must not find it there."""
    monkeypatch.setenv("GATEWAY_KEY", key)
    for words in (("job", "list"), ("status",)):
        ran = gateway(*words)
        assert (ran.code, ran.err) == (exit_codes.USAGE, "GATEWAY_KEY holds characters that no key has.\n")


def test_a_key_out_of_a_file_may_end_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "wl_abc_secret\n")
    assert client.connect().headers["authorization"] == "Bearer wl_abc_secret"
