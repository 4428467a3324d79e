"""Batched writes give the same guarantees for each object as single writes."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.records.commits import commit_all, read_commit
from hv_batch.job.storage.store import Store
from tests.support.doubles import Crash
from tests.support.records import SAMPLE, a_commit

KEYS = st.sampled_from([f"{folder}/{name}" for folder in ("data", "data/a", "commits") for name in "xyz"])
OBJECTS = st.dictionaries(KEYS, st.binary(max_size=20))
SHARD, NAMES = SAMPLE.shard, ("fox.v1", "hen.v1", "owl.v1")


def content(store):
    return {key: store.get(key) for key in store.list("data") or ()} | {
        key: store.get(key) for key in store.list("commits")
    }


@given(OBJECTS, OBJECTS, st.sampled_from(["put_new", "put", "put_file"]))
def test_a_batch_equals_single_writes(there, coming, act):
    """P1: existing objects are kept or replaced as by single writes, and the return values are the same."""
    with tempfile.TemporaryDirectory() as folder:
        single, many = Store(f"{folder}/single"), Store(f"{folder}/many")
        for store in (single, many):
            store.put_all(there)
        if act == "put_new":
            assert many.put_new_all(coming) == [single.put_new(key, data) for key, data in coming.items()]
        elif act == "put":
            many.put_all(coming)
            for key, data in coming.items():
                single.put(key, data)
        else:
            paths = {key: Path(folder, str(number)) for number, key in enumerate(coming)}
            for key, path in paths.items():
                path.write_bytes(coming[key])
                single.put_file(key, path)
            many.put_finished(paths)
        assert content(many) == content(single)
        assert not many.leftovers()


def test_a_batch_in_any_store(any_store, tmp_path):
    """P1: the same in memory and in an object store, where each object is a request of its own."""
    files = {f"data/{number}.png": tmp_path / f"{number}.png" for number in range(40)}
    for number, path in enumerate(files.values()):
        path.write_bytes(b"%d" % number)
    any_store.put("commits/3.json", b"first")
    any_store.put_finished(files)
    any_store.put_all({f"latents/{number}": b"%d" % number for number in range(40)})
    created = any_store.put_new_all({f"commits/{number}.json": b"%d" % number for number in range(40)})
    assert created == [number != 3 for number in range(40)]
    for number in range(40):
        expected = b"%d" % number
        assert any_store.get(f"data/{number}.png") == any_store.get(f"latents/{number}") == expected
        assert any_store.get(f"commits/{number}.json") == (b"first" if number == 3 else expected)


@pytest.fixture
def acts(monkeypatch):
    """The flushes, links and renames, in order: ("flush", path) and ("name", old, new)."""
    found = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def flush(descriptor):
        found.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def naming(act):
        def name(old, new, *, src_dir_fd=None, dst_dir_fd=None, **options):
            folders = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd}
            act(old, new, **folders, **options)
            found.append(("name", path_of(old, src_dir_fd), path_of(new, dst_dir_fd)))

        return name

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "link", naming(link))
    monkeypatch.setattr(os, "replace", naming(replace))
    return found


def path_of(name, folder):
    """The path of `name` in the folder with this descriptor."""
    return str(name) if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)


@pytest.mark.parametrize("act", ["put_new_all", "put_all", "put_finished"])
def test_bytes_are_flushed_before_names_and_names_before_the_return(act, acts, tmp_path):
    """P1: a power failure at any moment leaves complete objects only, and all of them once the call has returned."""
    store = Store(str(tmp_path / "root"))
    if act == "put_finished":
        given = {f"data/{name}": tmp_path / name for name in NAMES}
        for path in given.values():
            path.write_bytes(b"bytes")
    else:
        given = {f"data/{name}": b"bytes" for name in NAMES}
    getattr(store, act)(given)
    named = [act for act in acts if act[0] == "name" and ".draft-" not in act[2]]
    assert sorted(new for _, _, new in named) == sorted(f"{store.url}/data/{name}" for name in NAMES)
    for naming in named:
        before = acts[: acts.index(naming)]
        # A draft that is a hard link has the bytes of its source, which was flushed.
        sources = {naming[1]} | {old for kind, old, *new in before if kind == "name" and new == [naming[1]]}
        assert any(("flush", source) in before for source in sources)
    assert ("flush", f"{store.url}/data") in acts[acts.index(named[-1]) :]


def test_a_crash_between_any_two_names(tmp_path, monkeypatch):
    """P1: whatever part of a micro-batch is committed, its media are stored, and the rest can be committed again."""
    records = [{**a_commit(), "key": name, "file": layout.media_key(SHARD, name, "ab" * 32, ".mp4")} for name in NAMES]
    link, seen = os.link, set()
    for survivors in count():
        store = Store(str(tmp_path / str(survivors)))
        files = {record["file"]: tmp_path / f"{survivors}-{record['key']}" for record in records}
        for path in files.values():
            path.write_bytes(b"media")
        left = [survivors]

        def dying(old, new, left=left, **folders):
            if not left[0]:
                raise Crash
            left[0] -= 1
            link(old, new, **folders)

        monkeypatch.setattr(os, "link", dying)
        try:
            store.put_finished(files)
            commit_all(store, records)
        except Crash:
            crashed = True
        else:
            crashed = False
        monkeypatch.setattr(os, "link", link)
        committed = layout.sample_keys(store.list(layout.commit_dir(SHARD)))
        seen.add(len(committed))
        for name in committed:
            assert store.get(read_commit(store, SHARD, name)["file"]) == b"media"
        again = [{**record, "attempts": 9} for record in records]
        store.put_finished(files)
        assert commit_all(store, again) == [record["key"] not in committed for record in records]
        if not crashed:
            break
    assert seen == {0, 1, 2, 3}
