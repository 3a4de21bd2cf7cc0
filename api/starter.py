"""Writes a starter policy from what a machine has: which model to keep warm, who helps out, and why. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from api.discover import FoundRuntime, aliases_of, is_usable, keys_of, quoted
from api.gguf_files import GgufFile
from api.status_table import size
from broker.policy.warm_together import FILE_SHARE

USABLE = 0.9
"""Of the machine's memory, what models may have."""

CONTEXT_TOKENS = 16_384


@dataclass(frozen=True)
class Machine:
    """What models can be loaded into, and with what."""

    memory_bytes: int
    memory_words: str  # "24.0G of GPU memory"
    has_llama_server: bool = True


@dataclass(frozen=True)
class Starter:
    """The file's text, and what a person should know about it, one sentence each."""

    text: str
    said: tuple[str, ...]


@dataclass(frozen=True)
class _Offer:
    """One model that could be served."""

    name: str
    backend: str
    url: str
    where: str
    size_bytes: int
    generates: bool
    key: str = ""
    alias: str = ""

    @property
    def needs(self) -> int:
        """What it should occupy once loaded, in bytes; 0 = not known."""
        return int(self.size_bytes * FILE_SHARE)


def starter(found: Sequence[FoundRuntime], files: Sequence[GgufFile], machine: Machine) -> Starter:
    """Writes a policy that `policy check` takes, whatever was found."""
    said = [_runtime_words(runtime) for runtime in found]
    if files:
        said.append(f"found {len(files)} GGUF file{'s'[: len(files) != 1]}")
    said.append(f"this machine has {machine.memory_words}")
    every = [*_offers(found), *_file_offers(files)]
    usable = [offer for offer in every if is_usable(offer.name)]
    if len(usable) < len(every):
        said.append(f"left out {len(every) - len(usable)} whose names nobody can type")
    if not usable:
        said.append(_NOTHING)
        return Starter(_SIMULATED, tuple(said))
    offers = _named(usable)
    warm, why = _to_keep_warm(offers, machine)
    helper = _helper(offers, warm, machine)
    said.append(why)
    if helper is not None:
        said.append(f"{helper.key} fits beside it, is kept warm too, and takes jobs that waited too long")
    if not machine.has_llama_server and any(offer.backend == "llama.cpp" and not offer.url for offer in offers):
        said.append("no llama-server is on the PATH: install it, or name one in `command:`")
    lines = [*_HEAD, f"# {why}", "models:"]
    for offer in offers:
        lines += _entry(offer, warm, helper)
    lines += ["", *_TAIL]
    return Starter("\n".join(lines) + "\n", tuple(said))


def _runtime_words(runtime: FoundRuntime) -> str:
    count = len(runtime.models)
    return f"{runtime.title} answers at {runtime.url} with {count} model{'s'[: count != 1]}"


def _offers(found: Sequence[FoundRuntime]) -> list[_Offer]:
    return [
        _Offer(model.name, runtime.backend, runtime.url, runtime.title, model.size_bytes, model.generates)
        for runtime in found
        for model in runtime.models
    ]


def _file_offers(files: Sequence[GgufFile]) -> list[_Offer]:
    return [_Offer(file.path, "llama.cpp", "", "a file", file.size_bytes, file.generates) for file in files]


def _named(offers: list[_Offer]) -> list[_Offer]:
    names = [offer.name for offer in offers]
    keys = keys_of(names)
    aliases = aliases_of(names, keys)
    return [
        _Offer(o.name, o.backend, o.url, o.where, o.size_bytes, o.generates, key, alias)
        for o, key, alias in zip(offers, keys, aliases, strict=True)
    ]


def _to_keep_warm(offers: list[_Offer], machine: Machine) -> tuple[_Offer, str]:
    """Chooses the one model to keep warm: the largest coder that fits, else the largest model that fits."""
    room = int(machine.memory_bytes * USABLE)
    writers = [offer for offer in offers if offer.generates] or offers
    fit = [offer for offer in writers if offer.needs <= room]
    coders = [offer for offer in fit if "cod" in offer.name.lower()]
    if not fit:
        best = min(writers, key=lambda offer: offer.needs)
        return best, f"{best.key} is kept warm: the smallest, because none is sure to fit into {machine.memory_words}"
    best = max(coders or fit, key=lambda offer: offer.needs)
    kind = "coder" if coders else "model"
    needs = f", about {size(best.needs)}" if best.needs else ""
    return best, f"{best.key} is kept warm: the largest {kind} that fits into {machine.memory_words}{needs}"


def _helper(offers: list[_Offer], warm: _Offer, machine: Machine) -> _Offer | None:
    """Chooses the fallback: the smallest writer that is sure to fit beside the warm one."""
    room = int(machine.memory_bytes * USABLE) - warm.needs
    able = [o for o in offers if o.generates and o is not warm and 0 < o.needs <= room and warm.needs]
    return min(able, key=lambda offer: offer.needs, default=None)


def _entry(offer: _Offer, warm: _Offer, helper: _Offer | None) -> list[str]:
    needs = f", {size(offer.size_bytes)} of weights" if offer.size_bytes else ""
    lines = [
        f"  {quoted(offer.key)}:  # from {offer.where}{needs}{'' if offer.generates else ', embeddings'}",
        f"    backend: {offer.backend}",
        f"    model: {quoted(offer.name)}",
    ]
    if offer.url:
        lines.append(f"    url: {quoted(offer.url)}")
    if offer.alias and offer.url:  # nobody asks for a file by its path
        lines.append(f"    aliases: [{quoted(offer.alias)}]  # clients may ask for it by this name too")
    if offer is warm or offer is helper:
        lines.append("    keepWarm: true")
    if offer.backend == "llama.cpp" and not offer.url:
        lines.append(f"    contextTokens: {CONTEXT_TOKENS}  # the longest prompt plus answer; more needs more memory")
        lines.append("    maxConcurrent: 1  # slots: answers at once, each with a context of its own")
    if offer.generates and helper is not None and offer is not helper:
        lines.append(f"    fallback: {quoted(helper.key)}  # takes jobs that waited for coldStartBudgetMs")
    return lines


_HEAD = [
    "# A starter policy by `gateway init`. Change what you like, then: gateway policy check FILE,",
    "# gateway up --policy FILE, and while it runs: gateway policy apply FILE.",
]
_TAIL = [
    "# Per model, when the defaults don't suit:",
    "#   maxConcurrent: 1          answers at once; with Ollama raise OLLAMA_NUM_PARALLEL too",
    "#   maxQueue: 8               jobs that may wait; one more is refused, or goes to the fallback",
    "#   coldStartBudgetMs: 25000  how long a job waits before it tries the fallback",
    "#   idleUnloadMs: 900000      unload after this long without work, unless kept warm",
    "# A name that clients ask for can lead to a model:",
    "#   routing:",
    "#     - match: { lane: fast-edit }",
    "#       target: the-small-model",
]
_NOTHING = (
    "nothing to serve was found, so the policy holds a simulated model; start Ollama, llama-server or vLLM, or name a "
    "folder of GGUF files with --gguf-dir"
)
_SIMULATED = "\n".join(
    [
        *_HEAD,
        "# Nothing to serve was found here, so a simulated model plays the part: its answers mean nothing.",
        "models:",
        "  simulated:",
        "    backend: simulated",
        "    model: simulated",
        "    keepWarm: true",
        "    maxConcurrent: 2",
        "",
        *_TAIL,
        "",
    ]
)
