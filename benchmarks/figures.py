"""One round's figures of one rival: each function puts load on it and says what came out (microseconds)."""

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

from machine import Backend, CannotMeasure, cpu_s, finish_load, load, rss_mb, start_load, wait_until
from rivals import Rival, Warmlane

TOKENS = 10
"""Length of a short answer."""
IDLE_US = 20_000
"""The pause that counts as idle: long enough for every process on the way to fall asleep."""
PROBE_PAUSE_US = 5_000
STREAM_TOKENS = 100
STREAM_INTERVAL_US = 20_000
"""A running stream: 50 tokens a second for two seconds, again and again."""
FLAT_STREAMS = 64
FLAT_TOKENS = 500
DRAIN_MS = 4000

SHORT = {"prompt": f"bench:0,{TOKENS},0,0", "tokens": TOKENS}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How long each load lasts, as a share of the full run's."""

    share: float = 1.0

    def s(self, seconds: float, rival: Rival) -> float:
        """Seconds for this rival: a slow one needs longer for as many samples."""
        return round(seconds * self.share * (1.6 if rival.slow else 1.0), 2)


def first_token(rival: Rival, scale: Scale) -> Figures:
    """One request at a time: back to back (hot), and after a pause (idle)."""
    hot = load(rival.port, seconds=scale.s(2.0, rival), skip_ms=200, drain_ms=DRAIN_MS, **SHORT)
    idle = load(rival.port, seconds=scale.s(3.0, rival), pause_us=IDLE_US, drain_ms=DRAIN_MS, **SHORT)
    return {"hot": hot, "idle": idle}


def under_load(rival: Rival, backend: Backend, scale: Scale) -> Figures:
    """First token of a probe alone, beside 16 and beside 64 streams of 50 tokens a second; CPU beside 64."""
    probe = {"pause_us": PROBE_PAUSE_US, "drain_ms": DRAIN_MS, **SHORT}
    tokens = int(STREAM_TOKENS * scale.share)
    stream_s = tokens * STREAM_INTERVAL_US / 1e6
    found: Figures = {"alone": load(rival.port, seconds=scale.s(2.0, rival), **probe)}
    for streams in (16, 64):
        cpu_window_s = scale.s(2.0, rival) if streams == 64 else 0.0
        probe_s = scale.s(2.5, rival)
        running = start_load(
            rival.port, connections=streams, ramp_ms=int(stream_s * 1000), skip_ms=int(stream_s * 1000),
            seconds=stream_s + cpu_window_s + probe_s + 0.2, drain_ms=DRAIN_MS,
            prompt=f"bench:0,{tokens},{STREAM_INTERVAL_US},0", tokens=tokens,
        )  # fmt: skip
        time.sleep(stream_s + 0.05)
        if cpu_window_s:
            found["cpu_64_us"] = _cpu_per_token(rival, backend, cpu_window_s)
        found[f"probe_{streams}"] = load(rival.port, seconds=probe_s, **probe)
        streamed = finish_load(running)
        found[f"streams_{streams}"] = streamed
        found[f"delivered_{streams}"] = streamed["chunks_per_s"] / (streams * 1e6 / STREAM_INTERVAL_US)
        settle(rival, backend)
    return found


def flat_out(rival: Rival, backend: Backend, scale: Scale) -> Figures:
    """64 streams as fast as they go: chunks a second, and the CPU that each costs."""
    seconds = scale.s(3.0, rival)
    running = start_load(
        rival.port, connections=FLAT_STREAMS, seconds=seconds, skip_ms=400, drain_ms=DRAIN_MS,
        prompt=f"bench:0,{FLAT_TOKENS},0,0", tokens=FLAT_TOKENS,
    )  # fmt: skip
    time.sleep(0.45)
    cpu_us = _cpu_per_token(rival, backend, seconds - 0.6)
    found = {"streams": finish_load(running), "cpu_us": cpu_us}
    settle(rival, backend)
    return found


