"""Finds GGUF files in the folders where people keep them."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

USUAL_FOLDERS = (
    "~/models",
    "~/.cache/llama.cpp",
    "~/.cache/huggingface/hub",
    "~/.lmstudio/models",
    "~/.cache/lm-studio/models",
    "/models",
    "/srv/models",
    "/opt/models",
)
FILES_MAX = 20
"""More files than this aren't taken: write a policy and choose."""

ENTRIES_MAX = 20_000
"""So many names are looked at in all: a folder may be a whole disk."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_NO_MODEL = re.compile(r"mmproj|ggml-vocab|imatrix|-lora", re.IGNORECASE)
_EMBEDS = re.compile(r"embed|bert|\bbge\b|\be5\b|\bgte\b|rerank", re.IGNORECASE)


@dataclass(frozen=True)
class GgufFile:
    """Weights on the disk; of a file in shards the first one's path and the size of all."""

    path: str
    size_bytes: int
    generates: bool = True


def find(folders: Iterable[Path], *, flat: Iterable[Path] = ()) -> list[GgufFile]:
    """Gives what lies in these folders and below them, and in the `flat` ones themselves, by path, FILES_MAX at most; a
    file that two names lead to is taken once."""
    found: dict[str, GgufFile] = {}
    seen: set[tuple[int, int]] = set()
    for path in (*_files(folders), *_in_them(flat)):
        shard = _SHARD.search(path.name)
        if _NO_MODEL.search(path.name) or (shard and int(shard.group(1)) != 1):
            continue
        try:
            status = path.stat()
            size = _whole_size(path, shard) if shard else status.st_size
        except OSError:  # a link that leads nowhere
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            found[str(path)] = GgufFile(str(path), size, generates=not _EMBEDS.search(path.name))
        if len(found) == FILES_MAX:
            break
    return list(found.values())


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    left = ENTRIES_MAX
    for folder in folders:
        for place, below, names in os.walk(folder.expanduser().absolute()):
            below.sort()
            left -= len(names) + len(below)
            if left < 0:
                return
            for name in sorted(names):
                if name.lower().endswith(".gguf"):
                    yield Path(place) / name


def _in_them(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        with contextlib.suppress(OSError):
            yield from sorted(path for path in folder.absolute().iterdir() if path.suffix.lower() == ".gguf")


def _whole_size(path: Path, shard: re.Match[str]) -> int:
    """Adds up the shards that are there."""
    stem, count = path.name[: shard.start()], int(shard.group(2))
    sizes = 0
    for number in range(1, min(count, 1000) + 1):
        one = path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")
        sizes += one.stat().st_size if one.exists() else 0
    return sizes
