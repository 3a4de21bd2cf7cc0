"""What a worker or scheduler process is told from outside: the wiring, and nothing of lanes or models."""

import os
import platform
import re
from pathlib import Path

from pydantic import Field, field_validator

from broker.settings import BrokerSettings


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "warmlane"


class WorkerSettings(BrokerSettings):
    """Environment of `gateway worker` and `gateway scheduler`."""

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="The Redis or Valkey that all parts share.")
    namespace: str = Field("gw", description="Prefix of every key.")
    host_name: str = Field(
        default_factory=platform.node, description="The worker's name in status; one worker per name."
    )
    state_dir: Path = Field(default_factory=_state_dir, description="Where logs and pid files of started runtimes go.")
    memory_mb: int | None = Field(None, ge=1, description="Memory that models may use here; default: the machine's.")

    @field_validator("host_name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
            raise ValueError("may hold letters, digits, '.', '_' and '-' only, 64 at most")
        return value
