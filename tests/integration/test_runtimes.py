"""The runtimes against the real llama.cpp, an Ollama double with Ollama's traps, and the simulated server's faults."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker.policy import Model, Policy
from tests.support.fake_ollama import GIB, FakeOllama
from tests.support.llama_server import llama_command
from tests.support.tiny_gguf import write_tiny_gguf
from workers.runtimes import llama_server, ollama, process, runtime_for
from workers.runtimes.base import Endpoint, LoadFailed, ProbeFailed, Runtime, RuntimeUnreachable, client_for, probe_chat
from workers.runtimes.http_server import Exchange, HttpServer
from workers.runtimes.process import ChildServer, stop_orphans

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 15.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture(scope="session")
def slow_gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("weights") / "slow.gguf", megabytes=60)


def model_of(**keys: object) -> Model:
    return Policy.parse(json.dumps({"models": {"m": keys}})).models["m"]


@asynccontextmanager
async def runtime_of(state_dir: Path, **keys: object) -> AsyncIterator[Runtime]:
    runtime = runtime_for("m", model_of(**keys), state_dir=state_dir)
    try:
        yield runtime
    finally:
        await runtime.close()


def llama(file: Path, **more: object) -> dict[str, Any]:
    keys = {"backend": "llama.cpp", "model": str(file), "command": llama_command(), "maxConcurrent": 2}
    return {**keys, "contextTokens": 4096, **more}


def simulated(**options: object) -> dict[str, Any]:
    return {"backend": "simulated", "model": "pretend", "memoryMb": 300, "options": options}


async def until(check: Callable[[], Awaitable[object]] | Callable[[], object], bound_s: float = BOUND_S) -> None:
    async with asyncio.timeout(bound_s):
        tick = asyncio.Event()
        while True:
            found = check()
            if await found if isinstance(found, Awaitable) else found:
                return
            asyncio.get_running_loop().call_later(0.02, tick.set)
            await tick.wait()
            tick.clear()


async def break_with(runtime: Runtime, **faults: object) -> None:
    async with client_for(runtime.endpoint().base_url) as client:
        url = f"{runtime.endpoint().base_url}/simulated/faults"
        (await client.post(url, json=faults)).raise_for_status()


def is_gone(pid: int) -> bool:
    """A dead process that its new parent has not noticed yet counts as gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pidfile_of(state_dir: Path) -> dict[str, Any]:
    return dict(json.loads((state_dir / "m.pid").read_text()))


# --- llama.cpp ---


async def test_llama_cpp_loads_answers_and_gives_its_memory_back(tmp_path: Path, gguf_file: Path) -> None:
    async with runtime_of(tmp_path, **llama(gguf_file)) as runtime:
        assert (runtime.kind, runtime.local, runtime.manageable) == ("llama.cpp", True, True)
        assert await runtime.state() == "absent"
        assert await runtime.memory_bytes() is None
        assert (runtime.local, runtime.manageable, runtime.process_ids()) == (True, True, [])
        assert await runtime.file_bytes() == len(await asyncio.to_thread(gguf_file.read_bytes))
        await runtime.load(timeout_s=BOUND_S)
        pid = pidfile_of(tmp_path)["pid"]
        assert await runtime.state() == "loaded"
        assert await runtime.busy_slots() == 0
        assert (await runtime.memory_bytes() or 0) > 5_000_000
        assert pid in runtime.process_ids()
        assert 0 < await runtime.probe(timeout_s=BOUND_S) < BOUND_S * 1000
        await runtime.load(timeout_s=BOUND_S)
        assert pidfile_of(tmp_path)["pid"] == pid, "a second load of a loaded model starts nothing"
        await runtime.unload()
        assert await runtime.state() == "absent"
        assert is_gone(pid)
        assert not (tmp_path / "m.pid").exists()
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "loaded"


async def test_probes_in_a_row_do_not_stumble_over_closed_connections(tmp_path: Path, gguf_file: Path) -> None:
    """llama.cpp closes after each streamed answer although it announces keep-alive."""
    async with runtime_of(tmp_path, **llama(gguf_file)) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        for _ in range(200):
            assert await runtime.probe(timeout_s=BOUND_S) > 0


