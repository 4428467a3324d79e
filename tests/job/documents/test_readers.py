"""An output root is data: every object in it is read through `hv_batch.job.documents` and nothing else parses one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.repository import ROOT

PARSERS = frozenset({"decode", "decode_value", "loads", "read_parquet", "JSONDecoder"})

# The modules that see output roots and parse something, and what. A new entry must not be about an object of a root.
OTHERS = {
    "job/documents/reading.py": "the objects of a root",
    "job/manifest/index.py": "parts of the index, whose rows `parse_row` checks",
    "job/dataset/seal.py": "tables of sealed shards, whose rows `TableRow` checks",
    "job/dataset/lineage.py": "lineage tables, whose rows the report checks with `LineageRow`",
    "job/inspection/verify_seal.py": "the lineage table, which is only compared",
}


def parser_calls() -> Iterator[tuple[str, str]]:
    """(module, call) of every call or reference of a parser in a module that knows the store or the keys of a root."""
    for layer in ("job", "runtime", "cli", "bench", "media"):
        for path in sorted((ROOT / "hv_batch" / layer).rglob("*.py")):
            module, source = path.relative_to(ROOT / "hv_batch").as_posix(), path.read_text("utf-8")
            if not re.search(r"import .*\b(Store|layout|LocalDisk|Remote)\b", source):
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Attribute) and node.attr in ("loads", "JSONDecoder"):
                    yield module, ast.unparse(node)
                elif isinstance(node, ast.Name) and node.id in PARSERS:
                    yield module, node.id


def test_every_object_of_a_root_is_read_through_its_schema():
    """P1: a module that parses an object by itself would see what no schema has checked."""
    unknown = {f"{module}: {call}" for module, call in parser_calls() if module not in OTHERS}
    # `decode` is also the name of what a decoder does with latents and media.
    unknown -= {line for line in unknown if line.endswith(": decode") and "canonical_json" not in source_of(line)}
    assert not unknown, "read objects of a root with hv_batch.job.documents.reading.read"


def source_of(line: str) -> str:
    return (ROOT / "hv_batch" / line.partition(":")[0]).read_text("utf-8")


def test_the_list_of_parsers_is_current():
    """An entry that no longer parses anything would hide a later parser of a root's objects."""
    assert OTHERS.keys() <= {module for module, _ in parser_calls()}
