"""A sealed shard as one WebDataset tar: for each sample its media and a JSON of its row, side by side.

    <key>.mp4  <key>.json  <key>.mp4  <key>.json  …       in plan order; .png for one frame

The bytes follow from the rows and the media alone (P3): no dates, no owners. Training reads such a file from an object
store in one stream, where a folder costs a request a video.
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

    One video is held in memory, the tar in a temporary file. A shard without rows has none. Raises FileNotFoundError or
    ValueError when the media is not what the rows say.
    """
    if not rows:
        return
    with tempfile.NamedTemporaryFile(prefix="hv_batch-", suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for row in rows:
                media = store.get(layout.media_dir(shard) + row["file_name"])
                if hashlib.sha256(media).hexdigest() != row["sha256"]:
                    raise ValueError(f"{row['file_name']} does not hold the bytes that its record tells")
                stem = _stem(row["key"])
                _add(tar, stem + Path(row["file_name"]).suffix, media)
                _add(tar, f"{stem}.json", _said(row))
        file.flush()
        store.put_file(layout.tar_key(shard), Path(file.name))


def check_tar(store: Store, shard: int, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What of the tar is not what `write_tar` would write for `rows`; None when nothing. It is read through a file."""
    # A folder, not a file: some drivers remove what they could not fill.
    with tempfile.TemporaryDirectory(prefix="hv_batch-") as folder:
        path = Path(folder) / "shard.tar"
        try:
            store.get_file(layout.tar_key(shard), path)
            with tarfile.open(path, mode="r:") as tar:
                return _differing(tar, rows)
        except FileNotFoundError:
            return "it is missing" if rows else None
        except (tarfile.TarError, EOFError) as error:
            return f"it is no whole tar: {error}"


def _differing(tar: tarfile.TarFile, rows: Sequence[Mapping[str, Any]]) -> str | None:
    members = iter(tar)
    for row in rows:
        stem = _stem(row["key"])
        for name, sha256 in (
            (stem + Path(row["file_name"]).suffix, row["sha256"]),
            (f"{stem}.json", hashlib.sha256(_said(row)).hexdigest()),
        ):
            member = next(members, None)
            if member is None or member.name != name:
                return f"{name} is expected where it has {member.name if member else 'its end'}"
            content = tar.extractfile(member)  # one video in memory
            if content is None or hashlib.sha256(content.read()).hexdigest() != sha256:
                return f"its {name} has other bytes than recorded"
    extra = next(members, None)
    return f"its {extra.name} is of no sample of the table" if extra else None


def _stem(key: str) -> str:
    """A reader takes everything after a name's first dot for its extension; no key holds a tilde."""
    return key.replace(".", "~")


def _said(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mode 644, time 0, nobody's
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