def _cpu_per_token(rival: Rival, backend: Backend, window_s: float) -> float:
    """Microseconds of CPU that the rival's processes use for each token that the backend sends meanwhile."""
    pids = rival.pids()
    cpu, tokens = cpu_s(pids), backend.stats()["tokens"]
    time.sleep(window_s)
    cpu, tokens = cpu_s(pids) - cpu, backend.stats()["tokens"] - tokens
    return cpu * 1e6 / max(1, tokens)


def plain(rival: Rival, backend: Backend, scale: Scale) -> Figures:
    """Sixteen callers at once that don't stream: requests a second."""
    found = load(
        rival.port, connections=16, no_stream=True, seconds=scale.s(2.0, rival), skip_ms=300, drain_ms=DRAIN_MS,
        prompt="bench:0,2,0,0", tokens=2,
    )  # fmt: skip
    settle(rival, backend)
    if not found["good"]:
        raise CannotMeasure("no answer came in time")
    return {"answers": found}


def settle(rival: Rival, backend: Backend) -> None:
    """Lets the last load's remains go, so that the next figure starts on a quiet machine."""
    if not backend.wait_idle():
        raise CannotMeasure(f"{rival.name} still runs {backend.stats()['running']} generations whose clients left")
    rival.wait_idle()


# ---- what only warmlane has ------------------------------------------------------------------------------------


def refusals(rival: Warmlane, tight: Backend, scale: Scale) -> Figures:
    """500 requests a second to a lane that is full: how fast each hears its 503."""
    holders = start_load(
        rival.port, connections=2, model="tight", seconds=60, prompt="bench:0,100000,20000,0", tokens=0
    )
    try:
        if not wait_until(lambda: tight.stats()["running"] == 1, 10):
            raise CannotMeasure("the tight lane's only slot was not taken")
        time.sleep(0.3)  # the second one waits in the lane by now
        return load(
            rival.port, connections=32, rate=500, model="tight", expect=503, tokens=0, skip_ms=200,
            seconds=scale.s(2.5, rival), drain_ms=DRAIN_MS,
        )  # fmt: skip
    finally:
        holders.kill()
        holders.communicate()
        tight.wait_idle()
        rival.wait_idle()


