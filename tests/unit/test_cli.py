"""The command line: what it prints, one sentence for what goes wrong, and the exit code. No traceback, ever."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from api import cli, cli_policy
from broker import errors, hosts
from broker.policies import PolicyBook
from broker.policy import Policy
from broker.records import HostRecord
from broker.store import Store
from tests.support.broker_world import a_later_version_applies, fake_redis, new_namespace
from tests.support.live_api import LiveApi, chat_body, live_api
from tests.support.redis_server import RedisServer
from tests.support.scripted_worker import ScriptedWorker
from tests.support.waiting import block_until

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]
SPECIFIED = ROOT / "tests" / "unit" / "policies" / "spec.yaml"
POLICY = "models:\n  big:\n    backend: simulated\n    model: weights\n"


@pytest.fixture(autouse=True)
def a_person_who_has_set_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("GATEWAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:9")


class Ran:
    """What one command left: exit code, output, complaint."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err and "Traceback" not in out

    def complains(self, code: int, *words: str) -> None:
        """One sentence on stderr, nothing on stdout."""
        assert (self.code, self.out) == (code, ""), self.err
        assert self.err.count("\n") == 1 and all(word in self.err for word in words), self.err


class Gateway:
    """`gateway` with these words, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> Ran:
        code = cli.run(list(words))
        out, err = self._capsys.readouterr()
        return Ran(code, out, err)


@pytest.fixture
def gateway(capsys: pytest.CaptureFixture[str]) -> Gateway:
    return Gateway(capsys)


@pytest_asyncio.fixture
async def running() -> AsyncIterator[LiveApi]:
    """A gateway with one warm model, and the environment of a client that knows where it is."""
    store = Store.fake(fake_redis(), namespace=new_namespace())
    book = PolicyBook(store)
    await book.apply(POLICY)
    async with ScriptedWorker(store, book).running(), live_api(store, keys="ann:secret") as api:
        yield api
    await store.close()


# --- without a gateway -------------------------------------------------------------------------------------------


def test_version(gateway: Gateway) -> None:
    ran = gateway("version")
    assert ran.code == 0 and ran.out.strip()


@pytest.mark.parametrize("words", [["nonsense"], ["status", "--nonsense"], ["policy", "apply"], ["up", "--port", "x"]])
def test_wrong_usage_is_a_2(gateway: Gateway, words: list[str]) -> None:
    ran = gateway(*words)
    assert (ran.code, ran.out) == (2, "") and "Error" in ran.err


def test_usage_is_csv_or_json(gateway: Gateway) -> None:
    gateway("usage", "--csv", "--json").complains(2, "Either --csv or --json")


@pytest.mark.parametrize(
    "words", [["status"], ["status", "--json"], ["job", "show", "x"], ["model", "list"], ["usage"]]
)
def test_a_gateway_that_is_not_there_is_a_3(gateway: Gateway, words: list[str]) -> None:
    gateway(*words).complains(3, "http://127.0.0.1:9", "can't be reached")


@pytest.mark.parametrize("url", ["127.0.0.1:8400", "http://[box", "http://box:port"])
def test_an_address_that_is_none_is_a_3(gateway: Gateway, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_URL", url)
    gateway("status").complains(3, "can't be reached")
    gateway("job", "list").complains(3, "can't be reached")


def test_the_specified_policy_is_fine(gateway: Gateway) -> None:
    ran = gateway("policy", "check", str(SPECIFIED))
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == f"{SPECIFIED}: fine, 2 models, 2 lanes, 2 routing rules"


def test_an_invalid_policy_is_a_2_with_a_line_for_each_problem(gateway: Gateway, tmp_path: Path) -> None:
    """A typo and a circle, each with its line and path."""
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY + "    maxQueu: 3\n  other:\n    backend: nothing\n    model: x\n")
    ran = gateway("policy", "check", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert [line.split(":")[0] for line in ran.err.splitlines()] == ["line 5", "line 7"]
    assert "maxQueue" in ran.err
    file.write_text(POLICY + "    fallback: other\n  other:\n    backend: simulated\n    model: x\n    fallback: big\n")
    ran = gateway("policy", "apply", str(file))
    assert ran.code == 2 and "circle" in ran.err


def test_check_says_in_numbers_what_cannot_be_warm_together(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the memory of this machine, or of the box that is named."""
    file = tmp_path / "policy.yaml"
    kept = "{backend: simulated, model: x, keepWarm: true, memoryMb: 600}"
    file.write_text(f"models:\n  a: {kept}\n  b: {kept}\n")
    monkeypatch.setenv("GATEWAY_MEMORY_MB", "1000")
    said = "they need 1200 MB at once, and a host has 1000 MB"
    ran = gateway("policy", "check", str(file))
    assert ran.code == 0 and said in ran.out
    assert "warning" not in gateway("policy", "check", str(file), "--memory-mb", "1200").out
    monkeypatch.setenv("GATEWAY_MEMORY_MB", "1200")
    assert "warning" not in gateway("policy", "check", str(file)).out


