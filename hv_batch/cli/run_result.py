"""The end of a command that has rendered."""

from __future__ import annotations

import typer

from hv_batch.cli.terminal import show_json
from hv_batch.job import layout
from hv_batch.job.records.run_document import read_summary
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def end_run(output: str, code: int, as_json: bool) -> None:
    """End a command that has rendered, with its exit code and for --json with what the output root says now."""
    if as_json:
        store = Store(output)
        try:
            summary, has_report = read_summary(store), store.exists(layout.REPORT)
        except (OSError, UserError):  # stopped before the run began, or the store does not answer
            summary, has_report = None, False
        url = public_url(store.url)
        report = f"{url}/{layout.REPORT}" if has_report else None
        show_json("hv_batch/run/1", {"output": url, "exit_code": int(code), "summary": summary, "report": report})
    raise typer.Exit(code)
