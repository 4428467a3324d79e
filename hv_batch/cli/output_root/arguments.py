"""Arguments and flags that the commands for an output root share."""

from __future__ import annotations

from typing import Annotated

import typer

from hv_batch.job.config.engine_factory import VARIABLE
from hv_batch.job.manifest.selection import parse_ranges
from hv_batch.protocol import UserError

MAX_NAMED = 1_000_000  # shards of --shards, which are held as a list

Output = Annotated[str, typer.Argument(help="output root: folder or URL")]
Yes = Annotated[bool, typer.Option("--yes", help="make the change; without this flag it is only reported")]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", "--steal", help="stop the driver that holds the output root; use if it hangs"),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        help="an engine of your own that run.json may name, as package.module:Name; repeatable; default: "
        f"${VARIABLE}, separated by commas"
    ),
]
Hooks = Annotated[
    list[str] | None,
    typer.Option(help="a hook that run.json names and that may be run, written as there; repeatable", metavar="TEXT"),
]
Where = Annotated[
    list[str] | None,
    typer.Option(help="only samples that satisfy this, such as category=cat, luma_mean<20 or look=black; repeatable"),
]
Shards = Annotated[str | None, typer.Option(help="only these shards, for example 3,17-20", metavar="LIST")]


def parse_shards(text: str | None) -> list[int] | None:
    """The shard numbers of a list such as `3,17-20`; None for all.

    Raises UserError if `text` is no such list, or names more than MAX_NAMED shards.
    """
    if text is None:
        return None
    ranges = parse_ranges(text)
    if (count := sum(map(len, ranges))) > MAX_NAMED:
        raise UserError(f"--shards names {count:,} shards; allowed: at most {MAX_NAMED:,}. Omit it to select all.")
    return sorted({shard for shards in ranges for shard in shards})
