"""Looking inside a real gateway while its parts die: `inspect` and `logs` need none of them, `top` says who is away."""

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from api import cli
from tests.support.clients import user
from tests.support.gateway_process import House, environment, gateway_program, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

ASKED = {"model": "slow", "messages": user("zebra"), "max_tokens": 400, "stream": True}


def inside(up: House, *words: str) -> str:
    """What a command without the api tells; in this process, since each start of another takes its time."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.run([*words, "--data", str(up.data)])
    assert code == 0, out.getvalue()
    return out.getvalue()


@contextmanager
def screen(*words: str, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """A command on a terminal of its own, and what it has painted so far."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    settings = {"TERM": "xterm-256color", **settings}
    process = subprocess.Popen(
        [gateway_program(), *words], env=environment(**settings), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    painted: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 65_536):
                painted.append(piece)
        except OSError:  # how Linux says that nobody holds the other end
            pass

    eyes = threading.Thread(target=read, daemon=True)
    eyes.start()
    try:
        yield process, painted
        os.write(ours, b"q")
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        eyes.join(5)
        os.close(ours)


def test_what_is_inside_is_told_whoever_is_dead(tmp_path: Path) -> None:
    """A job runs while the worker is killed, then the api: its story has all of it, and never a word of the prompt."""
    models = {"slow": simulated(maxConcurrent=1, memoryMb=1, options={"decodeTps": 40})}
    with house(tmp_path / "data", policy=policy(models), GATEWAY_LOG_FORMAT="json") as up:
        up.until_said('"event": "model_state"', '"to": "warm"')
        with screen("top", GATEWAY_URL=up.url) as (_, painted):
            block_until(lambda: b"slow" in b"".join(painted), what="the screen shows the model", timeout_s=15)
        with httpx.stream("POST", f"{up.url}/v1/chat/completions", json=ASKED, timeout=30) as answer:
            job_id = answer.headers["x-gateway-job"]
            pieces = answer.iter_bytes()
            next(pieces)
            running = json.loads(inside(up, "inspect", "jobs", "--json"))["jobs"]
            assert [(job["id"], job["state"], job["model"]) for job in running] == [(job_id, "streaming", "slow")]
            up.kill_part("worker")
            for _ in pieces:
                pass
        block_until(lambda: "failed" in inside(up, "inspect", "job", job_id), what="the lost job has ended")
        told = inside(up, "logs", job_id)
        events = [(line.split()[2], line.split()[3]) for line in told.splitlines()[1:] if line[:2].isdigit()]
        job_only = [event for _, event in events if not event.startswith("~") and event != "overdue"]
        assert job_only == ["submit", "claim", "first_token", "recover"], told
        assert ("api", "submit") in events and ("worker", "claim") in events and ("worker", "~part_ended") in events
        assert "was killed by SIGKILL" in told and "outcome=failed" in told
        data = json.loads(inside(up, "logs", job_id, "--json"))
        assert data["record"] and [e["at_ms"] for e in data["entries"]] == sorted(e["at_ms"] for e in data["entries"])
        kept = list((up.data / "logs").glob("*.log"))
        assert {"api.log", "worker.log"} <= {path.name for path in kept}, "who says nothing has no file"
        assert all(path.stat().st_mode & 0o077 == 0 and "zebra" not in path.read_text() for path in kept)
        up.kill_part("api")
        lanes = inside(up, "inspect", "lanes")
        assert lanes.splitlines()[1].split()[:4] == ["slow", "slow", "interactive", "0/8"]
        assert "zebra" not in told + lanes + inside(up, "inspect", "job", job_id)
