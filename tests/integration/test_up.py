"""`gateway up` as a supervisor: what it starts, says, survives and leaves behind. The children are small dummies."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import psutil
import pytest

from api import stop_requests
from api.children import BAD_SETTING_TRIES, Child, Part, Say, pauses
from api.up import AppliedPolicy, Options, child_environment, gateway_parts, up
from broker.errors import BrokerUnavailable, PolicyInvalid
from tests.support.waiting import block_until, until

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]

API = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("bye")))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
host, port = os.environ["GATEWAY_BIND"].split(":")
print("keys", os.environ.get("GATEWAY_KEYS"), flush=True)
http.server.HTTPServer((host, int(port)), Healthy).serve_forever()
"""
POLITE = """
import os, signal, sys, threading
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("bye")))
print("keys", os.environ.get("GATEWAY_KEYS"), "on", os.environ["GATEWAY_REDIS_URL"], "pid", os.getpid(), flush=True)
threading.Event().wait(60)
"""
STUBBORN = """
import signal, threading
signal.signal(signal.SIGTERM, lambda *_: print("no", flush=True))
print("deaf", flush=True)
while True:
    threading.Event().wait(60)
"""


class Dummies:
    """Parts with the names of the real ones."""

    def __init__(self, worker: str = POLITE) -> None:
        self.worker = worker

    def __call__(self, env: Mapping[str, str], *, keys: str, say: Say) -> Sequence[Part]:
        def child(name: str, code: str, **more: str) -> Child:
            return Child(name, (sys.executable, "-P", "-c", code), env={**env, **more}, say=say)

        return (
            child("api", API, **{"GATEWAY_KEYS": keys} if keys else {}),
            child("scheduler", POLITE),
            child("worker", self.worker),
        )


