"""The policy file: what loads, what is refused and with which sentence, and which lane a request gets."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.errors import PolicyInvalid, UnknownModel
from broker.policy import Lane, Policy
from broker.policy.content import Content, LaneEntry, Match, Model, Part, Rule

POLICIES = Path(__file__).parent / "policies"
CHAT = "/v1/chat/completions"


def load(name: str) -> Policy:
    return Policy.parse((POLICIES / f"{name}.yaml").read_text())


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyInvalid) as caught:
        Policy.parse(text)
    return caught.value.problems


def model(*lines: str, backend: str = "simulated") -> str:
    """A policy of one model `m`, whose extra lines start at line 5."""
    return "\n".join(["models:", "  m:", f"    backend: {backend}", "    model: x", *(f"    {line}" for line in lines)])


def two(*lines: str) -> str:
    """A policy of the models `small` and `deep` on lines 2 and 3; the extra lines start at line 4."""
    head = ["models:", "  small: { backend: simulated, model: s }", "  deep: { backend: simulated, model: d }"]
    return "\n".join([*head, *lines])


def route(policy: Policy, asked: str, **facts: Any) -> str:
    request: dict[str, Any] = {"caller": "ann", "endpoint": CHAT, "prompt_tokens": 100, **facts}
    return policy.route(asked, **request).name


# --- what loads ---


def test_the_example_of_the_specification_loads_as_it_is_written() -> None:
    policy = load("spec")

    deep, small = policy.models["deep-coder"], policy.models["coder-small"]
    assert (deep.backend, deep.model, deep.keep_warm, deep.max_concurrent) == ("ollama", "qwen2.5-coder:32b", True, 2)
    assert (deep.max_queue, deep.cold_start_budget_ms, deep.fallback) == (6, 25_000, "coder-small")
    assert (small.backend, small.max_concurrent, small.max_queue) == ("llama.cpp", 4, 12)
    assert small.model == "/models/qwen2.5-coder-7b-q4_k_m.gguf"
    assert (small.cold_start_budget_ms, small.fallback) == (4_000, None)
    assert route(policy, "high-context") == "deep-coder"
    assert route(policy, "fast-edit") == "coder-small"
    assert policy.names() == ["deep-coder", "coder-small", "high-context", "fast-edit"]


def test_defaults_are_those_of_the_design() -> None:
    policy = Policy.parse(model())

    said = policy.models["m"].model_dump(by_alias=True, exclude={"backend", "model"})
    assert said == {
        "url": None,
        "apiKeyEnv": None,
        "embeddings": False,
        "command": None,
        "keepWarm": False,
        "activeHours": None,
        "wakeForBatch": True,
        "maxConcurrent": 1,
        "maxQueue": 8,
        "coldStartBudgetMs": 25_000,
        "maxWaitMs": 120_000,
        "fallback": None,
        "maxDowngradeShare": 1.0,
        "stickyPromotionMs": 0,
        "memoryMb": None,
        "contextTokens": None,
        "firstTokenBudgetMs": 8_000,
        "firstTokenTimeoutMs": 300_000,
        "stallTimeoutMs": 60_000,
        "onLoss": "error",
        "wakeTimeoutMs": 300_000,
        "minStayMs": 60_000,
        "idleUnloadMs": 900_000,
        "settleMs": 30_000,
        "weight": 1.0,
        "label": None,
        "aliases": [],
        "hosts": None,
        "replicas": 1,
        "trust": "local",
        "remote": None,
        "options": {},
    }
    assert policy.model_dump(by_alias=True, exclude={"models"}) == {
        "routing": [],
        "lanes": {},
        "remote": {"allow": [], "maxBytes": 262_144, "redact": []},
        "webhooks": {"allow": []},
        "auditDays": 90,
        "maxLosses": 3,
        "headerHoldMs": 5_000,
        "disconnectGraceMs": 4_000,
        "drainTimeoutMs": 30_000,
        "keepMs": 600_000,
        "keepAsyncMs": 86_400_000,
        "usageDays": 90,
        "fileDays": 7,
        "maxFileMb": 100,
        "maxFilesMb": 1_000,
    }


def test_every_key_can_be_set() -> None:
    """The file sets each key to something else than its default, so a key that were ignored would show."""
    policy = load("everything")

    set_here = set().union(*(model.model_fields_set for model in policy.models.values()))
    assert set_here == set(Model.model_fields)
    assert policy.lanes["fast-edit"].model_fields_set | {"target"} == set(LaneEntry.model_fields)
    assert policy.model_fields_set == set(Content.model_fields)
    assert set().union(*(rule.match.model_fields_set for rule in policy.routing)) == set(Match.model_fields)
    assert (policy.max_losses, policy.header_hold_ms, policy.disconnect_grace_ms) == (2, 4_000, 3_000)
    assert (policy.drain_timeout_ms, policy.keep_ms, policy.keep_async_ms) == (20_000, 500_000, 3_600_000)
    assert policy.usage_days == 30
    assert (policy.file_days, policy.max_file_mb, policy.max_files_mb) == (14, 50, 2_000)
    assert policy.models["deep-coder"].weight == 2.5
    assert policy.models["deep-coder"].options == {"sleepLevel": 2}


def test_a_command_is_split_like_a_shell_does_and_json_in_it_is_left_alone() -> None:
    command = load("everything").models["coder-small"].command

    assert command is not None
    assert command[:5] == ["llama-server", "-m", "{model}", "--port", "{port}"]
    assert command[-2:] == ["--chat-template-kwargs", '{"think":false}']


def test_a_command_list_may_hold_numbers() -> None:
    policy = Policy.parse(model('command: ["llama-server", --port, "{port}", -c, 4096]', backend="llama.cpp"))

    assert policy.models["m"].command == ["llama-server", "--port", "{port}", "-c", "4096"]


def test_an_alias_may_be_what_a_runtime_calls_its_model() -> None:
    """Also written as JSON does, which makes two escapes of a rare character."""
    aliases = ["hf.co/Org/Na_Me:Q4", "/models/my coder.gguf", "\u65e5\u672c", "\U0001f600"]
    policy = Policy.parse(model(f"aliases: {json.dumps(aliases)}"))

    assert policy.models["m"].aliases == aliases
    assert [route(policy, alias) for alias in aliases] == ["m"] * 4


@pytest.mark.parametrize("url", ["http://box:8080", "http://box:8080/", "http://box:8080/v1", "http://box:8080/v1/"])
def test_a_url_is_taken_with_or_without_v1(url: str) -> None:
    assert Policy.parse(model(f"url: {url}", backend="ollama")).models["m"].url == "http://box:8080"


def test_the_stored_text_gives_the_same_policy_again() -> None:
    policy = load("everything")

    again = Policy.parse(policy.text)
    assert again.text == (POLICIES / "everything.yaml").read_text()
    assert again.digest == policy.digest
    assert again.all_lanes() == policy.all_lanes()


def test_the_digest_follows_what_the_file_decides_and_not_how_it_is_written() -> None:
    digest = Policy.parse(model("maxQueue: 8", "label: one")).digest

    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert Policy.parse("# why\n" + model("label: 'one'", "maxQueue: 8")).digest == digest
    assert Policy.parse(model("label: one")).digest == digest, "a default written out decides nothing"
    assert Policy.parse(model("maxQueue: 9", "label: one")).digest != digest
    assert Policy.parse(two()).digest != Policy.parse("\n".join([two().splitlines()[i] for i in (0, 2, 1)])).digest


# --- what is refused: one sentence each ---

NAME = "a name is 1 to 128 lower-case letters, digits, '.', '_' and '-', and starts with a letter or digit"

IN_A_MODEL = [
    ("maxQeue: 6", "maxQeue: unknown key 'maxQeue', did you mean 'maxQueue'?"),
    ("max_queue: 6", "max_queue: unknown key 'max_queue', did you mean 'maxQueue'?"),
    ("headerHoldMs: 6", "headerHoldMs: unknown key 'headerHoldMs' here, it belongs at the top of the file"),
    ("activeHours: 8-19", "activeHours: '8-19' are no times; write them like 'Mon-Fri 08:00-19:00 Europe/Berlin'"),
    ("activeHours: 08:00-19:00 Berlin", "activeHours: 'Berlin' is no time zone, did you mean 'Europe/Berlin'?"),
    ("activeHours: 8", "activeHours: must be text, not 8"),
    ("maxDowngradeShare: 1.5", "maxDowngradeShare: must be at most 1, not 1.5"),
    ("maxDowngradeShare: -0.1", "maxDowngradeShare: must be at least 0, not -0.1"),
    ("maxDowngradeShare: 10%", "maxDowngradeShare: must be a number, not '10%'"),
    ("stickyPromotionMs: -1", "stickyPromotionMs: must be at least 0, not -1"),
    ("stickyPromotionMs: 10min", "stickyPromotionMs: must be a whole number of milliseconds, not '10min'"),
    ("replicas: 0", "replicas: must be at least 1, not 0"),
    ("apiKeyEnv: KEY", "apiKeyEnv: only an openai model has a key, and this one is simulated"),
    ("embeddings: 1", "embeddings: must be true or false, not 1"),
    ("wakeForBatch: sometimes", "wakeForBatch: must be true, false or outsideHours, not 'sometimes'"),
    ("wakeForBatch: 1", "wakeForBatch: must be true, false or outsideHours, not 1"),
    ("wakeForBatch: outsideHours", "wakeForBatch: outsideHours needs activeHours to be outside of"),
    ("onLoss: retry", "onLoss: must be one of continue, error, not 'retry'"),
    ("keepWarm: yes", "keepWarm: must be true or false, not 'yes'"),
    ("keepWarm: 1", "keepWarm: must be true or false, not 1"),
    ("maxConcurrent: 0", "maxConcurrent: must be at least 1, not 0"),
    ("maxConcurrent: 5000", "maxConcurrent: must be at most 1,024, not 5000"),
    ("maxConcurrent: 1.5", "maxConcurrent: must be a whole number, not 1.5"),
    ("maxConcurrent: true", "maxConcurrent: must be a whole number, not true"),
    ("maxQueue: -1", "maxQueue: must be at least 0, not -1"),
    ("maxQueue: 010", "maxQueue: must be a whole number, not '010'"),
    ("maxQueue: 100001", "maxQueue: must be at most 100,000, not 100001"),
    ("maxQueue:", "maxQueue: must be a whole number, not empty"),
    ("maxQueue: [6]", "maxQueue: must be a whole number, not a list"),
    ("coldStartBudgetMs: 25s", "coldStartBudgetMs: must be a whole number of milliseconds, not '25s'"),
    ("coldStartBudgetMs: -1", "coldStartBudgetMs: must be at least 0, not -1"),
    ("coldStartBudgetMs: 9999999999", "coldStartBudgetMs: must be at most 2,592,000,000, not 9999999999"),
    ("maxWaitMs: 0", "maxWaitMs: must be at least 1, not 0"),
    ("firstTokenBudgetMs: 0", "firstTokenBudgetMs: must be at least 1, not 0"),
    ("firstTokenTimeoutMs: 0", "firstTokenTimeoutMs: must be at least 1, not 0"),
    ("stallTimeoutMs: 0", "stallTimeoutMs: must be at least 1, not 0"),
    ("wakeTimeoutMs: 0", "wakeTimeoutMs: must be at least 1, not 0"),
    ("minStayMs: -5", "minStayMs: must be at least 0, not -5"),
    ("idleUnloadMs: 0", "idleUnloadMs: must be at least 1, not 0"),
    ("settleMs: -5", "settleMs: must be at least 0, not -5"),
    ("memoryMb: 8G", "memoryMb: must be a whole number of megabytes, not '8G'"),
    ("memoryMb: 0", "memoryMb: must be at least 1, not 0"),
    ("contextTokens: 0", "contextTokens: must be at least 1, not 0"),
    ("weight: 0", "weight: must be more than 0, not 0"),
    ("weight: heavy", "weight: must be a number, not 'heavy'"),
    ("weight: 1e400", "weight: this number is too large"),
    ("label: ''", "label: must be 1 to 32 characters on one line"),
    ("label: 7", "label: must be text, not 7"),
    ("aliases: gpt-4o", "aliases: must be a list, not 'gpt-4o'"),
    ("aliases: [a, ' b']", "aliases[1]: an alias is 1 to 256 printable characters with no space at either end"),
    ("aliases: ['']", "aliases[0]: an alias is 1 to 256 printable characters with no space at either end"),
    ("hosts: []", "hosts: names no host; leave the key out to allow all"),
    ("hosts: ['gpu box']", "hosts[0]: a host's name is letters, digits, '.', '_' and '-'"),
    ("trust: remot", "trust: must be one of local, remote, not 'remot', did you mean 'remote'?"),
    ("trust: [local]", "trust: must be one of local, remote, not a list"),
    ("options: [1]", "options: must be a mapping of keys to values, not a list"),
    ("fallback: Small", f"fallback: {NAME}"),
    ("fallback: ['a']", "fallback: must be text, not a list"),
    ("fallback: mm", "fallback: unknown fallback 'mm', did you mean 'm'?"),
    ("fallback: zzz", "fallback: unknown fallback 'zzz'"),
    ("fallback: m.batch", "fallback: 'm.batch' is a batch lane, where an interactive job would wait behind all others"),
    ("fallback: m", "fallback: fallbacks go in a circle: m -> m"),
    ("url: http://127.0.0.1:1", "url: a simulated model has no url"),
    ("url: box:8080", "url: must be a URL like http://127.0.0.1:8080"),
    ("url: ftp://box", "url: must be a URL like http://127.0.0.1:8080"),
    ("url: 'http://a b'", "url: must be a URL like http://127.0.0.1:8080"),
    ("url: http://box:99999", "url: is not a URL"),
    ("url: http://box/?key=1", "url: may not hold '?' or '#'"),
    (
        "url: http://me:secret@box:1",
        "url: may not hold a user name or password, because everyone who sees the policy would see it",
    ),
    ("command: run {port}", "command: only a llama.cpp model is started by a command, and this one is simulated"),
    ("command: 'a \"b'", "command: cannot be split into words: no closing quotation"),
    ("command: ''", "command: is empty"),
    ("command: []", "command: is empty"),
    ("command: [a, [b]]", "command: must be text or a list of words"),
    ("command: 5", "command: must be a list, not 5"),
    ("command: a {prot}", "command: unknown placeholder {prot}, use {model}, {port}, {parallel}, {context}"),
]


@pytest.mark.parametrize(("line", "words"), IN_A_MODEL, ids=[line for line, _ in IN_A_MODEL])
def test_a_wrong_key_of_a_model_is_one_sentence(line: str, words: str) -> None:
    assert problems(model(line)) == [f"line 5: models.m.{words}"]


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("olama", "must be one of ollama, llama.cpp, vllm, simulated, openai, not 'olama', did you mean 'ollama'?"),
        ("[ollama]", "must be one of ollama, llama.cpp, vllm, simulated, openai, not a list"),
        ("tgi", "must be one of ollama, llama.cpp, vllm, simulated, openai, not 'tgi'"),
    ],
)
def test_an_unknown_backend_is_one_sentence(backend: str, words: str) -> None:
    assert problems(model(backend=backend)) == [f"line 3: models.m.backend: {words}"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["command: serve {port}", "url: http://127.0.0.1:1"],
            "command and url exclude each other: we start the server, or it runs already",
        ),
        (["command: serve {model}"], "must hold {port}, because we choose where the server listens"),
    ],
)
def test_a_wrong_command_of_a_llama_server_is_one_sentence(lines: list[str], words: str) -> None:
    assert problems(model(*lines, backend="llama.cpp")) == [f"line 5: models.m.command: {words}"]


def test_vectors_are_not_gone_on_with() -> None:
    words = "line 6: models.m.onLoss: must be error, because vectors cannot be gone on with in the middle"
    assert problems(model("embeddings: true", "onLoss: continue")) == [words]


KEY_WORDS = "is the name of an environment variable, in capitals like OPENAI_API_KEY; the key itself stays out of here"
REMOTE = {"url": "url: https://api.example.com", "trust": "trust: remote"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [REMOTE["url"]],
            "line 2: models.m.trust: must be remote, because prompts for an openai model leave the machine",
        ),
        (
            [REMOTE["trust"]],
            "line 2: models.m.url: is missing: where does the provider listen? https://api.openai.com, for one",
        ),
        ([*REMOTE.values(), "apiKeyEnv: sk-proj-secret"], f"line 7: models.m.apiKeyEnv: {KEY_WORDS}"),
        ([*REMOTE.values(), "apiKeyEnv: 2KEY"], f"line 7: models.m.apiKeyEnv: {KEY_WORDS}"),
        (
            [*REMOTE.values(), "options: { a: 1 }"],
            "line 7: models.m.options: an openai model has none; clients send what they want",
        ),
        (
            [*REMOTE.values(), "command: run {port}"],
            "line 7: models.m.command: command and url exclude each other: we start the server, or it runs already",
        ),
        (
            [*REMOTE.values(), "replicas: 2"],
            "line 7: models.m.replicas: all hosts reach the same runtime, so only one of them serves it",
        ),
        (
            [*REMOTE.values(), "onLoss: continue"],
            "line 7: models.m.onLoss: must be error, because a provider begins a new turn instead of going on with an "
            "answer",
        ),
    ],
)
def test_a_wrong_remote_provider_is_one_sentence(lines: list[str], words: str) -> None:
    """The first one is always told; nobody's key is ever repeated."""
    found = problems(model(*lines, backend="openai"))

    assert found[0] == words
    assert "secret" not in " ".join(found)


