"""The report of a root at any time of a run: its counts, its parts, what is read again, and what hostile objects do."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.documents.reading import parse
from hv_batch.job.documents.report import DigestDocument, PartDocument
from hv_batch.job.failure import FailureClass
from hv_batch.job.manifest.index import read_index
from hv_batch.job.records import commits
from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.records.quarantine import read_quarantined, release
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.withdrawn import tombstone
from hv_batch.job.report import samples as report_samples
from hv_batch.job.report import update
from hv_batch.job.report.update import Reporter, update_report
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.plans import publish_plan
from tests.support.rendered_roots import BLACK, make_commit, make_failure, make_quarantine, make_sample, open_root
from tests.support.repository import ROOT

HOSTILE = """</script><script>alert(1)</script><!-- <img src=x onerror='y'> & ${title} "quoted" \u2028\u202e\ud800"""
KEYS = [f"s{number:03d}" for number in range(1, 10)]


class CountingStore(Store):
    """Counts the records that are read."""

    records = 0

    def get(self, key: str, *limit: int) -> bytes:
        if key.startswith(("commits/", "quarantine/")):
            type(self).records += 1
        return super().get(key)


def new_memory() -> Store:
    MemoryFileSystem.store.clear()  # each listing walks over all files
    return Store(f"memory://{uuid.uuid4().hex}")


def withdraw_sample(store: Store, number: int) -> None:
    sample = make_sample(number)
    place = {"key": sample.key, "id": sample.id, "row": number, "video_index": 0, "shard": sample.shard}
    store.put(layout.withdrawn_key(sample.shard, sample.key), encode(tombstone(place, reason="a face", sha256=None)))


def fill(store: Store, *, planned: bool = True) -> None:
    """Nine samples in three shards: s001 to s004 sealed (s004 failed), s005 withdrawn, s006 failed, others pending."""
    open_root(store, 9, device="cuda")
    if planned:
        publish_plan(store, [make_sample(number, extra={"topic": "birds"}) for number in range(1, 10)])
    for number in (1, 2, 3):
        commits.commit(store, make_commit(make_sample(number, extra={"topic": "birds"}), scores=BLACK))
    commits.quarantine(store, make_quarantine(make_sample(4), make_failure(FailureClass.GPU_OOM, "7 GiB are missing")))
    commits.quarantine(store, make_quarantine(make_sample(6), make_failure(FailureClass.GPU_OOM, "9 GiB are missing")))
    withdraw_sample(store, 5)
    seal_shard(store, 0, KEYS[:4])


def written(store: Store) -> dict[str, object]:
    """Every object of the report, without the time at which it was made."""
    found = {key: json.loads(store.get(key)) for key in store.list("report") if key.endswith(".json")}
    found.pop(layout.totals_key(0), None)
    found[layout.REPORT_DATA].pop("generated_at")
    return found


def part(store: Store, shard: int) -> list[dict]:
    return parse(PartDocument, store.get(layout.report_part_key(shard)))["samples"]


def embedded(page: bytes) -> dict:
    """The data that a browser finds in the page."""
    _, _, rest = page.decode().partition('<script type="application/json" id="report">')
    return json.loads(rest.partition("</script>")[0])


def test_a_report_counts_every_sample(tmp_path):
    """P1: a sample has one state; the counts by shard, by facet and in all are those of the records."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    document = update_report(store).document
    counts = {"samples": 9, "committed": 3, "quarantined": 2, "withdrawn": 1, "pending": 3}
    assert {name: document["totals"][name] for name in counts} == counts
    assert {name: sum(shard[name] for shard in document["shards"]) for name in counts} == counts
    assert document["facets"]["state"] == {"committed": 3, "quarantined": 2, "pending": 2, "withdrawn": 1}, (
        "the last shard has no part yet"
    )
    assert document["facets"] == document["facets"] | {
        "shape": {"128x96x17": 7},
        "class": {"GPU_OOM": 2},
        "flags": {"black": 3},
        "topic": {"birds": 5},
    }
    assert [shard["part"] for shard in document["shards"]] == [
        "parts/shard-00000.json",
        "parts/shard-00001.json",
        None,
    ]
    assert [shard["bytes"] for shard in document["shards"][:2]] == [
        store.size(layout.report_part_key(shard)) for shard in (0, 1)
    ]
    assert [sample["state"] for sample in part(store, 1)] == ["withdrawn", "quarantined", "pending", "pending"]
    assert document == json.loads(store.get(layout.REPORT_DATA))
    page = embedded(store.get(layout.REPORT))
    assert {name: page[name] for name in document} == document
    assert [sample["key"] for sample in page["first"]] == KEYS[:8]
    assert [sample["shard"] for sample in page["first"]] == [0] * 4 + [1] * 4


