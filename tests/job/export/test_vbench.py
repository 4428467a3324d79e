"""`export --vbench`: the names that VBench looks for, and a file for every video whatever its prompt is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.export.destination import Destination
from hv_batch.job.export.vbench import VideoNames, export_vbench
from hv_batch.job.records.run_document import read_run
from hv_batch.job.redaction import printable_text
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import make_sample
from tests.support.small_runs import real_media, run_small

PROMPTS = ["a cat", "a cat", "A cat", "a/b", "x" * 300, "a cat"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A finished root: five videos and an image, with the original prompts in `prompt_en`."""
    store = Store(str(tmp_path / "root"))
    samples = [
        make_sample(number, num_frames=1 if number == 6 else 17, extra={"prompt_en": prompt})
        for number, prompt in enumerate(PROMPTS, start=1)
    ]
    run_small(store, samples, media=real_media)
    return store


def no_progress(total: int):
    return lambda count: None


def export(store: Store, folder: Path, **options) -> dict:
    return export_vbench(store, read_run(store), Destination(store, folder), progress=no_progress, **options)


def test_the_files_have_the_names_that_vbench_looks_for(store, tmp_path):
    """Item 6: `{original prompt}-{i}.mp4`; videos of one prompt are numbered over all rows."""
    facts = export(store, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "videos").iterdir())
    assert {"a cat-0.mp4", "a cat-1.mp4", "A cat-0.mp4"} < set(names)
    assert len(names) == facts["videos"] == 5
    assert (facts["prompts"], facts["images_left_out"], facts["prompt_column"]) == (4, 1, "prompt_en")
    assert facts["prompts_with_fewer_than_5_videos"] == 4
    assert set(facts["renamed_prompts"]) == {"a/b", "x" * 300}
    prompts = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert sorted(prompts.values()) == sorted(PROMPTS[:5])
    assert sorted(prompts) == sorted(f"videos/{name}" for name in names)


def test_the_files_are_links_to_the_root_or_copies(store, tmp_path):
    export(store, tmp_path / "links")
    export_vbench(store, read_run(store), Destination(store, tmp_path / "copies", copies=True), progress=no_progress)
    (source,) = Path(store.url).glob("data/*/s003-*")
    link, copy = (tmp_path / name / "videos" / "A cat-0.mp4" for name in ("links", "copies"))
    assert link.samefile(source)
    assert not copy.samefile(source)
    assert copy.read_bytes() == source.read_bytes()


def test_another_column_can_name_the_files(store, tmp_path):
    export(store, tmp_path / "out", prompt_column="prompt")
    assert (tmp_path / "out" / "videos" / "a heron at dawn, take 1-0.mp4").is_file()
    with pytest.raises(UserError, match="no column 'caption'"):
        export(store, tmp_path / "other", prompt_column="caption")


def test_an_open_shard_is_refused_unless_the_sealed_ones_are_named(store, tmp_path):
    """P1: an export must not lack videos without a word."""
    (Path(store.url) / "data" / "shard-00001" / "metadata.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00001.*--shards"):
        export(store, tmp_path / "out")
    assert export(store, tmp_path / "part", shards=[0])["videos"] == 4


def test_a_missing_or_changed_file_is_refused(store, tmp_path):
    (source,) = Path(store.url).glob("data/*/s003-*")
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"s003.*bytes and not"):
        export(store, tmp_path / "out")
    source.unlink()
    with pytest.raises(UserError, match=r"s003.*is missing"):
        export(store, tmp_path / "again")


def test_a_link_in_the_root_is_not_followed(store, tmp_path):
    """A root must not make an export publish another file of this machine."""
    (source,) = Path(store.url).glob("data/*/s003-*")
    secret = tmp_path / "secret"
    secret.write_bytes(source.read_bytes())
    source.unlink()
    source.symlink_to(secret)
    for copies in (False, True):
        destination = Destination(store, tmp_path / f"out-{copies}", copies=copies)
        with pytest.raises(OSError, match="symbolic link"):
            export_vbench(store, read_run(store), destination, progress=no_progress)
        assert not (tmp_path / f"out-{copies}" / "videos" / "A cat-0.mp4").is_symlink()


@pytest.mark.parametrize("make", ["file", "inside", "root"])
def test_a_destination_that_is_used_or_in_the_root_is_refused(store, tmp_path, make):
    folder = {"file": tmp_path / "used", "inside": Path(store.url) / "videos", "root": Path(store.url)}[make]
    if make == "file":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty" if make == "file" else "lies in the output root"):
        Destination(store, folder)


def test_prompts_that_differ_by_case_are_two_files_on_every_file_system():
    exact = VideoNames(distinguishes_case=True)
    assert [exact.next("a cat"), exact.next("A cat")] == ["a cat-0", "A cat-0"]
    folded = VideoNames(distinguishes_case=False)
    first, second = folded.next("a cat"), folded.next("A cat")
    assert first == "a cat-0"
    assert second.startswith("A cat~")
    assert folded.next("a cat") == "a cat-1"


@given(st.lists(st.text(), max_size=20), st.booleans())
def test_every_video_of_any_prompts_has_a_valid_name_of_its_own(prompts, distinguishes_case):
    names = VideoNames(distinguishes_case=distinguishes_case)
    files = [names.next(prompt) + ".mp4" for prompt in prompts]
    compared = files if distinguishes_case else [name.casefold() for name in files]
    assert len(set(compared)) == len(prompts)
    for name in files:
        assert len(name.encode()) <= 255
        assert "/" not in name
        assert printable_text(name) == name


def test_a_stem_that_looks_like_a_shortened_name_is_no_clash():
    names = VideoNames(distinguishes_case=True)
    shortened = names.next("a/b").removesuffix("-0")
    assert names.next(shortened) != f"{shortened}-0"
