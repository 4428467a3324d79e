"""The column `lora`: it names entries of `model.loras`, has one form, and leaves no trace if it is not used."""

from __future__ import annotations

import hashlib
import json
import uuid

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.documents.schema import CommitRecord
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.rows import read_row
from hv_batch.job.manifest.samples import count_lora_changes, group_by_lora
from hv_batch.job.records.latents import sample_identity
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.sampling_params import RULES, canonical_lora, parse_lora, problems
from tests.support.records import SAMPLE, a_commit

LORAS = {"film": {"path": "film.safetensors", "strength": 0.8}, "grain": {"path": "grain.safetensors"}}
CONFIG = RunConfig.model_validate({"model": {"loras": LORAS}})


def index_of(*rows, config=CONFIG, suffix="jsonl"):
    name = f"memory://loras/{uuid.uuid4().hex}.{suffix}"
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    fsspec.filesystem("memory").pipe(name.removeprefix("memory:/"), text.encode())
    return check_manifest(Manifest(name), config, Store(f"memory://{uuid.uuid4().hex}"))


def loras_of(*rows, config=CONFIG, suffix="jsonl"):
    return [sample.params.lora for sample in index_of(*rows, config=config, suffix=suffix)]


def refusal(*rows, config=CONFIG):
    with pytest.raises(UserError) as caught:
        index_of(*rows, config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given_as", "canonical"),
    [
        ("film", "film"),
        (" film : 0.70 ", "film:0.7"),
        ("grain, film:1", "film:1.0,grain"),
        (["grain", "film:1"], "film:1.0,grain"),
        ("film:-.5", "film:-0.5"),
        ("none", ""),
        ("", ""),
        ([], ""),
        (None, ""),
    ],
)
def test_a_row_names_one_or_several_loras_with_strengths(given_as, canonical):
    assert loras_of({"prompt": "a", "lora": given_as}) == [canonical]


def test_a_csv_has_one_cell_for_all_loras():
    rows = ["prompt,lora", 'a,"grain,film:0.5"', "b,", "c,none"]
    assert loras_of(*rows, suffix="csv") == ["film:0.5,grain", "", ""]


def test_rows_without_the_column_have_the_default_and_none_is_none():
    config = RunConfig.model_validate({"model": {"loras": LORAS}, "defaults": {"lora": ["grain", "film:0.5"]}})
    rows = [{"prompt": "a"}, {"prompt": "b", "lora": "none"}, {"prompt": "c", "lora": "film"}]
    assert loras_of(*rows, config=config) == ["film:0.5,grain", "", "film"]


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True).filter(lambda name: name != "none")
choices = st.dictionaries(names, st.none() | st.floats(-100, 100), max_size=8)


@settings(max_examples=50)
@given(choices, st.randoms())
def test_equal_choices_have_one_form_in_any_order(choice, random):
    """P3: the form is part of the sample's identity, and its order is the order of the sums."""
    items = [name if strength is None else f"{name}:{strength!r}" for name, strength in choice.items()]
    random.shuffle(items)
    text = canonical_lora(items)
    assert text == canonical_lora(", ".join(items)) == canonical_lora(text)
    assert parse_lora(text) == choice
    assert not problems({"lora": text})


@given(st.text(max_size=30) | st.lists(st.text(max_size=8), max_size=3) | st.integers() | st.none())
def test_any_other_value_breaks_the_rule_of_the_column(value):
    """What a record holds must be what was rendered: only the canonical form passes."""
    text = canonical_lora(value)
    is_allowed, _ = RULES["lora"]
    assert not is_allowed(text) or text == canonical_lora(text)


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "../film",
        "s3://bucket/film.safetensors",
        "C:\\film",
        "film:x",
        "film:nan",
        "film:1e9",
        "film,film",
        "film,",
        ",".join(f"l{i}" for i in range(9)),
        7,
        {"film": 0.5},
        [["film"]],
        True,
    ],
)
def test_paths_and_other_values_are_refused(value):
    message = refusal({"prompt": "a", "lora": value})
    assert "row 1: lora = " in message
    assert "Paths are not allowed" in message


