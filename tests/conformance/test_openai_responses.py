"""What the stock OpenAI SDK makes of our Responses, over a real llama.cpp."""

import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.clients import sdk
from tests.support.gateway_process import House

pytestmark = pytest.mark.real

INSTRUCTIONS, ASK = "Be brief.", "Say something."


class Answer(BaseModel):
    """What the weights are held to by the grammar: random as they are, they have no choice."""

    ok: bool
    count: int = Field(ge=0, le=9)


def test_a_stream_and_a_whole_answer_say_the_same(shared_house: House) -> None:
    """Greedy, for the weights are random."""
    with sdk(shared_house.url, max_retries=0) as client:
        events = list(
            client.responses.create(
                model="tiny", instructions=INSTRUCTIONS, input=ASK, max_output_tokens=12, temperature=0, stream=True
            )
        )
        whole = client.responses.create(
            model="tiny", instructions=INSTRUCTIONS, input=ASK, max_output_tokens=12, temperature=0
        )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == last.response.output_text == whole.output_text != ""
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12 and whole.usage.input_tokens > 0
    assert whole.usage.total_tokens == whole.usage.input_tokens + 12
    assert (whole.model, whole.instructions, whole.max_output_tokens) == ("tiny", INSTRUCTIONS, 12)


def test_an_answer_is_parsed_by_its_schema(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client:
        found = client.responses.parse(model="gpt-4o", input=ASK, text_format=Answer, max_output_tokens=200)
    assert found.status == "completed"
    assert isinstance(found.output_parsed, Answer)


def test_a_prompt_that_is_too_long_is_the_clients_own_error(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client, pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="word " * 6000, max_output_tokens=4)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
