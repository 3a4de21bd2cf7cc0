"""The last first-token times of each model, as one process has seen its hosts tell them: a line to look at, no figure
to decide by. It begins anew with the process."""

from collections import deque
from collections.abc import Mapping

from broker.records import ModelOnHost

KEPT = 60
"""So many of a model's last first tokens."""


class RecentFirstTokens:
    """Notes each one once, as far as heartbeats tell them apart."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}
        self._kept: dict[str, deque[float]] = {}

    def note(self, on_host: Mapping[str, Mapping[str, ModelOnHost]]) -> None:
        """Takes what the hosts tell now; models that no host has any more are forgotten."""
        for model, there in on_host.items():
            for host, told in there.items():
                if told.first_token_ms and told.first_token_ms != self._last.get((model, host)):
                    self._last[model, host] = told.first_token_ms
                    self._kept.setdefault(model, deque(maxlen=KEPT)).append(told.first_token_ms)
        for model in self._kept.keys() - on_host.keys():
            del self._kept[model]
        for pair in [pair for pair in self._last if pair[0] not in on_host]:
            del self._last[pair]

    def of(self, model: str) -> tuple[float, ...]:
        """The model's last first-token times in ms, the oldest first."""
        return tuple(self._kept.get(model, ()))
