"""POST /v1/embeddings: as a chat request goes, but the answer is one object of vectors and never a stream."""

from api.described import generation
from api.routes.chat import ChatCompletions
from broker.dialects import openai_embeddings

PATH = openai_embeddings.PATH


class Embeddings(ChatCompletions):
    """The endpoint."""

    path = PATH
    described = generation("Make vectors", tag="openai", body="EmbeddingsRequest", answer="Embeddings")
