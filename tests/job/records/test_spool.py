"""What waits on a node's disk for an output root that does not answer: P1, P2, P4, P7."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.records import commits
from hv_batch.job.records import spool as spooling
from hv_batch.job.records.spool import DrainResult, Spool
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from tests.support.doubles import Crash, CrashingStore
from tests.support.rendered_roots import FINGERPRINT, RenderedMedia, make_commit, make_sample

AWAY = StorageUnavailableError("s3://bucket/run: 503")
SIZE = 1000  # bytes of a video here


@pytest.fixture
def root(tmp_path):
    return Store(str(tmp_path / "root"))


@pytest.fixture
def settings(tmp_path):
    """Room for ten videos, on a disk that others need nothing of."""
    return OutputConfig(spool_gib=10 * SIZE / 2**30, spool_folder=str(tmp_path / "disk"))


@pytest.fixture
def spool(root, settings):
    return Spool(settings, root, FINGERPRINT)


def make_video(tmp_path: Path, number: int) -> tuple[dict, dict[str, Path]]:
    """A record, and the files that it names by their keys: a video and its poster."""
    sample = make_sample(number)
    video, poster = (tmp_path / f"{sample.key}{suffix}" for suffix in (".mp4", ".jpg"))
    video.write_bytes(hashlib.sha256(sample.key.encode()).digest() * (SIZE // 32))
    poster.write_bytes(sample.key.encode())
    digest, poster_digest = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (video, poster))
    file = layout.media_key(sample.shard, sample.key, digest, ".mp4")
    poster_file = layout.poster_key(sample.shard, sample.key, poster_digest)
    media = RenderedMedia(video.stat().st_size, digest, digest[::-1], 17, 128, 96)
    return make_commit(sample, file=file, poster=poster_file, media=media), {file: video, poster_file: poster}


def go_away(monkeypatch: pytest.MonkeyPatch, root: Store, after: int = 0) -> None:
    """From its act number `after` on, the root does not answer."""
    acts: list[str] = []

    def away(name, act):
        def wrapped(self, *arguments):
            if self.url == root.url:
                acts.append(name)
                if len(acts) > after:
                    raise AWAY
            return act(self, *arguments)

        return wrapped

    for name in ("exists", "put_file", "put_new", "delete"):
        monkeypatch.setattr(Store, name, away(name, getattr(Store, name)))


def left_on_disk(settings: OutputConfig) -> list[str]:
    return sorted(path.name for path in Path(settings.spool_folder).rglob("[!.]*") if path.is_file())


def assert_committed(root: Store, *videos: tuple[dict, dict[str, Path]]) -> None:
    assert [Path(name).stem for name in root.list(layout.COMMITS)] == [record["key"] for record, _ in videos]
    for record, files in videos:
        stored = commits.read_commit(root, record["shard"], record["key"])
        assert {**stored, "created_at": ""} == {**record, "created_at": ""}
        assert stored["created_at"] >= record["created_at"]
        for name, path in files.items():
            assert root.get(name) == path.read_bytes()


def test_what_waits_is_committed_when_the_root_answers_again(tmp_path, root, settings, spool, monkeypatch):
    """P1, P2: record, video and poster are those that an undisturbed commit had left; nothing stays on the disk."""
    videos = [make_video(tmp_path, number) for number in (1, 2, 3)]
    for record, files in videos:
        root.put(layout.latent_key(record["shard"], record["key"]), b"latents")
        assert spool.add(record, files)
    with monkeypatch.context() as outage:
        go_away(outage, root)
        assert spool.drain() == DrainResult((), str(AWAY))
    assert spool.drain() == DrainResult(("s001", "s002", "s003"))
    assert_committed(root, *videos)
    assert not list(root.list("latents/"))
    assert left_on_disk(settings) == []


@pytest.mark.parametrize("after", range(1, 16))
def test_an_outage_in_the_middle_loses_nothing(tmp_path, root, settings, spool, monkeypatch, after):
    """P1, P2: wherever the root goes away again, what was told committed is, and the rest is still there."""
    videos = [make_video(tmp_path, number) for number in (1, 2, 3)]
    for video in videos:
        assert spool.add(*video)
    with monkeypatch.context() as outage:
        outage.setattr(spooling, "UPLOADS_AT_ONCE", 1)
        go_away(outage, root, after)
        first = spool.drain()
    assert first.outage
    second = spool.drain()
    assert sorted(first.committed + second.committed) == ["s001", "s002", "s003"]
    assert_committed(root, *videos)
    assert left_on_disk(settings) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(3))
def test_a_death_while_it_is_kept_leaves_a_whole_entry_or_none(tmp_path, root, settings, spool, at, when):
    """P1: a decoder that dies between any two of its writes leaves nothing that could be committed wrongly."""
    record, files = make_video(tmp_path, 1)
    spool._local = CrashingStore(spool._local.url, at, when)
    with pytest.raises(Crash):
        spool.add(record, files)
    whole = (at, when) == (2, "after")
    assert Spool(settings, root, FINGERPRINT).drain() == DrainResult(("s001",) if whole else ())
    assert len(list(root.list(layout.COMMITS))) == whole
    assert spool.add(record, files), "the next try takes its place"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(7))
def test_a_death_while_it_is_committed_is_made_good(tmp_path, root, settings, spool, at, when):
    """P1, P2: between any two writes, at the root or on the disk: one record, and nothing stays on the disk."""
    video = make_video(tmp_path, 1)
    assert spool.add(*video)
    acts = CrashingStore(root.url, at, when)
    local = CrashingStore(spool._local.url)
    acts.acts = local.acts  # counted together
    local.at, local.when = at, when
    spool._root, spool._local = acts, local
    with pytest.raises(Crash):
        spool.drain()
    again = Spool(settings, root, FINGERPRINT)
    is_gone = not list(again._local.list(layout.COMMITS))
    assert again.drain() == DrainResult(() if is_gone else ("s001",))
    assert_committed(root, video)


def test_a_record_that_is_there_stays(tmp_path, root, settings, spool):
    """P1: who was rendered again meanwhile keeps the later record, and nothing is uploaded beside it."""
    other = make_commit(make_sample(1))
    commits.commit(root, other)
    assert spool.add(*make_video(tmp_path, 1))
    assert spool.drain() == DrainResult(("s001",))
    assert commits.read_commit(root, 0, "s001") == other
    assert not list(root.list("data/"))
    assert left_on_disk(settings) == []


@pytest.mark.parametrize("damaged", ["data/*/*.mp4", "posters/*/*.jpg"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), Path.unlink])
def test_a_damaged_video_is_not_committed(tmp_path, root, spool, damaged, damage):
    """P3: what is not of the hash that its record names, or is not there, is rendered again."""
    assert spool.add(*make_video(tmp_path, 1))
    (path,) = Path(spool._local.url).glob(damaged)
    damage(path)
    assert spool.drain() == DrainResult(())
    assert not list(root.list(layout.COMMITS))


@pytest.mark.parametrize(
    "spoilt",
    [b"", b'{"schema": "hv_batch/', b"[]", b"{}", "another run", "another sample", "another schema"],
)
def test_a_record_that_proves_nothing_is_not_committed(tmp_path, root, spool, spoilt):
    """P2: no half-written record, none of another run, sample or version; it is removed, so it is found once."""
    record, files = make_video(tmp_path, 1)
    assert spool.add(record, files)
    name = layout.commit_key(0, "s001")
    changed = {
        "another run": record | {"fingerprint": "0" * 64},
        "another sample": record | {"key": "s002"},
        "another schema": record | {"schema": "hv_batch/commit/2"},
    }
    spool._local.put(name, spoilt if isinstance(spoilt, bytes) else commits.encode(changed[spoilt]))
    assert spool.drain() == DrainResult(())
    assert not list(root.list(layout.COMMITS))
    assert not spool._local.exists(name)


def test_runs_do_not_see_each_others_videos(tmp_path, root, settings, spool):
    """P2: neither a run of another config nor one of the same into another root."""
    assert spool.add(*make_video(tmp_path, 1))
    assert Spool(settings, root, "0" * 64).drain() == DrainResult(())
    assert Spool(settings, Store(str(tmp_path / "elsewhere")), FINGERPRINT).drain() == DrainResult(())
    assert spool.drain() == DrainResult(("s001",))


def test_the_cap_holds_for_all_decoders_and_runs_of_a_node(tmp_path, root, settings):
    """P7: however many come at once, a node keeps no more than it may; the others are told that there is no room."""
    spool_drain = [Spool(settings, root, FINGERPRINT), Spool(settings, root, "0" * 64)]
    videos = [make_video(tmp_path, number) for number in range(1, 21)]
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda pair: pair[1].add(*videos[pair[0]]), enumerate(spool_drain * 10)))
    disk = Path(settings.spool_folder)
    media = sum(path.stat().st_size for path in disk.rglob("*.[mj]p*") if path.is_file())
    assert 0 < sum(kept) < 10, "records weigh, too"
    assert media <= 10 * SIZE
    assert not spool_drain[0].has_room(SIZE)
    assert spool_drain[0].has_room(0) is False, "the next one is expected to be as large as the last"


def test_no_room_is_asked_for_twice(tmp_path, root, settings):
    """P7: a video that turned out larger than its latents is decoded in vain once, not every 15 seconds."""
    spool = Spool(settings.model_copy(update={"spool_gib": SIZE / 2 / 2**30}), root, FINGERPRINT)
    assert spool.has_room(10)
    assert not spool.add(*make_video(tmp_path, 1))
    assert not spool.has_room(10)
    assert left_on_disk(settings) == []


def test_a_disk_that_others_need_gets_nothing(tmp_path, root, settings, monkeypatch):
    """P5: a full disk would fail every later decode of the node."""
    monkeypatch.setattr(spooling, "KEPT_FREE", 2**60)
    spool = Spool(settings, root, FINGERPRINT)
    assert not spool.has_room(1)
    assert not spool.add(*make_video(tmp_path, 1))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_is_one_without_room(tmp_path, root, spool, monkeypatch, code):
    """P5: no sample is to blame for the disk of a node; it waits as it does where there is no room."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Store, "put_file", fail)
    assert not spool.add(*make_video(tmp_path, 1))
    monkeypatch.setattr(spooling.shutil, "disk_usage", fail)
    assert not spool.has_room(0)


