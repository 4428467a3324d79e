"""Checks the column names of a table: CSV, TSV and Parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.manifest.column_aliases import find_alias
from hv_batch.job.manifest.formats.limits import MAX_COLUMNS
from hv_batch.job.user_input import quote_argument, shorten


def check_columns(names: Sequence[str]) -> None:
    """Raises ValueError unless the column names of a table are unique, not too many, and include `prompt`."""
    most = MAX_COLUMNS + len(KNOWN_COLUMNS)
    if len(names) > most:
        raise ValueError(
            f"it has {len(names)} columns; at most {most} are allowed, because each becomes a column of the dataset's "
            "metadata. Combine them into one column that holds an object, or remove them"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"it has two columns named {', '.join(map(shorten, twice[:5]))}; rename or remove one")
    if "prompt" not in names:
        shown = ", ".join(map(shorten, names[:20]))
        raise ValueError(
            f"it has no column `prompt`, but {shown}; name the column with the prompts `prompt`, or give it with "
            f"{prompt_option(names)}"
        )


def prompt_option(names: Sequence[str]) -> str:
    """The option that reads one of the columns `names` as the prompt, as far as its name is known."""
    known = [name for name in names if (alias := find_alias(name)) is not None and alias.columns == ("prompt",)]
    return f"--column prompt={quote_argument(known[0]) if known else 'NAME'}"