def test_no_remote_model_goes_on_with_an_answer() -> None:
    words = "must be error, because a request is judged before it leaves, and its half-told answer is not"
    found = problems(model("url: http://x", "trust: remote", "onLoss: continue", backend="vllm"))
    assert found == [f"line 7: models.m.onLoss: {words}"]


def test_a_remote_provider_needs_its_address_and_its_trust() -> None:
    policy = Policy.parse(model(*REMOTE.values(), "apiKeyEnv: EXAMPLE_KEY", backend="openai"))

    assert policy.models["m"].api_key_env == "EXAMPLE_KEY"
    assert policy.models["m"].shared
    assert policy.all_lanes()["m"].trust == "remote"


@pytest.mark.parametrize(
    ("url", "shared"),
    [
        ("http://127.0.0.1:11434", False),
        ("http://127.8.9.1:1", False),
        ("http://localhost:8080", False),
        ("http://[::1]:8080", False),
        ("http://gpu-box:8080", True),
        ("http://10.0.0.7:8080", True),
    ],
)
def test_a_runtime_elsewhere_is_the_whole_fleets(url: str, shared: bool) -> None:
    assert Policy.parse(model(f"url: '{url}'", backend="llama.cpp")).models["m"].shared is shared


def test_a_fallback_gives_what_was_asked_for() -> None:
    """A chat that is promoted to a model of vectors, or the other way round, could only fail there."""
    rows = [warm("a", ", fallback: b"), warm("b", ", embeddings: true"), "lanes:", "  l: { target: b, fallback: a }"]

    assert problems("\n".join(["models:", *rows])) == [
        "line 2: models.a.fallback: 'b' gives vectors and 'a' gives text",
        "line 5: lanes.l.fallback: 'a' gives text and 'l' gives vectors",
    ]


