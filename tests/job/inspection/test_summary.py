"""The numbers of summary.json."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from hv_batch.job import formatting, layout
from hv_batch.job.dataset import committed
from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.failure import FailureClass
from hv_batch.job.inspection import summary
from hv_batch.job.records import commits, run_document
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import (
    BLACK,
    STILL,
    make_commit,
    make_failure,
    make_quarantine,
    make_sample,
    open_root,
)


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root") if request.param == "disk" else f"memory://{tmp_path.name}")


def test_aggregate_adds_up(store):
    """P1: counts, seconds by stage as sum and mean, GPU seconds, media, failures and retries by class."""
    open_root(store, 9, device="cuda")
    lost = make_failure(FailureClass.INFRA)
    commits.commit(store, make_commit(make_sample(1)))
    commits.commit(store, make_commit(make_sample(2, num_frames=1), stages={"denoise": {"seconds": 20.0}}))
    commits.commit(store, make_commit(make_sample(6), failures=[lost, lost]))
    commits.quarantine(store, make_quarantine(make_sample(7)))
    commits.quarantine(store, make_quarantine(make_sample(9), make_failure(FailureClass.GPU_OOM)))
    totals = summary.aggregate(store)
    assert (totals["samples"], totals["committed"], totals["quarantined"], totals["pending"]) == (9, 3, 2, 4)
    assert (totals["shards"], totals["shards_sealed"]) == (3, 0)
    assert totals["stages"]["denoise"] == {"seconds": 40.0, "mean_seconds": 13.333}
    assert totals["stages"]["decode"] == {"seconds": 4.0, "mean_seconds": 2.0}
    assert totals["denoise_gpu_seconds"] == 80.0
    assert totals["media"] == {"bytes": 3000, "frames": 35, "images": 1, "seconds": round(34 / 24, 3)}
    assert totals["failures"] == {"POISON": 1, "GPU_OOM": 1}
    assert totals["retries"] == {"INFRA": 2}
    run_document.finish_run(store, totals)
    assert not store.exists(layout.SUCCESS)


@pytest.mark.parametrize(("key", "ranks"), [({}, 2), ({"cfg_degree": 1}, 2), ({"cfg_degree": 2}, 4)])
def test_gpu_time_counts_every_rank(key, ranks):
    """P2: also for roots of earlier versions, without a cfg_degree."""
    parallel = {"device": "cuda", "ulysses_degree": 2, "ring_degree": 1, **key}
    assert summary._gpu_seconds({"identity": {"parallel": parallel}}, {"": 10_000}) == 10.0 * ranks


def test_gpu_time_counts_each_group_by_its_size(store):
    """P2: a record holds the ranks of its group; an older record does not, and its run had one size."""
    open_root(store, 3, device="cuda")
    for number, details in enumerate(({"ranks": 8}, {"ranks": 1}, {}), start=1):
        commits.commit(store, make_commit(make_sample(number), stages={"denoise": {"seconds": 10.0, **details}}))
    assert summary.aggregate(store)["denoise_gpu_seconds"] == 10.0 * (8 + 1 + 2)


def test_aggregate_counts_what_was_encoded_once(store):
    """summary.json: prompts that were encoded and prompts found in an encoder's memory, over the committed samples."""
    open_root(store, 3)
    for number, (encoded, recalled) in enumerate([(1, 1), (0, 2)], start=1):
        stages = {"encode": {"seconds": 0.1, "encoded": encoded, "recalled": recalled}}
        commits.commit(store, make_commit(make_sample(number), stages=stages))
    assert summary.aggregate(store)["embeddings"] == {"encoded": 1, "recalled": 3}
    commits.commit(store, make_commit(make_sample(3)))
    assert summary.aggregate(store)["embeddings"] == {"encoded": 1, "recalled": 3}, (
        "a record without the field counts as neither"
    )


def test_truncated_prompts_are_in_the_summary(store):
    """D8: those of negative prompts too; a record of an earlier version has no number for them."""
    open_root(store, 4)
    lost = [{"tokens_lost": 5, "negative_tokens_lost": 0}, {"tokens_lost": 1, "negative_tokens_lost": 7}, {}]
    for number, numbers in enumerate(lost, start=1):
        stages = {"encode": {"seconds": 0.1, "encoded": 1, "recalled": 0, **numbers}}
        commits.commit(store, make_commit(make_sample(number), stages=stages))
    found = summary.aggregate(store)
    assert found["truncated"] == {"prompts": 2, "negative_prompts": 1, "tokens": 13}
    assert summary.describe_truncated(found).startswith(
        "the model does not read 13 tokens of long texts: 2 prompts and 1 negative prompt are truncated"
    )
    assert summary.describe_truncated({**found, "truncated": {"tokens": 0}}) == ""


