"""`gateway batch run` as a process that can be interrupted, and files for it whose answers are known."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.support.gateway_process import environment, gateway_program
from tests.support.telling_runtime import Told

END_S_MAX = 60.0


def line(custom_id: str, told: Told, *, model: str = "coder", **more: Any) -> str:
    """A request for a known answer, as a line of a batch."""
    body = {"model": model, "messages": [{"role": "user", "content": told.prompt}], **more}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def asked_for(count: int, *, pieces: int, ms: int) -> dict[str, Told]:
    """So many requests, by their custom_id."""
    return {f"request-{number}": Told(f"line-{number}", pieces, ms) for number in range(count)}


def read(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none if it is not there."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def text_of(output: dict[str, Any]) -> str:
    """What an output line answers."""
    assert output["response"]["status_code"] == 200 and output["error"] is None, output
    found: str = output["response"]["body"]["choices"][0]["message"]["content"]
    return found


class BatchCommand:
    """One run of the command."""

    def __init__(self, url: str, requests: Path, output: Path, *words: str, **settings: str) -> None:
        self.output = output
        self._popen = subprocess.Popen(
            [gateway_program(), "batch", "run", str(requests), "-o", str(output), *words],
            env=environment(GATEWAY_URL=url, **settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job ignores it, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.out = self.err = ""

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def begun(self) -> bool:
        """Whether it holds its output, and so would hear a signal."""
        try:
            with self.output.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._popen.pid, number)

    async def end(self, timeout_s: float = END_S_MAX) -> int:
        """Waits for its end and hears it out; gives the exit code, of a kill a negative one."""
        try:
            self.out, self.err = await asyncio.to_thread(self._popen.communicate, timeout=timeout_s)
        finally:
            self.kill()
        assert "Traceback" not in self.err, self.err
        return self._popen.returncode

    def kill(self) -> None:
        """Ends it whatever it does."""
        if self.running:
            self._popen.kill()
            self._popen.wait()
