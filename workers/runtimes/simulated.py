"""The simulated runtime: a child process that behaves like a llama-server and says "simulated" in every answer.

It has no weights. It exists so that the gateway runs, and can be judged, on a machine without a model, and so that
tests can ask for every way in which a runtime fails.
"""

import asyncio
import os
import re
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from workers.runtimes.base import STATE_TIMEOUT_S
from workers.runtimes.llama_server import LlamaServer

if TYPE_CHECKING:
    from broker.policy import Model

SERVER = "workers.runtimes.simulated_server"
PROCESS_BYTES = 32 << 20


class Simulated(LlamaServer):
    """A simulated model; `options` of the policy become the server's flags (`coldStartMs` or `cold_start_ms`)."""

    def __init__(self, name: str, model: "Model", *, state_dir: Path) -> None:
        super().__init__(name, model, state_dir=state_dir)
        options = {_flag(key): value for key, value in model.options.items()}
        self._memory_mb = model.memory_mb or options.get("memory-mb")
        self._options = {"parallel": model.max_concurrent, **options}
        if model.context_tokens:
            self._options.setdefault("context", model.context_tokens)
        if model.embeddings:
            self._options.setdefault("embeddings", True)

    @property
    def kind(self) -> str:
        return "simulated"

    async def progress(self) -> float | None:
        """Asks the server, which alone knows how long it means to pretend."""
        if self._child is None or not self._child.running:
            return None
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                stats = (await self._client.get(f"{self._base_url}/simulated/stats")).json()
        except (httpx.HTTPError, TimeoutError, ValueError):
            return None
        return float(stats["loaded_share"])

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        """Gives the figure that the policy pretends; the process itself needs next to nothing."""
        if await self.state() != "loaded":
            return None
        return int(self._memory_mb * 1024 * 1024) if self._memory_mb else await super().memory_bytes(of_gpus=of_gpus)

    async def file_bytes(self) -> int | None:
        """There is no file; a Python that pretends takes about this much."""
        return PROCESS_BYTES

    def _command(self, port: int) -> list[str]:
        command = [sys.executable, "-P", "-m", SERVER, "--port", str(port), "--model", self._model.model]
        for flag, value in self._options.items():
            if value is True:
                command.append(f"--{flag}")
            elif value is not False and value is not None:
                command += [f"--{flag}", str(value)]
        return command

    def _lacking_file(self, argv: Sequence[str]) -> str:
        """A simulated model has no file."""
        return ""

    def _environment(self) -> Mapping[str, str]:
        """Leads the child to this very package, in a checkout that nobody installed and from any directory."""
        root = str(Path(__file__).resolve().parents[2])
        installed = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
        if root in installed:
            return {}
        return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def _flag(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"-\1", key).replace("_", "-").lower()
