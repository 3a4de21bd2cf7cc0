"""The receiver of the docs, told of a job's end by a real gateway: it believes what the gateway signs."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateway_process import house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated

pytestmark = pytest.mark.real

RECEIVER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "webhook_receiver.py"
TOLD_S_MAX = 20.0


class Receiver:
    """The example as a process: where it listens, and what it has handled and refused."""

    def __init__(self, secret: str) -> None:
        self.handled: list[str] = []
        self.log: list[str] = []
        self._popen = subprocess.Popen(
            [sys.executable, str(RECEIVER), "0"],
            env={**os.environ, "WEBHOOK_SECRET": secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._popen.stderr is not None
        self.url = self._popen.stderr.readline().strip().removeprefix("listens on ")
        self._ears = [
            threading.Thread(target=self._listen, args=pair, daemon=True)
            for pair in ((self._popen.stdout, self.handled), (self._popen.stderr, self.log))
        ]
        for ear in self._ears:
            ear.start()

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for ear in self._ears:
            ear.join(5)
        for pipe in (self._popen.stdout, self._popen.stderr):
            assert pipe is not None
            pipe.close()

    @staticmethod
    def _listen(pipe: Iterator[str], lines: list[str]) -> None:
        for line in pipe:
            lines.append(line.rstrip("\n"))


@contextmanager
def receiver(secret: str) -> Iterator[Receiver]:
    running = Receiver(secret)
    try:
        yield running
    finally:
        running.close()


def test_the_receiver_believes_the_gateway(tmp_path: Path) -> None:
    """One with another secret refuses the same event, and prints nothing."""
    prompt = tmp_path / "prompt.md"
    prompt.write_text("hello")
    text = policy({"small": simulated(memoryMb=1)}, webhooks={"allow": ["127.0.0.1"]})
    with house(tmp_path / "data", policy=text) as up:
        up.until_state("small", "warm")
        secret = up.command("webhook", "secret", "new").stdout.strip()
        with receiver(secret) as ours, receiver("whsec_" + "b3RoZXIx" * 4) as stranger:
            ids = []
            for one in (ours, stranger):
                words = ("submit", "-m", "small", "-f", str(prompt), "--webhook", one.url, "--metadata", "build=17")
                ids.append(up.command(*words).stdout.strip())
            block_until(lambda: ours.handled, what="the event", timeout_s=TOLD_S_MAX)
            block_until(lambda: any("refused" in line for line in stranger.log), what="refused", timeout_s=TOLD_S_MAX)
            event = json.loads(ours.handled[0])
            assert (event["type"], event["data"]["id"]) == ("job.done", ids[0])
            assert event["data"]["metadata"] == {"build": "17"}
            assert stranger.handled == []
