"""The receiver of the docs, against the reference sender of Standard Webhooks."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook

RECEIVER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "webhook_receiver.py"
SECRET, OTHER = "whsec_" + "c2VjcmV0" * 4, "whsec_" + "b3RoZXIx" * 4
NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
BODY = json.dumps({"type": "job.done", "data": {"id": "01J"}})

_spec = importlib.util.spec_from_file_location("webhook_receiver", RECEIVER)
assert _spec is not None and _spec.loader is not None
receiver: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(receiver)


def signed(*secrets: str, at: datetime = NOW, body: str = BODY, delivery: str = "msg_1") -> dict[str, str]:
    signatures = " ".join(Webhook(secret).sign(delivery, at, body) for secret in secrets)
    return {
        "webhook-id": delivery, "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": signatures,
    }  # fmt: skip


def check(headers: dict[str, str], *, secrets: tuple[str, ...] = (SECRET,), body: str = BODY) -> str:
    found: str = receiver.verify(secrets, headers, body.encode(), now_s=NOW.timestamp())
    return found


def test_what_the_reference_signs_is_believed() -> None:
    assert check(signed(SECRET)) == "msg_1"


@pytest.mark.parametrize("pair", [((OTHER, SECRET), (SECRET,)), ((SECRET,), (OTHER, SECRET)), ((OTHER,), (OTHER,))])
def test_while_a_secret_is_changed_either_will_do(pair: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """Several signatures on a delivery, several secrets with the receiver."""
    sent, known = pair
    assert check(signed(*sent), secrets=known) == "msg_1"


@pytest.mark.parametrize("off", [timedelta(seconds=-301), timedelta(seconds=301)])
def test_an_old_delivery_is_not_believed(off: timedelta) -> None:
    with pytest.raises(receiver.NotSigned, match="old"):
        check(signed(SECRET, at=NOW + off))
    assert check(signed(SECRET, at=NOW + off * 0.99)) == "msg_1"


def test_nothing_may_be_changed() -> None:
    """Neither the body, nor the id, nor the time, nor the scheme; and none of them may be missing."""
    good = signed(SECRET)
    with pytest.raises(receiver.NotSigned):
        check(good, body=BODY + " ")
    stamp = good["webhook-timestamp"]
    changed = [
        good | {"webhook-id": "msg_2"},
        good | {"webhook-timestamp": str(int(stamp) + 1)},
        good | {"webhook-timestamp": "soon"},
        good | {"webhook-signature": good["webhook-signature"].replace("v1,", "v2,")},
        good | {"webhook-signature": "v1,"},
        good | {"webhook-signature": "v1,ü"},
        signed(OTHER),
        *({name: value for name, value in good.items() if name != missing} for missing in good),
    ]
    for headers in changed:
        with pytest.raises(receiver.NotSigned):
            check(headers)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    process = subprocess.Popen(
        [sys.executable, str(RECEIVER), "0"],
        env={**os.environ, "WEBHOOK_SECRET": f"{OTHER} {SECRET}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    yield process.stderr.readline().strip().removeprefix("listens on "), process
    process.kill()
    process.communicate()


def test_the_receiver_answers_and_handles_each_event_once(running: tuple[str, "subprocess.Popen[str]"]) -> None:
    url, process = running
    now = datetime.now(UTC)

    def send(headers: dict[str, str], body: str = BODY) -> int:
        return httpx.post(url, content=body, headers=headers, timeout=10).status_code

    assert send(signed(SECRET, at=now)) == 204
    assert send(signed(SECRET, at=now)) == 204  # the same delivery again
    assert send(signed(SECRET, at=now), body=BODY + " ") == 400
    assert send({}) == 400
    other = json.dumps({"type": "job.failed"})
    assert send(signed(SECRET, at=now, body=other, delivery="msg_2"), body=other) == 204
    assert process.stdout is not None
    assert [json.loads(process.stdout.readline())["type"] for _ in range(2)] == ["job.done", "job.failed"]


def test_an_event_whose_handling_takes_long_is_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway waits for seconds only and delivers again: that is put off until the work is done, or has failed."""
    begun, go = threading.Semaphore(0), threading.Semaphore(0)
    handled: list[str] = []
    fails = [False, True]

    def slowly(event: dict[str, Any]) -> None:
        begun.release()
        assert go.acquire(timeout=20)
        if fails.pop():
            raise ValueError("it can't be handled now")
        handled.append(event["type"])

    class Quiet(receiver.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    class Ours(receiver.Receiver):
        secrets = (SECRET,)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(receiver, "handle", slowly)
    body = json.dumps({"type": "job.failed"})
    headers = signed(SECRET, at=datetime.now(UTC), body=body, delivery="msg_slow")

    def send() -> int:
        try:
            return httpx.post(
                f"http://127.0.0.1:{server.server_port}", content=body, headers=headers, timeout=20
            ).status_code
        except (httpx.RemoteProtocolError, httpx.ReadError):
            return 0

    with Quiet(("127.0.0.1", 0), Ours) as server, ThreadPoolExecutor(1) as other:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            for first_ends, left_to_do in ((0, True), (204, False)):
                first = other.submit(send)
                assert begun.acquire(timeout=20)
                assert send() == 503
                go.release()
                assert first.result(20) == first_ends and (not handled) == left_to_do
            assert send() == 204 and handled == ["job.failed"]
        finally:
            server.shutdown()
            serving.join()
