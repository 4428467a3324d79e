"""What the server of a report gives out: the report, media, posters and records, and nothing else of an output root.

It does not serve `run.json`, tables, latents or objects that hv_batch has not written. The page and `report.json` are
those that this process has made, never those of the root: a page that another writer put there may contain a script.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from hv_batch.job import layout
from hv_batch.job.report.update import Update
from hv_batch.job.storage.store import Store

MEDIA_TYPES = {"mp4": "video/mp4", "png": "image/png", "jpg": "image/jpeg"}
HTML, JSON = "text/html; charset=utf-8", "application/json; charset=utf-8"

_PART = re.compile(r"report/parts/shard-\d{5,12}\.json")
_RECORD = re.compile(r"(?:commits|quarantine|withdrawn)/.*")
_HASH = re.compile(r".*-([0-9a-f]{8})\.[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class ServedObject:
    """An object and how it is sent. `read` returns its bytes from `start` to `end` (exclusive)."""

    content_type: str
    size: int
    etag: str
    read: Callable[[int, int], bytes]
    is_page: bool = False
    never_changes: bool = False


class ServedRoot:
    """`target` is where the parts of the report are; the root itself, or a folder of this process."""

    def __init__(self, store: Store, target: Store, update: Update) -> None:
        self._store = store
        self._target = target
        self.update = update

    def find(self, path: str) -> ServedObject:
        """The object at a path relative to the root. Raises FileNotFoundError, or StorageError."""
        update = self.update
        if path == layout.REPORT:
            return _in_memory(update.page, HTML, is_page=True)
        if path == layout.REPORT_DATA:
            return _in_memory(update.data, JSON)
        if _PART.fullmatch(path):
            return _in_memory(self._read_part(path), JSON)
        if _RECORD.fullmatch(path) and layout.sample_key(path):
            return _in_memory(self._store.get(path), JSON)
        media_type = MEDIA_TYPES.get(path.rpartition(".")[2])
        if media_type and layout.media_owner(path):
            return self._media(path, media_type)
        raise FileNotFoundError(path)

    def _read_part(self, path: str) -> bytes:
        try:
            return self._target.get(path)
        except FileNotFoundError:
            return self._store.get(path)

    def _media(self, path: str, media_type: str) -> ServedObject:
        size, match = self._store.size(path), _HASH.fullmatch(path)
        etag = f'"{match[1] if match else ""}-{size}"'
        return ServedObject(
            media_type, size, etag, lambda start, end: self._store.get_range(path, start, end), never_changes=True
        )


def _in_memory(data: bytes, content_type: str, *, is_page: bool = False) -> ServedObject:
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    return ServedObject(content_type, len(data), etag, lambda start, end: data[start:end], is_page=is_page)
