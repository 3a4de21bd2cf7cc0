"""POST /v1/completions: as a chat request goes, for editors that finish text and hold no talk."""

from api.described import EVENTS, generation
from api.routes.chat import ChatCompletions
from broker.dialects import openai_completions


class Completions(ChatCompletions):
    """The endpoint."""

    path = openai_completions.PATH
    described = generation(
        "Complete a text", tag="openai", body="CompletionRequest", answer="Completion",
        stream=(EVENTS, "Chunks of the text; the last event is `data: [DONE]`. Comments keep a wait alive."),
    )  # fmt: skip
