"""What the api process is told from outside."""

from pydantic import Field, SecretStr, field_validator

from broker.callers import Keys
from broker.settings import BrokerSettings


class ApiSettings(BrokerSettings):
    """Environment of `gateway api`."""

    bind: str = Field("127.0.0.1:8400", description="Where the api listens, host:port; [::1]:8400 for IPv6.")
    keys: SecretStr = Field(SecretStr(""), description="name:secret pairs; without any only this machine may call.")
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

    @property
    def host(self) -> str:
        """The host of `bind`, without the brackets of an IPv6 address."""
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of `bind`."""
        return int(self.bind.rpartition(":")[2])
