"""How many tokens a prompt has, by the tokenizer of the runtime that has its model warm.

It is a question to a worker and no job: it takes no slot, enters no lane and wakes nothing. Whoever asks has an
estimate, and goes by it where no answer comes at once. The answer is a frame on the asking process' own channel.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from ulid import ULID

from broker import errors
from broker.frames import Hub
from broker.hosts import Picture
from broker.records import Frame
from broker.store import Store

ANSWER_S_MAX = 1.0
QUESTION_MS = 2_000
PROMPT_BYTES_MAX = 1 << 20
"""A longer prompt is estimated: Redis, the worker's loop and the tokenizer have better things to do."""

RESIDENT: Final = ("warm", "degraded")
_WORD: Final = "count"


@dataclass(frozen=True)
class Question:
    """What a worker hears of it; the prompt lies in a key of its own."""

    id: str
    api: str  # the process that waits for the answer
    model: str

    def message(self) -> str:
        """Writes it for the worker's control channel."""
        return f"{_WORD} {self.id} {self.api} {self.model}"


async def ask(store: Store, hub: Hub, picture: Picture, *, model: str, chat: bytes) -> int | None:
    """Counts the tokens of a chat request where its model is warm; None = nobody could tell within ANSWER_S_MAX."""
    host = _who_counts(picture, model)
    if not host or len(chat) > PROMPT_BYTES_MAX:
        return None
    question = Question(str(ULID()), hub.name, model)
    reader = hub.open(question.id)
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await store.command("SET", store.keys.count(question.id), chat, "PX", QUESTION_MS)
            if not await store.command("PUBLISH", store.keys.control_channel(host), question.message()):
                return None
            found = await reader.next()
    except (TimeoutError, errors.BrokerUnavailable, errors.NoSuchJob):
        return None
    finally:
        hub.close(reader)
    return int(found.data) or None if isinstance(found, Frame) else None


def heard(message: bytes) -> Question | None:
    """Reads a message of a control channel; None where it is no question."""
    word, *rest = message.decode("utf-8", "replace").split(" ", 3)
    return Question(*rest) if word == _WORD and len(rest) == 3 else None


async def take(store: Store, question: Question) -> bytes | None:
    """Takes the chat request whose tokens are to be counted; None once it is too late."""
    found: bytes | None = await store.command("GETDEL", store.keys.count(question.id))
    return found


async def answer(store: Store, question: Question, tokens: int) -> None:
    """Tells the count to who asked; 0 = it cannot be told."""
    message = Frame(1, 1, _WORD, str(tokens).encode()).message(question.id)
    await store.command("PUBLISH", store.keys.frames_channel(question.api), message)


def _who_counts(picture: Picture, model: str) -> str:
    there = picture.on_host.get(model, {})
    return next((name for name, m in sorted(there.items()) if m.counts and m.state in RESIDENT), "")
