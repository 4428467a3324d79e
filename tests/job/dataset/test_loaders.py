"""The common training libraries load a sealed output root as a dataset."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import fsspec
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from hv_batch.job import layout
from hv_batch.job.dataset.lineage import SCHEMA as LINEAGE
from hv_batch.job.dataset.seal import seal_shard, table_columns
from hv_batch.job.licences import TENCENT
from hv_batch.job.records import commits
from hv_batch.job.records.run_document import DATASET_SCHEMA
from hv_batch.job.storage.store import Store
from tests.support.rendered_roots import make_commit, make_quarantine, make_sample

IDENTITY = {"model": {"weights": "ab" * 32}, "parallel": {"ulysses_degree": 8}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def fill(store: Store) -> list[str]:
    """Two sealed shards: s001 to s004 with an image (s002) and a quarantined sample (s003), then s005. Returns the
    committed keys.
    """
    samples = [make_sample(n, num_frames=1 if n == 2 else 17, extra={"topic": f"t{n}"}) for n in range(1, 6)]
    for sample in samples:
        if sample.row == 3:
            commits.quarantine(store, make_quarantine(sample))
            continue
        record = make_commit(sample)
        media = f"the video of {sample.key}".encode()
        if sample.params.is_image:
            image = io.BytesIO()
            Image.new("RGB", (96, 128), "teal").save(image, "PNG")
            media = image.getvalue()
        sha256 = hashlib.sha256(media).hexdigest()
        record |= {
            "sha256": sha256,
            "file": layout.media_key(sample.shard, sample.key, sha256, Path(record["file"]).suffix),
        }
        store.put(record["file"], media)
        commits.commit(store, record)
    for shard in (0, 1):
        keys = [sample.key for sample in samples if sample.shard == shard]
        assert seal_shard(store, shard, keys, identity=IDENTITY, webdataset=True)
    return ["s001", "s002", "s004", "s005"]


def load(builder: str, store: Store, cache: Path, **options) -> datasets.Dataset:
    """The `data` folder, read by one of the Hugging Face loaders and sorted by row. The loader has its own order of
    shards.
    """
    found = datasets.load_dataset(builder, data_dir=f"{store.url}/data", split="train", cache_dir=str(cache), **options)
    return found.select(sorted(range(len(found)), key=list(found["row"]).__getitem__))


def test_hugging_face_loads_it_as_a_video_folder(store, tmp_path):
    """P1: every row of every shard, with the columns of hv_batch and the user's, and the path of the media file."""
    keys = fill(store)
    rows = load("videofolder", store, tmp_path / "cache").cast_column("video", datasets.Video(decode=False))
    assert rows.column_names == ["video", *table_columns(DATASET_SCHEMA), "topic"]
    assert [row["id"] for row in rows] == keys
    assert [row["topic"] for row in rows] == ["t1", "t2", "t4", "t5"]
    for row in rows:
        media = Path(row["video"]["path"])
        assert hashlib.sha256(media.read_bytes()).hexdigest() == row["sha256"]
        assert media.suffix == (".png" if row["num_frames"] == 1 else ".mp4")


def test_hugging_face_loads_the_images_alone(store, tmp_path):
    """P1: rows with one frame are PNG files, which the image loader opens if it selects only them."""
    fill(store)
    rows = load("imagefolder", store, tmp_path / "cache", filters=[("num_frames", "==", 1)])
    assert [(row["id"], row["image"].size) for row in rows] == [("s002", (96, 128))]


def test_arrow_reads_all_shards_as_one_table(store):
    """P3: one schema in all shards; the file metadata holds its version, the run's identity and the licence."""
    keys = fill(store)
    found = pyarrow.dataset.dataset(f"{store.url}/data", format="parquet", exclude_invalid_files=True)
    assert found.to_table(columns=["key"]).column("key").to_pylist() == keys
    assert found.to_table(filter=pyarrow.dataset.field("num_frames") == 1).column("id").to_pylist() == ["s002"]
    facts = pq.read_schema(f"{store.url}/{layout.metadata_key(1)}").metadata
    assert facts[b"hv_batch.schema"].decode() == DATASET_SCHEMA
    assert json.loads(facts[b"hv_batch.identity"]) == IDENTITY
    assert facts[b"hv_batch.licence"].decode() == TENCENT


