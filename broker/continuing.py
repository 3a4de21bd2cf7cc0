"""Whether a half-told answer can be gone on from, and from what.

Who loses an answer (the scheduler at the end of a lease, a worker whose runtime broke) asks `judge`. What that finds in
the request and in the log of frames holds for the last frame that it read: the script that puts the job back refuses
when there are more by then.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from broker.dialects import (
    anthropic,
    anthropic_translate,
    going_on,
    ollama,
    ollama_request,
    ollama_translate,
    openai,
    openai_completions,
    partial,
    responses,
)
from broker.dialects.partial import Partial
from broker.errors import BadRequest
from broker.frames import replay
from broker.jobs import GoOn
from broker.policies import Active
from broker.records import JobRecord
from broker.store import Store

_TOLD: Mapping[str, Callable[[bytes], Partial | None]] = {
    openai.PATH: partial.chat,
    openai_completions.PATH: partial.completion,
    anthropic.PATH: partial.messages,
    responses.PATH: partial.responses,
    ollama.CHAT: partial.ollama,
    ollama.GENERATE: partial.ollama,
}

_AS_CHAT: Mapping[str, Callable[[bytes], bytes]] = {
    openai.PATH: lambda body: body,
    anthropic.PATH: lambda body: anthropic_translate.to_chat(anthropic.read_messages(body), ""),
    responses.PATH: lambda body: responses.ask_chat(body, ""),
    ollama.CHAT: lambda body: ollama_translate.to_chat(ollama_request.read_chat(body), ""),
    ollama.GENERATE: lambda body: ollama_translate.to_chat(ollama_request.read_generate(body), ""),
}


def within_ms(active: Active, job: JobRecord) -> int | None:
    """How long a job's answer may wait to be gone on from: its lane's cold-start budget, of a batch lane the model's.
    None = its model does not go on with answers, or not with this one: nobody has judged whether a half-told answer may
    leave the machine; an Ollama puts a template around the prompt of a completion, and would begin a turn behind the
    text."""
    lane = active.lane(job.lane)
    model = active.model(lane.model) if lane is not None else None
    if lane is None or model is None or model.on_loss != "continue" or model.trust == "remote":
        return None
    if model.backend == "ollama" and job.endpoint == openai_completions.PATH:
        return None
    return max(1, model.cold_start_budget_ms if lane.priority == "batch" else lane.cold_start_budget_ms)


async def judge(store: Store, job: JobRecord, *, within_ms: int | None, body: bytes | None = None) -> GoOn | None:
    """Judges a held job that is lost; `body` saves a look at its request. None = its answer cannot be gone on from."""
    if within_ms is None or not job.stream or job.mode != "sync" or job.choices != 1:
        return None
    if body is None:
        body = await store.command("GET", store.keys.request(job.id))
    if body is None or not may_go_on(job.endpoint, body):
        return None
    told, last_seq = await so_far(store, job)
    if told is None or last_seq < job.last_seq:  # Redis lost a part of what the client has
        return None
    return GoOn(last_seq, within_ms)


async def so_far(store: Store, job: JobRecord) -> tuple[Partial | None, int]:
    """Reads what the client has been told, and the number of the last frame; None where there is more than text."""
    read = _TOLD.get(job.endpoint)
    if read is None:
        return None, 0
    frames = [frame async for frame in replay(store, job.id)]
    last_seq = frames[-1].seq if frames else 0
    if any(frame.terminal for frame in frames):
        return None, last_seq
    return read(b"".join(frame.data for frame in frames)), last_seq


def may_go_on(endpoint: str, body: bytes) -> bool:
    """Whether the answer to a request can be gone on from in the middle, as far as the request says."""
    try:
        if endpoint == openai_completions.PATH:
            return going_on.completion_may_go_on(_object(body))
        as_chat = _AS_CHAT.get(endpoint)
        return as_chat is not None and going_on.chat_may_go_on(_object(as_chat(body)))
    except (BadRequest, *partial.ODD):  # only the runtime that began it knows what to make of it
        return False


def _object(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    return found if isinstance(found, dict) else {}
