"""Writes each connection's bytes once a tick of the loop.

uvicorn writes an answer's head and its first piece apart: two system calls, and a client that is woken twice, for
every first token. Here whatever is written in one tick goes out together.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol on a corked transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Puts the cork between the protocol and its connection."""
        super().connection_made(_Cork(transport))  # type: ignore[arg-type]  # it passes everything else on


class _Cork:
    """A transport that gathers what is written and passes everything else on."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._gathered: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Keeps the bytes until the end of this tick."""
        if not self._gathered:
            self._call_soon(self._flush)
        self._gathered.append(data)

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Closes once everything written is out."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        if gathered and not self._transport.is_closing():
            self._transport.write(gathered[0] if len(gathered) == 1 else b"".join(gathered))
