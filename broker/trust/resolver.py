"""Names to addresses, as this machine's own resolver says it."""

import asyncio
import socket


async def resolve(host: str, port: int) -> list[str]:
    """Gives every address that a connection to the host could be made to; raises OSError where there is none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise OSError(f"{host} is no name of a host") from None
    return [str(address[0]) for *_, address in found]
