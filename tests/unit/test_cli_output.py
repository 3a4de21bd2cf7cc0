"""An output that takes no more: a full disk, a closed stdout, a reader who has left. One sentence, a code of its own,
and no job or secret that nobody knows of."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from api.exit_codes import FAILED, OK, UNWRITTEN, USAGE
from api.output import guarded
from api.up import print_line
from tests.support.live_api import Scene

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]
FULL = "> /dev/full"
SENTENCE = "The output can't be written: No space left on device."

Shell = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest_asyncio.fixture
async def shell(scene: Scene, tmp_path: Path) -> Shell:
    """Runs `gateway` in a shell, against that gateway: with these words and what the shell does to its streams."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "GATEWAY_URL": scene.api.url, "PYTHON": sys.executable}
    (tmp_path / "hello.md").write_text("hello")
    (tmp_path / "refuse.md").write_text("refuse")

    async def run(words: str, before: str = "") -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", f'{before} "$PYTHON" -P -c "from api.entry import main; main()" {words}'),
            cwd=tmp_path,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 40)
        assert process.returncode is not None and b"Traceback" not in err and b"ignored" not in err, err.decode()
        return process.returncode, out.decode(), err.decode()

    return run


ASK = "submit -m big -f hello.md"


@pytest.mark.parametrize("words", ["", "--json"])
async def test_a_job_whose_id_could_not_be_printed_is_named(shell: Shell, scene: Scene, words: str) -> None:
    code, _, err = await shell(f"{ASK} {words} {FULL}")
    job = await scene.job(named(err))
    assert code == UNWRITTEN
    assert err == f"{SENTENCE} Job {job.id} goes on; `gateway job result --wait {job.id}` waits for it again.\n"


@pytest.mark.parametrize("words", ["--wait", "--stream --json"])
async def test_an_answer_that_could_not_be_printed_is_there_to_fetch(shell: Shell, scene: Scene, words: str) -> None:
    code, _, err = await shell(f"{ASK} {words} {FULL}")
    job_id = named(err)
    assert code == UNWRITTEN and err.startswith(f"job {job_id}\n{SENTENCE} Job {job_id} ") and err.count("\n") == 2
    fetch = re.findall("`gateway (.*)`", err)[0]
    assert await shell(fetch) == (0, "Hello world\n", "")
    code, _, err = await shell(f"{fetch} {FULL}")
    assert (code, err) == (UNWRITTEN, f"{SENTENCE} Job {job_id} has ended; `gateway job result {job_id}` tells how.\n")


def named(err: str) -> str:
    """The job of which a complaint says how to come back to it."""
    return re.findall("`gateway job result (?:--wait )?(.*)`", err)[0]


async def test_a_closed_stdout_is_no_success(shell: Shell) -> None:
    code, _, err = await shell(f"{ASK} --wait >&-")
    job_id = named(err)
    assert code == UNWRITTEN and f"The output can't be written: stdout is closed. Job {job_id} has ended" in err
    assert await shell(f"job result {job_id} 2>&-") == (0, "Hello world\n", "")


async def test_a_closed_stdin_holds_no_prompt(shell: Shell) -> None:
    code, out, err = await shell("submit -m big -f - <&-")
    assert (code, out) == (USAGE, "") and err == "stdin is closed: pipe the prompt in, or name a file.\n"


async def test_what_goes_to_stderr_never_stands_in_the_way(shell: Shell) -> None:
    """Nor does it come on stdout, where a pipeline takes it for the answer."""
    assert await shell(f"{ASK} --wait 2>&-") == (0, "Hello world\n", "")
    assert (await shell("job show nobody 2> /dev/full")) == (1, "", "")


@pytest.mark.parametrize("words", ["job list", "status", "--help", "policy schema"])
async def test_a_look_that_could_not_be_printed_is_a_sentence(shell: Shell, words: str) -> None:
    assert await shell(f"{words} {FULL}") == (UNWRITTEN, "", f"{SENTENCE}\n")


async def test_a_job_that_was_tried_again_is_named(shell: Shell, scene: Scene) -> None:
    await shell("submit -m big -f refuse.md --wait")
    code, _, err = await shell(f"job retry {scene.worker.seen[0].id} {FULL}")
    assert code == UNWRITTEN and (await scene.job(named(err))).id != scene.worker.seen[0].id


async def test_a_batch_says_how_it_went_where_its_summary_could_not_be_printed(shell: Shell, tmp_path: Path) -> None:
    body = {"model": "big", "messages": [{"role": "user", "content": "hello"}]}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(asked) + "\n")
    code, _, err = await shell(f"batch run in.jsonl -o out.jsonl --json {FULL}")
    assert (code, err) == (UNWRITTEN, f"{SENTENCE} 1 of 1 answered in out.jsonl.\n")


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
async def test_a_batch_whose_file_takes_no_more_ends_so_too(shell: Shell, tmp_path: Path, name: str) -> None:
    """A full disk, a quota: no refusal of the gateway's, and once there is room the run goes on."""
    body = {"model": "big" if name == "out.jsonl" else "nobody", "messages": [{"role": "user", "content": "hello"}]}
    asked = [{"custom_id": f"r{n}", "url": "/v1/chat/completions", "body": body} for n in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    code, _, err = await shell("batch run in.jsonl -o out.jsonl", before="ulimit -f 2;")
    assert code == UNWRITTEN and f"{name} can't be written: File too large: " in err and " of 20 answered" in err
    assert err.endswith("Once that is mended, the same command goes on from here.\n")
    code, _, err = await shell("batch run in.jsonl -o out.jsonl")
    assert code == (OK if name == "out.jsonl" else FAILED), err


async def test_a_secret_that_nobody_saw_is_not_passed_over(shell: Shell) -> None:
    """It was made, it is never shown again: the next one has to be made."""
    code, _, err = await shell(f"webhook secret new {FULL}")
    assert code == UNWRITTEN and err.startswith(SENTENCE) and "`gateway webhook secret rotate` makes another" in err
    code, _, err = await shell(f"webhook secret rotate --json {FULL}")
    lost = re.findall(r"secret revoke (\S+)`", err)
    assert code == UNWRITTEN and err.count("\n") == 1 and (await shell(f"webhook secret revoke {lost[0]}"))[0] == 0
    code, _, err = await shell(f"key new boss --admin {FULL}")
    assert code == UNWRITTEN and "A key of boss was made" in err and "`gateway key rotate boss`" in err


async def test_a_reader_who_has_left_is_no_complaint(shell: Shell) -> None:
    """As with `| head -1`: with little output, which is written at the very end, and with much."""
    assert await shell("job list | true") == await shell("policy schema | true") == (0, "", "")


def test_a_gateway_serves_on_whatever_becomes_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        for stdout in (full, None):
            monkeypatch.setattr(sys, "stdout", stdout)
            with guarded():
                print_line("api: ready")
