"""`hv-batch export`: real records in, files for another use out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.records import commits
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch
from tests.support.rendered_roots import BLACK, SCORES, make_commit, make_sample, open_root


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Six committed samples, of which three look black; the first shard is sealed."""
    store = Store(str(tmp_path / "root"))
    open_root(store, 6)
    for number in range(1, 7):
        commits.commit(store, make_commit(make_sample(number), scores=BLACK if number % 2 else SCORES))
    seal_shard(store, 0, [f"s{number:03d}" for number in range(1, 5)])
    return store.url


def test_what_looks_wrong_becomes_a_manifest_with_new_seeds(root, tmp_path):
    """The root itself stays as it is: score only, remove nothing."""
    before = files(root)
    target = tmp_path / "again" / "prompts.jsonl"
    code, text = hv_batch("export", root, "--where", "look=black", "--as-manifest", target, "--new-seeds")
    assert (code, text) == (0, f"3 rows written to {target}\n")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["s001", "s003", "s005"]
    assert not {row["seed"] for row in rows} & {1001, 1003, 1005}
    assert files(root) == before


def test_an_existing_file_is_not_overwritten(root, tmp_path):
    target = tmp_path / "prompts.jsonl"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        hv_batch("export", root, "--as-manifest", target)
    assert target.read_text() == "mine"


def test_without_a_match_no_file_is_written(root, tmp_path):
    target = tmp_path / "prompts.jsonl"
    with pytest.raises(UserError, match="No committed sample matches"):
        hv_batch("export", root, "--as-manifest", target, "--where", "look=white")
    assert not target.exists()


def test_flags_of_another_mode_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="--where and --new-seeds belong to --as-manifest"):
        hv_batch("export", root, "--hub", tmp_path / "hub", "--where", "look=black")
    with pytest.raises(UserError, match="--as-manifest writes one file"):
        hv_batch("export", root, "--hub", tmp_path / "hub", "--as-manifest", tmp_path / "again.jsonl")
    assert not (tmp_path / "hub").exists()


def test_the_report_for_machines(root, tmp_path):
    text = hv_batch("export", root, "--as-manifest", tmp_path / "all.jsonl", "--json")[1]
    assert json.loads(text)["schema"] == "hv_batch/export/1"
    assert json.loads(text)["rows"] == 6