SLEEP_LEVEL = "must be 1 (asleep, the weights are kept in host memory) or 2 (they are read again at each wake)"


@pytest.mark.parametrize(
    ("backend", "lines", "words"),
    [
        (
            "ollama",
            ["options: { num_ctx: 16384 }"],
            "line 5: models.m.options: an Ollama model takes no options, because Ollama would load it again for each "
            "request without them; write them into a Modelfile (PARAMETER num_ctx 16384) or set OLLAMA_CONTEXT_LENGTH",
        ),
        (
            "llama.cpp",
            ["options: { n_ctx: 16384 }"],
            "line 5: models.m.options: a llama.cpp model takes no options; write them into its command",
        ),
        (
            "vllm",
            [],
            "line 2: models.m: a vllm model needs a url: vLLM is started by you, and asked to sleep and wake by us",
        ),
        (
            "vllm",
            ["url: http://a", "options: { level: 2 }"],
            "line 6: models.m.options.level: a vllm model has one option, sleepLevel",
        ),
        (
            "vllm",
            ["url: http://a", "options: { sleepLevel: 3 }"],
            f"line 6: models.m.options.sleepLevel: {SLEEP_LEVEL}",
        ),
        (
            "vllm",
            ["url: http://a", "options: { sleepLevel: true }"],
            f"line 6: models.m.options.sleepLevel: {SLEEP_LEVEL}",
        ),
        (
            "vllm",
            ["url: http://a", "options: { sleepLevel: [2] }"],
            f"line 6: models.m.options.sleepLevel: {SLEEP_LEVEL}",
        ),
        (
            "vllm",
            ["url: http://a", "command: vllm {port}"],
            "line 6: models.m.command: only a llama.cpp model is started by a command, and this one is vllm",
        ),
    ],
)
def test_what_a_runtime_cannot_be_told_is_one_sentence(backend: str, lines: list[str], words: str) -> None:
    """An option that were accepted without effect, or with one that nobody wants, would be found out much later."""
    assert words in problems(model(*lines, backend=backend))


def test_a_vllm_model_may_sleep_deeper() -> None:
    policy = Policy.parse(model("url: http://127.0.0.1:8000/v1", "options: { sleepLevel: 2 }", backend="vllm"))
    assert (policy.models["m"].url, policy.models["m"].options) == ("http://127.0.0.1:8000", {"sleepLevel": 2})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Deep", NAME),
        ("'qwen:7b'", NAME),
        ("deep coder", NAME),
        ("-deep", NAME),
        ("d" * 129, NAME),
        ("''", NAME),
        ("deep.batch", "a model's name may not end in '.batch', which is the name of its batch lane"),
    ],
)
def test_a_wrong_model_name_is_one_sentence(name: str, words: str) -> None:
    (found,) = problems(f"models:\n  {name}: {{ backend: simulated, model: x }}\n")

    assert found.startswith("line 2: models.")
    assert found.endswith(f": {words}")


@pytest.mark.parametrize("name", ["'fast:edit'", "fast edit", "Fast"])
def test_a_wrong_lane_name_is_one_sentence(name: str) -> None:
    plain = name.strip("'")
    assert problems(two("lanes:", f"  {name}: {{ target: deep }}")) == [f"line 5: lanes.{plain}: {NAME}"]
    assert problems(two("routing:", f"  - match: {{ lane: {name} }}", "    target: deep")) == [
        f"line 5: routing[0].match.lane: {NAME}"
    ]


WHOLE_FILES = [
    ("", "line 1: policy: the file is empty"),
    ("# nothing\n", "line 1: policy: the file is empty"),
    ("just words", "line 1: policy: must be a mapping of keys to values, not 'just words'"),
    ("- a", "line 1: policy: must be a mapping of keys to values, not a list"),
    ("routing: []", "line 1: models: is missing"),
    ("\nmodels: {}", "line 2: models: needs at least one entry"),
    ("models:", "line 1: models: must be a mapping of keys to values, not empty"),
    ("models:\n  m:", "line 2: models.m: must be a mapping of keys to values, not empty"),
    ("models:\n  m: { backend: simulated }", "line 2: models.m.model: is missing"),
    ("models:\n  m: { model: x }", "line 2: models.m.backend: is missing"),
    (
        "models:\n  m: { backend: ollama, model: ' ' }",
        "line 2: models.m.model: must be 1 to 1024 characters on one line",
    ),
    (model() + "\ncallers: {}", "line 5: callers: callers are made with `gateway key new`, not in the policy"),
    (model() + "\nusageDays: 0", "line 5: usageDays: must be at least 1, not 0"),
    (model() + "\nlane: {}", "line 5: lane: unknown key 'lane', did you mean 'lanes'?"),
    (model() + "\nkeepWarm: true", "line 5: keepWarm: unknown key 'keepWarm' here, it belongs in a model"),
    (model() + "\nreplicas: 2", "line 5: replicas: unknown key 'replicas' here, it belongs in a model"),
    (
        model() + "\nzzz: 1",
        "line 5: zzz: unknown key 'zzz', known here are models, routing, lanes, remote, webhooks, auditDays, "
        "maxLosses, headerHoldMs, disconnectGraceMs, drainTimeoutMs, keepMs, keepAsyncMs, usageDays, "
        "fileDays, maxFileMb, maxFilesMb",
    ),
    *(
        (model() + f"\nwebhooks: {{ allow: [{place!r}] }}", f"line 5: webhooks.allow[0]: {words}")
        for place, words in (
            (
                "10.0.0.0/33",
                "is no network: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network",
            ),
            ("10.0.0.1/8", "is no network: 10.0.0.1/8 has host bits set"),
            ("10.0.0", "is no network: '10.0.0' does not appear to be an IPv4 or IPv6 network"),
            (
                "CI.internal",
                "is neither a network such as 10.0.0.0/8 nor a host's name in lower case",
            ),
        )
    ),
    (model() + "\nmaxLosses: -1", "line 5: maxLosses: must be at least 0, not -1"),
    (model() + "\nmaxLosses: 101", "line 5: maxLosses: must be at most 100, not 101"),
    (model() + "\nheaderHoldMs: 5s", "line 5: headerHoldMs: must be a whole number of milliseconds, not '5s'"),
    (model() + "\ndisconnectGraceMs: -1", "line 5: disconnectGraceMs: must be at least 0, not -1"),
    (model() + "\ndrainTimeoutMs: -1", "line 5: drainTimeoutMs: must be at least 0, not -1"),
    (
        model() + "\nkeepMs: { sync: 1, async: 2 }",
        "line 5: keepMs: must be a whole number of milliseconds, not a mapping",
    ),
    (model() + "\nkeepAsyncMs: 0", "line 5: keepAsyncMs: must be at least 1, not 0"),
    # YAML that is broken, or more than a policy needs
    ("models: a: b", "line 1: policy: not valid YAML: mapping values are not allowed here"),
    ("models:\n\t- x", "line 2: policy: not valid YAML: found character '\\t' that cannot start any token"),
    ("a: 1\n---\nb: 2", "line 2: policy: not valid YAML: but found another document"),
    ("a: &x 1\nb: *x", "line 2: policy: aliases (*name) are not read in a policy: write the value out"),
    ("a: !!python/object/apply:os.system [ls]", "line 1: policy: tags (!name) are not read in a policy"),
    ("a: !!str 1", "line 1: policy: tags (!name) are not read in a policy"),
    ("a: " + "[" * 100, "line 1: policy: nested deeper than 12 levels"),
    ("#" * 131_073, "line 1: policy: the file is larger than 128 KiB"),
    ("a: 1\nb: \x01", "line 2: policy: holds a character that YAML does not allow"),
    ("a: \ud800", "line 1: policy: holds a character that YAML does not allow"),
    ('a: "\\U00110000"', "line 1: policy: not valid YAML: an escape or a directive in it is out of range"),
    (model('label: "\\0"'), "line 5: models.m.label: holds a control character"),
    (model('label: "\\ud800"'), "line 5: models.m.label: holds a control character"),
    ("? [a]\n: 1", "line 1: policy: a key must be a plain word"),
    ('"\\0": 1', "line 1: policy: a key must be a plain word"),
    (model("maxQueue: 6", "maxQueue: 7"), "line 6: models.m.maxQueue: is given twice, first on line 5"),
    (two("  small: {}"), "line 4: models.small: is given twice, first on line 2"),
]


