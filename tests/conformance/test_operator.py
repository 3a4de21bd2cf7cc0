"""What an operator does by hand, against a whole gateway: the command line, HTTP, the broker and a real worker."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.clients import user
from tests.support.gateway_process import House, house
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated
from tests.unit.test_cli import Gateway, gateway

__all__ = ["gateway"]

pytestmark = pytest.mark.real

MODELS = {
    "big": simulated(memoryMb=50, maxConcurrent=2, options={"decodeTps": 10}),
    "small": simulated(keepWarm=False, memoryMb=50, options={"coldStartMs": 400}),
    "gone": simulated(keepWarm=False, memoryMb=50, options={"loadFails": -1}),
}


def test_an_operators_morning(tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm, pin, unload, a model that cannot load, and a drain with an answer under way."""

    def said(*words: str, code: int = 0) -> str:
        ran = gateway(*words)
        assert ran.code == code, (ran.out, ran.err)
        return (ran.out if code == 0 else ran.err).strip()

    monkeypatch.delenv("GATEWAY_KEY", raising=False)
    with house(tmp_path / "data", policy=policy(MODELS), GATEWAY_HOST_NAME="box") as up:
        monkeypatch.setenv("GATEWAY_URL", up.url)
        assert said("model", "warm", "big").startswith("big is warm: first token after ")
        assert said("model", "warm", "small").startswith("small is warm: first token after ")
        assert _model(up, "small")["last_load_ms"] >= 400
        assert "the load fails" in said("model", "warm", "gone", code=1)
        assert said("model", "pin", "small") == "small is pinned until `gateway model unpin small`"
        assert _model(up, "small")["pinned"] and "note: small is pinned" in said("status")

        assert said("model", "unload", "big").startswith("big is cold and stays so until somebody asks for it")
        assert _model(up, "big")["state"] == "cold"
        asked: dict[str, Any] = {"model": "big", "messages": user("hold"), "max_tokens": 5000, "stream": True}
        with (
            httpx.Client(timeout=30) as http,
            http.stream("POST", f"{up.url}/v1/chat/completions", json=asked) as answer,
        ):
            pieces = answer.iter_lines()  # let go of, it would hang up
            next(pieces)  # its model was woken by the request
            block_until(lambda: _model(up, "big")["slots_used"] == 1, what="the heartbeat tells of the slot")
            assert "at work in 1 slot" in said("model", "unload", "big", code=1)
            assert "takes no more work, and 1 slot is still at work" in said("drain", "box", "--wait", "0", code=1)
            assert "did you mean box?" in said("drain", "bxo", code=1)
            refused = http.post(f"{up.url}/v1/chat/completions", json={**asked, "stream": False})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
            assert any(line.startswith("data: ") for line in pieces), "what runs goes on"
        assert said("drain", "box") == "box is drained: it takes no work until `gateway undrain box`"
        assert "host: box draining (nothing runs)" in said("status")
        assert said("undrain", "box") == "box takes work again"
        assert said("model", "warm", "big").startswith("big is warm")
        wide = said("status", "--wide").splitlines()
        assert wide[0].split() == "MODEL STATE FIRST TOKEN QUEUE MEM SLOTS LAST LOAD CACHED".split()


def _model(up: House, name: str) -> dict[str, Any]:
    models = httpx.get(f"{up.url}/v1/status").json()["models"]
    return next(model for model in models if model["name"] == name)
