"""How many tokens a prompt has: asked of a warm model's runtime by way of its tokenizer, beside its slots."""

import asyncio
import json
import logging
import re
from collections.abc import Mapping

import httpx

from broker import counts, errors, logs
from broker.counts import Question
from broker.dialects import json_splice
from broker.store import Store
from workers.runtimes.base import Endpoint, client_for
from workers.waker import Waker

log = logging.getLogger("warmlane.counting")

AT_ONCE_MAX = 4
"""Prompts that are counted at a time; who asks for more goes by an estimate."""

_find_count = re.compile(rb'"count"\s*:\s*(\d{1,12})').search
_tokens_in = re.compile(rb'\s*\{\s*"tokens"\s*:\s*\[([\d\s,]*)\]').match


class Counting:
    """Hears questions on the worker's control channel. Each is answered: nobody shall wait for nothing."""

    def __init__(self, store: Store, wakers: Mapping[str, Waker], *, tasks: asyncio.TaskGroup) -> None:
        self._store = store
        self._wakers = wakers
        self._tasks = tasks
        self._counted = 0

    def hear(self, message: bytes) -> bool:
        """Takes a question; False for any other message."""
        question = counts.heard(message)
        if question is None:
            return False
        self._tasks.create_task(self._answer(question), name=f"count for {question.api}")
        return True

    async def _answer(self, question: Question) -> None:
        self._counted += 1
        try:
            waker = self._wakers.get(question.model)
            chat = await counts.take(self._store, question)
            tokens = 0
            few = self._counted <= AT_ONCE_MAX
            if few and waker is not None and waker.resident and waker.counts and chat is not None:
                tokens = await count(waker.runtime.endpoint(), chat)
            await counts.answer(self._store, question, tokens)
        except errors.BrokerUnavailable as e:
            log.debug("event=count_unanswered model=%s reason=%s", question.model, e)
        finally:
            self._counted -= 1


async def count(endpoint: Endpoint, chat: bytes) -> int:
    """Counts the tokens that a chat request's prompt has for a runtime; 0 where it cannot or does not tell."""
    if not endpoint.tokenizer:
        return 0
    try:
        async with asyncio.timeout(counts.ANSWER_S_MAX), client_for(endpoint.base_url) as client:
            if endpoint.tokenizer == "vllm":
                return await _by_vllm(client, endpoint, json_splice.splice(chat, {"model": endpoint.model}))
            return await _by_llama(client, endpoint, chat)
    except Exception as e:  # noqa: BLE001 - whatever a runtime answers: there is an estimate, and the worker goes on
        log.debug("event=count_failed url=%s reason=%s", endpoint.base_url, logs.kind_of(e))
        return 0


async def _by_llama(client: httpx.AsyncClient, endpoint: Endpoint, chat: bytes) -> int:
    """llama-server writes the prompt by the model's template, and cuts it as it does for a generation."""
    written = await client.post(f"{endpoint.base_url}/apply-template", content=chat)
    prompt = written.json().get("prompt") if written.status_code == 200 else None
    if not isinstance(prompt, str):
        return 0
    asked = {"content": prompt, "add_special": True, "parse_special": True}
    cut = await client.post(f"{endpoint.base_url}/tokenize", content=json.dumps(asked))
    found = _tokens_in(cut.content) if cut.status_code == 200 else None
    return found[1].count(b",") + 1 if found and found[1].strip() else 0  # parsing some 100,000 numbers takes long


async def _by_vllm(client: httpx.AsyncClient, endpoint: Endpoint, chat: bytes) -> int:
    answer = await client.post(
        f"{endpoint.base_url}/tokenize", content=chat, headers={"Content-Type": "application/json"}
    )
    found = _find_count(answer.content) if answer.status_code == 200 else None
    return int(found[1]) if found else 0
