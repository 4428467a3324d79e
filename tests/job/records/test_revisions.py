"""Output roots of every revision: still read, and finished only by a version that renders the same pixels (P2, P3).

`tests/support/data/roots` holds one finished root of each revision, as the last version of that revision wrote it, from
one config and one manifest with the fake engine. A change that raises `REVISION` adds the next one, and so does a new
schema of the tables: `revision-2` has tables of hv_batch/dataset/1, `dataset-2` those of hv_batch/dataset/2
(`tests/support/make_fixture_root.py`). `report-1` has events of a driver, a report, and posters outside the identity.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.dataset.seal import read_table, seal_shard, table_columns
from hv_batch.job.documents.reading import read
from hv_batch.job.documents.report import DigestDocument, PartDocument, ReportDocument
from hv_batch.job.event_log.reader import read_events
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.verify import verify
from hv_batch.job.records.choices import read_choices
from hv_batch.job.records.latents import get_latents, get_steps, sample_identity
from hv_batch.job.records.run_document import (
    DATASET_SCHEMA,
    DATASET_SCHEMA_1,
    RunState,
    dataset_schema,
    fingerprint,
    inspect_run,
    open_run,
    read_run,
)
from hv_batch.job.records.run_identity import LAST_VERSIONS, REVISION
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.store import Store
from hv_batch.media.probe import decode_media
from hv_batch.protocol import UserError
from tests.support import make_unfinished_root as unfinished
from tests.support.cli_calls import hv_batch
from tests.support.rendered_roots import FINGERPRINT
from tests.support.repository import ROOT

ROOTS = ROOT / "tests" / "support" / "data" / "roots"
OLDER = list(LAST_VERSIONS)


SCHEMAS = {"revision-2": DATASET_SCHEMA_1, "dataset-2": DATASET_SCHEMA}  # of the tables, by root


@pytest.fixture(params=[*OLDER, REVISION])
def revision(request):
    return request.param


@pytest.fixture
def root(revision, tmp_path) -> Path:
    """A copy of the finished root of a revision."""
    return shutil.copytree(ROOTS / f"revision-{revision}", tmp_path / "root")


def current_document(root: Path) -> dict:
    """What this version would write into the run.json of `root`."""
    run = read_run(Store(str(root)))
    return {**run, "identity": {**run["identity"], "revision": REVISION}}


def test_a_finished_root_of_every_revision_is_read(root):
    """P2: status and verify find every sample, and decode every file."""
    store = Store(str(root))
    status = read_status(store)
    assert (status.committed, status.pending, status.finished) == (3, 0, True)
    found = verify(store, decode_media, decodes=None)
    assert (found.decoded, found.findings) == (3, [])


def test_a_finished_root_of_every_revision_is_finished(root):
    """P2: the same command finds nothing to render, because the change cannot touch the samples."""
    assert inspect_run(Store(str(root)), current_document(root)) is RunState.FINISHED


def test_revisions_have_equal_frames_where_only_the_encoders_changed():
    """P3: revision 2 changed the bytes of images; the frames of the fake engine stay equal."""
    result = compare(Store(str(ROOTS / "revision-1")), Store(str(ROOTS / "revision-2")))
    assert result.other_frames == []
    assert result.other_bytes == ["s01"]
    assert result.identity == ["revision: (absent) -> 2"]


@pytest.mark.parametrize("revision", OLDER)
def test_an_unfinished_root_of_an_older_revision_is_refused_in_one_sentence(root, revision):
    """P3: a run never continues with other pixels; the sentence names the last version that finishes it."""
    (root / layout.SUCCESS).unlink()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        open_run(Store(str(root)), current_document(root))
    text = str(caught.value)
    assert f"hv_batch {LAST_VERSIONS[revision]}, the last version that can" in text
    assert str(root) in text
    assert re.findall(r"\.(?:\s|$)", text) == ["."], "one sentence"
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_another_config_is_still_another_config(root):
    """P2: the revision does not hide that a finished root belongs to another run."""
    document = current_document(root)
    document["identity"]["seed"] = 5
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        inspect_run(Store(str(root)), document)


def test_a_root_of_a_newer_revision_is_refused(root):
    """P3: a version does not continue what it does not know."""
    (root / layout.SUCCESS).unlink()
    run = json.loads((root / layout.RUN).read_text())
    run["identity"]["revision"] = REVISION + 1
    run["fingerprint"] = fingerprint(run["identity"])
    (root / layout.RUN).write_text(json.dumps(run))
    document = {**run, "identity": {**run["identity"], "revision": REVISION}}
    with pytest.raises(UserError, match=f"revision {REVISION + 1}, which this version of hv_batch does not know"):
        inspect_run(Store(str(root)), document)


@pytest.mark.parametrize("revision", OLDER)
def test_nothing_is_removed_from_a_root_that_this_version_cannot_render(root, revision):
    """P3: `verify --repair` refuses before it removes a faulty file of an older revision."""
    video = next((root / "data").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"hv_batch {LAST_VERSIONS[revision]}"):
        hv_batch("verify", str(root), "--repair")
    assert video.exists()


def test_every_older_revision_has_a_version_and_a_root():
    """P2: a change that raises the revision names the version before it, and keeps a root of each."""
    assert list(range(1, REVISION)) == OLDER
    assert __version__ not in LAST_VERSIONS.values()
    assert sorted(path.name for path in ROOTS.iterdir()) == [
        "dataset-2",
        "report-1",
        *(f"revision-{each}" for each in [*OLDER, REVISION]),
        "unfinished-1",
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_root_keeps_the_schema_with_which_it_began(name, tmp_path):
    """P2, P3: this version seals a shard of either schema again as it was, and finds nothing wrong in it."""
    store = Store(str(shutil.copytree(ROOTS / name, tmp_path / "root")))
    run = read_run(store)
    assert dataset_schema(run) == SCHEMAS[name]
    before = read_table(store, 0)
    assert before.schema.metadata[b"hv_batch.schema"].decode() == SCHEMAS[name]
    store.delete(layout.metadata_key(0))
    assert open_run(store, {**current_document(tmp_path / "root"), "dataset": DATASET_SCHEMA}) is RunState.FINISHED
    seal_shard(store, 0, ["s00", "s01"], identity=run["identity"], schema=dataset_schema(read_run(store)))
    assert read_table(store, 0).equals(before, check_metadata=True)
    assert verify(store, decode_media, decodes=None).findings == []


def test_a_table_of_version_2_adds_columns_and_changes_nothing_else():
    """P3: the media are those of version 1, byte for byte."""
    old, new = (Store(str(ROOTS / name)) for name in SCHEMAS)
    assert compare(old, new).is_equal
    tables = [read_table(store, 0) for store in (old, new)]
    assert tables[1].column_names == ["file_name", *table_columns(DATASET_SCHEMA)]
    assert tables[1].select(tables[0].column_names).equals(tables[0])
    assert read_status(new).finished


def test_a_root_with_the_first_block_cache_is_read_but_not_continued(tmp_path):
    """P2: a threshold as `step_cache` is in the run.json of version 0.2.0. Status, verify and export
    do not interpret it; `resume` names that version and the new form.
    """
    root = shutil.copytree(ROOTS / "dataset-2", tmp_path / "root")
    run = json.loads((root / layout.RUN).read_text())
    before, engine = run["fingerprint"], "hv_batch.engine.hunyuan:HunyuanVideo"
    run["config"]["model"] = {"engine": engine, "options": {"model_base": "toy", "step_cache": 0.1}}
    run["identity"] |= {"engine": engine, "model": {"step_cache": 0.1}}
    run["fingerprint"] = fingerprint(run["identity"])
    (root / layout.RUN).write_text(json.dumps(run))
    for record in (root / layout.COMMITS).rglob("*.json"):
        record.write_text(record.read_text().replace(before, run["fingerprint"]))
    for derived in (layout.SUCCESS, layout.SUMMARY, layout.metadata_key(0), layout.metadata_key(1), "README.md"):
        (root / derived).unlink()
    store = Store(str(root))
    assert read_status(store).committed == 3
    assert verify(store, decode_media, decodes=None).decoded == 3
    for command in (["status", root], ["export", root, "--as-manifest", tmp_path / "rows.jsonl"]):
        assert hv_batch(*command)[0] == 0
    with pytest.raises(UserError, match=r"hv_batch 0\.2\.0.*step_cache: \{kind: schedule, computed: 16\}"):
        hv_batch("resume", str(root))


def test_events_and_report_of_an_earlier_version_are_read(tmp_path):
    """P2: the events and the documents of the report are valid, and the next report replaces them."""
    store = Store(str(shutil.copytree(ROOTS / "report-1", tmp_path / "root")))
    kinds = [event["kind"] for driver in read_events(store) for event in driver.events]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")
    for shard in range(2):
        assert read(store, layout.report_part_key(shard), PartDocument)["shard"] == shard
        assert read(store, layout.report_digest_key(shard), DigestDocument)["shard"] == shard
    assert read(store, layout.REPORT_DATA, ReportDocument)["totals"]["committed"] == 3
    update = update_report(store)
    assert (update.document["totals"]["committed"], len(update.document["timeline"]["rows"])) == (3, 3)
    found = verify(store, decode_media, decodes=None)
    assert (found.decoded, found.findings) == (3, [])
    assert "poster" not in read_run(store)["identity"]["media"]


def test_an_unfinished_run_of_an_earlier_version_continues_with_its_intermediate_results():
    """P4: the choices of the engine, both schemas of step checkpoints, and final latents are read with equal values."""
    store = Store(str(ROOTS / "unfinished-1"))
    assert read_choices(store) == unfinished.CHOICES
    for sample, expected in unfinished.states().values():
        found = get_steps(store, sample, sample_identity(sample, FINGERPRINT))
        assert found.step == expected.step
        assert np.array_equal(found.latents, expected.latents)
        assert found.history.keys() == expected.history.keys()
        assert all(np.array_equal(found.history[name], array) for name, array in expected.history.items())
    sample = unfinished.DENOISED
    stored = get_latents(store, sample, sample_identity(sample, FINGERPRINT))
    assert np.array_equal(stored.latents, unfinished.array(sample, 5))
    assert stored.stages == unfinished.STAGES
