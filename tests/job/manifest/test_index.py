"""hv_batch.job.manifest.index: a run reads its samples from the output root, and ignores an invalid index."""

import json
import os
import uuid
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest import check
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.index import load_index, load_recorded_index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def config_of(**sections):
    return RunConfig.model_validate(sections)


def memory():
    return Store(f"memory://{uuid.uuid4().hex}")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Manifest(str(path))


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """Processes take a second to start, so only one test uses them."""
    monkeypatch.setattr(check.os, "cpu_count", lambda: 1)


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of 100 rows in several parts, some rows with more than one video."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", 1000)
    rows = [{"prompt": f"p {n}", "seed": n, "num_videos": 1 + n % 3, "take": n / 7, "tags": ["ä"]} for n in range(100)]
    return write(tmp_path / "m.jsonl", rows)


@pytest.fixture
def published(manifest):
    """(output root, config) of a run that has started."""
    config, store = config_of(output={"shard_size": 7}), memory()
    check_manifest(manifest, config, memory()).publish(store)
    return store, config


def fresh(manifest):
    return Manifest(manifest.name)


def forbid_reading(monkeypatch):
    def read(*_):
        raise AssertionError("the manifest was read")

    for name in ("chunks", "read_digest"):
        monkeypatch.setattr(Manifest, name, read)