@pytest.mark.parametrize(("text", "sentence"), WHOLE_FILES, ids=[s[:70] for _, s in WHOLE_FILES])
def test_a_wrong_file_is_one_sentence(text: str, sentence: str) -> None:
    assert problems(text) == [sentence]


ACROSS = [
    # aliases
    (["    aliases: [small]"], "line 4: models.deep.aliases[0]: alias 'small' is already the name of a model"),
    (["    aliases: [fast]"], "line 4: models.deep.aliases[0]: alias 'fast' is already the name of a lane"),
    (
        ["    aliases: [small.batch]"],
        "line 4: models.deep.aliases[0]: alias 'small.batch' is already the name of a lane",
    ),
    (["    aliases: [tiny]"], "line 4: models.deep.aliases[0]: alias 'tiny' is already an alias of 'small'"),
    (["    aliases: [a, a]"], "line 4: models.deep.aliases[1]: alias 'a' is already an alias of 'deep'"),
    (["    fallback: tiny"], "line 4: models.deep.fallback: unknown fallback 'tiny', did you mean 'small'?"),
    (["    fallback: quick"], "line 4: models.deep.fallback: unknown fallback 'quick', did you mean 'small'?"),
    (["    fallback: smal"], "line 4: models.deep.fallback: unknown fallback 'smal', did you mean 'small'?"),
    (
        ["    fallback: slow"],
        "line 4: models.deep.fallback: 'slow' is a batch lane, where an interactive job would wait behind all others",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), ACROSS, ids=[s for _, s in ACROSS])
def test_a_name_that_clashes_or_leads_nowhere_is_one_sentence(lines: list[str], sentence: str) -> None:
    text = [
        "models:",
        "  small: { backend: simulated, model: s, aliases: [tiny] }",
        "  deep: { backend: simulated, model: d,",
        *lines,
        "  }",
        "lanes: { fast: { target: small }, slow: { target: small, priority: batch } }",
        "routing: [ { match: { lane: quick }, target: small } ]",
    ]
    assert problems("\n".join(text)) == [sentence]


LANES = [
    (
        ["lanes:", "  smal: { maxQueue: 1 }"],
        "line 5: lanes.smal: 'smal' is neither a model nor a routing name, so it needs a target, did you mean 'small'?",
    ),
    (
        ["lanes:", "  zzz: {}"],
        "line 5: lanes.zzz: 'zzz' is neither a model nor a routing name, so it needs a target",
    ),
    (["lanes:", "  fast:"], "line 5: lanes.fast: must be a mapping of keys to values, not empty"),
    (
        ["lanes:", "  fast: { target: dep }"],
        "line 5: lanes.fast.target: unknown model 'dep', did you mean 'deep'?",
    ),
    (["lanes:", "  dep.batch: {}"], "line 5: lanes.dep.batch: unknown model 'dep', did you mean 'deep'?"),
    (
        ["lanes:", "  deep: { target: small }"],
        "line 5: lanes.deep.target: the lane 'deep' belongs to the model 'deep' and has no other target",
    ),
    (
        ["lanes:", "  deep: { priority: batch }"],
        "line 5: lanes.deep.priority: a model's own lane is interactive; its batch lane is 'deep.batch'",
    ),
    (
        ["lanes:", "  deep.batch: { priority: interactive }"],
        "line 5: lanes.deep.batch.priority: a batch lane is not interactive; the interactive lane is 'deep'",
    ),
    (
        ["lanes:", "  deep: { priority: urgent }"],
        "line 5: lanes.deep.priority: must be one of interactive, batch, not 'urgent'",
    ),
    (["lanes:", "  deep: { maxQueue: -1 }"], "line 5: lanes.deep.maxQueue: must be at least 0, not -1"),
    (
        ["lanes:", "  deep: { maxConcurrent: 1 }"],
        "line 5: lanes.deep.maxConcurrent: unknown key 'maxConcurrent' here, it belongs in a model",
    ),
    (
        ["lanes:", "  deep: { replicas: 1 }"],
        "line 5: lanes.deep.replicas: unknown key 'replicas' here, it belongs in a model",
    ),
    (
        ["lanes:", "  deep: { fallback: smal }"],
        "line 5: lanes.deep.fallback: unknown fallback 'smal', did you mean 'small'?",
    ),
    (
        [
            "lanes: { fast: {} }",
            "routing:",
            "  - { match: { lane: fast, caller: ann }, target: small }",
            "  - { match: { lane: fast, caller: bob }, target: deep }",
        ],
        "line 4: lanes.fast: the rules do not send 'fast' to one model, so it needs a target",
    ),
    (
        ["lanes: { a: {}, b: { target: deep } }", "routing:", "  - match: { lane: a }", "    target: b"],
        "line 4: lanes.a: the rules do not send 'a' to one model, so it needs a target",
    ),
    (
        ["lanes: { a: {} }", "routing:", "  - match: { lane: a }", "    target: deep.batch"],
        "line 4: lanes.a: the rules do not send 'a' to one model, so it needs a target",
    ),
    (
        ["lanes: { a: {} }", "routing:", "  - match: { lane: a }", "    target: dep"],
        "line 7: routing[0].target: unknown target 'dep', did you mean 'deep'?",
    ),
    (
        ["lanes: { a: {} }", "routing:", "  - match: { lane: a }", "    target: a"],
        "line 4: lanes.a: the rules do not send 'a' to one model, so it needs a target",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), LANES, ids=[s for _, s in LANES])
def test_a_wrong_lane_is_one_sentence(lines: list[str], sentence: str) -> None:
    assert problems(two(*lines)) == [sentence]


