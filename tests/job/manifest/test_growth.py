"""hv_batch.job.manifest.growth: whether the rows of one index are the first rows of another."""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest import check
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.growth import growth_problem
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store

CONFIG = RunConfig()


def index_of(rows: list[dict], chunk_bytes: int) -> Index:
    """The index of these rows, in parts of about so many bytes of the file."""
    one_process = mock.patch.object(check.os, "cpu_count", return_value=1)  # processes take a second to start
    in_parts = mock.patch.object(limits, "CHUNK_BYTES", chunk_bytes)
    with tempfile.TemporaryDirectory() as folder, one_process, in_parts:
        path = Path(folder) / "m.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check_manifest(Manifest(str(path)), CONFIG, Store(f"memory://{uuid.uuid4().hex}"))


def rows_of(values: list[int]) -> list[dict]:
    return [{"id": f"s{number}", "prompt": f"p {value}"} for number, value in enumerate(values)]


values = st.lists(st.integers(0, 1), min_size=1, max_size=6)
sizes = st.sampled_from([1, 60, 1000])


@settings(deadline=None, max_examples=40)
@given(old=values, new=values, divided=sizes, otherwise=sizes)
def test_a_manifest_has_grown_exactly_if_its_first_rows_are_those_of_before(old, new, divided, otherwise):
    """P2: wherever the two indexes are divided into parts."""
    problem = growth_problem(index_of(rows_of(old), divided), index_of(rows_of(new), otherwise))
    assert (problem is None) == (new[: len(old)] == old)
    if problem and len(new) >= len(old):
        first = next(at for at, (left, right) in enumerate(zip(old, new, strict=False)) if left != right)
        assert problem.startswith(f"the prompt of row {first + 1} is ")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ({"fps": 24}, {"fps": 30}, "the fps of row 1 is 30, and it was 24"),
        ({"num_videos": 1}, {"num_videos": 2}, "the num_videos of row 1 is 2, and it was 1"),
        ({"tag": 1}, {"tag": 1.0}, "the content of row 1 is "),
    ],
)
def test_the_column_that_differs_is_named(old, new, problem):
    """P2: with both values; two texts of equal values are shown as they are."""
    row = {"id": "a", "prompt": "p"}
    assert growth_problem(index_of([row | old], 1000), index_of([row | new], 1000)).startswith(problem)


def test_a_row_that_a_prompt_hook_drops_now_is_missing():
    """P2: a manifest counts its rows, and the index those that the hook has left."""
    old, new = index_of(rows_of([0, 1, 0]), 1), index_of(rows_of([0, 1]), 1000)
    new.summary = replace(new.summary, rows=5)
    assert growth_problem(old, new) == "row 3 is missing"
