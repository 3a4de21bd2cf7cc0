"""Whether a runtime really runs as many generations at once as the policy offers, or hides a queue of its own.

A hidden queue is worse than a short one: a job that waits inside the runtime has left its lane, so no deadline promotes
it and no status shows it. A runtime that tells its slots is believed. Any other is measured when it is idle: a few
generations are started together, each long enough to be seen beside the others, and stopped as soon as the picture is
clear. While some of them streamed on and on and others got nothing, there was a queue.

A false cap is worse than none, on a machine that has other things to do: only clear evidence counts, twice in a row.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from broker.dialects.openai_stream import ChatReader
from workers.runtimes.base import CONNECT_TIMEOUT_S, Endpoint, client_for

log = logging.getLogger("warmlane.overlap")

PROBES_MAX = 4
"""So many generations are tried together; a runtime that runs them all is believed to run more."""

TOKENS = 512
"""The most that one of them may make; it is stopped long before, where the runtime is slow."""

WITNESS_TOKENS = 16
"""A generation that went on for so many pieces while another got nothing is a witness of a queue."""

PATIENCE = 5.0
"""So many first-token times may pass, for each generation, before one without a token counts as waiting."""

PATIENCE_LEAST_S = 0.3
MEASURE_S_MAX = 10.0
LOOK_EVERY_S = 0.02
TRIES = 2


@dataclass
class Seen:
    """One generation as its stream shows it. Times are of the loop's clock, in seconds; None = not yet."""

    sent_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    pieces: int = 0
    pieces_before: int = 0
    """Of them, those that had come when the last of the generations was sent."""


def judge(seen: Sequence[Seen], now_s: float, first_token_s: float) -> int | None:
    """Says how many of the generations run at once, None while that is not clear.

    `first_token_s` is how long a lone generation takes to its first token. Once one of them has ended before the others
    began, nothing can become clear any more but that all of them overlapped.
    """
    if any(one.sent_s is None for one in seen):
        return None
    begun = [one for one in seen if one.first_s is not None]
    first_end_s = min((one.ended_s for one in seen if one.ended_s is not None), default=now_s)
    if len(begun) == len(seen):
        overlapped = all(one.first_s is not None and one.first_s <= first_end_s for one in seen)
        return len(seen) if overlapped else None
    last_sent_s = max(one.sent_s or 0.0 for one in seen)
    patience_s = max(PATIENCE_LEAST_S, PATIENCE * len(seen) * first_token_s)
    if not begun or any(one.ended_s is not None for one in seen) or now_s - last_sent_s < patience_s:
        return None
    witnessed = all(one.pieces - one.pieces_before >= WITNESS_TOKENS for one in begun)
    return len(begun) if witnessed else None


async def measure(
    endpoint: Endpoint,
    *,
    count: int,
    first_token_s: float,
    stop: Callable[[], bool] = lambda: False,
    extra: Mapping[str, object] | None = None,
) -> int | None:
    """Runs `count` generations together; gives how many of them ran at once, None if that did not become clear.

    Ends within MEASURE_S_MAX, and within LOOK_EVERY_S of `stop`: somebody wants the slots.
    """
    loop = asyncio.get_running_loop()
    seen = [Seen() for _ in range(count)]
    async with client_for(endpoint.base_url) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(_generate(client, endpoint, one, seen, extra), name="overlap") for one in seen]
        end = loop.time() + MEASURE_S_MAX
        found: int | None = None
        while found is None and loop.time() < end and not stop() and not all(task.done() for task in tasks):
            await asyncio.sleep(LOOK_EVERY_S)
            found = judge(seen, loop.time(), first_token_s)
        for task in tasks:
            task.cancel()
    return found


async def _generate(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    one: Seen,
    all_seen: Sequence[Seen],
    extra: Mapping[str, object] | None,
) -> None:
    """Streams one generation and notes what comes when; one that goes wrong is just never clear."""
    loop = asyncio.get_running_loop()

    async def on_trace(event: str, _info: Mapping[str, Any]) -> None:
        if event.endswith("send_request_body.complete"):
            one.sent_s = loop.time()
            for other in all_seen:
                other.pieces_before = other.pieces

    body: dict[str, object] = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Count from one to a thousand."}],
        "max_tokens": TOKENS,
        "stream": True,
        **(extra or {}),
    }
    reader = ChatReader("overlap", include_usage=True)
    try:
        async with client.stream(
            "POST",
            endpoint.base_url + endpoint.path("/v1/chat/completions"),
            json=body,
            headers=endpoint.headers,
            timeout=httpx.Timeout(MEASURE_S_MAX, connect=CONNECT_TIMEOUT_S),
            extensions={"trace": on_trace},
        ) as response:
            if response.status_code != 200:
                log.info("event=overlap_refused status=%d", response.status_code)
                return
            async for piece in response.aiter_bytes():
                reader.feed(piece)
                if one.first_s is None and reader.has_content:
                    one.first_s = loop.time()
                one.pieces += piece.count(b"data:")
        if one.first_s is not None:
            one.ended_s = loop.time()
    except httpx.HTTPError as e:
        log.info("event=overlap_broken reason=%s", type(e).__name__)
    except Exception:  # an answer that nobody foresaw ends no wake
        log.exception("event=overlap_broken")


class Overlap:
    """What is known of one model's runtime here: `parallel` is fewer than the policy offers, or 0."""

    def __init__(self, offered: int) -> None:
        self.offered = offered
        self.parallel = 0
        self.known = offered < 2

    @property
    def slots(self) -> int:
        """How many slots to offer."""
        return self.parallel or self.offered

    def told(self, slots: int) -> None:
        """Hears after a load how many slots the runtime says it has; 0 = it doesn't say, so it is to be measured."""
        self.known = self.offered < 2 or slots > 0
        if slots:
            self.parallel = slots if slots < self.offered else 0

    async def measure(self, endpoint: Endpoint, *, kind: str, first_token_s: float, stop: Callable[[], bool]) -> None:
        """Measures an idle runtime; a cap needs clear evidence twice, and what is not clear changes nothing."""
        count = min(self.offered, PROBES_MAX)
        extra = {"cache_prompt": False, "ignore_eos": True} if kind == "llama.cpp" else None
        found: list[int | None] = []
        for _ in range(TRIES):
            shown = await measure(endpoint, count=count, first_token_s=first_token_s, stop=stop, extra=extra)
            if stop():
                return  # somebody came: another time
            found.append(shown)
            if shown is None or shown == count:
                break
        self.known = True
        clear = [shown for shown in found if shown is not None]
        if clear == found:
            self.parallel = max(clear) if max(clear) < count else 0
        log.info("event=overlap offered=%d seen=%s slots=%d", self.offered, found, self.slots)
