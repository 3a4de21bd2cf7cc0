"""A remote provider that speaks OpenAI's protocol: nothing to load, and every token costs money.

What shapes this file: there is no free way to ask a provider whether it would answer, so nobody asks. A wake asks for
one token, and from then on only real first tokens tell how it does. The key comes from the worker's environment when it
is needed. It stands in one header, and what the provider says is never repeated where it may repeat the key.
"""

import os
import re
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from workers.runtimes.base import (
    Endpoint,
    LoadFailed,
    ProbeFailed,
    ProbeRefused,
    State,
    client_for,
    probe_chat,
    probe_embedding,
    refusal_words,
    without_key,
)

if TYPE_CHECKING:
    from broker.policy import Model

_PLAIN = re.compile(r"[\x21-\x7e]+")


class Remote:
    """One model of a remote provider."""

    def __init__(self, name: str, model: "Model") -> None:
        self._title = f"model '{name}'"
        self._model = model
        self._url = model.url or ""
        self._client = client_for(self._url)

    @property
    def kind(self) -> str:
        return "openai"

    @property
    def local(self) -> bool:
        return False

    @property
    def manageable(self) -> bool:
        return False

    async def lacks(self) -> str:
        return ""

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def state(self) -> State:
        """Says whether we could ask it; the provider itself is not asked."""
        return "absent" if self._key_problem else "loaded"

    async def load(self, *, timeout_s: float) -> None:
        """Loads nothing; raises LoadFailed where there is no key, before a request tells the provider so."""
        if self._key_problem:
            raise LoadFailed(f"{self._title}: {self._key_problem}")

    async def progress(self) -> float | None:
        return None

    async def unload(self) -> None:
        """There is nothing to give back."""

    async def memory_bytes(self, *, of_gpus: bool = False) -> int | None:
        return None

    async def file_bytes(self) -> int | None:
        return None

    def process_ids(self) -> list[int]:
        return []

    def endpoint(self) -> Endpoint:
        headers = {"User-Agent": "warmlane"}  # some providers refuse the nameless
        if (key := self._key) and not self._key_problem:
            headers["Authorization"] = f"Bearer {key}"
        return Endpoint(
            base_url=self._url,
            headers=headers,
            model=self._model.model,
            key_env=self._model.api_key_env or "",
            metered=True,
        )

    async def probe(self, *, timeout_s: float, slot: int | None = None) -> float:
        """Times one token, or one vector. It is paid for, so only a wake asks for it."""
        probe = probe_embedding if self._model.embeddings else probe_chat
        try:
            try:
                return await probe(self._client, self.endpoint(), timeout_s=timeout_s)
            except ProbeRefused as error:
                if "max_completion_tokens" not in error.words:
                    raise
                # OpenAI's reasoning models know the bound by its newer name only.
                newer = {"max_tokens": None, "max_completion_tokens": 16}
                return await probe_chat(self._client, self.endpoint(), timeout_s=timeout_s, extra=newer)
        except ProbeRefused as error:
            raise ProbeFailed(f"{self._title}: {refusal_words(self.endpoint(), error.status, error.words)}") from None
        except ProbeFailed as error:
            raise ProbeFailed(f"{self._title}: {without_key(self.endpoint(), error.sentence)}") from None

    async def busy_slots(self) -> int | None:
        """A provider tells nobody; a closed connection is one that it stops working on."""
        return 0

    async def close(self) -> None:
        await self._client.aclose()

    @property
    def _key(self) -> str:
        return os.environ.get(self._model.api_key_env, "").strip() if self._model.api_key_env else ""

    @property
    def _key_problem(self) -> str:
        """Why the key cannot stand in a header; what it is stays unsaid."""
        name, key = self._model.api_key_env, self._key
        if name and not key:
            return f"the environment of this worker has no {name}, which holds the key"
        if key and not _PLAIN.fullmatch(key):
            return f"the key in {name} is not one word of plain characters"
        return ""
