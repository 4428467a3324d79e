"""Writes a sealed shard as one WebDataset tar: for each sample its media file and its table row as JSON.

    <key>.mp4  <key>.json  <key>.mp4  <key>.json  …       in plan order; .png for one frame

The tar's bytes depend on the rows and the media only (P3): it holds no dates and no owners. A training job reads such a
file from an object store in one stream, whereas a folder needs one request for each video.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hv_batch.job import layout
from hv_batch.job.storage.store import Store


def write_tar(store: Store, shard: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the tar of a shard from the rows of its metadata table and the media that they name.

    One video at a time is held in memory, the tar in a temporary file. A shard without rows has no tar. Raises
    FileNotFoundError if a media file is missing, and ValueError if its sha256 differs from that in its row.
    """
    if not rows:
        return
    with tempfile.NamedTemporaryFile(prefix="hv_batch-", suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for row in rows:
                media = store.get(layout.media_dir(shard) + row["file_name"])
                if hashlib.sha256(media).hexdigest() != row["sha256"]:
                    raise ValueError(f"The sha256 of {row['file_name']} differs from that in its commit record")
                stem = _stem(row["key"])
                _add(tar, stem + Path(row["file_name"]).suffix, media)
                _add(tar, f"{stem}.json", _row_json(row))
        file.flush()
        store.put_file(layout.tar_key(shard), Path(file.name))


def check_tar(store: Store, shard: int, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first difference between the stored tar and what `write_tar` would write for `rows`, or None.

    The tar is downloaded to a temporary file.
    """
    try:
        size = store.size(layout.tar_key(shard))
    except FileNotFoundError:
        return "it is missing" if rows else None
    if size > (allowed := sum(map(_tar_bytes, rows)) + tarfile.RECORDSIZE):  # a sparse file may have any size
        return f"it has {size:,} bytes; its members need at most {allowed:,}"
    # A temporary folder, not a temporary file: some drivers remove the target file if the download fails.
    with tempfile.TemporaryDirectory(prefix="hv_batch-") as folder:
        path = Path(folder) / "shard.tar"
        try:
            store.get_file(layout.tar_key(shard), path)
            with tarfile.open(path, mode="r:") as tar:
                return _differing(tar, rows)
        except FileNotFoundError:
            return "it is missing" if rows else None
        except (tarfile.TarError, EOFError) as error:
            return f"it is not a complete tar: {error}"


def _tar_bytes(row: Mapping[str, Any]) -> int:
    """The bytes that both members of a sample take at most: a header each, one more for a long name, and padding."""
    return 2 * 5 * tarfile.BLOCKSIZE + int(row["bytes"]) + len(_row_json(row))


def _differing(tar: tarfile.TarFile, rows: Sequence[Mapping[str, Any]]) -> str | None:
    members = iter(tar)
    for row in rows:
        stem = _stem(row["key"])
        text = _row_json(row)
        for name, size, sha256 in (
            (stem + Path(row["file_name"]).suffix, row["bytes"], row["sha256"]),
            (f"{stem}.json", len(text), hashlib.sha256(text).hexdigest()),
        ):
            member = next(members, None)
            if member is None or member.name != name:
                return f"it holds {member.name if member else 'no further member'} in place of {name}"
            # The size is compared first: a sparse member can be larger than the memory.
            content = tar.extractfile(member) if member.isreg() and member.size == size else None
            if content is None or hashlib.sha256(content.read()).hexdigest() != sha256:
                return f"its member {name} differs from the recorded one in size or sha256"
    extra = next(members, None)
    return f"its member {extra.name} belongs to no sample of the table" if extra else None


def _stem(key: str) -> str:
    """The key with "~" for ".": readers take everything after the first dot for the extension. No key contains "~"."""
    return key.replace(".", "~")


def _row_json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 644, time 0, no owner
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
