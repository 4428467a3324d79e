"""The run config: one YAML file, validated as a whole before anything starts.

All problems are reported at once, each as the dotted key, the value given and what is allowed. Unknown keys are errors:
otherwise a run with a misspelt key would render with a default that the user did not choose.

The docstrings of the keys are user documentation: `hv_batch.job.config.reference` prints them as configs/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hv_batch.job.config.group_rules import group_problems, max_ranks
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.sections import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    HooksConfig,
    ManifestConfig,
    MediaConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RetriesConfig,
    Section,
    TimeoutsConfig,
    check_row_rule,
)
from hv_batch.job.config.shipped import find_config
from hv_batch.job.config.yaml_overrides import (
    CROSS_FIELD,
    MAX_CONFIG_BYTES,
    YamlError,
    apply_override,
    explain,
    known_keys,
    parse_yaml,
)
from hv_batch.job.user_input import is_manifest_name, open_input, shorten
from hv_batch.protocol import UserError
from hv_batch.sampling_params import parse_lora


class RunConfig(Section):
    """The settings of one run. Every key has a default: the release's values, on ten GPUs (one group of eight, an
    encoder and a decoder).
    """

    seed: int = 0
    """The seed of the run. A row without a `seed` gets one derived from this value and the row's key (its id, or a
    hash of the row). Part of the run's identity."""
    manifest: ManifestConfig = ManifestConfig()
    model: ModelConfig = ModelConfig()
    defaults: Defaults = Defaults()
    parallel: ParallelConfig = ParallelConfig()
    groups: GroupsConfig = GroupsConfig()
    encoders: EncodersConfig = EncodersConfig()
    decoders: DecodersConfig = DecodersConfig()
    output: OutputConfig = OutputConfig()
    media: MediaConfig = MediaConfig()
    hooks: HooksConfig = HooksConfig()
    retries: RetriesConfig = RetriesConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    gpu: str | None = None
    """The model of the GPUs: `H100`, `H200`, `A100`, `H20` or `L40S`, in upper or lower case. The cost model uses its
    speed for `parallel.gpus_per_group: auto` and for `hv-batch plan` without `--gpu` (which assumes an H100 if this is
    `null`)."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU in GiB, as 79.6 for an H100 of 80 GB. If it is given, a run whose largest shape does not fit
    is refused before it starts. `null`: no check."""

    @field_validator("seed", mode="before")
    @classmethod
    def _check_seed(cls, value: Any) -> Any:
        return check_row_rule("seed", value)

    @field_validator("gpu")
    @classmethod
    def _check_gpu(cls, value: str | None) -> str | None:
        if value is not None and value.lower() not in GPUS:
            raise ValueError(", ".join(gpu.name for gpu in GPUS.values()))
        return value

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        groups, ranks = self.groups, max_ranks(self.parallel)
        problems = list(
            group_problems(self.parallel, self.groups, self.encoders, self.model, self.gpu, self.gpu_memory_gib)
        )
        if unknown := parse_lora(self.defaults.lora).keys() - self.model.loras.keys():
            known = ", ".join(self.model.loras) or "none; model.loras is empty"
            problems.append(
                f"defaults.lora = {self.defaults.lora} names {', '.join(sorted(unknown))}; allowed: {known}"
            )
        if groups.gpus_per_rank + groups.cpus_per_rank == 0:
            problems.append(
                "groups.gpus_per_rank = 0 with groups.cpus_per_rank = 0; allowed: one of them above 0, because Ray "
                "places a rank by the resources that it reserves"
            )
        if self.hooks.sample and self.hooks.sample_timeout_s >= self.timeouts.stall_s:
            problems.append(
                f"hooks.sample_timeout_s = {self.hooks.sample_timeout_s:g} with timeouts.stall_s = "
                f"{self.timeouts.stall_s:g}; allowed: a shorter time, because a decoder without progress counts as hung"
            )
        share = self.encoders.gpus if self.encoders.is_colocated else 0.0
        if share > 0 and (groups.gpus_per_rank < 1 or share >= 0.5):
            problems.append(
                f"encoders.gpus = {share:g} colocated with ranks of groups.gpus_per_rank = {groups.gpus_per_rank:g}; "
                "allowed: less than 0.5 with groups.gpus_per_rank = 1, so that no two ranks can share a GPU"
            )
        if self.parallel.device == "cuda":
            # Ray hides every GPU from an actor that reserves none; NCCL refuses two ranks of a group on one GPU.
            if groups.gpus_per_rank == 0 or (ranks > 1 and groups.gpus_per_rank < 1):
                problems.append(
                    f"groups.gpus_per_rank = {groups.gpus_per_rank} with parallel.device = cuda and {ranks} rank(s) a "
                    "group; allowed: 1, or a fraction above 0 for a group of one rank"
                )
            shares = {"encoders": self.encoders.gpus}
            if not self.decoders.is_in_group:
                shares["decoders"] = self.decoders.gpus
            for name, gpus in shares.items():
                if gpus == 0:
                    problems.append(f"{name}.gpus = 0 with parallel.device = cuda; allowed: a share above 0, at most 1")
        if problems:
            raise PydanticCustomError(CROSS_FIELD, "{problems}", {"problems": "\n  - ".join(problems)})
        return self


def load_config(url: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config at an fsspec URL, or the shipped one of this name, changed by overrides such as `groups.count=4`.

    The value of an override is one YAML scalar, or a quoted or flow value ("...", [...], {...}). Keys and values of
    earlier versions are accepted with a warning on stderr (`hv_batch.job.config.retired_keys`).

    Raises UserError that lists all problems.
    """
    return build_config(url, read_values(url), overrides)


def read_values(url: str) -> dict[Any, Any]:
    """The mapping in the config at an fsspec URL, or in the shipped one of this name, which is not validated.

    Raises UserError if it cannot be read, is not a mapping, or is a manifest.
    """
    url = find_config(url)
    with open_input("config", url) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)  # one more than `parse_yaml` accepts
    try:
        values = parse_yaml(content)
    except YamlError as error:
        if is_manifest_name(url):
            raise UserError(_swapped(url)) from error
        where = f":\n{error.excerpt}" if error.excerpt else "."
        raise UserError(f"The config {url} is not valid YAML: {error}. Fix the file at that position{where}") from error
    if values is None:
        return {}
    is_config = isinstance(values, dict) and not values.keys().isdisjoint(RunConfig.model_fields)
    if not is_config and (is_manifest_name(url) or (isinstance(values, dict) and "prompt" in values)):
        raise UserError(_swapped(url))
    if not isinstance(values, dict):
        raise UserError(
            f"The config {url} is {shorten(values)}; allowed: a mapping of the keys {known_keys(RunConfig)}."
        )
    return values


def build_config(url: str, values: dict[Any, Any], overrides: Sequence[str]) -> RunConfig:
    """The config of `values` (from `read_values`, changed here) with overrides; `url` names it in messages."""
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(values, override)
        except ValueError as error:
            problems.append(str(error))
    config = None
    try:
        config = RunConfig.model_validate(replace_retired(values))
    except ValidationError as invalid:
        problems += [explain(RunConfig, details) for details in invalid.errors(include_url=False)]
    if config is None or problems:
        listing = "\n".join(f"  - {line}" for line in problems)
        raise UserError(f"The config {url} with its overrides has {len(problems)} problem(s):\n{listing}")
    return config


def _swapped(url: str) -> str:
    return (
        f"The config {url} is a manifest of prompts. Give it with --manifest, and a config in YAML with --config, for "
        "example --config 720p_8gpu (`hv-batch config list` prints the shipped ones)."
    )
