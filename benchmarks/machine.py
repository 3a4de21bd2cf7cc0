"""What the benchmark stands on: the machine's facts, the compiled pieces, processes and what they cost."""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warmlane" / "benchmarks"
LIFETIME_S = 1800
"""Our own C pieces end by themselves after this long, whatever happened to the script."""


class CannotMeasure(Exception):
    """A figure or a rival cannot be had here; the text says why."""


# ---- the pieces in C -------------------------------------------------------------------------------------------


def compiled(name: str) -> Path:
    """Gives the program made from NAME.c, compiling it where the source is newer."""
    source, program = HERE / f"{name}.c", CACHE / name
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotMeasure("a C compiler (cc) is needed; on Debian: apt-get install gcc libc6-dev")
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True)
    return program


def load(port: int, **options: float | int | str | bool) -> dict[str, Any]:
    """Runs the load generator to its end and gives its figures (microseconds)."""
    return finish_load(start_load(port, **options))


def start_load(port: int, **options: float | int | str | bool) -> subprocess.Popen[str]:
    """Starts the load generator; options are those of load.c with underscores."""
    args = [str(compiled("load")), "--port", str(port)]
    for name, value in options.items():
        if value is False:
            continue
        args.append(f"--{name.replace('_', '-')}")
        if value is not True:
            args.append(str(value))
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_load(process: subprocess.Popen[str], *, limit_s: float = 90) -> dict[str, Any]:
    """Waits for a load generator; what it complained about travels along as `complaints`."""
    try:
        out, complaints = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise CannotMeasure(f"the load generator did not end within {limit_s:g} s") from None
    if process.returncode:
        raise CannotMeasure(f"the load generator failed: {complaints.strip()[-300:]}")
    found = json.loads(out)
    for name in ("first", "total", "token"):
        if not found[name]["n"]:
            found[name] = {"n": 0}  # no sample, no percentile
    return {**found, "complaints": complaints.strip()[-900:]}


def ping(port: int, count: int, pause_us: int) -> dict[str, float]:
    """Times PING from C (microseconds)."""
    args = [str(compiled("ping")), str(port), str(count), str(pause_us)]
    ran = subprocess.run(args, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(ran.stdout))


class Backend:
    """The cheap runtime that everything is measured against."""

    def __init__(self, slots: int) -> None:
        args = [str(compiled("backend")), "0", str(slots), str(LIFETIME_S)]
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split()[1])

    def stats(self) -> dict[str, int]:
        """Tokens and requests so far, and how many generations run now."""
        return dict(get_json(f"http://127.0.0.1:{self.port}/stats"))

    def wait_idle(self, limit_s: float = 8.0) -> bool:
        """Waits until no generation runs; False if some still does."""
        return wait_until(lambda: self.stats()["running"] == 0, limit_s)

    def stop(self) -> None:
        """Ends it."""
        end_process(self.process)


# ---- small things ----------------------------------------------------------------------------------------------


def get_json(url: str, timeout_s: float = 5.0) -> Any:
    """Reads a JSON document."""
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return json.load(answer)


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def wait_until(condition: Any, limit_s: float, every_s: float = 0.05) -> bool:
    """Looks again and again until it is so; False when the time is up."""
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(every_s)
    return False


def free_port() -> int:
    """Gives a port of the loopback interface that nobody uses at the moment."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ---- processes -------------------------------------------------------------------------------------------------


def descendants(pid: int) -> Iterator[int]:
    """Gives a process and everything it started that lives."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    todo = [pid]
    while todo:
        one = todo.pop()
        yield one
        todo += children.get(one, [])


def command_line(pid: int) -> str:
    """Gives a process's command line; empty when it has gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def cpu_s(pids: Iterable[int]) -> float:
    """Gives the CPU time that these processes have used, threads that live included, to the nanosecond."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def rss_mb(pids: Iterable[int]) -> float:
    """Gives the resident memory of these processes in MB."""
    kb = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    kb += int(line.split()[1])
    return kb / 1024


def end_process(process: subprocess.Popen[Any], grace_s: float = 5.0) -> None:
    """Asks a process that we started to end, then ends it and what it had started."""
    if process.poll() is not None:
        return
    family = list(descendants(process.pid))
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
    for pid in family[1:]:
        with contextlib.suppress(OSError):
            os.kill(pid, 9)


# ---- facts -----------------------------------------------------------------------------------------------------


def facts() -> dict[str, str]:
    """Says what machine this is: figures without it mean little."""
    cpu = "unknown processor"
    with contextlib.suppress(OSError):
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else platform.processor() or cpu
    memory = ""
    with contextlib.suppress(OSError, IndexError):
        memory = f"{int(Path('/proc/meminfo').read_text().split()[1]) / 2**20:.1f} GiB"
    return {
        "processor": f"{len(os.sched_getaffinity(0))} x {cpu}",
        "memory": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load average": " ".join(f"{x:.2f}" for x in os.getloadavg()),
    }


def python_env() -> dict[str, str]:
    """An environment in which the rooms of the project can be imported by a child."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def gateway_command() -> list[str]:
    """How the gateway is started here: the installed script, else the module of the checkout."""
    script = Path(sys.executable).with_name("gateway")
    if script.exists():
        return [str(script)]
    if (ROOT / "api" / "cli.py").exists():
        return [sys.executable, "-m", "api.cli"]
    raise CannotMeasure("the `gateway` command is not installed and there is no api/cli.py")
