"""What is written in one tick goes out as one piece, in order, and before the connection closes."""

import asyncio
from typing import Any

from api.cork import _Cork


class Transport:
    """Notes what reaches the connection."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.closing = True
        self.done.append("closed")

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


async def test_one_tick_is_one_write() -> None:
    """Head and first piece travel together; what comes later is another write."""
    transport = Transport()
    cork = _Cork(transport)  # type: ignore[arg-type]  # as much of a transport as it uses
    cork.write(b"head ")
    cork.write(b"piece")
    assert transport.done == []
    await asyncio.sleep(0)
    cork.write(b"later")
    await asyncio.sleep(0)
    assert transport.done == [b"head piece", b"later"]
    assert cork.get_extra_info("socket") == "the socket"


async def test_a_close_lets_everything_out_first() -> None:
    """And nothing is written to a connection that is gone."""
    transport = Transport()
    cork = _Cork(transport)  # type: ignore[arg-type]  # as above
    cork.write(b"the end")
    cork.close()
    cork.write(b"too late")
    await asyncio.sleep(0)
    assert transport.done == [b"the end", "closed"]
    assert cork.is_closing()
