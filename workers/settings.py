"""What a worker or scheduler process is told from outside: the wiring, and nothing of lanes or models."""

import os
import platform
from pathlib import Path

from pydantic import Field, field_validator

from broker.settings import BrokerSettings, plain_name


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "warmlane"


class WorkerSettings(BrokerSettings):
    """Environment of `gateway worker` and `gateway scheduler`."""

    host_name: str = Field(
        default_factory=platform.node, description="The worker's name in status; one worker per name."
    )
    state_dir: Path = Field(default_factory=_state_dir, description="Where logs and pid files of started runtimes go.")
    memory_mb: int | None = Field(None, ge=1, description="Memory that models may use here; default: the machine's.")

    @field_validator("host_name")
    @classmethod
    def _named(cls, value: str) -> str:
        return plain_name(value)