async def test_llama_cpp_says_which_slots_are_busy(tmp_path: Path, slow_gguf_file: Path) -> None:
    async with runtime_of(tmp_path, **llama(slow_gguf_file)) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        endpoint = runtime.endpoint()
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3000, "ignore_eos": True, "stream": True}
        async with client_for(endpoint.base_url) as client:
            async with client.stream("POST", f"{endpoint.base_url}/v1/chat/completions", json=body) as answer:
                lines = answer.aiter_lines()
                while "role" not in await anext(lines):
                    pass
                assert await runtime.busy_slots() == 1
            async with asyncio.timeout(BOUND_S):
                while await runtime.busy_slots() != 0:  # The stream is closed; the server notices with its next token.
                    pass


async def test_llama_cpp_that_was_killed_is_absent(tmp_path: Path, gguf_file: Path) -> None:
    async with runtime_of(tmp_path, **llama(gguf_file)) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        os.kill(pidfile_of(tmp_path)["pid"], signal.SIGKILL)

        async def absent() -> bool:
            return await runtime.state() == "absent"

        await until(absent)
        assert await runtime.busy_slots() == 0
        with pytest.raises(RuntimeUnreachable, match="its server was killed by SIGKILL"):
            await runtime.probe(timeout_s=1)
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "loaded"


async def test_llama_cpp_by_url_is_used_and_left_alone(tmp_path: Path, gguf_file: Path) -> None:
    async with runtime_of(tmp_path / "theirs", **llama(gguf_file)) as theirs:
        await theirs.load(timeout_s=BOUND_S)
        url = theirs.endpoint().base_url
        async with runtime_of(tmp_path / "ours", backend="llama.cpp", model="anything", url=f"{url}/v1") as runtime:
            await runtime.load(timeout_s=BOUND_S)
            assert (runtime.local, runtime.manageable) == (True, False), "nothing of ours to load or unload"
            assert runtime.endpoint().base_url == url
            assert await runtime.probe(timeout_s=BOUND_S) > 0
            assert await runtime.memory_bytes() is await runtime.file_bytes() is None
            assert (runtime.local, runtime.manageable, runtime.process_ids()) == (True, False, [])
            await runtime.unload()
        assert await theirs.state() == "loaded"


async def test_a_url_where_nobody_listens_is_given_up_on_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "REFUSED_WAIT_S", 0.2)
    url = f"http://127.0.0.1:{process.free_port()}"
    async with runtime_of(tmp_path, backend="llama.cpp", model="x", url=url) as runtime:
        assert await runtime.state() == "unreachable"
        with pytest.raises(LoadFailed, match=f"no llama-server answers at {url}; start it"):
            await runtime.load(timeout_s=300)
        with pytest.raises(RuntimeUnreachable):
            await runtime.probe(timeout_s=1)


async def test_missing_weights_are_named(tmp_path: Path) -> None:
    async with runtime_of(tmp_path, **llama(tmp_path / "no.gguf")) as runtime:
        with pytest.raises(LoadFailed, match=f"model 'm': there is no GGUF file at {tmp_path / 'no.gguf'}"):
            await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "absent"


