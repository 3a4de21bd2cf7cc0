"""Every key has a row in the table, and the table finds the row of every key."""

import inspect

import pytest

from broker.keyspace import TABLE, Keyspace, as_markdown

# every function of the keyspace that makes a key, with arguments that are hard to tell apart
MADE = {
    "lane": (("deep-coder.batch",), "lane:<lane>"),
    "job": (("01J9ZK",), "job:<id>"),
    "request": (("01J9ZK",), "job:<id>:request"),
    "frames": (("01J9ZK",), "job:<id>:frames"),
    "readers": (("01J9ZK",), "readers:<id>"),
    "wake": (("epoch",), "wake:<model>"),
    "wake_epoch": (("qwen2.5-coder",), "wake:<model>:epoch"),
    "model": (("qwen2.5-coder",), "model:<model>"),
    "downgrades": (("qwen2.5-coder",), "downgrades:<model>"),
    "sticky": (("qwen2.5-coder",), "sticky:<model>"),
    "model_on_host": (("qwen2.5-coder", "gpu-box.local"), "model:<model>:<host>"),
    "learned": (("qwen2.5-coder", "gpu-box.local"), "learned:<model>:<host>"),
    "host": (("gpu-box.local",), "host:<host>"),
    "idem": (("laptop-3", "any:thing at:all"), "idem:<caller>:<digest>"),
    "retries": (("laptop-3", "tab:7"), "retries:<caller>:<digest>"),
    "count": (("01J9ZK",), "count:<id>"),
    "file": (("file-01J9ZK",), "file:<id>"),
    "parts": (("file-01J9ZK",), "file:<id>:parts"),
    "files": (("laptop-3",), "files:<caller>"),
    "batch": (("batch_01J9ZK",), "batch:<id>"),
    "window": (("batch_01J9ZK",), "batch:<id>:window"),
    "names": (("batch_01J9ZK",), "batch:<id>:names"),
    "batch_idem": (("laptop-3", "night:7"), "batch_idem:<caller>:<digest>"),
    "batches_of": (("laptop-3",), "batches:<caller>"),
    "usage": (("2026-10-30",), "usage:<day>"),
    "waits": (("laptop-3",), "waits:<caller>"),
    "jobs": (("laptop-3",), "jobs:<caller>"),
    "runs": (("laptop-3",), "runs:<caller>"),
    "active": (("fast-edit",), "active:<lane>"),
    "line": (("fast-edit",), "line:<lane>"),
    "webhook": (("msg_01J9ZK_1790000000000",), "webhook:<id>"),
    "webhook_line": (("01J9ZK",), "webhook_line:<id>"),
    "webhook_due": (("0123456789abcdef01234567",), "webhook_due:<digest>"),
    "webhook_endpoint": (("0123456789abcdef01234567",), "webhook_endpoint:<digest>"),
    "webhook_list": (("*",), "webhook_list:<caller>"),
    "webhook_secrets": (("laptop-3",), "webhook_secrets:<caller>"),
    "spent": (("laptop-3", "2026-10-30"), "spent:<caller>:<day>"),
    "figures": (("2026-10-30", "ci:big.batch:big:-"), "usage:<day>:<caller>:<lane>:<model>:<model>"),
}
CHANNELS = {"frames_channel": ("api1",), "control_channel": ("gpu1",)}
FIXED = (
    "audit", "batches", "callers", "dead", "due", "hosts", "outbox", "policy", "webhook_counts", "webhooks",
)  # fmt: skip
OTHER = {
    "family",
    "named_in",
    "job_of",
    "wake_model_of",
    "model_of",
    "learned_model_of",
    "usage_prefix",
    "usage_day_of",
}


@pytest.mark.parametrize("namespace", ["gw", "team.a-1_b"])
@pytest.mark.parametrize("function", MADE)
def test_every_function_makes_a_key_of_its_row(function: str, namespace: str) -> None:
    arguments, pattern = MADE[function]
    key = getattr(Keyspace(namespace), function)(*arguments)
    assert key.startswith(namespace + ":")
    found = Keyspace(namespace).family(key)
    assert found is not None and found.pattern == pattern
    assert Keyspace("other").family(key) is None


@pytest.mark.parametrize("name", FIXED)
def test_every_fixed_key_has_its_row(name: str) -> None:
    found = Keyspace().family(getattr(Keyspace(), name))
    assert found is not None and found.pattern == name


def test_no_function_is_forgotten_here() -> None:
    functions = {n for n, _ in inspect.getmembers(Keyspace, inspect.isfunction) if not n.startswith("_")}
    assert functions == MADE.keys() | CHANNELS.keys() | OTHER
    keys = {pattern for _, pattern in MADE.values()} | set(FIXED)
    assert keys == {family.pattern for family in TABLE if family.type != "channel"}


def test_no_two_keys_are_the_same() -> None:
    k = Keyspace()
    made = [getattr(k, f)(*("x",) * len(a)) for f, (a, _) in MADE.items()] + [getattr(k, n) for n in FIXED]
    made += [getattr(k, f)(*a) for f, a in CHANNELS.items()]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    "key", ["gw", "gw:", "gw:nothing", "gw:job", "gw:job:", "gw:job:a:b", "gw:frames:a", "xgw:due"]
)
def test_a_strange_key_has_no_row(key: str) -> None:
    assert Keyspace().family(key) is None


def test_the_model_of_a_key() -> None:
    k = Keyspace("ns")
    assert k.model_of(k.model("a.b")) == "a.b"
    assert k.model_of(k.model_on_host("a.b", "gpu1")) == k.model_of(k.due) == k.model_of("") == ""
    assert k.learned_model_of(k.learned("a.b", "gpu1")) == "a.b"
    assert k.learned_model_of(k.model_on_host("a.b", "gpu1")) == k.learned_model_of("") == ""


def test_what_a_key_is_about() -> None:
    k = Keyspace("ns")
    assert k.job_of(k.job("01J9")) == k.named_in(k.request("01J9")) == "01J9"
    assert k.job_of(k.request("01J9")) == k.job_of(k.due) == k.job_of("") == ""
    assert k.wake_model_of(k.wake("a.b")) == k.wake_model_of(k.wake_epoch("a.b")) == "a.b"
    assert k.wake_model_of(k.model("a.b")) == k.wake_model_of("") == ""


def test_the_day_of_a_key() -> None:
    k, day = Keyspace("ns"), "2026-10-30"
    assert k.usage_day_of(k.usage(day)) == k.usage_day_of(k.figures(day, "a:b:c:d")) == day
    assert k.usage_day_of(k.job(day)) == k.usage_day_of(k.due) == k.usage_day_of("") == ""


@pytest.mark.parametrize("namespace", ["", "a:b", "a b", "x" * 65, "ä", "a\n"])
def test_a_namespace_that_would_not_read_well_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="may hold letters"):
        Keyspace(namespace)


def test_the_printed_table_has_a_line_per_row() -> None:
    lines = as_markdown().split("\n")
    assert len(lines) == len(TABLE) + 2
    assert "| `gw:due` | zset | a member lives as long as its job | live job -> its next instant |" in lines


def test_what_is_not_persistent_says_when_it_goes() -> None:
    assert all(family.lifetime and family.holds for family in TABLE)
    assert not any(
        f.persistent
        for f in TABLE
        if f.pattern.startswith(("job", "readers", "idem", "due", "host:", "file", "batch:"))
    )
