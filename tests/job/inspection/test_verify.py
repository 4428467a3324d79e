"""`verify` finds what is damaged in a root, and nothing else; with `--remove`, the run command repairs it (P1, P2)."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.findings import Fault
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.inspection.verify import remove_faults, verify
from hv_batch.job.report.update import update_report
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from hv_batch.media.probe import decode_media
from tests.support.plans import publish_plan
from tests.support.rendered_roots import make_quarantine, make_sample
from tests.support.small_runs import everything, real_media, run_small, some_samples

SAMPLES = [*some_samples(5), *some_samples(6, num_frames=1)[5:]]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A finished root with five real videos, their posters and an image, in two shards with a tar each."""
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), SAMPLES, media=real_media, adorned=True)
    return root


@pytest.fixture
def root(rendered, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(rendered, tmp_path / "root"))


def media_of(root: Path, key: str) -> Path:
    (path,) = root.glob(f"data/*/{key}-*")
    return path


def poster_of(root: Path, key: str) -> Path:
    (path,) = root.glob(f"posters/*/{key}-*")
    return path


def record_of(root: Path, key: str) -> Path:
    (path,) = root.glob(f"commits/*/{key}.json")
    return path


def change_record(root: Path, sample: str, values: dict) -> None:
    path = record_of(root, sample)
    path.write_bytes(canonical_json.encode(canonical_json.decode(path.read_bytes()) | values))


def rewrite_media(root: Path, key: str, data: bytes) -> None:
    """Changes the bytes of a video and its record consistently, so that only decoding finds the damage."""
    path, digest = media_of(root, key), hashlib.sha256(data).hexdigest()
    path.unlink()
    path = path.with_name(f"{key}-{digest[:8]}{path.suffix}")
    path.write_bytes(data)
    change_record(root, key, {"bytes": len(data), "sha256": digest, "file": str(path.relative_to(root))})


def change_table(root: Path, change) -> None:
    path = root / layout.metadata_key(0)
    pq.write_table(change(pq.read_table(path)), path)


def test_a_valid_root(rendered):
    """P1: everything is read, everything decodes, no problem is found; a subset of decodes is spread over the run."""
    found = verify(Store(str(rendered)), decode_media, decodes=None)
    assert found.findings == []
    assert (found.checked, found.decoded, found.tables, found.pending, found.quarantined) == (6, 6, 2, 0, 0)
    assert found.bytes == sum(path.stat().st_size for path in rendered.glob("data/*/s*"))
    assert verify(Store(str(rendered)), decode_media, decodes=2).decoded == 2
    assert verify(Store(str(rendered)), decode_media, decodes=0).decoded == 0
    assert verify(Store(str(rendered)), decode_media, decodes=None, shards=[1]).checked == 2


def cut(root):
    path = media_of(root, "s002")
    path.write_bytes(path.read_bytes()[:-7])


def flip(root):
    path = media_of(root, "s002")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def shorter_video(folder: Path) -> bytes:
    """A video of 5 frames; the samples have 17."""
    sample = make_sample(2, num_frames=5)
    return real_media(sample, np.zeros(sample.params.latent_shape), folder)[0].read_bytes()


FAULTS = {
    Fault.MISSING: lambda root: media_of(root, "s002").unlink(),
    Fault.SIZE: cut,
    Fault.HASH: flip,
    Fault.UNDECODABLE: lambda root: rewrite_media(root, "s002", half(media_of(root, "s002").read_bytes())),
    Fault.GEOMETRY: lambda root: rewrite_media(root, "s002", shorter_video(root.parent)),
    Fault.RECORD: lambda root: record_of(root, "s002").write_bytes(b'{"schema": "hv_batch/commit/1"'),
    Fault.TWO_RECORDS: lambda root: Store(str(root)).put(
        layout.quarantine_key(0, "s002"), canonical_json.encode(make_quarantine(SAMPLES[1]))
    ),
    Fault.TABLE: lambda root: change_table(root, lambda table: table.slice(1)),
    Fault.POSTER: lambda root: poster_of(root, "s002").unlink(),
    Fault.LINEAGE: lambda root: (root / layout.lineage_key(0)).unlink(),
    Fault.SUMS: lambda root: (root / layout.totals_key(0)).write_bytes((root / layout.totals_key(1)).read_bytes()),
    Fault.TAR: lambda root: (root / layout.tar_key(0)).unlink(),
}


