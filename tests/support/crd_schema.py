"""The schema of a custom resource of Kubernetes, without descriptions and without what Kubernetes itself defines.

A CRD of KubeRay has half a megabyte, because it repeats the schema of a pod for each pod template. Here a reference
stands for each type of Kubernetes (`kubernetes_schema`). What is left is a closed JSON schema of a few kilobytes. The
versions are the oldest ones that the files of cluster/ name. To follow a new release, with a clone of KubeRay (or of
the Prometheus operator, in whose example/prometheus-operator-crd the PodMonitor is):

    git -C kuberay show v1.7.0:ray-operator/config/crd/bases/ray.io_raycronjobs.yaml \
        | python -m tests.support.crd_schema > tests/support/data/crds/RayCronJob.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml

KEPT = ("type", "enum", "required", "minimum", "minLength", "minItems")
CORE = "io.k8s.api.core.v1."

# Types of Kubernetes inside a CRD, by names of their properties.
KUBERNETES_TYPES = {
    CORE + "PodTemplateSpec": {"metadata", "spec"},
    CORE + "Service": {"apiVersion", "kind", "metadata", "spec", "status"},
    CORE + "SecurityContext": {"allowPrivilegeEscalation", "capabilities"},
    CORE + "ResourceRequirements": {"claims", "limits", "requests"},
    CORE + "EnvVar": {"name", "value", "valueFrom"},
    CORE + "EnvFromSource": {"prefix", "secretRef", "configMapRef"},
    CORE + "VolumeMount": {"name", "mountPath", "subPathExpr"},
    "io.k8s.api.networking.v1.NetworkPolicyIngressRule": {"from", "ports"},
    "io.k8s.api.networking.v1.NetworkPolicyEgressRule": {"to", "ports"},
    "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector": {"matchExpressions", "matchLabels"},
}


def closed_schema(crd: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The schema of the resource that `crd` defines in `version`; unknown fields are refused."""
    (found,) = [entry for entry in crd["spec"]["versions"] if entry["name"] == version]
    schema = found["schema"]["openAPIV3Schema"]
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": f"{crd['spec']['group']}/{version}"},
            "kind": {"const": crd["spec"]["names"]["kind"]},
            "metadata": _reference("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
            "spec": _closed(schema["properties"]["spec"]),
        },
    }


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    for name, members in KUBERNETES_TYPES.items():
        if members <= properties.keys() and (len(members) > 2 or members == properties.keys() or "Security" in name):
            return _reference(name)
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if properties:
        kept["properties"] = {name: _closed(value) for name, value in sorted(properties.items())}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), Mapping):
        kept["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = _closed(schema["items"])
    return kept


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{name}"}


if __name__ == "__main__":
    document = yaml.safe_load(sys.stdin)
    schema = closed_schema(document, document["spec"]["versions"][0]["name"])
    json.dump(schema, sys.stdout, separators=(",", ":"), sort_keys=True)
    print()