def test_webdataset_reads_the_tars(store):
    """P1: one tar for each shard; each sample is its media and its row, in plan order."""
    keys = fill(store)
    tars = [f"{store.url}/{layout.tar_key(shard)}" for shard in (0, 1)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    rows = [json.loads(sample["json"]) for sample in samples]
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows] == keys
    for sample, row in zip(samples, rows, strict=True):
        media = sample["png" if row["num_frames"] == 1 else "mp4"]
        assert hashlib.sha256(media).hexdigest() == row["sha256"]
        assert (row["topic"], row["seed"]) == (f"t{row['row']}", 1000 + row["row"])


@pytest.mark.slow
def test_all_of_them_read_it_from_s3(s3_store, tmp_path):
    """P1: the libraries read a dataset on S3 with the same credentials. The Hugging Face loader must stream: it renames
    downloaded files, and then does not find them by the name in the table.
    """
    keys = fill(s3_store)
    files = f"{s3_store.url}/data/**"
    rows = datasets.load_dataset("videofolder", data_files=files, split="train", streaming=True)
    rows = list(rows.cast_column("video", datasets.Video(decode=False)))
    assert sorted(row["id"] for row in rows) == keys
    for row in rows:
        assert hashlib.sha256(fsspec.open(row["video"]["path"]).open().read()).hexdigest() == row["sha256"]
    filesystem, path = fsspec.url_to_fs(s3_store.url)
    found = pyarrow.dataset.dataset(f"{path}/data", format="parquet", exclude_invalid_files=True, filesystem=filesystem)
    assert found.to_table(columns=["key"]).column("key").to_pylist() == keys
    (tmp_path / "read.py").write_text(
        "import fsspec, sys; sys.stdout.buffer.write(fsspec.open(sys.argv[1]).open().read())"
    )
    urls = [f"pipe:{sys.executable} {tmp_path}/read.py {s3_store.url}/{layout.tar_key(shard)}" for shard in (0, 1)]
    assert [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)] == keys


def test_tars_of_equal_runs_have_equal_bytes(tmp_path):
    """P3: a tar does not depend on dates, owners or the order of completion."""
    tars = []
    for night in range(2):
        store = Store(str(tmp_path / str(night)))
        fill(store)
        tars.append(store.get(layout.tar_key(0)))
    assert tars[0] == tars[1]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_a_key_with_dots_stays_one_sample_of_a_tar(store):
    """P1: readers take what follows the first dot for the extension; two keys must not become one name."""
    media, sha256 = b"video", hashlib.sha256(b"video").hexdigest()
    keys = ["a.b", "a-b", "a.mp4"]
    for number, key in enumerate(keys, start=1):
        sample = make_sample(number)
        file = layout.media_key(0, key, sha256, ".mp4")
        store.put(file, media)
        commits.commit(store, make_commit(sample) | {"key": key, "file": file, "sha256": sha256})
    assert seal_shard(store, 0, keys, webdataset=True)
    samples = list(webdataset.WebDataset(f"{store.url}/{layout.tar_key(0)}", shardshuffle=False, empty_check=False))
    assert [json.loads(sample["json"])["key"] for sample in samples] == keys
    assert all(sample["mp4"] == media for sample in samples)


def test_a_tar_of_other_bytes_than_recorded_is_refused(store):
    """P1: a shard whose media was changed must not be sealed."""
    record = make_commit(make_sample(1))
    store.put(record["file"], b"something else")
    commits.commit(store, record)
    with pytest.raises(ValueError, match="differs from that in its commit record"):
        seal_shard(store, 0, ["s001"], webdataset=True)
    assert not store.exists(layout.metadata_key(0))


def test_the_lineage_table_describes_how_the_videos_were_rendered(store):
    """Lineage: attempts, times, places and versions of every video, outside the dataset."""
    keys = fill(store)
    table = pq.read_table(f"{store.url}/{layout.lineage_key(0)}")
    assert table.schema.metadata[b"hv_batch.schema"].decode() == LINEAGE
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == keys[:3]
    record = commits.read_commit(store, 0, "s001")
    assert json.loads(rows[0]["stages"]) == record["stages"]
    assert json.loads(rows[0]["places"]) == record["places"]
    assert json.loads(rows[0]["versions"]) == {"torch": "2"}
    assert (rows[0]["attempts"], rows[0]["failures"], rows[0]["committed_at"]) == (1, "[]", record["created_at"])
