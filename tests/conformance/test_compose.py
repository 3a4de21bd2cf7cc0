"""compose.yaml without a container engine: against the specification, and each service of ours as a process."""

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from broker.policy import Policy
from broker.settings import read_settings
from tests.support.clients import user
from tests.support.compose import Here, Service, free_port, in_order, interpolated, seconds, services
from tests.support.gateway_process import gateway
from tests.support.waiting import block_until
from tests.support.worker_world import policy, simulated
from workers.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "compose.yaml"
SECRETS = {"GATEWAY_KEYS": "ann:secret", "GATEWAY_METRICS_KEY": "a-key", "GRAFANA_PASSWORD": "a-password"}
OURS = ("api", "scheduler", "worker")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    found: dict[str, Any] = interpolated(yaml.safe_load(FILE.read_text()), SECRETS)
    return found


@pytest.fixture(scope="module")
def there() -> dict[str, Service]:
    return services(FILE, SECRETS)


# --- as it is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["compose.yaml", "docs/deploy/compose.nvidia.yaml"])
def test_the_file_keeps_to_the_compose_specification(file: str) -> None:
    vendor = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    rules = jsonschema.Draft202012Validator(json.loads(vendor.read_text()))
    text = yaml.safe_load((ROOT / file).read_text())
    assert [f"{'/'.join(map(str, e.path))}: {e.message}" for e in rules.iter_errors(text)] == []
    broken = {**text, "services": {**text["services"], "broken": {"image": "x", "healthchek": {}}}}
    assert not rules.is_valid(broken), "the schema refuses a misspelt key"


def test_without_a_profile_the_core_runs_and_each_profile_adds_to_it(there: dict[str, Service]) -> None:
    by_profile = {
        profile: {s.name for s in there.values() if (profile in s.profiles if profile else not s.profiles)}
        for profile in ("", "monitoring", "ollama")
    }
    assert by_profile == {
        "": {"redis", *OURS},
        "monitoring": {"prometheus", "grafana"},
        "ollama": {"ollama"},
    }
    for service in there.values():
        for needed in service.needs:
            assert there[needed].profiles in ([], service.profiles), f"{service.name} without {needed}"


def test_every_service_comes_back_is_checked_and_has_time_to_stop(there: dict[str, Service]) -> None:
    for service in there.values():
        assert service.said["restart"] == "unless-stopped", service.name
        assert service.said["logging"]["driver"] == "local", f"{service.name} would fill the disk with its log"
        check = service.said["healthcheck"]
        assert seconds(check["timeout"]) < seconds(check["interval"]) * check["retries"], service.name
        assert service.stop_grace_s > 10, service.name
    drain_s = Policy.parse(policy({"m": simulated()})).drain_timeout_ms / 1000
    assert there["worker"].stop_grace_s >= drain_s + 10


def test_the_api_does_not_start_without_keys_and_nobody_else_learns_them(there: dict[str, Service]) -> None:
    with pytest.raises(ValueError, match="name:secret pairs"):
        services(FILE, {})
    holders = [s.name for s in there.values() if "secret" in json.dumps(s.environment)]
    assert holders == ["api", "grafana"] and "a-password" not in json.dumps(there["grafana"].environment)


