"""Reads a request as its own route would, and says which lanes it may use; nobody sends it anywhere.

Apart from `cli_explain`, because the routes take half a second to import, and other commands need none of them.
"""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import cast

from api.gateway import Gateway
from api.routes import anthropic, chat, completions, embeddings, ollama_generations, responses
from api.visit import Wishes
from broker import errors
from broker.callers import Caller
from broker.hosts import Fleet
from broker.policies import PolicyBook
from broker.store import Store
from broker.trust.explain import Explained, explain

ROUTES: Mapping[str, type[chat.ChatCompletions]] = {
    route.path: route
    for route in (
        chat.ChatCompletions,
        completions.Completions,
        embeddings.Embeddings,
        responses.Responses,
        anthropic.Messages,
        ollama_generations.OllamaChat,
        ollama_generations.OllamaGenerate,
        ollama_generations.OllamaEmbed,
        ollama_generations.OllamaEmbeddings,
    )
}


class Headers:
    """The headers of a request that nobody sent."""

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        self.headers = {name.lower().encode(): value.encode() for name, value in lines}

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")


async def dry_run(
    store: Store, book: PolicyBook, *, endpoint: str, body: bytes, headers: Iterable[tuple[str, str]], caller: Caller
) -> Explained:
    """Says it under the active policy; raises Refused with what the route itself would refuse."""
    await book.reload()
    active, fleet = book.active, Fleet(store, book)
    await fleet.look()
    route = ROUTES[endpoint](cast(Gateway, SimpleNamespace(book=book)))
    job = route.job_of(body, Wishes.of(Headers(headers)), caller)
    if job is None:
        raise errors.BadRequest("the gateway answers this request itself: it enters no lane")
    return await explain(active, fleet, job, body, may_leave=caller.rights.remote)
