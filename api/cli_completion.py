"""Completion in a shell: the script for it, and the names that the gateway knows. What completes is typer's own."""

import os
from typing import Annotated, Any, Literal

import typer

COMPLETE = "_GATEWAY_COMPLETE"
"""By this variable the shell asks the command itself what may come next."""

ANSWER_S_MAX = 1.5
"""A person has pressed a key: later than this, no names are better."""


def completion(
    context: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Which shell.", show_default=False)],
) -> None:
    """Prints what makes a shell complete `gateway`: eval "$(gateway completion bash)"."""
    from typer.completion import shell_complete

    prepare()
    root = context.find_root()
    raise typer.Exit(shell_complete(root.command, {}, "gateway", COMPLETE, f"source_{shell}"))


def prepare() -> None:
    """Makes typer know the shells, which it does only where it has options of its own for that."""
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()


def asked_for() -> bool:
    """Whether a shell asks now."""
    return COMPLETE in os.environ


def models(incomplete: str) -> list[str]:
    """Names that may be asked for."""
    return [name for entry in _data("/v1/models") if (name := str(entry.get("id", ""))).startswith(incomplete)]


def job_ids(incomplete: str) -> list[tuple[str, str]]:
    """One's newest jobs, each with its state."""
    found = ((str(job.get("id", "")), f"{job.get('state')} {job.get('asked')}") for job in _data("/v1/jobs"))
    return [(job_id, words) for job_id, words in found if job_id.startswith(incomplete)]


def _data(path: str) -> list[dict[str, Any]]:
    """A list of the gateway's; a gateway that does not answer has none."""
    import asyncio

    from api.client import ask
    from api.exit_codes import Failed

    async def run() -> dict[str, Any]:
        async with asyncio.timeout(ANSWER_S_MAX):
            return await ask("GET", path)

    try:
        return [entry for entry in asyncio.run(run()).get("data", ()) if isinstance(entry, dict)]
    except (Failed, TimeoutError):
        return []
