"""Quarantined samples: their reasons in groups, and their release (P5)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.cli.output_root.arguments import parse_shards
from hv_batch.job import layout
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.manifest.selection import parse_selection
from hv_batch.job.records import commits
from hv_batch.job.records.commits import scan_shard
from hv_batch.job.records.pending import only_failed
from hv_batch.job.records.quarantine import (
    MAX_GROUPS,
    OTHER_REASONS,
    failed_keys,
    group_reasons,
    read_quarantined,
    release,
)
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import make_failure, make_quarantine, make_sample, open_root
from tests.support.small_runs import TRIES, everything, run_small, some_samples


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "root"))


def quarantined(store: Store, number: int, kind: FailureClass, message: str) -> None:
    commits.quarantine(store, make_quarantine(make_sample(number), make_failure(kind, message)))


def test_reasons_are_grouped(store):
    """P5: details that differ from sample to sample (numbers, addresses, later lines) do not make another reason."""
    open_root(store, 8)
    for number in (1, 2, 5, 6):
        quarantined(store, number, FailureClass.POISON, f"step {number}: not finite at 0xA{number}f\nline {number}")
    quarantined(store, 3, FailureClass.GPU_OOM, "out of memory: 12.5 GiB")
    reasons = group_reasons(read_quarantined(store, range(2)))
    assert [reason.to_dict() for reason in reasons] == [
        {
            "class": "POISON",
            "message": "step #: not finite at #",
            "samples": 4,
            "examples": ("s001", "s002", "s005"),
        },
        {"class": "GPU_OOM", "message": "out of memory: # GiB", "samples": 1, "examples": ("s003",)},
    ]


def test_only_some_classes_and_shards(store):
    """P5: `retry --class GPU_OOM --shards 1` selects these samples and no others."""
    open_root(store, 8)
    for number, kind in ((1, FailureClass.GPU_OOM), (5, FailureClass.GPU_OOM), (6, FailureClass.POISON)):
        quarantined(store, number, kind, "x")
    found = read_quarantined(store, [1], [FailureClass.GPU_OOM])
    assert [record["key"] for record in found] == ["s005"]


def test_the_number_of_reasons_is_bounded():
    """P7: further reasons are counted together, and every sample is counted."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    records = [{"class": "POISON", "message": a + b, "key": a + b} for a in letters for b in letters]
    reasons = group_reasons(records)
    assert len(reasons) == MAX_GROUPS + 1
    assert sum(reason.samples for reason in reasons) == len(records)
    assert reasons[0].message == OTHER_REASONS


def test_released_samples_are_rendered_by_the_same_command(store):
    """P2, P5: only these are rendered, and the root ends as if they had never failed, except for the history in their
    records.
    """
    samples = some_samples(6)
    run_small(store, samples, poison={"s003", "s005"})
    assert release(store, read_quarantined(store, range(2))) == 2
    assert not store.exists(layout.SUCCESS)
    denoised: Counter[str] = Counter()
    run_small(store, samples, denoised=denoised)
    assert denoised == {"s003": 1, "s005": 1}
    undisturbed = Store("memory://undisturbed-retry")
    run_small(undisturbed, samples)
    assert everything(store, ignoring=TRIES) == everything(undisturbed, ignoring=TRIES)
    record = commits.read_commit(store, 0, "s003")
    assert record["attempts"] == 2
    assert [failure["message"] for failure in record["history"]] == ["latents of step 3 are not finite"]
    assert commits.read_commit(store, 0, "s002")["history"] == []


def test_earlier_attempts_are_recorded_after_several_releases(store):
    """P5: a terminal record holds all attempts; a damaged history does not prevent the retry."""
    samples = some_samples(2)
    for times in range(1, 4):
        run_small(store, samples, poison={"s002"})
        record = commits.read_quarantine(store, 0, "s002")
        assert (record["attempts"], len(record["history"])) == (times, times)
        release(store, read_quarantined(store, range(1)))
    store.put(layout.retried_key(0, "s002"), b"{")
    run_small(store, samples)
    assert commits.read_commit(store, 0, "s002")["attempts"] == 1


@given(st.builds(Failure, st.sampled_from(FailureClass), st.text(), st.text(), st.text(), st.booleans()))
def test_a_failure_is_read_back_from_a_record(failure):
    """P5: it is read back as it was written, which is without secrets."""
    written = failure.to_dict()
    assert Failure.from_dict(canonical_json.decode(canonical_json.encode(written))).to_dict() == written


def test_failed_samples_are_found_until_they_are_committed(store):
    """P2: a second `--failed-only` finds those that are left, also if the first was killed after it had released
    samples.
    """
    samples = some_samples(6)
    run_small(store, samples, poison={"s002", "s003", "s005"})
    assert failed_keys(store, range(2)) == {0: {"s002", "s003"}, 1: {"s005"}}
    release(store, read_quarantined(store, [0]))
    assert failed_keys(store, range(2)) == {0: {"s002", "s003"}, 1: {"s005"}}
    run_small(store, samples, poison={"s003"})
    assert failed_keys(store, range(2)) == {0: {"s003"}, 1: {"s005"}}
    assert only_failed(store, parse_selection(shards="1")).failed == {"s005"}
    assert only_failed(store, parse_selection(shards="1")).shards == (range(1, 2),)
    release(store, read_quarantined(store, range(2)))
    run_small(store, samples)
    assert failed_keys(store, range(2)) == {}


def test_a_release_leaves_other_shards_sealed(store):
    """P2: complete shards stay sealed."""
    run_small(store, some_samples(6), poison={"s005"})
    release(store, read_quarantined(store, range(2)))
    assert scan_shard(store, 0).sealed
    assert not scan_shard(store, 1).sealed


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_shards_are_parsed_as_they_are_written(shards):
    """P6: any list of numbers and ranges gives the set of its numbers."""
    text = ",".join(f"{number}" if number % 2 else f"{number}-{number + 3}" for number in shards)
    expected = {n for number in shards for n in range(number, number + (1 if number % 2 else 4))}
    assert parse_shards(text) == sorted(expected)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-2", "1,,2", "1.5", "²"])
def test_an_invalid_shard_list_is_refused(text):
    """P6: the message shows an allowed value."""
    with pytest.raises(UserError, match="3,17-20"):
        parse_shards(text)
