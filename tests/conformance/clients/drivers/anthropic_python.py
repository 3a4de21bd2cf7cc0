"""Drives the stock anthropic package."""

import anthropic
from lines import WEATHER, Order, Seen, serve, user

TOOL = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}


def _client(order: Order) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=order["url"], api_key="any")


def chat(order: Order) -> Seen:
    more = {"timeout": order["timeout_s"]} if "timeout_s" in order else {}
    known = {"model": order["model"], "messages": user(order), "max_tokens": order["max_tokens"]}
    with _client(order) as client:
        answer = client.messages.create(**known, **more)
    text = "".join(block.text for block in answer.content if block.type == "text")
    yield {
        "saw": "answer", "text": text, "finish": answer.stop_reason, "model": answer.model,
        "tokens": answer.usage.output_tokens,
    }  # fmt: skip


def stream(order: Order) -> Seen:
    more = {"tools": [TOOL]} if order["do"] == "tools" else {}
    left = order.get("hang_up_after")
    known = {"model": order["model"], "messages": user(order), "max_tokens": order["max_tokens"]}
    with _client(order) as client, client.messages.stream(**known, **more) as events:
        for event in events:
            if event.type == "text":
                yield {"saw": "piece", "text": event.text}
                if left is not None and (left := left - 1) == 0:
                    return
            elif event.type == "thinking":
                yield {"saw": "thought", "text": event.thinking}
        answer = events.get_final_message()
    for block in answer.content:
        if block.type == "tool_use":
            yield {"saw": "tool", "name": block.name, "arguments": block.input}
    text = "".join(block.text for block in answer.content if block.type == "text")
    yield {"saw": "answer", "text": text, "finish": answer.stop_reason}


def models(order: Order) -> Seen:
    with _client(order) as client:
        for model in client.models.list(limit=2):  # the client turns the pages
            yield {"saw": "model", "id": model.id, "name": model.display_name, "year": model.created_at.year}
        one = client.models.retrieve(order["model"])
    yield {"saw": "answer", "id": one.id, "type": one.type}


serve({"models": models, "chat": chat, "stream": stream, "tools": stream, "reasoning": stream})