@pytest.mark.parametrize(("said", "read"), [({"GATEWAY_MEMORY_MB": "22000"}, 22_000), ({}, None)])
def test_a_worker_is_told_the_memory_of_models_that_it_cannot_see(
    said: dict[str, str], read: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `ollama`, in another container; else it measures."""
    worker = services(FILE, SECRETS | said)["worker"]
    monkeypatch.setenv("GATEWAY_MEMORY_MB", worker.environment["GATEWAY_MEMORY_MB"])
    assert read_settings(WorkerSettings).memory_mb == read


@pytest.mark.parametrize(("said", "told"), [({}, "2gb"), ({"REDIS_MAXMEMORY": "500mb"}, "500mb")])
def test_redis_refuses_when_it_is_full_and_may_read_its_file_first(said: dict[str, str], told: str) -> None:
    redis = services(FILE, SECRETS | said)["redis"]
    words = redis.command
    assert words[words.index("--maxmemory") + 1] == told
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert seconds(redis.said["healthcheck"]["start_period"]) >= 300


def test_secrets_come_from_the_environment_and_are_in_no_other_place(told: dict[str, Any]) -> None:
    assert {name: said["environment"] for name, said in told["secrets"].items()} == {
        "metrics_key": "GATEWAY_METRICS_KEY",
        "grafana_password": "GRAFANA_PASSWORD",
    }
    text = json.dumps(told["services"])
    assert "a-key" not in text and "a-password" not in text
    used = {name for said in told["services"].values() for name in said.get("secrets", [])}
    assert used == told["secrets"].keys()


def test_volumes_are_declared_and_what_is_mounted_from_here_is_here(told: dict[str, Any]) -> None:
    named, files = set(), set()
    for said in told["services"].values():
        for volume in said.get("volumes", []):
            source = volume.split(":")[0]
            (files if source.startswith(".") else named).add(source)
    assert named == set(told["volumes"])
    files.remove("./models")  # the weights of whoever runs it
    for file in files:
        assert (ROOT / file).exists(), f"{file} is mounted and not here"


def test_prometheus_asks_the_api_with_a_key_from_a_file(there: dict[str, Service]) -> None:
    told = yaml.safe_load((ROOT / "docs/monitoring/prometheus.yml").read_text())
    [job] = told["scrape_configs"]
    assert job["job_name"] == "warmlane", "the alert rules go by this name"
    assert job["static_configs"] == [{"targets": ["api:" + there["api"].environment["GATEWAY_BIND"].split(":")[1]]}]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/metrics_key"}
    mounts = _mounts(there["prometheus"])
    assert set(mounts) >= {"/etc/prometheus/prometheus.yml", "/prometheus"}
    for rules in told["rule_files"]:  # relative to the file itself
        assert mounts[f"/etc/prometheus/{rules}"] == f"./docs/monitoring/{rules}"
    words = dict(word.removeprefix("--").split("=") for word in there["prometheus"].command)
    assert words["config.file"] in mounts and words["storage.tsdb.path"] in mounts


def test_grafana_finds_prometheus_and_its_dashboards(there: dict[str, Service]) -> None:
    mounts = _mounts(there["grafana"])
    folder = ROOT / mounts["/etc/grafana/provisioning"]
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    [provider] = yaml.safe_load((folder / "dashboards" / "warmlane.yaml").read_text())["providers"]
    shown = [place for place in mounts if place.startswith(provider["options"]["path"] + "/")]
    assert [mounts[place] for place in shown] == ["./docs/monitoring/dashboard.json"]


def _mounts(service: Service) -> dict[str, str]:
    """Where something is mounted -> what."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in service.said["volumes"])}


# --- as it runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    running = Here(tmp_path, {"redis:6379": free_port(), "0.0.0.0:8400": free_port()})
    yield running
    running.end()


@pytest.mark.long
@pytest.mark.real
def test_each_service_of_ours_runs_answers_and_stops_as_the_file_says(there: dict[str, Service], here: Here) -> None:
    """In the order of their needs, each healthy by its own check before who needs it; SIGTERM in the opposite one."""
    core = {s.name: s for s in there.values() if not s.profiles}
    order = list(in_order(core))
    assert [service.name for service in order[0]] == ["redis"]
    for together in order:
        for service in together:
            assert here.check(service).returncode == 1, f"{service.name} is called healthy before it runs"
            here.start(service)
        for service in together:
            here.until_healthy(service)

    api = core["api"]
    url = f"http://127.0.0.1:{here.ports['0.0.0.0:8400']}"
    file = here.directory / "policy.yaml"
    file.write_text(policy({"big": simulated(memoryMb=1)}))
    settings = here.settings(api)
    done = gateway("policy", "apply", str(file), GATEWAY_REDIS_URL=settings["GATEWAY_REDIS_URL"])
    assert done.returncode == 0, done.stderr
    block_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, what="somebody can serve", timeout_s=20)
    asked = {"model": "big", "messages": user("hi"), "max_tokens": 2}
    assert httpx.post(f"{url}/v1/chat/completions", json=asked).status_code == 401
    key = {"authorization": "Bearer secret"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=key, timeout=20)
    assert answer.status_code == 200, answer.text
    assert "gateway_" in httpx.get(f"{url}/metrics", headers=key).raise_for_status().text
    assert httpx.get(f"{url}/healthz").json()["unfit"] == [], "Redis runs as it should"

    for together in reversed(order):
        for name, code in here.stop(*together).items():
            assert code == 0, f"{name} ended with {code}: {here.log(core[name])}"
            assert here.check(core[name]).returncode == 1, f"{name} is called healthy after its end"
