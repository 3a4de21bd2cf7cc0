"""Two heavy models on real llama.cpp servers, with a cap for one: what /proc says about who was in memory when."""

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from broker import hosts
from broker.lifecycle import State
from tests.support.llama_server import llama_command
from tests.support.redis_server import RedisServer
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.worker_world import worker_world

pytestmark = pytest.mark.real

MEGABYTES = 120
CAP_MB = 300
"""Room for one: a file of 120 MB is expected to take 144, and with its process and buffers it takes about 190."""


LEAVES_LATE = """
import signal, subprocess, sys, time
server = subprocess.Popen(sys.argv[1:], process_group=0)
def leave(*_):
    time.sleep(1)
    server.terminate()
signal.signal(signal.SIGTERM, leave)
sys.exit(server.wait())
"""
"""A server that holds its memory for a second after it was told to go."""


class Watched:
    """Samples who holds which weights, from /proc and nothing of ours."""

    def __init__(self, *files: Path) -> None:
        self._files = {str(file): file.stem for file in files}
        self._known: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.alive: list[frozenset[str]] = []
        self.most_bytes = 0
        self.peak: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator["Watched"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            found: dict[str, int] = {}
            for pid in psutil.pids():
                name = self._holder(pid)
                if name is not None:
                    found[name] = found.get(name, 0) + _pss(pid)
            self.alive.append(frozenset(found))
            self.most_bytes = max(self.most_bytes, sum(found.values()))
            for name, size in found.items():
                self.peak[name] = max(self.peak.get(name, 0), size)

    def _holder(self, pid: int) -> str | None:
        try:
            if not self._known.get(pid):  # one that is just being started still has its parent's command line, or none
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                self._known[pid] = next((self._files[word] for word in words if word in self._files), "")
            return self._known[pid] or None if Path(f"/proc/{pid}/statm").read_text().split()[0] != "0" else None
        except OSError:
            return None


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' /proc")
async def test_the_second_heavy_model_waits_until_the_first_has_left(redis_server: RedisServer, tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "first.gguf", megabytes=MEGABYTES)
    second = Path(shutil.copyfile(first, tmp_path / "second.gguf"))
    command = [sys.executable, "-c", LEAVES_LATE, *llama_command()]
    keys = {"backend": "llama.cpp", "command": command, "contextTokens": 512, "minStayMs": 0}
    async with worker_world(redis_server.socket_url, tmp_path) as world:
        await world.apply({file.stem: {**keys, "model": str(file)} for file in (first, second)})
        with Watched(first, second).watching() as watched:
            host = await world.host(memory_mb=CAP_MB)
            served = [await (await world.submit(name)).end(60) for name in ("first", "second", "first")]
            footprints = {name: await hosts.learned_here(world.store, name, "gpu1") for name in ("first", "second")}
            memory = host.residents.footprints.memory()

    assert [(record.state, record.served_by) for record in served] == [
        (State.DONE, f"{name}@gpu1") for name in ("first", "second", "first")
    ]
    assert frozenset({"first", "second"}) not in watched.alive, "never both, not for a moment"
    turns = [names for names in watched.alive if names]
    order = [next(iter(names)) for n, names in enumerate(turns) if n == 0 or names != turns[n - 1]]
    assert order == ["first", "second", "first"]
    assert MEGABYTES * 1_000_000 < watched.most_bytes <= CAP_MB << 20
    for name, learned in footprints.items():
        assert learned.footprint_bytes == pytest.approx(watched.peak[name], rel=0.25), "what /proc says"
        assert learned.load_ms > 0
    assert (memory.source, memory.total) == ("limit", CAP_MB << 20)
    assert memory.used == pytest.approx(watched.peak["first"], rel=0.25)
