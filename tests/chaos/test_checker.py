"""The independent checker finds each kind of damage, and nothing in a root that is not damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hv_batch.job.records.continuation import begin_run
from hv_batch.job.storage.store import Store
from tests.chaos.checker import check
from tests.support.continued_runs import Command
from tests.support.repository import ROOT
from tests.support.small_runs import real_media, run_small

POISON = "s004"
ROWS = [
    {"id": "s001", "prompt": " take 1 ", "category": "fox"},
    {"id": "two / parts", "prompt": "take 2", "num_videos": 2},
    {"prompt": "take 3", "guidance_scale": 6},
    {"id": POISON, "prompt": "take 4"},
    {"prompt": "take 3", "guidance_scale": 6.0},
    {"id": "image", "prompt": "take 5", "num_frames": 1, "seed": 7},
]
SHARD = "data/shard-00000"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A finished root with posters and tars; "manifest.jsonl" is beside it."""
    folder = tmp_path_factory.mktemp("sound")
    store = Store(str(folder / "root"))
    given = {"output": {"shard_size": 4, "webdataset": True}, "media": {"poster": True}}
    index, document, (_, continuation) = Command(folder / "manifest.jsonl", ROWS, given).check(store)
    document["manifest"]["url"] = str(folder / "manifest.jsonl")
    begin_run(store, document, index, continuation)
    run_small(store, (), poison={POISON}, media=partial(real_media, poster=True), adorned=True, index=index)
    return folder / "root"


@pytest.fixture
def damaged(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "root"))


def only(root: Path, pattern: str) -> Path:
    (found,) = root.glob(pattern)
    return found


