"""The request that docs/jobs.md shows, and the first commands of docs/troubleshooting.md, on a running gateway."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.gateway_process import COMMAND_S_MAX, House, environment, gateway_program
from tests.support.pages import ADDRESS, ROOT, blocks

pytestmark = pytest.mark.real


def run(text: str, up: House) -> "subprocess.CompletedProcess[str]":
    """As typed into a shell."""
    path = f"{Path(gateway_program()).parent}:{os.environ['PATH']}"
    state = str(up.data)
    return subprocess.run(
        ["bash", "-c", text],
        env=environment(GATEWAY_URL=up.url, GATEWAY_STATE_DIR=state) | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX * 2,
    )


def test_the_job_of_the_page_is_taken_once(shared_house: House) -> None:
    [text] = [block.text for block in blocks(ROOT / "docs" / "jobs.md") if block.language == "bash"]
    text = text.replace(ADDRESS, shared_house.url).replace('"coder"', '"pretend"')
    first, second = (json.loads(run(text, shared_house).stdout) for _ in range(2))
    assert first["id"] == second["id"] and first["metadata"] == {"pr": "7"} and first["priority"] == "batch"


@pytest.mark.long
def test_what_troubleshooting_looks_at_first(shared_house: House) -> None:
    [text] = [block.text for block in blocks(ROOT / "docs" / "troubleshooting.md")]
    body = '{"model": "pretend", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}'
    asked = (
        f"curl -sD- -o /dev/null {shared_house.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    )
    headers = run(asked, shared_house).stdout.lower()
    job = headers.partition("x-gateway-job: ")[2].split()[0].upper()
    done = run(text.replace("ID", job), shared_house)
    for words in ("MODEL ", "gone does not load", "served_by=pretend"):
        assert words in done.stdout, done.stdout + done.stderr
