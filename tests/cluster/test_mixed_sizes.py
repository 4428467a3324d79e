"""Groups of several sizes in one run: on fake GPUs with the fake engine, and on the CPU with the real one."""

from __future__ import annotations

import json
from threading import Thread

import pytest

from hv_batch.cli.demo import shipped, with_model_base
from hv_batch.job.config import group_rules
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.memory import GIB, denoiser_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.workload import count_tokens
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import ExitCode
from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.runs import count, records, videos, wait_for, write_config

SMALL, LARGE = (64, 64, 9), (128, 64, 9)
FAULTS = ("!hold-denoise", "!kill-denoise-once", "", "")


def write_shapes(folder, name, *shapes, faults=("", "", "", "")):
    """Four rows of each shape, in turn; `faults` end the prompts of each shape."""
    rows = [
        {"id": f"{shape[0]}-{i}", "prompt": f"prompt{i}-{shape[0]} {fault}", "height": shape[0], "width": shape[1]}
        for i, fault in enumerate(faults)
        for shape in shapes
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def between(model, shape):
    """Memory of a GPU in GiB on which the shape needs two ranks."""
    one, two = (denoiser_footprint(model, count_tokens(shape), ranks, 1).total for ranks in (1, 2))
    return (one + two) / 2 / GIB


def ranks_of(output):
    return {key: record["places"]["denoise"]["ranks"] for key, record in records(output).items()}


def run_fakes(folder, address, name, manifest, values, selection=None):
    config = load_config(str(folder / "config.yaml"), [f"{key}={value}" for key, value in values.items()])
    output = folder / name
    code = render(config, manifest, str(output), selection=selection, address=address)
    assert code is ExitCode.COMMITTED
    return output


@pytest.fixture(scope="module")
def mixed(ray_head, tmp_path_factory):
    """The folder of a run over two shapes, whose first command rendered six of the eight samples."""
    folder = tmp_path_factory.mktemp("sizes")
    marks = folder / "marks"
    marks.mkdir()
    write_config(folder, marks, parallel={"ulysses_degree": None, "ring_degree": None}, groups={"count": 2})
    auto = {"parallel.gpus_per_group": "auto", "gpu": "H100", "gpu_memory_gib": between(ModelShape(), LARGE)}

    def let_go():
        wait_for(lambda: count(marks, "held").total() == 2, "a group of each size at work")
        (marks / "go").touch()

    with pytest.MonkeyPatch.context() as patch:
        # In this process, the double counts as the engine whose costs are known.
        patch.setattr(group_rules, "ENGINE", "tests.support.doubles:FakeEngine")
        helper = Thread(target=let_go, daemon=True)
        helper.start()
        manifest = write_shapes(folder, "mixed", LARGE, SMALL, faults=FAULTS)
        run_fakes(folder, ray_head[0], "mixed", manifest, auto, Selection(limit=6))
        helper.join()
        assert len(records(folder / "mixed")) == 6
        run_fakes(folder, ray_head[0], "mixed", manifest, {**auto, "gpu_memory_gib": 1000})
    return folder


@pytest.mark.slow
def test_two_sizes_live_in_one_run(mixed):
    """Sizes, P3, P4: a group of two and one of one render at the same time, and one of each is killed. On larger GPUs,
    where every shape would fit one rank, the second command keeps to the sizes of its run.json.
    """
    assert len(count(mixed / "marks", "held")) == 2, "a large and a small one at the same time"
    found = records(mixed / "mixed")
    tries = {key: record["attempts"] for key, record in found.items()}
    assert tries == {f"{shape[0]}-{i}": 2 if i == 1 else 1 for shape in (LARGE, SMALL) for i in range(4)}
    assert ranks_of(mixed / "mixed") == {
        f"{shape[0]}-{i}": n for shape, n in ((LARGE, 2), (SMALL, 1)) for i in range(4)
    }
    assert {record["places"]["denoise"]["group"] for record in found.values()} == {
        "Ulysses 2 x ring 1",
        "Ulysses 1 x ring 1",
    }
    plans = json.loads((mixed / "mixed" / "run.json").read_text())["identity"]["parallel"]["plans"]
    assert plans["128x64x9"] == {"ulysses_degree": 2, "ring_degree": 1, "cfg_degree": 1}


@pytest.mark.slow
def test_two_sizes_give_the_bytes_of_two_runs(mixed, ray_head):
    """P3: each shape's videos are those of a run of its own with that size."""
    alone = {}
    for shape, ranks in ((LARGE, 2), (SMALL, 1)):
        manifest = write_shapes(mixed, f"only-{ranks}", shape, faults=FAULTS)
        alone |= videos(run_fakes(mixed, ray_head[0], f"only-{ranks}", manifest, {"parallel.gpus_per_group": ranks}))
    assert len(alone) == 8
    assert videos(mixed / "mixed") == alone


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_engine_renders_two_sizes_as_two_runs_would(ray_environment, tmp_path):
    """P3, sizes: the real engine at toy width, groups of one and of two ranks in one run, byte for byte."""
    config = with_model_base(load_config(str(shipped("demo_cpu.yaml"))), write_toy_checkpoint(tmp_path / "toy"))
    base = config.model.options["model_base"]
    memory = between(ModelShape.from_options(config.model.options), LARGE)

    def run(name, manifest, *sizes, selection=None):
        few = ["parallel.ulysses_degree=null", "defaults.num_frames=9", "defaults.num_inference_steps=2"]
        overrides = [f"model.options.model_base={base}", *few, *sizes]
        config = load_config(str(shipped("demo_cpu.yaml")), overrides)
        output = tmp_path / name
        code = render(config, manifest, str(output), selection=selection, address="local")
        assert code is ExitCode.COMMITTED
        return output

    auto = ("parallel.gpus_per_group=auto", "gpu=H100", f"gpu_memory_gib={memory}")
    manifest = write_shapes(tmp_path, "mixed", LARGE, SMALL)
    output = run("mixed", manifest, *auto)
    assert set(ranks_of(output).values()) == {1, 2}
    run("inside", manifest, *auto, selection=Selection(limit=2))
    inside = run("inside", manifest, *auto[:2], "gpu_memory_gib=99", "decoders.placement=group")
    assert ranks_of(inside) == ranks_of(output), "as its run.json says"
    assert videos(inside) == videos(output), "whichever group decodes"
    alone = {}
    for shape, ranks in ((LARGE, 2), (SMALL, 1)):
        manifest = write_shapes(tmp_path, f"only-{ranks}", shape)
        alone |= videos(run(f"only-{ranks}", manifest, f"parallel.gpus_per_group={ranks}"))
    assert videos(output) == alone
