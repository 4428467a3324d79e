"""The mapping of a manifest's columns belongs to the run: run.json records it, and a resume needs no flags."""

import logging

import pytest

from hv_batch.cli.run_flags import with_manifest_flags
from hv_batch.job.config.run_config import load_config
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.records.run_document import open_run, read_run, read_run_config
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.preflight import prepare_run
from hv_batch.runtime.render import check_resume
from tests.support.manifests import write_rows
from tests.support.runs import write_config

FLAGS = ["num_inference_steps=steps", "prompt=caption"]


@pytest.fixture
def begin(tmp_path):
    """Prepares the run of a manifest with foreign names in the root `out`, with the given flags."""
    config = load_config(str(write_config(tmp_path, tmp_path / "marks")))
    rows = [{"caption": "a", "steps": 2, "size": "s"}, {"caption": "a", "steps": 2, "size": "s"}]
    manifest = write_rows(tmp_path / "m.jsonl", *rows)

    def prepare(column=FLAGS, carry=("size",), duplicates=None):
        settings = with_manifest_flags(config, column, carry, duplicates)
        store, spool = Store(str(tmp_path / "out")), Store(str(tmp_path / "spool"))
        return prepare_run(settings, Manifest(manifest), store, spool, None), store

    return prepare


@pytest.mark.parametrize("loses_plan", [False, True])
def test_a_resume_reads_the_mapping_from_run_json(begin, tmp_path, loses_plan):
    """P2: the root says how its manifest is read, also if its copy of the manifest is lost."""
    job, store = begin()
    open_run(store, job.document)
    if not loses_plan:
        job.index.publish(store)
    config, url = read_run_config(str(tmp_path / "out"))
    assert config.manifest.columns == {"num_inference_steps": "steps", "prompt": "caption"}
    resumed = prepare_run(config, Manifest(url), store, Store(str(tmp_path / "again")), None, resumed=True)
    assert list(resumed.index) == list(job.index)
    assert [sample.params.num_inference_steps for sample in resumed.index] == [2, 2]
    check_resume(str(tmp_path / "out"))


def test_another_mapping_is_another_run(begin):
    """P2: a root is not continued with other flags; the differences are named. Old roots have no such key."""
    job, store = begin()
    open_run(store, job.document)
    job.index.publish(store)
    for options, difference in (
        ({"column": [*FLAGS, "fps="]}, "manifest_options.columns.fps"),
        ({"carry": ["size", "x"]}, "manifest_options.carry"),
        ({"duplicates": "drop"}, "manifest_options.duplicates"),
    ):
        with pytest.raises(UserError, match=difference):
            begin(**options)
    assert read_run(store)["identity"]["manifest_options"]["carry"] == ["size"]


def test_each_start_of_a_run_lists_the_columns_that_are_only_carried(begin, caplog):
    """One line, also if the manifest was checked before."""
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            job, store = begin()
        lines = [line for line in caplog.messages if line.startswith("columns carried as metadata")]
        assert lines == ["columns carried as metadata: size"]
        assert any("1 row without id numbered" in line for line in caplog.messages)
        job.index.publish(store)
