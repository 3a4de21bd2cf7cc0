"""How many generations a runtime really runs at once: the judgement, as a table, and the measurement's patience."""

import asyncio

import pytest

from workers.overlap import PATIENCE_LEAST_S, WITNESS_TOKENS, Overlap, Seen, judge
from workers.runtimes.base import Endpoint

FIRST_S = 0.02


def on(*, first: float | None = 0.02, pieces: int = 40, before: int = 2, ended: float | None = None) -> Seen:
    return Seen(sent_s=0.0, first_s=first, ended_s=ended, pieces=pieces, pieces_before=before)


NOTHING = on(first=None, pieces=0, before=0)
LATE = PATIENCE_LEAST_S + 0.1


@pytest.mark.parametrize(
    ("seen", "now", "first_token", "runs"),
    [
        pytest.param([on(), on(first=0.03)], 0.04, FIRST_S, 2, id="both began while both went on"),
        pytest.param([on(ended=0.5), on(first=0.4)], 0.6, FIRST_S, 2, id="one ended after the other had begun"),
        pytest.param([on(ended=0.3), on(first=0.4)], 0.6, FIRST_S, None, id="one began after the other had ended"),
        pytest.param([on(), NOTHING], LATE, FIRST_S, 1, id="one streamed on while the other got nothing"),
        pytest.param([on(), NOTHING], PATIENCE_LEAST_S - 0.1, FIRST_S, None, id="that may still be an accident"),
        pytest.param([on(), NOTHING], LATE, 0.5, None, id="a slow model's second token may be as slow"),
        pytest.param([on(pieces=5), NOTHING], LATE, FIRST_S, None, id="the whole machine stood still"),
        pytest.param([on(before=40 - WITNESS_TOKENS + 1), NOTHING], LATE, FIRST_S, None, id="it was before the other"),
        pytest.param([on(ended=0.1), NOTHING], LATE, FIRST_S, None, id="the witness ended, so nobody saw a queue"),
        pytest.param([NOTHING, NOTHING], LATE, FIRST_S, None, id="none began"),
        pytest.param([on(), Seen()], LATE, FIRST_S, None, id="the other was not even sent"),
        pytest.param([on(), on(), NOTHING, NOTHING], LATE + 0.3, FIRST_S, 2, id="two of four"),
        pytest.param([on(), on(), on(), NOTHING], LATE + 0.3, FIRST_S, 3, id="three of four"),
        pytest.param([on(), on(), on(pieces=5), NOTHING], LATE + 0.3, FIRST_S, None, id="one of them has only begun"),
    ],
)
def test_only_clear_evidence_counts(seen: list[Seen], now: float, first_token: float, runs: int | None) -> None:
    """A false cap halves what a team can do; a hidden queue that was not seen is measured again after the next wake."""
    assert judge(seen, now, first_token) == runs


def test_what_the_runtime_tells_is_believed() -> None:
    """And a model with one slot has nothing to measure."""
    overlap = Overlap(4)
    assert (overlap.known, overlap.slots) == (False, 4)
    overlap.told(2)
    assert (overlap.known, overlap.slots, overlap.parallel) == (True, 2, 2)
    overlap.told(0)
    assert (overlap.known, overlap.slots) == (False, 2), "it is measured again, and capped until then"
    overlap.told(8)
    assert (overlap.known, overlap.slots, overlap.parallel) == (True, 4, 0)
    assert Overlap(1).known


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n", b"nonsense\r\n\r\n"])
async def test_a_runtime_that_cannot_be_measured_keeps_what_the_policy_says(answer: bytes) -> None:
    """Nobody there, a refusal, something that is no HTTP: one look, no cap, no error."""
    asked = 0

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    overlap = Overlap(2)
    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await overlap.measure(Endpoint(url), kind="ollama", first_token_s=0.01, stop=lambda: False)
    assert (overlap.known, overlap.slots, asked) == (True, 2, 2)
    await overlap.measure(Endpoint("http://127.0.0.1:9"), kind="ollama", first_token_s=0.01, stop=lambda: False)
    assert overlap.slots == 2