RULES = [
    ("{ match: { lane: a }, target: dep }", "[0].target: unknown target 'dep', did you mean 'deep'?"),
    ("{ match: { lane: a }, target: zzz }", "[0].target: unknown target 'zzz'"),
    ("{ match: { lane: a } }", "[0].target: is missing"),
    ("{ target: deep }", "[0].match: is missing"),
    ("{ match: a, target: deep }", "[0].match: must be a mapping of keys to values, not 'a'"),
    ("{ match: {}, target: deep }", "[0].match: matches every request; name a lane, caller, endpoint or prompt length"),
    ("{ match: { lane: a }, targte: b, target: deep }", "[0].targte: unknown key 'targte', did you mean 'target'?"),
    ("{ match: { lnae: a }, target: deep }", "[0].match.lnae: unknown key 'lnae', did you mean 'lane'?"),
    (
        "{ match: { model: a }, target: deep }",
        "[0].match.model: unknown key 'model' here, it belongs in a model",
    ),
    (
        "{ match: { lane: deep.batch }, target: deep }",
        "[0].match.lane: a rule names no batch lane; one for 'deep' holds for its batch work too",
    ),
    (
        "{ match: { endpoint: /v1/chat }, target: deep }",
        "[0].match.endpoint: is no endpoint of the gateway, use one of /v1/chat/completions, /v1/completions, "
        "/v1/embeddings, /v1/responses, /v1/messages, /api/chat, /api/generate, /api/embed, /api/embeddings",
    ),
    ("{ match: { caller: '' }, target: deep }", "[0].match.caller: must be 1 to 1024 characters on one line"),
    (
        "{ match: { promptTokensOver: 30k }, target: deep }",
        "[0].match.promptTokensOver: must be a whole number, not '30k'",
    ),
    ("{ match: { promptTokensOver: -1 }, target: deep }", "[0].match.promptTokensOver: must be at least 0, not -1"),
    ("{ match: { promptTokensUnder: 0 }, target: deep }", "[0].match.promptTokensUnder: must be at least 1, not 0"),
    (
        "{ match: { promptTokensOver: 9, promptTokensUnder: 10 }, target: deep }",
        "[0].match.promptTokensUnder: no prompt has more than 9 and fewer than 10 tokens",
    ),
    ("deep", "[0]: must be a mapping of keys to values, not 'deep'"),
]


@pytest.mark.parametrize(("rule", "words"), RULES, ids=[rule for rule, _ in RULES])
def test_a_wrong_rule_is_one_sentence(rule: str, words: str) -> None:
    assert problems(two("routing:", f"  - {rule}")) == [f"line 5: routing{words}"]


def test_a_rule_that_names_an_alias_is_one_sentence() -> None:
    text = model("aliases: [gpt]") + "\nrouting:\n  - match: { lane: gpt }\n    target: m\n"

    assert problems(text) == ["line 7: routing[0].match.lane: 'gpt' is an alias of 'm'; match the model's name instead"]


def test_routing_that_is_no_list_is_one_sentence() -> None:
    assert problems(two("routing: { a: b }")) == ["line 4: routing: must be a list, not a mapping"]


CIRCLES = [
    ({"a": "b", "b": "a"}, "line 2: models.a.fallback: fallbacks go in a circle: a -> b -> a"),
    ({"a": "b", "b": "c", "c": "a"}, "line 2: models.a.fallback: fallbacks go in a circle: a -> b -> c -> a"),
    ({"x": "a", "a": "b", "b": "a"}, "line 3: models.a.fallback: fallbacks go in a circle: a -> b -> a"),
]


@pytest.mark.parametrize(("fallbacks", "sentence"), CIRCLES)
def test_a_circle_of_fallbacks_is_told_once(fallbacks: dict[str, str], sentence: str) -> None:
    rows = [f"  {n}: {{ backend: simulated, model: x, fallback: {f} }}" for n, f in fallbacks.items()]

    assert problems("\n".join(["models:", *rows])) == [sentence]


def test_a_circle_through_a_lane_names_the_lane() -> None:
    text = two("lanes:", "  deep: { fallback: spare }", "  spare: { target: small, fallback: deep }")

    assert problems(text) == ["line 5: lanes.deep.fallback: fallbacks go in a circle: deep -> spare -> deep"]


def test_all_problems_are_told_in_the_order_of_the_lines() -> None:
    assert problems(model("maxQueue: -1", "keepwarm: true", "url: box", backend="olama")) == [
        "line 3: models.m.backend: must be one of ollama, llama.cpp, vllm, simulated, openai, not 'olama', "
        "did you mean 'ollama'?",
        "line 5: models.m.maxQueue: must be at least 0, not -1",
        "line 6: models.m.keepwarm: unknown key 'keepwarm', did you mean 'keepWarm'?",
        "line 7: models.m.url: must be a URL like http://127.0.0.1:8080",
    ]


def test_at_most_a_hundred_problems_are_told() -> None:
    assert len(problems(model(*(f"wrong{i}: 1" for i in range(300))))) == 100


# --- lanes ---


def test_every_model_has_its_own_lane_and_a_batch_lane() -> None:
    assert load("spec").all_lanes() == {
        "deep-coder": Lane("deep-coder", "deep-coder", 6, 25_000, 120_000, "interactive", "coder-small", "local"),
        "deep-coder.batch": Lane(
            "deep-coder.batch", "deep-coder", 10_000, 86_400_000, 86_400_000, "batch", None, "local"
        ),
        "coder-small": Lane("coder-small", "coder-small", 12, 4_000, 120_000, "interactive", None, "local"),
        "coder-small.batch": Lane(
            "coder-small.batch", "coder-small", 10_000, 86_400_000, 86_400_000, "batch", None, "local"
        ),
    }


def test_a_lane_of_its_own_takes_what_it_leaves_out_from_its_model() -> None:
    lanes = load("everything").all_lanes()

    assert lanes["fast-edit"] == Lane("fast-edit", "coder-small", 3, 1_500, 10_000, "interactive", None, "local")
    assert lanes["nightly"] == Lane("nightly", "deep-coder", 10_000, 86_400_000, 86_400_000, "batch", None, "local")
    assert lanes["deep-coder.batch"].max_queue == 50
    assert lanes["far"].trust == lanes["far.batch"].trust == "remote"


def test_a_lane_inherits_the_fallback_unless_it_says_null() -> None:
    rows = [warm("small"), warm("deep", ", fallback: small"), "lanes:", "  a: { target: deep }"]
    lanes = Policy.parse("\n".join(["models:", *rows, "  b: { target: deep, fallback: null }"])).all_lanes()

    assert (lanes["a"].fallback, lanes["b"].fallback) == ("small", None)


def test_a_batch_lane_with_a_fallback_is_promoted_after_its_models_budget() -> None:
    lane = Policy.parse(two("lanes: { slow: { target: deep, priority: batch, fallback: small.batch } }")).lane("slow")

    assert lane is not None
    assert (lane.fallback, lane.cold_start_budget_ms) == ("small.batch", 25_000)


def test_an_entry_for_a_models_lane_changes_that_lane_only() -> None:
    lanes = Policy.parse(two("lanes: { deep: { maxQueue: 99 }, fast: { target: deep } }")).all_lanes()

    assert (lanes["deep"].max_queue, lanes["fast"].max_queue) == (99, 8)


def test_a_lane_without_target_belongs_to_the_model_of_its_plain_rule() -> None:
    text = two(
        "lanes: { fast: {} }",
        "routing:",
        "  - { match: { lane: fast, promptTokensOver: 9000 }, target: deep }",
        "  - { match: { lane: fast }, target: small }",
    )
    policy = Policy.parse(text)

    assert policy.all_lanes()["fast"].model == "small"
    assert route(policy, "fast", prompt_tokens=10) == "fast"
    assert route(policy, "fast", prompt_tokens=9001) == "deep"


def test_lane_gives_lanes_only() -> None:
    policy = load("everything")

    assert policy.lane("nightly") == policy.all_lanes()["nightly"]
    assert policy.lane("high-context") is None
    assert policy.lane("gpt-4o") is None


def test_candidates_are_the_lane_and_two_fallbacks() -> None:
    policy = load("chain")

    assert [lane.name for lane in policy.candidates(policy.all_lanes()["a"])] == ["a", "b", "c"]
    assert [lane.name for lane in policy.candidates(policy.all_lanes()["c"])] == ["c", "d"]
    assert [lane.name for lane in policy.candidates(policy.all_lanes()["a.batch"])] == ["a.batch"]


def test_candidates_of_a_retired_lane_end_where_the_policy_does() -> None:
    gone = Lane("gone", "gone", 1, 1, 1, "interactive", "gone-too", "local", retiring=True)

    assert load("spec").candidates(gone) == [gone]


def test_names_hold_models_aliases_routing_names_and_lanes_once() -> None:
    assert load("everything").names() == [
        "deep-coder",
        "coder-small",
        "far",
        "gpt-4o",
        "Qwen/Qwen2.5-Coder-32B",
        "fast-edit",
        "high-context",
        "nightly",
    ]


# --- routing ---


