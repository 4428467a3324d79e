"""`verify` on roots that somebody else has changed: it names what is wrong and removes nothing else (P1, P2)."""

from __future__ import annotations

import errno
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.findings import Fault, Verification
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.inspection.verify import MediaShape, remove_faults, verify
from hv_batch.job.records.run_document import fingerprint, read_summary
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch
from tests.support.plans import publish_plan
from tests.support.small_runs import run_small, some_samples

SAMPLES = some_samples(6, extra={"topic": "birds"})
POISON = frozenset({"s005"})
RECORD = "commits/shard-00000/s001.json"


def rest_slow(cases, kept: int) -> list:
    """Parameters of which only the first `kept` belong to the default suite: the others are of the same kind."""
    groups = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*group, marks=[pytest.mark.slow] if number >= kept else [], id=str(group[0]))
        for number, group in enumerate(groups)
    ]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A finished root of two shards with posters, tars and the checked manifest; s005 is quarantined."""
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), SAMPLES, poison=POISON, adorned=True)
    publish_plan(Store(str(root)), SAMPLES)
    return root


@pytest.fixture
def root(rendered, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(rendered, tmp_path / "root"))


def examine(root: Path) -> Verification:
    return verify(Store(str(root)), lambda data, suffix: MediaShape(17, 128, 96), decodes=None)


def change(path: Path, **values) -> None:
    """Replace values of a JSON document; double underscores separate the names of a path."""
    document = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(document))


def media_of(root: Path, key: str) -> Path:
    (path,) = root.glob(f"data/*/{key}-*")
    return path


def finish(root: Path) -> Counter:
    """The run command. Returns what it has denoised."""
    denoised: Counter[str] = Counter()
    run_small(Store(str(root)), SAMPLES, poison=POISON, denoised=denoised, adorned=True)
    return denoised


def test_a_sound_root_has_no_finding(rendered):
    found = examine(rendered)
    assert (found.findings, found.compared, found.checked, found.quarantined, found.pending) == ([], True, 5, 1, 0)


def test_a_record_cannot_have_the_media_of_its_neighbour_removed(root):
    """P1: paths in a record are compared with those of its sample, never followed."""
    neighbour = media_of(root, "s002")
    change(root / RECORD, file=str(neighbour.relative_to(root)))
    found = examine(root)
    assert {finding.key for finding in found.findings} <= {"s001", None}
    remove_faults(Store(str(root)), found.findings)
    assert neighbour.exists()
    assert finish(root) == {"s001": 1}
    assert examine(root).findings == []


def test_the_members_of_a_tar_are_named_after_sample_keys(root):
    """P1: a key such as /tmp/x never becomes an absolute member."""
    change(root / RECORD, key="/tmp/x")
    for seal in (layout.SUCCESS, layout.metadata_key(0), layout.tar_key(0)):
        (root / seal).unlink()
    with pytest.raises(UserError, match=rf"{RECORD} .*key.*--repair"):
        finish(root)
    assert not (root / layout.tar_key(0)).exists()
    remove_faults(Store(str(root)), examine(root).findings)
    finish(root)
    with tarfile.open(root / layout.tar_key(0)) as tar:
        assert all("/" not in member.name for member in tar)


WRONGLY_TYPED = [
    {"row": "3"},
    {"row": True},
    {"fps": "24"},
    {"bytes": 10.5},
    {"params__seed": "7"},
    {"params__guidance_scale": None},
    {"stages__denoise": "10"},
    {"places": []},
    {"history": {"a": 1}},
    {"history": [{"kind": 3}]},
    {"versions": [1]},
    {"extra": []},
    {"produced__num_frames": "17"},
    {"created_at": 12},
]


@pytest.mark.parametrize("values", rest_slow(WRONGLY_TYPED, 2))
@pytest.mark.parametrize("is_open", [False, True], ids=["sealed", "open"])
def test_a_wrongly_typed_field_is_named_and_the_run_can_be_finished(root, values, is_open):
    """P2: the finding names the object, removing it lets the same run command finish, and the others are checked."""
    change(root / RECORD, **values)
    if is_open:
        for seal in (layout.SUCCESS, layout.metadata_key(0)):
            (root / seal).unlink()
    found = examine(root)
    (wrong,) = [finding for finding in found.findings if finding.fault is Fault.RECORD]
    assert RECORD in wrong.details
    assert wrong.removes == (RECORD,)
    assert found.checked == 5
    remove_faults(Store(str(root)), found.findings)
    assert finish(root) == {"s001": 1}
    assert examine(root).findings == []


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


UNREADABLE: list[tuple[str, Callable[[Path], None]]] = [
    (RECORD, lambda path: path.write_bytes(b"[" * 100_000) and None),
    (RECORD, as_folder),
    ("data/shard-00000/s001-*", as_folder),
    ("posters/shard-00000/s001-*", as_folder),
    ("quarantine/shard-00001/s005.json", as_folder),
    ("data/shard-00000/metadata.parquet", as_folder),
    ("lineage/shard-00000.parquet", as_folder),
    ("report/shards/shard-00000.json", as_folder),
    ("report/shards/shard-00000.json", lambda path: path.write_bytes(b"[" * 100_000) and None),
    ("webdataset/shard-00000.tar", as_folder),
    ("plan/index.json", as_folder),
    ("plan/part-00000-*", as_folder),
    ("lease.json", lambda path: path.write_bytes(b"{}") and None),
    ("retried/shard-00000/s001.json", lambda path: path.write_bytes(b"{}") and None),
    ("summary.json", as_folder),
]


@pytest.mark.parametrize(("name", "spoil"), rest_slow(UNREADABLE, 5))
def test_an_unreadable_object_is_named_and_the_others_are_checked(root, name, spoil):
    """P5: a folder in place of a file, and an object that no parser takes."""
    path = next(iter(root.glob(name)), root / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    spoil(path)
    (media_of(root, "s006")).write_bytes(b"?")  # a second fault, found after the first
    found = examine(root)
    key = path.relative_to(root).as_posix()
    assert any(key in finding.details for finding in found.findings), found.render()
    assert any((finding.key, finding.fault) == ("s006", Fault.SIZE) for finding in found.findings)


@pytest.mark.parametrize("code", rest_slow([errno.EIO, errno.EACCES], 1))
@pytest.mark.parametrize(
    "name", [RECORD, "data/shard-00000/s001-", "commits/shard-00000", "quarantine/shard-00001/s005"]
)
def test_an_object_that_the_store_refuses_is_named_and_not_removed(root, monkeypatch, name, code):
    """P5: EIO of a bad sector, EACCES of one object: it may be intact, so nothing is removed."""
    refuse(monkeypatch, name, OSError(code, "refused"))
    found = examine(root)
    refused = [finding for finding in found.findings if finding.fault is Fault.UNREADABLE]
    assert len(refused) == 1
    assert name in refused[0].details
    assert not refused[0].removes
    before = files(str(root))
    remove_faults(Store(str(root)), found.findings)
    assert files(str(root)) == before


def test_an_outage_of_the_store_is_not_a_fault_of_its_objects(root, monkeypatch):
    """P5: if run.json cannot be read either, the command ends with the store's error and removes nothing."""
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", ())
    calls = Counter()
    real = LocalDisk.get

    def get(disk, key, at_most):
        calls["all"] += 1
        if calls["all"] > 8:
            raise ConnectionError("the store is away")
        return real(disk, key, at_most)

    monkeypatch.setattr(LocalDisk, "get", get)
    with pytest.raises(StorageUnavailableError, match="the store is away"):
        examine(root)


