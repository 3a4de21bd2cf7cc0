"""`gateway init`: looks at this machine and writes a starter policy."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from api.discover import look_around
from api.exit_codes import USAGE, Failed
from api.gguf_files import USUAL_FOLDERS, find
from api.machine import machine_memory, machine_memory_mb
from api.starter import Machine, starter
from api.status_table import size
from broker.policy import Policy


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("policy.yaml"),
    gguf_dir: Annotated[
        list[Path] | None, typer.Option(help="One more folder to look for GGUF files in, and below.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Writes a commented starter policy from the runtimes, GGUF files and memory of this machine."""
    if file.exists() and not force:
        raise Failed(f"{file} is there already; name another file, or say --force to replace it.", USAGE)
    for folder in gguf_dir or []:
        if not folder.is_dir():
            raise Failed(f"{folder} is no folder.", USAGE)
    files = find([*(gguf_dir or []), *map(Path, USUAL_FOLDERS)], flat=[Path()])
    made = starter(asyncio.run(look_around(os.environ)), files, _machine())
    policy = Policy.parse(made.text)
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(made.text)
    except OSError as problem:
        raise Failed(f"{file} can't be written: {problem.strerror}.", USAGE) from None
    for sentence in made.said:
        print(sentence)
    for warning in policy.warnings(host_memory_mb=machine_memory_mb()):
        print(f"warning: {warning}")
    print(f"wrote {file}: next, `gateway up --policy {file}`")


def _machine() -> Machine:
    memory, kind = machine_memory()
    return Machine(memory, f"{size(memory)} of {kind}", has_llama_server=shutil.which("llama-server") is not None)
