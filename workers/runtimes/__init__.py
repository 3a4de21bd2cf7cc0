"""The server programs that load weights and make tokens, each behind the same small protocol.

A runtime is imported only when a model asks for it, so that the simulated server, which lives in this package and
runs as a process of its own, starts fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.policy import Model
    from workers.runtimes.base import Runtime


def runtime_for(name: str, model: "Model", *, state_dir: Path) -> "Runtime":
    """Gives the runtime that serves one model of the policy; it starts and loads nothing yet."""
    match model.backend:
        case "llama.cpp" if model.url is not None:
            from workers.runtimes.llama_url import LlamaAtUrl

            return LlamaAtUrl(name, model, url=model.url, state_dir=state_dir)
        case "llama.cpp":
            from workers.runtimes.llama_server import LlamaServer

            return LlamaServer(name, model, state_dir=state_dir)
        case "ollama":
            from workers.runtimes.ollama import Ollama

            return Ollama(name, model)
        case "vllm":
            from workers.runtimes.vllm import Vllm

            return Vllm(name, model)
        case "simulated":
            from workers.runtimes.simulated import Simulated

            return Simulated(name, model, state_dir=state_dir)
        case "openai":
            from workers.runtimes.remote import Remote

            return Remote(name, model)
        case other:
            raise ValueError(f"model '{name}': no runtime for backend '{other}'")