def test_without_a_cap_nothing_is_touched(tmp_path, root, settings):
    """output.spool_gib: 0 is off."""
    spool = Spool(settings.model_copy(update={"spool_gib": 0.0}), root, FINGERPRINT)
    assert not spool.has_room(0)
    assert not spool.add(*make_video(tmp_path, 1))
    assert not Path(settings.spool_folder).exists()


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, root, settings):
    """Its name is known on a machine that is shared: what somebody else puts there must not reach the output root."""
    folder = Path(settings.spool_folder, f"hv_batch_spool-{os.getuid()}")
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    spool = Spool(settings, root, FINGERPRINT)
    assert not spool.has_room(1)
    assert spool.drain() == DrainResult(())
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert not spool.has_room(1)


def test_stale_spools_are_swept(tmp_path, root, settings, spool):
    """What nobody came for in a week goes; a run to which something happened since keeps all of its own."""
    fresh = Spool(settings, root, "0" * 64)
    for each, number in ((spool, 1), (fresh, 2), (fresh, 3)):
        assert each.add(*make_video(tmp_path, number))
    old = time.time() - spooling.STALE_S - 60
    for each, key in ((spool, "*"), (fresh, "*s002*")):
        folder = Path(each._local.url)
        for path in (*folder.rglob(key), *([folder] if key == "*" else [])):
            os.utime(path, (old, old))
    Spool(settings, root, "1" * 64).remove_stale()
    assert not Path(spool._local.url).exists()
    assert len([name for name in left_on_disk(settings) if name.endswith(".json")]) == 2
