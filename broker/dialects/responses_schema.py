"""What the reader of Responses takes, and what its answer is."""

from typing import Final

from broker.dialects import responses_input
from broker.dialects.bounds import MESSAGES_MAX, TOOLS_MAX
from broker.dialects.json_schema import (
    Schema,
    any_value,
    flag,
    list_of,
    maybe,
    name,
    nothing,
    one_of,
    ref,
    some,
    text,
    thing,
    whole,
)
from broker.dialects.responses import REFUSED

_text_or_parts: Final = some(text(), list_of(ref("ResponsesPart")))
_call_words: Final = {"name": text(), "call_id": text()}

SCHEMAS: Final[dict[str, Schema]] = {
    "ResponsesRequest": thing(
        {
            "model": name("A model, an alias, or a name that routing knows, as GET /v1/models lists them."),
            "input": some(
                text(),
                list_of(ref("ResponsesItem"), least=1, most=MESSAGES_MAX),
                words="A text, or what was said so far.",
            ),
        },
        {
            "instructions": maybe(text("What stands before everything else.")),
            "stream": maybe(flag("Whether the answer comes as server-sent events while it is made.")),
            "background": maybe(flag("Whether it is made without a client that waits, and kept for a while.")),
            "store": maybe(
                flag("What is made in the background is kept, whatever else is not: false is refused there only.")
            ),
            "parallel_tool_calls": maybe(flag()),
            "max_output_tokens": maybe(whole("The most tokens of the answer.", least=1)),
            "tools": maybe(
                list_of(ref("ResponsesTool"), "Functions and custom tools; others are left out.", most=TOOLS_MAX)
            ),
            "tool_choice": ref("ResponsesToolChoice"),
            "text": maybe(thing({}, {"format": ref("ResponsesFormat")})),
            "reasoning": maybe(thing({}, {"effort": any_value("As the runtime's chat knows it.")})),
            "metadata": maybe(thing({})),
            "prompt_cache_key": any_value("Names the conversation: its requests go where its prompt is cached."),
            **{key: nothing(sentence) for key, sentence in REFUSED.items()},
        },
        "Keys that OpenAI does not know go to the runtime as they are, and are its to judge.",
    )
    | {"not": thing({"background": one_of(True), "store": one_of(False)})},
    "ResponsesItem": some(
        thing(
            {"role": one_of(*responses_input.ROLES), "content": _text_or_parts},
            {"type": one_of("message", None)},
            "A message.",
        ),
        thing({"type": one_of("function_call"), **_call_words, "arguments": text()}, {"namespace": {}}, "A call."),
        thing({"type": one_of("custom_tool_call"), **_call_words, "input": text()}, {"namespace": {}}),
        thing(
            {
                "type": one_of("function_call_output", "custom_tool_call_output"),
                "call_id": text(),
                "output": _text_or_parts,
            },
            words="What a call gave.",
        ),
        thing(
            {
                "type": one_of("reasoning"),
                "content": some(text(minLength=1), list_of(ref("ResponsesPart"), least=1)),
            },
            words="The model's own thoughts, told in plain text.",
        ),
        thing(
            {"type": one_of("reasoning")},
            {"content": nothing(), "summary": some(_text_or_parts, nothing())},
            words="Or what is left of them.",
        ),
        thing(
            {"type": one_of(*sorted(responses_input.NOT_FOR_CHAT))},
            words="What tools of OpenAI's own servers did is left out.",
        ),
        words="Items that refer to something kept (`item_reference`) are refused: the gateway keeps none.",
    ),
    "ResponsesPart": some(
        thing({"type": one_of(*sorted(responses_input.TEXTS)), "text": text()}),
        thing({"type": one_of("refusal"), "refusal": text()}),
        thing({"type": one_of("input_image"), "image_url": text()}, {"detail": {}}),
    ),
    "ResponsesTool": some(
        thing({"type": one_of("function"), "name": name("")}, {"parameters": maybe(thing({})), "description": {}}),
        thing({"type": one_of("custom"), "name": name("")}, {"format": {}, "description": {}}),
        thing({"type": one_of("namespace"), "name": name(""), "tools": list_of(ref("ResponsesTool"))}),
        thing(
            {"type": {"type": "string", "not": one_of("function", "custom", "namespace")}},
            words="What only OpenAI's servers can run is left out.",
        ),
    ),
    "ResponsesToolChoice": some(
        one_of(None, "auto", "none", "required"),
        thing({"type": one_of("function", "custom"), "name": text()}),
        thing(
            {"type": one_of("allowed_tools"), "tools": list_of({})},
            {"mode": one_of("auto", "required")},
        ),
        words="A tool that it names or requires must be among the tools.",
    ),
    "ResponsesFormat": some(
        {"type": "null"},
        thing({"type": one_of("text", "json_object")}),
        thing({"type": one_of("json_schema"), "schema": thing({})}),
    ),
    "Response": thing(
        {
            "id": text(),
            "object": one_of("response"),
            "created_at": whole(),
            "status": one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
            "background": flag(),
            "model": text("The policy's key of the model that answered; until then, what was asked for."),
            "output": list_of(thing({"type": text()})),
            "error": maybe(
                thing(
                    {
                        "code": one_of(
                            "rate_limit_exceeded", "server_error", "context_length_exceeded", "invalid_prompt"
                        ),
                        "message": text(),
                        "reason": text("The gateway's own code."),
                    }
                )
            ),
            "usage": maybe(thing({})),
        },
        words="Only what is made in the background is ever told `queued`, `in_progress`, `failed` or `cancelled`.",
    ),
    "ResponseDeleted": thing({"id": text(), "object": one_of("response"), "deleted": one_of(True)}),
}
