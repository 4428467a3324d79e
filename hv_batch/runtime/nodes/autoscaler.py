"""Whether the autoscaler of the cluster ignores label selectors, by which a run avoids excluded nodes.

Version 1 of Ray's autoscaler does. It counts an excluded node with free GPUs as the one that a group asks for, so it
adds no node for the group. Ray has no public API for the version; tests/cluster/test_autoscaler.py checks this.
"""

from __future__ import annotations

import json
import re

from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

REMEDY = (
    "Use version 2: RAY_enable_autoscaler_v2=1 on the head, or on KubeRay enableInTreeAutoscaling with "
    "autoscalerOptions.version: v2"
)

# Without an autoscaler config, Ray reports each node as a type of its own, named after its id.
_NO_TYPE = re.compile(r"node_[0-9a-f]{56}")


def ignores_labels() -> bool:
    """Whether version 1 adds the nodes of this cluster; false if none or version 2 does. Asks the control store."""
    return not is_autoscaler_v2(fetch_from_server=True) and has_node_types(_internal_kv_get(DEBUG_AUTOSCALING_STATUS))


def has_node_types(status: bytes | None) -> bool:
    """Whether the status that version 1 reports is that of a cluster with an autoscaler config."""
    try:
        nodes = json.loads(status or b"{}")["autoscaler_report"]["active_nodes"]
        return any(not _NO_TYPE.fullmatch(name) for name in nodes)
    except (ValueError, KeyError, TypeError):  # nothing is reported yet, or in another form
        return False