async def test_a_missing_program_is_named(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with runtime_of(tmp_path, backend="llama.cpp", model=str(gguf_file)) as runtime:
        with pytest.raises(LoadFailed, match="the program 'llama-server' was not found; install it"):
            await runtime.load(timeout_s=BOUND_S)


async def test_the_default_command_is_the_documented_one(
    tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a policy without a command starts is a promise to its reader."""
    (tmp_path / "llama-server").write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    keys = {"backend": "llama.cpp", "model": str(gguf_file), "maxConcurrent": 4, "contextTokens": 1000}
    async with runtime_of(tmp_path, **keys) as runtime:
        with pytest.raises(LoadFailed) as failed:
            await runtime.load(timeout_s=BOUND_S)
    before, _, after = failed.value.sentence.partition(" --port ")
    assert before.endswith(f"ended with exit code 3; its last log line: -m {gguf_file}")
    assert after.partition(" ")[2] == "-np 4 -c 4000 -cram 0 -b 256 -ub 256"


async def test_weights_that_are_no_weights_fail_at_once_with_the_servers_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"this is no model" * 100)
    async with runtime_of(tmp_path, **llama(broken)) as runtime:
        began = time.monotonic()
        with pytest.raises(LoadFailed, match=r"did not load: its server .*; its last log line: ") as failed:
            await runtime.load(timeout_s=300)
        assert time.monotonic() - began < BOUND_S
        assert not failed.value.oom
        assert await runtime.state() == "absent"


async def test_a_cancelled_load_leaves_nothing_running(tmp_path: Path, gguf_file: Path) -> None:
    async with runtime_of(tmp_path, **llama(gguf_file, command=llama_command(load_delay_ms=60_000))) as runtime:
        load = asyncio.create_task(runtime.load(timeout_s=300), name="load")
        await until((tmp_path / "m.pid").exists)
        pid = pidfile_of(tmp_path)["pid"]
        assert await runtime.state() == "loading"
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert is_gone(pid)
        assert await runtime.state() == "absent"


async def test_a_load_that_takes_too_long_is_stopped(tmp_path: Path, gguf_file: Path) -> None:
    async with runtime_of(tmp_path, **llama(gguf_file, command=llama_command(load_delay_ms=60_000))) as runtime:
        with pytest.raises(LoadFailed, match=r"did not load within 0.3 s"):
            await runtime.load(timeout_s=0.3)
        assert await runtime.state() == "absent"


# --- the child process ---

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "TERM_GRACE_S", 0.2)
    child = ChildServer("m", state_dir=tmp_path)
    await child.start([sys.executable, "-c", STUBBORN])
    pid = child.pid
    await until(lambda: child.last_lines() == ["up"])
    await child.stop()
    assert pid is not None and is_gone(pid)
    assert child.exit_problem() is None, "it ended because we asked"


async def test_a_wrapper_script_goes_with_everything_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script ends on SIGTERM; the server behind it may not, and is the one that holds the memory."""
    monkeypatch.setattr(process, "TERM_GRACE_S", 0.2)
    child = ChildServer("m", state_dir=tmp_path)
    await child.start(["sh", "-c", f'{sys.executable} -c "{STUBBORN}" & wait'])
    await until(lambda: child.last_lines() == ["up"])
    pids = child.process_ids()
    assert len(pids) == 2
    alone = psutil.Process(pids[0]).memory_info().rss
    assert (child.memory_bytes() or 0) > alone, "the server behind the script counts"
    await child.stop()
    assert all(is_gone(pid) for pid in pids)


async def test_a_child_sees_none_of_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEYS", "ann:secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    child = ChildServer("m", state_dir=tmp_path)
    program = "import os; print([n for n in os.environ if n.startswith(('GATEWAY', 'CUDA'))])"
    await child.start([sys.executable, "-c", program])
    await until(lambda: child.last_lines() == ["['CUDA_VISIBLE_DEVICES']"])
    await child.stop()


async def test_the_log_starts_afresh_and_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 1000)
    child = ChildServer("m", state_dir=tmp_path)
    (tmp_path / "m.log").write_text("an earlier life\n")
    await child.start([sys.executable, "-u", "-c", "print('x' * 5000); input_ = __import__('time').sleep(60)"])
    assert (tmp_path / "m.log.1").read_text() == "an earlier life\n"
    await until(lambda: (tmp_path / "m.log").stat().st_size > 5000)
    child.trim_log()
    assert (tmp_path / "m.log").stat().st_size == 0
    assert (tmp_path / "m.log.1").stat().st_size > 5000
    await child.stop()


WORKER = """
import asyncio, sys
from pathlib import Path
from workers.runtimes.process import ChildServer, stop_orphans
async def main():
    child = ChildServer("m", state_dir=Path(sys.argv[1]))
    await child.start(sys.argv[2:])
    print(child.pid, flush=True)
    await asyncio.get_running_loop().create_future()
asyncio.run(main())
"""


@asynccontextmanager
async def worker_with_child(state_dir: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a worker process that has started a child, and kills it the hard way."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WORKER,
        str(state_dir),
        *command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdout is not None
    try:
        async with asyncio.timeout(BOUND_S):
            await worker.stdout.readline()
        yield worker
    finally:
        worker.kill()
        await worker.communicate()


@linux_only
async def test_a_child_dies_with_its_killed_worker(tmp_path: Path) -> None:
    async with worker_with_child(tmp_path, sys.executable, "-c", STUBBORN):
        pid = pidfile_of(tmp_path)["pid"]
        await until(lambda: (tmp_path / "m.log").read_text() == "up\n")
    await until(lambda: is_gone(pid))


@pytest.mark.parametrize("loads_again", [True, False])
async def test_an_orphan_of_a_killed_worker_is_stopped(tmp_path: Path, loads_again: bool) -> None:
    """The kernel kills the wrapper script with the worker, but not the server behind the script. The next worker does,
    also where nobody asks for that model again."""
    started = tmp_path / "server.pid"
    script = (
        f"{sys.executable} -c 'import time; time.sleep(60)' & echo $! > {started}.new; mv {started}.new {started}; wait"
    )
    async with worker_with_child(tmp_path, "sh", "-c", script):
        await until(started.exists)
    orphan = int(started.read_text())
    assert psutil.pid_exists(orphan)
    if loads_again:
        child = ChildServer("m", state_dir=tmp_path)
        await child.start([sys.executable, "-c", "import time; time.sleep(60)"])
        assert child.running
        await child.stop()
    else:
        await asyncio.to_thread(stop_orphans, tmp_path)
        assert not (tmp_path / "m.pid").exists()
        assert started.exists(), "a file that is not ours stays"
    assert is_gone(orphan)


async def test_the_child_of_a_living_worker_is_not_taken_for_an_orphan(tmp_path: Path) -> None:
    child = ChildServer("m", state_dir=tmp_path)
    async with worker_with_child(tmp_path, sys.executable, "-c", "import time; time.sleep(60)") as worker:
        await asyncio.to_thread(stop_orphans, tmp_path)
        with pytest.raises(LoadFailed, match=rf"is run by another worker \(pid {worker.pid}\)"):
            await child.start([sys.executable, "-c", "pass"])
        assert psutil.pid_exists(pidfile_of(tmp_path)["pid"])


@pytest.mark.parametrize("loads_again", [True, False])
async def test_a_pidfile_that_names_a_stranger_harms_nobody(tmp_path: Path, loads_again: bool) -> None:
    """Process numbers are used again: the file of an earlier life may name anyone."""
    stranger = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(60)", start_new_session=True
    )
    record = {"pid": stranger.pid, "created": 0.0, "mark": "gone", "owner": 2**22 - 1, "owner_created": 0.0}
    (tmp_path / "m.pid").write_text(json.dumps(record))
    if loads_again:
        await ChildServer("m", state_dir=tmp_path).stop_orphan()
    else:
        await asyncio.to_thread(stop_orphans, tmp_path)
    assert stranger.returncode is None and psutil.pid_exists(stranger.pid)
    assert not (tmp_path / "m.pid").exists()
    stranger.kill()
    await stranger.wait()


# --- simulated ---


async def test_a_simulated_model_wakes_in_its_own_time_and_says_what_it_pretends(tmp_path: Path) -> None:
    async with runtime_of(tmp_path, **simulated(coldStartMs=300, first_token_is="x")) as runtime:
        with pytest.raises(LoadFailed, match="unrecognized arguments: --first-token-is x"):
            await runtime.load(timeout_s=BOUND_S)
    async with runtime_of(tmp_path, **simulated(coldStartMs=300, prefill_tps=1000)) as runtime:
        assert (runtime.kind, await runtime.state()) == ("simulated", "absent")
        seen: set[str] = set()
        shares: list[float] = []
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        await asyncio.wait({load}, timeout=0.01)
        async with asyncio.timeout(BOUND_S):
            while not load.done():
                seen.add(await runtime.state())
                if (share := await runtime.progress()) is not None:
                    shares.append(share)
                await asyncio.wait({load}, timeout=0.01)
        await load
        assert "loading" in seen and "absent" not in seen
        assert shares == sorted(shares) and 0 < shares[-1] <= 1 and await runtime.progress() == 1
        assert await runtime.state() == "loaded"
        assert await runtime.memory_bytes() == 300 * 1024 * 1024
        assert await runtime.probe(timeout_s=BOUND_S) >= 5
        assert runtime.endpoint().model == "pretend"


async def test_a_folder_named_workers_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with runtime_of(tmp_path / "state", **simulated()) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "loaded"


async def test_a_failed_load_tells_memory_from_other_reasons(tmp_path: Path) -> None:
    async with runtime_of(tmp_path, **simulated(oom=True)) as runtime:
        with pytest.raises(LoadFailed, match="exit code 1; its last log line: simulated: cudaMalloc failed") as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert failed.value.oom
    log = tmp_path / "loads"
    async with runtime_of(tmp_path, **simulated(loadFails=1, loadLog=str(log))) as runtime:
        with pytest.raises(LoadFailed, match="the load fails, as asked") as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert not failed.value.oom
        await runtime.load(timeout_s=BOUND_S)
        assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        ({"ready_but_mute": True}, "no token within 0.3 s"),
        ({"never_first_token": True}, "no token within 0.3 s"),
        ({"stall_after_tokens": 0}, "no token within 0.3 s"),
        ({"silent_end_after_tokens": 0}, "ended the stream without a finish reason"),
        ({"error_in_stream": 0}, "an error instead of a token: simulated fault in the stream"),
        ({"error_status": 503}, "answered 503: simulated fault"),
        ({"die_after_tokens": 0}, "broke off before its first token"),
    ],
)
async def test_a_probe_is_not_fooled(tmp_path: Path, faults: dict[str, object], sentence: str) -> None:
    """A port that answers, a healthy /health and a role-only chunk are no first token."""
    async with runtime_of(tmp_path, **simulated()) as runtime:
        await runtime.load(timeout_s=BOUND_S)
        await break_with(runtime, **faults)
        assert await runtime.state() == "loaded"
        with pytest.raises(ProbeFailed, match=sentence):
            await runtime.probe(timeout_s=0.3)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['{"choices":[{"delta":{"reasoning_content":"Hm"}}]}'], None),
        (
            ['{"choices":[{"delta":{},"finish_reason":"length"}]}', '{"choices":[],"usage":{"completion_tokens":1}}'],
            None,
        ),
        (['{"choices":[{"delta":{},"finish_reason":"length"}],"timings":{"prompt_n":9,"predicted_n":1}}'], None),
        (['{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":"stop"}]}'], "ended without a token"),
        (['{"choices":[],"usage":{"completion_tokens":0}}'], "without a finish reason"),
        (["{"], "not a JSON object"),
        (["[1]"], "not a JSON object"),
        ([], "without a finish reason"),
    ],
)
async def test_what_counts_as_a_token(lines: list[str], sentence: str | None) -> None:
    """A reasoning model's first token may be a marker without text: the runtime's own count is proof as well."""

    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        for line in [*lines, "[DONE]"]:
            await exchange.write(f"data: {line}\n\n".encode())
        await exchange.end()

    async with HttpServer(answer).listening() as port, client_for("http:") as client:
        probe = probe_chat(client, Endpoint(f"http://127.0.0.1:{port}", model="x"), timeout_s=BOUND_S)
        if sentence is None:
            assert await probe > 0
        else:
            with pytest.raises(ProbeFailed, match=sentence):
                await probe


