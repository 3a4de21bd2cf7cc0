"""The settings that every process shares. Lanes and models are the policy's business; this is wiring only."""

import re
from typing import TypeVar, get_args

from pydantic import ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker import logs

PREFIX = "GATEWAY_"


def plain_name(value: str) -> str:
    """Takes a name that may stand in keys and on a command line; raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        raise ValueError("may hold letters, digits, '.', '_' and '-' only, 64 at most")
    return value


class BrokerSettings(BaseSettings):
    """Where Redis is, and in which namespace this gateway lives in it. A process adds its own in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    namespace: str = "gw"
    log_level: str = "INFO"
    log_format: logs.Format = "human"

    @field_validator("log_level")
    @classmethod
    def _levels_are_known(cls, value: str) -> str:
        logs.read_levels(value)
        return value

    @field_validator("log_format", mode="before")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        if value not in get_args(logs.Format):
            raise ValueError("must be human or json")
        return value

    @field_validator("namespace")
    @classmethod
    def _namespace_is_a_name(cls, value: str) -> str:
        return plain_name(value)


class SettingsInvalid(Exception):
    """A setting cannot be used; `problems` are whole sentences that never repeat the value: it may be a secret."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


Settings = TypeVar("Settings", bound=BrokerSettings)


def read_settings(kind: type[Settings]) -> Settings:
    """Reads the settings of a process from its environment; raises SettingsInvalid."""
    try:
        return kind()
    except ValidationError as error:
        raise SettingsInvalid([_sentence(p["loc"], _PLAIN.get(p["type"], p["msg"])) for p in error.errors()]) from None


_PLAIN = {"int_parsing": "must be a whole number"}
"""What pydantic says in more words."""


def _sentence(place: tuple[int | str, ...], message: str) -> str:
    words = message.removeprefix("Value error, ")
    return f"{PREFIX}{'_'.join(map(str, place)).upper()} {words[:1].lower()}{words[1:]}"
