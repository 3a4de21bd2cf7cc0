"""The clients that every test of this folder runs with. A new one is a driver, its pins, and a row here.

A client is in the ordinary run when its environment costs little: the SDKs install in seconds. litellm and aider bring
hundreds of megabytes and a minute or two, so theirs is the long run.
"""

import json
import os
import queue
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.clients import environments

EVERYTHING = frozenset({"chat", "stream", "schema", "tools", "reasoning", "embed", "cancel", "late error"})
STAINLESS = EVERYTHING | {"timeout", "come back"}  # these say their timeout, and with each try which one it is
MESSAGES = STAINLESS - {"schema", "embed"} | {"models"}
ANSWER_S_MAX = 100.0


@dataclass(frozen=True)
class Client:
    """One row: which program drives it, what it can, and how its own errors are called."""

    name: str
    driver: str
    missing: str  # what it raises for a model that nobody serves
    late: str = ""  # what it raises for an error after the first token
    can: frozenset[str] = EVERYTHING
    retries: bool = True
    path: str = "/v1/chat/completions"
    long: bool = False

    @property
    def is_node(self) -> bool:
        return self.driver.endswith(".mjs")


CLIENTS = [
    Client("openai-python", "openai_python.py", "NotFoundError", "APIError", can=STAINLESS),
    Client("openai-node", "openai_node.mjs", "NotFoundError", "APIError", can=STAINLESS),
    Client("ai-sdk", "ai_sdk.mjs", "APICallError", "object"),
    Client(
        "anthropic-python", "anthropic_python.py", "NotFoundError", "APIStatusError", can=MESSAGES, path="/v1/messages"
    ),
    Client("anthropic-node", "anthropic_node.mjs", "NotFoundError", "APIError", can=MESSAGES, path="/v1/messages"),
    Client(
        "ollama-python",
        "ollama_python.py",
        "ResponseError",
        "ResponseError",
        retries=False,
        path="/api/chat",
    ),
    Client("ollama-js", "ollama_js.mjs", "ResponseError", "Error", retries=False, path="/api/chat"),
    Client("litellm", "litellm_python.py", "NotFoundError", "MidStreamFallbackError", long=True),
    Client("aider", "aider_command.py", "NotFoundError", can=frozenset({"chat", "stream"}), long=True),
]


def rows(*needs: str, slow: bool = False) -> list[Any]:
    """The clients that can all of this, as parameters of a test; `slow` puts every one into the long run."""
    found = [client for client in CLIENTS if set(needs) <= client.can]
    return [pytest.param(c, id=c.name, marks=[pytest.mark.long] if slow or c.long else []) for c in found]


class Driver:
    """A client at work in a process of its own; it takes one order after another."""

    def __init__(self, client: Client, place: Path) -> None:
        self._log = place / "stderr"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                _command(client, place), cwd=place, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._ears = threading.Thread(target=self._listen, name=f"ears of {client.name}", daemon=True)
        self._ears.start()

    def order(self, do: str, url: str, model: str, *, max_tokens: int = 12, **more: Any) -> None:
        """Tells it what to do; `hear` gives what it sees."""
        assert self._popen.stdin is not None
        told = {"do": do, "url": url, "model": model, "max_tokens": max_tokens, **more}
        self._popen.stdin.write(json.dumps(told) + "\n")
        self._popen.stdin.flush()

    def hear(self, timeout_s: float = ANSWER_S_MAX) -> "Seen":
        """Everything that it saw of the last order."""
        seen = Seen()
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                pytest.fail(f"nothing for {timeout_s:g} s; so far {seen.events}; {self._log.read_text()[-2000:]}")
            assert line is not None, f"the driver ended: {self._log.read_text()[-3000:]}"
            event = json.loads(line)
            if event["saw"] == "end":
                return seen
            seen.events.append(event)

    def run(self, do: str, url: str, model: str, **more: Any) -> "Seen":
        """Orders, and gives what it saw."""
        self.order(do, url, model, **more)
        return self.hear()

    def close(self) -> None:
        """Ends it: its orders end."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._ears.join(5)
        self._popen.stdout.close()

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._lines.put(line)
        self._lines.put(None)


@dataclass
class Seen:
    """What a client showed of one request."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["saw"] == kind]

    @property
    def answer(self) -> dict[str, Any]:
        """The one answer that it ended with, and no error."""
        assert not self.of("error"), self.events
        [answer] = self.of("answer")
        return answer

    @property
    def error(self) -> dict[str, Any]:
        """The one error that it ended with, and no answer."""
        assert not self.of("answer"), self.events
        [error] = self.of("error")
        return error

    @property
    def pieces(self) -> str:
        return "".join(event["text"] for event in self.of("piece"))


def _command(client: Client, place: Path) -> list[str]:
    if client.is_node:
        # A module looks for packages above itself, so it lies beside them for the test.
        (place / "node_modules").symlink_to(environments.project_of(client.name) / "node_modules")
        for file in environments.DRIVERS.glob("*.mjs"):
            shutil.copy(file, place)
        return [environments.node(), str(place / client.driver)]
    python = environments.python_of(client.name)
    return [str(python), str(environments.DRIVERS / client.driver)]