def test_a_loaded_index_gives_the_same_samples_without_the_manifest(manifest, published, monkeypatch):
    """P2, P3: the next start does not read the manifest, and all samples are equal in all fields."""
    store, config = published
    expected = check_manifest(manifest, config, memory())
    forbid_reading(monkeypatch)
    index = load_index(store, fresh(manifest), config)
    assert index.summary == expected.summary
    assert list(index) == list(expected)
    assert len(list(index)) == index.summary.samples == 199
    assert [sample.shard for sample in index] == [n // 7 for n in range(199)]
    assert index.samples(28) == list(index)[196:]
    assert [index.size(shard) for shard in (0, 28)] == [7, 3]


@settings(deadline=None, max_examples=50)  # a busy machine is not a failure
@given(
    videos=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    shard_size=st.integers(1, 8),
    chunk_bytes=st.integers(1, 200),
)
def test_every_shard_holds_its_slice(videos, shard_size, chunk_bytes, tmp_path_factory):
    """P3: property: parts, shards and the videos of a row may overlap in any way."""
    rows = [{"prompt": "a", "id": f"r{at}", "num_videos": count} for at, count in enumerate(videos)]
    manifest = write(tmp_path_factory.mktemp("m") / "m.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CHUNK_BYTES", chunk_bytes)
        index = check_manifest(manifest, config_of(output={"shard_size": shard_size}), memory())
    expected = [(f"r{at}", video) for at, count in enumerate(videos) for video in range(count)]
    shards = [[(sample.id, sample.video_index) for sample in index.samples(shard)] for shard in range(index.shards)]
    assert list(chain(*shards)) == expected
    assert list(map(len, shards)) == [index.size(shard) for shard in range(index.shards)]


def test_several_processes_give_the_same_result_as_one(manifest, tmp_path, monkeypatch):
    """P3, P6: the number of validating processes changes neither the problems found nor their order."""
    rows = [{"prompt": "a", "id": f"shot-{n}", "height": 719 + n % 2} for n in range(100)] * 2
    bad = write(tmp_path / "bad.jsonl", rows)

    def results():
        with pytest.raises(UserError) as caught:
            check_manifest(fresh(bad), config_of(), memory())
        return str(caught.value), check_manifest(fresh(manifest), config_of(), memory())

    text, index = results()
    assert 'row 101: id = "shot-0"; allowed: an id that no other row has; row 1 has it too' in text
    monkeypatch.setattr(check.os, "cpu_count", lambda: 2)
    text_of_two, index_of_two = results()
    assert text_of_two == text
    assert index_of_two.summary == index.summary
    assert list(index_of_two) == list(index)


def test_equal_hashes_are_compared_as_keys(tmp_path, monkeypatch):
    """P6: 8 bytes a sample detect each duplicate key, and a collision of hashes is not reported."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", 1000)
    rows = [{"prompt": "a", "id": f"shot-{n}"} for n in range(200)] + [{"prompt": "b", "id": "SHOT-3"}]
    with pytest.raises(
        UserError, match=r"row 201: id = .SHOT-3.; allowed: an id that differs not only by case; row 4 has .shot-3."
    ) as caught:
        check_manifest(write(tmp_path / "m.jsonl", rows), config_of(), memory())
    assert "has 1 problem(s) in 201 row(s)" in str(caught.value)
    monkeypatch.setattr("hv_batch.job.manifest.row_validation.hash_key", lambda key: bytes(8))  # every two keys collide
    monkeypatch.setattr(check, "hash_key", lambda key: bytes(8))
    index = check_manifest(write(tmp_path / "m.jsonl", rows[:-1]), config_of(), memory())
    assert index.summary.samples == 200


def test_a_touched_or_copied_manifest_is_compared_by_its_bytes(manifest, published, tmp_path, monkeypatch):
    """P2: a manifest with the same content but another time, name or place is hashed again, but not validated again."""
    store, config = published
    monkeypatch.setattr(Manifest, "chunks", lambda *_: pytest.fail("the manifest was validated again"))
    os.utime(manifest.name, (1, 1))
    assert load_index(store, fresh(manifest), config)
    copy = tmp_path / "copy.jsonl"
    with open(manifest.name, "rb") as file:
        copy.write_bytes(file.read())
    assert load_index(store, Manifest(str(copy)), config)
    copy.write_text('{"prompt": "another"}\n')
    assert load_index(store, Manifest(str(copy)), config) is None


def _damage_document(change):
    def damage(store):
        document = json.loads(store.get(layout.INDEX))
        change(document)
        store.put(layout.INDEX, json.dumps(document).encode())

    return damage


def _damage_part(store):
    part = sorted(store.list("plan/"))[1]
    store.put(part, store.get(part)[:-1] + b"x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: store.delete(layout.INDEX),
        lambda store: store.put(layout.INDEX, b"{cut sho"),
        lambda store: store.put(layout.INDEX, b"[]"),
        lambda store: store.put(layout.INDEX, b"\xff"),
        _damage_document(lambda document: document.update(schema="hv_batch/plan/0")),
        _damage_document(lambda document: document.update(key="of other defaults")),
        _damage_document(lambda document: document.pop("parts")),
        _damage_document(lambda document: document["summary"].update(surprise=1)),
        _damage_document(lambda document: document["summary"].update(extra_kinds={"take": "unheard"})),
        _damage_part,
        lambda store: store.delete(sorted(store.list("plan/"))[1]),
    ],
)
def test_an_invalid_index_is_ignored(manifest, published, damage):
    """P2: a damaged or foreign index is treated as missing, and publishing again repairs it."""
    store, config = published
    assert load_index(store, fresh(manifest), config)
    damage(store)
    assert load_index(store, fresh(manifest), config) is None
    check_manifest(fresh(manifest), config, memory()).publish(store)
    assert load_index(store, fresh(manifest), config)


def test_other_defaults_need_another_index(manifest, published):
    """P6: rows that are valid with one default may be invalid with another."""
    store, _ = published
    assert load_index(store, fresh(manifest), config_of(defaults={"num_videos": 2})) is None
    assert load_index(store, fresh(manifest), config_of(groups={"count": 3}))


def test_a_part_that_is_lost_during_a_run_is_reported_by_name(manifest, published):
    """P2: the error names the part, and says that no commit is lost and what to do."""
    store, config = published
    index = load_index(store, fresh(manifest), config)
    last = sorted(store.list("plan/"))[-1]
    store.delete(last)
    assert index.samples(0)
    with pytest.raises(UserError, match=rf"{last} in the output root .* is missing or damaged"):
        index.samples(index.shards - 1)


def test_a_missing_manifest_is_reported_even_with_an_index(manifest, published):
    """P6: a command that names a missing manifest is an error, whatever the output root contains."""
    store, config = published
    os.remove(manifest.name)
    with pytest.raises(UserError, match="does not exist"):
        load_index(store, fresh(manifest), config)


def test_the_index_of_a_root_needs_no_manifest(manifest, published):
    """P2: a complete index with the recorded digest is used though the manifest is gone; a damaged one never is."""
    store, config = published
    expected = check_manifest(manifest, config, memory())
    os.unlink(manifest.name)
    index = load_recorded_index(store, config, expected.summary.digest)
    assert index is not None
    assert list(index) == list(expected)
    assert load_recorded_index(store, config, "0" * 64) is None
    store.delete(next(key for key in store.list("plan") if key.endswith(".parquet")))
    assert load_recorded_index(store, config, expected.summary.digest) is None