def claim_delay(rival: Warmlane, scale: Scale) -> Figures:
    """From a job's entry into its lane to its claim, by Redis' own clock.

    The job records hold whole milliseconds, so this listens to the commands (MONITOR) instead: the XADD to the
    lane inside `submit` and the XCLAIM inside `claim`. Listening itself makes both a little slower, never faster.
    """
    assert rival.redis is not None
    delays: list[float] = []
    stop = threading.Event()
    hearing = threading.Event()
    listener = threading.Thread(target=_hear_claims, args=(rival.redis.socket, delays, hearing, stop), daemon=True)
    listener.start()
    if not hearing.wait(5):
        raise CannotMeasure("Redis did not take MONITOR")
    load(rival.port, seconds=scale.s(3.0, rival), pause_us=8_000, drain_ms=DRAIN_MS, **SHORT)
    stop.set()
    listener.join(5)
    if len(delays) < 20:
        raise CannotMeasure(f"only {len(delays)} claims were heard")
    delays.sort()
    count = len(delays)
    return {"n": count, "p50": delays[count // 2], "p99": delays[int(count * 0.99)], "max": delays[-1]}


def _hear_claims(path: str, delays: list[float], hearing: threading.Event, stop: threading.Event) -> None:
    import redis

    submitted = 0.0
    with contextlib.closing(redis.Redis(unix_socket_path=path, socket_timeout=1.0)) as client, client.monitor() as ears:
        hearing.set()
        while not stop.is_set():
            try:
                heard = ears.next_command()
            except (redis.exceptions.TimeoutError, redis.exceptions.ConnectionError):
                return  # a second without a word: the load has ended
            words = heard["command"].split(" ", 2)
            if len(words) < 2 or ":lane:" not in words[1]:
                continue
            if words[0].upper() == "XADD":
                submitted = heard["time"]
            elif words[0].upper() == "XCLAIM" and submitted:
                delays.append((heard["time"] - submitted) * 1e6)
                submitted = 0.0


def stalled(rival: Warmlane, backend: Backend, scale: Scale) -> Figures:
    """Others' first token beside 8 clients that read, and beside 8 that stop reading after their first token.

    Each sends enough at once (25,000 tokens, about 5 MB) to fill every buffer on the way, then 50 tokens a second.
    """
    found: Figures = {}
    for name, stall in (("reading", False), ("stopped", True)):
        others = start_load(
            rival.port, connections=8, seconds=60, prompt="bench:0,1000000,20000,25000", tokens=0, stall=stall
        )
        try:
            if not wait_until(lambda: backend.stats()["running"] == 8, 10):
                raise CannotMeasure("the eight clients' streams did not start")
            wait_until(lambda: _tokens_in(backend, 0.3) < 1_000, 15)  # the burst is over, whoever took it
            found[name] = load(
                rival.port, seconds=scale.s(2.5, rival), pause_us=PROBE_PAUSE_US, drain_ms=DRAIN_MS, **SHORT
            )
        finally:
            others.kill()
            others.communicate()
        settle(rival, backend)
    return found


def _tokens_in(backend: Backend, seconds: float) -> int:
    before = backend.stats()["tokens"]
    time.sleep(seconds)
    return backend.stats()["tokens"] - before


def replay(rival: Warmlane, backend: Backend) -> Figures:
    """Whether the replay log of a job is, byte for byte, what its client got, and what that log costs in memory."""
    import redis

    assert rival.redis is not None
    got: list[tuple[str, bytes]] = []
    prompts = ["bench:0,200,2000,0"] * 8 + ["bench:0,500,0,0"] * 8
    threads = [threading.Thread(target=_read_stream, args=(rival.port, prompt, got)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    settle(rival, backend)
    equal, payload, memory, entries = 0, 0, 0, 0
    with contextlib.closing(redis.Redis(unix_socket_path=rival.redis.socket)) as client:
        for job_id, body in got:
            key = f"gw:job:{job_id}:frames"
            log = client.xrange(key)
            data = b"".join(fields[b"data"] for _, fields in log if fields[b"kind"] == b"content")
            # the terminal frame says how the job ended; the client hears it in its dialect's words
            ended = b"data: [DONE]\n\n" if log and log[-1][1][b"kind"] == b"done" else b""
            equal += bool(data) and data + ended == body
            payload, entries = payload + len(data), entries + len(log)
            memory += client.memory_usage(key, samples=0) or 0
    return {"streams": len(prompts), "equal": equal, "entries": entries, "memory_ratio": memory / max(1, payload)}


def _read_stream(port: int, prompt: str, got: list[tuple[str, bytes]]) -> None:
    body = json.dumps({"model": "bench", "stream": True, "messages": [{"role": "user", "content": prompt}]})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        job_id = answer.getheader("X-Gateway-Job") or ""
        lines = [line for line in answer.read().splitlines(keepends=True)]
    # Heartbeats are for the wire alone: a comment line and the empty line after it.
    kept, skip = [], False
    for line in lines:
        if line.startswith(b":"):
            skip = True
        elif skip and not line.strip():
            skip = False
        else:
            kept.append(line)
    got.append((job_id, b"".join(kept)))


def memory(rival: Rival) -> Figures:
    """Resident memory after the round's loads, in MB, whole and by part."""
    found = {"all": rss_mb(rival.pids())}
    if isinstance(rival, Warmlane):
        found |= {role: rss_mb(rival.pids(role)) for role in ("api", "worker", "scheduler", "redis")}
    return found
