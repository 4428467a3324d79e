"""Checks a finished output root against its manifest and, if there is one, against the root of an undisturbed run.

    python -m tests.chaos.checker ROOT [--manifest FILE] [--reference ROOT] [--frames] [--unfinished-uploads N] [--json]

It reads files only and imports nothing of hv_batch: what it knows of the layout is what hv_batch/job/README.md and
hv_batch/job/layout.py document. So a fault of the package's own `verify` cannot hide a fault of its writers. A root in
an object store must be downloaded first. The manifest must be JSON Lines, by default the one that run.json names.

Each finding has a kind: "lost" (a sample without a record, a record without its file, a shard without its table),
"doubled" (two records or rows of one sample), "wrong" (other bytes, values or states than documented or than in the
reference) or "left" (something that no longer serves). The exit code is 0 without findings, 3 with some.

`--frames` compares decoded frames, not bytes, with the reference: for roots whose sample hook signs each file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from tests.chaos.planned_samples import Planned, read_plan

MEDIA = re.compile(r"(?P<key>.+)-(?P<hash>[0-9a-f]{8})\.(mp4|png|jpg)")
DECODED: dict[str, int] = {}  # bytes of the frames of a file by its hash: a process may check a root several times
ROOT_FILES = ("run.json", "summary.json", "report/index.html", "README.md", "_SUCCESS")


@dataclass(frozen=True)
class Finding:
    kind: str  # lost, doubled, wrong or left
    where: str  # an object of the root, or a sample's key
    what: str


def check(
    root: Path, manifest: Path | None = None, reference: Path | None = None, frames: bool = False
) -> list[Finding]:
    """All findings of a root, sorted."""
    try:
        run = json.loads((root / "run.json").read_bytes())
        plan = read_plan(manifest or Path(run["manifest"]["url"]), run)
    except (OSError, ValueError, KeyError) as error:
        return [Finding("lost", "run.json", f"it or the manifest cannot be read: {error}")]
    checker = _Checker(root, run, plan)
    found = set(checker.findings())
    if reference is not None:
        found.update(compare(checker, _Checker(reference, run, plan), frames))
    return sorted(found, key=lambda each: (each.kind, each.where, each.what))


class _Checker:
    """What one root holds."""

    def __init__(self, root: Path, run: Mapping[str, Any], plan: Mapping[str, Planned]) -> None:
        self.root, self.run, self.plan = root, run, plan
        self.files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}
        self.shards = range(max((sample.shard for sample in plan.values()), default=-1) + 1)
        self.damaged: list[Finding] = []
        self.committed = self._records("commits")
        self.quarantined = self._records("quarantine")
        self.withdrawn = self._records("withdrawn")

    def _records(self, kind: str) -> dict[str, dict[str, Any]]:
        found = {}
        for name in sorted(name for name in self.files if name.startswith(f"{kind}/")):
            shard, _, file = name.removeprefix(f"{kind}/").partition("/")
            key = file.removesuffix(".json")
            sample = self.plan.get(key)
            if sample is None or f"shard-{sample.shard:05d}" != shard:
                self.damaged.append(Finding("wrong", name, "it belongs to no sample of the manifest"))
                continue
            try:
                found[key] = json.loads((self.root / name).read_bytes())
            except ValueError as error:
                self.damaged.append(Finding("wrong", name, f"it is not JSON: {error}"))
        return found

    def findings(self) -> Iterator[Finding]:
        yield from self.damaged
        yield from self._states()
        yield from self._root_files()
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(lambda key: list(self._sample(key)), sorted(self.committed)):
                yield from found
        for shard in self.shards:
            yield from self._table(shard)
        yield from self._dataset()
        yield from self._report()
        yield from self._events()
        yield from self._left()

    def _states(self) -> Iterator[Finding]:
        """P1: each sample has exactly one terminal record, with the values of its manifest row."""
        for key, sample in self.plan.items():
            states = [
                kind
                for kind, records in (
                    ("commits", self.committed), ("quarantine", self.quarantined), ("withdrawn", self.withdrawn)
                )
                if key in records
            ]  # fmt: skip
            if not states:
                yield Finding("lost", key, "it has no record")
            if len(states) > 1:
                yield Finding("doubled", key, f"it has records in {' and '.join(states)}")
            for record in (self.committed.get(key), self.quarantined.get(key)):
                if record is not None:
                    yield from self._against_manifest(sample, record)

    def _against_manifest(self, sample: Planned, record: Mapping[str, Any]) -> Iterator[Finding]:
        recorded = (record.get("key"), record.get("row"), record.get("video_index"), record.get("shard"))
        if recorded != (sample.key, sample.row, sample.video, sample.shard):
            yield Finding("wrong", sample.key, f"its record is that of {recorded}")
        for name, value in sample.values.items():
            if record["params"].get(name) != value:
                yield Finding("wrong", sample.key, f"its record has another {name} than the manifest")
        if record["extra"] != sample.extra:
            yield Finding("wrong", sample.key, "its record has other further columns than the manifest")

    def _root_files(self) -> Iterator[Finding]:
        for name in ROOT_FILES:
            if name not in self.files:
                yield Finding("lost", name, "it is missing")
        if "summary.json" in self.files:
            summary = json.loads((self.root / "summary.json").read_bytes())
            counts = {"committed": len(self.committed), "quarantined": len(self.quarantined), "pending": 0}
            for name, count in {**counts, "samples": len(self.plan), "shards_sealed": len(self.shards)}.items():
                if summary[name] != count:
                    yield Finding("wrong", "summary.json", f"{name} is {summary[name]}, not {count}")

    def _sample(self, key: str) -> Iterator[Finding]:
        """The files of a committed sample are whole: size, hash, frames."""
        record = self.committed[key]
        for name, is_poster in ((record["file"], False), (record["poster"], True)):
            if name is None:
                continue
            if name not in self.files:
                yield Finding("lost", name, "its commit record names it, and it is missing")
                continue
            data = (self.root / name).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            match = MEDIA.fullmatch(Path(name).name)
            if match is None or match["key"] != key or match["hash"] != digest[:8]:
                yield Finding("wrong", name, f"its bytes have the sha256 {digest[:8]}...")
            if not is_poster and (digest, len(data)) != (record["sha256"], record["bytes"]):
                yield Finding("wrong", name, "its bytes are not those of its commit record")
            params = record["params"]
            wanted = (1 if is_poster else params["num_frames"]) * params["height"] * params["width"] * 3
            if digest not in DECODED:
                DECODED[digest] = len(decode(self.root / name))
            decoded = DECODED[digest]
            if decoded != wanted:
                yield Finding("wrong", name, f"it decodes to {decoded} bytes of frames, not {wanted}")

    def _table(self, shard: int) -> Iterator[Finding]:
        """The sealed table has one row for each commit record, in the order of the manifest, with its values."""
        name = f"data/shard-{shard:05d}/metadata.parquet"
        expected = [
            self.committed[key] for key, sample in self.plan.items() if sample.shard == shard and key in self.committed
        ]
        try:
            rows = pq.read_table(io.BytesIO((self.root / name).read_bytes())).to_pylist()
        except FileNotFoundError:
            yield Finding("lost", name, "the shard is not sealed")
            return
        except (pa.ArrowException, OSError) as error:
            yield Finding("wrong", name, f"it cannot be read: {error}")
            return
        for key, count in Counter(row["key"] for row in rows).items():
            if count > 1:
                yield Finding("doubled", key, f"{name} has {count} rows of it")
        if [row["key"] for row in rows] != [record["key"] for record in expected]:
            yield Finding("wrong", name, "its rows are not those of the commit records")
            return
        for row, record in zip(rows, expected, strict=True):
            values = {
                **record["params"],
                **{name: record.get(name) for name in row if name in record},
                **record["extra"],
            }
            values |= {"file_name": Path(record["file"]).name, **record.get("scores", {})}
            for column in row.keys() & values.keys() - {"hook"}:
                if row[column] != values[column] and not isinstance(values[column], list | dict):
                    yield Finding("wrong", name, f"row {row['key']}: {column} differs from the commit record")
        yield from self._tar(shard, rows)
        if f"lineage/shard-{shard:05d}.parquet" not in self.files:
            yield Finding("lost", f"lineage/shard-{shard:05d}.parquet", "it is missing")

    def _tar(self, shard: int, rows: list[dict[str, Any]]) -> Iterator[Finding]:
        if not self.run["config"]["output"].get("webdataset") or not rows:
            return
        name = f"webdataset/shard-{shard:05d}.tar"
        try:
            with tarfile.open(self.root / name, "r:") as tar:
                members = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        except (OSError, tarfile.TarError) as error:
            yield Finding("lost", name, f"it cannot be read: {error}")
            return
        media = {hashlib.sha256(data).hexdigest() for member, data in members.items() if not member.endswith(".json")}
        if media != {row["sha256"] for row in rows} or len(members) != 2 * len(rows):
            yield Finding("wrong", name, "its members are not the samples of the table")

    def _dataset(self) -> Iterator[Finding]:
        """The folder loads as one dataset."""
        try:
            data = pyarrow.dataset.dataset(self.root / "data", format="parquet", exclude_invalid_files=True)
            rows = data.to_table().num_rows
        except (pa.ArrowException, OSError) as error:
            yield Finding("wrong", "data/", f"the dataset does not load: {error}")
            return
        if rows != len(self.committed):
            yield Finding("wrong", "data/", f"the dataset has {rows} rows for {len(self.committed)} committed samples")

    def _report(self) -> Iterator[Finding]:
        """The report shows each sample once, in its state."""
        name = "report/report.json"
        try:
            report = json.loads((self.root / name).read_bytes())
            parts = [json.loads((self.root / "report" / shard["part"]).read_bytes()) for shard in report["shards"]]
        except (OSError, ValueError, TypeError) as error:
            yield Finding("lost", name, f"it or a part of it cannot be read: {error}")
            return
        shown = Counter((sample["key"], sample["state"]) for part in parts for sample in part["samples"])
        states = {"committed": self.committed, "quarantined": self.quarantined, "withdrawn": self.withdrawn}
        if shown != Counter((key, state) for state, records in states.items() for key in records):
            yield Finding("wrong", name, "its parts show other samples, or samples in other states, than the records")
        counts = {state: len(records) for state, records in states.items()} | {"pending": 0}
        if any(report["totals"][state] != count for state, count in counts.items()) or not report["finished"]:
            yield Finding("wrong", name, f"its totals are {report['totals']}, finished: {report['finished']}")

    def _events(self) -> Iterator[Finding]:
        """Each line of the event log is a JSON object with a time and a kind."""
        for name in sorted(name for name in self.files if name.startswith("events/")):
            try:
                for line in (self.root / name).read_bytes().splitlines():
                    event = json.loads(line)
                    event["at"], event["kind"]
            except (ValueError, KeyError, TypeError) as error:
                yield Finding("wrong", name, f"a line of it is no event: {error}")

    def _left(self) -> Iterator[Finding]:
        named = {record[field] for record in self.committed.values() for field in ("file", "poster")}
        keeps = self.run["config"]["output"].get("keep_latents")
        for name in sorted(self.files):
            folder = name.partition("/")[0]
            if Path(name).name.startswith("."):
                yield Finding("left", name, "a draft or probe")
            elif folder == "steps" or (folder == "latents" and not keeps):
                yield Finding("left", name, "an intermediate of a sample that is done")
            elif folder in ("data", "posters") and name not in named and not name.endswith("/metadata.parquet"):
                yield Finding("left", name, "no commit record names it")
            elif name == "lease.json":
                yield Finding("left", name, "no process writes to a finished root")


def compare(mine: _Checker, other: _Checker, frames: bool = False) -> Iterator[Finding]:
    """P2, P3: the state and the bytes are those of the undisturbed run `other`."""
    for kind, ours, theirs in (
        ("committed", mine.committed, other.committed), ("quarantined", mine.quarantined, other.quarantined)
    ):  # fmt: skip
        for key in sorted(theirs.keys() - ours.keys()):
            yield Finding("wrong", key, f"it is {kind} in the undisturbed run and not here")
    read = decode if frames else Path.read_bytes
    for key in sorted(mine.committed.keys() & other.committed.keys()):
        for field in ("file", "poster"):
            names = [checker.committed[key][field] for checker in (mine, other)]
            if (
                names[0] in mine.files
                and names[1] in other.files
                and read(mine.root / names[0]) != read(other.root / names[1])
            ):
                yield Finding("wrong", key, f"its {field} differs from that of the undisturbed run")
    if frames or mine.committed.keys() != other.committed.keys():
        return
    for name in sorted(mine.files & other.files):
        if re.fullmatch(r"data/shard-\d+/metadata\.parquet|webdataset/shard-\d+\.tar", name) and (
            (mine.root / name).read_bytes() != (other.root / name).read_bytes()
        ):
            yield Finding("wrong", name, "it differs from that of the undisturbed run")


def decode(path: Path) -> bytes:
    """The frames of a file as RGB, with ffmpeg; empty if it cannot be decoded."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-threads", "1", "-i", str(path)]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, timeout=300)
    return done.stdout if done.returncode == 0 else b""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--frames", action="store_true")
    parser.add_argument("--unfinished-uploads", type=int, default=0, help="that the object store lists")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = check(given.root, given.manifest, given.reference, given.frames)
    if given.unfinished_uploads:
        found.append(Finding("left", "(uploads)", f"{given.unfinished_uploads} unfinished uploads"))
    for finding in found:
        print(json.dumps(asdict(finding)) if given.json else f"{finding.kind}: {finding.where}: {finding.what}")
    if not given.json:
        print(f"{len(found)} finding(s) in {given.root}", file=sys.stderr)
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
