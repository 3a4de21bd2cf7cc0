"""`gateway init`: looks at this machine and writes a starter policy."""

import asyncio
import importlib
import os
import shutil
from pathlib import Path
from typing import Annotated

import psutil
import typer

from api.cli_policy import USAGE, Failed
from api.discover import look_around
from api.gguf_files import USUAL_FOLDERS, find
from api.starter import Machine, starter
from api.status_table import size
from broker.policy import Policy


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("policy.yaml"),
    gguf_dir: Annotated[list[Path] | None, typer.Option(help="One more folder with GGUF files.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Writes a commented starter policy from the runtimes, GGUF files and memory of this machine."""
    if file.exists() and not force:
        raise Failed(f"{file} is there already; name another file, or say --force to replace it.", USAGE)
    for folder in gguf_dir or []:
        if not folder.is_dir():
            raise Failed(f"{folder} is no folder.", USAGE)
    files = find([*(gguf_dir or []), *map(Path, USUAL_FOLDERS)])
    made = starter(asyncio.run(look_around(os.environ)), files, _machine())
    policy = Policy.parse(made.text)
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(made.text)
    except OSError as problem:
        raise Failed(f"{file} can't be written: {problem.strerror}.", USAGE) from None
    for sentence in made.said:
        print(sentence)
    for warning in policy.warnings():
        print(f"warning: {warning}")
    print(f"wrote {file}: next, `gateway up --policy {file}`")


def _machine() -> Machine:
    gpu = _gpu_bytes()
    memory = gpu or psutil.virtual_memory().total
    words = f"{size(memory)} of {'GPU ' if gpu else ''}memory"
    return Machine(memory, words, has_llama_server=shutil.which("llama-server") is not None)


def _gpu_bytes() -> int:
    """Adds up the memory of the GPUs, 0 where there are none, or where they share the machine's."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:  # the extra `gpu` is not installed
        return 0
    try:
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return sum(int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return 0
