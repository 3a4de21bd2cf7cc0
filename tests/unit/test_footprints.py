"""Whether a model can fit on this host at all, by what is known of the others' memory."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from broker.policy import Model
from broker.records import Learned, ModelFacts
from broker.store import Store
from workers.footprints import Footprints
from workers.learned import LearnedHere
from workers.memory import HostMemory
from workers.model_here import ModelHere
from workers.room import Look

MB = 1 << 20


class File:
    """A runtime of which only its file is known."""

    local = manageable = True

    def __init__(self, size_mb: int = 0) -> None:
        self.size_mb = size_mb
        self.asked = 0

    async def file_bytes(self) -> int:
        self.asked += 1
        return self.size_mb * MB


def here(name: str, *, holds_mb: int = 0, memory_mb: int | None = None, file: File | None = None) -> Any:
    model = Model.model_validate({"backend": "simulated", "model": name, "memoryMb": memory_mb})
    return SimpleNamespace(
        name=name, model=model, state="warm" if holds_mb else "cold", memory_bytes=holds_mb * MB, unfit="",
        ours=True, runtime=file or File(),
    )  # fmt: skip


def footprints(*models: Any, pinned: str = "") -> Footprints:
    learned = LearnedHere(cast(Store, None), "gpu1")
    learned._known = {model.name: Learned() for model in models}
    by_name = {model.name: cast(ModelHere, model) for model in models}
    return Footprints(by_name, learned, memory_mb=None, facts=lambda name: ModelFacts(pinned=name == pinned))


def look(total_mb: int, used_mb: int) -> Look:
    return Look(HostMemory(total_mb * MB, used_mb * MB))


async def test_what_the_others_hold_makes_a_model_unfit_only_where_it_is_pinned() -> None:
    big, other = here("big", memory_mb=700), here("other", holds_mb=600)
    assert footprints(big, other).unfit(big, look(1000, 600)) == ""
    words = footprints(big, other, pinned="other").unfit(big, look(1000, 600))
    assert words == "big needs 700 MB; 400 MB are free and the other models could leave 0 MB, of 1000 MB in all"


async def test_memory_on_its_way_back_counts_for_a_while() -> None:
    big, other = here("big", memory_mb=700), here("other", holds_mb=600)
    found = footprints(big, other)
    assert found.unfit(big, look(1000, 600)) == ""
    other.memory_bytes, other.state = 0, "cold"
    assert found.unfit(big, look(1000, 600)) == "", "it was unloaded a moment ago"
    assert footprints(big, other).unfit(big, look(1000, 600)) != ""


@pytest.mark.parametrize("changed", [{"state": "warm"}, {"memory_bytes": 1}, {"ours": False}])
async def test_what_is_in_memory_or_is_not_ours_is_never_unfit(changed: dict[str, Any]) -> None:
    big = here("big", memory_mb=7000)
    found = footprints(big)
    assert found.unfit(big, look(1000, 0)) != ""
    vars(big).update(changed)
    assert found.unfit(big, look(1000, 0)) == ""


async def test_a_guess_from_the_file_is_said_to_be_one_and_the_file_is_asked_once() -> None:
    file = File(1000)
    big = here("big", file=file)
    found = footprints(big)
    assert found.need(big) == 0 and found.unfit(big, look(1000, 0)) == ""
    await found.inquire(big)
    await found.inquire(big)
    assert file.asked == 1
    assert found.unfit(big, look(1000, 0)).endswith("memoryMb in the policy would tell")
    big.runtime = File(2000)
    assert found.need(big) == 0, "what another runtime would load is not known yet"
    await found.inquire(big)
    assert found.need(big) == int(2000 * MB * 1.2)


async def test_where_memory_mb_tells_no_file_is_asked() -> None:
    file = File(1000)
    big = here("big", memory_mb=5, file=file)
    found = footprints(big)
    await found.inquire(big)
    assert (found.need(big), file.asked) == (5 * MB, 0)
