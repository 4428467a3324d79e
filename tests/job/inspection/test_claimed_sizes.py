"""What a root claims of itself costs a reader nothing: its work follows from the objects that exist (P7)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.documents.fields import MAX_SAMPLES, MAX_SHARD_SAMPLES
from hv_batch.job.inspection.findings import Fault
from hv_batch.job.inspection.status import MAX_SHARDS, read_status
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.inspection.verify import verify
from hv_batch.job.manifest import samples
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.run_document import fingerprint, read_run
from hv_batch.job.report import update
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.fuzz.watching import watched
from tests.support.cli_calls import run_main
from tests.support.plans import publish_plan
from tests.support.small_runs import run_small, some_samples

LIMIT_S = 20.0  # of CPU time: a loop over the claimed shards takes hours
LIMIT_BYTES = 300 << 20
CLAIMED = MAX_SAMPLES  # samples, one in a shard


def claim(root: Path, samples: int, shard_size: int) -> None:
    """Let the run.json of a root claim another number and size of shards, without a contradiction in itself."""
    path = root / layout.RUN
    run = json.loads(path.read_text())
    run["manifest"] |= {"rows": samples, "samples": samples}
    run["config"]["output"]["shard_size"] = shard_size
    if "shard_size" in run["identity"]:
        run["identity"]["shard_size"] = shard_size
    run["fingerprint"] = fingerprint(run["identity"])
    path.write_text(json.dumps(run))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A finished root of two shards, of four samples and of two."""
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), some_samples(6), poison={"s005"}, adorned=True)
    publish_plan(Store(str(root)), some_samples(6))
    return root


@pytest.fixture
def root(rendered, tmp_path) -> Path:
    """A copy of it that claims a hundred million shards of one sample each."""
    root = Path(shutil.copytree(rendered, tmp_path / "root"))
    claim(root, CLAIMED, 1)
    return root


def commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """Every command that reads a root, by the text that it must print."""
    return {
        f"{CLAIMED:,} samples": ["status", root],
        "0 committed samples match": ["status", root, "--where", "seed<0"],
        '"untouched_shards": 99999998': ["status", root, "--json"],
        "problems found": ["verify", root, "--sample-decode", "0"],
        "a report has at most": ["report", root],
        "nothing to remove": ["gc", root],
        "equal": ["diff", root, root],
        "would be released": ["retry", root],
        "Not sealed yet": ["export", root, "--hub", folder / "hub"],
        "Not sealed yet: 99,999,998": ["export", root, "--vbench", folder / "vbench"],
        "rows written": ["export", root, "--as-manifest", folder / "m.jsonl"],
        "allowed: at most 1,000,000": ["status", root, "--shards", "0-99999999"],
        "no checked manifest": ["withdraw", root, "s001", "--reason", "x"],
    }


@pytest.mark.parametrize("number", range(13))
def test_a_command_does_not_loop_over_the_shards_that_a_root_claims(root, tmp_path, number):
    """P7: every command ends at once, with little memory."""
    expected, arguments = list(commands(root, tmp_path).items())[number]
    with watched(tmp_path, LIMIT_S) as watch:
        _, stdout, stderr = run_main(*arguments)
    assert expected in stdout + stderr
    assert "Traceback" not in stderr
    assert watch.peak_bytes < LIMIT_BYTES


def test_the_counts_of_a_root_with_many_untouched_shards_are_exact(root):
    """P1: shards without any object are counted, although they are not listed."""
    store = Store(str(root))
    status = read_status(store)
    assert [shard.shard for shard in status.shards] == [0, 1]
    assert (status.samples, status.shard_count) == (CLAIMED, CLAIMED)
    assert status.committed + status.quarantined + status.pending >= CLAIMED
    summary = aggregate(store)
    assert (summary["samples"], summary["shards"], summary["shards_sealed"]) == (CLAIMED, CLAIMED, 2)
    result = verify(store, lambda *_: None, decodes=0)
    assert result.open_shards == CLAIMED - 2
    assert result.pending == CLAIMED - 2


def test_untouched_shards_are_listed_unless_there_are_many(root):
    """The JSON of `status` keeps a line for each shard of a usual run."""
    claim(root, 4 * 50, 4)
    status = read_status(Store(str(root)))
    assert (len(status.shards), status.untouched_shards) == (50, 0)
    assert {shard.state for shard in status.shards[2:]} == {"untouched"}
    assert status.pending == 4 * 48 + 2
    claim(root, 4 * (MAX_SHARDS + 1), 4)
    status = read_status(Store(str(root)))
    assert (len(status.shards), status.untouched_shards) == (2, MAX_SHARDS - 1)
    assert status.pending == 4 * (MAX_SHARDS - 1) + 2