@pytest.mark.real
async def test_apply_warns_by_the_memory_of_the_hosts_that_are_alive(
    redis_server: RedisServer, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The policy may be applied from a laptop: its own memory is of no interest."""
    namespace = new_namespace()
    monkeypatch.setenv("GATEWAY_REDIS_URL", redis_server.url)
    monkeypatch.setenv("GATEWAY_NAMESPACE", namespace)
    monkeypatch.setenv("GATEWAY_MEMORY_MB", "1")
    file = tmp_path / "policy.yaml"
    kept = "{backend: simulated, model: x, keepWarm: true, memoryMb: 600}"
    file.write_text(f"models:\n  a: {kept}\n  b: {kept}\n")
    ran = await asyncio.to_thread(gateway, "policy", "apply", str(file))
    assert (ran.code, ran.err) == (0, ""), "no host has told its memory"
    store = await Store.open(redis_server.url, namespace=namespace, name="test")
    await hosts.beat(store, HostRecord(name="gpu1", boot="b", memory_total=1000 << 20), {}, lease_ms=600_000)
    await store.close()
    ran = await asyncio.to_thread(gateway, "policy", "apply", str(file))
    assert ran.code == 0 and "they need 1200 MB at once, and a host has 1000 MB" in ran.err


def test_a_policy_that_cannot_be_read_is_a_2(gateway: Gateway, tmp_path: Path) -> None:
    gateway("policy", "check", str(tmp_path / "nothing.yaml")).complains(2, "can't be read", "No such file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    gateway("policy", "check", str(tmp_path / "binary.yaml")).complains(2, "no UTF-8 text")


@pytest.mark.parametrize("command", ["up", "api"])
def test_a_wrong_setting_is_a_2_before_anything_starts(
    gateway: Gateway, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that restarts an api with a broken key line for ever helps nobody."""
    monkeypatch.setenv("GATEWAY_KEYS", "hunter2")
    gateway(command).complains(2, "GATEWAY_KEYS holds pairs")
    monkeypatch.setenv("GATEWAY_KEYS", "")
    monkeypatch.setenv("GATEWAY_BIND", "everywhere")
    gateway(command).complains(2, "GATEWAY_BIND must be a host and a port")


def test_the_schema_is_json(gateway: Gateway) -> None:
    assert json.loads(gateway("policy", "schema").out) == Policy.json_schema()


def test_a_redis_that_is_not_there_is_a_3(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port nobody listens on, a URL that is none, and no URL and no `gateway up` either."""
    gateway("policy", "history").complains(3, "No GATEWAY_REDIS_URL is set", "gateway up")
    monkeypatch.setenv("GATEWAY_REDIS_URL", "redis://127.0.0.1:9/0")
    gateway("policy", "history").complains(3, "127.0.0.1:9")
    monkeypatch.setenv("GATEWAY_REDIS_URL", "http://127.0.0.1:9")
    gateway("policy", "history").complains(3, "the Redis URL is not usable")
    monkeypatch.setenv("GATEWAY_NAMESPACE", "a b")
    gateway("policy", "history").complains(2, "GATEWAY_NAMESPACE may hold")


# --- against a gateway -------------------------------------------------------------------------------------------


async def test_a_client_sees_status_models_and_its_jobs(
    running: LiveApi, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of a teammate's machine, with a key."""
    monkeypatch.setenv("GATEWAY_URL", running.url)
    (await asyncio.to_thread(gateway, "status")).complains(1, "needs a key", "what stands in GATEWAY_KEY")
    monkeypatch.setenv("GATEWAY_KEY", "secret")
    status = await asyncio.to_thread(gateway, "status")
    assert status.out.splitlines() == [
        "MODEL  STATE   FIRST TOKEN   QUEUE   MEM",
        "big    warm    12ms          0/8     3.0G",
        "host: gpu1 up, 6.0G of 16.0G used, headroom 10.0G",
        "note: big is simulated: its answers mean nothing",
    ]
    told = json.loads((await asyncio.to_thread(gateway, "status", "--json")).out)
    assert told["models"][0]["name"] == "big"
    assert (await asyncio.to_thread(gateway, "model", "list")).out == "big\n"
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"{running.url}/v1/chat/completions", content=chat_body("hello"), headers={"x-api-key": "secret"}
        )
    job_id = answer.headers["x-gateway-job"]
    shown = await asyncio.to_thread(gateway, "job", "show", job_id)
    assert shown.code == 0
    words = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert (words["job"], words["state"]) == (job_id, "done")
    cancelled = await asyncio.to_thread(gateway, "job", "cancel", job_id, "--json")
    assert json.loads(cancelled.out)["state"] == "done"  # it had ended, and stays as it ended
    (await asyncio.to_thread(gateway, "job", "show", "01JZZZZZZZZZZZZZZZZZZZZZZZ")).complains(1, "no job")


async def test_watch_prints_until_it_is_interrupted(running: LiveApi) -> None:
    """Ctrl-C is how one stops looking, not a failure."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", "from api.cli import main; main()", "status", "--watch", "--every", "0.1"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_URL": running.url, "GATEWAY_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job ignores it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    heads = 0
    while heads < 2:
        heads += (await asyncio.wait_for(process.stdout.readline(), 20)).startswith(b"MODEL")
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, err) == (0, b"")


@asynccontextmanager
async def another(body: bytes, *, status: str = "200 OK") -> AsyncIterator[str]:
    """Somebody who gives everybody the same answer, and where."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


WHOLE = '{"policy_version": 1, "lanes": [], "hosts": [], "models": %s}'


@pytest.mark.parametrize(
    "body",
    [
        "hello", "[]", "{}", '{"models": []}', '{"models": 5}', '{"since": 1, "until": 1, "zone": "", "proposals": {}}',
        WHOLE % "null", WHOLE % "[5]", WHOLE % "[{}]", WHOLE % '[{"name": 5}]',
        WHOLE % '[{"name": "a", "waiting": "x"}]',
    ],
)  # fmt: skip
async def test_what_is_no_gateway_is_said_so(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Another program on that port may well answer in JSON."""
    async with another(body.encode()) as url:
        monkeypatch.setenv("GATEWAY_URL", url)
        for words in (["status"], ["status", "--json"], ["tune"], ["tune", "--json"]):
            (await asyncio.to_thread(gateway, *words)).complains(3, "is no warmlane gateway")


@pytest.mark.parametrize("body", ['{"error": {}}', '{"error": {"message": 5}}', '{"error": "no"}', "[]"])
async def test_a_refusal_in_other_words_is_a_sentence(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    async with another(body.encode(), status="404 Not Found") as url:
        monkeypatch.setenv("GATEWAY_URL", url)
        (await asyncio.to_thread(gateway, "status")).complains(1, "says 404")


# --- against Redis -----------------------------------------------------------------------------------------------


async def _later_version(url: str, namespace: str) -> None:
    store = await Store.open(url, namespace=namespace, name="test")
    await a_later_version_applies(store)
    await store.close()


@pytest.mark.real
def test_a_policy_is_applied_shown_and_taken_back(
    redis_server: RedisServer, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Apply, history, an old text, rollback; and the private Redis of `gateway up` is found by its data directory."""
    monkeypatch.setenv("GATEWAY_REDIS_URL", redis_server.url)
    monkeypatch.setenv("GATEWAY_NAMESPACE", new_namespace())
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(POLICY)
    second.write_text(POLICY + "    maxQueue: 3\n")
    gateway("policy", "show").complains(1, "no policy has been applied yet")
    assert gateway("policy", "apply", str(first)).out == "version 1 is active\n"
    assert gateway("policy", "apply", str(first)).out == "version 1 says the same and stays active\n"
    assert gateway("policy", "apply", str(second)).out == "version 2 is active\n"
    assert gateway("policy", "show").out == second.read_text()
    assert gateway("policy", "show", "--version", "1").out == first.read_text()
    gateway("policy", "show", "--version", "9").complains(1, "Version 9 is not in the history")
    assert [line.split()[0] for line in gateway("policy", "history").out.splitlines()] == ["2", "1"]
    assert gateway("policy", "rollback", "1").out == "version 3 is active, with the text of version 1\n"
    gateway("policy", "rollback", "77").complains(1, "version 77 is not in the history")
    assert len(json.loads(gateway("policy", "history", "--json").out)) == 3
    asyncio.run(_later_version(redis_server.url, os.environ["GATEWAY_NAMESPACE"]))
    assert gateway("policy", "show").out == first.read_text() + "\nkeyOfALaterVersion: 1\n"
    ran = gateway("inspect", "lanes")
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("policy 4 is active, and this version of warmlane")
    assert "cannot read it:\nline 6: keyOfALaterVersion: unknown key" in ran.err
    assert gateway("policy", "apply", str(first)).out == "version 5 is active\n"
    place = tmp_path / "data" / "redis"
    place.mkdir(parents=True)
    (place / "url").write_text(redis_server.socket_url + "\n")
    assert gateway("policy", "show", "--data", str(tmp_path / "data")).out == first.read_text()


@pytest.mark.real
async def test_a_made_up_policy_never_replaces_one_that_a_person_applied(redis_server: RedisServer) -> None:
    namespace = new_namespace()
    made = await cli_policy.apply_policy(redis_server.url, namespace, POLICY, made_up=True)
    assert (made.version, made.models, made.kept) == (1, ["big"], False)
    other = POLICY.replace("big", "other")
    assert (await cli_policy.apply_policy(redis_server.url, namespace, other, made_up=True)).models == ["other"]
    given = await cli_policy.apply_policy(redis_server.url, namespace, POLICY, made_up=False)
    kept = await cli_policy.apply_policy(redis_server.url, namespace, other, made_up=True)
    assert (kept.kept, kept.version, kept.models) == (True, given.version, ["big"])
    await _later_version(redis_server.url, namespace)
    with pytest.raises(errors.PolicyUnreadable):  # somebody's it is, all the same
        await cli_policy.apply_policy(redis_server.url, namespace, other, made_up=True)
    assert (await cli_policy.apply_policy(redis_server.url, namespace, POLICY, made_up=False)).version == 5


# --- the api as a process ----------------------------------------------------------------------------------------


class ApiProcess:
    """`gateway api` as a process, started in a folder that has an `api` of its own."""

    def __init__(self, folder: Path, *words: str, **settings: str) -> None:
        (folder / "api").mkdir(exist_ok=True)
        (folder / "api" / "__init__.py").write_text("raise SystemExit('a stranger')")
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHONPATH"))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from api.cli import main; main()", "api", *words],
            cwd=folder,
            env={**ours, "PYTHONPATH": str(ROOT), **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=60)  # four at once, on a busy machine
        assert "Traceback" not in err
        return self.process.returncode, err

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def processes() -> Iterator[list[ApiProcess]]:
    started: list[ApiProcess] = []
    yield started
    for process in started:
        process.close()


@pytest.mark.real
def test_an_api_that_cannot_start_says_why(
    redis_server: RedisServer, tmp_path: Path, processes: list[ApiProcess]
) -> None:
    """A port in use and an open door are a 2, a Redis that is none or not there a 3: one sentence each."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            (2, "in use"): ApiProcess(tmp_path, "--port", port, GATEWAY_REDIS_URL=redis_server.url),
            (2, "Without a key"): ApiProcess(
                tmp_path, "--host", "0.0.0.0", "--port", "0", GATEWAY_REDIS_URL=redis_server.url
            ),
            (2, "GATEWAY_KEYS holds pairs"): ApiProcess(tmp_path, "--port", "0", GATEWAY_KEYS="hunter2"),
            (3, "Redis does not answer"): ApiProcess(tmp_path, "--port", "0", GATEWAY_REDIS_URL="redis://127.0.0.1:9"),
        }
        processes += cases.values()
        for (code, words), process in cases.items():
            found, err = process.ended()
            assert (found, err.count("\n")) == (code, 1), err
            assert words in err and "hunter2" not in err


@pytest.mark.real
def test_an_api_ends_in_order_when_it_is_told_to(
    redis_server: RedisServer, tmp_path: Path, processes: list[ApiProcess]
) -> None:
    """SIGTERM is an exit code 0, and the api of the folder it was started in was never imported."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    api = ApiProcess(
        tmp_path, "--port", str(port), GATEWAY_REDIS_URL=redis_server.url, GATEWAY_NAMESPACE=new_namespace()
    )
    processes.append(api)

    def answers() -> bool:
        assert api.process.poll() is None, api.ended()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    block_until(answers, what="the api answers", timeout_s=20)
    api.process.send_signal(signal.SIGTERM)
    assert api.ended()[0] == 0
