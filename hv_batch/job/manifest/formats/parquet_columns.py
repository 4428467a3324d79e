"""The columns of a Parquet file that a manifest reads: all but those of media and other binary data.

The tables of Hugging Face keep videos and images in columns of bytes. A row of one may have many MB, and nothing of it
belongs into the metadata of another video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.manifest.column_mapping import ColumnMapping


@dataclass(frozen=True, slots=True)
class ReadColumns:
    schema: pa.Schema  # with the names of the file
    names: tuple[str, ...]  # under which the columns are read
    left_out: tuple[str, ...]  # names of the file

    def includes(self, path: str) -> bool:
        """Whether a leaf column, such as `video.bytes`, belongs to a column that is read."""
        return not any(path == name or path.startswith(f"{name}.") for name in self.left_out)

    def batches(self, parquet: pq.ParquetFile, rows: int, row_groups: list[int]) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows with the columns that are read."""
        if not self.left_out:
            yield from parquet.iter_batches(batch_size=rows, row_groups=row_groups)
            return
        for batch in parquet.iter_batches(batch_size=rows, row_groups=row_groups, columns=self.schema.names):
            yield batch.select(self.schema.names)  # Arrow also reads columns whose name begins with `<name>.`


def read_columns(schema: pa.Schema, columns: ColumnMapping) -> ReadColumns:
    """Divide the columns of a file. A column of hv_batch is always read, under whatever name of the file."""
    names = columns.rename(tuple(schema.names))
    is_read = [name in KNOWN_COLUMNS or not holds_bytes(field.type) for name, field in zip(names, schema, strict=True)]
    return ReadColumns(
        pa.schema([field for field, wanted in zip(schema, is_read, strict=True) if wanted]),
        tuple(name for name, wanted in zip(names, is_read, strict=True) if wanted),
        tuple(field.name for field, wanted in zip(schema, is_read, strict=True) if not wanted),
    )


def holds_bytes(kind: Any) -> bool:
    """Whether values of this Arrow type are, or contain, bytes that are not text."""
    if isinstance(kind, pa.UuidType):
        return False
    if isinstance(kind, pa.BaseExtensionType):
        return holds_bytes(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_nested(kind):
        return any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)
