"""Reads and writes the objects of a report, in the root itself or elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.report import DigestDocument, PartDocument, ReportDocument
from hv_batch.job.report.json_text import encode_json
from hv_batch.job.report.samples import Sample
from hv_batch.job.storage.store import Store


class ReportFiles:
    """`target` is where a report is written: the root itself, or another store, which then comes before the root."""

    def __init__(self, store: Store, target: Store) -> None:
        self._store = store
        self._target = target

    def read_digest(self, shard: int, state: str) -> dict[str, Any] | None:
        """The last digest of a shard; None if it is that of another state."""
        for store, digest in self._read_all(layout.report_digest_key(shard), DigestDocument):
            if (digest["shard"], digest["state"]) == (shard, state):
                if store is not self._target:  # a driver has written the part meanwhile: ours is older
                    self._target.delete(layout.report_digest_key(shard))
                    self._target.delete(layout.report_part_key(shard))
                return digest
        return None

    def read_finished_digest(self, shard: int, samples: int) -> dict[str, Any] | None:
        """The last digest of a shard, if it was sealed then and none of its `samples` samples was pending."""
        for _, digest in self._read_all(layout.report_digest_key(shard), DigestDocument):
            if (digest["shard"], digest["samples"], digest["pending"]) == (shard, samples, 0) and digest["sealed"]:
                return digest
        return None

    def read_part(self, shard: int) -> list[Sample] | None:
        for _, part in self._read_all(layout.report_part_key(shard), PartDocument):
            return list(part["samples"])
        return None

    def last_price(self) -> float | None:
        """The price of a GPU for an hour in the last report."""
        for _, report in self._read_all(layout.REPORT_DATA, ReportDocument):
            price: float | None = report["totals"].get("price_per_gpu_hour")
            return price
        return None

    def write_shard(self, part: bytes, digest: Mapping[str, Any]) -> None:
        self._target.put(layout.report_part_key(digest["shard"]), part)
        # Last: it says that the part is current.
        self._target.put(layout.report_digest_key(digest["shard"]), encode_json(digest))

    def write_page(self, data: bytes, page: bytes) -> None:
        self._target.put(layout.REPORT_DATA, data)
        self._target.put(layout.REPORT, page)

    def _read_all(self, key: str, model: type[BaseModel]) -> Iterator[tuple[Store, dict[str, Any]]]:
        """The valid objects under `key`, each with its store: the target, then the root."""
        for store in dict.fromkeys((self._target, self._store)):
            with contextlib.suppress(FileNotFoundError, InvalidObjectError):
                yield store, read(store, key, model)


def forget_shard(store: Store, shard: int) -> None:
    """Remove what the report says of the samples of a shard. The next report reads the shard again."""
    for key in (layout.report_digest_key(shard), layout.report_part_key(shard)):
        if store.exists(key):  # on a versioned bucket, every delete of an absent object adds a delete marker
            store.delete(key)
