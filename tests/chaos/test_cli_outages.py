"""Commands that wait for a job while the api dies under them: they go on where they were, to the letter."""

import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.gateway_process import House, environment, gateway_program, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated, words

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

TOKENS = 120
END_S_MAX = 60.0


class Submit:
    """`gateway submit` of one prompt, and what it has printed so far."""

    def __init__(self, up: House, prompt: Path, *more: str) -> None:
        self.out = ""
        self._popen = subprocess.Popen(
            [gateway_program(), "submit", "-m", "slow", "-f", str(prompt), "--max-tokens", str(TOKENS), *more],
            env=environment(GATEWAY_URL=up.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._ears = threading.Thread(target=self._listen, daemon=True)
        self._ears.start()

    def end(self) -> tuple[int, str]:
        """Waits for its end; gives exit code and what stands on stderr."""
        assert self._popen.stderr is not None
        code = self._popen.wait(END_S_MAX)
        self._ears.join(5)
        return code, self._popen.stderr.read()

    def interrupt(self) -> None:
        self._popen.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdout, self._popen.stderr):
            assert pipe is not None
            pipe.close()

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        while piece := self._popen.stdout.read(1):
            self.out += piece


def test_a_killed_api_is_a_pause(tmp_path: Path) -> None:
    """One follows the words, one waits for the whole; and Ctrl-C leaves the job, which can be come back to."""
    prompt = tmp_path / "prompt.md"
    prompt.write_text("go on")
    models = {"slow": simulated(maxConcurrent=3, memoryMb=1, options={"decodeTps": 25})}
    with house(tmp_path / "data", policy=policy(models)) as up:
        up.until_state("slow", "warm")
        commands = [Submit(up, prompt, *more) for more in (("--stream",), ("--wait",), ("--stream",))]
        streamed, waited, left = commands
        try:
            for one in (streamed, left):
                block_until(lambda one=one: len(one.out) > 30, what="some words", timeout_s=30)  # type: ignore[misc]
            left.interrupt()
            code, err = left.end()
            assert code == 130 and "goes on; `gateway job result --wait" in err
            up.kill_part("api")
            for one in (streamed, waited):
                code, said = one.end()
                assert (code, one.out) == (0, words(TOKENS) + "\n"), said
                assert said.count("\n") == 1 and "anew" not in said
            job_id = err.split("\n")[0].removeprefix("job ")
            assert up.command("job", "result", "--wait", job_id).stdout == words(TOKENS) + "\n"
            assert up.command("job", "tail", job_id).stdout == words(TOKENS) + "\n"
        finally:
            for one in commands:
                one.close()
