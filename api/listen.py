"""Where the api of `gateway up` will listen."""

import errno
import socket
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address

from api.state_dir import CannotStart

DEFAULT_BIND = "127.0.0.1:8400"
DEFAULT_URL = f"http://{DEFAULT_BIND}"
"""Where a gateway is when nobody said anything."""


def reached_at(host: str) -> str:
    """The address by which this machine reaches what listens on a host, or everywhere."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


@dataclass(frozen=True)
class Listen:
    """Where the api listens; found free before anything is started."""

    host: str
    port: int
    is_loopback: bool = True

    @classmethod
    def on(cls, host: str, port: int) -> "Listen":
        """Tries the place out; raises CannotStart. Port 0 takes any free one."""
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with closing(socket.socket(family)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return cls(host, probe.getsockname()[1], is_loopback=ip_address(address[0]).is_loopback)
        except socket.gaierror as error:
            raise CannotStart(f"{host} is no address of this machine: {error.strerror}.") from error
        except OverflowError as error:
            raise CannotStart(f"{port} is no port: it goes up to 65535.") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CannotStart(f"Port {port} of {host} is in use; choose another with --port.") from error
            raise CannotStart(f"Port {port} of {host} can't be used: {error.strerror}.") from error

    @property
    def needs_keys(self) -> str:
        """Why it may not listen here while there is no key."""
        return (
            f"Without a key only this machine may call; {self.host} would let others in: make one with "
            "`gateway key new NAME --admin` while it listens on 127.0.0.1, or set GATEWAY_KEYS."
        )

    @property
    def bind(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        return f"http://{Listen(reached_at(self.host), self.port).bind}"
