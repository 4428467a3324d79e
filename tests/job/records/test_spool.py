"""The spool: videos on a node's disk while the output root is unreachable (P1, P2, P4, P7)."""

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
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from tests.support.doubles import Crash, CrashingStore
from tests.support.rendered_roots import FINGERPRINT, RenderedMedia, make_commit, make_sample

AWAY = StorageUnavailableError("s3://bucket/run: 503")
SIZE = 1000  # bytes of a video


@pytest.fixture
def root(tmp_path):
    return Store(str(tmp_path / "root"))


@pytest.fixture
def settings(tmp_path):
    """A spool with room for ten videos, on a disk with enough free space."""
    return OutputConfig(spool_gib=10 * SIZE / 2**30, spool_folder=str(tmp_path / "disk"))


@pytest.fixture
def spool(root, settings):
    return Spool(settings, root, FINGERPRINT)


def make_video(tmp_path: Path, number: int) -> tuple[dict, dict[str, Path]]:
    """A commit record and its files by key: a video and its poster."""
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
    """The root is unreachable from its operation number `after` on."""
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


def test_spooled_videos_are_committed_after_the_outage(tmp_path, root, settings, spool, monkeypatch):
    """P1, P2: record, video and poster are those of an undisturbed commit, and the spool is empty."""
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
    """P1, P2: at whatever operation the next outage begins, reported samples are committed and the rest is still in the
    spool.
    """
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
def test_a_crash_during_add_leaves_a_complete_entry_or_none(tmp_path, root, settings, spool, at, when):
    """P1: a decoder that dies between any two of its writes leaves no entry that could be committed wrongly."""
    record, files = make_video(tmp_path, 1)
    spool._local = CrashingStore(spool._local.url, at, when)
    with pytest.raises(Crash):
        spool.add(record, files)
    whole = (at, when) == (2, "after")
    assert Spool(settings, root, FINGERPRINT).drain() == DrainResult(("s001",) if whole else ())
    assert len(list(root.list(layout.COMMITS))) == whole
    assert spool.add(record, files), "a new entry replaces it"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(7))
def test_a_crash_during_drain_is_repaired_by_the_next_one(tmp_path, root, settings, spool, at, when):
    """P1, P2: between any two writes, to the root or the disk: one record, and the spool is empty at the end."""
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


def test_an_existing_record_is_kept(tmp_path, root, settings, spool):
    """P1: a sample that was rendered again meanwhile keeps the other record, and nothing is uploaded."""
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
    """P3: a file that is missing or does not have the recorded hash is rendered again."""
    assert spool.add(*make_video(tmp_path, 1))
    (path,) = Path(spool._local.url).glob(damaged)
    damage(path)
    assert spool.drain() == DrainResult(())
    assert not list(root.list(layout.COMMITS))


@pytest.mark.parametrize(
    "invalid",
    [b"", b'{"schema": "hv_batch/', b"[]", b"{}", "another run", "another sample", "another schema"],
)
def test_an_invalid_record_is_not_committed(tmp_path, root, spool, invalid):
    """P2: a truncated record, or one of another run, sample or version, is removed."""
    record, files = make_video(tmp_path, 1)
    assert spool.add(record, files)
    name = layout.commit_key(0, "s001")
    changed = {
        "another run": record | {"fingerprint": "0" * 64},
        "another sample": record | {"key": "s002"},
        "another schema": record | {"schema": "hv_batch/commit/2"},
    }
    spool._local.put(name, invalid if isinstance(invalid, bytes) else canonical_json.encode(changed[invalid]))
    assert spool.drain() == DrainResult(())
    assert not list(root.list(layout.COMMITS))
    assert not spool._local.exists(name)


def test_runs_do_not_see_each_others_videos(tmp_path, root, settings, spool):
    """P2: neither a run of another config, nor the same run into another root."""
    assert spool.add(*make_video(tmp_path, 1))
    assert Spool(settings, root, "0" * 64).drain() == DrainResult(())
    assert Spool(settings, Store(str(tmp_path / "elsewhere")), FINGERPRINT).drain() == DrainResult(())
    assert spool.drain() == DrainResult(("s001",))


def test_the_cap_holds_for_all_decoders_and_runs_of_a_node(tmp_path, root, settings):
    """P7: the spool of a node never exceeds its limit, whatever the number of decoders; further videos are refused."""
    spool_drain = [Spool(settings, root, FINGERPRINT), Spool(settings, root, "0" * 64)]
    videos = [make_video(tmp_path, number) for number in range(1, 21)]
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda pair: pair[1].add(*videos[pair[0]]), enumerate(spool_drain * 10)))
    disk = Path(settings.spool_folder)
    media = sum(path.stat().st_size for path in disk.rglob("*.[mj]p*") if path.is_file())
    assert 0 < sum(kept) < 10, "records also take space"
    assert media <= 10 * SIZE
    assert not spool_drain[0].has_room(SIZE)
    assert spool_drain[0].has_room(0) is False, "the next video may be as large as the largest"


