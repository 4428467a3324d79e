"""`choices.json`: the first choice of a run is the only one, and nothing else is accepted from an output root."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.records.choices import read_choices, record_choices
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store

CHOICES = {"schema": "hv_batch/choices/1", "worker": "w", "node": "n", "chosen_at": "2026-11-28T22:00:00+00:00"}


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


def test_groups_that_start_at_once_get_one_choice(store):
    """P3: of many workers, each with its own choice, one records it, and all get that one. A resume reads it."""
    assert read_choices(store) == {}

    def choose(number):
        return record_choices(store, {"attention": f"kernel-{number}"}, f"denoise-{number}", "node")

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(choose, range(16)))
    assert answers == [read_choices(store)] * 16
    assert record_choices(store, {"attention": "later"}, "denoise-9", "node") == answers[0]


@pytest.mark.parametrize(
    "choices",
    [{}, {"attention": 1}, {"attention": "x" * 2000}, {f"o{i}": "x" for i in range(17)}, ["attention"], None],
    ids=["none", "number", "long", "many", "list", "null"],
)
def test_a_damaged_choice_is_refused(store, choices):
    """What is read from a root satisfies its schema; the message names the object and the remedy."""
    store.put(layout.CHOICES, encode({**CHOICES, "choices": choices}))
    store.put(layout.RUN, b"{}")
    with pytest.raises(InvalidObjectError, match=r"choices\.json .*is damaged .*Restore it from a copy"):
        read_choices(store)