def refuse(monkeypatch, prefix: str, error: OSError) -> None:
    """The disk refuses to read or list everything whose path begins with `prefix`."""
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", ())
    for name in ("get", "get_file", "list"):
        real = getattr(LocalDisk, name)

        def refusing(disk, key, *args, real=real):
            if key.startswith(prefix):
                raise error
            return real(disk, key, *args)

        monkeypatch.setattr(LocalDisk, name, refusing)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fingerprint": "0" * 64}, "its fingerprint is 0000"),
        ({"identity__seed": 1}, "that of its identity is"),
        ({"config__seed": 1}, "seed: 1 -> 0"),
        ({"identity__media": {"poster": False}}, "that of its identity is"),
    ],
)
def test_a_run_document_that_contradicts_itself_is_refused_everywhere(root, values, said):
    """P2: one changed character of run.json must not make every record look wrong."""
    change(root / layout.RUN, **values)
    before = files(str(root))
    for command in (["status"], ["verify"], ["verify", "--remove"], ["verify", "--repair"], ["gc", "--yes"], ["retry"]):
        with pytest.raises(UserError, match=said):
            hv_batch(*command, root)
    assert files(str(root)) == before


def test_the_config_of_a_run_must_agree_with_its_identity(root):
    """P2: `media.poster` decides which files a root must have, and is part of the identity."""
    run = json.loads((root / layout.RUN).read_text())
    run["identity"]["media"] = {"poster": True}
    run["fingerprint"] = fingerprint(run["identity"])
    run["config"]["media"]["poster"] = False
    (root / layout.RUN).write_text(json.dumps(run))
    with pytest.raises(UserError, match=r"config\.media\.poster: false -> true"):
        examine(root)