class Run:
    """One `up` of this process, and what it has said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.task: asyncio.Task[int]

    def says(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.said)

    async def until_said(self, *words: str, timeout_s: float = 10) -> str:
        await until(lambda: self.says(*words) or self.task.done(), what=f"{words} in {self.said}", timeout_s=timeout_s)
        return next(line for line in reversed(self.said) if all(word in line for word in words))

    def pid(self, name: str) -> int:
        """The pid that the child has said last."""
        return int([line for line in self.said if line.startswith(name) and " pid " in line][-1].split()[-1])

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert not self.task.done(), self.said  # nobody would catch the signal
        os.kill(os.getpid(), number)
        return await asyncio.wait_for(self.task, 20)


async def apply_nothing(redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy:
    return AppliedPolicy(version=1, models=["simulated"], warnings=["one warning"])


@asynccontextmanager
async def running(
    data_dir: Path, *, parts: Dummies | None = None, options: Mapping[str, str] | None = None
) -> AsyncIterator[Run]:
    run = Run()
    run.task = asyncio.create_task(
        up(
            Options(port=0, data_dir=data_dir, **(options or {})),  # type: ignore[arg-type]
            apply_policy=apply_nothing,
            environ=nothing_to_discover(),
            say=run.said.append,
            make_parts=parts or Dummies(),
        ),
        name="up",
    )
    try:
        await run.until_said("the api answers")
        yield run
    finally:
        if not run.task.done():
            await run.end()


def nothing_to_discover() -> dict[str, str]:
    nowhere = "http://127.0.0.1:1"
    return {
        **os.environ,
        "GATEWAY_KEYS": "for:the-api-only",
        "GATEWAY_OLLAMA_URL": nowhere,
        "GATEWAY_LLAMA_SERVER_URL": nowhere,
        "GATEWAY_VLLM_URL": nowhere,
    }


async def refused(options: Options, **more: object) -> tuple[int, list[str]]:
    """Runs an `up` that is expected to give up, and returns its exit code and words."""
    said: list[str] = []
    arguments = {"apply_policy": apply_nothing, "environ": nothing_to_discover(), "make_parts": Dummies(), **more}
    work = up(options, say=said.append, complain=said.append, **arguments)  # type: ignore[arg-type]
    return await asyncio.wait_for(work, 20), said


async def test_it_says_where_everything_is_and_ends_in_order(tmp_path: Path) -> None:
    """The worker goes first, so that its last answers still find the api and Redis."""
    async with running(tmp_path, options={"keys": "anna:secret"}) as run:
        assert run.says("listens on http://127.0.0.1:", str(tmp_path))
        assert run.says("redis ", "redis.sock")
        assert run.says("policy ", "version 1", "no Ollama, llama-server or vLLM was found here", "simulated")
        assert run.says("one warning")
        assert run.says("clients ", "OPENAI_BASE_URL=http://127.0.0.1:")
        assert run.says("commands ", "GATEWAY_URL=http://127.0.0.1:"), "the port is not the usual one"
        await run.until_said("worker ", "pid")
        await run.until_said("scheduler ", "pid")
        assert run.says("api ", "keys anna:secret")
        assert run.says("worker ", "keys None on unix://")
        assert run.says("scheduler ", "keys None")
        assert await run.end() == 0
    byes = [line.split()[0] for line in run.said if line.endswith("bye")]
    assert byes == ["worker", "scheduler", "api"]
    assert run.said[-1] == "stopped"
    assert not processes_of(tmp_path)


async def test_a_killed_child_is_named_and_started_again(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        await run.until_said("worker ", "pid")
        killed = run.pid("worker")
        os.kill(killed, signal.SIGKILL)
        await run.until_said("worker was killed by SIGKILL; starting it again in 0.2 s")
        await until(lambda: run.pid("worker") != killed, what="another worker")
        assert await run.end() == 0


async def test_killed_redis_comes_back_where_it_was(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        (redis,) = processes_of(tmp_path)
        os.kill(redis.pid, signal.SIGKILL)
        await run.until_said("redis was killed by SIGKILL; starting it again")
        await until(lambda: processes_of(tmp_path) not in ([], [redis]), what="another Redis")
        assert await run.end() == 0


async def test_what_a_dead_child_left_running_goes_with_it(tmp_path: Path) -> None:
    """A runtime without its worker would sit on the memory that the next worker needs."""
    with_child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {POLITE!r}]).wait()"
    async with running(tmp_path, parts=Dummies(with_child)) as run:
        await run.until_said("worker ", "pid")
        grandchild = psutil.Process(run.pid("worker"))
        grandchild.parent().kill()  # type: ignore[union-attr]
        await run.until_said("worker was killed by SIGKILL")
        await until(lambda: not grandchild.is_running() or grandchild.status() == "zombie", what="its end")
        assert await run.end() == 0


async def test_a_program_that_never_runs_is_tried_with_growing_pauses(tmp_path: Path) -> None:
    async with running(tmp_path, parts=Dummies("raise SystemExit('no GPU here')")) as run:
        await run.until_said("worker ended with exit code 1; starting it again in 0.8 s")
        assert run.said.count("worker    | no GPU here") >= 3
        assert await run.end() == 0
    waits = pauses()
    assert [next(waits) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


async def test_a_part_that_cannot_run_as_it_is_set_up_ends_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong setting does not get better by being tried again; why it ends is told on stderr, as by any command."""
    said: list[str] = []
    work = up(
        Options(port=0, data_dir=tmp_path),
        apply_policy=apply_nothing,
        environ=nothing_to_discover(),
        say=said.append,
        make_parts=Dummies("print('GATEWAY_MEMORY_MB: must be a whole number'); raise SystemExit(2)"),
    )
    assert await asyncio.wait_for(work, 20) == 2
    assert said.count("worker    | GATEWAY_MEMORY_MB: must be a whole number") == BAD_SETTING_TRIES
    assert said[-1] == "stopped"
    assert capsys.readouterr().err == "worker can't run as it is set up; what it says is above.\n"
    assert not processes_of(tmp_path)


async def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, parts=Dummies(STUBBORN)) as run:
        await run.until_said("deaf")
        os.kill(os.getpid(), signal.SIGINT)
        await run.until_said("worker ", "no")
        started = asyncio.get_running_loop().time()
        assert await run.end(signal.SIGINT) == 130
        assert asyncio.get_running_loop().time() - started < stop_requests.INTERRUPT_DRAIN_S
    assert not processes_of(tmp_path)


async def test_a_child_that_had_to_be_killed_spoils_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "INTERRUPT_DRAIN_S", 0.1)
    async with running(tmp_path, parts=Dummies(STUBBORN)) as run:
        await run.until_said("deaf")
        assert await run.end(signal.SIGINT) == 1
    assert run.says("worker did not end cleanly")


