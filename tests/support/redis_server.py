"""A private real Redis or Valkey for tests: on a port and on a socket, with the append-only file of production.

It can be killed and started again on the same data, which is what the chaos tests do to it.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from api.embedded_redis import find_program
from api.state_dir import CannotStart
from tests.support.waiting import block_until


class RedisServer:
    """One server process and its data; `url` and `socket_url` stay the same over restarts."""

    def __init__(self, program: Path) -> None:
        self._program = program
        # Short, because a socket's path has about a hundred bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="warmlane-"))
        self.socket_path = self.directory / "s"
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket_url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns once it answers, with its data loaded."""
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": str(self.socket_path),
            "dir": str(self.directory),
            "logfile": str(self.directory / "log"),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
        }
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen([self._program, *arguments], stdout=subprocess.DEVNULL)
        block_until(self._answers, what=f"an answer of {self._program}", timeout_s=20)

    def kill(self) -> None:
        """SIGKILL, and nothing tidied up."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """SIGKILL, then a start on the same data."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Ends it and removes its data."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.directory, ignore_errors=True)

    def flush(self) -> None:
        """Empties it."""
        assert self._ask("FLUSHALL") == b"+OK"

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=10)
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()
        try:
            return self._ask("PING") == b"+PONG"
        except OSError:
            return False

    def _ask(self, word: str) -> bytes:
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)) as connection:
            connection.sendall(f"{word}\r\n".encode())
            return connection.recv(1024).strip()


def start_server() -> RedisServer:
    """Starts one; without a server program the test is skipped, or failed where CI is set."""
    try:
        program = find_program(os.environ).path
    except CannotStart as problem:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a real server: {problem}")
        pytest.skip(f"no real server here: {problem}")
    server = RedisServer(program)
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
