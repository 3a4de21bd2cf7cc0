"""What the stock OpenAI SDK makes of our Responses, over a real llama.cpp."""

from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, Field

from tests.support.clients import sdk
from tests.support.gateway_process import House
from tests.support.waiting import block_until
from tests.support.worker_world import words

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


def until_ended(client: openai.OpenAI, response_id: str) -> Response:
    """Polls as OpenAI's guide says."""
    live = ("queued", "in_progress")
    block_until(lambda: client.responses.retrieve(response_id).status not in live, what=f"the end of {response_id}")
    return client.responses.retrieve(response_id)


def test_a_response_is_made_in_the_background(shared_house: House) -> None:
    """Made, polled, followed from every number, deleted: what is said is what a client that waits is told."""
    asked: dict[str, Any] = {"model": "tiny", "instructions": INSTRUCTIONS, "input": ASK, "temperature": 0}
    with sdk(shared_house.url, max_retries=0) as client:
        waited_for = client.responses.create(**asked, max_output_tokens=12)
        made = client.responses.create(**asked, max_output_tokens=12, background=True)
        assert made.status in ("queued", "in_progress") and made.background
        whole = until_ended(client, made.id)
        assert (whole.status, whole.output_text) == ("incomplete", waited_for.output_text)
        assert whole.usage is not None and whole.usage.output_tokens == 12
        events = list(client.responses.retrieve(made.id, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.incomplete" and events[-1].response == whole
        for number in range(len(events)):
            rest = list(client.responses.retrieve(made.id, stream=True, starting_after=number))
            assert rest == events[number + 1 :]
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError, match="not made in the background"):
            client.responses.retrieve(waited_for.id)


def test_a_background_stream_that_is_left_goes_on_and_is_cancelled(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client:
        asked: dict[str, Any] = {"model": "pretend", "input": ASK, "background": True, "stream": True}
        heard: list[Any] = []
        with client.responses.create(**asked, max_output_tokens=60) as stream:
            for event in stream:
                heard.append(event)
                if len(heard) == 20:
                    break
        response_id = heard[0].response.id
        with client.responses.retrieve(response_id, stream=True, starting_after=heard[-1].sequence_number) as stream:
            heard += stream
        assert [event.sequence_number for event in heard] == list(range(len(heard)))
        said = "".join(event.delta for event in heard if event.type == "response.output_text.delta")
        assert said == heard[-1].response.output_text == words(60)

        with client.responses.create(**asked, max_output_tokens=3000) as stream:
            response_id = next(iter(stream)).response.id
        assert client.responses.cancel(response_id).status == "cancelled"
        assert client.responses.cancel(response_id).status == "cancelled"
        assert client.responses.retrieve(response_id).status == "cancelled"
