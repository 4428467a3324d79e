"""Limits of all formats, and the types of parsed rows.

A file is read in two steps: it is split into chunks, and each chunk is parsed into rows. Splitting reads the file
sequentially and is cheap. Parsing is the costly step; it needs only its chunk, so it can run in another process. A
chunk is a few MB (P7), and longer rows are problems. The time is linear in the size of the file, whatever it contains.
Parsed rows are plain dicts whose values are not validated here. A row that cannot be parsed is a FieldProblem and does
not end the pass, so that all invalid rows are reported together (P6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hv_batch.sampling_params import FieldProblem

CHUNK_BYTES = 4 << 20  # about 20,000 rows of short prompts: about a second of work for one process
CHUNK_ROWS = 32_768  # of Parquet and CSV, whose rows may need far more memory once they are parsed
CELL_BYTES = 8  # that a cell counts besides its text, because empty cells take memory as well
MAX_LINE_BYTES = 16 << 20  # a prompt is a few kB, so a longer line is not a manifest row
MAX_COLUMNS = 1000  # further columns of a manifest: each becomes a metadata column, and is held during the run
UNREADABLE = "(unreadable)"  # stands for a value that cannot be shown

ParsedRow = dict[str, Any] | FieldProblem
NumberedRows = Iterator[tuple[int, ParsedRow]]