def test_unknown_names_are_reported_once_with_the_names_of_the_config():
    rows = [{"prompt": f"p{i}", "lora": "anime"} for i in range(20)]
    message = refusal({"prompt": "a", "lora": "film"}, *rows)
    assert message.count("anime") == 1
    expected = (
        'row 2, the first with this value: lora = "anime"; allowed: none, or names of the config\'s model.loras, which'
    )
    assert f"{expected} has film, grain." in message
    assert "which has none" in refusal({"prompt": "a", "lora": "film"}, config=RunConfig())


# Compatibility --------------------------------------------------------------------------------------------------------


def test_without_a_lora_nothing_changes():
    """Stored latents, records, keys and identities of version 0.2.0 stay valid; the digests are those of its code."""
    assert sample_identity(SAMPLE, "0" * 64) == "3438d1df38bcb73166ffa9716c0d5abc5a6f660aa837fbfc25bac59ebc33f853"
    digests = {
        "defaults": "07816773ef872cf3f2db61fa9deafc9d131c5f75b869c5955349690a705c2a64",
        "model": "fb9b1f02e19c9fb65287b07673d0e4318c656a756fa4ff2fa14e847294017519",
    }
    for section, digest in digests.items():
        values = getattr(RunConfig(), section).model_dump(mode="json")
        assert hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() == digest
    assert read_row(1, {"prompt": "a cat", "seed": 3}).key == "bbf901366fef6b19"


def test_a_record_may_lack_the_lora_but_not_have_a_wrong_one():
    record = a_commit()
    assert "lora" not in record["params"]
    CommitRecord.model_validate(record)
    CommitRecord.model_validate(record | {"params": record["params"] | {"lora": "film:0.7"}})
    with pytest.raises(ValueError, match="lora"):
        CommitRecord.model_validate(record | {"params": record["params"] | {"lora": "/etc/passwd"}})


# Order and cost -------------------------------------------------------------------------------------------------------


def test_samples_are_admitted_by_lora_and_the_plan_counts_the_changes():
    """Alternating rows would change the weights for every sample: 12 times instead of 4."""
    config = CONFIG.model_copy(update={"output": CONFIG.output.model_copy(update={"shard_size": 4})})
    rows = [{"prompt": f"p{i}", "lora": ("film", "none")[i % 2]} for i in range(12)]
    index = index_of(*rows, config=config)
    order = [sample.params.lora for shard in range(3) for sample in group_by_lora(index.samples(shard), shard)]
    assert order == ["", "", "film", "film", "film", "film", "", "", "", "", "film", "film"]
    counts, changes = count_lora_changes(index)
    assert (dict(counts), changes) == ({"film": 6, "": 6}, 3)
    changed = sum(one != other for one, other in zip(["", *order], order, strict=False))
    assert changes == changed


def test_without_loras_the_order_is_that_of_the_plan():
    index = index_of(*({"prompt": f"p{i}"} for i in range(9)), config=RunConfig())
    for shard in range(index.shards):
        assert group_by_lora(index.samples(shard), shard) == index.samples(shard)
        assert group_by_lora(index.samples(shard), shard + 1) == index.samples(shard)


# Config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model": {"loras": {"film": {}}}}, "model.loras.film.path"),
        ({"model": {"loras": {"film": {"path": "a", "strength": 101}}}}, "model.loras.film.strength"),
        ({"model": {"loras": {"a/b": {"path": "a"}}}}, "model.loras"),
        ({"model": {"options": {"loras": {}}}}, "belong into model.loras"),
        ({"defaults": {"lora": "film"}}, "model.loras is empty"),
        ({"model": {"loras": LORAS}, "defaults": {"lora": "anime"}}, "allowed: film, grain"),
        ({"model": {"loras": LORAS}, "defaults": {"lora": "/etc/passwd"}}, "Paths are not allowed"),
    ],
)
def test_a_config_that_does_not_name_its_loras_is_refused(tmp_path, values, named):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert named in str(caught.value)
