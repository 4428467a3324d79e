"""The types of Kubernetes that the files of cluster/ use, as closed JSON schemas without descriptions.

The package kubernetes-validate has them for all versions, in 17,000 files, which take half a minute to install. To
follow a new version, in an environment with that package:

    python -m tests.support.kubernetes_schema 1.37 > tests/support/data/crds/kubernetes.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.crd_schema import KUBERNETES_TYPES

URI = "https://kubernetes.io/api/_definitions.json"  # as crd_schema refers to it
# The kinds in cluster/ that Kubernetes itself defines.
KINDS = {
    "Job": "io.k8s.api.batch.v1.Job",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
}
METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
ANNOTATIONS = ("description", "$schema", "format")


def used_types(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The types that custom resources and KINDS refer to, and those that these refer to."""
    found: dict[str, Any] = {}
    left = [*KUBERNETES_TYPES, *KINDS.values(), METADATA]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = _without_annotations(definitions[name])
            left += _references(definitions[name])
    return {"$id": URI, "$defs": dict(sorted(found.items()))}


def _without_annotations(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_annotations(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for name, value in schema.items():
        if name == "properties":
            kept[name] = {field: _without_annotations(each) for field, each in value.items()}
        elif name not in ANNOTATIONS and not name.startswith("x-"):
            kept[name] = _without_annotations(value)
    return kept


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, Mapping):
        for name, value in schema.items():
            if name == "$ref":
                yield value.rpartition("/")[2]
            else:
                yield from _references(value)


if __name__ == "__main__":
    import kubernetes_validate

    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{sys.argv[1]}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    json.dump(used_types(definitions), sys.stdout, separators=(",", ":"), sort_keys=True)
    print()
