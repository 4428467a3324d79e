"""The scenario of a simulation: the cluster, its faults, and the times that the cost model does not have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from hv_batch.job.config.sections import Count, Seconds, Section
from hv_batch.job.config.yaml_overrides import YamlError, explain, parse_yaml
from hv_batch.job.stages import Stage
from hv_batch.job.user_input import open_input, shorten
from hv_batch.protocol import UserError

PerHour = Annotated[float, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

MAX_SCENARIO_BYTES = 100_000


class LoadTimes(Section):
    """Seconds from the placement of a worker until it is ready: start of the process, weights, self-check."""

    encode: NonNegative = 60.0
    denoise: NonNegative = 120.0
    decode: NonNegative = 30.0

    def of(self, stage: Stage) -> float:
        return (self.encode, self.denoise, self.decode)[stage]


class Scenario(Section):
    """All times are in seconds, all rates are those of the whole cluster."""

    nodes: Count | None = None
    """Nodes at the beginning; default: as many as the config's groups, encoders and decoders need."""
    gpus_per_node: Count = 8
    start_s: NonNegative = 60.0
    """From the command to the first request of workers: manifest check, start of Ray."""
    load_s: LoadTimes = LoadTimes()
    preemptions_per_hour: PerHour = 0.0
    """Nodes that the cluster takes away. Each is replaced later."""
    notice_s: NonNegative = 120.0
    """From the notice of a preemption to its end."""
    without_notice: Share = 0.0
    """The share of the preemptions that come without notice."""
    replace_s: tuple[NonNegative, NonNegative] = (300.0, 1800.0)
    """The shortest and the longest time from the end of a node until another joins, evenly distributed."""
    failures_per_hour: PerHour = 0.0
    """Processes of ready workers that die."""
    poisoned: Annotated[int, Field(ge=0)] = 0
    """Samples whose denoise always fails."""
    joins_s: tuple[NonNegative, ...] = ()
    """When further nodes join."""
    stop_after_s: Seconds | None = None
    """When the run gets a stop request, as with `--until`; default: never."""
    turn_s: NonNegative = 0.02
    """From the end of a task to the start of the next on its worker: the driver's time and Ray's."""
    jitter: Share = 0.05
    """Tasks take up to this share longer or shorter than the cost model says."""
    seed: int = 0


def parse_scenario(values: dict[str, Any], name: str = "the scenario") -> Scenario:
    """Raises UserError that lists all problems."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as invalid:
        problems = [explain(Scenario, details) for details in invalid.errors(include_url=False)]
        raise UserError(f"{name}: {'; '.join(problems)}.") from invalid
    if scenario.replace_s[0] > scenario.replace_s[1]:
        raise UserError(f"{name}: replace_s = {list(scenario.replace_s)}; allowed: the shorter time first.")
    return scenario


def read_scenario(url: str) -> dict[str, Any]:
    """The mapping in a YAML file, not validated. Raises UserError if there is none."""
    with open_input("scenario", url) as file:
        content = file.read(MAX_SCENARIO_BYTES + 1)
    if len(content) > MAX_SCENARIO_BYTES:
        raise UserError(f"The scenario {url} has more than {MAX_SCENARIO_BYTES:,} bytes. Give a small YAML file.")
    try:
        values = parse_yaml(content)
    except YamlError as error:
        raise UserError(f"The scenario {url} is not valid YAML: {error}. Fix the file.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        keys = ", ".join(Scenario.model_fields)
        raise UserError(f"The scenario {url} is {shorten(values)}; allowed: a mapping of the keys {keys}.")
    return values
