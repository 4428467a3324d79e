"""`hv-batch report`: write the report of an output root, and show it in a browser."""

from __future__ import annotations

import sys
import threading
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hv_batch.cli.output_root.arguments import Output
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job import layout
from hv_batch.job.formatting import plural
from hv_batch.job.redaction import public_url
from hv_batch.job.report.server.serve import serve_report
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.errors import StorageBrokenError, StorageRefusedError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def report(
    output: Output,
    open_page: Annotated[bool, typer.Option("--open", help="open the report in the browser of this machine")] = False,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="serve the page and the videos on 127.0.0.1; the root may be read-only"),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="for --serve; 0: any free port")] = 0,
    price_gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, help="price of one GPU for an hour; default: that of the last report")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report/index.html of an output root, during a run or after it, and print where it is.

    A page from a disk shows the first samples only. With --serve it shows all of them, and follows a run.
    """
    store = Store(output)
    if serve:
        with serve_report(store, port, price_gpu_hour) as server:
            _show(server.root.update.document, server.url, as_json)
            if open_page:
                webbrowser.open(server.url)
            threading.Event().wait()  # a signal ends the command
    try:
        update = update_report(store, price_per_gpu_hour=price_gpu_hour)
    except (StorageRefusedError, StorageBrokenError) as error:
        raise UserError(f"{str(error).rstrip('.')}. To see the report without writing it, add --serve.") from error
    location = f"{public_url(store.url)}/{layout.REPORT}"
    _show(update.document, location, as_json)
    if not as_json and update.document["totals"]["samples"] > 0:
        print(f"all samples: hv-batch report {public_url(store.url)} --serve", file=sys.stderr)
    if open_page:
        if store.folder is None:
            raise UserError(f"A browser cannot open {location}. Add --serve.")
        webbrowser.open(Path(store.folder, layout.REPORT).as_uri())


def _show(document: Mapping[str, Any], location: str, as_json: bool) -> None:
    totals = document["totals"]
    counts = {name: totals[name] for name in ("samples", "committed", "quarantined", "withdrawn", "pending")}
    if as_json:
        facts = {"finished": document["finished"], "running": document["running"], **counts}
        show_json("hv_batch/report-location/1", {"report": location, **facts})
        return
    states = ", ".join(f"{counts[name]:,} {name}" for name in ("committed", "quarantined", "pending"))
    show(f"{plural(counts['samples'], 'sample')}: {states}\nreport: {location}")
