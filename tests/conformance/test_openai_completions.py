"""OpenAI's older completions with the stock SDK, before a real llama.cpp."""

import httpx
import openai
import pytest

from tests.support.clients import sdk
from tests.support.gateway_process import House

pytestmark = pytest.mark.real


def test_a_stream_and_a_whole_answer_say_the_same(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client:
        raw = client.completions.with_raw_response.create(
            model="gpt-4o", prompt="def f(", suffix="\n", max_tokens=8, temperature=0, seed=1
        )
        whole = raw.parse()
        chunks = list(
            client.completions.create(
                model="gpt-4o", prompt="def f(", suffix="\n", max_tokens=8, temperature=0, seed=1, stream=True
            )
        )
    assert raw.headers["x-gateway-served-by"].startswith("tiny@")
    assert (whole.object, whole.model) == ("text_completion", "tiny")
    assert whole.choices[0].text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert {chunk.model for chunk in chunks} == {"tiny"} and chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[1, 2], [3], [4, 5]]])
def test_every_prompt_is_answered(shared_house: House, prompt: list[str] | list[list[int]]) -> None:
    """More of them than there are slots."""
    with sdk(shared_house.url, max_retries=0) as client:
        whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, temperature=0)
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and all(choice.text for choice in whole.choices)
    assert whole.usage is not None and whole.usage.completion_tokens == 9


def test_logprobs_come_through(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client:
        whole = client.completions.create(model="tiny", prompt="Hi", max_tokens=3, logprobs=1)
    assert len(whole.choices[0].model_dump()["logprobs"]["content"]) == 3


def test_the_stream_ends_as_openais_does(shared_house: House) -> None:
    asked = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{shared_house.url}/v1/completions", json=asked, timeout=30)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\ndata: [DONE]\n\n") and "null\n\n" not in answer.text


def test_errors_are_the_sdks_own(shared_house: House) -> None:
    with sdk(shared_house.url, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[], max_tokens=3)
        assert caught.value.param == "prompt"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt="word " * 3000, max_tokens=3)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nothing", prompt="Hi")