ONLY_DECODING_TELLS = {Fault.UNDECODABLE, Fault.GEOMETRY}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_repaired(rendered, root, fault):
    """P1, P2: the finding names the sample, repair removes only that, and the same run restores the root."""
    FAULTS[fault](root)
    store = Store(str(root))
    found = verify(store, decode_media, decodes=None if fault in ONLY_DECODING_TELLS else 0)
    faults = {finding.fault for finding in found.findings}
    # A record with a changed hash differs from its table, and a removed record leaves its row in the table.
    assert fault in faults
    assert faults <= {fault, Fault.TABLE}
    assert all(finding.key in ("s002", None) for finding in found.findings)
    assert fault.value in found.render()
    remove_faults(store, found.findings)
    denoised = Counter()
    run_small(store, SAMPLES, media=real_media, denoised=denoised, adorned=True)
    assert set(denoised) <= {"s002"}
    assert verify(store, decode_media, decodes=0).findings == []
    assert everything(store) == everything(Store(str(rendered)))


@pytest.mark.parametrize(
    "values",
    [
        {"schema": "hv_batch/commit/0"},
        {"key": "s003"},
        {"shard": 1},
        {"fingerprint": "e" * 64},
        {"file": "data/shard-00000/../../../outside"},
        {"file": "data/shard-00001/s002-00000000.mp4"},
        {"file": 3},
        {"params": {}},
        {"bytes": "many"},
        {"stages": None},
        {"poster": "data/shard-00000/s002-00000000.jpg"},
    ],
)
def test_a_record_of_another_sample_or_run(root, values):
    """P1: a record of another sample or run, or with a path outside its shard, is reported; nothing else is touched."""
    change_record(root, "s002", values)
    found = verify(Store(str(root)), decode_media, decodes=0)
    (wrong,) = [finding for finding in found.findings if finding.fault is Fault.RECORD]
    assert (wrong.key, wrong.removes) == ("s002", ("commits/shard-00000/s002.json",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.set_column(table.column_names.index("seed"), "seed", pa.array([1, 2, 3, 4])), "seed = 1"),
        (lambda table: pa.concat_tables([table.slice(0, 3), table.slice(0, 1)]), "have no row, for example s004"),
        (lambda table: table.drop_columns(["sha256"]), "sha256"),
        (lambda table: table.slice(0, 0), "4 committed samples have no row"),
    ],
)
def test_a_table_that_differs_from_the_records(root, change, said):
    """P1: the dataset that users load must match the records."""
    change_table(root, change)
    (wrong,) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert wrong.fault is Fault.TABLE
    assert said in wrong.details


def test_a_table_of_another_format(root):
    """P1: the same for a file that is not a table."""
    (root / layout.metadata_key(0)).write_bytes(b"PAR1 no")
    (wrong,) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert wrong.fault is Fault.TABLE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: poster_of(root, "s002").write_bytes(b"another picture"),
        lambda root: change_record(root, "s002", {"poster": None}),
    ],
)
def test_a_poster_with_other_bytes(root, spoil):
    """P1: a poster has the bytes of the hash in its name, and every video of such a run has one."""
    spoil(root)
    (wrong,) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert (wrong.key, wrong.fault) == ("s002", Fault.POSTER)


def test_damaged_events(root):
    """P5: they are found and can be removed; no sample is rendered again for them."""
    store = Store(str(root))
    whole, damaged = (layout.event_part("20261129T014500Z-0a1b2c3d", number) for number in (0, 1))
    store.put(whole, b'{"at": 1.0, "kind": "run_started"}\n')
    store.put(damaged, b'{"at": 2.0, "kind": "run_en')
    found = verify(store, decode_media, decodes=0).findings
    assert [(finding.fault, finding.shard, finding.removes) for finding in found] == [(Fault.EVENTS, None, (damaged,))]
    remove_faults(store, found)
    assert store.exists(whole)
    assert verify(store, decode_media, decodes=0).findings == []
    assert store.exists(layout.SUCCESS)


def another_lineage(root: Path) -> None:
    path = root / layout.lineage_key(0)
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("attempts"), "attempts", pa.array([9, 1, 1, 1])), path)


@pytest.mark.parametrize("spoil", [another_lineage, lambda root: (root / layout.lineage_key(0)).write_bytes(b"PAR1")])
def test_a_lineage_that_differs_from_the_records(root, spoil):
    """Lineage: the table of attempts, times and places must match the records."""
    spoil(root)
    (wrong,) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert wrong.fault is Fault.LINEAGE


def rewrite_tar(root: Path, change) -> None:
    """Rewrites the tar with its members (name, bytes) changed by `change`."""
    path = root / layout.tar_key(0)
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda members: members[:-1], "it holds no further member in place of s004.json"),
        (lambda members: members[2:], "it holds s002.mp4 in place of s001.mp4"),
        (lambda members: [*members, ("s009.json", b"{}")], "s009.json belongs to no sample"),
        (lambda members: [(name, data + b"x") for name, data in members], "its member s001.mp4 differs"),
        (
            lambda members: [(name, data.replace(b"heron", b"goose")) for name, data in members],
            "its member s001.json differs",
        ),
    ],
)
def test_a_tar_that_differs_from_the_table(root, change, said):
    """P1: a tar holds the samples of the table, in its order and byte for byte."""
    rewrite_tar(root, change)
    (wrong,) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert wrong.fault is Fault.TAR
    assert said in wrong.details


