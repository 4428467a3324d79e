"""Lists of prompts (.txt): one prompt a line.

Blank lines and lines that begin with `#` are skipped. Options at the end of a line, as `a cat --w 640 --f 25`, are read
as in the prompt files of kohya's sd-scripts and of musubi-tuner. An option without a counterpart makes the row a
problem, so that no option is rendered as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from hv_batch.job.config.field_rules import parse_text
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.limits import NumberedRows, ParsedRow
from hv_batch.job.manifest.formats.lines import line_blocks, numbered_lines
from hv_batch.sampling_params import FieldProblem

OPTIONS = {
    "w": "width",
    "h": "height",
    "f": "num_frames",
    "d": "seed",
    "s": "num_inference_steps",
    "g": "guidance_scale",
    "l": "cfg_scale",
    "fs": "flow_shift",
    "n": "negative_prompt",
}
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")  # not a dash between two words, as in "a cat -- asleep"
_ALLOWED = ", ".join(f"--{option} ({column})" for option, column in OPTIONS.items())


@dataclass(frozen=True, slots=True)
class PromptLines:
    """Complete lines. The row number is the line number, from 1; blank lines and comments count."""

    first: int
    data: bytes

    def rows(self) -> NumberedRows:
        for number, line in numbered_lines(self.first, self.data):
            if not line.startswith(b"#"):
                yield number, _parse_line(line)

    @property
    def last(self) -> int:
        return self.first + self.data.count(b"\n")


def split_prompt_list(file: IO[bytes]) -> Iterator[PromptLines]:
    """Split a file into complete lines."""
    for first, data in line_blocks(file):
        yield PromptLines(first, data)


def _parse_line(line: bytes) -> ParsedRow:
    if len(line) > limits.MAX_LINE_BYTES:
        start = line[:100].decode("utf-8", errors="replace")
        return FieldProblem("line", start, f"one prompt a line, of at most {limits.MAX_LINE_BYTES >> 20} MiB")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return FieldProblem("line", line.decode("utf-8", errors="replace"), "text in UTF-8")
    prompt, *options = _OPTION.split(text)
    row: dict[str, Any] = {"prompt": prompt} if prompt.strip() else {}
    for option in options:
        name, _, value = option.partition(" ")
        column = OPTIONS.get(name)
        if column is None:
            return FieldProblem("line", f"--{option}", f"a prompt with the options {_ALLOWED}, or with none")
        if column in row:
            return FieldProblem("line", text, f"an option --{name} that is given once")
        if not value.strip():
            return FieldProblem("line", text, f"an option --{name} with a value")
        row[column] = parse_text(column, value.strip())
    return row
