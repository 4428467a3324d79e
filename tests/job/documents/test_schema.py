"""What an output root may hold: valid objects pass unchanged, and everything else is refused with the object's key."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from hv_batch.job import layout
from hv_batch.job.dataset.shard_totals import add_up
from hv_batch.job.documents import schema
from hv_batch.job.documents.reading import InvalidObjectError, parse, parse_row, read
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.lease_holder import encode_holder, this_process
from hv_batch.job.records.withdrawn import tombstone
from hv_batch.job.storage.canonical_json import MAX_BYTES, decode, encode
from hv_batch.job.storage.store import Store
from tests.support.plans import publish_plan
from tests.support.rendered_roots import make_commit, make_failure, make_quarantine, make_sample
from tests.support.small_runs import run_small, some_samples

COMMIT = make_commit(make_sample(1), failures=[make_failure()], poster=layout.poster_key(0, "s001", "ab" * 32))
PLACE = {"key": "s003", "id": "s003", "row": 3, "video_index": 0, "shard": 0}
TOMBSTONE = tombstone(PLACE, reason="a face", sha256="ab" * 32)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[type, dict[str, Any]]:
    """One valid object of each kind."""
    store = Store(str(tmp_path_factory.mktemp("root")))
    run_small(store, some_samples(6))
    publish_plan(store, some_samples(6))
    return {
        schema.CommitRecord: COMMIT,
        schema.QuarantineRecord: make_quarantine(make_sample(2)),
        schema.RetriedRecord: make_quarantine(make_sample(2)),
        schema.WithdrawnRecord: TOMBSTONE,
        schema.RunDocument: decode(store.get(layout.RUN)),
        schema.ChoicesDocument: {
            "schema": "hv_batch/choices/1",
            "choices": {"attention": "cudnn"},
            "worker": "denoise-0",
            "node": "10.0.0.1",
            "chosen_at": "2026-11-28T22:00:00+00:00",
        },
        schema.LeaseDocument: decode(encode_holder(this_process("run"))),
        schema.IndexDocument: decode(store.get(layout.INDEX)),
        schema.TotalsDocument: add_up([COMMIT]).to_dict(),
        schema.SummaryDocument: aggregate(store),
        schema.StoredStages: {"denoise": {"seconds": 1.5, "node": "n1", "worker": "denoise-0", "ranks": 2}},
    }


READ = [
    schema.CommitRecord,
    schema.QuarantineRecord,
    schema.RetriedRecord,
    schema.WithdrawnRecord,
    schema.RunDocument,
    schema.ChoicesDocument,
    schema.LeaseDocument,
    schema.IndexDocument,
    schema.TotalsDocument,
    schema.SummaryDocument,
    schema.StoredStages,
]

HOSTILE = [None, True, -1, 2**70, 1e300, "", "x" * 2000, "/tmp/x", "../../x", "\ud800", [], [[1]], {}, {"a": {"b": 1}}]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def put(document: dict, path: tuple, value: Any) -> dict:
    changed = copy.deepcopy(document)
    *parents, last = path
    place: Any = changed
    for name in parents:
        place = place[name]
    place[last] = value
    return changed


@pytest.mark.parametrize("model", READ)
def test_a_valid_object_passes_unchanged(documents, model):
    assert parse(model, encode(documents[model])) == json.loads(encode(documents[model]))


@pytest.mark.parametrize("model", READ)
def test_no_value_in_any_field_raises_anything_but_a_sentence(documents, model):
    """P1: every field of every kind of object with each of a list of hostile values."""
    for path in places(documents[model]):
        for value in HOSTILE:
            with suppress(ValueError):
                parse(model, encode(put(documents[model], path, value)))


TYPED = {
    schema.CommitRecord: "key id row video_index shard params fps extra file sha256 bytes poster frames_sha256 "
    "produced stages places attempts history versions fingerprint licence created_at schema",
    schema.QuarantineRecord: "key id row video_index shard params class message traceback attempts history schema",
    schema.WithdrawnRecord: "schema key id row video_index shard reason sha256 withdrawn_at version",
    schema.RunDocument: "schema identity fingerprint config manifest versions",
    schema.LeaseDocument: "token purpose host machine pid process job since beats beat_at",
    schema.IndexDocument: "schema key files summary parts",
    schema.TotalsDocument: "schema committed bytes frames stage_ms denoise_ms timed embeddings retries frames_by_fps",
    schema.SummaryDocument: "schema fingerprint samples committed quarantined pending shards shards_sealed",
}


@pytest.mark.parametrize(
    ("model", "field"), [(model, name) for model, names in TYPED.items() for name in names.split()]
)
def test_a_field_of_a_wrong_type_is_refused_by_name(documents, model, field):
    """P1: true is not a number, a list is not a text; no value is converted."""
    wrong: Any = True if not isinstance(documents[model][field], dict) else [1]
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        parse(model, encode(documents[model] | {field: wrong}))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "/tmp/x", "file": "data/shard-00000//tmp/x-aaaaaaaa.mp4"},
        {"key": "../x"},
        {"key": "a/b"},
        {"file": COMMIT["file"].replace("s001", "s002")},
        {"file": COMMIT["file"].replace("shard-00000", "shard-00001")},
        {"file": COMMIT["file"].replace(".mp4", ".png")},
        {"file": "/etc/passwd"},
        {"sha256": "0" * 64},
        {"poster": layout.poster_key(0, "s002", "ab" * 32)},
        {"poster": "data/shard-00000/metadata.parquet"},
        {"bytes": -1},
        {"fps": 0},
        {"params": COMMIT["params"] | {"height": 65_536}},
        {"params": COMMIT["params"] | {"seed": 2**63}},
        {"stages": {"denoise": -1.0}},
    ],
)
def test_paths_follow_from_shard_key_and_hash(changes):
    """P1: a record cannot name the file of another sample, nor anything outside its shard."""
    with pytest.raises(ValueError, match=r"its file is|allowed|its poster is|greater than"):
        parse(schema.CommitRecord, encode(COMMIT | changes))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000, "nested deeper"),
        (b'{"a": "' + b"\\" * 100_001, "not a JSON object"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": -Infinity}', "not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (b"\xff\xfe{\x00}\x00", "not a JSON object"),
        (b" " * (MAX_BYTES + 1), "at most"),
        (b"3", "not an object"),
        (b"", "not a JSON object"),
    ],
)
def test_an_object_is_bounded_before_it_is_parsed(data, said):
    """P1, P7: nesting, size and numbers; brackets inside texts do not count."""
    with pytest.raises(ValueError, match=said):
        parse(schema.RetriedRecord, data)
    parse(schema.RetriedRecord, json.dumps({"history": [], "note": "[" * 100_000 + '\\"'}).encode())


def test_an_error_names_the_object_and_travels_between_processes(tmp_path):
    """P5: the key, the root and the remedy are in the message, also after Ray has pickled it."""
    store = Store(str(tmp_path / "root"))
    store.put(layout.commit_key(0, "s001"), encode(COMMIT | {"key": "s002"}))
    with pytest.raises(InvalidObjectError) as caught:
        read_commit(store, 0, "s001")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.key == "commits/shard-00000/s001.json"
        assert "its file is 'data/shard-00000/s001-" in error.problem
        assert "verify --repair" in str(error)
    store.put(layout.LEASE, b"[]")
    with pytest.raises(InvalidObjectError, match=r"lease\.json"):
        read(store, layout.LEASE, schema.LeaseDocument)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("/tmp/x", [{"prompt": "a"}, {}]),
        ("a", {}),
        ("a", [{"prompt": 3}, {}]),
        ("a", [{"prompt": "a", "height": 65_536}, {}]),
        ("a", [{"prompt": "a", "unknown": 1}, {}]),
        ("a", [{"prompt": "a", "num_videos": 10**9}, {}]),
        ("a", [{"prompt": "a"}, []]),
    ],
)
def test_a_row_of_the_index_is_checked_again(key, content):
    """P1: `plan/` lies in the root, so its rows are no more trusted than a manifest."""
    with pytest.raises(ValueError, match=r"not allowed|allowed:|unknown columns|pair of objects"):
        parse_row(key, json.dumps(content))
    assert parse_row("a", '[{"prompt": "a"}, {"b": [1]}]') == ({"prompt": "a"}, {"b": [1]})
