"""Applies the prompt hook to a checked manifest: it rewrites or drops rows before the run begins.

It runs once. Its results are in the index, which the output root keeps (`plan/`), so a resume renders the same texts
without calling it. The original prompt stays in the further column `prompt_original`, and so in the records, tables and
the report. The key and the seed of a row follow from the row as it was written.

A hook gets the rows of one part of the index (about 20,000) at a time: a command gets one JSON object a line on its
stdin and writes one a line to its stdout; a function gets and returns a list. The answer for a row is
`{"prompt": "..."}`, `{"drop": "reason"}`, or `{}` to leave it as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from hv_batch.job.config.field_rules import find_fault
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.hooks.call import call_command, call_function, read_answer
from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError, parse_hook
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.index import Index, IndexWriter
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.row_validation import PART_SCHEMA, encode_part
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

ORIGINAL = "prompt_original"  # the further column with the prompt of the manifest
MAX_LISTED = 1000  # dropped rows in the index, and problems in a message
ANSWERS = ("prompt", "drop")

Row = dict[str, Any]


@dataclass(slots=True)
class _Result:
    """What the hook has done so far."""

    digest: Any = field(default_factory=hashlib.sha256)  # of all answers, for the identity of the run
    rewritten: int = 0
    dropped: int = 0
    drops: list[dict[str, Any]] = field(default_factory=list)  # the first MAX_LISTED
    problems: list[str] = field(default_factory=list)
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)


def apply_prompt_hook(index: Index, manifest: Manifest, config: RunConfig, scratch: Store) -> Index:
    """The index of the rows as the config's prompt hook leaves them, written into `scratch`.

    Raises UserError if the hook cannot be run, fails, drops all rows, or gives rows that the manifest check would
    refuse; all of them are listed.
    """
    assert config.hooks.prompt is not None, "there is a prompt hook"
    hook = parse_hook(config.hooks.prompt)
    if ORIGINAL in index.summary.extra_kinds:
        raise UserError(
            f"The manifest {manifest.name} has a column {ORIGINAL}, in which the prompt hook keeps the prompt of the "
            "manifest. Remove hooks.prompt if the prompts are already rewritten, or rename the column."
        )
    writer, result, defaults = IndexWriter(scratch), _Result(), config.defaults.model_dump()
    for rows in index.parts():
        answers = _ask(hook, rows, config.hooks.prompt_timeout_s)
        kept = [row for row, answer in zip(rows, answers, strict=True) if _apply(row, answer, result)]
        for row in kept:
            values = {**defaults, **row["values"]}
            result.shapes[values["height"], values["width"], values["num_frames"]] += row["videos"]
        columns = {name: [row[name] for row in kept] for name in ("row", "key", "id", "videos")}
        columns["content"] = [json.dumps((row["values"], row["extra"])) for row in kept]
        if kept:
            writer.add(encode_part(pa.table(columns, PART_SCHEMA)), len(kept), sum(columns["videos"]))
    _check(result, manifest, index.summary.rows)
    samples = sum(part.samples for part in writer.parts)
    summary = replace(
        index.summary,
        samples=samples,
        shards=-(-samples // config.output.shard_size),
        shapes=dict(result.shapes),
        extra_kinds={**index.summary.extra_kinds, ORIGINAL: ColumnType.TEXT},
        prompt_hook={
            "sha256": result.digest.hexdigest(),
            "rewritten": result.rewritten,
            "dropped": result.dropped,
            "drops": result.drops,
        },
    )
    return writer.finish(summary, manifest, config)


def describe_results(results: Mapping[str, Any], shown: int = 10) -> Iterator[str]:
    """Lines for the log: the counts, then the first `shown` dropped rows."""
    yield f"the prompt hook has rewritten {results['rewritten']:,} rows and dropped {results['dropped']:,}"
    for drop in results["drops"][:shown]:
        yield f"dropped: row {drop['row']} (id {shorten(drop['id'])}): {shorten(drop['reason'])}"
    if (more := results["dropped"] - shown) > 0:
        yield f"and {more:,} more; plan/index.json lists the first {MAX_LISTED:,}"


def _ask(hook: Hook, rows: Sequence[Row], timeout_s: float) -> list[Any]:
    """The answers of the hook for the rows, in their order. Raises UserError."""
    given = [{**row["extra"], **row["values"], "id": row["id"] or row["key"], "row": row["row"]} for row in rows]
    try:
        if hook.is_function:
            answers = call_function(hook, (given,), timeout_s)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in given).encode()
            written = call_command(hook, lines, timeout_s)
            answers = [read_answer(hook, line) for line in written.splitlines() if line.strip()]
        if not isinstance(answers, list) or len(answers) != len(rows):
            count = f"{len(answers):,} answers" if isinstance(answers, list) else type(answers).__name__
            raise HookFailedError(
                f"the hook {hook.name} gave {count} for {len(rows):,} rows; allowed: one for each row"
            )
    except (HookFailedError, HookUnavailableError) as error:
        raise UserError(
            f"The prompt hook failed for rows {rows[0]['row']} to {rows[-1]['row']} of the manifest: {error}. Nothing "
            "was rendered or stored. Correct the hook (hooks.prompt) and run the command again."
        ) from error
    return answers


def _apply(row: Row, answer: Any, result: _Result) -> bool:
    """Change `row` by the answer and note it in `result`. Returns False if the row is dropped or invalid."""
    problem = _find_problem(answer)
    if problem:
        if len(result.problems) < MAX_LISTED:
            result.problems.append(f"row {row['row']}: {problem}")
        return False
    original = row["values"]["prompt"]
    text = answer.get("prompt", original).strip()
    reason = answer.get("drop")
    result.digest.update(json.dumps([row["key"], text, reason is not None]).encode())
    if reason is not None:
        result.dropped += 1
        if len(result.drops) < MAX_LISTED:
            result.drops.append({"row": row["row"], "id": row["id"] or row["key"], "reason": reason[:MAX_LISTED]})
        return False
    result.rewritten += text != original
    row["values"]["prompt"] = text
    row["extra"][ORIGINAL] = original
    return True


def _find_problem(answer: Any) -> str | None:
    if not isinstance(answer, dict) or not answer.keys() <= set(ANSWERS) or not _are_texts(answer):
        return f'its answer is {shorten(answer)}; allowed: {{"prompt": TEXT}}, {{"drop": REASON}} or {{}}'
    if "prompt" in answer and (allowed := find_fault("prompt", answer["prompt"].strip())):
        return f"its prompt is {shorten(answer['prompt'])}; allowed: {allowed}"
    return None


def _are_texts(answer: Mapping[str, Any]) -> bool:
    """Whether all values are texts that UTF-8 can store: no lone surrogates."""
    try:
        return all(isinstance(value, str) and value.encode() is not None for value in answer.values())
    except UnicodeEncodeError:
        return False


def _check(result: _Result, manifest: Manifest, rows: int) -> None:
    if result.problems:
        listing = "\n".join(f"  - {line}" for line in result.problems)
        raise UserError(
            f"The prompt hook gave invalid answers for rows of the manifest {manifest.name}. Correct the hook "
            f"(hooks.prompt) and run the command again:\n{listing}"
        )
    if result.dropped == rows:
        reason = shorten(result.drops[0]["reason"])
        raise UserError(
            f"The prompt hook has dropped all {rows:,} rows of the manifest {manifest.name} (the first because of "
            f"{reason}), so nothing is left to render. Correct the hook (hooks.prompt) or the manifest."
        )
