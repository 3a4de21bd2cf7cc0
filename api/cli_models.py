"""`gateway model`, `drain`, `undrain`: what an operator asks of models and hosts.

The api notes or passes on the wish; then the command looks at the status until it shows the outcome, for a while that
has a name, and says it in one sentence.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from api.cli_policy import AsJson
from api.client import ask, part, snapshot_of
from api.exit_codes import Failed
from api.status_table import duration, loading
from api.terminal import harmless
from broker.status import HostStatus, ModelStatus, Snapshot, stays_cold

WARM_S_MAX = 330.0
"""How long `model warm` waits for the first token: the longest wake by default, and a little."""

UNLOAD_S_MAX = 60.0
DRAIN_S_MAX = 60.0
LOOK_EVERY_S = 0.3
NO_ROOM_S_MAX = 10.0
"""A model that is cold for a reason for so long, though it was asked for, will not be warm soon."""

model_app = typer.Typer(help="What may be asked for, and what an operator does with it.", no_args_is_help=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A model, or any other name that leads to it.", show_default=False)
]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="A host as `gateway status` shows it.")]


@model_app.command("list")
def model_list(as_json: AsJson = False) -> None:
    """Lists every name that a client may ask for."""
    told = asyncio.run(ask("GET", "/v1/models"))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for model in told["data"]:
        print(model["id"])


@model_app.command("warm")
def model_warm(
    name: Name,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for it.", min=0)] = WARM_S_MAX,
) -> None:
    """Wakes a model and waits until it has given a first token."""

    async def run() -> str:
        model = (await _wish(name, "warm"))["name"]

        def outcome(shown: Snapshot, waited_s: float) -> str | None:
            found = _model(shown, model)
            aside = [h for h in shown.hosts if (h.draining or h.policy_unread) and h.name in found.hosts]
            if found.state == "cold" and len(aside) == len(found.hosts):
                raise Failed(stays_cold(model, aside))
            return _warm_outcome(found, waited_s)

        def late(shown: Snapshot) -> str:
            found = _model(shown, model)
            return f"{model} is still {found.state} after {wait_s:g} s{': ' * bool(found.reason)}{found.reason}"

        return await _until(outcome, late, wait_s, progress=lambda shown: _progress(_model(shown, model)))

    _say(run)


@model_app.command("unload")
def model_unload(name: Name) -> None:
    """Takes an idle model out of memory; it stays cold until somebody asks for it."""

    async def run() -> str:
        model = (await _wish(name, "unload"))["name"]

        def outcome(shown: Snapshot, _waited_s: float) -> str | None:
            found = _model(shown, model)
            if found.state in ("warm", "degraded", "unloading"):
                return None
            if found.state == "waking":
                return f"{model} was unloaded, and is waking: somebody asked for it"
            if found.state != "cold":
                return f"{model} is not in memory: it is {found.state}{': ' * bool(found.reason)}{found.reason}"
            words = f"{model} is cold and stays so until somebody asks for it"
            return words + (f", {duration(found.unloaded_ms)} at most" if found.keep_warm else "")

        return await _until(outcome, lambda shown: f"{model} is still {_model(shown, model).state}", UNLOAD_S_MAX)

    _say(run)


@model_app.command("reset")
def model_reset(name: Name) -> None:
    """Ends a quarantine and forgets the failed loads."""
    model = asyncio.run(_wish(name, "reset"))["name"]
    print(f"{model} is in no quarantine, its failures are forgotten")


@model_app.command("pin")
def model_pin(name: Name) -> None:
    """Keeps a model in memory once it is there: neither evicted nor unloaded for being idle."""
    model = asyncio.run(_wish(name, "pin"))["name"]
    print(f"{model} is pinned until `gateway model unpin {model}`")


@model_app.command("unpin")
def model_unpin(name: Name) -> None:
    """Lets a pinned model go again when its memory is needed."""
    model = asyncio.run(_wish(name, "unpin"))["name"]
    print(f"{model} is not pinned")


def drain(
    host: HostName,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for what runs on it.", min=0)] = DRAIN_S_MAX,
) -> None:
    """Has a host take no more work, until `gateway undrain` or until its worker restarts. What runs is finished."""

    async def run() -> str:
        await ask("POST", f"/v1/hosts/{part(host)}/drain")

        def outcome(shown: Snapshot, _waited_s: float) -> str | None:
            found = _host(shown, host)
            if found is None:
                return f"{host} has left"
            return None if found.running else f"{host} is drained: it takes no work until `gateway undrain {host}`"

        def late(shown: Snapshot) -> str:
            found = _host(shown, host)
            running = found.running if found is not None else 0
            at_work = "1 slot is" if running == 1 else f"{running} slots are"
            return f"{host} takes no more work, and {at_work} still at work after {wait_s:g} s"

        return await _until(outcome, late, wait_s)

    _say(run)


def undrain(host: HostName) -> None:
    """Has a drained host take work again."""
    asyncio.run(ask("POST", f"/v1/hosts/{part(host)}/undrain"))
    print(f"{host} takes work again")


def _warm_outcome(model: ModelStatus, waited_s: float) -> str | None:
    """Gives the sentence of success, None while the wake goes on; raises Failed with the reason where it is over."""
    name, state = model.name, model.state
    if state == "warm":
        took = f", loaded in {duration(model.last_load_ms)}" if model.last_load_ms else ""
        return f"{name} is warm: first token after {model.first_token_ms:.0f}ms{took}"
    if state == "degraded":
        return f"{name} is loaded but degraded: {model.reason}"
    if state == "quarantined" and model.quarantine_ms:
        raise Failed(f"{name} is quarantined for {duration(model.quarantine_ms)}: {model.reason}")
    if state == "absent":
        raise Failed(f"{name} cannot be woken: {model.reason}")
    if state == "cold" and model.reason and waited_s > NO_ROOM_S_MAX:
        raise Failed(f"{name} stays cold: {model.reason}")
    return None


def _progress(model: ModelStatus) -> str:
    return f"{model.name} is waking: {loading(model)}" if model.state == "waking" else f"{model.name} is {model.state}"


async def _wish(name: str, verb: str) -> dict[str, Any]:
    return await ask("POST", f"/v1/models/{part(name)}/{verb}")


async def _until(
    outcome: Callable[[Snapshot, float], str | None],
    late: Callable[[Snapshot], str],
    limit_s: float,
    *,
    progress: Callable[[Snapshot], str] = lambda _: "",
) -> str:
    """Looks until there is an outcome; past the limit it is a failure, in the words of `late`."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    line = _Line()
    try:
        while True:
            shown = snapshot_of(await ask("GET", "/v1/status"))
            waited_s = loop.time() - started
            if (sentence := outcome(shown, waited_s)) is not None:
                return sentence
            if waited_s >= limit_s:
                raise Failed(late(shown))
            line.show(harmless(progress(shown)))
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        line.clear()


class _Line:
    """One line that a person watches change; a script is spared it."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        if self._on and (text or self._width):
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def clear(self) -> None:
        self.show("")
        if self._width or self._on:
            print("\r", end="", file=sys.stderr, flush=True)


def _say(run: Callable[[], Any]) -> None:
    print(harmless(asyncio.run(run())))


def _model(shown: Snapshot, name: str) -> ModelStatus:
    for model in shown.models:
        if model.name == name:
            return model
    raise Failed(f"{name} has left the policy meanwhile.")


def _host(shown: Snapshot, name: str) -> HostStatus | None:
    return next((host for host in shown.hosts if host.name == name), None)
