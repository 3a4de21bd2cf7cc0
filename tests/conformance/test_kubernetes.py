"""The Kubernetes example without a cluster: against Kubernetes' own schema, and its probes against a live api."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import typer
import yaml

from api import cli
from api.alive import PARTS
from broker.keyspace import Keyspace
from broker.policy import Policy
from broker.settings import BrokerSettings
from broker.store import Store
from tests.support.broker_world import fake_redis, new_namespace
from tests.support.live_api import live_api

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "deploy" / "kubernetes"
SCHEMAS = ROOT / "tests" / "support" / "kubernetes"
FILES = sorted(file.name for file in FOLDER.glob("*.yaml") if file.name != "kustomization.yaml")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
SCHEMA = json.loads((SCHEMAS / "schema.json").read_text())
KINDS = {
    (kind["properties"]["apiVersion"]["enum"][0], kind["properties"]["kind"]["enum"][0]): name
    for name, kind in SCHEMA["$defs"].items()
    if "enum" in kind.get("properties", {}).get("apiVersion", {})
}


def manifests(file: str) -> list[dict[str, Any]]:
    return [manifest for manifest in yaml.safe_load_all((FOLDER / file).read_text()) if manifest]


EVERYTHING = [manifest for file in FILES for manifest in manifests(file)]


def find(kind: str, name: str) -> dict[str, Any]:
    [found] = [m for m in EVERYTHING if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in EVERYTHING:
        if "template" in manifest.get("spec", {}):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods():
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            yield name, container


def ours() -> list[dict[str, Any]]:
    """The containers with our image."""
    return [container for _, container in containers() if container["image"] == "warmlane"]


def problems(manifest: dict[str, Any]) -> list[str]:
    """What a strict server would refuse: unknown keys, wrong types, what is missing."""
    if manifest["apiVersion"].startswith("keda.sh/"):
        schema = json.loads((SCHEMAS / "keda.json").read_text())
    else:
        schema = {"$ref": f"#/$defs/{KINDS[manifest['apiVersion'], manifest['kind']]}", "$defs": SCHEMA["$defs"]}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


@pytest.mark.parametrize("file", FILES)
def test_a_manifest_keeps_to_the_schema(file: str) -> None:
    for manifest in manifests(file):
        assert problems(manifest) == []
        assert problems({**manifest, "spce": {}}), "a misspelt key is refused"
        in_namespace = manifest["kind"] != "Namespace"
        assert manifest["metadata"].get("namespace") == ("warmlane" if in_namespace else None)


def test_a_misspelling_deep_inside_is_found() -> None:
    api = json.loads(json.dumps(find("Deployment", "api")))
    api["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    assert problems(api)


def test_the_list_for_kubectl_names_every_file() -> None:
    told = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert sorted(told.pop("resources")) == FILES
    assert told.pop("images") == [
        {"name": "warmlane", "newName": "registry.example.org/warmlane", "newTag": "local"}
    ], "the only place with a tag of ours"
    assert told == {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": find("Namespace", "warmlane")["metadata"]["name"],
    }
    assert [container["name"] for container in ours()] == ["api", "policy", "scheduler", "worker"]


def test_what_selects_finds_and_what_is_referred_to_is_there() -> None:
    labels = {
        name: m["spec"]["template"]["metadata"]["labels"]
        for m in EVERYTHING
        if "template" in m.get("spec", {})
        for name in [m["metadata"]["name"]]
    }
    for manifest in EVERYTHING:
        selector = manifest.get("spec", {}).get("selector") or manifest.get("spec", {}).get("podSelector")
        if selector:
            assert selector.get("matchLabels", selector) == labels[manifest["metadata"]["name"]]
    for name, pod in pods():
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        if name == "redis":
            volumes |= {
                claim["metadata"]["name"] for claim in find("StatefulSet", name)["spec"]["volumeClaimTemplates"]
            }
        used = {mount["name"] for whose, c in containers() if whose == name for mount in c.get("volumeMounts", [])}
        assert used == volumes, name


def test_each_part_runs_with_few_rights_and_time_to_stop() -> None:
    redis = dict(pods())["redis"]["containers"][0]
    for container in [*ours(), redis]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
    specs = dict(pods())
    assert all(pod["automountServiceAccountToken"] is False for pod in specs.values())
    policy = Policy.parse(find("ConfigMap", "policy")["data"]["policy.yaml"])
    assert specs["worker"]["terminationGracePeriodSeconds"] >= policy.drain_timeout_ms / 1000 + 10
    api = specs["api"]["containers"][0]
    stop_s = int(next(e["value"] for e in api["env"] if e["name"] == "GATEWAY_STOP_AFTER_MS")) / 1000
    assert specs["api"]["terminationGracePeriodSeconds"] > stop_s + api["lifecycle"]["preStop"]["sleep"]["seconds"] + 10


def test_redis_refuses_before_it_is_killed() -> None:
    """A rewrite of its file needs memory beside what `maxmemory` counts."""
    redis = dict(pods())["redis"]["containers"][0]
    words = redis["command"]
    told = words[words.index("--maxmemory") + 1]
    limit = redis["resources"]["limits"]["memory"]
    assert told.endswith("mb") and limit.endswith("Gi")
    assert int(told.removesuffix("mb")) <= int(limit.removesuffix("Gi")) * 1024 * 0.7
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"


def test_a_new_worker_waits_for_the_gpu_of_the_one_that_it_replaces() -> None:
    """A pod more would find no GPU free, and the rollout would stand still."""
    update = find("Deployment", "worker")["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_runtime_outlives_its_worker() -> None:
    """Else it would be told to stop at the same moment, and what runs would be cut."""
    ollama = next(c for name, c in containers() if c["name"] == "ollama")
    assert ollama["restartPolicy"] == "Always" and ollama in dict(pods())["worker"]["initContainers"]


def test_commands_and_settings_of_the_containers_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    for container in ours():
        assert container["command"][0] == "gateway" and container["command"][1] in commands
        settings = {entry["name"] for entry in container["env"]}
        assert {name for name in settings if f"`{name}`" not in readme} == set()
    asked = [c[probe]["exec"]["command"] for _, c in containers() for probe in PROBES if "exec" in c.get(probe, {})]
    parts = [["gateway", "alive", part] for part in PARTS if part != "api"]
    assert sorted(asked) == sorted([*parts, ["valkey-cli", "-e", "ping"], ["ollama", "ps"]])


async def test_each_probe_over_http_asks_what_a_live_api_answers() -> None:
    """Also before there is a policy, and by the address of a pod."""
    asked = [
        (container[probe]["httpGet"]["path"], container[probe]["httpGet"]["port"])
        for _, container in containers()
        for probe in PROBES
        if "httpGet" in container.get(probe, {})
    ]
    assert len(asked) == 2
    api = dict(pods())["api"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in api["ports"]}
    bind = next(entry["value"] for entry in api["env"] if entry["name"] == "GATEWAY_BIND")
    assert bind == f"0.0.0.0:{named['http']}"
    assert find("Service", "api")["spec"]["ports"][0]["targetPort"] == "http"
    store = Store.fake(fake_redis(), namespace=new_namespace())
    async with live_api(store, keys="me:secret") as running, httpx.AsyncClient(base_url=running.url) as http:
        for path, port in asked:
            assert port in named
            answer = await http.get(
                path, headers={"host": f"10.244.0.7:{named[port]}", "user-agent": "kube-probe/1.37"}
            )
            assert answer.status_code == 200, f"{path}: {answer.text}"
    await store.close()


def test_the_workers_follow_the_streams_of_the_policys_lanes() -> None:
    """Their length is what waits and what runs; a consumer group would count only what runs."""
    scaled = find("ScaledObject", "worker")["spec"]
    assert find("Deployment", scaled["scaleTargetRef"]["name"])
    assert "replicas" not in find("Deployment", "worker")["spec"], "applied anew it would undo what KEDA has set"
    policy = Policy.parse(find("ConfigMap", "policy")["data"]["policy.yaml"])
    keys = Keyspace(BrokerSettings().namespace)
    streams = [trigger["metadata"]["stream"] for trigger in scaled["triggers"]]
    assert streams == [keys.lane(name) for name in policy.all_lanes()]
    assert {m.replicas for m in policy.models.values()} == {scaled["maxReplicaCount"]}
    redis, port = scaled["triggers"][0]["metadata"]["address"].split(":")
    assert redis == "redis.warmlane.svc" and int(port) == find("Service", "redis")["spec"]["ports"][0]["port"]
