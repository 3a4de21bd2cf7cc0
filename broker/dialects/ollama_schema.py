"""What the Ollama dialect's readers take, and what its answers are."""

from typing import Any, Final

from broker.dialects.json_schema import (
    Schema,
    any_value,
    flag,
    list_of,
    maybe,
    name,
    nothing,
    number,
    one_of,
    some,
    text,
    thing,
    whole,
)

MODEL: Final = name("A model, an alias, or a name that routing knows; `:latest` behind it may be left out.")
_images: Final = maybe(list_of(name("A picture in base64.")))
_call: Final = thing({"function": thing({"name": text()}, {"arguments": {}})})
_common: Final[dict[str, Schema]] = {
    "stream": maybe(flag("On unless it is false: the answer comes line by line while it is made.")),
    "format": some(one_of(None, "", "json"), thing({}), words="`json`, or the JSON schema of the answer."),
    "options": maybe(thing({}, {"num_predict": maybe(number("The most tokens of the answer; below 1 = no end."))})),
    "keep_alive": any_value("How long a model stays is the policy's business. 0 without a prompt asks for an unload."),
}
_details: Final = thing(
    {
        "parent_model": text(),
        "format": text(),
        "family": text(),
        "families": list_of(text()),
        "parameter_size": text(),
        "quantization_level": text(),
    },
    words="What nobody here knows is empty.",
)
_entry: Final[dict[str, Any]] = {
    "name": text(),
    "model": text(),
    "size": whole(least=0),
    "digest": text(),
    "details": _details,
}
_answer: Final = {"model": text(), "created_at": text(), "done": one_of(True), "done_reason": text()}

SCHEMAS: Final[dict[str, Schema]] = {
    "OllamaChatRequest": thing(
        {"model": MODEL},
        {
            "messages": maybe(
                list_of(
                    thing(
                        {"role": name("")},
                        {
                            "content": maybe(text()),
                            "thinking": maybe(text()),
                            "tool_name": maybe(text()),
                            "tool_call_id": maybe(text()),
                            "images": _images,
                            "tool_calls": maybe(list_of(_call)),
                        },
                    ),
                    "Without one the answer comes at once: it asks for the model to be loaded, or unloaded.",
                )
            ),
            "tools": maybe(list_of(thing({}))),
            **_common,
        },
    ),
    "OllamaGenerateRequest": thing(
        {"model": MODEL},
        {
            "prompt": maybe(text("Without one the answer comes at once.")),
            "system": maybe(text()),
            "suffix": maybe(text("Only an Ollama knows it, and so the next three.")),
            "template": maybe(text()),
            "raw": maybe(flag()),
            "context": maybe(list_of({}, "Token numbers.")),
            "images": _images,
            **_common,
        },
    ),
    "OllamaEmbedRequest": thing(
        {"model": MODEL},
        {
            "input": maybe(some(text(), list_of(text()), words="Without one the answer comes at once.")),
            "dimensions": some(nothing(), whole(least=1), words="How long the vectors shall be at most."),
        },
    ),
    "OllamaEmbeddingsRequest": thing({"model": MODEL}, {"prompt": maybe(text("Without one: no vector."))}),
    "OllamaShowRequest": {
        "type": "object",
        "anyOf": [thing({"model": MODEL}), thing({"name": text("Its older name.")}, {"model": nothing()})],
    },
    "OllamaChatAnswer": thing({**_answer, "message": thing({"role": text(), "content": text()})}),
    "OllamaGenerateAnswer": thing({**_answer, "response": text()}),
    "OllamaVectors": thing({"model": text(), "embeddings": list_of(list_of(number()))}),
    "OllamaVector": thing({"embedding": list_of(number())}),
    "OllamaVersion": thing({"version": text("The Ollama whose API this is."), "warmlane": text("Our own version.")}),
    "OllamaTags": thing({"models": list_of(thing({**_entry, "modified_at": text()}))}),
    "OllamaRunning": thing(
        {
            "models": list_of(
                thing({**_entry, "size_vram": whole(), "expires_at": text(), "context_length": whole(least=0)})
            )
        }
    ),
    "OllamaShown": thing(
        {
            "details": _details,
            "model_info": thing({}),
            "capabilities": list_of(one_of("embedding", "completion", "tools")),
            "modified_at": text(),
        },
        {key: text() for key in ("modelfile", "parameters", "template", "license")},
    ),
    "OllamaError": thing(
        {"error": text("A sentence."), "code": text("Stable: what programs should look at.")},
        {"retry_after_s": whole("When to come back.", least=1, most=86_400)},
    ),
}
