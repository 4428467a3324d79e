"""Valid JSON of any shape with the right keys, for the readers of manifests, of a root and of configs, and for `plan`.

The other targets damage bytes, so most of their inputs are refused early. These reach what lies behind the schema.
Whatever the values are, there is a clean result, or a UserError (P1, P6).
"""

from __future__ import annotations

import copy
import json
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hv_batch.cli.plan import render_plan
from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import RunConfig, build_config
from hv_batch.job.config.sections import Section
from hv_batch.job.cost_model.estimate import make_plan
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.fuzz.mutations import HOSTILE, places
from tests.fuzz.root_targets import COMMANDS, RootTargets
from tests.fuzz.watching import watched

LIMIT_S = 20.0
LIMIT_BYTES = 600 << 20
QUICK, LONG = 12, 1500  # examples: in the default suite, and as a slow test

WHOLE = st.sampled_from((0, 1, 2, 3, 7, 16, 17, 96, 129, 10**4, 10**6, 2**31, 2**53, 10**12, 2**63 - 1, -1, 10**30))
REAL = st.floats(allow_nan=False) | st.sampled_from((0.25, 0.5, 1.0, 1e-300, 1e300, 1.5, 6.0))
TEXT = st.text(max_size=8) | st.sampled_from(("", "auto", "cuda", "cpu", "none", "pool", "group", "colocated", "../x"))
LEAF = st.none() | st.booleans() | WHOLE | REAL | TEXT
ANY = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def _row() -> st.SearchStrategy[dict[str, Any]]:
    """A row: usual values in most columns, and anything in some."""
    usual: Mapping[str, st.SearchStrategy[Any]] = {
        "prompt": st.text(min_size=1, max_size=20),
        "id": st.text(max_size=6) | WHOLE,
        "num_videos": st.sampled_from((1, 2, 3)),
        "height": st.sampled_from((16, 128, 720)),
        "width": st.sampled_from((16, 96, 1280)),
        "num_frames": st.sampled_from((1, 17, 129)),
        "num_inference_steps": st.sampled_from((1, 8, 50)),
        "cfg_scale": st.sampled_from((1.0, 3.0)),
    }
    prompts = {"prompt": usual["prompt"]}
    others = {name: values for name, values in usual.items() if name not in prompts}
    odd = st.dictionaries(st.sampled_from((*KNOWN_COLUMNS, "tag", "", "steps")), ANY, max_size=2)
    return st.builds(dict.__or__, st.fixed_dictionaries(prompts, optional=others), odd)


VALUES = (
    *(None, True, False, 0, 1, 2, 3, 7, 8, 24, 17, 720, 10**4, 10**6, 10**9, 10**12, 2**63 - 1, 10**30),
    *(1e-300, 0.25, 0.5, 1.0, 1.5, 6.0, 1e9, 1e300, "", "auto", "x", "h264", "h265", "prores", "toy"),
    *("cuda", "cpu", "pool", "group", "colocated", "refuse", "drop", "H100", "l40s", "veryslow", "yuv444p"),
    *([], ["a"], {}, {"a": "b"}, {"prompt": "caption"}, {"step_cache": "teacache"}, {"offload": "blocks"}),
)


def _allowed(path: tuple[str, ...]) -> list[Any]:
    """The VALUES that a key accepts by itself."""
    found = []
    for value in VALUES:
        with suppress(ValidationError):
            RunConfig.model_validate({path[0]: value if len(path) == 1 else {path[1]: value}})
            found.append(value)
    return found


def _config() -> st.SearchStrategy[list[tuple[tuple[str, ...], Any]]]:
    """Up to five keys, each with a value that it accepts by itself or, sometimes, with any value."""
    keys: list[tuple[str, ...]] = []
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        inner = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else ()
        keys += [(name, key) for key in inner] or [(name,)]
    allowed = {key: st.sampled_from(found) for key in keys if (found := _allowed(key))}
    usual = st.one_of([st.tuples(st.just(key), values) for key, values in allowed.items()])
    odd = st.tuples(st.sampled_from(keys), ANY)
    return st.lists(usual | usual | usual | odd, min_size=1, max_size=5)


