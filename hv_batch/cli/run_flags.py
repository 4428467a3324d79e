"""The flags that several commands share which start or describe a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import ManifestConfig
from hv_batch.job.config.shipped import shipped_configs
from hv_batch.job.config.yaml_overrides import explain
from hv_batch.job.hooks.notify import VARIABLE
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

Overrides = Annotated[list[str] | None, typer.Argument(help="overrides, such as groups.count=4", metavar="KEY=VALUE")]

Address = Annotated[str | None, typer.Option(help="running Ray cluster; default: RAY_ADDRESS, else a local Ray")]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", "--steal", help="stop the driver that holds the output root; use if it hangs"),
]
Config = Annotated[
    str,
    typer.Option(
        help="name of a shipped config (`hv-batch config list`), YAML file or URL",
        autocompletion=lambda: list(shipped_configs()),
    ),
]
OnFinish = Annotated[
    str | None,
    typer.Option(
        help="command or URL that gets the result as JSON when the run ends, drains or fails; a URL belongs into the "
        f"environment ({VARIABLE}), because command lines are visible to others",
        metavar="COMMAND|URL",
    ),
]
Manifests = Annotated[
    list[str],
    typer.Option(help="prompts: JSONL, JSON, CSV, TSV, TXT or Parquet; file, folder, glob or URL; repeatable"),
]

Until = Annotated[
    str | None, typer.Option(help="local time at which all work must have ended, such as 06:30; default: no limit")
]
GpuHours = Annotated[
    float | None, typer.Option(help="stop before the workers have reserved N GPU hours; default: no limit", metavar="N")
]
GpuPrice = Annotated[
    float | None, typer.Option(min=0, help="price of one GPU for an hour, in any currency", metavar="PRICE")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="continue in the output root although KEY differs, such as defaults.flow_shift; pending samples get "
        "the new value, committed ones stay; repeatable",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="read a column of the manifest as one of hv_batch, as seed=noise_seed; fps= reads none; repeatable",
        metavar="OURS=THEIRS",
    ),
]
Carry = Annotated[
    list[str] | None,
    typer.Option(help="a column that is data, although other tools keep a parameter in it; repeatable", metavar="NAME"),
]
Duplicates = Annotated[
    str | None,
    typer.Option(help="repeated rows without id: number, drop or refuse; default: number", metavar="ACTION"),
]


def with_manifest_flags(
    config: RunConfig, column: Sequence[str] | None, carry: Sequence[str] | None, duplicates: str | None
) -> RunConfig:
    """`config` with the flags added to `manifest.columns` and `manifest.carry`, and in place of `manifest.duplicates`.

    Raises UserError with all flags that are not valid.
    """
    values = config.manifest.model_dump()
    for flag in column or ():
        ours, equals, theirs = flag.partition("=")
        if not equals:
            raise UserError(f"--column is {shorten(flag)}; allowed: OURS=THEIRS, as num_inference_steps=steps.")
        values["columns"][ours.strip()] = theirs
    values["carry"] = [*values["carry"], *(carry or ())]
    values["duplicates"] = duplicates or values["duplicates"]
    try:
        section = ManifestConfig.model_validate(values)
    except ValidationError as invalid:
        problems = [explain(ManifestConfig, details) for details in invalid.errors(include_url=False)]
        flags = "--column, --carry or --duplicates (the keys of manifest in the config)"
        raise UserError(f"{flags}: {'; '.join(problems)}.") from invalid
    return config.model_copy(update={"manifest": section})
