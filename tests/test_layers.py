"""The layers of the package: each imports only what stands below it, and no folder grows past what a reader can survey.

The table is the architecture. A package may import the packages of the lines below its own, and modules of itself.
Imports for type checking count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.repository import ROOT

PACKAGE = ROOT / "hv_batch"
MAX_MODULES = 16  # of one folder

# Top to bottom. Packages of one line do not import each other.
LAYERS = """
    cli
    bench
    runtime
    media  toy  weights
    job  engine
    architecture  attention_kernels  attention_methods  step_schedule
    protocol
    sampling_params
"""

JOB = """
    export
    inspection
    report
    dataset
    records
    simulation
    cost_model
    scheduling
    manifest
    event_log
    documents
    config
    storage
    hooks
    progress  log_records
    failure  user_input
    redaction  layout  licences  formatting  stages  workload  thread_map  quality
"""

RUNTIME = """
    nightly  finish_notice
    render  dry_run  doctor
    run_end
    driver
    pools
    groups  session
    nodes  preflight
    publisher  worker
    classify
    run_context
    stop_signals  local_ray  ray_contact  run_limits
"""

ENGINE = """
    pipeline
    local_group
    hunyuan
    denoiser
    sampling  decoder  kernel_choice
    text_encoders
    checkpoint  self_check
    dit
    vae
    parallel
    attention  determinism  rank_failures  video_requests  matmul_speed  option_values
    compiler
"""


@cache
def imports() -> list[tuple[str, str]]:
    """(importing module, imported module) of every import inside the package, both without the prefix `hv_batch.`."""
    return list(_imports())


def _imports() -> Iterator[tuple[str, str]]:
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hv_batch":
                base = (node.module or "").removeprefix("hv_batch").lstrip(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".lstrip(".")
                    yield module, full if full in modules else base


def ranks(table: str) -> dict[str, int]:
    lines = [line.split() for line in table.split("\n") if line.strip()]
    return {name: rank for rank, line in enumerate(lines) for name in line}


@pytest.mark.parametrize(
    ("prefix", "table"),
    [("", LAYERS), ("job.", JOB), ("runtime.", RUNTIME), ("engine.", ENGINE)],
    ids=["all", "job", "runtime", "engine"],
)
def test_imports_point_down(prefix, table):
    rank, upward, unknown = ranks(table), [], set()
    for module, target in imports():
        if not (module.startswith(prefix) and target.startswith(prefix)):
            continue
        here, there = (name.removeprefix(prefix).split(".")[0] for name in (module, target))
        if here == there or here in ("__main__", "__init__") or there == "":
            continue
        unknown |= {here, there} - rank.keys()
        if not unknown and rank[here] >= rank[there]:
            upward.append(f"{module} imports {target}")
    assert not unknown, f"not in the table of layers: {sorted(unknown)}"
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_by_way_of_others():
    graph: dict[str, set[str]] = {}
    for module, target in imports():
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_no_folder_is_crowded():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    sizes = {folder: sum(path.name != "__init__.py" for path in folder.glob("*.py")) for folder in folders}
    crowded = {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > MAX_MODULES}
    assert not crowded


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                imported = node.module.rpartition(".")[2]
                assert not imported.startswith(("test_", "conftest")), f"{path} imports {node.module}"
