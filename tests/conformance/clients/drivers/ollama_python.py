"""Drives the stock ollama package."""

import ollama
from lines import SCHEMA, WEATHER, Order, Seen, serve, user


def _words(order: Order) -> dict[str, object]:
    return {"model": order["model"], "messages": user(order), "options": {"num_predict": order["max_tokens"]}}


def chat(order: Order) -> Seen:
    more = {"format": SCHEMA} if order["do"] == "schema" else {}
    answer = ollama.Client(host=order["url"]).chat(**_words(order), **more)
    yield {
        "saw": "answer", "text": answer.message.content, "finish": answer.done_reason, "model": answer.model,
        "tokens": answer.eval_count,
    }  # fmt: skip


def stream(order: Order) -> Seen:
    more = {"tools": [{"type": "function", "function": WEATHER}]} if order["do"] == "tools" else {}
    text, finish = "", None
    left = order.get("hang_up_after")
    pieces = ollama.Client(host=order["url"]).chat(**_words(order), stream=True, **more)
    for piece in pieces:
        finish = piece.done_reason or finish
        if piece.message.thinking:
            yield {"saw": "thought", "text": piece.message.thinking}
        for call in piece.message.tool_calls or []:
            yield {"saw": "tool", "name": call.function.name, "arguments": dict(call.function.arguments)}
        if piece.message.content:
            text += piece.message.content
            yield {"saw": "piece", "text": piece.message.content}
            if left is not None and (left := left - 1) == 0:
                pieces.close()
                return
    yield {"saw": "answer", "text": text, "finish": finish}


def embed(order: Order) -> Seen:
    found = ollama.Client(host=order["url"]).embed(model=order["model"], input=["balu", "7 + 4 = 11"])
    yield {"saw": "vectors", "count": len(found.embeddings), "width": len(found.embeddings[0])}


serve({"chat": chat, "schema": chat, "stream": stream, "tools": stream, "reasoning": stream, "embed": embed})
