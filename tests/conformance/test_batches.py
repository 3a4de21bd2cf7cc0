"""Batches by OpenAI's own client on a whole gateway: arq's rounds in a scheduler of its own, which gets killed."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conformance.conftest import Llama
from tests.support.batch_files import CHAT, jsonl, line, read
from tests.support.clients import sdk
from tests.support.gateway_process import House, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

BAD = (b"{nonsense", {"custom_id": "no body", "method": "POST", "url": CHAT}, line("elsewhere", url="/v1/embeddings"))


def spoiled(lines: list[dict[str, Any]]) -> bytes:
    """A file of these lines with three bad ones among them."""
    third = len(lines) // 3
    return jsonl(BAD[0], *lines[:third], BAD[1], *lines[third:], BAD[2])


def asked(count: int, *, model: str) -> list[dict[str, Any]]:
    found = [line(f"r{n}", said=f"number {n}", model=model) for n in range(count)]
    for one in found:
        one["body"]["max_tokens"] = 2
    return found


def begin(client: openai.OpenAI, content: bytes) -> Any:
    sent = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h")


def until(client: openai.OpenAI, batch_id: str, *, answered: int = 0, timeout_s: float = 120) -> Any:
    """Waits until so many lines have an answer, 0 = until the batch has ended."""
    found: list[Any] = []

    def seen() -> bool:
        found[:] = [client.batches.retrieve(batch_id)]
        over = found[0].status in ("completed", "failed", "expired", "cancelled")
        return over or 0 < answered <= found[0].request_counts.completed

    block_until(seen, what=f"{batch_id} is as far as {answered}", timeout_s=timeout_s)
    return found[0]


def judge(client: openai.OpenAI, batch: Any, *, count: int) -> None:
    """Each request has one answer, and each bad line one error."""
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", count + 3, count, 3), batch
    answers = read(client.files.content(batch.output_file_id).content)
    assert answers.keys() == {f"r{n}" for n in range(count)}
    assert all(one["response"]["body"]["choices"][0]["message"]["content"] for one in answers.values())
    errors = read(client.files.content(batch.error_file_id).content)
    assert sorted(one["error"]["code"] for one in errors.values()) == [
        "invalid_body", "invalid_json_line", "invalid_url",
    ]  # fmt: skip


def test_a_batch_on_a_real_llama_server(shared_house: House) -> None:
    with sdk(shared_house.url) as client:
        batch = begin(client, spoiled(asked(40, model="tiny")))
        judge(client, until(client, batch.id), count=40)
        client.files.delete(batch.input_file_id)


@pytest.mark.long
@pytest.mark.timeout(1_200)
def test_two_thousand_lines_on_a_real_llama_server(tmp_path: Path, llama: Llama) -> None:
    models = {"tiny": llama(maxConcurrent=4)}
    with house(tmp_path / "data", policy=policy(models)) as up, sdk(up.url) as client:
        up.until_state("tiny", "warm")
        batch = begin(client, spoiled(asked(1_997, model="tiny")))
        judge(client, until(client, batch.id, timeout_s=1_000), count=1_997)


def test_a_killed_scheduler_loses_no_line_and_asks_for_none_twice(tmp_path: Path) -> None:
    models = {"pretend": simulated(maxConcurrent=4, memoryMb=1, options={"decodeTps": 60})}
    with house(tmp_path / "data", policy=policy(models)) as up, sdk(up.url) as client:
        up.until_state("pretend", "warm")
        started = asyncio.run(up.runtime("pretend").stats())["requests_started"]
        batch = begin(client, spoiled(asked(300, model="pretend")))
        for answered in (20, 80, 150):
            assert until(client, batch.id, answered=answered).status == "in_progress"
            up.kill_part("scheduler")
        judge(client, until(client, batch.id), count=300)
        assert asyncio.run(up.runtime("pretend").stats())["requests_started"] == started + 300


def test_a_killed_worker_loses_no_line_and_none_is_answered_twice(tmp_path: Path) -> None:
    """What ran is made again: its answer was nobody's yet."""
    models = {"pretend": simulated(maxConcurrent=4, memoryMb=1, options={"decodeTps": 60})}
    with house(tmp_path / "data", policy=policy(models, maxLosses=20)) as up, sdk(up.url) as client:
        up.until_state("pretend", "warm")
        batch = begin(client, spoiled(asked(150, model="pretend")))
        assert until(client, batch.id, answered=20).status == "in_progress"
        up.kill_part("worker")
        judge(client, until(client, batch.id), count=150)
