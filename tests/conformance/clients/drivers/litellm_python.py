"""Drives litellm as its readers use it: `openai/<model>` and an api_base."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the list of prices is not looked up on the network

import litellm
from lines import SCHEMA, WEATHER, Order, Seen, serve, user

litellm.telemetry = False
litellm.suppress_debug_info = True


def _ask(order: Order, **more: object) -> object:
    known = {"model": f"openai/{order['model']}", "api_base": f"{order['url']}/v1", "api_key": "any"}
    return litellm.completion(**known, messages=user(order), max_tokens=order["max_tokens"], **more)


def chat(order: Order) -> Seen:
    more = {}
    if order["do"] == "schema":
        schema = {"name": "answer", "schema": SCHEMA, "strict": True}
        more["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = _ask(order, **more)
    [choice] = answer.choices
    yield {
        "saw": "answer", "text": choice.message.content, "finish": choice.finish_reason, "model": answer.model,
        "tokens": answer.usage.completion_tokens,
    }  # fmt: skip


def stream(order: Order) -> Seen:
    more = {"tools": [{"type": "function", "function": WEATHER}]} if order["do"] == "tools" else {}
    text, finish, calls = "", None, {}
    left = order.get("hang_up_after")
    chunks = _ask(order, stream=True, **more)
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
                    chunks.completion_stream.close()
                    return
    for call in calls.values():
        yield {"saw": "tool", "name": call["name"], "arguments": json.loads(call["arguments"])}
    yield {"saw": "answer", "text": text, "finish": finish}


def embed(order: Order) -> Seen:
    known = {"model": f"openai/{order['model']}", "api_base": f"{order['url']}/v1", "api_key": "any"}
    found = litellm.embedding(**known, input=["balu", "7 + 4 = 11"], encoding_format="float")
    yield {"saw": "vectors", "count": len(found.data), "width": len(found.data[0]["embedding"])}


serve({"chat": chat, "schema": chat, "stream": stream, "tools": stream, "reasoning": stream, "embed": embed})