def examples(count: int) -> Any:
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), deadline=None)


both = pytest.mark.parametrize("count", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])


def clean(folder: Path, act: Callable[[], object]) -> bool:
    """Whether `act` gives a result and no UserError, within the limits and without opening anything elsewhere."""
    is_clean = False
    with watched(folder, LIMIT_S) as watch, suppress(UserError):
        act()
        is_clean = True
    assert not watch.seen
    assert watch.peak_bytes < LIMIT_BYTES
    return is_clean


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The only folder in which a plan may open files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path.resolve()))
    return tmp_path.resolve()


@both
def test_rows_of_any_values_are_checked_and_planned(folder, count):
    """P6: a manifest gives samples and a plan, or a UserError."""

    results: list[bool] = []

    @examples(count)
    @given(st.lists(_row(), min_size=1, max_size=4), st.sampled_from((".json", ".jsonl")))
    def check(rows: list[dict[str, Any]], suffix: str) -> None:
        path = folder / f"m{suffix}"
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
        config = RunConfig.model_validate({"model": {"options": {"model_base": str(folder / "none")}}})

        def act() -> None:
            store = Store(f"memory://{uuid.uuid4().hex}")
            assert sum(1 for _ in check_manifest(Manifest(str(path)), config, store)) > 0
            render_plan(make_plan(config, [str(path)], GPUS["h100"]))

        try:
            results.append(clean(folder, act))
        finally:
            MemoryFileSystem.store.clear()

    check()
    assert count == QUICK or sum(results) > count / 10, "nearly all manifests were refused"


@both
def test_configs_of_any_values_are_read_and_planned(folder, count):
    """P6: a config gives a plan, or a UserError."""
    (folder / "m.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "cfg_scale": 3.0, "num_frames": 1}\n')

    results: list[bool] = []

    def plan(values: dict[str, Any]) -> None:
        options = values.setdefault("model", {}).setdefault("options", {})
        if isinstance(options, dict):
            options["model_base"] = str(folder / "none")
        config = build_config("c.yaml", values, [])
        render_plan(make_plan(config, [str(folder / "m.jsonl")], GPUS["h100"], 2.5))

    @examples(count)
    @given(_config())
    def check(changes: list[tuple[tuple[str, ...], Any]]) -> None:
        values: dict[str, Any] = {}
        for path, value in changes:
            (values if len(path) == 1 else values.setdefault(path[0], {}))[path[-1]] = copy.deepcopy(value)
        results.append(clean(folder, lambda: plan(values)))

    check()
    assert count == QUICK or sum(results) > count / 4, "nearly all configs were refused"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> RootTargets:
    return RootTargets(tmp_path_factory.mktemp("fuzzed").resolve())


@both
def test_objects_of_any_values_are_read_by_every_command(root, count):
    """P1, P5: one or two values of a JSON object of a root are replaced, by a reader's own kinds of values."""
    objects = {key: data for key, data in sorted(root.intact.items()) if key.endswith(".json")}
    inside = Path(root.store.url).parent

    @examples(count)
    @given(st.sampled_from(sorted(objects)), st.sampled_from(sorted(COMMANDS)), st.data())
    def check(key: str, command: str, data: st.DataObject) -> None:
        document = json.loads(objects[key])
        for _ in range(data.draw(st.integers(1, 2))):
            *parents, last = data.draw(st.sampled_from(list(places(document)) or [("x",)]))
            place = document
            for name in parents:
                place = place[name]
            place[last] = copy.deepcopy(data.draw(ANY | st.sampled_from(HOSTILE)))
        text = json.dumps(document).encode()
        readers = [lambda: COMMANDS[command](root.store, inside)]
        if key in root.readers:
            readers.append(lambda: root.readers[key](root.store))
        try:
            root.put(key, text)
            for act in readers:
                clean(inside, act)
        finally:
            root.put(key, objects[key])

    check()
