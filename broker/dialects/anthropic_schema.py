"""What the Anthropic dialect's reader takes, and what its answers are."""

from typing import Final

from broker.dialects.json_schema import (
    Schema,
    any_value,
    flag,
    list_of,
    maybe,
    name,
    one_of,
    ref,
    some,
    text,
    thing,
    whole,
)

_content: Final = ref("AnthropicContent")

SCHEMAS: Final[dict[str, Schema]] = {
    "MessagesRequest": thing(
        {
            "model": name("A model, an alias, or a name that routing knows, as GET /v1/models lists them."),
            "messages": list_of(thing({"role": one_of("user", "assistant", "system"), "content": _content}), least=1),
        },
        {
            "system": maybe(_content),
            "tools": maybe(list_of(thing({}))),
            "stream": maybe(flag("Whether the answer comes as server-sent events while it is made.")),
            "max_tokens": maybe(whole("The most tokens of the answer.", least=1)),
            "metadata": any_value("`user_id` keeps the conversations of several users apart."),
        },
        "Keys that are not named here go to a runtime that speaks the dialect as they are.",
    ),
    "AnthropicContent": some(text(), list_of(ref("AnthropicBlock"))),
    "AnthropicBlock": some(
        thing({"type": one_of("text"), "text": text()}),
        thing({"type": one_of("tool_use"), "name": text()}),
        thing({"type": one_of("tool_result"), "tool_use_id": text()}, {"content": maybe(_content)}),
        thing(
            {"type": {"type": "string", "not": one_of("text", "tool_use", "tool_result")}},
            words="Pictures, documents, thoughts, and what else the runtime knows.",
        ),
    ),
    "Message": thing(
        {
            "type": one_of("message"),
            "role": one_of("assistant"),
            "model": text("The policy's key of the model that answered."),
            "content": list_of(thing({"type": text()})),
            "stop_reason": text(),
            "usage": thing({}, {"input_tokens": whole(), "output_tokens": whole()}),
        },
        {"id": text(), "stop_sequence": maybe(text())},
    ),
    "TokenCount": thing(
        {
            "input_tokens": whole(
                "Counted by a warm model's runtime; else an estimate, as X-Gateway-Estimate says.", least=1
            )
        }
    ),
    "AnthropicModel": thing(
        {
            "type": one_of("model"),
            "id": text(),
            "display_name": text(),
            "created_at": text("When it was released; 1970 where nobody knows."),
            "lifecycle": one_of("active"),
            "max_input_tokens": maybe(whole("Where the policy says so.")),
        }
    ),
    "AnthropicModelPage": thing(
        {
            "data": list_of(ref("AnthropicModel")),
            "has_more": flag(),
            "first_id": maybe(text()),
            "last_id": maybe(text()),
        }
    ),
    "AnthropicError": thing(
        {
            "type": one_of("error"),
            "error": thing(
                {
                    "type": text("Anthropic's word for the kind of error."),
                    "message": text("A sentence."),
                    "code": text("Stable: what programs should look at."),
                },
                {"retry_after_s": whole("When to come back.", least=1, most=86_400)},
            ),
        }
    ),
}
