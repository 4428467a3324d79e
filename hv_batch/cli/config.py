"""`hv-batch config`: the shipped configs, the values of a config with their sources, and what a key means."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.config.description import explain_key, resolve_values
from hv_batch.job.config.shipped import find_config, purpose, shipped_configs

app = typer.Typer(help="List, show and explain configs.", no_args_is_help=True)

LINE = 100


@app.command("list")
def list_configs(as_json: Json = False) -> None:
    """List the shipped configs. --config takes their names, such as --config 720p_8gpu."""
    configs = [{"name": name, "path": str(path), "purpose": purpose(path)} for name, path in shipped_configs().items()]
    if as_json:
        show_json("hv_batch/configs/1", {"configs": configs})
        return
    width = max(len(config["name"]) for config in configs) + 2
    for config in configs:
        text = textwrap.fill(config["purpose"], LINE, initial_indent=" " * width, subsequent_indent=" " * width)
        show(f"{config['name']:<{width}}{text.strip()}")


@app.command("show")
def show_config(
    config: Annotated[str, typer.Argument(help="name of a shipped config, YAML file or URL")],
    overrides: Annotated[list[str] | None, typer.Argument(help="as for run", metavar="KEY=VALUE")] = None,
    as_json: Json = False,
) -> None:
    """Show every key of a config with its value, and whether that is an override, in the file, or the default."""
    values = resolve_values(config, overrides or [])
    if as_json:
        show_json("hv_batch/config/1", {"config": find_config(config), "values": [asdict(value) for value in values]})
        return
    texts = [f"{value.key}: {json.dumps(value.value, ensure_ascii=False)}" for value in values]
    width = min(60, max(map(len, texts)))
    for value, text in zip(values, texts, strict=True):
        show(f"{text:<{width}}  # {value.source}")


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="dotted key such as groups.count, or a section such as groups")],
    as_json: Json = False,
) -> None:
    """Explain a key of the config: meaning, allowed values and default."""
    keys = explain_key(key)
    if as_json:
        show_json("hv_batch/config-keys/1", {"keys": [asdict(one) for one in keys]})
        return
    for number, one in enumerate(keys):
        text = textwrap.fill(one.text.replace("`", ""), LINE, initial_indent="  ", subsequent_indent="  ")
        show(f"{chr(10) if number else ''}{one.key}: {one.allowed}; default {one.default}\n{text}")
