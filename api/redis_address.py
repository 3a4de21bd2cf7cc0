"""Where the private Redis listens, and how to ask it something: a few lines of the raw protocol, no client."""

import asyncio
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2s
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SOCKET_PATH_BYTES_MAX = 100
"""Kernels cut socket paths at 104 or 108 bytes."""
ANSWER_S_MAX = 1.0


@dataclass(frozen=True)
class Address:
    """Where the private server listens: a socket, or a port of the loopback interface with a password."""

    path: str = ""
    port: int = 0
    password: str = ""

    @property
    def url(self) -> str:
        return f"unix://{quote(self.path)}" if self.path else f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def shown(self) -> str:
        """The address without the password."""
        return self.url.replace(f":{self.password}@", "") if self.password else self.url

    @classmethod
    def from_url(cls, url: str) -> "Address":
        parts = urlsplit(url.strip())
        return cls(unquote(parts.path)) if parts.scheme == "unix" else cls("", parts.port or 0, parts.password or "")


class NoAnswer(Exception):
    """The server can't be reached, isn't ready, or says no."""


async def ask(address: Address, *words: str) -> str:
    """Sends one command and gives its one-line answer; raises NoAnswer."""
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            reader, writer = await connect(address)
            try:
                writer.write(_command(*words))
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise NoAnswer(str(error)) from error
    if not line.endswith(b"\r\n") or line.startswith(b"-"):
        raise NoAnswer(line.decode(errors="replace").strip() or "the connection was closed")
    return line[1:-2].decode(errors="replace")


async def connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.path:
        return await asyncio.open_unix_connection(address.path)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    writer.write(_command("AUTH", address.password))
    if not (line := await reader.readline()).startswith(b"+OK"):
        writer.close()
        raise NoAnswer(line.decode(errors="replace").strip())
    return reader, writer


def _command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def choose_address(directory: Path, environ: Mapping[str, str]) -> Address:
    """A socket in the data directory, else one in a directory with a shorter path, else a port with a password."""
    for place in (directory, _short_directory(directory, environ)):
        path = place / "redis.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX and _is_ours(place) and _sockets_work(path):
            return Address(str(path))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("", probe.getsockname()[1], secrets.token_urlsafe(24))


def _short_directory(directory: Path, environ: Mapping[str, str]) -> Path:
    name = blake2s(os.fsencode(directory), digest_size=6).hexdigest()
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime) if runtime.startswith("/") else Path(tempfile.gettempdir())
    return base / f"warmlane-{os.getuid()}-{name}"


def _is_ours(place: Path) -> bool:
    """Makes the directory if need be; anyone may make names in /tmp, so it must be one that nobody else can enter."""
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _sockets_work(path: Path) -> bool:
    """Tries it: some file systems hold no sockets. The caller holds the lock, so a socket there is a dead one."""
    try:
        path.unlink(missing_ok=True)
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.bind(str(path))
        path.unlink()
    except OSError:
        return False
    return True