def test_room_is_estimated_from_the_largest_video(tmp_path, root, settings):
    """P7: a video that was larger than its latents is decoded in vain once, not every 15 seconds."""
    spool = Spool(settings.model_copy(update={"spool_gib": SIZE / 2 / 2**30}), root, FINGERPRINT)
    assert spool.has_room(10)
    assert not spool.add(*make_video(tmp_path, 1))
    assert not spool.has_room(10)
    assert left_on_disk(settings) == []


def test_a_nearly_full_disk_is_not_used(tmp_path, root, settings, monkeypatch):
    """P5: a full disk would fail every later decode of the node."""
    monkeypatch.setattr(spooling, "KEPT_FREE", 2**60)
    spool = Spool(settings, root, FINGERPRINT)
    assert not spool.has_room(1)
    assert not spool.add(*make_video(tmp_path, 1))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_counts_as_full(tmp_path, root, spool, monkeypatch, code):
    """P5: a disk error of the node counts against no sample; the video waits as if there were no room."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Store, "put_file", fail)
    assert not spool.add(*make_video(tmp_path, 1))
    monkeypatch.setattr(spooling.shutil, "disk_usage", fail)
    assert not spool.has_room(0)


def test_a_limit_of_0_disables_the_spool(tmp_path, root, settings):
    """`output.spool_gib: 0` disables the spool."""
    spool = Spool(settings.model_copy(update={"spool_gib": 0.0}), root, FINGERPRINT)
    assert not spool.has_room(0)
    assert not spool.add(*make_video(tmp_path, 1))
    assert not Path(settings.spool_folder).exists()


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, root, settings):
    """Its name can be guessed on a shared machine: another user's files must not reach the output root."""
    folder = Path(settings.spool_folder, f"hv_batch_spool-{os.getuid()}")
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    spool = Spool(settings, root, FINGERPRINT)
    assert not spool.has_room(1)
    assert spool.drain() == DrainResult(())
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert not spool.has_room(1)


@pytest.mark.parametrize("what", ["owner", "mode", "link", "file", "parent"])
def test_a_spool_that_cannot_be_used_is_reported_with_its_reason_and_remedy(
    tmp_path, root, settings, what, monkeypatch
):
    """P5: a spool that is silently off would be noticed in the next outage."""
    folder = Path(settings.spool_folder, f"hv_batch_spool-{os.getuid()}")
    folder.parent.mkdir(parents=True)
    if what == "owner":
        folder.mkdir(mode=0o700)
        uid = os.getuid() + 1
        monkeypatch.setattr(spooling.os, "getuid", lambda: uid)
        folder.rename(folder.with_name(f"hv_batch_spool-{uid}"))
    elif what == "mode":
        folder.mkdir()
        folder.chmod(0o777)
    elif what == "link":
        folder.symlink_to(tmp_path)
    elif what == "file":
        folder.write_text("")
    else:
        folder.parent.rmdir()
        folder.parent.write_text("")
    spool = Spool(settings, root, FINGERPRINT)
    words = {
        "owner": "belongs to the user",
        "mode": "0700",
        "link": "a link",
        "file": "",
        "parent": "cannot be created",
    }
    assert words[what] in spool.problem()
    assert "output.spool_folder" in spool.problem()
    assert settings.spool_folder in spool.problem()
    assert not spool.has_room(1)
    assert Spool(settings.model_copy(update={"spool_gib": 0.0}), root, FINGERPRINT).problem() == ""


def test_a_spool_that_can_be_used_has_no_problem(root, spool):
    """The folder is created for the check."""
    assert spool.problem() == ""


@pytest.mark.parametrize("act", ["add", "drain"])
def test_drafts_of_killed_decoders_are_removed(tmp_path, root, settings, spool, act):
    """A run that ends leaves no drafts on the disks of the nodes."""
    spool.add(*make_video(tmp_path, 1))
    (record,) = Path(settings.spool_folder).rglob("*.json")
    draft = record.with_name(".draft-0123")
    draft.write_bytes(b"half")
    spool.add(*make_video(tmp_path, 2)) if act == "add" else spool.drain()
    assert not draft.exists()


def test_stale_spools_are_removed(tmp_path, root, settings, spool):
    """A spool that has not changed for a week is removed; one with a recent change is kept completely."""
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