def test_a_report_lists_only_the_shards_that_exist(root, monkeypatch):
    """P7: shards without any object take no request."""
    claim(root, 4 * 500, 4)
    listed = []
    real = update.list_shard
    monkeypatch.setattr(
        update, "list_shard", lambda store, shard, *rest: listed.append(shard) or real(store, shard, *rest)
    )
    totals = update_report(Store(str(root))).document["totals"]
    assert sorted(listed) == [0, 1]
    assert (totals["samples"], totals["pending"]) == (2000, 4 * 498 + 2)


@pytest.mark.parametrize(
    ("samples", "shard_size", "problem"),
    [
        (MAX_SAMPLES + 1, 256, "manifest.samples"),
        (MAX_SHARD_SAMPLES + 1, MAX_SAMPLES, "its shards have 1,000,001 samples"),
    ],
)
def test_a_run_that_no_machine_could_hold_is_refused(root, samples, shard_size, problem):
    """P7: a reader holds the keys of one shard."""
    claim(root, samples, shard_size)
    with pytest.raises(UserError, match=problem):
        read_run(Store(str(root)))


SPARSE = (
    *("data/*/s001-*.mp4", "posters/*/s001-*", "webdataset/*0.tar", "data/*0/metadata.parquet", "lineage/*0.parquet"),
    *(layout.RUN, layout.INDEX, "plan/part-00000-*", "commits/*/s001.json", "report/digests/*0.json"),
)
READERS = (["status"], ["verify", "--sample-decode", "0"], ["report"], ["gc"], ["retry"])


@pytest.mark.parametrize("pattern", [*SPARSE[:3], *(pytest.param(each, marks=pytest.mark.slow) for each in SPARSE[3:])])
def test_a_sparse_file_in_a_root_is_not_read(rendered, tmp_path, pattern):
    """P5, P7: a file of a terabyte that takes no space is a problem of this file, and fills neither memory nor disk."""
    root = Path(shutil.copytree(rendered, tmp_path / "root"))
    (path,) = root.glob(pattern)
    os.truncate(path, 1 << 40)
    folder = tmp_path / "exported"
    commands = [[name, str(root), *rest] for name, *rest in READERS]
    for arguments in (*commands, ["export", str(root), "--hub", str(folder), "--copy"]):
        with watched(tmp_path, LIMIT_S) as watch:
            _, _, stderr = run_main(*arguments)
        assert "Traceback" not in stderr
        assert watch.peak_bytes < LIMIT_BYTES
    assert sum(file.stat().st_blocks for file in folder.rglob("*") if file.is_file()) < 10_000


def test_media_that_are_larger_than_recorded_are_found_without_a_read(rendered, tmp_path):
    """P1: the finding is the same as for a smaller file."""
    root = Path(shutil.copytree(rendered, tmp_path / "root"))
    (media,), (tar,) = root.glob("data/*/s001-*.mp4"), root.glob("webdataset/*0.tar")
    os.truncate(media, 1 << 40)
    result = verify(Store(str(root)), lambda *_: None, decodes=0)
    assert [finding.fault for finding in result.findings] == [Fault.SIZE]
    shutil.copyfile(*rendered.glob("data/*/s001-*.mp4"), media)
    os.truncate(tar, 1 << 40)
    (finding,) = verify(Store(str(root)), lambda *_: None, decodes=0).findings
    assert finding.fault is Fault.TAR
    assert "1,099,511,627,776 bytes; its members need at most" in finding.details


def test_thousands_of_former_identities_do_not_multiply_the_samples(rendered, tmp_path):
    """P7: a sample is compared with the identity that its record names, and with no other."""
    root = Path(shutil.copytree(rendered, tmp_path / "root"))
    path = root / layout.RUN
    run = json.loads(path.read_text())
    steps = [run["identity"] | {"defaults": {"flow_shift": 1.0 + number / 1000}} for number in range(3000)]
    run["earlier"] = [
        {
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "manifest": run["manifest"],
            "replaced_at": "2026-11-29T00:00:00+00:00",
            "changed": ["defaults.flow_shift"],
        }
        for identity in steps
    ]
    path.write_text(json.dumps(run))
    made = []
    with pytest.MonkeyPatch.context() as patch, watched(tmp_path, LIMIT_S) as watch:
        patch.setattr(samples, "Sample", lambda **fields: made.append(1) or Sample(**fields))
        verify(Store(str(root)), lambda *_: None, decodes=0)
    assert len(made) < 50
    assert watch.peak_bytes < LIMIT_BYTES