def test_a_part_says_of_each_sample_what_its_record_says(tmp_path):
    """P1: paths, sizes, parameters and times of a committed sample; a pending one has what the plan fixes."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    update_report(store)
    record = commits.read_commit(store, 0, "s001")
    assert part(store, 0)[0] == {
        "id": "s001",
        "key": "s001",
        "row": "1",
        "video": 0,
        "state": "committed",
        "prompt": "a heron at dawn, take 1",
        "file": record["file"],
        "poster": None,
        "bytes": 1000,
        "width": 96,
        "height": 128,
        "frames": 17,
        "fps": 24,
        "steps": 8,
        "seed": 1001,
        "guidance": 6.0,
        "cfg": 1.0,
        "flags": ["black"],
        "facets": {"topic": "birds"},
        "class": None,
        "message": None,
        "seconds": {"encode": 0.5, "denoise": 10.0, "decode": 2.0},
    }
    pending = part(store, 1)[2]
    unknown = {"file": None, "bytes": None, "flags": [], "seconds": {}, "state": "pending"}
    same = dict.fromkeys(("width", "height", "frames", "fps", "steps", "guidance", "cfg"))
    assert pending == pending | unknown | {name: part(store, 0)[0][name] for name in same}
    assert (pending["key"], pending["prompt"], pending["seed"]) == ("s007", "a heron at dawn, take 7", 1007)
    assert part(store, 1)[0]["prompt"] == "", "nothing of a withdrawn sample is shown"


def test_causes_have_their_numbers_replaced_and_a_command(tmp_path):
    """P5: ten thousand failures are a few causes; each has examples, a traceback and the command that releases them."""
    store = Store(str(tmp_path / "a root"))
    fill(store)
    (cause,) = update_report(store).document["causes"]
    assert (cause["class"], cause["message"], cause["count"]) == ("GPU_OOM", "# GiB are missing", 2)
    assert [(example["key"], example["shard"]) for example in cause["examples"]] == [("s004", 0), ("s006", 1)]
    assert cause["retry"] == f"hv-batch retry '{store.url}' --class GPU_OOM"


def test_gpu_seconds_count_every_rank_and_decoder(tmp_path):
    """A group of 2 ranks denoises for 10 s; encoders and decoders hold one GPU by default."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    totals = update_report(store).document["totals"]
    assert totals["gpu_seconds"] == {"encode": 1.5, "denoise": 60.0, "decode": 6.0}
    assert totals["media"] == {"bytes": 3000, "frames": 51, "seconds": round(3 * 17 / 24, 3)}


EXTRA = {"topic": "birds", "take": 3, "state": "Ohio", "height_file_name": "x", "ok": True, "tags": ["a"], "f": 0.5}


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_sealed_shard_is_read_from_its_tables(tmp_path, is_damaged):
    """P7: three requests instead of one for each record, with the same result; damaged tables are not used."""
    store = CountingStore(str(tmp_path / "root"))
    open_root(store, 4, device="cuda")
    taken = [make_sample(number, extra={**EXTRA, "take": number}) for number in range(1, 5)]
    kinds = {"topic": "text", "take": "int", "state": "text", "height_file_name": "text", "ok": "bool", "tags": "json"}
    publish_plan(store, taken, extra_kinds={**kinds, "f": "float"})
    places = {"worker": "denoise-0.0", "node": "n", "tokens_lost": 2}
    stages = {"encode": {"seconds": 0.123, **places}, "denoise": {"seconds": 9.5, **places, "ranks": 4}}
    for sample in taken[:3]:
        poster = layout.poster_key(0, sample.key, "ab" * 32)
        store.put(poster, b"jpeg")
        commits.commit(store, make_commit(sample, stages=stages, scores=BLACK, poster=poster))
    commits.quarantine(store, make_quarantine(taken[3]))
    update_report(store)
    from_records = written(store)
    seal_shard(store, 0, [sample.key for sample in taken], read_index(store).extra_kinds)
    if is_damaged:
        store.put(layout.lineage_key(0), store.get(layout.metadata_key(0)))
    CountingStore.records = 0
    update_report(store)
    from_tables = written(store)
    assert (CountingStore.records == 1) is not is_damaged, "only the quarantine record is read"
    for found in (from_records, from_tables):
        found[layout.report_digest_key(0)] |= {"state": "", "sealed": True}
        found[layout.REPORT_DATA]["finished"] = True
    assert from_tables == from_records


