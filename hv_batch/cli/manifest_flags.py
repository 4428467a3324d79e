"""The flags that set `manifest.*` of the config: `--column`, `--carry` and `--duplicates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import ManifestConfig
from hv_batch.job.config.yaml_overrides import explain
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

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