async def test_an_interrupt_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    async def interrupted(redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError

    code, said = await refused(Options(port=0, data_dir=tmp_path), apply_policy=interrupted)
    assert (code, said) == (0, ["stopped"])
    assert not processes_of(tmp_path)


async def test_a_second_up_on_the_same_data_names_the_first(tmp_path: Path) -> None:
    async with running(tmp_path):
        code, said = await refused(Options(port=0, data_dir=tmp_path))
        assert code == 2
        assert said == [
            f"`gateway up` already runs on {tmp_path} (process {os.getpid()}); stop it, or choose another --data."
        ]


async def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = await refused(Options(port=port, data_dir=tmp_path))
    assert (code, said) == (2, [f"Port {port} of 127.0.0.1 is in use; choose another with --port."])
    assert not (tmp_path / "redis").exists()


async def test_without_keys_it_keeps_to_this_machine(tmp_path: Path) -> None:
    code, said = await refused(Options(host="0.0.0.0", port=0, data_dir=tmp_path))
    assert code == 2 and said[0].startswith("Without a key only this machine may call; 0.0.0.0 would let others in")
    assert not (tmp_path / "redis").exists()


@pytest.mark.parametrize(
    ("problem", "exit_code"),
    [
        (PolicyInvalid(["line 3: models.a.fallback: no model is called 'b'", "line 9: routing: one more"]), 2),
        (BrokerUnavailable("Redis at redis://nowhere does not answer."), 3),
    ],
)
async def test_a_refusal_of_the_policy_is_passed_on_and_ends_everything(
    tmp_path: Path, problem: Exception, exit_code: int
) -> None:
    async def refuse(redis_url: str, namespace: str, text: str, *, made_up: bool) -> AppliedPolicy:
        raise problem

    code, said = await refused(Options(port=0, data_dir=tmp_path), apply_policy=refuse)
    assert (code, said) == (exit_code, [str(problem)])
    assert not processes_of(tmp_path)


async def test_a_policy_that_cannot_be_read_starts_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "policy.yaml"
    code, said = await refused(Options(port=0, data_dir=tmp_path, policy_path=missing))
    assert (code, said) == (2, [f"The policy {missing} can't be read: No such file or directory."])
    assert not (tmp_path / "redis").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_children_go_when_up_itself_is_killed(tmp_path: Path) -> None:
    """Else the api would keep the port, and the worker the GPU, from the next `gateway up`."""
    script = tmp_path / "up.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, sys
        from pathlib import Path
        from api.up import Options, up
        from tests.integration.test_up import Dummies, apply_nothing, nothing_to_discover
        options = Options(port=0, data_dir=Path(sys.argv[1]))
        asyncio.run(up(options, apply_policy=apply_nothing, environ=nothing_to_discover(), make_parts=Dummies()))
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, tmp_path], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "the api answers" in line:
                break
        children = psutil.Process(process.pid).children()
        assert len(children) == 4
        process.kill()
        block_until(lambda: not any(child.is_running() for child in children), what="the end of all children")


def test_the_real_parts_are_started_by_name_and_safely() -> None:
    parts = gateway_parts({"GATEWAY_STATE_DIR": "/nowhere"}, keys="", say=print)
    commands = [part._command for part in parts if isinstance(part, Child)]
    assert commands == [
        (sys.executable, "-P", "-m", module) for module in ("api.app", "workers.scheduler", "workers.host")
    ]


@pytest.mark.parametrize("inherited", ["", ".", "{folder}", ":/nowhere"])
async def test_a_teammates_folder_is_never_imported(tmp_path: Path, inherited: str) -> None:
    """Many projects have a folder `api` or `workers`, and people type `gateway up` right there."""
    for room in ("api", "broker", "workers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise SystemExit('a stranger was imported')")
    env = child_environment({**os.environ, "PYTHONPATH": inherited.format(folder=tmp_path)})
    code = "import api, broker, workers; print(api.__file__)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", code, cwd=tmp_path, env=env, stdout=subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert said.decode().strip() == str(ROOT / "api" / "__init__.py")


def test_an_installed_gateway_needs_no_path_and_takes_no_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH comes before site-packages, so a folder on it with `workers/` in it would win there."""
    (tmp_path / "workers").mkdir()
    monkeypatch.setattr("site.getsitepackages", lambda: [str(ROOT)])
    assert "PYTHONPATH" not in child_environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}.{os.pathsep}"})
    assert child_environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}/elsewhere"})["PYTHONPATH"] == "/elsewhere"


def processes_of(directory: Path) -> list[psutil.Process]:
    """Processes that have the directory in their command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if str(directory) in " ".join(process.info["cmdline"] or ()) and process.info["status"] != "zombie"
    ]
