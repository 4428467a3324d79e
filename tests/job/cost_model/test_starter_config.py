"""The configs that `hv-batch init` writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.yaml_overrides import parse_yaml
from hv_batch.job.cost_model.memory_check import check_memory
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.cost_model.starter_config import Goal, starter_config
from hv_batch.protocol import UserError


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 64), st.sampled_from(sorted(GPUS)), st.sampled_from(Goal))
def test_a_starter_config_is_valid_fits_and_reserves_no_more_gpus_than_there_are(gpus, gpu, goal):
    if gpu == "l40s" and gpus == 1:  # 45 GiB do not hold all parts
        with pytest.raises(UserError, match="does not fit"):
            starter_config(gpus, gpu, goal, "ckpts")
        return
    text = starter_config(gpus, gpu, goal, "ckpts")
    config = RunConfig.model_validate(parse_yaml(text))
    video = config.defaults
    run = resolve_run(config, [(video.height, video.width, video.num_frames)])
    check_memory(run)
    reserved = config.groups.count * run.groups.largest.world_size + sum(pool.gpus for pool in run.pools.values())
    assert reserved <= gpus
    assert reserved >= gpus / 2 or gpus < 8, "at most a half of the GPUs is idle"


def test_the_goal_decides_the_size_of_a_group():
    def ranks(goal):
        return parse_yaml(starter_config(8, "H100", goal, "ckpts"))["parallel"]["gpus_per_group"]

    assert [ranks(goal) for goal in (Goal.THROUGHPUT, Goal.LATENCY, Goal.MIXED)] == [1, 8, "auto"]


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UserError, match="H100"):
        starter_config(8, "Z9", Goal.LATENCY, "ckpts")
