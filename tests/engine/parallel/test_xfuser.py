"""`sequence_parallel: xfuser` without a GPU: refused configurations, and calls of xfuser's documented interface.

xfuser can be imported only on a machine with a GPU. A stand-in computes what the documentation of its long-context
attention describes, over real process groups, by gathering all tokens. tests/gpu runs the package itself.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hv_batch.architecture import DiTConfig
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.parallel.xfuser import PINNED, XfuserAttention, check_xfuser
from hv_batch.protocol import ParallelPlan, UserError
from tests.support.dit_reference import random_dit, random_inputs
from tests.support.rank_processes import joined

CONFIG = DiTConfig(
    hidden_size=48,
    heads_num=8,
    mm_double_blocks_depth=1,
    mm_single_blocks_depth=1,
    rope_dim_list=(2, 2, 2),
    text_states_dim=16,
    text_states_dim_2=8,
)
PLANS = [ParallelPlan(ulysses_degree=u, ring_degree=r) for u, r in [(4, 1), (2, 2)]]
EVEN, UNEVEN = (3, 8, 8), (3, 6, 10)  # 48 tokens, and 45
TEXTS = [7, 12]


class DocumentedAttention:
    """A stand-in with the documented behaviour of `xFuserLongContextAttention`."""

    def __init__(self, *, attn_type, attn_processor):
        self._kernel = attn_processor
        self._groups = sys.modules["yunchang.globals"].PROCESS_GROUP

    def __call__(self, attn, query, key, value, *, joint_strategy, **text):
        assert attn is None
        assert joint_strategy == "rear"
        assert query.shape[0] == 1, "one text length for a whole batch would be wrong for the others"
        degrees = [dist.get_world_size(group) for group in (self._groups.ULYSSES_PG, self._groups.RING_PG)]
        assert degrees[0] * degrees[1] == dist.get_world_size()
        joint = [text[f"joint_tensor_{name}"] for name in ("query", "key", "value")]
        keys, values = (self._gather(x) for x in (key, value))
        out, lse = self._kernel(
            torch.cat((query, joint[0]), 1),
            torch.cat((keys, joint[1]), 1),
            torch.cat((values, joint[2]), 1),
            dropout_p=0.0,
            causal=False,
        )
        assert lse.shape == (1, query.shape[2], query.shape[1] + joint[0].shape[1])
        return out + dist.get_rank() * 1e-7  # like rounding: ranks agree only if the engine broadcasts the text rows

    def _gather(self, x):
        shards = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, x.contiguous())
        return torch.cat(shards, 1)


def _stand_in() -> None:
    for name, content in {
        "xfuser": {},
        "xfuser.core": {},
        "xfuser.core.long_ctx_attention": {"xFuserLongContextAttention": DocumentedAttention},
        "yunchang": {},
        "yunchang.globals": {"PROCESS_GROUP": SimpleNamespace(ULYSSES_PG=None, RING_PG=None)},
    }.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)


def _inputs(size):
    return random_inputs(CONFIG, size, TEXTS, seed=2, padded=max(TEXTS))


def _rank_main(rank: int, folder: Path, addresses: dict[ParallelPlan, mp.Queue]) -> None:
    torch.set_num_threads(1)
    _stand_in()
    for plan, queue in addresses.items():
        with joined(rank, plan, queue) as mesh:
            model = random_dit(CONFIG, seed=1)
            model.joint_attention = XfuserAttention(mesh)
            velocity = model(**_inputs(EVEN), mesh=mesh)
            assert (model(**_inputs(EVEN)) - velocity).abs().max().item() <= 1e-4  # a single rank does not use xfuser
            with pytest.raises(UserError, match="45 image tokens do not divide by 4 ranks"):
                model(**_inputs(UNEVEN), mesh=mesh)
        torch.save(velocity, folder / f"{plan}-{rank}.pt")


def test_xfuser_is_called_as_documented(tmp_path):
    """Two texts of different lengths are rendered, text keys are attended once, and all ranks have equal bits (P3)."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hv_batch.engine.hunyuan", "hypothesis", "pytest"])
    addresses = {plan: context.Queue() for plan in PLANS}
    mp.start_processes(_rank_main, (tmp_path, addresses), nprocs=4, start_method="forkserver")
    expected = random_dit(CONFIG, seed=1)(**_inputs(EVEN), mesh=SequenceMesh.single())
    for plan in PLANS:
        first, *others = (torch.load(tmp_path / f"{plan}-{rank}.pt") for rank in range(4))
        assert (first - expected).abs().max().item() <= 1e-4, plan
        assert all(torch.equal(first, other) for other in others), plan


def test_a_machine_that_cannot_run_xfuser_is_refused(monkeypatch):
    """P6: a missing GPU, a missing package and another version are reported before weights are read, with a remedy."""
    with pytest.raises(UserError, match="needs a CUDA device, but this process has cpu"):
        check_xfuser(torch.device("cpu"))
    versions = dict(PINNED)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    check_xfuser(torch.device("cuda"))
    versions["xfuser"] = "0.7.0"
    with pytest.raises(UserError, match=r"needs xfuser 0\.4\.5, installed is 0\.7\.0; install the 'gpu' extra"):
        check_xfuser(torch.device("cuda"))
    del versions["xfuser"]
    with pytest.raises(UserError, match="installed is none"):
        check_xfuser(torch.device("cuda"))


def test_shapes_that_xfuser_cannot_divide_are_refused_at_plan_time():
    """P6: uneven shards are reported with their shape, a plan of one rank per sequence too; native allows both."""
    xfuser, native = (HunyuanVideo(model_base="x", sequence_parallel=name) for name in ("xfuser", "native"))
    shapes = [(720, 1280, 129), (720, 720, 129), (624, 832, 129)]
    eight = ParallelPlan(ulysses_degree=8)
    assert native.group_problems(eight, shapes) == []
    problems = xfuser.group_problems(eight, shapes)
    assert [line.split(":")[0] for line in problems] == ["624x832x129", "720x720x129"]
    assert "66825 image tokens do not divide by 8 ranks" in problems[1]
    assert xfuser.group_problems(ParallelPlan(ulysses_degree=2, cfg_degree=2), shapes[:1]) == []
    (alone,) = xfuser.group_problems(ParallelPlan(cfg_degree=2), shapes)
    assert "needs at least two ranks per sequence" in alone
    with pytest.raises(UserError, match="sequence_parallel: 'usp' is not allowed; allowed are native, xfuser"):
        HunyuanVideo(model_base="x", sequence_parallel="usp")