@pytest.mark.parametrize(
    ("asked", "facts", "lane"),
    [
        ("deep-coder", {}, "deep-coder"),
        ("gpt-4o", {}, "deep-coder"),
        ("Qwen/Qwen2.5-Coder-32B", {}, "deep-coder"),
        ("far", {}, "far"),
        ("high-context", {}, "deep-coder"),
        ("fast-edit", {}, "fast-edit"),
        ("nightly", {}, "nightly"),
        # a rule for a caller holds whatever was asked for, and comes first
        ("coder-small", {"caller": "ci"}, "nightly"),
        ("fast-edit", {"caller": "ci"}, "nightly"),
        # a big prompt goes to the big model whatever was asked for; "over" means more than
        ("coder-small", {"prompt_tokens": 30_001}, "deep-coder"),
        ("coder-small", {"prompt_tokens": 30_000}, "coder-small"),
        ("fast-edit", {"prompt_tokens": 30_001}, "deep-coder"),
        ("fast-edit", {"prompt_tokens": 5_000}, "fast-edit"),
        # batch work goes to the batch lane of the model that the rules chose
        ("deep-coder", {"priority": "batch"}, "deep-coder.batch"),
        ("gpt-4o", {"priority": "batch"}, "deep-coder.batch"),
        ("fast-edit", {"priority": "batch"}, "coder-small.batch"),
        ("coder-small", {"priority": "batch", "prompt_tokens": 30_001}, "deep-coder.batch"),
        ("coder-small.batch", {}, "coder-small.batch"),
        ("coder-small.batch", {"prompt_tokens": 30_001}, "deep-coder.batch"),
        ("nightly", {"priority": "batch"}, "nightly"),
        ("nightly", {"prompt_tokens": 30_001}, "nightly"),
    ],
)
def test_a_request_gets_the_lane_that_the_rules_say(asked: str, facts: dict[str, Any], lane: str) -> None:
    assert route(load("everything"), asked, **facts) == lane


def test_the_first_rule_that_fits_wins() -> None:
    rules = ["  - { match: { lane: x }, target: small }", "  - { match: { lane: x, caller: ann }, target: deep }"]

    assert route(Policy.parse(two("routing:", *rules)), "x") == "small"
    assert route(Policy.parse(two("routing:", *reversed(rules))), "x") == "deep"


def test_a_rule_can_send_one_models_name_to_another_model_and_its_aliases_follow() -> None:
    text = (
        model("aliases: [gpt]")
        + "\n  n: { backend: simulated, model: n }\nrouting: [{ match: { lane: m }, target: n }]"
    )
    policy = Policy.parse(text)

    assert route(policy, "m") == route(policy, "gpt") == "n"
    assert route(policy, "m.batch") == "n.batch"


def test_a_rule_may_name_the_endpoint() -> None:
    policy = Policy.parse(two("routing: [{ match: { endpoint: /v1/embeddings }, target: small }]"))

    assert route(policy, "deep", endpoint="/v1/embeddings") == "small"
    assert route(policy, "deep", endpoint=CHAT) == "deep"


def test_under_means_fewer_than() -> None:
    policy = Policy.parse(two("routing: [{ match: { promptTokensUnder: 10 }, target: small }]"))

    assert route(policy, "deep", prompt_tokens=9) == "small"
    assert route(policy, "deep", prompt_tokens=10) == "deep"


def test_a_rule_may_send_work_to_a_batch_lane() -> None:
    policy = Policy.parse(two("routing: [{ match: { caller: ci }, target: deep.batch }]"))

    assert route(policy, "small", caller="ci") == "deep.batch"


