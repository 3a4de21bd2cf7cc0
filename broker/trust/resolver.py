"""Names to addresses, as this machine's own resolver says it."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address

RESOLVE_S = 2.5
"""How long a name may take."""

_threads = ThreadPoolExecutor(32, thread_name_prefix="resolve")
"""Of their own: a name whose server is silent holds one for a while, and Redis' name must not wait for it."""


async def resolve(host: str, port: int) -> list[str]:
    """Gives every address that a connection to the host could be made to; raises OSError where there is none, and of
    these TimeoutError where none was told in time, which may be other names' fault."""
    with suppress(ValueError):
        return [str(ip_address(host.partition("%")[0]))]
    asking = asyncio.get_running_loop().run_in_executor(_threads, _addresses, host, port)
    try:
        async with asyncio.timeout(RESOLVE_S):
            return await asking
    except TimeoutError:
        raise TimeoutError(f"{host} was not resolved within {RESOLVE_S:g} s") from None


def _addresses(host: str, port: int) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except UnicodeError:  # a label that is empty or too long
        raise OSError(f"{host} is no name of a host") from None
