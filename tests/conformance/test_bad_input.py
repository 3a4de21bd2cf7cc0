"""What people get wrong: each mistake is one clear sentence with its status or exit code, and leaves nothing behind."""

import json
import os
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from broker.store import Store
from tests.support.clients import user
from tests.support.gateway_process import House, gateway, process, tells_no_traceback
from tests.support.invariants import Snapshot, take
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

PARTS = ("api", "scheduler", "worker")
CIRCLE = policy({"a": simulated(fallback="b"), "b": simulated(fallback="c"), "c": simulated(fallback="a")})
TYPO = "models:\n  a:\n    backend: simulated\n    model: pretend\n    maxQueu: 3\n"


class OldRedis(socketserver.BaseRequestHandler):
    """Speaks just enough to say that it is too old."""

    def handle(self) -> None:
        info = b"# Server\r\nredis_version:6.2.0\r\nredis_mode:standalone\r\n"
        while data := self.request.recv(4096):
            for _ in range(data.count(b"*")):
                asked_info = b"INFO" in data.upper()
                self.request.sendall(b"$%d\r\n%s\r\n" % (len(info), info) if asked_info else b"+OK\r\n")


class NoRedis(socketserver.BaseRequestHandler):
    """A web server that somebody's URL leads to."""

    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    """Runs a small server; gives the Redis URL that leads to it."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, name="small server")
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        finally:
            server.shutdown()
            thread.join()


def one_sentence(text: str) -> str:
    """Takes the one line that a command has said."""
    tells_no_traceback(text)
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


# --- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [*PARTS, "policy show"])
def test_a_redis_that_is_not_there(part: str, tmp_path: Path) -> None:
    done = gateway(
        *part.split(), GATEWAY_REDIS_URL="redis://127.0.0.1:1/0", GATEWAY_BIND="127.0.0.1:0",
        GATEWAY_STATE_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 3
    assert "Redis does not answer at 127.0.0.1:1" in one_sentence(done.stdout + done.stderr)


def test_up_says_so_too(tmp_path: Path) -> None:
    done = gateway("up", "--data", str(tmp_path), "--port", "0", GATEWAY_REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 3
    assert "Redis does not answer at 127.0.0.1:1" in one_sentence(done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("handler", "words"),
    [(OldRedis, "Redis 6.2.0 is too old: warmlane needs 7.0 or later"), (NoRedis, "is not a Redis")],
)
def test_a_server_that_cannot_be_used(
    handler: type[socketserver.BaseRequestHandler], words: str, tmp_path: Path
) -> None:
    """Each part finds out by itself, at its start."""
    with serving(handler) as url:
        for part in PARTS:
            done = gateway(part, GATEWAY_REDIS_URL=url, GATEWAY_BIND="127.0.0.1:0", GATEWAY_STATE_DIR=str(tmp_path))
            assert done.returncode == 3, part
            assert words in one_sentence(done.stdout + done.stderr), part


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:6379", "redis://127.0.0.1:port/0"])
def test_a_redis_url_that_is_none(url: str, tmp_path: Path) -> None:
    done = gateway("worker", GATEWAY_REDIS_URL=url, GATEWAY_STATE_DIR=str(tmp_path))
    assert done.returncode == 3
    assert "the Redis URL is not usable" in one_sentence(done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("worker", "GATEWAY_HOST_NAME", "my box"),
        ("worker", "GATEWAY_MEMORY_MB", "lots"),
        ("scheduler", "GATEWAY_NAMESPACE", "a:b"),
        ("api", "GATEWAY_BIND", "nowhere"),
        ("api", "GATEWAY_KEYS", "no-colon"),
    ],
)
def test_a_setting_that_makes_no_sense(part: str, setting: str, value: str, tmp_path: Path) -> None:
    """The sentence names the setting and never repeats the value: it may be a secret."""
    done = gateway(part, **{"GATEWAY_STATE_DIR": str(tmp_path), setting: value})
    assert done.returncode == 2
    said = one_sentence(done.stdout + done.stderr)
    assert said.startswith(setting)
    assert value not in said.removeprefix(setting)


def test_a_policy_that_does_not_hold_together(tmp_path: Path) -> None:
    """Line, path and reason, from `check`, `apply` and `up` alike; and nothing has been started."""
    for text, words in (
        (CIRCLE, r"line \d+: models\.a\.fallback: .*fallbacks go in a circle: a -> b -> c -> a"),
        (TYPO, r"line 5: models\.a\.maxQueu: .*did you mean '?maxQueue"),
    ):
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        up = ["up", "--data", str(tmp_path / "data"), "--port", "0", "--policy", str(file)]
        commands = [["policy", "check", str(file)], ["policy", "apply", str(file)], up]
        with ThreadPoolExecutor() as at_once:
            for done in at_once.map(lambda command: gateway(*command), commands):
                assert done.returncode == 2, done
                assert re.match(words, one_sentence(done.stdout + done.stderr)), done
    missing = gateway("policy", "check", str(tmp_path / "none.yaml"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "can't be read: No such file or directory" in one_sentence(missing.stderr)


def test_a_port_in_use(tmp_path: Path, shared_house: House) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        up = gateway("up", "--data", str(tmp_path), "--port", port)
        api = gateway("api", "--port", port, GATEWAY_REDIS_URL=shared_house.redis_url)
    assert (up.returncode, api.returncode) == (2, 2)
    for done in (up, api):
        assert f"Port {port} of 127.0.0.1" in one_sentence(done.stdout + done.stderr)


def test_a_second_of_what_there_may_be_one_of(shared_house: House) -> None:
    """A second `up` on the same data, a second worker of the same name: both go, and the first ones stay."""
    up = gateway("up", "--data", str(shared_house.data), "--port", "0")
    assert up.returncode == 2
    assert f"`gateway up` already runs on {shared_house.data}" in one_sentence(up.stdout + up.stderr)
    name = shared_house.status()["hosts"][0]["name"]
    with process(
        "worker", GATEWAY_REDIS_URL=shared_house.redis_url, GATEWAY_HOST_NAME=name,
        GATEWAY_STATE_DIR=str(shared_house.data),
    ) as second:  # fmt: skip
        assert second.exit() == 4
        assert f"a worker named {name} runs on this machine already" in one_sentence(second.output)
    assert [host["name"] for host in shared_house.status()["hosts"]] == [name]
    assert shared_house.running


# --- requests ----------------------------------------------------------------------------------------------------


async def test_a_refused_request_leaves_nothing(shared_house: House) -> None:
    """Whatever is wrong with it, Redis is afterwards what it was before: no key more, none less, none changed."""
    chat = {"model": "pretend", "messages": user("hi")}
    bad: list[tuple[int, str, bytes, dict[str, str]]] = [
        (404, "model_not_found", json.dumps({**chat, "model": "nobody"}).encode(), {}),
        (404, "lane_not_found", json.dumps(chat).encode(), {"x-gateway-lane": "nowhere"}),
        (400, "invalid_request", b'{"model": "pretend", "messages": [', {}),
        (400, "invalid_request", json.dumps({"model": "pretend"}).encode(), {}),
        (400, "invalid_request", json.dumps({**chat, "max_tokens": "many"}).encode(), {}),
        (400, "invalid_request", json.dumps(chat).encode(), {"idempotency-key": "k" * 300}),
        (400, "context_length_exceeded", json.dumps({"model": "tiny", "messages": user("word " * 5000)}).encode(), {}),
        (413, "body_too_large", b" " * 50_000_000, {}),
        (503, "model_unavailable", json.dumps({**chat, "model": "gone"}).encode(), {"idempotency-key": "k"}),
    ]
    shared_house.until_said("event=quarantine model=gone")
    store = await Store.open(shared_house.redis_url, name="test")
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            for status, code, body, headers in bad:
                before = await take(store)
                answer = await http.post(f"{shared_house.url}/v1/chat/completions", content=body, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
                assert "\n" not in answer.json()["error"]["message"]
                assert marks(before, await take(store)) == []
    finally:
        await store.close()


def marks(before: Snapshot, after: Snapshot) -> list[str]:
    """What differs beyond the heartbeats of the hosts, the worker's tries to wake the model that is gone, and the
    counters of the day, into which an api writes its refusals every second."""
    changing = {"host:<host>", "hosts", "model:<model>:<host>"}
    changing |= {"usage:<day>", "usage:<day>:<caller>:<lane>:<model>:<model>"}
    tried = before.names.model("gone"), before.names.wake("gone"), before.names.wake_epoch("gone")
    return [
        name
        for name in before.marks(after)
        if name not in tried and ((family := before.names.family(name)) is None or family.pattern not in changing)
    ]


def test_weights_that_are_not_there(shared_house: House) -> None:
    """Told when the policy is read, in status, and to whoever asks for the model; the other models go on."""
    warning = shared_house.until_said("missing.gguf")
    weights = re.search(r"/\S+missing\.gguf", warning)
    assert weights is not None, warning
    shared_house.until_said("event=quarantine model=gone")
    words = f"there is no GGUF file at {weights[0]}"

    def told() -> bool:
        lines = shared_house.command("status").stdout.splitlines()
        row = next(line for line in lines if line.startswith("gone "))
        return row.split()[1] == "quarantined" and any(words in line for line in lines if line.startswith("note: "))

    block_until(told, what="status says so")
    asked = {"model": "gone", "messages": user("hi")}
    answer = httpx.post(f"{shared_house.url}/v1/chat/completions", json=asked, timeout=10)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "model_unavailable")
    assert words in error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 30


def test_without_keys_nobody_else_may_call(tmp_path: Path) -> None:
    done = gateway("up", "--data", str(tmp_path), "--port", "0", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "Without a key only this machine may call" in one_sentence(done.stdout + done.stderr)
    assert not os.listdir(tmp_path) or not (tmp_path / "redis").exists()