async def test_a_routers_text_in_the_stream_is_an_error() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream")
        await exchange.write(b"proxy error: Failed to read connection")
        await exchange.end()

    async with HttpServer(answer).listening() as port, client_for("http:") as client:
        with pytest.raises(ProbeFailed, match="an error instead of a token: proxy error"):
            await probe_chat(client, Endpoint(f"http://127.0.0.1:{port}", model="x"), timeout_s=BOUND_S)


# --- Ollama ---


@asynccontextmanager
async def ollama_of(tmp_path: Path, *stored: str, model: str) -> AsyncIterator[tuple[FakeOllama, Runtime]]:
    async with FakeOllama(*stored).running() as server:
        async with runtime_of(tmp_path, backend="ollama", model=model, url=server.url) as runtime:
            yield server, runtime


async def test_ollama_loads_for_ever_and_unloads(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        assert (runtime.kind, await runtime.state(), await runtime.memory_bytes()) == ("ollama", "absent", None)
        assert (runtime.local, runtime.manageable, await runtime.file_bytes()) == (True, True, GIB)
        await runtime.load(timeout_s=BOUND_S)
        (asked,) = server.generate_bodies
        assert asked == {"model": "qwen:32b", "keep_alive": -1, "stream": False}, "no option: it would cost a reload"
        assert type(asked["keep_alive"]) is int, "the text '-1' is refused by Ollama"
        assert (await runtime.state(), await runtime.memory_bytes()) == ("loaded", 2 * GIB)
        assert await runtime.busy_slots() is None
        server.unload_after_s = 0.1
        await runtime.unload()
        assert server.generate_bodies[-1]["keep_alive"] == 0
        assert server.loaded == {}, "its answer comes before the unload, and no load may start on that memory"
        assert await runtime.state() == "absent"


async def test_ollama_shows_no_load_so_we_remember_ours_and_hold_its_connection(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        server.hold_loads()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        await server.load_seen.wait()
        assert server.loaded == {} and await runtime.state() == "loading"
        server.release_loads()
        await load
        assert (await runtime.state(), server.loads_aborted) == ("loaded", [])


async def test_a_load_waits_for_its_turn_at_the_one_loader_of_an_ollama(tmp_path: Path) -> None:
    """Ollama keeps the second load in line without a word: that time is not the second model's, or it would fail for
    being slow while nothing of it had begun."""
    async with ollama_of(tmp_path, "one:1b", "two:1b", model="one:1b") as (server, one):
        async with runtime_of(tmp_path, backend="ollama", model="two:1b", url=server.url) as two:

            async def load(runtime: Runtime, timeout_s: float) -> None:
                async with runtime.turn():
                    await runtime.load(timeout_s=timeout_s)

            server.hold_loads()
            first = asyncio.create_task(load(one, BOUND_S), name="first")
            await server.load_seen.wait()
            second = asyncio.create_task(load(two, 0.2), name="second")
            await asyncio.wait({second}, timeout=0.4)
            assert not second.done() and server.loads_started == ["one:1b"]
            server.release_loads()
            await asyncio.gather(first, second)
            assert server.loads_started == ["one:1b", "two:1b"]


async def test_a_load_that_is_given_up_while_it_waits_leaves_the_line_free(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "one:1b", "two:1b", model="one:1b") as (server, one):
        async with runtime_of(tmp_path, backend="ollama", model="two:1b", url=server.url) as two:
            async with one.turn():
                waiting = asyncio.ensure_future(two.turn().__aenter__())
                await asyncio.wait({waiting}, timeout=0.05)
                waiting.cancel()
                await asyncio.wait({waiting})
            async with asyncio.timeout(BOUND_S), two.turn():
                pass


async def test_ollama_drops_a_load_that_we_abandon(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        server.hold_loads()
        with pytest.raises(LoadFailed, match=r"Ollama did not load qwen:32b within 0.2 s"):
            await runtime.load(timeout_s=0.2)
        async with asyncio.timeout(BOUND_S):
            await server.abort_seen.wait()
        server.abort_seen.clear()
        server.load_seen.clear()
        load = asyncio.create_task(runtime.load(timeout_s=BOUND_S), name="load")
        await server.load_seen.wait()
        load.cancel()
        async with asyncio.timeout(BOUND_S):
            await server.abort_seen.wait()
        assert (server.loads_aborted, await runtime.state()) == (["qwen:32b", "qwen:32b"], "absent")


async def test_a_silent_ps_means_busy_and_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "STATE_TIMEOUT_S", 0.2)
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        server.block_ps()
        assert await runtime.state() == "loading"
        server.unblock_ps()
        await runtime.load(timeout_s=BOUND_S)
        server.block_ps()
        assert await runtime.state() == "loaded"
        assert await runtime.memory_bytes() is None
        server.unblock_ps()
        await runtime.unload()
        assert await runtime.state() == "absent"


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("library/qwen:latest", "qwen"), ("qwen:latest", "library/qwen:latest"), ("hf.co/a/b:q4", "hf.co/a/b:q4")],
)
async def test_a_shortened_name_is_recognised(tmp_path: Path, stored: str, wanted: str) -> None:
    async with ollama_of(tmp_path, stored, "other:7b", model=wanted) as (server, runtime):
        server.loaded["other:7b"] = 300
        assert await runtime.state() == "absent"
        server.loaded[stored] = 300
        assert await runtime.state() == "loaded"


