"""`hv-batch diff`: compare two runs sample by sample."""

from __future__ import annotations

from typing import Annotated

import typer

from hv_batch.cli.terminal import FOUND, Json, show, show_json
from hv_batch.job.inspection.diff import compare
from hv_batch.job.storage.store import Store


def diff(
    a: Annotated[str, typer.Argument(help="output root: folder or URL")],
    b: Annotated[str, typer.Argument(help="output root to compare with")],
    as_json: Json = False,
) -> None:
    """Compare two runs sample by sample. The exit code is 3 if any sample differs."""
    result = compare(Store(a), Store(b))
    if as_json:
        show_json("hv_batch/diff/1", result.to_dict())
    else:
        show(result.render())
    if not result.is_equal:
        raise typer.Exit(FOUND)
