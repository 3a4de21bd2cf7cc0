"""Writes schema.json: the part of Kubernetes' own schema that our manifests use, from the package kubernetes-validate.

The package is 108 MB of every version of everything, so it is installed to record (kubernetes-validate 1.37.0, of
Kubernetes 1.37, in November 2026) and not to test. `python tests/support/kubernetes/record.py`.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

VERSION = "v1.37.0-local-strict"
KINDS = {
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.apps.v1.StatefulSet",
    "io.k8s.api.batch.v1.Job",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.Secret",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.policy.v1.PodDisruptionBudget",
}


def main() -> None:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / VERSION
    everything = json.loads((folder / "_definitions.json").read_text())["$defs"]
    names = {name: name for name in everything if name in KINDS}
    assert names.keys() == KINDS, KINDS - names.keys()
    needed: dict[str, Any] = {}
    left = sorted(KINDS)
    while left:
        name = left.pop()
        if name not in needed:
            needed[name] = bare(everything[name])
            left += [reference.removeprefix("#/$defs/") for reference in references(needed[name])]
    told = {"$comment": f"kubernetes-validate 1.37.0, {VERSION}; see record.py", "$defs": dict(sorted(needed.items()))}
    Path(__file__).with_name("schema.json").write_text(json.dumps(told, separators=(",", ":")) + "\n")


def bare(schema: Any) -> Any:
    """The schema without its prose."""
    if isinstance(schema, list):
        return [bare(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: bare(part)
        for key, part in schema.items()
        if not (key == "description" and isinstance(part, str)) and not key.startswith("x-kubernetes")
    }


def references(schema: Any) -> list[str]:
    """Every definition that it refers to; each name is in this file."""
    if isinstance(schema, list):
        return [name for part in schema for name in references(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [name for part in schema.values() for name in references(part)]


if __name__ == "__main__":
    main()