def test_records_of_an_unchanged_shard_are_read_once(tmp_path):
    """P7: a later report, also of another process, reads the records of the changed shards only."""
    store = CountingStore(str(tmp_path / "root"))
    fill(store)
    assert update_report(store).shards_read == 2
    CountingStore.records = 0
    again = update_report(store)
    assert (CountingStore.records, again.shards_read) == (0, 0)
    commits.commit(store, make_commit(make_sample(7)))
    CountingStore.records = 0
    assert Reporter(store).update().shards_read == 1
    assert CountingStore.records <= 2


def test_a_driver_does_not_list_its_finished_shards_again(tmp_path, monkeypatch):
    """P7: the reports during a run cost one request for each finished shard; the last one looks at everything."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    expected = update_report(store).document
    listed: list[int] = []
    list_one = update.list_shard
    monkeypatch.setattr(
        update, "list_shard", lambda store, shard, *rest: listed.append(shard) or list_one(store, shard, *rest)
    )
    document = update_report(store, running=True).document
    assert listed == [1], "shard 0 is finished, and shard 2 holds no object"
    assert {name: document[name] for name in ("totals", "shards", "facets")} == {
        name: expected[name] for name in ("totals", "shards", "facets")
    }
    commits.commit(store, make_commit(make_sample(4)))  # late, after the seal
    assert update_report(store, running=True).document["totals"]["committed"] == 3
    assert update_report(store, running=False).document["totals"]["committed"] == 4


def test_a_driver_lists_a_shard_that_was_opened_again(tmp_path):
    """P2: after `retry`, also the reports during the run show that its samples are pending."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    assert update_report(store).document["totals"]["quarantined"] == 2
    release(store, list(read_quarantined(store, [0])))
    totals = update_report(store, running=True).document["totals"]
    assert (totals["quarantined"], totals["pending"]) == (1, 4)


OPERATIONS = st.lists(
    st.one_of(
        *(st.tuples(st.just(name), st.integers(1, 9)) for name in ("commit", "quarantine", "withdraw", "retry")),
        st.tuples(st.sampled_from(["seal", "report"]), st.integers(0, 2)),
    ),
    max_size=12,
)


def act(store: Store, operation: str, number: int) -> None:
    if operation == "commit":
        commits.commit(store, make_commit(make_sample(number)))
    elif operation == "quarantine":
        commits.quarantine(store, make_quarantine(make_sample(number)))
    elif operation == "withdraw":
        unseal_shard(store, make_sample(number).shard)
        withdraw_sample(store, number)
    elif operation == "retry":
        shard = make_sample(number).shard
        release(store, list(read_quarantined(store, [shard])))
    elif operation == "seal":
        keys = KEYS[4 * number : 4 * number + 4]
        done = commits.scan_shard(store, number).terminal
        if done >= set(keys):
            seal_shard(store, number, keys)
    else:
        update_report(store)


@settings(max_examples=12)
@given(OPERATIONS)
def test_an_incremental_report_equals_one_from_scratch(operations):
    """P2: whatever happens between two reports, the next one says what the records say."""
    store = new_memory()
    open_root(store, 9)
    publish_plan(store, [make_sample(number) for number in range(1, 10)])
    for operation, number in operations:
        act(store, operation, number)
    update_report(store)
    incremental = written(store)
    for key in list(store.list("report")):
        if key.startswith(("report/parts", "report/digests")):
            store.delete(key)
    update_report(store)
    stale = {key for key in incremental if key not in written(store)}
    # The part of a shard whose last record was released stays; nothing names it.
    assert {key: value for key, value in incremental.items() if key not in stale} == written(store)
    assert all(
        shard["part"] is None
        for shard in incremental[layout.REPORT_DATA]["shards"]
        if any(layout.report_part_key(shard["shard"]) == key for key in stale)
    )


TEXTS = st.one_of(st.text(max_size=40), st.just(HOSTILE))


@settings(max_examples=15)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_hostile_texts_stay_data(prompt, message, column, value):
    """P5: no text of a record can end the script element; a browser reads what the record says."""
    store = new_memory()
    open_root(store, 2)
    commits.commit(store, make_commit(make_sample(1, prompt=prompt or "x", extra={column: value})))
    bad = make_quarantine(make_sample(2, prompt=prompt or "x"), make_failure(message=message, traceback=message))
    commits.quarantine(store, bad | {"id": message or "x"})
    made = update_report(store)
    page = made.page.decode()
    data = page.partition('id="report">')[2].partition("</script>")[0]
    assert "<" not in data
    shown = embedded(made.page)
    assert shown["first"] == [{**sample, "shard": 0} for sample in part(store, 0)]
    assert shown["first"][0]["prompt"] == report_samples.clamp(prompt or "x", report_samples.MAX_PROMPT_CHARS)
    parse(DigestDocument, store.get(layout.report_digest_key(0)))