@pytest.mark.parametrize(
    ("asked", "suggestions"),
    [
        ("deep-codr", ["deep-coder"]),
        ("Deep_Coder", ["deep-coder"]),
        ("GPT-4O", ["gpt-4o"]),
        ("fast-edti", ["fast-edit"]),
        ("", []),
        ("z" * 100_000, []),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_meant(asked: str, suggestions: list[str]) -> None:
    with pytest.raises(UnknownModel) as caught:
        route(load("everything"), asked)

    assert (caught.value.asked, caught.value.suggestions) == (asked, suggestions)


def test_no_rule_catches_an_unknown_name() -> None:
    """A rule for big prompts must not turn a typo into a working request."""
    with pytest.raises(UnknownModel):
        route(load("everything"), "dep-coder", prompt_tokens=50_000)


def test_a_name_that_only_some_may_use_is_unknown_to_others() -> None:
    policy = Policy.parse(two("routing: [{ match: { lane: vip, caller: ann }, target: deep }]"))

    assert route(policy, "vip") == "deep"
    with pytest.raises(UnknownModel):
        route(policy, "vip", caller="bob")
    assert policy.warnings() == ["line 4: routing[0].match.lane: 'vip' is unknown to requests that fit no rule"]


# --- warnings ---


def warm(name: str, extra: str = "") -> str:
    return f"  {name}: {{ backend: simulated, model: x, keepWarm: true{extra} }}"


WARNINGS = [
    (
        [
            "models:",
            warm("a", ", embeddings: true, fallback: b"),
            "  b: { backend: simulated, model: y, keepWarm: true, embeddings: true }",
        ],
        "line 2: models.a.fallback: 'b' must serve the same weights: vectors of two models can't be compared",
    ),
    (
        [model("url: http://far:1", "trust: remote", "apiKeyEnv: KEY", backend="openai")],
        "line 5: models.m.url: is not https, so everyone on the way can read the key and the prompts",
    ),
    (
        ["models:", warm("a", ", maxDowngradeShare: 0.2")],
        "line 2: models.a.maxDowngradeShare: has no effect, because the model has no fallback",
    ),
    (
        ["models:", warm("a", ", stickyPromotionMs: 60000")],
        "line 2: models.a.stickyPromotionMs: has no effect, because the model has no fallback",
    ),
    (
        ["models:", warm("a", ", fallback: b"), "  b: { backend: simulated, model: x }"],
        "line 2: models.a.fallback: 'b' is not kept warm, so a promoted job may wait for a second cold start",
    ),
    (
        ["models:", warm("a", ", fallback: b"), warm("b", ", trust: remote")],
        "line 2: models.a.fallback: 'b' is remote: it takes requests that may leave while this lane has no place, "
        "and no promoted job",
    ),
    (
        ["models:", warm("a", ", fallback: b, maxWaitMs: 1000"), warm("b")],
        "line 2: models.a.coldStartBudgetMs: the fallback is never tried, because a job is given up after 1000 ms "
        "and promoted only after 25000 ms",
    ),
    (
        ["models:", warm("a", ", fallback: b"), warm("b"), "lanes:", "  l: { target: a, maxWaitMs: 1000 }"],
        "line 5: lanes.l.coldStartBudgetMs: the fallback is never tried, because a job is given up after 1000 ms "
        "and promoted only after 25000 ms",
    ),
    (
        ["models:", warm("a"), "lanes:", "  l: { target: a, fallback: a }"],
        "line 4: lanes.l.fallback: 'a' is served by the same model 'a', which will be as cold",
    ),
    (
        [
            two("routing:"),
            "  - { match: { caller: ci }, target: deep }",
            "  - { match: { caller: ci, lane: small }, target: small }",
        ],
        "line 6: routing[1]: is never reached, because rule 1 matches all that this one does",
    ),
    (
        [
            two("routing:"),
            "  - { match: { promptTokensOver: 10 }, target: deep }",
            "  - { match: { promptTokensOver: 20, promptTokensUnder: 30 }, target: small }",
        ],
        "line 6: routing[1]: is never reached, because rule 1 matches all that this one does",
    ),
    (
        ["models:", "  m: { backend: simulated, model: x, activeHours: 08:00-19:00 }"],
        "line 2: models.m.activeHours: keeps nothing warm without keepWarm: true; it only holds a slot for "
        "interactive work",
    ),
    (
        ["models:", "  m: { backend: llama.cpp, model: /no/such.gguf }"],
        "line 2: models.m.model: there is no file /no/such.gguf on this machine",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), WARNINGS, ids=[s for _, s in WARNINGS])
def test_what_will_disappoint_is_one_warning(lines: list[str], sentence: str) -> None:
    assert Policy.parse("\n".join(lines)).warnings() == [sentence]


def test_a_long_chain_of_fallbacks_and_a_full_memory_are_warned_about() -> None:
    chain = "line 3: models.a.fallback: of this chain of fallbacks only the first 3 lanes are tried"

    assert load("chain").warnings() == [chain]
    assert load("chain").warnings(host_memory_mb=38_000) == [chain]
    assert load("chain").warnings(host_memory_mb=37_999) == [
        "line 2: models: the models to keep warm, 'a' (30000 MB), 'b' (8000 MB), do not fit together: they need 38000 "
        "MB at once, and a host has 37999 MB; keep exactly one high-value coder warm, and let the others wake on "
        "demand",
        chain,
        "line 3: models.a.fallback: 'a' (30000 MB) and its fallback 'b' (8000 MB) do not fit together into 37999 MB",
    ]


@pytest.mark.parametrize(
    ("big", "small", "lanes", "where"),
    [
        # 60 s of minimum stay, 20 s of a last batch, 42 s of reading 21 GB: a job of `big` waits 120 s
        ("memoryMb: 21000", "memoryMb: 6500", "", "line 2: models.big.maxWaitMs"),
        ("memoryMb: 21000, maxWaitMs: 121999", "memoryMb: 6500", "", "line 2: models.big.maxWaitMs"),
        ("memoryMb: 21000, maxWaitMs: 122000", "memoryMb: 6500", "", None),
        ("memoryMb: 21000, fallback: small", "memoryMb: 6500, keepWarm: true", "", None),
        ("memoryMb: 21000", "memoryMb: 6500, minStayMs: 57999", "", None),
        ("memoryMb: 21000", "memoryMb: 3000", "", None),  # they fit together
        ("memoryMb: 24001", "memoryMb: 6500", "", None),  # it never fits, which is another trouble
        ("memoryMb: 21000, hosts: [one]", "memoryMb: 6500, hosts: [two]", "", None),
        ("", "memoryMb: 6500", "", None),  # nobody knows
        ("memoryMb: 21000", "", "", None),
        ("memoryMb: 21000", "memoryMb: 6500, url: 'http://box2:8080'", "", None),
        # a lane of its own may be given up earlier, and has a fallback or not by itself
        ("memoryMb: 21000, maxWaitMs: 200000", "memoryMb: 6500", "{soon: {target: big, maxWaitMs: 90000}}",
         "line 4: lanes.soon.maxWaitMs"),
        ("memoryMb: 21000, maxWaitMs: 200000", "memoryMb: 6500", "{big.batch: {maxWaitMs: 90000}}", None),
    ],
)  # fmt: skip
def test_who_waits_without_a_fallback_is_not_given_up_before_its_turn(
    big: str, small: str, lanes: str, where: str | None
) -> None:
    rows = [f"  {name}: {{backend: ollama, model: x, {keys}}}" for name, keys in (("big", big), ("small", small))]
    text = "\n".join(["models:", *rows, *([f"lanes: {lanes}"] if lanes else [])])
    told = [warning for warning in Policy.parse(text).warnings(host_memory_mb=24_000) if "given up" in warning]
    assert [warning.split(": a job of")[0] for warning in told] == ([where] if where else [])


def test_the_long_wait_without_a_fallback_is_told_in_numbers() -> None:
    rows = [
        "  big: {backend: ollama, model: x, memoryMb: 21000}",
        "  small: {backend: ollama, model: y, memoryMb: 6500}",
    ]
    assert Policy.parse("\n".join(["models:", *rows])).warnings(host_memory_mb=24_000) == [
        "line 2: models.big.maxWaitMs: a job of 'big' may be given up after 120000 ms, before its turn: 'big' (21000 "
        "MB) and 'small' (6500 MB) do not fit together into 24000 MB, and after minStayMs of 'small' (60000 ms), a "
        "last batch (20000 ms) and a load from a slow disk (42000 ms) it has waited 122000 ms; give it a fallback or "
        "a longer maxWaitMs"
    ]


BERLIN_DAY, BERLIN_NIGHT = "Mon-Fri 08:00-19:00 Europe/Berlin", "Mon-Fri 19:00-08:00 Europe/Berlin"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # each alone fits into 40 MB, whatever the hour
        ([("a", "memoryMb: 30"), ("b", "memoryMb: 10")], None),
        ([("a", "memoryMb: 41")], "the model to keep warm, 'a' (41 MB), does not fit: a host has 40 MB"),
        (
            [
                ("a", f"memoryMb: 30, activeHours: '{BERLIN_DAY}'"),
                ("b", f"memoryMb: 30, activeHours: '{BERLIN_NIGHT}'"),
            ],
            None,
        ),
        (
            [("a", f"memoryMb: 30, activeHours: '{BERLIN_DAY}'"), ("b", "memoryMb: 30")],
            "'a' (30 MB), 'b' (30 MB), do not fit together: they need 60 MB on Monday at 08:00 (Europe/Berlin), and a "
            "host has 40 MB",
        ),
        # New York is five or six hours behind Berlin, and for some weeks of March and October it is another
        (
            [
                ("a", f"memoryMb: 30, activeHours: '{BERLIN_DAY}'"),
                ("b", "memoryMb: 30, activeHours: 'Mon-Fri 13:00-18:00 America/New_York'"),
            ],
            "need 60 MB on Monday at 18:00 (Europe/Berlin)",
        ),
        # the largest need is told, not the first
        (
            [
                ("a", "memoryMb: 30"),
                ("b", "memoryMb: 20, activeHours: 'Mon 08:00-12:00 UTC'"),
                ("c", "memoryMb: 25, activeHours: 'Tue 08:00-12:00 UTC'"),
            ],
            "'a' (30 MB), 'c' (25 MB), do not fit together: they need 55 MB on Tuesday at 08:00 (UTC)",
        ),
        # hosts and replicas
        ([("a", "memoryMb: 30, hosts: [one]"), ("b", "memoryMb: 30")], "a host has"),
        ([("a", "memoryMb: 30, hosts: [one, two]"), ("b", "memoryMb: 30")], None),
        (
            [("a", "memoryMb: 30, hosts: [one, two], replicas: 2"), ("b", "memoryMb: 30")],
            "'a' (2 x 30 MB), 'b' (30 MB), do not fit together: they need 90 MB at once, and 2 hosts have 40 MB each",
        ),
        ([("a", "memoryMb: 30, replicas: 2"), ("b", "memoryMb: 10, replicas: 2")], None),
        (
            [
                ("a", "memoryMb: 30, hosts: [one]"),
                ("b", "memoryMb: 11, hosts: [one]"),
                ("c", "memoryMb: 30, hosts: [two]"),
            ],
            "'a' (30 MB), 'b' (11 MB), do not fit together: they need 41 MB at once, and a host has 40 MB",
        ),
        # 20 + 20 and 30 + 10 fit, one after the other in the order of the file they would not
        (
            [
                ("a", "memoryMb: 10, hosts: [one, two]"),
                ("b", "memoryMb: 20, hosts: [one, two]"),
                ("c", "memoryMb: 30, hosts: [one, two]"),
                ("d", "memoryMb: 20, hosts: [one, two]"),
            ],
            None,
        ),
        # memory that is not ours
        ([("a", "memoryMb: 30, trust: remote"), ("b", "memoryMb: 30")], None),
    ],
)
def test_the_check_says_in_numbers_which_models_cannot_be_warm_together(
    rows: list[tuple[str, str]], words: str | None
) -> None:
    text = "\n".join(["models:", *(warm(name, f", {extra}") for name, extra in rows)])

    told = [warning for warning in Policy.parse(text).warnings(host_memory_mb=40) if "keep warm" in warning]

    assert len(told) == (words is not None), told
    assert words is None or words in told[0]


def test_a_model_of_which_only_the_file_is_known_is_judged_by_its_size() -> None:
    """Few people write `memoryMb`; a server at a url has a file that is not ours to look at."""
    rows = [
        "models:",
        "  a: { backend: llama.cpp, model: /a.gguf, keepWarm: true, fallback: b }",
        "  b: { backend: llama.cpp, model: /b.gguf, keepWarm: true, memoryMb: 30 }",
        "  c: { backend: llama.cpp, model: /a.gguf, keepWarm: true, url: 'http://127.0.0.1:1' }",
    ]

    def told(file_mb: int) -> list[str]:
        policy = Policy.parse("\n".join(rows))
        return policy.warnings(host_memory_mb=60, exists=lambda _: True, size_of=lambda _: file_mb << 20)

    assert told(25) == [], "1.2 times 25 and 30 are 60"
    assert told(0) == [], "nothing is known of it"
    assert told(30) == [
        "line 1: models: the models to keep warm, 'a' (about 36 MB), 'b' (30 MB), do not fit together: they need 66 MB "
        "at once, and a host has 60 MB; keep exactly one high-value coder warm, and let the others wake on demand",
        "line 2: models.a.fallback: 'a' (about 36 MB) and its fallback 'b' (30 MB) do not fit together into 60 MB",
    ]


