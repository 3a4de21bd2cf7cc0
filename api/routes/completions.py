"""POST /v1/completions: as a chat request goes, for editors that finish text and hold no talk."""

from api.described import EVENTS, generation
from api.routes.chat import ChatCompletions
from api.visit import Wishes
from broker.dialects import openai_completions
from broker.records import JobRecord


class Completions(ChatCompletions):
    """The endpoint."""

    path = openai_completions.PATH
    described = generation(
        "Complete a text", tag="openai", body="CompletionRequest", answer="Completion",
        stream=(EVENTS, "Chunks of the text; the last event is `data: [DONE]`. Comments keep a wait alive."),
    )  # fmt: skip

    def _job(self, body: bytes, wishes: Wishes, caller: str) -> JobRecord | bytes:
        facts = openai_completions.read_completion(body)
        return self._job_of(
            wishes,
            caller,
            asked=wishes.lane or facts.model,
            session=facts.session,
            stream=facts.stream,
            include_usage=facts.include_usage,
            choices=facts.choices,
            tokens=facts.prompt_tokens,
            longest=facts.longest_tokens if facts.prompts > 1 else 0,
            max_tokens=facts.max_tokens or 0,
        )
