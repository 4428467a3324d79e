"""Reports to `--on-finish` how a command has ended. It never changes how the command ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hv_batch.job.hooks.notify import notify
from hv_batch.job.records.lease import LeaseHeldError
from hv_batch.job.records.run_document import read_summary
from hv_batch.job.redaction import public_url, safe_text
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.run_end import OUTCOMES, ExitCode

SCHEMA = "hv_batch/finish/1"


@dataclass(slots=True)
class End:
    """The result of the command, which the block sets. Without one, the command has failed."""

    code: ExitCode = ExitCode.FATAL
    night: dict[str, Any] | None = None  # the line of `nightly`, which is then the document

    def set_night(self, line: dict[str, Any]) -> None:
        self.night = line


@contextmanager
def finish_notice(target: str | None, output: str) -> Iterator[End]:
    """Send the notice at the end of the block, whether it returns or raises. Without a target, nothing is sent."""
    end, begun, problem = End(), time.monotonic(), None
    try:
        yield end
    except BaseException as error:
        if isinstance(error, LeaseHeldError):
            end.code = ExitCode.HELD
        elif isinstance(error, KeyboardInterrupt):
            end.code = ExitCode.STOPPED
        else:
            end.code = ExitCode.FATAL
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        if target:
            notify(
                target, _describe_night(end.night) or describe_end(output, end.code, time.monotonic() - begun, problem)
            )


def _describe_night(line: dict[str, Any] | None) -> dict[str, Any] | None:
    return line and {**line, "text": f"hv_batch: night of {line['date']}: {line['outcome']}"}


def describe_end(output: str, code: ExitCode, seconds: float, problem: str | None) -> dict[str, Any]:
    """The document of the notice. `summary` is that of the output root; null if the run is not complete.

    `text` is one line for people, under the name that chat webhooks read.
    """
    summary = _read_summary(output) if code in (ExitCode.COMMITTED, ExitCode.QUARANTINED) else None
    where, error = public_url(output), problem and safe_text(problem)
    text = f"hv_batch: {where}: {OUTCOMES[code]}"
    if summary:
        text += f", {summary['committed']:,} of {summary['samples']:,} videos, {summary['quarantined']:,} quarantined"
    if error:
        text += f": {error}"
    return {
        "schema": SCHEMA,
        "text": text,
        "output": where,
        "outcome": OUTCOMES[code],
        "exit_code": int(code),
        "seconds": round(seconds, 1),
        "error": error,
        "summary": summary,
    }


def _read_summary(output: str) -> dict[str, Any] | None:
    try:
        return read_summary(Store(output))
    except (OSError, UserError):
        return None
