"""POST /api/chat, /api/generate, /api/embed and /api/embeddings: generations for clients of the Ollama dialect.

A request that asks for nothing is answered at once: its client wants a model loaded or unloaded, or to see it there.
"""

from api.described import generation
from api.routes.chat import ChatCompletions
from broker.dialects import ollama

LINES = (
    ollama.CONTENT_TYPE,
    "A line for each piece of the answer, the last one with `done`; one with `error` may end it.",
)


class OllamaChat(ChatCompletions):
    """The endpoint."""

    path = ollama.CHAT
    described = generation(
        "Chat, as an Ollama", tag="ollama", body="OllamaChatRequest", answer="OllamaChatAnswer", stream=LINES
    )


class OllamaGenerate(ChatCompletions):
    """The endpoint."""

    path = ollama.GENERATE
    described = generation(
        "Generate, as an Ollama", tag="ollama", body="OllamaGenerateRequest", answer="OllamaGenerateAnswer",
        stream=LINES,
    )  # fmt: skip


class OllamaEmbed(ChatCompletions):
    """The endpoint."""

    path = ollama.EMBED
    described = generation(
        "Make vectors, as an Ollama", tag="ollama", body="OllamaEmbedRequest", answer="OllamaVectors"
    )


class OllamaEmbeddings(ChatCompletions):
    """The older endpoint, which takes one text."""

    path = ollama.EMBEDDINGS
    described = generation(
        "Make a vector, as an older Ollama", tag="ollama", body="OllamaEmbeddingsRequest", answer="OllamaVector"
    )
