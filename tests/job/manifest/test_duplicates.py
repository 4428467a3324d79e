"""Repeated rows without id: numbered by their occurrence, dropped or refused."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.manifest import row_validation
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.rows import read_row
from tests.support.manifests import check_file, refusal_of, write_rows


def key_of(row):
    return read_row(1, row).key


def test_repeated_rows_get_ids_by_their_occurrence(tmp_path):
    """P3: the first keeps the key that it has alone, and each has a seed of its own."""
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": " a "}]
    index = check_file(write_rows(tmp_path / "m.jsonl", *rows))
    key = key_of({"prompt": "a"})
    assert [sample.key for sample in index] == [key, key_of({"prompt": "b"}), f"{key}-2", f"{key}-3"]
    assert [sample.id for sample in index] == [sample.key for sample in index]
    assert len({sample.params.seed for sample in index}) == 4
    (note,) = index.summary.warnings
    assert note.startswith("2 rows without id numbered, because an earlier row is equal: row 3 first. Each is rendered")


def test_an_inserted_line_shifts_no_key(tmp_path):
    """P2: a manifest that grows anywhere keeps its keys."""
    prompts = ["a", "b", "a", "c", "a"]
    before = check_file(write_rows(tmp_path / "m.jsonl", *({"prompt": prompt} for prompt in prompts)))
    grown = check_file(write_rows(tmp_path / "m.jsonl", *({"prompt": prompt} for prompt in ["x", *prompts, "b"])))
    assert {sample.key for sample in before} < {sample.key for sample in grown}


@settings(max_examples=30)
@given(
    prompts=st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    videos=st.integers(1, 2),
    action=st.sampled_from(["number", "drop"]),
    chunk=st.sampled_from([40, 200, 1 << 20]),
)
def test_keys_are_unique_whatever_is_repeated(prompts, videos, action, chunk, tmp_path_factory):
    """P1: property: numbered rows are as many as before, dropped ones leave each row once; the first keeps its key."""
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    write_rows(path, *({"prompt": prompt, "num_videos": videos} for prompt in prompts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CHUNK_BYTES", chunk)
        patch.setattr(os, "cpu_count", lambda: 1)  # no processes, which take longer to start than all the rest
        index = check_file(path, duplicates=action)
    samples = list(index)
    firsts = {key_of({"prompt": prompt, "num_videos": videos}) for prompt in prompts}
    rows = len(prompts) if action == "number" else len(firsts)
    assert len({sample.key for sample in samples}) == len(samples) == index.summary.samples == rows * videos
    assert sum(index.summary.shapes.values()) == len(samples)
    keys = {sample.key.removesuffix(f"-v{sample.video_index}") for sample in samples}
    assert keys >= firsts
    assert [sample.row for sample in samples] == sorted(sample.row for sample in samples)


def test_rows_that_another_number_does_not_change_are_problems(tmp_path):
    """Equal rows with a seed would give the same video twice; equal ids are never numbered."""
    seeded = [{"prompt": "a", "seed": 7}, {"prompt": "a", "seed": 7}, {"prompt": "b"}, {"prompt": "b"}]
    text = refusal_of(write_rows(tmp_path / "m.jsonl", *seeded))
    assert "has 1 problem(s) in 4 row(s)" in text
    assert "row 2: id is missing; allowed: rows that differ; row 1 is the same" in text
    assert "--duplicates drop" in text
    dropped = check_file(tmp_path / "m.jsonl", duplicates="drop")
    assert [sample.row for sample in dropped] == [1, 3]
    assert dropped.summary.warnings == ("2 rows without id dropped, because an earlier row is equal: row 2 first",)
    assert "has 2 problem(s) in 4 row(s)" in refusal_of(tmp_path / "m.jsonl", duplicates="refuse")
    path = write_rows(tmp_path / "m.jsonl", {"prompt": "a", "id": "x"}, {"prompt": "a", "id": "X"})
    for action in ("number", "drop"):
        assert 'row 2: id = "X"; allowed: an id' in refusal_of(path, duplicates=action)


def test_a_number_that_is_the_id_of_another_row_is_a_problem(tmp_path):
    """P1: the keys of numbered rows are compared with those of the manifest."""
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b", "id": key_of({"prompt": "a"}) + "-2"}]
    assert "row 3: id = " in refusal_of(write_rows(tmp_path / "m.jsonl", *rows))


def test_rows_whose_hashes_collide_are_not_repeats(tmp_path, monkeypatch):
    """Rows are compared by their keys, so a collision of the shorter hashes neither numbers nor drops a row."""
    for module in (row_validation, __import__("hv_batch.job.manifest.duplicates", fromlist=["x"])):
        monkeypatch.setattr(module, "hash_key", lambda key: bytes(8))
    path = write_rows(tmp_path / "m.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    assert [sample.row for sample in check_file(path, duplicates="drop")] == [1, 2]
