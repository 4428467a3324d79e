"""`export --hub`: a folder that loads as a dataset, within the limits of the Hub, without what names this machine."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

from hv_batch.job.export import hub
from hv_batch.job.export.destination import Destination
from hv_batch.job.export.hub import export_hub
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.hub_urls import refuse_hub_repository
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.small_runs import real_media, run_small, some_samples


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A finished root of two shards: five videos, of which one is quarantined, and an image."""
    store = Store(str(tmp_path / "root"))
    samples = [*some_samples(5), *some_samples(6, num_frames=1)[5:]]
    run_small(store, samples, poison=["s002"], media=real_media, adorned=True)
    return store


def export(store: Store, folder: Path, **options) -> dict:
    def progress(total):
        return lambda count: None

    return export_hub(store, read_run(store), Destination(store, folder), progress=progress, **options)


def test_the_folder_loads_as_a_dataset_of_its_own(store, tmp_path):
    """Item 6: the folder needs nothing of the root, and the card says what is left out of its configuration."""
    facts = export(store, tmp_path / "out")
    assert (facts["media"], facts["shards"]) == (5, 2)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("video", datasets.Video(decode=False))
    assert sorted(rows["id"]) == ["s001", "s003", "s004", "s005"]
    assert all(Path(row["video"]["path"]).is_relative_to(tmp_path / "out") for row in rows)
    text = (tmp_path / "out" / "README.md").read_text()
    for words in ("4 videos", "1 image", "1 sample of the run failed", "are not in this configuration"):
        assert words in text
    assert DatasetCard(text).data.license == "other"


def test_only_card_media_and_tables_leave_the_root(store, tmp_path):
    """Records and lineage name machines and users."""
    export(store, tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"README.md", "data"}
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_a_part_of_the_shards_has_a_card_of_its_own(store, tmp_path):
    export(store, tmp_path / "out", shards=[1])
    assert "1 video (" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("limit", "message"), [("MAX_REPOSITORY_FILES", "8 files"), ("MAX_FOLDER_FILES", "3 files")])
def test_the_limits_of_the_hub_are_checked_before_a_file_is_exported(store, tmp_path, monkeypatch, limit, message):
    monkeypatch.setattr(hub, limit, 3)
    with pytest.raises(UserError, match=f"{message}.*output.webdataset"):
        export(store, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("url", ["hf://datasets/a/b", "hf://datasets/a/b/run-1", "hf://a/b", "hf://spaces/a/b"])
def test_a_repository_of_the_hub_is_no_output_root(url):
    """Item 6: each write would be a commit."""
    with pytest.raises(UserError, match="hf upload"):
        refuse_hub_repository(url)


@pytest.mark.parametrize("url", ["hf://buckets/a/b/run-1", "s3://b/run", "/data/run", "memory://x"])
def test_other_roots_are_allowed(url):
    refuse_hub_repository(url)
