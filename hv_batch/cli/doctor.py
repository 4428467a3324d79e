"""`hv-batch doctor`: one block that says what is wrong with this machine or cluster, for the user and for an issue."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from hv_batch import __version__
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.config.run_config import load_config

TIMEOUT_S = 60.0


def doctor(
    config: Annotated[
        str | None, typer.Option(help="also check the device, codec and weights of this config: name, YAML file or URL")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="also check this output root: writable, conditional puts, clock")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="as for run", metavar="KEY=VALUE")] = None,
    address: Annotated[
        str | None, typer.Option(help="check every node of this Ray cluster; default: RAY_ADDRESS, else this machine")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds for the checks of a machine")] = TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Check Ray, GPUs, driver, NCCL, ffmpeg, limits, disks, the output root, the clock and the weights.

    The output holds no secrets and can be pasted into an issue. The exit code is 1 if a check fails.
    """
    from hv_batch.runtime.doctor import diagnose, report_environment  # Ray takes seconds to import
    from hv_batch.runtime.nodes.node_checks import count_failed, describe

    diagnosis = diagnose(load_config(config, overrides or []) if config else None, output, address, timeout)
    environment = report_environment()
    if as_json:
        nodes = {name: [asdict(check) for check in checks] for name, checks in diagnosis.nodes.items()}
        result = {"ok": diagnosis.is_healthy, "hv_batch": __version__, "environment": environment, "nodes": nodes}
        show_json("hv_batch/doctor/1", result)
    else:
        lines = [f"hv-batch doctor, hv_batch {__version__}, {datetime.now(UTC).isoformat(timespec='seconds')}"]
        lines += [f"{name}={value}" for name, value in environment.items()]
        for name, checks in diagnosis.nodes.items():
            lines += [f"[{name}]", *describe(checks)]
        show("\n".join([*lines, count_failed(diagnosis.checks)]))
    raise typer.Exit(0 if diagnosis.is_healthy else 1)
