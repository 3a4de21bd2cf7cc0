"""What the api process is told from outside."""

import re

from pydantic import Field, SecretStr, field_validator

from api.listen import DEFAULT_BIND
from broker.callers import Keys
from broker.settings import BrokerSettings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.-]+(:\d{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9A-Fa-f:]+\](:\d{1,5})?")


class ApiSettings(BrokerSettings):
    """Environment of `gateway api`."""

    bind: str = Field(DEFAULT_BIND, description="Where the api listens, host:port; [::1]:8400 for IPv6.")
    keys: SecretStr = Field(SecretStr(""), description="name:secret pairs; without any only this machine may call.")
    cors_origins: str = Field("", description="Origins whose web pages may call: https://chat.example.org,… or *.")
    stop_after_ms: int = Field(3_000, ge=0, description="How long running answers go on after SIGTERM.")

    @field_validator("bind")
    @classmethod
    def _bind_is_host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("must be a host and a port, like 127.0.0.1:8400")
        return value

    @field_validator("keys")
    @classmethod
    def _keys_are_pairs(cls, value: SecretStr) -> SecretStr:
        Keys.parse(value.get_secret_value())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: str) -> str:
        for origin in filter(None, (part.strip() for part in value.split(","))):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"holds origins like https://chat.example.org:8080, or *; {origin!r} is none")
        return value

    @property
    def origins(self) -> frozenset[str]:
        """The origins of `cors_origins`."""
        return frozenset(filter(None, (part.strip() for part in self.cors_origins.split(","))))

    @property
    def host(self) -> str:
        """The host of `bind`, without the brackets of an IPv6 address."""
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `bind`."""
        return int(self.bind.rpartition(":")[2])
