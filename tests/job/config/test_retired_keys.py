"""hv_batch.job.config.retired_keys: configs and output roots of earlier versions are accepted."""

from __future__ import annotations

import json

import pytest

from hv_batch.job import layout
from hv_batch.job.config import retired_keys
from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.inspection.diff import compare
from hv_batch.job.records.run_document import RunState, fingerprint, open_run, read_run, read_run_config
from hv_batch.job.records.run_identity import run_identity, with_recorded_poster, without_revision
from hv_batch.job.redaction import MASK
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import open_root

WARNING = "the config key encoders.cache is ignored: embeddings are no longer shared between runs; remove"


COLOCATED = {"placement": "colocated", "gpus": 0.3}


def taken(logged):
    """The messages that have been logged since the last call."""
    messages = list(logged)
    logged.clear()
    return messages


def identity_of(config):
    return run_identity(resolve_run(config))


@pytest.fixture(autouse=True)
def _a_new_process():
    """Every test begins without logged warnings."""
    retired_keys._warn.cache_clear()


@pytest.fixture
def write(tmp_path):
    def write_config(text=""):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_config


@pytest.mark.parametrize("value", ["s3://key:secret@bucket/embeddings", "''", "3", "{folder: x}"])
def test_a_removed_key_is_ignored_with_one_warning(write, logged, value):
    """P2: a config or command line of an earlier version is accepted, and its value, maybe a secret, is not logged."""
    assert load_config(write(f"encoders: {{cache: {value!r}, count: 2}}")).encoders.count == 2
    from_file = taken(logged)
    retired_keys._warn.cache_clear()
    assert load_config(write(), [f"encoders.cache={value}"]) == RunConfig()
    for messages in (from_file, taken(logged)):
        (text,) = messages
        assert text.startswith(WARNING)
        assert "secret" not in text


def test_a_removed_key_that_is_null_gives_no_warning(write, logged):
    """P2: null was the default and had no effect."""
    assert load_config(write("encoders: {cache: null}")) == RunConfig()
    assert load_config(write(), ["encoders.cache=null"]) == RunConfig()
    assert taken(logged) == []


def test_only_the_removed_key_is_accepted(write, logged):
    """P6: the same name elsewhere is still an unknown key, also in a section that a YAML alias shares."""
    with pytest.raises(UserError, match=r"decoders\.cache: unknown key"):
        load_config(write("decoders: &same {cache: x}\nencoders: *same\n"))
    with pytest.raises(UserError, match="encoders = 5; allowed: a mapping"):
        load_config(write("encoders: 5"))
    assert len(taken(logged)) == 1


def test_a_retired_value_is_replaced_with_one_warning(write, logged, monkeypatch):
    """P2: a renamed value is read as its successor; other values of the key do not change."""
    table = {"decoders.placement": {"separate": ("pool", "write pool")}}
    monkeypatch.setattr(retired_keys, "RETIRED_VALUES", table)
    assert load_config(write("decoders: {placement: separate}")).decoders.placement == "pool"
    assert taken(logged) == ["decoders.placement = separate is read as pool: write pool"]
    retired_keys._warn.cache_clear()
    assert load_config(write(), ["decoders.placement=separate"]) == RunConfig()
    assert len(taken(logged)) == 1
    assert load_config(write("decoders: {placement: group}")).decoders.placement == "group"
    for unknown in ("[separate]", "Separate"):
        with pytest.raises(UserError, match=r"decoders\.placement"):
            load_config(write(f"decoders: {{placement: {unknown}}}"))
    assert taken(logged) == []


def test_a_warning_is_printed_once_per_process(write, logged):
    """P2: a resume reads run.json more than once and prints each warning once; other warnings are still printed."""
    for _ in range(2):
        load_config(write("encoders: {cache: x}"))
    assert len(taken(logged)) == 1
    load_config(write("encoders: {cache: x}\ndecoders: {placement: colocated}"))
    assert taken(logged)[0].startswith("decoders.placement = colocated is read as pool: ")


@pytest.mark.parametrize(("value", "warnings"), [(None, 0), ("/shared/embeddings", 1), (MASK, 1)])
def test_a_run_of_an_earlier_version_is_resumed(tmp_path, logged, value, warnings):
    """P2: its run.json may contain a removed key, also with a masked secret; the run can be resumed."""
    store, config = Store(str(tmp_path)), RunConfig()
    written = config.model_dump(mode="json")
    written["encoders"]["cache"] = value
    manifest = {"url": "prompts.jsonl", "rows": 1, "samples": 1, "shards": 1}
    old = {"identity": identity_of(config), "config": written, "manifest": manifest, "versions": {}}
    assert open_run(store, old) is RunState.NEW
    recorded, _ = read_run_config(str(tmp_path))
    assert recorded == config
    assert sum(message.startswith(WARNING) for message in taken(logged)) == warnings
    new = {**old, "identity": identity_of(recorded), "config": recorded.model_dump(mode="json")}
    assert open_run(store, new) is RunState.RESUMED


def test_a_removed_key_is_no_difference_between_runs(tmp_path):
    """P3: `diff` compares what changes pixels, which a removed key does not."""
    stores = [Store(str(tmp_path / name)) for name in "ab"]
    for store in stores:
        open_root(store, 4)
    run = read_run(stores[0])
    run["config"]["encoders"] = {"cache": "/shared/embeddings"}
    stores[0].put(layout.RUN, json.dumps(run).encode())
    assert compare(*stores).identity == []


def test_the_fingerprint_of_a_config_is_that_of_earlier_versions():
    """P2: a finished root of an earlier version is recognized only if its identity is the same, except the revision.

    Such a root has `media.poster` in its identity."""
    expected = "21ade442c2aeec577e9277e327aac1c52403977744f3c9ca9b01f691cb333414"
    assert fingerprint(without_revision(with_recorded_poster(identity_of(RunConfig()), False))) == expected


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("decoders: {placement: colocated, gpus: 0.3}", []),
        ("decoders: {gpus: 0.3}", ["decoders.placement=colocated"]),
    ],
)
def test_colocated_decoders_are_read_as_a_pool(tmp_path, logged, text, overrides):
    """A config that named the removed placement loads, keeps its other keys, and is reported in one line."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    decoders = load_config(str(path), overrides).decoders
    assert (decoders.placement, decoders.gpus) == ("pool", 0.3)
    (line,) = taken(logged)
    assert line.startswith("decoders.placement = colocated is read as pool: ")


def test_a_section_that_is_shared_by_an_alias_keeps_its_own_value():
    """`decoders: *same` must not change the encoders, whose placement colocated is still allowed."""
    values = {"encoders": COLOCATED, "decoders": COLOCATED}
    expected = {"encoders": {**COLOCATED}, "decoders": {"placement": "pool", "gpus": 0.3}}
    assert replace_retired(values) == expected


def test_a_run_with_colocated_decoders_can_be_resumed(tmp_path, logged):
    """P2: the config of an earlier version's run.json is read, with the same identity, and reported in one line."""
    config = RunConfig.model_validate({"decoders": {"gpus": 0.3}})
    written = config.model_dump(mode="json")
    written["decoders"]["placement"] = "colocated"
    manifest = {"url": "prompts.jsonl", "rows": 1, "samples": 1}
    document = {"identity": identity_of(config), "config": written, "manifest": manifest, "versions": {}}
    open_run(Store(str(tmp_path)), document)
    read, manifest = read_run_config(str(tmp_path))
    assert (read, manifest) == (config, "prompts.jsonl")
    assert identity_of(read) == identity_of(config)
    assert len(taken(logged)) == 1
