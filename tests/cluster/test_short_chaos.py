"""A short chaos run with a fixed schedule; `pytest -m chaos` makes long ones (tests/chaos/README.md)."""

from __future__ import annotations

import pytest
import yaml

from tests.chaos.episode import Episode
from tests.chaos.machines import Machines, kill_marked
from tests.chaos.roots import SmallDisk
from tests.chaos.schedule import Event
from tests.chaos.variants import Variant
from tests.support.runs import write_config

SCHEDULE = (
    Event("kill-rank", 1.0, 0.0, 0.5),
    Event("disk-full", 2.0, 1.0, 0.5),
    Event("kill-decoder", 3.0, 0.0, 0.5),
    Event("kill-driver", 1.0, 0.0, 0.5),
    Event("power-off", 3.0, 0.0, 0.99),
)


@pytest.mark.timeout(900)
def test_a_run_under_a_fixed_schedule_ends_as_an_undisturbed_one(fleet, undisturbed, tmp_path):
    """P1-P5: a rank, a decoder, the driver and a machine die, and the disk of the root is full for a while. The checker
    compares the root with that of a run in which nothing went wrong, byte for byte, and nothing is left on the cluster.
    """
    machines = Machines(tmp_path, fleet)
    root = SmallDisk(tmp_path / "disk")
    pools = {"encoders": {"gpus": 0.5}, "decoders": {"gpus": 0.5}, "groups": {"count": 2, "checkpoint_every": 1}}
    config = yaml.safe_load(write_config(tmp_path, tmp_path / "marks", **pools).read_text())
    manifest = undisturbed / "manifest.jsonl"
    variant = Variant("short", config, (), manifest, manifest, signed=False, exit_code=0)
    try:
        machines.add()
        machines.add()
        episode = Episode(machines, tmp_path, root, variant, undisturbed / "out", step_seconds=0.3)
        result = episode.run(SCHEDULE)
    finally:
        machines.close()
        kill_marked(tmp_path)
        root.close()
    assert result.findings == []
    assert sum(result.events.values()) >= len(SCHEDULE) - 2, "the run ended before it was disturbed"
