"""Which clusters have an autoscaler of version 1, from what Ray 2.60 reports of each."""

from __future__ import annotations

import json

import pytest

from hv_batch.runtime.nodes.autoscaler import has_node_types

NODE = "node_4e7b142888b9c4102f373972ed602465072b809c3564cf8a076622f9"


def report(*nodes):
    return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(nodes, 1), "legacy": True}}).encode()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (report("ray.head.default"), True),
        (report("headgroup", "gpu"), True),
        (report("node_gpu"), True),
        (report(NODE), False),
        (report(), False),
        (None, False),
        (b"not JSON", False),
        (b'{"autoscaler_report": null}', False),
    ],
)
def test_an_autoscaler_with_a_config_is_told_from_the_report_of_a_cluster_without(status, expected):
    assert has_node_types(status) is expected
