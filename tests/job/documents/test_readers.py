"""An output root is data: every object in it is read through `hv_batch.job.documents` and nothing else parses one."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.repository import ROOT

PARSERS = frozenset({"decode", "decode_value", "loads", "read_parquet", "JSONDecoder"})

# The other modules that parse something, and what. A new entry must not be about an object of an output root.
OTHERS = {
    "job/documents/reading.py": "the objects of a root",
    "job/storage/canonical_json.py": "the bounded decoder itself",
    "job/manifest/index.py": "parts of the index, whose rows `parse_row` checks",
    "job/dataset/seal.py": "tables of sealed shards, whose rows `TableRow` checks",
    "job/inspection/verify_seal.py": "the lineage table, which is only compared",
    "job/manifest/formats.py": "the user's manifest",
    "job/records/run_document.py": "what this process has encoded itself",
    "job/cost_model/model.py": "the config.json of the weights",
    "runtime/session.py": "an environment variable of Ray",
    "cli/sample_files.py": "a file of latents that the user names",
    "bench/gloo_sleep_engine.py": "events of a benchmark",
    "bench/job_throughput.py": "records of a benchmark's own run",
}


def parser_calls() -> Iterator[tuple[str, str]]:
    """(module, call) of every call or reference of a parser in the layers that see output roots."""
    for layer in ("job", "runtime", "cli", "bench", "media"):
        for path in sorted((ROOT / "hv_batch" / layer).rglob("*.py")):
            module = path.relative_to(ROOT / "hv_batch").as_posix()
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
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
