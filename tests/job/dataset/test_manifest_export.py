"""The samples of a root as a manifest for another run."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.dataset.manifest_export import manifest_lines, new_seed
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from tests.support.rendered_roots import make_commit, make_sample
from tests.support.runs import FAKE_CONFIG

EXTRA = {"category": "cat", "tags": ["a", 1], "score": 0.5}


def read_back(tmp_path, lines: list[str]):
    """The samples of a run whose config has other defaults than the first one."""
    path = tmp_path / "again.jsonl"
    path.write_text("".join(lines), encoding="ascii")
    loras = {"film": {"path": "film.safetensors"}}
    config = RunConfig.model_validate({**FAKE_CONFIG, "model": {"loras": loras}, "defaults": {"lora": "film"}})
    return list(check_manifest(Manifest(str(path)), config, Store(str(tmp_path / "plan"))).samples(0))


def test_another_run_of_the_manifest_renders_the_same_samples(tmp_path):
    """P3: without new seeds, every parameter is that of the record, whatever the defaults of the other config are."""
    samples = [make_sample(n, extra=EXTRA, prompt=f"狐狸 {n}\nfox", cfg_scale=2.0) for n in (1, 2, 3)]
    again = read_back(tmp_path, list(manifest_lines(map(make_commit, samples), new_seeds=False)))
    assert [(s.id, s.params, s.fps, s.extra) for s in again] == [(s.id, s.params, s.fps, s.extra) for s in samples]


def test_new_seeds_change_the_seeds_alone(tmp_path):
    samples = [make_sample(n, extra=EXTRA) for n in (1, 2, 3)]
    lines = list(manifest_lines(map(make_commit, samples), new_seeds=True))
    again = read_back(tmp_path, lines)
    assert not {s.params.seed for s in again} & {s.params.seed for s in samples}
    without = [s.params.to_dict() | {"seed": 0} for s in again]
    assert without == [s.params.to_dict() | {"seed": 0} for s in samples]
    assert lines == list(manifest_lines(map(make_commit, samples), new_seeds=True)), "the same command, the same file"


def test_videos_of_one_row_become_rows_of_their_own():
    records = []
    for index in range(2):
        record = make_commit(make_sample(1))
        records.append(record | {"id": "fox", "key": f"fox-v{index}", "video_index": index})
    rows = [json.loads(line) for line in manifest_lines(records, new_seeds=True)]
    assert [row["id"] for row in rows] == ["fox-v0", "fox-v1"]
    assert "num_videos" not in rows[0]


@given(st.integers(0, 2**63 - 1), st.text(max_size=20))
def test_a_new_seed_is_valid_and_another_one(seed, key):
    again = new_seed(seed, key)
    assert 0 <= again < 2**31
    assert again != seed
    assert again == new_seed(seed, key)
    assert new_seed(again, key) not in (again,)
