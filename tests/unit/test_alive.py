"""Whether a part is alive: asked by supervisors every few seconds, so a wrong answer kills work or hides a fault."""

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import alive as asked
from broker.alive import BEAT_EVERY_S, SILENT_S_MAX, Pulse, file_of, why_not
from tests.unit.test_cli import Gateway, gateway

__all__ = ["gateway"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_part_is_alive_while_its_loop_comes_round(tmp_path: Path) -> None:
    clock = Clock()
    pulse = Pulse(tmp_path / "made", "worker", clock=clock)
    assert why_not(tmp_path / "made", "worker", now_s=clock.now).startswith("no worker runs on")
    pulse.beat()
    assert why_not(tmp_path / "made", "worker", now_s=clock.now + SILENT_S_MAX) == ""
    assert why_not(tmp_path / "made", "worker", now_s=clock.now + 40) == "the worker has been silent for 40 s"
    assert why_not(tmp_path / "made", "scheduler", now_s=clock.now).startswith("no scheduler runs on")
    clock.now += 40
    pulse.beat()
    assert why_not(tmp_path / "made", "worker", now_s=clock.now) == ""
    pulse.end()
    assert why_not(tmp_path / "made", "worker", now_s=clock.now) and list((tmp_path / "made").iterdir()) == []


def test_a_loop_that_turns_fast_writes_seldom(tmp_path: Path) -> None:
    clock = Clock()
    pulse = Pulse(tmp_path, "scheduler", clock=clock)
    pulse.beat()
    file_of(tmp_path, "scheduler").unlink()
    clock.now += BEAT_EVERY_S / 2
    pulse.beat()
    assert not file_of(tmp_path, "scheduler").exists()
    clock.now += BEAT_EVERY_S / 2
    pulse.beat()
    assert file_of(tmp_path, "scheduler").exists()


def test_what_a_part_left_before_the_machine_was_started_again_is_no_life(tmp_path: Path) -> None:
    Pulse(tmp_path, "worker", clock=Clock()).beat()
    assert "since this machine was started" in why_not(tmp_path, "worker", now_s=3.0)


def test_a_file_that_says_nothing_is_no_life(tmp_path: Path) -> None:
    file_of(tmp_path, "worker").write_text("")
    assert why_not(tmp_path, "worker", now_s=3.0).endswith("can't be read")


def test_a_directory_that_cannot_be_written_to_is_told_once_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    pulse = Pulse(tmp_path / "file", "worker", clock=clock)
    pulse.beat()
    clock.now += 2
    pulse.beat()
    pulse.end()
    assert [record.message.split()[0] for record in caplog.records] == ["event=alive_unwritten"]


def test_systemd_hears_that_a_part_is_ready_alive_and_at_its_end(tmp_path: Path) -> None:
    clock = Clock()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(5)
        pulse = Pulse(tmp_path, "worker", clock=clock, supervisor=str(tmp_path / "notify"))
        pulse.beat()
        clock.now += BEAT_EVERY_S
        pulse.beat()
        pulse.end()
        heard = [systemd.recv(100) for _ in range(3)]
    assert heard == [b"READY=1\nWATCHDOG=1"] * 2 + [b"STOPPING=1"]
    clock.now += BEAT_EVERY_S
    pulse.beat()  # a systemd that is gone stops nobody


class Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def bind() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"0.0.0.0:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_api_that_listens_everywhere_is_asked_from_here(bind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked.why_not("api", {"GATEWAY_BIND": bind}) == ""
    monkeypatch.setattr(Health, "status", 500)
    assert asked.why_not("api", {"GATEWAY_BIND": bind}).endswith("answers 500")


def test_an_api_that_is_not_there_is_not_alive() -> None:
    assert "does not answer" in asked.why_not("api", {"GATEWAY_BIND": "127.0.0.1:1"})
    assert asked.why_not("api", {"GATEWAY_BIND": "8400"}).endswith("is no host and port")


def test_the_parts_of_one_s_own_gateway_up_are_found(bind: str, tmp_path: Path, gateway: Gateway) -> None:
    """By the URL that it prints, and by the directory that it was given. A proxy's URL is not where the api listens."""
    url = f"http://127.0.0.1:{bind.rpartition(':')[2]}"
    assert asked.why_not("api", {"GATEWAY_URL": url + "/"}) == ""
    assert "at 127.0.0.1:1 does not" in asked.why_not("api", {"GATEWAY_URL": url, "GATEWAY_BIND": "127.0.0.1:1"})
    assert "at 127.0.0.1:8400" in asked.why_not("api", {"GATEWAY_URL": "https://gateway.example:443"})
    Pulse(tmp_path / "given", "worker").beat()
    assert gateway("alive", "worker", "--data", str(tmp_path / "given")).code == 0
    assert gateway("alive", "worker", "--data", str(tmp_path / "other")).code == 1


def test_a_part_that_does_not_exist_is_a_wrong_word(gateway: Gateway) -> None:
    ran = gateway("alive", "redis")
    assert (ran.code, ran.out) == (2, "") and "'redis' is none" in ran.err


def test_the_check_reads_little_of_the_gateway(tmp_path: Path) -> None:
    """It runs beside the models every few seconds: a second of CPU each time would be a tenth of a core."""
    code = (
        "import sys; from api.entry import main; sys.argv = ['gateway', 'alive', 'worker']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, {'typer', 'httpx', 'redis', 'pydantic', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"GATEWAY_STATE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.stdout.strip(), done.returncode) == ("1 set()", 0), done.stderr
    assert "no worker runs" in done.stderr
