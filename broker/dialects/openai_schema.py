"""What the OpenAI dialect's readers take, and what its answers are: chat, completions, embeddings, models, errors."""

from typing import Final

from broker.dialects import openai, openai_completions
from broker.dialects.json_schema import (
    Schema,
    any_value,
    flag,
    list_of,
    maybe,
    name,
    number,
    one_of,
    ref,
    some,
    text,
    thing,
    whole,
)

MODEL: Final = name("A model, an alias, or a name that routing knows, as GET /v1/models lists them.")
STREAM: Final = maybe(flag("Whether the answer comes as server-sent events while it is made."))
STREAM_OPTIONS: Final = maybe(thing({}, {"include_usage": any_value("`true` asks for one more chunk with the usage.")}))
CACHE_KEY: Final = any_value("Names the conversation: its requests go where its prompt is cached.")
BEYOND: Final = "Keys that are not named here go to the runtime as they are, and are its to judge."

_tokens: Final = some(
    text(),
    list_of({"type": "integer"}, least=1),
    list_of(text(), least=1),
    list_of(list_of({"type": "integer"}, least=1), least=1),
    words="A text, several, the token numbers of one, or of several.",
)
_usage: Final = thing(
    {}, {"prompt_tokens": whole(), "completion_tokens": whole(), "total_tokens": whole()}, "As the runtime counted."
)

SCHEMAS: Final[dict[str, Schema]] = {
    "ChatRequest": thing(
        {
            "model": MODEL,
            "messages": list_of(thing({}), "As the runtime's chat template takes them.", least=1),
        },
        {
            "stream": STREAM,
            "stream_options": STREAM_OPTIONS,
            "n": maybe(whole("How many answers.", least=1, most=openai.MAX_CHOICES)),
            "max_completion_tokens": maybe(whole("The most tokens of an answer.", least=1)),
            "max_tokens": maybe(whole("Its older name.", least=1)),
            "tools": any_value("Functions that the model may call."),
            "prompt_cache_key": CACHE_KEY,
        },
        BEYOND,
    ),
    "CompletionRequest": thing(
        {"model": MODEL, "prompt": _tokens},
        {
            "stream": STREAM,
            "stream_options": STREAM_OPTIONS,
            "n": maybe(whole(f"Prompts times n may be {openai_completions.MAX_CHOICES} at most.", least=1)),
            "best_of": maybe(whole("Not above n: of an answer that is streamed nothing can be taken back.", least=1)),
            "max_tokens": maybe(whole("The most tokens of an answer.", least=0)),
            "suffix": any_value("What follows the text that is to be written, for runtimes that fill in."),
            "prompt_cache_key": CACHE_KEY,
        },
        BEYOND,
    ),
    "EmbeddingsRequest": thing(
        {
            "model": MODEL,
            "input": some(
                text(),
                list_of({"type": "integer"}, least=1),
                list_of(some(text(), list_of({}, "Token numbers.")), least=1),
                words="A text, several, the token numbers of one, or of several.",
            ),
        },
        {
            "stream": {**one_of(None, False), "description": "Vectors are not streamed."},
            "encoding_format": any_value("`float` or `base64`, where the runtime knows it."),
            "dimensions": any_value("How long the vectors shall be, where the runtime can shorten them."),
        },
        BEYOND,
    ),
    "ChatCompletion": thing(
        {
            "object": one_of("chat.completion"),
            "model": text("The policy's key of the model that answered."),
            "choices": list_of(
                thing(
                    {
                        "index": whole(),
                        "message": thing(
                            {"role": text()},
                            {
                                "content": maybe(text()),
                                "reasoning_content": maybe(text()),
                                "tool_calls": list_of(thing({})),
                            },
                        ),
                        "finish_reason": maybe(text()),
                    }
                )
            ),
        },
        {"id": text(), "created": whole(), "usage": _usage},
    ),
    "Completion": thing(
        {
            "object": one_of("text_completion"),
            "model": text("The policy's key of the model that answered."),
            "choices": list_of(thing({"index": whole(), "text": text(), "finish_reason": maybe(text())})),
        },
        {"id": text(), "created": whole(), "usage": _usage},
    ),
    "Embeddings": thing(
        {
            "object": one_of("list"),
            "data": list_of(
                thing(
                    {"embedding": some(list_of(number()), text("32-bit floats, little-endian, in base64."))},
                    {"object": text(), "index": whole()},
                ),
                least=1,
            ),
            "model": text("The policy's key of the model that answered."),
        },
        {"usage": _usage},
    ),
    "ListedModel": thing({"id": text(), "object": one_of("model"), "created": whole(), "owned_by": one_of("warmlane")}),
    "ModelList": thing({"object": one_of("list"), "data": list_of(ref("ListedModel"))}),
    "OpenAIError": thing(
        {
            "error": thing(
                {
                    "message": text("A sentence."),
                    "type": text("OpenAI's word for the kind of error."),
                    "param": maybe(text("The part of the request that is to blame.")),
                    "code": text("Stable: what programs should look at."),
                },
                {"retry_after_s": whole("When to come back.", least=1, most=86_400)},
            )
        }
    ),
}
