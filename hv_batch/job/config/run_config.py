"""The run config: one YAML file, checked as a whole before anything starts.

Every problem is reported at once, as its dotted key, the value given and what is allowed. Unknown keys are errors: a
misspelt key would otherwise render a night of videos with a default that nobody chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hv_batch.job.config.group_rules import find_faults, most_ranks
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.sections import (
    DecodersConfig,
    Defaults,
    EncodersConfig,
    GroupsConfig,
    MediaConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    RetriesConfig,
    Section,
    TimeoutsConfig,
    follow_row_rule,
)
from hv_batch.job.config.yaml_overrides import CROSS_FIELD, apply_override, explain, known_keys, parse_yaml
from hv_batch.job.user_input import open_input, shorten
from hv_batch.protocol import UserError


class RunConfig(Section):
    """The settings of one run. Every key has a default: the release's values on one node of eight GPUs and two more."""

    seed: int = 0
    """Rows without a seed derive theirs from it and their key."""
    model: ModelConfig = ModelConfig()
    defaults: Defaults = Defaults()
    parallel: ParallelConfig = ParallelConfig()
    groups: GroupsConfig = GroupsConfig()
    encoders: EncodersConfig = EncodersConfig()
    decoders: DecodersConfig = DecodersConfig()
    output: OutputConfig = OutputConfig()
    media: MediaConfig = MediaConfig()
    retries: RetriesConfig = RetriesConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    gpu: str | None = None
    """What the GPUs are, by a name that the cost model knows: H100, H200, A100, H20 or L40S. With its speed counts
    gpus_per_group: auto, and `hv-batch plan` unless --gpu names another."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU. Given, a run whose largest shape cannot fit is refused before it starts."""

    @field_validator("seed", mode="before")
    @classmethod
    def _follow_the_rule_of_a_seed(cls, value: Any) -> Any:
        return follow_row_rule("seed", value)

    @field_validator("gpu")
    @classmethod
    def _be_a_known_gpu(cls, value: str | None) -> str | None:
        if value is not None and value.lower() not in GPUS:
            raise ValueError(", ".join(gpu.name for gpu in GPUS.values()))
        return value

    @model_validator(mode="after")
    def _give_every_actor_what_it_computes_on(self) -> Self:
        groups, ranks = self.groups, most_ranks(self.parallel)
        found = list(find_faults(self.parallel, self.groups, self.encoders, self.model, self.gpu, self.gpu_memory_gib))
        if groups.gpus_per_rank + groups.cpus_per_rank == 0:
            found.append(
                "groups.gpus_per_rank = 0 with groups.cpus_per_rank = 0; allowed: one of them above 0, or Ray has "
                "nothing to place a rank by"
            )
        share = self.encoders.gpus if self.encoders.is_colocated else 0.0
        if share > 0 and (groups.gpus_per_rank < 1 or share >= 0.5):
            found.append(
                f"encoders.gpus = {share:g} colocated with ranks of groups.gpus_per_rank = {groups.gpus_per_rank:g}; "
                "allowed: less than 0.5 with groups.gpus_per_rank = 1, so that no two ranks can share a GPU"
            )
        if self.parallel.device == "cuda":
            # Ray hides every GPU from an actor that reserves none; NCCL refuses two ranks of a group on one GPU.
            if groups.gpus_per_rank == 0 or (ranks > 1 and groups.gpus_per_rank < 1):
                found.append(
                    f"groups.gpus_per_rank = {groups.gpus_per_rank} with parallel.device = cuda and {ranks} rank(s) a "
                    "group; allowed: 1, or a fraction above 0 for a group of one rank"
                )
            shares = {"encoders": self.encoders.gpus}
            if not self.decoders.is_in_group:
                shares["decoders"] = self.decoders.gpus
            for name, gpus in shares.items():
                if gpus == 0:
                    found.append(f"{name}.gpus = 0 with parallel.device = cuda; allowed: a share above 0, at most 1")
        if found:
            raise PydanticCustomError(CROSS_FIELD, "{found}", {"found": "\n  - ".join(found)})
        return self


def load_config(url: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config behind a fsspec URL, changed by overrides such as `groups.count=4`.

    An override's value is one YAML scalar, or a quoted or flow value ("...", [...], {...}). Keys and values of earlier
    versions are accepted with a warning on stderr (`hv_batch.job.config.retired_keys`).
    Raises UserError naming every problem at once.
    """
    with open_input("config", url) as file:
        content = file.read()
    try:
        values = parse_yaml(content)
    except ValueError as error:
        raise UserError(f"The config {url} is not valid YAML: {error}. Mend the file there.") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"The config {url} is {shorten(values)}; allowed: a mapping of the keys {known_keys(RunConfig)}."
        )
    found: list[str] = []
    for override in overrides:
        try:
            apply_override(values, override)
        except ValueError as error:
            found.append(str(error))
    config = None
    try:
        config = RunConfig.model_validate(replace_retired(values))
    except ValidationError as invalid:
        found += [explain(RunConfig, details) for details in invalid.errors(include_url=False)]
    if config is None or found:
        listing = "\n".join(f"  - {line}" for line in found)
        raise UserError(f"The config {url} with its overrides has {len(found)} problem(s):\n{listing}")
    return config
