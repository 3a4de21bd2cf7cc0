"""What a policy file may say: its keys, their defaults and ranges, as pydantic models with camelCase aliases.

Each field stands here once, with its description; the JSON Schema for editors is made from it. What needs more than one
key to judge is in `checks`.
"""

import ipaddress
import re
import shlex
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.json_schema import GenerateJsonSchema, WithJsonSchema

from broker.policy.document import shown
from broker.policy.hours import ActiveHours, parse_hours
from broker.policy.part import Part
from broker.policy.remote import Remote, RemoteOfModel
from broker.policy.webhooks import Webhooks

BATCH = ".batch"
PLACEHOLDERS = ("model", "port", "parallel", "context")
ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_ENV = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")
_LONG_MS = 30 * 24 * 3_600_000
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            "a name is 1 to 128 lower-case letters, digits, '.', '_' and '-', and starts with a letter or digit"
        )
    return value


def _model_name(value: str) -> str:
    if value.endswith(BATCH):
        raise ValueError("a model's name may not end in '.batch', which is the name of its batch lane")
    return value


def _alias(value: str) -> str:
    """Allows what runtimes call models, which may be a file's path; an alias names no lane and no key."""
    if not value.isprintable() or value != value.strip() or not 0 < len(value) <= 256:
        raise ValueError("an alias is 1 to 256 printable characters with no space at either end")
    return value


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError("a host's name is letters, digits, '.', '_' and '-'")
    return value


def _filled(value: str) -> str:
    if not value.strip() or "\n" in value or len(value) > 1024:
        raise ValueError("must be 1 to 1024 characters on one line")
    return value


def _label(value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value) > 32:
        raise ValueError("must be 1 to 32 characters on one line")
    return value