async def test_a_copy_of_a_loaded_model_is_loaded_and_a_new_pull_is_not(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", "mine:latest", model="mine") as (server, runtime):
        server.digests["mine:latest"] = server.digests["qwen:32b"]
        server.loaded["qwen:32b"] = 300
        assert await runtime.state() == "loaded"
        server.loaded = {"mine:latest": 300}
        assert await runtime.state() == "loaded"


async def test_ollama_says_how_to_get_a_model_it_lacks(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "other:7b", model="qwen:32b") as (server, runtime):
        with pytest.raises(
            LoadFailed, match=f"Ollama at {server.url} does not have qwen:32b; run: ollama pull qwen:32b"
        ):
            await runtime.load(timeout_s=BOUND_S)
        assert await runtime.state() == "absent"


async def test_an_ollama_whose_line_is_full_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 says nothing of the model; 404 says that it is not there and will not be."""
    monkeypatch.setattr(ollama, "BUSY_PAUSE_S", 0.02)
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        server.busy_answers = 3
        await runtime.load(timeout_s=BOUND_S)
        assert (len(server.generate_bodies), server.loads_started) == (4, ["qwen:32b"])
        server.busy_answers = 10**9
        with pytest.raises(LoadFailed, match=r"Ollama did not load qwen:32b within 0.2 s: server busy, please try"):
            await runtime.load(timeout_s=0.2)


async def test_a_size_that_is_the_files_is_not_taken_for_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where Ollama cannot read its runner's log it tells the file's size for both, also of a machine without a GPU."""
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        await runtime.load(timeout_s=BOUND_S)
        server.ps_size = server.ps_vram = GIB  # as in /api/tags
        assert await runtime.memory_bytes() == int(1.2 * GIB)
        assert await runtime.memory_bytes() == int(1.2 * GIB)
        assert [r.getMessage() for r in caplog.records if "memory_estimated" in r.getMessage()] == [
            "event=memory_estimated model=qwen:32b file_mb=1024 reason=Ollama tells the size of the file"
        ]
        assert await runtime.memory_bytes(of_gpus=True) == int(1.2 * GIB)
        server.ps_size, server.ps_vram = 3 * GIB, 2 * GIB
        assert (await runtime.memory_bytes(), await runtime.memory_bytes(of_gpus=True)) == (3 * GIB, 2 * GIB)


async def test_ollama_short_of_memory_is_told_apart(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        server.load_error = 500, "model requires more system memory (20.1 GiB) than is available (9.3 GiB)"
        with pytest.raises(LoadFailed, match="requires more system memory") as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert failed.value.oom
        server.load_error = 500, "llama runner process has terminated: exit status 2"
        with pytest.raises(LoadFailed, match="has terminated") as failed:
            await runtime.load(timeout_s=BOUND_S)
        assert not failed.value.oom


async def test_a_probe_neither_loads_an_ollama_model_nor_changes_how_long_it_stays(tmp_path: Path) -> None:
    async with ollama_of(tmp_path, "qwen:32b", model="qwen:32b") as (server, runtime):
        with pytest.raises(ProbeFailed, match="a probe must not load it"):
            await runtime.probe(timeout_s=BOUND_S)
        assert server.loads_started == [] and server.chat_bodies == []
        await runtime.load(timeout_s=BOUND_S)
        assert await runtime.probe(timeout_s=BOUND_S) > 0
        (asked,) = server.chat_bodies
        assert set(asked) == {"model", "messages", "max_tokens", "stream", "stream_options"}
        assert (asked["max_tokens"], asked["stream"], server.loaded["qwen:32b"]) == (1, True, -1)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:11434", True),
        ("http://[::1]:11434", True),
        ("http://localhost:11434", True),
        ("http://gpu-box:11434", False),
        ("http://192.168.1.7:11434", False),
    ],
)
async def test_memory_behind_another_address_is_not_this_hosts(tmp_path: Path, url: str, local: bool) -> None:
    for backend in ("ollama", "llama.cpp"):
        async with runtime_of(tmp_path, backend=backend, model="x", url=url) as runtime:
            assert runtime.local is local


async def test_no_ollama_at_all_is_unreachable(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{process.free_port()}"
    async with runtime_of(tmp_path, backend="ollama", model="x", url=url) as runtime:
        assert await runtime.state() == "unreachable"
        with pytest.raises(LoadFailed, match=f"no Ollama answers at {url}; is it running"):
            await runtime.load(timeout_s=BOUND_S)
        with pytest.raises(RuntimeUnreachable):
            await runtime.probe(timeout_s=1)
        with pytest.raises(RuntimeUnreachable):
            await runtime.unload()


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:11434", True),
        ("http://localhost:8080/v1", True),
        ("http://[::1]:80", True),
        ("http://10.0.0.7:11434", False),
        ("https://models.example.com/v1", False),
        ("http://127.example.com", False),
    ],
)
async def test_memory_at_another_machines_url_is_not_this_hosts(tmp_path: Path, url: str, local: bool) -> None:
    for backend in ("ollama", "llama.cpp"):
        async with runtime_of(tmp_path, backend=backend, model="m", url=url) as runtime:
            assert runtime.local is local