@pytest.mark.parametrize("change_run", ["fingerprint", "poster"])
def test_a_fault_that_all_records_share_is_one_of_the_run(rendered, tmp_path, change_run):
    """P2: then run.json was changed, consistently, and no record is removed."""
    root = Path(shutil.copytree(rendered, tmp_path / "root"))
    run = json.loads((root / layout.RUN).read_text())
    if change_run == "fingerprint":
        run["identity"]["seed"] = run["config"]["seed"] = 5
        run["fingerprint"] = fingerprint(run["identity"])
        (root / layout.RUN).write_text(json.dumps(run))
    else:
        for path in root.glob("commits/*/*.json"):
            change(path, poster=None)
    found = examine(root)
    (shared,) = [finding for finding in found.findings if finding.fault is Fault.RUN]
    assert "all 5 commit records" in shared.details
    assert not [finding for finding in found.findings if finding.removes and "commits/" in finding.removes[0]]
    remove_faults(Store(str(root)), found.findings)
    assert len(list(root.glob("commits/*/*.json"))) == 5


DIFFERENT = [
    {"params__prompt": "a goose at noon"},
    {"params__seed": 8},
    {"row": 99},
    {"id": "another"},
    {"fps": 25},
    {"extra": {"topic": "fish"}},
    {"extra": {}},
]


@pytest.mark.parametrize("values", rest_slow(DIFFERENT, 2))
@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "open"])
def test_a_record_that_differs_from_the_manifest_is_found(root, values, is_sealed):
    """P3: a changed prompt in a record does not become the truth of the dataset."""
    change(root / RECORD, **values)
    if not is_sealed:
        for seal in (layout.SUCCESS, layout.metadata_key(0)):
            (root / seal).unlink()
        finish(root)  # seals the changed record
    found = examine(root)
    (wrong,) = [finding for finding in found.findings if finding.fault is Fault.RECORD]
    assert (wrong.key, wrong.removes) == ("s001", (RECORD,))
    assert "the manifest has" in wrong.details
    remove_faults(Store(str(root)), found.findings)
    assert finish(root) == {"s001": 1}
    assert examine(root).findings == []


def test_a_quarantine_record_that_differs_from_the_manifest_is_found(root):
    change(root / "quarantine/shard-00001/s005.json", params__prompt="another")
    (wrong,) = examine(root).findings
    assert (wrong.key, wrong.fault) == ("s005", Fault.RECORD)


FOREIGN = [
    "commits/shard-00000/s001 copy.json",
    "commits/shard-00000/s001-copy.json",
    "commits/shard-00000/sub/s001.json",
    "commits/shard-00000/s001.safetensors",
    "quarantine/shard-00000/s077.json",
    "quarantine/shard-00000/s002~.json",
    "retried/shard-00000/s088.json",
    "latents/shard-00000/s099.safetensors",
    "steps/shard-00001/s001.safetensors",
    "data/shard-00000/notes.txt",
    "data/shard-00001/s001-0a1b2c3d.mp4",
    "posters/shard-00000/cover.jpg",
]


@pytest.mark.parametrize("name", rest_slow(FOREIGN, 4))
def test_a_foreign_object_is_reported_and_counted_nowhere(root, rendered, name):
    """P1: it belongs to no sample. It changes no count, is not removed, and does not keep a run from finishing."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((rendered / RECORD).read_bytes())
    (foreign,) = examine(root).findings
    assert foreign.fault is Fault.FOREIGN
    assert name in foreign.details
    assert not foreign.removes
    store, undisturbed = Store(str(root)), Store(str(rendered))
    assert read_status(store).to_dict() | {"url": ""} == read_status(undisturbed).to_dict() | {"url": ""}
    assert aggregate(store) == aggregate(undisturbed)
    for seal in (layout.SUCCESS, layout.metadata_key(0), layout.metadata_key(1)):
        (root / seal).unlink()
    assert not finish(root)
    assert store.exists(layout.SUCCESS)
    assert path.exists()


def test_a_foreign_record_hides_no_pending_sample_of_a_sealed_shard(root):
    """P2: as many records as samples, and one of them is foreign."""
    (root / RECORD).rename(root / "commits/shard-00000/s001-copy.json")
    assert read_status(Store(str(root))).pending == 1
    (root / layout.SUCCESS).unlink()
    assert finish(root) == {"s001": 1}


def test_rendering_a_sample_of_a_sealed_shard_again_unseals_the_shard(root):
    """P2: otherwise the lineage and the totals would describe the removed record."""
    (root / RECORD).unlink()
    (root / layout.SUCCESS).unlink()
    table = (root / layout.metadata_key(0)).read_bytes()
    lineage = (root / layout.lineage_key(0)).read_bytes()
    assert finish(root) == {"s001": 1}
    assert (root / layout.metadata_key(0)).read_bytes() == table, "the same pixels"
    assert (root / layout.lineage_key(0)).read_bytes() != lineage, "another attempt"
    assert examine(root).findings == []


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_text("{}"), lambda path: change(path, pending=-1)]
)
def test_a_finished_root_without_a_valid_summary_is_reported(root, spoil):
    """P2: `verify` reports it, and a resume writes it again (tests/cluster/test_operations.py)."""
    spoil(root / layout.SUMMARY)
    assert read_summary(Store(str(root))) is None
    (wrong,) = examine(root).findings
    assert wrong.fault is Fault.SUMMARY
