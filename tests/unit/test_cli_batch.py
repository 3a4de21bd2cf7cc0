"""`gateway batch run` without a kill: what stands in its files, what a second run asks for, and its exit codes."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api import cli_batch, exit_codes
from api.exit_codes import Failed
from broker.lifecycle import State
from tests.support.batch_command import read
from tests.support.live_api import Scene
from tests.support.waiting import until
from tests.unit.test_cli import Gateway, Ran, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]


Batch = Callable[..., Awaitable[Ran]]


@pytest_asyncio.fixture
async def batch(
    scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Batch:
    """Runs these lines into out.jsonl, as the command does but in the loop that serves the gateway."""
    monkeypatch.setenv("GATEWAY_URL", scene.api.url)
    files = cli_batch.Files(*(tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.errors.jsonl")))

    async def run(lines: list[str] | None = None, order: dict[str, Any] | None = None, **more: Any) -> Ran:
        if lines is not None:
            files.requests.write_text("\n".join(lines) + "\n")
        known = {"concurrency": 32, "patience_s": 900, "retry_failed": False, "as_json": False}
        code, complaint = 0, ""
        try:
            await cli_batch.run_files(files, order or {}, **known | more)
        except Failed as failure:
            code, complaint = failure.code, f"{failure}\n"
        out, err = capsys.readouterr()
        return Ran(code, out, err + complaint)

    return run


def line(custom_id: str, said: str, *, model: str = "big", url: str = "/v1/chat/completions") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": said}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def asked(scene: Scene) -> int:
    """How many jobs the worker has been given."""
    return len(scene.worker.seen)


MIXED = [
    line("good", "hello"), "no JSON", line("again", "hello"), line("again", "hello"), line("bad", "break_early"),
    line("refused", "refuse"), line("nobody", "hello", model="nobody"), line("nowhere", "hello", url="/v1/nothing"),
]  # fmt: skip


async def test_good_and_bad_lines_go_their_ways(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """In OpenAI's shapes, and each once, however often it is run."""
    ran = await batch(MIXED, as_json=True)
    assert ran.code == exit_codes.FAILED and "3 of 8 answered" in ran.err and "5 failed" in ran.err
    errors_file = tmp_path / "out.errors.jsonl"
    summary = {"total": 8, "done": 3, "failed": 5, "left": 0, "output": str(tmp_path / "out.jsonl")}
    assert json.loads(ran.out) == {**summary, "errors": str(errors_file)}
    outputs = read(tmp_path / "out.jsonl")
    assert sorted(found["custom_id"] for found in outputs) == ["again", "again", "good"]
    for found in outputs:
        assert found.keys() == {"id", "custom_id", "response", "error"} and found["error"] is None
        assert found["response"]["body"]["choices"][0]["message"]["content"] == "Hello world"
        assert (await scene.job(found["response"]["request_id"])).state is State.DONE
    assert len({found["id"] for found in outputs}) == 3
    errors = {found["custom_id"]: found for found in read(errors_file)}
    assert errors.keys() == {None, "bad", "refused", "nobody", "nowhere"}
    assert errors[None]["error"] == {"code": "invalid_line", "message": "line 2 is no JSON"}
    codes = {name: code_of(errors[name]) for name in errors if name}
    assert codes["bad"] == (502, "runtime_failed") and codes["refused"] == (422, "runtime_refused")
    assert codes["nobody"] == (404, "model_not_found") and codes["nowhere"] == (400, "invalid_request")
    before = asked(scene)
    assert (await batch()).code == exit_codes.FAILED
    assert asked(scene) == before and len(read(tmp_path / "out.jsonl")) == 3 and len(read(errors_file)) == 5


def code_of(found: dict[str, Any]) -> tuple[int, str]:
    assert found["error"] is None
    return found["response"]["status_code"], found["response"]["body"]["error"]["code"]


