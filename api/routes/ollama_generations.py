"""POST /api/chat, /api/generate, /api/embed and /api/embeddings: generations for clients of the Ollama dialect."""

import time

from api.described import generation
from api.routes.chat import ChatCompletions
from api.routes.embeddings import KEEP_MS_MAX
from api.routes.ollama import known_name
from api.visit import Wishes
from broker.dialects import ollama, ollama_embeddings, ollama_request
from broker.dialects.ollama_embeddings import AskedVectors
from broker.dialects.ollama_request import Asked
from broker.records import JobRecord

LINES = (
    ollama.CONTENT_TYPE,
    "A line for each piece of the answer, the last one with `done`; one with `error` may end it.",
)


class OllamaChat(ChatCompletions):
    """The endpoint. A request without a message is answered at once: it wants a model loaded or unloaded."""

    path = ollama.CHAT
    described = generation(
        "Chat, as an Ollama", tag="ollama", body="OllamaChatRequest", answer="OllamaChatAnswer", stream=LINES
    )

    def _read(self, body: bytes) -> Asked:
        return ollama_request.read_chat(body)

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        asked = self._read(body)
        active = self._gateway.book.active
        name = wishes.lane or known_name(active, asked.model)
        if asked.empty:
            active.policy.route(name, caller=caller, endpoint=self.path, prompt_tokens=0)  # raises UnknownModel
            return ollama.nothing(asked, now_ns=time.time_ns())
        return self._job_of(
            wishes,
            caller,
            asked=name,
            session=asked.session,
            stream=asked.stream,
            include_usage=True,
            needs=" ".join(sorted(asked.needs)),
            tokens=asked.prompt_tokens,
            max_tokens=asked.max_tokens or 0,
        )


class OllamaGenerate(OllamaChat):
    """The endpoint."""

    path = ollama.GENERATE
    described = generation(
        "Generate, as an Ollama", tag="ollama", body="OllamaGenerateRequest", answer="OllamaGenerateAnswer",
        stream=LINES,
    )  # fmt: skip

    def _read(self, body: bytes) -> Asked:
        return ollama_request.read_generate(body)


class OllamaEmbed(ChatCompletions):
    """The endpoint."""

    path = ollama.EMBED
    described = generation(
        "Make vectors, as an Ollama", tag="ollama", body="OllamaEmbedRequest", answer="OllamaVectors"
    )
    keep_ms_max = KEEP_MS_MAX

    def _read(self, body: bytes) -> AskedVectors:
        return ollama_embeddings.read_embed(body)

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        asked = self._read(body)
        active = self._gateway.book.active
        name = wishes.lane or known_name(active, asked.model)
        if asked.empty:
            active.policy.route(name, caller=caller, endpoint=self.path, prompt_tokens=0)  # raises UnknownModel
            return ollama_embeddings.nothing(asked)
        return self._job_of(wishes, caller, asked=name, tokens=asked.prompt_tokens, longest=asked.longest_tokens)


class OllamaEmbeddings(OllamaEmbed):
    """The older endpoint, which takes one text."""

    path = ollama.EMBEDDINGS
    described = generation(
        "Make a vector, as an older Ollama", tag="ollama", body="OllamaEmbeddingsRequest", answer="OllamaVector"
    )

    def _read(self, body: bytes) -> AskedVectors:
        return ollama_embeddings.read_embeddings(body)
