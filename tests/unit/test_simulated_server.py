"""The simulated server is the tests' fake runtime, so it must be honest: order, slots, faults and hang-ups."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from workers.runtimes.process import free_port

ROOT = Path(__file__).resolve().parents[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOUND_S = 5.0


class Served:
    """One running simulated server and a client for it."""

    def __init__(self, client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
        self.client = client
        self.process = process

    async def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = (await self.client.get("/simulated/stats")).json()
        return answer

    async def until(self, **wanted: int) -> dict[str, Any]:
        """Waits until the server has seen what we expect of it."""
        async with asyncio.timeout(BOUND_S):
            while True:
                stats = await self.stats()
                if all(stats[name] == value for name, value in wanted.items()):
                    return stats

    async def break_with(self, **faults: object) -> None:
        (await self.client.post("/simulated/faults", json=faults)).raise_for_status()

    async def words(self, **body: object) -> tuple[str, str | None]:
        """Streams one answer and gives its text and its finish reason; an error in the stream is the reason."""
        text, reason = "", None
        async with self.client.stream("POST", CHAT, json=_body(**body, stream=True)) as answer:
            assert answer.status_code == 200
            async for chunk in _chunks(answer):
                if "error" in chunk:
                    return text, chunk["error"]["message"]
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
        return text, reason


@asynccontextmanager
async def served(*flags: str, wait: bool = True) -> AsyncIterator[Served]:
    port = free_port()
    module = ("-P", "-m", "workers.runtimes.simulated_server", "--port", str(port), "--model", "pretend")
    process = await asyncio.create_subprocess_exec(sys.executable, *module, *flags, env={"PYTHONPATH": str(ROOT)})
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=BOUND_S, trust_env=False) as client:
            await _until_listening(client, ready=wait)
            yield Served(client, process)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(BOUND_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            raise


async def _until_listening(client: httpx.AsyncClient, *, ready: bool) -> None:
    async with asyncio.timeout(BOUND_S):
        while True:
            with suppress(httpx.ConnectError):
                if (await client.get("/health")).status_code == 200 or not ready:
                    return


def _body(**more: object) -> dict[str, object]:
    return {"model": "pretend", "messages": [{"role": "user", "content": "Tell me a story"}], **more}


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


async def test_an_answer_is_numbered_and_says_simulated() -> None:
    async with served() as server:
        assert await server.words(max_tokens=5) == ("simulated 1 2 3 4", "length")
        whole = (await server.client.post(CHAT, json=_body())).json()
        assert whole["choices"][0]["message"]["content"].startswith("simulated 1 2 ")
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == 64
        assert (await server.client.get("/v1/models")).json()["data"][0]["id"] == "pretend"


async def test_the_role_comes_before_the_first_token_and_usage_only_when_asked() -> None:
    async with served() as server:
        wanted = _body(max_tokens=1, stream=True, stream_options={"include_usage": True})
        async with server.client.stream("POST", CHAT, json=wanted) as answer:
            first, token, finish, usage = [chunk async for chunk in _chunks(answer)]
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert token["choices"][0]["delta"] == {"content": "simulated"}
        assert finish["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 1


async def test_a_text_is_gone_on_with_in_the_shape_of_completions() -> None:
    async with served() as server:
        asked = {"model": "pretend", "prompt": "def add(a, b):", "max_tokens": 3}
        whole = (await server.client.post(COMPLETIONS, json=asked)).json()
        assert whole["object"] == "text_completion" and whole["usage"]["completion_tokens"] == 3
        assert whole["choices"] == [{"index": 0, "text": "simulated 1 2", "finish_reason": "length"}]
        async with server.client.stream("POST", COMPLETIONS, json=asked | {"stream": True}) as answer:
            chunks = [chunk async for chunk in _chunks(answer)]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "simulated 1 2"
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        refused = await server.client.post(COMPLETIONS, json=asked | {"prompt": ["a", "b"]})
        assert refused.status_code == 400 and "one 'prompt'" in refused.text


async def test_everything_but_the_controls_is_503_while_it_loads() -> None:
    async with served("--cold-start-ms", "60000", wait=False) as server:
        for path in ("/health", "/slots", "/v1/models"):
            answer = await server.client.get(path)
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, "Loading model")
        assert (await server.client.post(CHAT, json=_body())).status_code == 503
        assert (await server.stats())["loads"] == 1


async def test_a_repeated_prompt_comes_from_the_slots_cache() -> None:
    async with served("--parallel", "2") as server:
        prompt = {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 1}
        first, again, fresh = [
            (await server.client.post(CHAT, json=prompt | extra)).json()["usage"]["prompt_tokens_details"][
                "cached_tokens"
            ]
            for extra in ({}, {}, {"cache_prompt": False})
        ]
        assert (first, fresh) == (0, 0) and again > 1000


async def test_requests_beyond_the_slots_wait_in_line_and_leave_it_when_they_hang_up() -> None:
    async with served("--parallel", "2") as server:
        await server.break_with(stall_after_tokens=1)
        async with asyncio.TaskGroup() as group:
            held = [group.create_task(server.words(max_tokens=3), name=f"held {i}") for i in range(2)]
            await server.until(busy_slots=2)
            waiting = [group.create_task(server.words(max_tokens=3), name=f"waiting {i}") for i in range(3)]
            await server.until(waiting=3)
            waiting[0].cancel()
            await server.until(waiting=2)
            await server.break_with(stall_after_tokens=None)
            for task in held:
                task.cancel()
            # Those in line took the fault that was set when they came, so they stall in the slots that became free.
            stats = await server.until(waiting=0, busy_slots=2, requests_aborted=3)
            for task in waiting[1:]:
                task.cancel()
        assert stats["max_waiting"] == 3
        assert sorted(abort["step"] for abort in stats["aborts"]) == ["decoding", "decoding", "waiting"]
        assert await server.words(max_tokens=2) == ("simulated 1", "length")


async def test_a_hang_up_is_noticed_at_once_also_without_a_stream_and_before_the_first_token() -> None:
    async with served() as server:
        for fault, stream in (("never_first_token", True), ("never_first_token", False), ("ready_but_mute", True)):
            await server.break_with(**{fault: True, "times": 1})
            seen = (await server.stats())["requests_aborted"]
            request = asyncio.create_task(server.client.post(CHAT, json=_body(stream=stream)), name=fault)
            await server.until(active=1)
            request.cancel()
            hung_up_ms = asyncio.get_running_loop().time() * 1000
            stats = await server.until(active=0, requests_aborted=seen + 1)
            assert stats["aborts"][-1]["at_monotonic_ms"] - hung_up_ms < 250
            assert stats["busy_slots"] == 0


@pytest.mark.parametrize(
    ("faults", "seen"),
    [
        ({"silent_end_after_tokens": 3}, ("simulated 1 2", None)),
        ({"error_in_stream": 2}, ("simulated 1", "simulated fault in the stream")),
        ({"error_in_stream": True}, ("simulated", "simulated fault in the stream")),
        ({"first_token_delay_ms": 5}, ("simulated 1 2 3", "length")),
    ],
)
async def test_a_fault_breaks_one_answer_as_its_name_says(
    faults: dict[str, object], seen: tuple[str, str | None]
) -> None:
    async with served() as server:
        await server.break_with(**faults, times=1)
        assert await server.words(max_tokens=4) == seen
        assert await server.words(max_tokens=4) == ("simulated 1 2 3", "length")


async def test_an_error_status_is_answered_before_anything_else() -> None:
    async with served() as server:
        await server.break_with(error_status=500, times=1)
        assert (await server.client.post(CHAT, json=_body(stream=True))).status_code == 500


@pytest.mark.parametrize(("fault", "text"), [({"die_after_tokens": 2}, "simulated 1"), ({"oom": True}, None)])
async def test_a_death_ends_the_process_in_the_middle_of_the_stream(fault: dict[str, object], text: str | None) -> None:
    async with served() as server:
        await server.break_with(**fault)
        seen = ""
        with pytest.raises(httpx.HTTPError):
            async with server.client.stream("POST", CHAT, json=_body(stream=True)) as answer:
                async for chunk in _chunks(answer):
                    seen += chunk["choices"][0]["delta"].get("content") or ""
        assert seen == (text or "")
        async with asyncio.timeout(BOUND_S):
            assert await server.process.wait() == 1


async def test_a_fault_that_does_not_exist_is_refused_with_a_sentence_and_changes_nothing() -> None:
    async with served() as server:
        answer = await server.client.post("/simulated/faults", json={"error_status": 500, "stal_after_tokens": 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("there is no fault 'stal_after_tokens'; there are ")
        assert await server.words(max_tokens=1) == ("simulated", "length")


async def test_bad_requests_are_refused_and_leave_no_slot_taken() -> None:
    async with served("--context", "100") as server:
        for content in (b"{", b"[]", b'{"messages": 3}', b'{"messages": [], "max_tokens": "many"}'):
            assert (await server.client.post(CHAT, content=content)).status_code == 400
        long = await server.client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 1000}]})
        assert long.json()["error"]["type"] == "exceed_context_size_error"
        assert (await server.stats())["requests_started"] == 0


async def test_decoding_keeps_the_speed_it_was_given() -> None:
    async with served("--decode-tps", "200") as server:
        began = asyncio.get_running_loop().time()
        await server.words(max_tokens=41)
        took_s = asyncio.get_running_loop().time() - began
        assert took_s >= 0.2  # 40 gaps of 5 ms; an upper bound would only measure the machine
