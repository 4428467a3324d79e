"""Two runs at once on one Ray head: each keeps to its share of the GPUs, and nothing of one appears in the other."""

from __future__ import annotations

import re
import time
from urllib.request import urlopen

import pytest

from hv_batch.job.storage.store import Store
from tests.support.runs import command, count, finish, records, start, wait_for, write_config, write_manifest

NAMES = ("first", "second")
GROUPS = 4  # of two ranks: all of the head's eight GPUs


@pytest.mark.slow
def test_two_runs_share_a_cluster(ray_head, metrics_url, tmp_path):
    """P5, `groups.max_share`: the run that starts first would take all GPUs, and leaves half of them to the other."""
    drivers, folders = {}, {}
    for name in NAMES:
        folders[name] = folder = tmp_path / name
        (folder / "marks").mkdir(parents=True)
        config = write_config(
            *(folder, folder / "marks", {"hold_after": [4]}),
            groups={"count": GROUPS, "max_share": 0.5},
            timeouts={"stall_s": 170},
        )
        # Both manifests have the same ids, keys and shards.
        manifest = write_manifest(folder, [f"{name} {number}" for number in range(6)])
        drivers[name] = start(command(config, manifest, folder / "out", ray_head[0]))
        wait_for(lambda: len(count(folder / "marks", "ranks")) == GROUPS, f"two groups of the {name} run")  # noqa: B023
    time.sleep(3)  # for further groups, if they asked for any
    assert [len(count(folders[name] / "marks", "ranks")) for name in NAMES] == [GROUPS, GROUPS]
    runs = {name: Store(str(folders[name] / "out")).url for name in NAMES}

    def pending():
        text = urlopen(metrics_url, timeout=10).read().decode()
        found = re.findall(r'^ray_hv_samples\{(.*state="pending".*)\} (\S+)$', text, re.MULTILINE)
        return {re.search(r'run="([^"]*)"', tags)[1]: float(value) for tags, value in found}

    wait_for(lambda: {run: pending().get(run) for run in runs.values()} == dict.fromkeys(runs.values(), 6.0), "metrics")
    for name in NAMES:
        (folders[name] / "marks" / "go-4").touch()
    for name in NAMES:
        code, text = finish(drivers[name])
        assert code == 0, text
        assert "groups.max_share = 0.5 allows this run 4 of the cluster's 8 GPUs: further groups wait" in text
        assert "autoscaler" not in text, "the head has none"
        found = records(folders[name] / "out")
        assert sorted(found) == [f"s{number:02d}" for number in range(6)]
        assert all(record["params"]["prompt"].startswith(name) for record in found.values())
        assert not any(record["history"] for record in found.values())