def test_aggregate_without_gpus_reports_no_gpu_time(store):
    """summary.json: a CPU run reports null, not a wrong number."""
    open_root(store, 1)
    assert summary.aggregate(store)["denoise_gpu_seconds"] is None


def rich_root(store, seals):
    """Nine samples in three shards, with everything a summary counts; `seals` are the sealed shards."""
    open_root(store, 9, device="cuda")
    lost = make_failure(FailureClass.INFRA)
    for number in (1, 2, 3, 5, 6, 8, 9):
        sample = make_sample(number, num_frames=1 if number % 4 == 2 else 17)
        stages = {"encode": {"seconds": 0.001 * number}, "denoise": {"seconds": 1 / number}} if number != 3 else {}
        stages = {name: {"seconds": round(stage["seconds"], 3)} for name, stage in stages.items()}
        record = make_commit(sample, stages=stages, failures=[lost] * (number % 3))
        commits.commit(store, record | {"fps": (24, 25, 30)[number % 3]})
    commits.quarantine(store, make_quarantine(make_sample(4)))
    commits.quarantine(store, make_quarantine(make_sample(7), make_failure(FailureClass.GPU_OOM)))
    keys = [[f"s{number:03d}" for number in range(first, min(first + 4, 10))] for first in (1, 5, 9)]
    for shard in seals:
        assert seal_shard(store, shard, keys[shard])


@pytest.mark.parametrize("seals", itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)))
def test_stored_totals_give_the_same_summary(tmp_path, seals):
    """P7: whichever shards are sealed, the summary equals the one computed from all records, digit for digit."""
    store, unsealed = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    rich_root(store, seals)
    rich_root(unsealed, ())
    assert summary.aggregate(store) == summary.aggregate(unsealed) | {"shards_sealed": len(seals)}


def test_records_of_a_sealed_shard_are_not_read_again(store, monkeypatch):
    """P7: the end of a long run reads one object for each shard."""
    rich_root(store, (0, 1, 2))
    expected = summary.aggregate(store)
    monkeypatch.setattr(committed, "read_commit", None)
    assert summary.aggregate(store) == expected


@pytest.mark.parametrize("sums", [b"", b"{}", b'{"schema": "hv_batch/sums/0"}', None])
def test_invalid_totals_are_computed_again(store, sums):
    """P2: missing, damaged or of another version: the totals are computed from the records."""
    rich_root(store, (0, 1, 2))
    expected = summary.aggregate(store)
    store.delete(layout.totals_key(1))
    if sums is not None:
        store.put(layout.totals_key(1), sums)
    assert summary.aggregate(store) == expected


@pytest.mark.parametrize("change", [{"timed": {}}, {"timed": {"encode": 0}}, {"frames": 0}])
def test_contradictory_totals_are_computed_again(store, change):
    """P2: a stage without a sample would divide by zero, and images are the frames that no video has."""
    rich_root(store, (0, 1, 2))
    expected = summary.aggregate(store)
    sums = json.loads(store.get(layout.totals_key(1)))
    store.put(layout.totals_key(1), json.dumps(sums | change).encode())
    assert summary.aggregate(store) == expected


def test_a_commit_after_the_seal_is_counted(store):
    """P1: a quarantined sample that was committed late counts once, as committed."""
    rich_root(store, (0, 1, 2))
    commits.commit(store, make_commit(make_sample(4)))
    totals = summary.aggregate(store)
    assert (totals["committed"], totals["quarantined"]) == (8, 1)
    assert totals["media"]["bytes"] == 8000


def test_aggregate_needs_a_run(store):
    """P6: the message names the wrong path."""
    with pytest.raises(UserError):
        summary.aggregate(store)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.42, "0.42 s"), (12.34, "12.3 s"), (250, "4.2 min"), (11520, "3.2 h"), (5999, "100.0 min")],
)
def test_durations_have_two_or_three_digits(seconds, shown):
    """Report: any duration is shown with two or three digits."""
    assert formatting.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999 B"), (1500, "1.5 kB"), (357_000_000, "357 MB"), (5e15, "5e+03 TB")]
)
def test_sizes_have_decimal_units(count, shown):
    """Report: sizes as object stores bill them."""
    assert formatting.size(count) == shown


def test_the_summary_says_how_many_videos_look_wrong(store):
    """The totals are the same from records and from sealed shards."""
    open_root(store, 5)
    for number, scores in enumerate((BLACK, STILL, BLACK, None), 1):
        commits.commit(store, make_commit(make_sample(number), scores=scores))
    totals = summary.aggregate(store)
    assert totals["looks"] == {"black": 2, "still": 1}
    seal_shard(store, 0, ["s001", "s002", "s003", "s004"])
    assert summary.aggregate(store)["looks"] == totals["looks"]