def _url(value: str) -> str:
    """Takes the address with or without the `/v1` that each request adds."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"\s", value):
        raise ValueError("must be a URL like http://127.0.0.1:8080")
    if parts.username is not None or parts.password is not None:
        raise ValueError("may not hold a user name or password, because everyone who sees the policy would see it")
    if parts.query or parts.fragment:
        raise ValueError("may not hold '?' or '#'")
    return value.rstrip("/").removesuffix("/v1")


def _env_name(value: str) -> str:
    """Takes no small letters, so that a key that was written here by mistake is refused, and never repeats it."""
    if not _ENV.fullmatch(value):
        raise ValueError(
            "is the name of an environment variable, in capitals like OPENAI_API_KEY; the key itself stays out of here"
        )
    return value


def _command(value: object) -> object:
    """Splits a command like a shell does; a list is taken as it is, with its numbers written out."""
    if isinstance(value, str):
        try:
            parts = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {str(error).lower()}") from None
    elif isinstance(value, list):
        if not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in value):
            raise ValueError("must be text or a list of words")
        parts = [str(part) for part in value]
    else:
        return value
    if not parts or not parts[0].strip():
        raise ValueError("is empty")
    for part in parts:
        for word in _PLACEHOLDER.findall(part):
            if word not in PLACEHOLDERS:
                known = ", ".join(f"{{{p}}}" for p in PLACEHOLDERS)
                raise ValueError(f"unknown placeholder {{{word}}}, use {known}")
    return parts


def _hours(value: str) -> str:
    parse_hours(value)
    return value


def _wake_for_batch(value: object) -> object:
    if not isinstance(value, bool) and value != "outsideHours":
        raise ValueError(f"must be true, false or outsideHours, not {shown(value)}")
    return value


def _endpoint(value: str) -> str:
    if value not in ENDPOINTS:
        raise ValueError(f"is no endpoint of the gateway, use one of {', '.join(ENDPOINTS)}")
    return value


Name = Annotated[str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})]
ModelName = Annotated[Name, AfterValidator(_model_name)]
Alias = Annotated[str, AfterValidator(_alias), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 256})]
Host = Annotated[str, AfterValidator(_host), WithJsonSchema({"type": "string", "pattern": f"^{_HOST.pattern}$"})]
EnvName = Annotated[str, AfterValidator(_env_name), WithJsonSchema({"type": "string", "pattern": f"^{_ENV.pattern}$"})]
Text = Annotated[str, AfterValidator(_filled), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1024})]
Label = Annotated[str, AfterValidator(_label), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 32})]
Url = Annotated[str, AfterValidator(_url), WithJsonSchema({"type": "string", "pattern": "^https?://"})]
Endpoint = Annotated[str, AfterValidator(_endpoint), WithJsonSchema({"type": "string", "enum": list(ENDPOINTS)})]
Hours = Annotated[
    str, AfterValidator(_hours), WithJsonSchema({"type": "string", "examples": ["Mon-Fri 08:00-19:00 Europe/Berlin"]})
]
WakeForBatch = Annotated[
    bool | Literal["outsideHours"],
    BeforeValidator(_wake_for_batch),
    WithJsonSchema({"enum": [True, False, "outsideHours"]}),
]
Command = Annotated[
    list[str],
    BeforeValidator(_command),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number"]}}]}),
]
Ms = Annotated[int, Field(ge=0, le=_LONG_MS)]
SomeMs = Annotated[int, Field(ge=1, le=_LONG_MS)]
QueueBudget = Annotated[int, Field(ge=0, le=100_000)]
Trust = Literal["local", "remote"]
Priority = Literal["interactive", "batch"]


def is_loopback(url: str) -> bool:
    """Whether an address that passed the check leads to the host itself."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Schema(GenerateJsonSchema):
    """JSON Schema without the titles that pydantic makes up (`Coldstartbudgetms`)."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


class Model(Part):
    """One model: the runtime that serves it, its weights, and what its own lane allows."""

    backend: Literal["ollama", "llama.cpp", "vllm", "simulated", "openai"] = Field(
        description="The runtime that serves the model; openai is a remote provider that speaks OpenAI's protocol."
    )
    model: Text = Field(
        description="What the runtime calls the weights: an Ollama tag, a GGUF file's path, a router's or vLLM's id."
    )
    url: Url | None = Field(None, description="Where the runtime listens, when it is not at its usual place.")
    api_key_env: EnvName | None = Field(
        None, description="The variable of the worker's environment that holds the remote provider's key."
    )
    embeddings: bool = Field(False, description="The model gives vectors (/v1/embeddings) and no text.")
    command: Command | None = Field(
        None, description="How we start llama-server; {model}, {port}, {parallel} and {context} are filled in."
    )
    keep_warm: bool = Field(False, description="Keep the model loaded while nobody asks for it.")
    active_hours: Hours | None = Field(
        None, description="Keep it warm only then: 'Mon-Fri 08:00-19:00 Europe/Berlin'; always when left out."
    )
    wake_for_batch: WakeForBatch = Field(
        True,
        description="Whether batch work wakes it when it is cold: true, false, or outsideHours for all times but "
        "activeHours. Else such work waits until somebody else's wakes it.",
    )
    max_concurrent: int = Field(1, ge=1, le=1024, description="Generations that run at once on a host.")
    max_queue: QueueBudget = Field(8, description="Jobs that may wait in the model's own lane.")
    cold_start_budget_ms: Ms = Field(25_000, description="How long a job waits before it tries the fallback.")
    max_wait_ms: SomeMs = Field(120_000, description="How long a job waits before it is given up.")
    fallback: Name | None = Field(None, description="The model or lane that takes jobs that waited too long.")
    max_downgrade_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="At most this share of the jobs that ask for the model is served by another; 1 = any.",
    )
    sticky_promotion_ms: Ms = Field(
        0, description="How long a session that was promoted stays on the fallback; 0 = it does not."
    )
    memory_mb: int | None = Field(None, ge=1, le=100_000_000, description="Memory of the loaded model; else learned.")
    context_tokens: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="The longest prompt plus answer of one generation. What may be longer goes to a fallback that has "
        "room; where none has, only what surely is too long is refused.",
    )
    first_token_budget_ms: SomeMs = Field(8_000, description="Probes slower than this make the model degraded.")
    first_token_timeout_ms: SomeMs = Field(300_000, description="Longest wait for a first token on a warm model.")
    stall_timeout_ms: SomeMs = Field(60_000, description="Longest silence of the runtime after the first token.")
    on_loss: Literal["continue", "error"] = Field(
        "error",
        description="What becomes of a half-told answer whose worker or runtime is lost: another attempt goes on from "
        "plain text, or its client hears an error.",
    )
    wake_timeout_ms: SomeMs = Field(300_000, description="Longest wait for the model to load and answer.")
    min_stay_ms: Ms = Field(60_000, description="How long a woken model stays before another may take its memory.")
    idle_unload_ms: SomeMs = Field(900_000, description="Unload after this long without work, unless kept warm.")
    settle_ms: Ms = Field(30_000, description="How long the slot of a closed generation may take to become free.")
    weight: float = Field(1.0, gt=0, le=1000, description="How much the model is worth when one must be evicted.")
    label: Label | None = Field(None, description="A short name for the status table.")
    aliases: list[Alias] = Field(default_factory=list, description="Other names that clients may ask for.")
    hosts: list[Host] | None = Field(None, description="The hosts that may serve the model; all when left out.")
    replicas: int = Field(1, ge=1, le=64, description="How many hosts load the model, where that many may serve it.")
    trust: Trust = Field("local", description="Where prompts for this model go.")
    remote: RemoteOfModel | None = Field(None, description="What goes to this remote model, where that is less.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options for the runtime, passed on as they are.")

    @property
    def hours(self) -> ActiveHours | None:
        """When it is kept warm, if not always."""
        return None if self.active_hours is None else parse_hours(self.active_hours)

    def wakes_for_batch(self, now_ms: int) -> bool:
        """Whether batch work may wake it at this instant."""
        if self.wake_for_batch != "outsideHours":
            return self.wake_for_batch
        hours = self.hours
        return hours is None or not hours.contains(now_ms)

    @property
    def shared(self) -> bool:
        """Whether all hosts would reach the same runtime: its slots are the fleet's, and one host owns them."""
        return self.backend == "openai" or (self.url is not None and not is_loopback(self.url))