def test_a_model_on_another_machine_takes_no_memory_of_ours() -> None:
    rows = [
        "models:",
        "  a: { backend: ollama, model: x, keepWarm: true, memoryMb: 30, url: URL }",
        warm("b", ", memoryMb: 30"),
    ]

    for url, warned in (("http://box:11434", False), ("http://127.0.0.1:11434", True), ("http://localhost:1", True)):
        told = Policy.parse("\n".join(rows).replace("URL", f"'{url}'")).warnings(host_memory_mb=40)
        assert bool(told) is warned


def test_many_models_to_keep_warm_are_judged_in_no_time() -> None:
    rows = [warm(f"m{n}", f", memoryMb: {7 + n % 5}, hosts: [one, two, three, four]") for n in range(60)]
    started = time.perf_counter()
    Policy.parse("\n".join(["models:", *rows])).warnings(host_memory_mb=130)
    assert time.perf_counter() - started < 5


def test_models_on_different_hosts_need_not_fit_together() -> None:
    rows = [warm("a", ", fallback: b, memoryMb: 30, hosts: [one]"), warm("b", ", memoryMb: 30, hosts: [two]")]

    assert Policy.parse("\n".join(["models:", *rows])).warnings(host_memory_mb=40) == []


@pytest.mark.parametrize(
    "line",
    ["url: http://box:8080", "command: llama-server -hf some/repo --port {port}"],
)
def test_a_gguf_is_only_missed_where_we_would_open_it(line: str) -> None:
    assert Policy.parse(model(line, backend="llama.cpp")).warnings(exists=lambda file: False) == []


def test_a_gguf_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "models:\n  m: { backend: llama.cpp, model: ~/m.gguf }"
    assert len(Policy.parse(text).warnings()) == 1

    (tmp_path / "m.gguf").touch()
    assert Policy.parse(text).warnings() == []


def test_rules_that_leave_each_other_room_are_not_warned_about() -> None:
    rules = [
        "  - { match: { lane: small, promptTokensOver: 10 }, target: deep }",
        "  - { match: { lane: small, promptTokensOver: 5 }, target: deep }",
        "  - { match: { promptTokensUnder: 10 }, target: deep }",
        "  - { match: { caller: ci }, target: small }",
    ]

    assert Policy.parse(two("routing:", *rules)).warnings() == []


# --- the schema for editors ---


def test_the_schema_names_and_describes_every_key_in_camel_case() -> None:
    schema = Policy.json_schema()
    json.dumps(schema)

    parts: dict[str, type[Part]] = {"Model": Model, "LaneEntry": LaneEntry, "Match": Match, "Rule": Rule}
    tables: list[tuple[dict[str, Any], type[Part]]] = [
        (schema, Content),
        *((schema["$defs"][name], part) for name, part in parts.items()),
    ]
    for table, part in tables:
        assert table["additionalProperties"] is False
        assert list(table["properties"]) == [info.alias for info in part.model_fields.values()]
        for key, about in table["properties"].items():
            assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", key)
            assert about["description"].endswith(".")
    assert schema["required"] == ["models"]
    backends = ["ollama", "llama.cpp", "vllm", "simulated", "openai"]
    assert schema["$defs"]["Model"]["properties"]["backend"]["enum"] == backends
    assert schema["$defs"]["Model"]["properties"]["maxConcurrent"]["minimum"] == 1
    assert schema["$defs"]["Model"]["properties"]["command"]["anyOf"][0] == {"type": "string"}


# --- garbage ---

WORDS = st.sampled_from(
    [
        *(
            "models",
            "m",
            "n",
            "routing",
            "lanes",
            "backend",
            "simulated",
            "llama.cpp",
            "model",
            "match",
            "lane",
            "target",
        ),
        *("fallback", "maxQueue", "command", "url", "aliases", "m.batch", "options", "weight", "endpoint", "caller"),
        *(
            "true",
            "null",
            "~",
            "0",
            "-1",
            "1e3",
            "1e999",
            "0x1F",
            "1_000",
            "010",
            ".inf",
            "{port}",
            "'",
            '"',
            "http://a",
        ),
        *(
            ":",
            ": ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "\n",
            "\n  ",
            "\n    ",
            "&a",
            "*a",
            "!!int ",
            "<<",
            "|",
            ">",
            "? ",
        ),
        *("%YAML 1.2", "---", "...", "#", "\\", '"\\ud800"', '"\\UFFFFFFFF"', "\t", "\0", "\ufeff", "\x85", "\u2028"),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4)
)


def only_refuses(text: str) -> None:
    try:
        policy = Policy.parse(text)
    except PolicyInvalid as refused:
        assert refused.problems
        assert all(re.match(r"line \d+: [^\n]+: [^\n]+\Z", problem) for problem in refused.problems), refused.problems
    else:
        assert Policy.parse(policy.text).digest == policy.digest
        assert all(policy.candidates(lane) for lane in policy.all_lanes().values())


@given(st.text(st.characters(), max_size=60))
@example("%YAML " + "9" * 5000 + ".0\n---\na: 1")
@example("a: " + "9" * 5000)
@example("{" * 5000)
@example("? " * 5000)
@example("- " * 5000)
@settings(max_examples=100, deadline=None)
def test_random_characters_raise_nothing_but_policy_invalid(text: str) -> None:
    only_refuses(text)


@given(st.lists(WORDS, max_size=30).map("".join))
@settings(max_examples=150, deadline=None)
def test_random_words_of_yaml_raise_nothing_but_policy_invalid(text: str) -> None:
    only_refuses(text)


@given(st.sampled_from(["models", "routing", "lanes", "keepMs"]), TREES)
@settings(max_examples=100, deadline=None)
def test_random_trees_raise_nothing_but_policy_invalid(key: str, tree: Any) -> None:
    """JSON is YAML, so a tree written as JSON gets past the reader and reaches the checks."""
    only_refuses(json.dumps({"models": {"m": {"backend": "simulated", "model": "x"}}, key: tree}))


MODEL_KEYS = st.sampled_from([str(info.alias) for info in Model.model_fields.values()])


@given(MODEL_KEYS, TREES)
@settings(max_examples=100, deadline=None)
def test_random_values_of_a_model_raise_nothing_but_policy_invalid(key: str, tree: Any) -> None:
    only_refuses(json.dumps({"models": {"m": {"backend": "llama.cpp", "model": "x", key: tree}}}))


NAMES = st.sampled_from(["m", "n", "o", "m.batch", "fast", "slow", "big", "nobody"])
ENTRIES = st.fixed_dictionaries(
    {}, optional={"target": NAMES, "priority": st.sampled_from(["interactive", "batch"]), "fallback": st.none() | NAMES}
)
MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "lane": NAMES,
        "caller": st.sampled_from(["ann", "ci"]),
        "promptTokensOver": st.integers(0, 50),
        "promptTokensUnder": st.integers(1, 50),
    },
)


@given(
    fallbacks=st.lists(st.none() | NAMES, min_size=3, max_size=3),
    lanes=st.dictionaries(NAMES, ENTRIES, max_size=3),
    routing=st.lists(st.fixed_dictionaries({"match": MATCHES, "target": NAMES}), max_size=3),
    asked=NAMES,
    facts=st.fixed_dictionaries({"caller": st.sampled_from(["ann", "ci"]), "prompt_tokens": st.integers(0, 60)}),
    batch=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_passes_the_checks_can_be_routed(
    fallbacks: list[str | None], lanes: Any, routing: Any, asked: str, facts: Any, batch: bool
) -> None:
    """The lanes and rules of a policy that loads never lead nowhere, and batch work never lands in a person's lane."""
    models = {n: {"backend": "simulated", "model": n, "fallback": f} for n, f in zip("mno", fallbacks, strict=True)}
    try:
        policy = Policy.parse(json.dumps({"models": models, "lanes": lanes, "routing": routing}))
    except PolicyInvalid:
        return
    policy.warnings(host_memory_mb=1)
    known = policy.all_lanes()
    assert all(lane.fallback is None or lane.fallback in known for lane in known.values())
    assert all(lane.model in policy.models and lane.name == name for name, lane in known.items())
    try:
        lane = policy.route(asked, endpoint=CHAT, priority="batch" if batch else "interactive", **facts)
    except UnknownModel:
        assert asked not in known
        return
    assert known[lane.name] == lane
    assert lane.priority == "batch" or not (batch or asked.endswith(".batch"))
