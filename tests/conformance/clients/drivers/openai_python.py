"""Drives the stock openai package."""

import json

import openai
from lines import SCHEMA, WEATHER, Order, Seen, serve, user


def _client(order: Order) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{order['url']}/v1", api_key="any")


def chat(order: Order) -> Seen:
    more = {"timeout": order["timeout_s"]} if "timeout_s" in order else {}
    if order["do"] == "schema":
        more["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        }
    with _client(order) as client:
        answer = client.chat.completions.create(
            model=order["model"], messages=user(order), max_tokens=order["max_tokens"], **more
        )
    [choice] = answer.choices
    usage = answer.usage.completion_tokens if answer.usage else None
    yield {
        "saw": "answer", "text": choice.message.content, "finish": choice.finish_reason, "model": answer.model,
        "tokens": usage,
    }  # fmt: skip


def stream(order: Order) -> Seen:
    more = {"tools": [{"type": "function", "function": WEATHER}]} if order["do"] == "tools" else {}
    text, finish, calls = "", None, {}
    left = order.get("hang_up_after")
    with (
        _client(order) as client,
        client.chat.completions.create(
            model=order["model"], messages=user(order), max_tokens=order["max_tokens"], stream=True, **more
        ) as chunks,
    ):
        for chunk in chunks:
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if thought := getattr(choice.delta, "reasoning_content", None):
                    yield {"saw": "thought", "text": thought}
                for call in choice.delta.tool_calls or []:
                    known = calls.setdefault(call.index, {"name": "", "arguments": ""})
                    known["name"] += call.function.name or ""
                    known["arguments"] += call.function.arguments or ""
                if choice.delta.content:
                    text += choice.delta.content
                    yield {"saw": "piece", "text": choice.delta.content}
                    if left is not None and (left := left - 1) == 0:
                        return
    for call in calls.values():
        yield {"saw": "tool", "name": call["name"], "arguments": json.loads(call["arguments"])}
    yield {"saw": "answer", "text": text, "finish": finish}


def embed(order: Order) -> Seen:
    with _client(order) as client:
        found = client.embeddings.create(model=order["model"], input=["balu", "7 + 4 = 11"])
    yield {"saw": "vectors", "count": len(found.data), "width": len(found.data[0].embedding)}


serve({"chat": chat, "schema": chat, "stream": stream, "tools": stream, "reasoning": stream, "embed": embed})