@pytest.mark.parametrize("order", [{"lane": "nowhere"}, {"expiresAfter": "soon"}, {"expiresAfter": "60d"}])
async def test_wrong_words_for_the_whole_run_are_no_failure_of_its_lines(
    batch: Batch, scene: Scene, tmp_path: Path, order: dict[str, str]
) -> None:
    """They would all be noted as failed, and left alone by the next run, whose words are right."""
    ran = await batch([line("a", "hello"), line("b", "hello")], order)
    assert ran.code == exit_codes.USAGE and asked(scene) == 0
    assert "nowhere" in ran.err or "expiresAfter" in ran.err
    assert "same command" not in ran.err, "the same words are refused again"
    assert not (tmp_path / "out.errors.jsonl").exists()
    assert (await batch()).code == exit_codes.OK


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_an_output_without_a_name_is_a_wrong_word(gateway: Gateway, tmp_path: Path, output: str) -> None:
    """As where a variable of a pipeline is not set."""
    (tmp_path / "in.jsonl").write_text(line("a", "hello"))
    ran = gateway("batch", "run", str(tmp_path / "in.jsonl"), "-o", output)
    assert (ran.code, ran.err) == (exit_codes.USAGE, "--output must name a file.\n")


async def test_failed_lines_are_tried_again_when_that_is_asked_for(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """Their dead letters go: `gateway dead retry --all` would do once more what is done by then."""
    assert (await batch([line("a", "hello"), line("b", "break_early")])).code == exit_codes.FAILED
    assert await scene.store.command("XLEN", scene.store.keys.dead) == 1
    scene.worker.scripts["break_early"] = scene.worker.scripts["hello"]
    ran = await batch(retry_failed=True)
    assert ran.code == 0 and "2 of 2 answered" in ran.err and asked(scene) == 3
    assert await scene.store.command("XLEN", scene.store.keys.dead) == 0
    assert not (tmp_path / "out.errors.jsonl").exists()
    assert (await batch(retry_failed=True)).code == 0 and asked(scene) == 3


@pytest.mark.parametrize("wrong", ["url", "key"])
async def test_failures_stand_until_the_gateway_has_said_otherwise(
    batch: Batch, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: Gateway, wrong: str
) -> None:
    """A gateway that is away, or a key that is none, is no reason to forget which lines failed and why."""
    lines = [line("a", "hello"), line("b", "break_early"), line("c", "hello", model="nobody")]
    assert (await batch(lines)).code == exit_codes.FAILED
    before = (tmp_path / "out.errors.jsonl").read_bytes()
    with monkeypatch.context() as away:
        if wrong == "url":
            away.setenv("GATEWAY_URL", "http://127.0.0.1:1")
        else:
            boss = (await asyncio.to_thread(gateway, "key", "new", "boss", "--admin")).out.strip()
            away.setenv("GATEWAY_KEY", boss + "x")
        ran = await batch(retry_failed=True, patience_s=1)
    assert ran.code == {"url": exit_codes.UNREACHABLE, "key": exit_codes.REFUSED}[wrong]
    assert "1 of 3 answered" in ran.err
    assert (tmp_path / "out.errors.jsonl").read_bytes() == before
    assert (await batch()).code == exit_codes.FAILED and asked(scene) == 2, "they are left alone"
    assert (tmp_path / "out.errors.jsonl").read_bytes() == before


@pytest.mark.parametrize("kill", [False, True])
async def test_a_stop_leaves_the_failures_of_the_lines_that_were_not_dealt_with(
    batch: Batch, scene: Scene, tmp_path: Path, kill: bool
) -> None:
    """After SIGKILL too: the next run sees what is dealt with, and the file holds nothing twice."""
    output, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    scripts = scene.worker.scripts
    scripts.update(dict.fromkeys(("first", "second", "third"), scripts["break_early"]))
    await batch([line("a", "first"), line("b", "second"), line("c", "third")])
    before = {found["custom_id"]: found for found in read(errors)}
    scripts.update(first=scripts["hello"], second=scripts["wait"])
    running = asyncio.create_task(batch(retry_failed=True))
    await until(lambda: len(read(output)) == 1 and len(read(errors)) == 4, what="two of three have ended")
    killed = {file: file.read_bytes() for file in (output, errors)}
    os.kill(os.getpid(), signal.SIGINT)
    assert (await running).code == exit_codes.INTERRUPTED
    if kill:
        for file, content in killed.items():
            file.write_bytes(content)
        assert (await batch()).code == exit_codes.FAILED
    after = {found["custom_id"]: found for found in read(errors)}
    assert len(read(errors)) == 2 and after["b"] == before["b"] and after["c"] != before["c"]
    scene.go.set()
    scripts["third"] = scripts["hello"]
    ran = await batch(retry_failed=True)
    assert ran.code == 0 and asked(scene) == 7 and not errors.exists(), "the job of the stopped one is come back to"
    assert await scene.store.command("XLEN", scene.store.keys.dead) == 1, "of c, which failed twice"


async def test_failures_of_lines_that_are_mended_go_once_all_is_dealt_with(batch: Batch, tmp_path: Path) -> None:
    """A changed line is another one, and nothing of the file is left to speak for the first."""
    assert (await batch(["no JSON", line("b", "break_early")])).code == exit_codes.FAILED
    assert (await batch([line("a", "hello"), line("b", "hello")])).code == 0
    assert len(read(tmp_path / "out.errors.jsonl")) == 2
    assert (await batch(retry_failed=True)).code == 0
    assert not (tmp_path / "out.errors.jsonl").exists() and len(read(tmp_path / "out.jsonl")) == 2


async def test_a_lost_output_is_fetched_and_not_made_again(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """Also a torn one, and without it the file as it was."""
    lines = [line(f"r{n}", "hello") for n in range(5)]
    assert (await batch(lines)).code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    assert (await batch()).code == 0
    assert sorted(read(tmp_path / "out.jsonl"), key=str) == sorted(map(json.loads, whole.splitlines()), key=str)
    (tmp_path / "out.jsonl").unlink()
    assert (await batch(concurrency=1)).code == 0
    assert [found["custom_id"] for found in read(tmp_path / "out.jsonl")] == [f"r{n}" for n in range(5)]
    assert asked(scene) == 5


async def test_new_lines_of_a_file_are_run(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    assert (await batch([line("a", "hello")])).code == 0
    assert (await batch([line("b", "hello"), line("a", "hello")])).code == 0
    assert [found["custom_id"] for found in read(tmp_path / "out.jsonl")] == ["a", "b"] and asked(scene) == 2


async def test_only_so_many_jobs_are_there_at_once(batch: Batch, scene: Scene) -> None:
    running = asyncio.create_task(batch(concurrency=3, lines=[line(f"r{n}", f"wait {n}") for n in range(6)]))
    await until(lambda: asked(scene) == 2, what="both slots work")
    live = await scene.store.command("ZCARD", scene.store.keys.due)
    scene.go.set()
    assert (await running).code == 0 and live <= 3 and asked(scene) == 6


async def test_a_cancelled_job_is_a_failed_line(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    running = asyncio.create_task(batch([line("a", "wait")]))
    await until(lambda: asked(scene) == 1, what="it runs")
    async with scene.client() as client:
        await client.delete(f"/jobs/{scene.worker.seen[0].id}", cast_to=object)
    assert (await running).code == exit_codes.FAILED
    assert code_of(read(tmp_path / "out.errors.jsonl")[0]) == (499, "cancelled")


async def test_other_options_for_the_same_lines_are_refused(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """Else the file would hold two answers of the same line, or one of nobody knows which options."""
    assert (await batch([line("a", "hello")])).code == 0
    (tmp_path / "out.jsonl").unlink()
    ran = await batch(order={"expiresAfter": "2h"})
    assert ran.code == exit_codes.USAGE and "with other options" in ran.err and asked(scene) == 1
    assert "same command" not in ran.err
    assert not (tmp_path / "out.errors.jsonl").exists()


async def test_what_is_told_to_do_about_other_options_helps(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """Another file does not: a line is known by what it says, wherever it stands."""
    other = {"expiresAfter": "2h"}
    assert (await batch([line("a", "hello")])).code == 0
    (tmp_path / "out.jsonl").unlink()
    ran = await batch([line("new", "hello"), line("a", "hello")], other, concurrency=1)
    ran.complains(exit_codes.USAGE, "Line 2 was handed in before, from this file or another", "with other options")
    ran.complains(exit_codes.USAGE, "say the same ones, change its custom_id, or wait until its job is no longer kept")
    assert (await batch([line("a", "hello")])).code == 0 and asked(scene) == 2
    assert (await batch([line("b", "hello")], other)).code == 0 and asked(scene) == 3


async def test_a_full_key_is_waited_for(
    batch: Batch, scene: Scene, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller may have one job waiting: the others find their place as that one runs."""
    boss = (await asyncio.to_thread(gateway, "key", "new", "boss", "--admin")).out.strip()
    monkeypatch.setenv("GATEWAY_KEY", boss)
    bot = (await asyncio.to_thread(gateway, "key", "new", "bot", "--max-waiting", "1")).out.strip()
    monkeypatch.setenv("GATEWAY_KEY", bot)
    ran = await batch([line(f"r{n}", f"hello {n}") for n in range(6)])
    assert ran.code == 0, ran.err
    monkeypatch.setenv("GATEWAY_KEY", bot + "x")
    (await batch([line("new", "hello")])).complains(1, "Once that is mended, the same command goes on from here")


async def test_a_gateway_that_is_away_for_too_long_is_a_3(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        monkeypatch.setenv("GATEWAY_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
    ran = await batch(patience_s=1, lines=[line("a", "hello")])
    ran.complains(exit_codes.UNREACHABLE, "can't be reached", "The same command again goes on from here")


def test_files_that_cannot_be_used_are_a_2(gateway: Gateway, tmp_path: Path) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(line("a", "hello"))
    output.write_text("a diary\n")
    words = ("batch", "run", str(requests), "-o")
    gateway(*words, str(output)).complains(exit_codes.USAGE, "something else")
    gateway(*words, str(requests)).complains(exit_codes.USAGE, "three files")
    gateway(*words, str(tmp_path / "o"), "--patience", "1").complains(exit_codes.USAGE, "no length of time")
    gateway("batch", "run", str(tmp_path / "no"), "-o", str(tmp_path / "o")).complains(
        exit_codes.USAGE, "can't be read"
    )
    assert output.read_text() == "a diary\n"


async def test_a_terminal_sees_a_bar_and_nobody_else_does(batch: Batch, scene: Scene, tmp_path: Path) -> None:
    """Counts, failures and why it waits, on stderr; what it prints for programs stays on stdout."""
    quiet = await batch([line("a", "hello"), line("b", "hello")])
    assert quiet.err == f"2 of 2 answered in {tmp_path / 'out.jsonl'}.\n" and quiet.out == ""
    terminal, shown = pty.openpty()
    (tmp_path / "more.jsonl").write_text(line("c", "break_early") + "\n" + line("d", "hello"))
    words = ("batch", "run", str(tmp_path / "more.jsonl"), "-o", str(tmp_path / "more.out.jsonl"), "--json")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", "from api.entry import main; main()", *words),
        env={**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_URL": scene.api.url, "TERM": "xterm", "COLUMNS": "100"},
        stdout=asyncio.subprocess.PIPE,
        stderr=shown,
    )
    os.close(shown)
    seen = asyncio.create_task(asyncio.to_thread(read_all, terminal))
    out, _ = await asyncio.wait_for(process.communicate(), 40)
    text = (await seen).decode()
    os.close(terminal)
    assert process.returncode == exit_codes.FAILED and json.loads(out)["failed"] == 1
    assert "2/2" in text and "1 failed" in text and "1 of 2 answered" in text


def read_all(terminal: int) -> bytes:
    """What was written to a terminal, until nobody holds it any more."""
    found = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            found += piece
    return found