class LaneEntry(Part):
    """What a lane has of its own; everything left out comes from the lane's model."""

    target: Name | None = Field(None, description="The model that serves the lane, where no routing rule says it.")
    max_queue: QueueBudget | None = Field(None, description="Jobs that may wait in the lane.")
    cold_start_budget_ms: Ms | None = Field(None, description="How long a job waits before it tries the fallback.")
    max_wait_ms: SomeMs | None = Field(None, description="How long a job waits before it is given up.")
    priority: Priority | None = Field(None, description="Interactive work always goes before batch work.")
    fallback: Name | None = Field(
        None, description="The model or lane that takes jobs that waited too long; write null for none."
    )


class Match(Part):
    """What a request must look like for a rule; every key given must fit."""

    lane: Name | None = Field(None, description="The name asked for, in X-Gateway-Lane or as the request's model.")
    caller: Text | None = Field(None, description="The name of the caller's key.")
    endpoint: Endpoint | None = Field(None, description="The path of the request.")
    prompt_tokens_over: int | None = Field(None, ge=0, description="The prompt has more tokens than this.")
    prompt_tokens_under: int | None = Field(None, ge=1, description="The prompt has fewer tokens than this.")


class Rule(Part):
    """One routing rule; rules are read top-down and the first that fits decides."""

    match: Match = Field(description="What a request must look like.")
    target: Name = Field(description="The model or lane that gets the request.")


class Content(Part):
    """Everything that a policy file says."""

    models: dict[ModelName, Model] = Field(min_length=1, description="The models, by the name that clients ask for.")
    routing: list[Rule] = Field(
        default_factory=list, description="Rules that send requests to models, read top-down, first match wins."
    )
    lanes: dict[Name, LaneEntry] = Field(
        default_factory=dict, description="Lanes with a waiting line of their own, and changes to a model's lane."
    )
    remote: Remote = Field(
        default_factory=Remote, description="What of a request may go to remote models, if it may leave at all."
    )
    webhooks: Webhooks = Field(
        default_factory=Webhooks, description="What else than public addresses webhooks may reach."
    )
    audit_days: int = Field(90, ge=1, le=3_650, description="How long the records of what left are kept.")
    max_losses: int = Field(3, ge=0, le=100, description="How often a job starts again after its worker was lost.")
    header_hold_ms: Ms = Field(5_000, description="How long a stream's headers wait for a real status.")
    disconnect_grace_ms: Ms = Field(4_000, description="How long a job waits for the retry of a client that hung up.")
    drain_timeout_ms: Ms = Field(30_000, description="How long a stopping worker finishes what runs.")
    keep_ms: SomeMs = Field(600_000, description="How long an ended synchronous job can be read.")
    keep_async_ms: SomeMs = Field(86_400_000, description="How long an ended asynchronous job can be read.")
    usage_days: int = Field(90, ge=1, le=3650, description="How many days the counters of a day are kept after it.")
    file_days: int = Field(7, ge=1, le=365, description="How many days a file is kept, of a batch or its answers.")
    max_file_mb: int = Field(100, ge=1, le=512, description="The largest file that a caller may send.")
    max_files_mb: int = Field(1_000, ge=1, le=1_000_000, description="What all files of one caller may hold.")