@pytest.mark.parametrize("size", [0, 5, 700, 10_300])
def test_a_truncated_tar(root, size):
    """P1: a truncated tar is reported, wherever it was cut."""
    path = root / layout.tar_key(0)
    path.write_bytes(path.read_bytes()[:size])
    assert [finding.fault for finding in verify(Store(str(root)), decode_media, decodes=0).findings] == [Fault.TAR]


def write_index(root: Path, extra_kinds: dict[str, str]) -> Path:
    """Writes the index and returns its first part."""
    publish_plan(Store(str(root)), SAMPLES, extra_kinds=extra_kinds)
    return min(root.glob("plan/part-*"))


@pytest.mark.parametrize(
    "spoil",
    [Path.unlink, lambda part: part.write_bytes(b"other"), lambda part: (part.parent / "index.json").write_text("{}")],
)
def test_a_checked_manifest_that_is_damaged(root, spoil):
    """P2: damage that a resume could not use is reported while the manifest may still exist. If the index is removed,
    the next run checks the manifest again and the dataset stays the same.
    """
    store = Store(str(root))
    spoil(write_index(root, {}))
    found = verify(store, decode_media, decodes=0).findings
    assert [(finding.fault, finding.shard) for finding in found] == [(Fault.PLAN, None)]
    remove_faults(store, found)
    assert verify(store, decode_media, decodes=0).findings == []
    assert store.exists(layout.SUCCESS)


def test_the_users_columns_are_compared_with_the_records(root):
    """P1: a user's column that was changed or lost is reported if the index holds its type."""
    write_index(root, {"topic": "text"})
    (first, _) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert first.fault is Fault.TABLE
    assert "the columns ['topic']" in first.details
    change_table(root, lambda table: table.append_column("topic", pa.array(["geese"] * table.num_rows)))
    (first, _) = verify(Store(str(root)), decode_media, decodes=0).findings
    assert 'the row of s001 has topic = "geese", its record has null' in first.details


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b"\xff", b'{"class": "POISON"}'])
def test_a_quarantine_record_that_cannot_be_read(tmp_path, data):
    """P1, P5: its sample counts as quarantined everywhere, is reported, and is repaired by rendering it again."""
    store = Store(str(tmp_path / "root"))
    run_small(store, SAMPLES, poison={"s001"}, media=real_media)
    store.put(layout.quarantine_key(0, "s001"), data)
    assert "its quarantine record cannot be read" in read_status(store).render()
    assert aggregate(store)["failures"] == {"(unreadable)": 1}
    update_report(store)
    (wrong,) = verify(store, decode_media, decodes=0).findings
    assert (wrong.key, wrong.fault) == ("s001", Fault.RECORD)
    remove_faults(store, [wrong])
    run_small(store, SAMPLES, media=real_media)
    found = verify(store, decode_media, decodes=0)
    assert (found.findings, found.checked) == ([], 6)


def test_a_run_that_is_wrongly_marked_as_finished(root):
    """P2: a pending sample that no run command would render is reported, and repair removes `_SUCCESS`."""
    store = Store(str(root))
    for key in (layout.commit_key(1, "s005"), layout.metadata_key(1)):
        store.delete(key)
    (wrong,) = verify(store, decode_media, decodes=0).findings
    assert wrong.fault is Fault.SUCCESS
    remove_faults(store, [wrong])
    run_small(store, SAMPLES, media=real_media, adorned=True)
    assert verify(store, decode_media, decodes=0).findings == []


def test_hostile_prompts_are_no_fault(tmp_path):
    """P1: text that UTF-8 cannot hold is cleaned in the table, which is correct."""
    store = Store(str(tmp_path / "root"))
    run_small(store, some_samples(2, prompt="a \ud800 bird", extra={"\udfff": "\ud800"}))
    assert verify(store, decode_media, decodes=0).findings == []


def test_pending_and_quarantined_samples_are_no_faults(tmp_path):
    """P2: verify checks what exists; the run command renders what is missing."""
    store = Store(str(tmp_path / "root"))
    run_small(store, SAMPLES, poison={"s001"}, media=real_media)
    store.delete(layout.commit_key(1, "s005"))
    found = verify(store, decode_media, decodes=0, shards=[0])
    assert (found.findings, found.quarantined) == ([], 1)
    found = verify(store, decode_media, decodes=0)
    assert (found.pending, [finding.fault for finding in found.findings]) == (1, [Fault.SUCCESS, Fault.TABLE])