def rewrite(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_table(root: Path, edit) -> None:
    path = root / SHARD / "metadata.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)


def put(root: Path, key: str) -> None:
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    (root / key).touch()


def move_record(root: Path) -> None:
    (root / "commits/shard-00001/s001.json").write_bytes((root / "commits/shard-00000/s001.json").read_bytes())


def swap_media(root: Path) -> None:
    """Other bytes under a name and a record that fit them: only the other run shows it."""
    path = only(root, f"{SHARD}/s001-*.mp4")
    data = path.read_bytes() + b"\0\0\0\x08free"
    digest = hashlib.sha256(data).hexdigest()
    path.unlink()
    (root / SHARD / f"s001-{digest[:8]}.mp4").write_bytes(data)
    rewrite(
        root / "commits/shard-00000/s001.json", sha256=digest, bytes=len(data), file=f"{SHARD}/s001-{digest[:8]}.mp4"
    )
    edit_table(root, lambda rows: rows[0].update(sha256=digest, bytes=len(data), file_name=f"s001-{digest[:8]}.mp4"))


def shorten_tar(root: Path) -> None:
    path = only(root, "webdataset/shard-00001.tar")
    with tarfile.open(path, "w") as tar:
        tar.add(root / "run.json", "s001.mp4")


def quarantine_too(root: Path) -> None:
    put(root, "quarantine/shard-00000/s001.json")
    shutil.copy(root / "commits/shard-00000/s001.json", root / "quarantine/shard-00000/s001.json")


def forget_in_report(root: Path) -> None:
    part = json.loads((path := root / "report/parts/shard-00000.json").read_text())
    part["samples"].pop()
    path.write_text(json.dumps(part))


def cut_event(root: Path) -> None:
    put(root, "events/20261129T000000Z-01234567/00000.jsonl")
    only(root, "events/*/00000.jsonl").write_text('{"at": 1.0, "kind": "run_sta')


DAMAGE = {
    "a record is missing": (lambda root: (root / "commits/shard-00000/s001.json").unlink(), "lost", "s001"),
    "a quarantine record is missing": (lambda root: only(root, f"quarantine/*/{POISON}.json").unlink(), "lost", POISON),
    "a video is missing": (lambda root: only(root, f"{SHARD}/s001-*.mp4").unlink(), "lost", "data/"),
    "a poster is missing": (lambda root: only(root, "posters/*/s001-*.jpg").unlink(), "lost", "posters/"),
    "a table is missing": (lambda root: (root / SHARD / "metadata.parquet").unlink(), "lost", SHARD),
    "a tar is missing": (lambda root: only(root, "webdataset/shard-00001.tar").unlink(), "lost", "webdataset/"),
    "a lineage table is missing": (lambda root: only(root, "lineage/shard-00001*").unlink(), "lost", "lineage/"),
    "_SUCCESS is missing": (lambda root: (root / "_SUCCESS").unlink(), "lost", "_SUCCESS"),
    "run.json is missing": (lambda root: (root / "run.json").unlink(), "lost", "run.json"),
    "two records": (quarantine_too, "doubled", "s001"),
    "two rows": (lambda root: edit_table(root, lambda rows: rows.append(rows[0])), "doubled", "s001"),
    "a record in another shard": (move_record, "wrong", "commits/shard-00001/s001"),
    "a record of no sample": (lambda root: put(root, "commits/shard-00000/x.json"), "wrong", "x.json"),
    "a record that is cut": (lambda root: (root / "commits/shard-00000/s001.json").write_text("{"), "wrong", "s001"),
    "a record of another row": (lambda root: rewrite(root / "commits/shard-00000/s001.json", row=2), "wrong", "s001"),
    "other columns": (lambda root: rewrite(root / "commits/shard-00000/s001.json", extra={}), "wrong", "s001"),
    "a video that is cut": (lambda root: only(root, f"{SHARD}/s001-*.mp4").write_bytes(b"x" * 99), "wrong", "s001-"),
    "a table of other values": (lambda root: edit_table(root, lambda rows: rows[0].update(fps=1)), "wrong", "metadata"),
    "a table of other order": (lambda root: edit_table(root, lambda rows: rows.reverse()), "wrong", "metadata"),
    "a table that is cut": (lambda root: (root / SHARD / "metadata.parquet").write_bytes(b"PAR1"), "wrong", "metadata"),
    "a tar of other members": (shorten_tar, "wrong", "webdataset/"),
    "a summary of other counts": (lambda root: rewrite(root / "summary.json", committed=9), "wrong", "summary.json"),
    "a report of another state": (forget_in_report, "wrong", "report/"),
    "a report without a part": (lambda root: only(root, "report/parts/shard-00000*").unlink(), "lost", "report/"),
    "a cut event": (cut_event, "wrong", "events/"),
    "bytes of another run": (swap_media, "wrong", "s001"),
    "latents": (lambda root: put(root, "latents/shard-00000/s.safetensors"), "left", "latents/"),
    "a step checkpoint": (lambda root: put(root, "steps/shard-00000/s001.safetensors"), "left", "steps/"),
    "a draft": (lambda root: (root / SHARD / ".draft-1").touch(), "left", ".draft-1"),
    "a lease": (lambda root: (root / "lease.json").touch(), "left", "lease.json"),
    "a video of no record": (lambda root: (root / SHARD / "s001-00000000.mp4").touch(), "left", "s001-0"),
}  # fmt: skip


def test_a_sound_root_has_no_findings(sound):
    assert check(sound, reference=sound) == []
    assert check(sound, reference=sound, frames=True) == []


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_each_kind_of_damage_is_found(damaged, sound, name):
    damage, kind, where = DAMAGE[name]
    damage(damaged)
    assert any(found.kind == kind and where in found.where for found in check(damaged, reference=sound))


def test_another_state_than_in_the_undisturbed_run_is_found(damaged, sound):
    """Even if the root is consistent in itself."""
    rewrite(damaged / f"quarantine/shard-00001/{POISON}.json")
    shutil.copytree(damaged, damaged.parent / "other")
    only(damaged.parent / "other", f"quarantine/*/{POISON}.json").unlink()
    found = check(damaged.parent / "other", reference=sound)
    assert any("quarantined in the undisturbed run" in finding.what for finding in found)


def test_the_checker_imports_nothing_of_the_package(sound, tmp_path):
    """Without a path to hv_batch it works. Its exit code is 3 if there are findings."""
    sources = [f"tests/chaos/{name}.py" for name in ("checker", "planned_samples")]
    (tmp_path / "tests/chaos").mkdir(parents=True)
    for source in sources:
        shutil.copy(ROOT / source, tmp_path / source)
    command = [sys.executable, "-m", "tests.chaos.checker", str(sound), "--json", "--unfinished-uploads", "1"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert [json.loads(line)["where"] for line in done.stdout.splitlines()] == ["(uploads)"]
    lines = [line for source in sources for line in (ROOT / source).read_text().splitlines()]
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    assert {name for name in imports if name.startswith(("hv_batch", "tests"))} == {"tests.chaos.planned_samples"}
