"""Whether a model can do a job at all. Pure: admission asks it before a job enters a lane, `due` before one moves.

Trust, room, warmth and price are other questions; what is refused here no waiting cures.
"""

from broker import errors
from broker.policy import Model
from broker.records import JobRecord

SPEAK_ANTHROPIC = frozenset({"ollama", "vllm"})
EMBEDDING_ENDPOINTS = frozenset({"/v1/embeddings", "/api/embed", "/api/embeddings"})


SURE_SHARE = 0.75
"""A prompt has at least this share of the tokens that its bytes let one expect: 5 bytes a token may be, 6 are not."""


def cannot_do(job: JobRecord, name: str, model: Model, *, surely: bool = False) -> errors.Refused | None:
    """Says why the model of this name cannot do the job, or None: the kind of answer, the context. By what is to be
    expected of the prompt, and with the longest answer that it asks for; `surely`: only what cannot be, since the
    runtime counts the tokens, and ends an answer that has no more room."""
    wants_vectors = job.endpoint in EMBEDDING_ENDPOINTS
    if wants_vectors != model.embeddings:
        gives = "vectors and no text" if model.embeddings else "text and no vectors"
        return errors.WrongEndpoint(f"{name} gives {gives}, so it does not serve {job.endpoint}")
    if "native" in job.needs.split() and model.backend != "ollama":
        return errors.WrongEndpoint(
            f"{name} is not served by an Ollama, which alone knows raw prompts, suffixes, templates and contexts"
        )
    if "files" in job.needs.split() and model.backend not in SPEAK_ANTHROPIC:
        return errors.WrongEndpoint(f"{name} reads text and pictures, and no documents or files by their id")
    prompt = job.longest or job.tokens
    need = int(prompt * SURE_SHARE) if surely else prompt + job.max_tokens
    if model.context_tokens is not None and need > model.context_tokens:
        what = "input" if wants_vectors else "prompt"
        if surely:
            return errors.ContextTooLong(
                f"{what} (about {prompt} tokens) is too long: {name} has {model.context_tokens} tokens of context"
            )
        answer = f" and answer ({job.max_tokens}) need" if job.max_tokens else " needs"
        return errors.ContextTooLong(
            f"{what} (about {prompt} tokens){answer} {need} tokens of context; {name} has {model.context_tokens}"
        )
    return None
