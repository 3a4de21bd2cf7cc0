"""A lane that a policy change leads to another model, with a real worker behind it."""

from pathlib import Path
from typing import Any

import pytest

from broker.lifecycle import State
from tests.support.redis_server import RedisServer
from tests.support.worker_world import simulated, words, worker_world

pytestmark = pytest.mark.real


async def test_who_waits_in_a_lane_is_served_by_the_model_that_it_leads_to_now(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """The job came for a model that never gets warm; the answer, the record and the host's word name the other."""
    models = {"cold": simulated(memoryMb=1, options={"coldStartMs": 600_000}), "warm": simulated(memoryMb=1)}

    def led_to(target: str) -> dict[str, Any]:
        return {"side": {"target": target, "fallback": None}}

    async with worker_world(redis_server.url, tmp_path) as world:
        await world.apply(models, lanes=led_to("cold"))
        await world.host()
        await world.until_model("warm", "warm")
        asked = await world.submit("side", tokens=3)
        assert (await asked.record()).model == "cold"
        await world.apply(models, lanes=led_to("warm"))
        record = await asked.end(timeout_s=5)
        assert (record.state, record.lane, record.model) == (State.DONE, "side", "warm")
        assert (record.served_by, asked.models, asked.text) == ("warm@gpu1", {"warm"}, words(3))
