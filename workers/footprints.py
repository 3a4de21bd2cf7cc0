"""What each model of this host occupies of its memory or will occupy, and whether it can fit here at all."""

import asyncio
from collections.abc import Callable, Collection, Mapping

from broker.records import Learned, ModelFacts
from workers.learned import LearnedHere
from workers.memory import HostMemory, cannot_fit, predicted_bytes
from workers.meter import Meter, occupied_bytes
from workers.model_here import ModelHere
from workers.room import ROOM_WAIT_S, Look
from workers.runtimes.base import Runtime

FILE_SIZE_KEPT_S = 60.0


class Footprints:
    """Reads the host's memory, measures models that are loaded and predicts the others. Sizes in bytes."""

    def __init__(
        self,
        models: Mapping[str, ModelHere],
        learned: LearnedHere,
        *,
        memory_mb: int | None,
        facts: Callable[[str], ModelFacts],
    ) -> None:
        """`models` are those of this host; `memory_mb` is the limit that its settings name, None = what there is."""
        self._models = models
        self._learned = learned
        self._facts = facts
        self._meter = Meter(memory_mb)
        self._memory = HostMemory(0, 0)
        self._taken: Mapping[str, int] = {}  # as `_memory` was read, of it by loads under way
        self._file_sizes: dict[str, tuple[Runtime, float, int]] = {}  # until when a size holds
        self._occupied_before: dict[str, int] = {}
        self._left: list[tuple[float, int]] = []  # until when, size: unloaded models whose memory may be on its way

    def memory(self) -> HostMemory:
        """The host's memory as it was last read."""
        return self._meter.limited(self.held()) or self._memory

    def held(self) -> int:
        """What all models of this host occupy now."""
        return sum(model.memory_bytes for model in self._models.values())

    async def look(self, loading: Collection[str]) -> Look:
        """Reads the host's memory, and what the loads under way have taken of it."""
        limited = self._meter.limited(self.held())
        if limited is not None:
            return Look(limited)
        runtimes = {name: model.runtime for name, model in self._models.items() if model.runtime.local}
        look = await asyncio.to_thread(self._read, runtimes, set(loading))
        self._memory, self._taken = look.memory, look.taken
        return look

    def taken(self, loading: Collection[str]) -> int:
        """What these loads under way had taken when memory was last read."""
        return sum(self._taken.get(name, 0) for name in loading)

    async def occupied(self, name: str) -> int:
        """Measures what a loaded model takes of this host's memory; where nobody can tell, `memoryMb` is believed; 0 =
        nothing, or nothing is known."""
        model = self._models[name]
        runtime = model.runtime
        if not runtime.local:
            return 0
        gpus = await asyncio.to_thread(self._meter.gpus)
        told = await runtime.memory_bytes(of_gpus=bool(gpus.total)) or (model.model.memory_mb or 0) << 20
        on_gpu = gpus.held_by(await asyncio.to_thread(runtime.process_ids))
        return occupied_bytes(told, on_gpu, gpus_tell=bool(gpus.total))

    def learned(self, name: str) -> Learned:
        """What loads on this host have shown of a model as it is defined now."""
        model = self._models.get(name)
        return self._learned.of(name, model.model) if model is not None else Learned()

    async def inquire(self, model: ModelHere) -> None:
        """Finds out what a prediction needs: what was learned, and the size of the file where nothing else tells."""
        await self._learned.recall(model.name)
        now = asyncio.get_running_loop().time()
        runtime, until, _ = self._file_sizes.get(model.name, (None, 0.0, 0))
        if self._is_guessed(model) and (runtime is not model.runtime or until <= now):
            size = await model.runtime.file_bytes() or 0
            self._file_sizes[model.name] = model.runtime, now + FILE_SIZE_KEPT_S, size

    def need(self, model: ModelHere) -> int:
        """Predicts what a load will occupy; 0 = nothing is known."""
        runtime, _, size = self._file_sizes.get(model.name, (None, 0.0, 0))
        return predicted_bytes(
            learned_here=self.learned(model.name).footprint_bytes,
            memory_mb=model.model.memory_mb,
            learned_elsewhere=self._learned.elsewhere(self._facts(model.name), model.model),
            file_bytes=size if runtime is model.runtime else 0,
        )

    def unfit(self, model: ModelHere, look: Look) -> str:
        """Says why a model that is not in memory cannot fit at all, "" = it can, or is in memory, or it is no concern
        of this host's memory."""
        if model.state not in ("cold", "waking", "quarantined") or model.memory_bytes or not model.ours:
            return ""
        pinned = sum(m.memory_bytes for n, m in self._models.items() if self._facts(n).pinned)
        need, others = self.need(model), self.held() - pinned + sum(look.taken.values())
        returning = min(self._returning(), max(0, look.memory.total - look.memory.headroom - others))
        if not cannot_fit(
            need,
            headroom=look.memory.headroom,
            idle_could_leave=others,
            returning=returning,
            before=bool(model.unfit),
        ):
            return ""
        free, total = look.memory.headroom >> 20, look.memory.total >> 20
        words = f"{model.name} needs {need >> 20} MB; {free} MB are free and the other models could leave"
        words = f"{words} {others >> 20} MB, of {total} MB in all"
        if self._is_guessed(model):
            words += "; what it needs is guessed from its file, memoryMb in the policy would tell"
        return words

    def _is_guessed(self, model: ModelHere) -> bool:
        """Whether nothing but the model's file tells what it will occupy."""
        defined, learned = model.model, self.learned(model.name).footprint_bytes
        return not (learned or defined.memory_mb or self._learned.elsewhere(self._facts(model.name), defined))

    def _returning(self) -> int:
        """Memory of models that were unloaded a moment ago: it may not be back yet."""
        now = asyncio.get_running_loop().time()
        held = {name: model.memory_bytes for name, model in self._models.items()}
        for name, before in self._occupied_before.items():
            if held.get(name, 0) < before:
                self._left.append((now + ROOM_WAIT_S, before - held.get(name, 0)))
        self._occupied_before = held
        self._left = [(until, size) for until, size in self._left if until > now]
        return sum(size for _, size in self._left)

    def _read(self, runtimes: Mapping[str, Runtime], loading: Collection[str]) -> Look:
        pids = {name: runtime.process_ids() for name, runtime in runtimes.items()}
        gpus = self._meter.gpus()
        memory = self._meter.host(gpus, occupied=0, ours=[pid for ids in pids.values() for pid in ids])
        taken = {name: self._meter.held_by(pids[name], gpus) for name in loading if pids.get(name)}
        return Look(memory, taken)
