"""The commands that render a manifest, and `plan`, which only describes what that takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hv_batch.cli.output_root.arguments import Engines, Hooks
from hv_batch.cli.run_flags import (
    Address,
    AllowChange,
    Carry,
    Column,
    Config,
    Duplicates,
    GpuHours,
    GpuPrice,
    Manifests,
    OnFinish,
    Overrides,
    TakeOver,
    Until,
    with_manifest_flags,
)
from hv_batch.cli.run_result import end_run
from hv_batch.cli.terminal import Json, LogFormat, LogLevel, command_logging, log_settings, show, show_json
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.hooks.notify import take_target
from hv_batch.job.manifest.selection import Selection, parse_selection
from hv_batch.protocol import UserError


def run(
    config: Config,
    manifest: Manifests,
    output: Annotated[str, typer.Option(help="output root: folder or URL; an unfinished run there is resumed")],
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(help="only the first N samples of the selection")] = None,
    where: Annotated[list[str] | None, typer.Option(help="only samples with column=value; repeatable")] = None,
    shards: Annotated[str | None, typer.Option(help="only these shards, for example 3,17-20")] = None,
    failed_only: Annotated[
        bool, typer.Option("--failed-only", help="release quarantined samples and render only these")
    ] = False,
    until: Until = None,
    max_gpu_hours: GpuHours = None,
    column: Column = None,
    carry: Carry = None,
    duplicates: Duplicates = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything that needs no GPU, show what would be done, and end")
    ] = False,
    allow_change: AllowChange = None,
    address: Address = None,
    take_over: TakeOver = False,
    on_finish: OnFinish = None,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    as_json: Json = False,
) -> None:
    """Render the samples of the manifest, or of a selection of it, that the output root does not have yet.

    Exit codes: 0 all committed, 3 finished with quarantined samples, 1 fatal error, 143 stopped by a signal or a limit.
    """
    from hv_batch.runtime.finish_notice import finish_notice  # not at the top: Ray takes seconds to import
    from hv_batch.runtime.render import render
    from hv_batch.runtime.run_limits import run_limits

    target = None if dry_run else take_target(on_finish)
    with command_logging(log_settings(log_level, log_format)), finish_notice(target, output) as end:
        _refuse_relative(output, address)
        settings = with_manifest_flags(load_config(config, overrides or []), column, carry, duplicates)
        selection = parse_selection(limit, where or [], shards)
        if dry_run:
            _show_dry_run(settings, manifest, output, selection, address, failed_only, allow_change or (), as_json)
            return
        end.code = render(
            settings,
            manifest,
            output,
            selection=selection,
            address=address,
            steal=take_over,
            failed_only=failed_only,
            limits=run_limits(until, max_gpu_hours),
            allow_change=allow_change or (),
        )
    end_run(output, end.code, as_json)


def _refuse_relative(output: str, address: str | None) -> None:
    on_cluster = (address or os.environ.get("RAY_ADDRESS") or "local") != "local"
    if on_cluster and "://" not in output and not Path(output).is_absolute():
        raise UserError(
            f"The output root {output} is a relative path, which is a different folder on every node of a cluster. Use "
            "an absolute path on storage that all nodes share, or a URL such as s3://bucket/run."
        )


def _show_dry_run(
    config: RunConfig,
    manifest: list[str],
    output: str,
    selection: Selection | None,
    address: str | None,
    failed_only: bool,
    allow_change: Collection[str],
    as_json: bool,
) -> None:
    from hv_batch.runtime.dry_run import check_run, render_check

    result = check_run(
        *(config, manifest, output),
        selection=selection,
        address=address,
        failed_only=failed_only,
        allow_change=allow_change,
    )
    if as_json:
        show_json("hv_batch/dry-run/1", result)
    else:
        show(render_check(result))


def resume(
    output: Annotated[str, typer.Argument(help="output root: folder or URL")],
    manifest: Annotated[str | None, typer.Option(help="new location of the manifest, if it has moved")] = None,
    engine: Engines = None,
    hook: Hooks = None,
    until: Until = None,
    max_gpu_hours: GpuHours = None,
    address: Address = None,
    take_over: TakeOver = False,
    on_finish: OnFinish = None,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    as_json: Json = False,
) -> None:
    """Resume a run with the config and manifest recorded in its run.json. Exit codes are those of run."""
    from hv_batch.runtime.finish_notice import finish_notice
    from hv_batch.runtime.render import resume as resume_run
    from hv_batch.runtime.run_limits import run_limits

    target = take_target(on_finish)
    with command_logging(log_settings(log_level, log_format)), finish_notice(target, output) as end:
        end.code = resume_run(
            output,
            address=address,
            manifest=manifest,
            steal=take_over,
            engines=engine or (),
            hooks=hook or (),
            limits=run_limits(until, max_gpu_hours),
        )
    end_run(output, end.code, as_json)


def nightly(
    config: Config,
    manifest: Annotated[str, typer.Option(help="prompts; {date} in it is replaced by the date, such as 2026-11-20")],
    output: Annotated[str, typer.Option(help="folder or URL of the output roots, each named after its date")],
    overrides: Overrides = None,
    day: Annotated[str | None, typer.Option("--date", help="date of the partition; default: yesterday")] = None,
    until: Until = None,
    catch_up: Annotated[
        int, typer.Option(min=0, help="resume unfinished runs of this many days before the date first")
    ] = 3,
    column: Column = None,
    carry: Carry = None,
    duplicates: Duplicates = None,
    allow_change: AllowChange = None,
    address: Address = None,
    on_finish: OnFinish = None,
    log_level: LogLevel = None,
    log_format: LogFormat = "text",
    as_json: Annotated[
        bool, typer.Option("--json", help="errors before the first night are JSON as well, as the line always is")
    ] = False,
) -> None:
    """Resume unfinished runs of earlier dates, render the partition of a date, and print one line of JSON.

    The exit code is that of the worst night. A failed night does not prevent the others.
    """
    from hv_batch.runtime.finish_notice import finish_notice
    from hv_batch.runtime.nightly import NightlyRequest, render_night, which_day
    from hv_batch.runtime.run_limits import next_time

    now, target = datetime.now(), take_target(on_finish)
    with command_logging(log_settings(log_level, log_format)), finish_notice(target, output) as end:
        request = NightlyRequest(
            config=with_manifest_flags(load_config(config, overrides or []), column, carry, duplicates),
            manifest=manifest,
            output=output,
            day=which_day(day, now),
            until=None if until is None else next_time(until, now),
            catch_up=catch_up,
            allow_change=tuple(allow_change or ()),
        )
        end.code = render_night(request, address=address, report=sys.stdout, on_line=end.set_night)
    raise typer.Exit(end.code)


def plan(
    config: Config,
    manifest: Manifests,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="H100, H200, A100, H20 or L40S; default: the config's gpu")] = None,
    price_gpu_hour: GpuPrice = None,
    column: Column = None,
    carry: Carry = None,
    duplicates: Duplicates = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs: memory of every stage, GPUs, traffic, hours, costs. Needs no GPU and no weights."""
    from hv_batch.cli.plan import render_plan  # the engine takes seconds to import
    from hv_batch.job.config.hardware import find_gpu
    from hv_batch.job.cost_model.estimate import make_plan  # the engine takes seconds to import

    settings = with_manifest_flags(load_config(config, overrides or []), column, carry, duplicates)
    estimate = make_plan(settings, manifest, find_gpu(gpu or settings.gpu or "H100"), price_gpu_hour)
    if as_json:
        show_json("hv_batch/plan/1", estimate)
    else:
        show(render_plan(estimate))