def test_damaged_records_are_counted_and_marked(tmp_path):
    """P5: a record that cannot be read does not prevent the report, with and without the plan."""
    for planned in (True, False):
        store = Store(str(tmp_path / f"root-{planned}"))
        fill(store, planned=planned)
        store.delete(layout.metadata_key(0))  # a sealed shard is read from its tables
        store.put(layout.commit_key(0, "s002"), b'{"schema": "hv_batch/commit/1", "key": "../../etc"}')
        store.put(layout.quarantine_key(1, "s006"), b"\xff")
        store.put(layout.withdrawn_key(1, "s005"), b"[]")
        document = update_report(store).document
        assert [document["totals"][name] for name in ("committed", "quarantined", "withdrawn")] == [3, 2, 1]
        by_key = {sample["key"]: sample for sample in part(store, 0) + part(store, 1)}
        assert (by_key["s002"]["state"], by_key["s002"]["flags"]) == ("committed", ["damaged"])
        assert by_key["s002"]["file"] is None
        assert (by_key["s006"]["state"], by_key["s006"]["class"]) == ("quarantined", "(unreadable)")


DAMAGED = [
    pytest.param(key, data, marks=[] if data == b"{}" else [pytest.mark.slow])
    for key in (layout.report_part_key(0), layout.report_digest_key(0), layout.REPORT_DATA)
    for data in (b"", b"{}", b'{"schema":"hv_batch/report_digest/1","shard":0}', b"<script>")
]


@pytest.mark.parametrize(("key", "data"), DAMAGED)
def test_damaged_objects_of_a_report_are_written_again(tmp_path, key, data):
    """P2: nothing of an earlier report is used that its schema has not accepted."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    update_report(store)
    expected = written(store)
    store.put(key, data)
    update_report(store)
    assert written(store) == expected


def test_the_price_of_the_last_report_stays(tmp_path):
    store = Store(str(tmp_path / "root"))
    fill(store)
    assert update_report(store).document["totals"]["price_per_gpu_hour"] is None
    update_report(store, price_per_gpu_hour=2.5)
    assert update_report(store).document["totals"]["price_per_gpu_hour"] == 2.5


def test_a_live_lease_makes_the_page_refresh_itself(tmp_path):
    """While a driver holds the lease, the report says so; a driver can say that this is its last report."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    with hold_lease(store, this_process("run")):
        document = update_report(store).document
        assert document["running"]
        assert document["refresh_s"] > 0
        assert not update_report(store, running=False).document["running"]
    assert update_report(store).document["refresh_s"] is None


def test_records_of_other_samples_are_left_out(tmp_path):
    """A record that no sample of the plan has is foreign; without a plan, every valid name counts."""
    store = Store(str(tmp_path / "root"))
    fill(store)
    store.put(layout.commit_key(0, "s099"), store.get(layout.commit_key(0, "s001")))
    assert update_report(store).document["totals"]["committed"] == 3
    assert "s099" not in {sample["key"] for sample in part(store, 0)}


@pytest.mark.parametrize("name", ["revision-1", pytest.param("revision-2", marks=pytest.mark.slow), "dataset-2"])
def test_roots_of_earlier_versions_have_a_report(tmp_path, name):
    """P2: every old root is readable, also without posters, events and scores."""
    root = shutil.copytree(ROOT / "tests/support/data/roots" / name, tmp_path / "root")
    document = update_report(Store(str(root))).document
    totals = document["totals"]
    assert totals["samples"] == totals["committed"] + totals["quarantined"]
    assert document["finished"]
    assert document["progress"][-1][1:] == [totals["committed"], totals["quarantined"], 0]
    assert {row["stage"] for row in document["timeline"]["rows"]} == {"denoise", "decode"}


def test_a_run_of_too_many_shards_is_refused(tmp_path):
    """P7: a run.json may name 10^9 samples; the report has a line for each shard."""
    store = Store(str(tmp_path / "root"))
    open_root(store, 900_000)
    with pytest.raises(UserError, match=r"225,000 shards.*output\.shard_size"):
        update_report(store)


def test_a_root_without_a_run_is_refused(tmp_path):
    """P6: a mistyped path does not become a report."""
    with pytest.raises(UserError):
        update_report(Store(str(tmp_path / "nothing")))
    assert not Path(tmp_path / "nothing").exists()
