"""`hv-batch withdraw`: a sample leaves the dataset for good, whatever its state is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.dataset.seal import read_rows
from hv_batch.job.export.sealed_shards import media_rows
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.findings import Fault
from hv_batch.job.inspection.garbage import find_garbage
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.verify import MediaShape, Verification, remove_faults, verify
from hv_batch.job.inspection.withdraw import find_samples, withdraw
from hv_batch.job.records import commits
from hv_batch.job.records.latents import FinalLatents, put_latents
from hv_batch.job.records.quarantine import failed_keys, read_quarantined, release
from hv_batch.job.records.run_document import read_run, read_summary
from hv_batch.job.records.spool import Spool
from hv_batch.job.records.withdrawn import read_tombstone
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch, json_of
from tests.support.continued_runs import Command, rows_of, verified
from tests.support.doubles import Crash, CrashingStore
from tests.support.plans import publish_plan
from tests.support.rendered_roots import RenderedMedia, make_commit, make_quarantine
from tests.support.small_runs import run_small, some_samples

SAMPLES = some_samples(6, extra={"topic": "birds"})
POISON = frozenset({"s005"})
COMMITTED, QUARANTINED, PENDING = "s002", "s005", "s003"


class StopsAt(CrashingStore):
    """Stops the run before it commits the sample PENDING: one sample of the first shard is pending, with latents."""

    def put_new_all(self, objects):
        if layout.commit_key(0, PENDING) in objects:
            raise Crash
        return super().put_new_all(objects)


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """A finished root with posters and tars, and one whose run was killed. s005 is quarantined in the first."""
    folder = tmp_path_factory.mktemp("roots")
    for name in ("finished", "killed"):
        store = (Store if name == "finished" else StopsAt)(str(folder / name))
        with suppress(Crash):
            run_small(store, SAMPLES, poison=POISON, adorned=True)
        publish_plan(store, SAMPLES)
    return {name: folder / name for name in ("finished", "killed")}


@pytest.fixture
def root(roots, tmp_path) -> Store:
    return Store(str(shutil.copytree(roots["finished"], tmp_path / "root")))


def take(store: Store, name: str, reason: str = "a face", at: Store | None = None):
    run = read_run(store)
    return withdraw(at or store, run, find_samples(store, run, name), reason, lambda: None)


def examine(store: Store) -> Verification:
    return verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=None)


def everything(store: Store) -> dict[str, bytes]:
    return {path.removeprefix(f"{store.url}/"): data for path, data in files(store.url).items()}


def objects_of(store: Store, key: str) -> list[str]:
    return [path for path in everything(store) if f"/{key}" in path and not path.startswith(layout.WITHDRAWN)]


@pytest.mark.parametrize(
    ("which", "key"),
    [
        ("finished", COMMITTED),
        ("finished", QUARANTINED),
        ("killed", COMMITTED),
        ("killed", PENDING),
    ],
)
def test_a_sample_of_any_state_is_gone_for_good(roots, tmp_path, which, key):
    """P1: no object and no row of it is left; the run command finishes the root and never renders it again."""
    store = Store(str(shutil.copytree(roots[which], tmp_path / "root")))
    shard = SAMPLES[int(key[1:]) - 1].shard
    before = store.get(layout.commit_key(shard, key)) if key == COMMITTED else None
    assert objects_of(store, key)
    found = take(store, key)
    assert objects_of(store, key) == []
    prompt = SAMPLES[int(key[1:]) - 1].params.prompt.encode()
    assert not [name for name in store.list("report") if prompt in store.get(name)]
    assert found.finished == store.exists(layout.SUCCESS) == (which == "finished")
    denoised: Counter = Counter()
    run_small(store, SAMPLES, poison=POISON, denoised=denoised, adorned=True)
    assert key not in denoised
    result = examine(store)
    assert (result.findings, result.withdrawn, result.pending) == ([], 1, 0)
    assert key not in {row["key"] for at in range(2) for row in read_rows(store, at)}
    assert read_summary(store)["withdrawn"] == 1
    tombstone = read_tombstone(store, shard, key)
    assert tombstone["sha256"] == (json.loads(before)["sha256"] if before else None)
    assert (tombstone["reason"], tombstone["row"]) == ("a face", int(key[1:]))


def test_repeated_it_changes_nothing_and_keeps_the_first_reason(root):
    take(root, COMMITTED)
    before = everything(root)
    again = take(root, COMMITTED, "another")
    assert (again.removed, again.sealed, again.finished) == ([], [], True)
    assert everything(root) == before


def test_retry_and_failed_only_leave_it_out(root):
    """P5: also if it was released for a retry before."""
    release(root, read_quarantined(root, range(2)))
    take(root, QUARANTINED)
    assert failed_keys(root, range(2)) == {}
    assert list(read_quarantined(root, range(2))) == []
    assert not root.exists(layout.retried_key(1, QUARANTINED))


def test_a_worker_that_commits_late_drops_its_result(root):
    """P1: the tombstone takes precedence over a commit record and a quarantine record."""
    sample = SAMPLES[1]
    take(root, COMMITTED)
    record = make_commit(sample)
    root.put(record["file"], b"late")
    assert commits.commit(root, record) is False
    assert commits.quarantine(root, make_quarantine(sample)) is False
    assert objects_of(root, COMMITTED) == []


def test_verify_finds_what_a_late_worker_has_left_and_removes_it(root):
    """A worker that died between its commit record and its look for a tombstone."""
    take(root, COMMITTED)
    record = make_commit(SAMPLES[1])
    root.put(record["file"], b"late")
    root.put(layout.commit_key(0, COMMITTED), b"{}")
    put_latents(root, [FinalLatents(SAMPLES[1], np.zeros(SAMPLES[1].params.latent_shape, np.float32), "x", {})])
    result = examine(root)
    assert [(finding.key, finding.fault) for finding in result.findings] == [(COMMITTED, Fault.WITHDRAWN)]
    assert len(result.findings[0].removes) == 3
    assert {garbage.name for garbage in find_garbage(root, older_than=1e12)} == {
        record["file"],
        layout.latent_key(0, COMMITTED),
    }
    remove_faults(root, result.findings)
    assert examine(root).findings == []
    assert root.exists(layout.SUCCESS)


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"schema": "hv_batch/withdrawn/1"}'])
def test_a_damaged_tombstone_still_counts_and_is_written_again(root, data):
    """A sample whose tombstone is damaged must not be rendered again."""
    take(root, COMMITTED)
    root.put(layout.withdrawn_key(0, COMMITTED), data)
    (finding,) = examine(root).findings
    assert (finding.fault, finding.is_repairable) == (Fault.TOMBSTONE, False)
    assert read_status(root).withdrawn == 1
    take(root, COMMITTED)
    assert examine(root).findings == []


def test_a_tombstone_of_no_sample_is_foreign(root):
    root.put(layout.withdrawn_key(0, "nobody"), b"{}")
    assert [finding.fault for finding in examine(root).findings] == [Fault.FOREIGN]
    assert read_status(root).withdrawn == 0


def test_export_and_diff_know_withdrawn_samples(root, roots):
    before = Store(str(roots["finished"]))
    with suppress(Crash):  # after the tombstone
        take(root, COMMITTED, at=CrashingStore(root.url, 1, "before"))
    with pytest.raises(UserError, match="interrupted"):
        list(media_rows(root, range(2)))
    take(root, COMMITTED)
    assert COMMITTED not in {row["key"] for _, row in media_rows(root, range(2))}
    found = compare(before, root)
    assert (found.withdrawn_in_b, found.only_in_a, found.is_equal) == ([COMMITTED], [], False)
    assert compare(root, root).withdrawn_in_both == 1
    assert compare(root, root).is_equal


def test_the_spooled_copy_on_this_machine_is_removed_and_a_later_one_is_dropped(root, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool(OutputConfig(), root, read_run(root)["fingerprint"])
    media = tmp_path / "media.mp4"
    media.write_bytes(b"a video")
    record = make_commit(SAMPLES[1], fingerprint=read_run(root)["fingerprint"], media=_media_of(media))
    record["file"] = layout.media_key(0, COMMITTED, record["sha256"], ".mp4")
    assert spool.add(record, {record["file"]: media})
    assert take(root, COMMITTED).spooled == 2
    assert spool.drain().committed == ()
    assert spool.add(record, {record["file"]: media})
    assert spool.drain().committed == (COMMITTED,)
    assert objects_of(root, COMMITTED) == []


def _media_of(path: Path) -> RenderedMedia:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return RenderedMedia(path.stat().st_size, digest, digest[::-1], 17, 128, 96)


def test_paths_come_from_shard_and_key_alone(root):
    """A record that names a file of another sample removes nothing of that sample."""
    path = layout.commit_key(0, COMMITTED)
    other = layout.commit_key(0, "s001")
    root.put(path, root.get(other))
    before = objects_of(root, "s001")
    take(root, COMMITTED)
    assert objects_of(root, "s001") == before
    assert objects_of(root, COMMITTED) == []


@pytest.mark.parametrize(("name", "keys"), [("s002", ["s002-v0", "s002-v1", "s002-v2"]), ("s002-v1", ["s002-v1"])])
def test_all_videos_of_a_row_or_one_and_a_grown_manifest_keeps_them_withdrawn(tmp_path, name, keys):
    """The row lies in two shards. P1: rows that are appended later do not bring a withdrawn sample back."""
    store = Store(str(tmp_path / "root"))
    first = Command(tmp_path / "m.jsonl", rows_of(3, num_videos=3))
    first.run(store)
    found = take(store, name)
    assert (found.samples, found.finished) == (keys, True)
    media = {key for path in everything(store) if path.startswith("data/") and (key := layout.media_owner(path))}
    assert media == {f"s{row:03d}-v{video}" for row in range(1, 4) for video in range(3)} - set(keys)
    denoised: Counter = Counter()
    replace(first, rows=rows_of(4, num_videos=3)).run(store, denoised)
    assert set(denoised) == {"s004-v0", "s004-v1", "s004-v2"}
    result = verified(store)
    assert (result.findings, result.withdrawn, result.pending) == ([], len(keys), 0)


def test_the_command(root):
    code, found = json_of("withdraw", root.url, COMMITTED, "--reason", "a \x1b[31mface")
    assert (code, found["schema"], found["samples"]) == (0, "hv_batch/withdrawal/1", [COMMITTED])
    assert (found["sealed"], found["finished"]) == ([0], True)
    code, output = hv_batch("status", root.url)
    assert (code, "1 withdrawn" in output, "\x1b" in output, "face" in output) == (0, True, False, True)
    code, found = json_of("status", root.url)
    assert (found["withdrawn"], found["pending"]) == (1, 0)
    assert "Withdrawn: 1 sample" in root.get(layout.CARD).decode()
    assert hv_batch("gc", root.url, "--yes", "--min-age-hours", "0")[0] == 0
    assert root.exists(layout.withdrawn_key(0, COMMITTED))


@pytest.mark.parametrize(("name", "reason", "said"), [("nobody", "x", "id or key"), (COMMITTED, " ", "--reason")])
def test_a_wrong_call_changes_nothing(root, name, reason, said):
    before = everything(root)
    code, found = json_of("withdraw", root.url, name, "--reason", reason)
    assert code == 1
    assert said in found["error"]
    assert everything(root) == before
