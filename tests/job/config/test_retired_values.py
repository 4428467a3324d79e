"""hv_batch.job.config.retired_keys: configs and output roots of earlier versions stay usable."""

from __future__ import annotations

import pytest

from hv_batch.job.config import retired_keys
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.records import run_document
from hv_batch.job.records.run_document import read_run_config
from hv_batch.job.records.run_identity import run_identity
from hv_batch.job.storage.store import Store

COLOCATED = {"placement": "colocated", "gpus": 0.3}


def identity_of(config):
    return run_identity(resolve_run(config))


@pytest.fixture(autouse=True)
def _a_new_process():
    """Every test begins without printed warnings."""
    retired_keys._warn.cache_clear()


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("decoders: {placement: colocated, gpus: 0.3}", []),
        ("decoders: {gpus: 0.3}", ["decoders.placement=colocated"]),
    ],
)
def test_colocated_decoders_are_read_as_a_pool(tmp_path, capsys, text, overrides):
    """A config that named the removed placement loads, keeps its other keys, and is reported in one line."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    decoders = load_config(str(path), overrides).decoders
    assert (decoders.placement, decoders.gpus) == ("pool", 0.3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: decoders.placement = colocated is read as pool: ")


def test_a_current_config_is_not_reported(tmp_path, capsys):
    """No warning without a retired value."""
    path = tmp_path / "config.yaml"
    path.write_text("decoders: {placement: group}")
    assert load_config(str(path)).decoders.placement == "group"
    assert capsys.readouterr().err == ""


def test_a_section_that_is_shared_by_an_alias_keeps_its_own_value():
    """`decoders: *same` must not change the encoders, whose placement colocated is still allowed."""
    values = {"encoders": COLOCATED, "decoders": COLOCATED}
    expected = {"encoders": {**COLOCATED}, "decoders": {"placement": "pool", "gpus": 0.3}}
    assert replace_retired(values) == expected


def test_a_run_with_colocated_decoders_can_be_resumed(tmp_path, capsys):
    """P2: the config of an earlier version's run.json is read, with the same identity, and reported in one line."""
    config = RunConfig.model_validate({"decoders": {"gpus": 0.3}})
    written = config.model_dump(mode="json")
    written["decoders"]["placement"] = "colocated"
    manifest = {"url": "prompts.jsonl", "rows": 1, "samples": 1}
    document = {"identity": identity_of(config), "config": written, "manifest": manifest, "versions": {}}
    run_document.open_run(Store(str(tmp_path)), document)
    read, manifest = read_run_config(str(tmp_path))
    assert (read, manifest) == (config, "prompts.jsonl")
    assert identity_of(read) == identity_of(config)
    assert len(capsys.readouterr().err.splitlines()) == 1
