"""hv_batch.job.manifest.samples and rows: safe, unique and stable keys, seeds, and the report of all invalid rows."""

import json
import re
import unicodedata
import uuid
from datetime import timedelta

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hv_batch.job.config.field_rules import MAX_VIDEOS
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.rows import make_key, read_row
from hv_batch.job.manifest.samples import derive_seed
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.sampling_params import MAX_SEED, FieldProblem, SamplingParams, problems
from hv_batch.toy.world import SIZES
from tests.support.repository import CONFIGS

PLAIN = RunConfig()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=5,
)


def manifest_of(*rows, name="memory://samples/m.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    fsspec.filesystem("memory").pipe(name.removeprefix("memory:/"), "\n".join(lines).encode())
    return Manifest(name)


def check(manifest, config=PLAIN):
    return check_manifest(manifest, config, Store(f"memory://{uuid.uuid4().hex}"))


def samples_of(*rows, config=PLAIN):
    return list(check(manifest_of(*rows), config))


def refusal(*rows, config=PLAIN):
    with pytest.raises(UserError) as caught:
        check(manifest_of(*rows), config)
    return str(caught.value)


@settings(deadline=None)  # a busy machine is not a failure
@given(row_id=st.text(min_size=1, max_size=300))
@example(row_id="..")
@example(row_id="../../etc/passwd")
@example(row_id="a/../b")
@example(row_id="a..b")
@example(row_id="con.")
@example(row_id="\x00\n")
@example(row_id="雪の灯台")
@example(row_id="x" * 5000)
@example(row_id="\ud800")
def test_a_key_never_leaves_its_directory(row_id):
    """Design section 4: any id becomes a key that is safe in a path."""
    key = make_key(row_id)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", key)
    assert ".." not in key
    assert not key.endswith(".")
    assert make_key(key) == key


@settings(deadline=None)  # a busy machine is not a failure
@given(ids=st.lists(st.text(min_size=1, max_size=80), unique=True, min_size=2, max_size=2))
@example(ids=["a/b", "a\\b"])
@example(ids=["x" * 200 + "1", "x" * 200 + "2"])
def test_different_ids_have_different_keys(ids):
    """P1: each sample has one record, so no two ids share a key."""
    assert make_key(ids[0]) != make_key(ids[1])


@settings(deadline=None)  # a busy machine is not a failure
@given(row_id=st.text(min_size=1, max_size=20))
@example(row_id="\u00e9")
@example(row_id="e\u0301")
@example(row_id="\u212b")
@example(row_id="\ufb01lm")
def test_ids_that_a_store_may_confuse_have_different_keys(row_id):
    """P1: some stores normalise Unicode; keys are ASCII, and keys that differ only in case are rejected."""
    key = make_key(row_id)
    assert key.isascii()
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        other = unicodedata.normalize(form, row_id)
        assert (make_key(other).lower() == key.lower()) == (other == row_id or _differ_in_case_alone(other, row_id))


def _differ_in_case_alone(one, other):
    """Whether both ids are valid keys that differ only in case."""
    return make_key(one) == one and make_key(other) == other and one.lower() == other.lower()


@pytest.mark.parametrize("row_id", ["a", "shot-0017", "2024.05.01_take-2", "A" * 96])
def test_a_safe_id_is_its_own_key(row_id):
    """An id that is safe in a path is used as the key unchanged."""
    assert make_key(row_id) == row_id


def test_ids_of_any_reasonable_type_are_taken():
    """Parquet and pandas write ids as ints, or as floats in columns with nulls."""
    assert [sample.id for sample in samples_of(*({"prompt": "a", "id": value} for value in (7, 8.0, "9", "Ä b")))] == [
        "7",
        "8",
        "9",
        "Ä b",
    ]
    for value in ("", "  ", True, 1.5, [1], {"a": 1}):
        assert "id = " in refusal({"prompt": "a", "id": value})


@settings(deadline=None)  # a busy machine is not a failure
@given(order=st.permutations(["prompt", "seed", "height", "tag"]))
def test_a_row_without_id_is_named_by_its_content(order):
    """P2, P3: the key does not depend on position, column order, nulls, or the notation of a whole number."""
    row = {"prompt": "a red ball", "seed": 5, "height": 720, "tag": "x"}
    key = read_row(1, row).key
    assert re.fullmatch(r"[0-9a-f]{16}", key)
    assert read_row(9, {name: row[name] for name in order}).key == key
    assert read_row(1, {**row, "height": 720.0, "width": None, "prompt": " a red ball\n"}).key == key
    for changed in ({"prompt": "a blue ball"}, {"seed": 6}, {"tag": "y"}, {"width": 1280}):
        assert read_row(1, {**row, **changed}).key != key


def test_keys_never_change_between_versions():
    """P2: a new version must find the objects of an old output root, so the expected keys are literals."""
    assert read_row(1, {"prompt": "a red ball", "cfg_scale": 6}).key == "7e6ef1b4572139a2"
    assert make_key("shots/17 final") == "shots-17-final-3757c11cb4"
    assert derive_seed(0, "shot-17") == 1639044133


@settings(deadline=None)  # a busy machine is not a failure
@given(run_seed=st.integers(0, MAX_SEED), row_id=st.text("abc-1", min_size=1, max_size=8))
def test_derived_seeds_are_31_bits_and_follow_run_seed_and_key(run_seed, row_id):
    """P3: the seed depends on run seed and row, and stays valid if the video index is added."""
    seed = derive_seed(run_seed, row_id)
    assert seed == derive_seed(run_seed, row_id)
    assert 0 <= seed < 2**31
    assert seed + MAX_VIDEOS <= MAX_SEED
    assert seed != derive_seed(run_seed + 1, row_id)
    assert seed != derive_seed(run_seed, row_id + "x")


def test_videos_of_a_row_have_consecutive_seeds():
    """Spec section 1: video i of a prompt uses seed + i; a single video keeps the plain key."""
    four = samples_of(
        {"prompt": "a", "id": "one", "seed": 7}, {"prompt": "a", "id": "many", "seed": 7, "num_videos": 3}
    )
    assert [(s.key, s.id, s.row, s.video_index, s.params.seed) for s in four] == [
        ("one", "one", 1, 0, 7),
        ("many-v0", "many", 2, 0, 7),
        ("many-v1", "many", 2, 1, 8),
        ("many-v2", "many", 2, 2, 9),
    ]
    (derived, following) = samples_of({"prompt": "a", "id": "d", "num_videos": 2})
    assert derived.params.seed == derive_seed(PLAIN.seed, "d")
    assert following.params.seed == derived.params.seed + 1


def test_seeds_are_at_most_max_seed():
    """Spec section 1: seed + i must be valid for the number of videos of the row or the config."""
    last = {"prompt": "a", "seed": MAX_SEED}
    assert samples_of(last)[0].params.seed == MAX_SEED
    assert "row 1: seed = 9223372036854775807; allowed: at most 2^63 - 2" in refusal({**last, "num_videos": 2})
    two = RunConfig.model_validate({"defaults": {"num_videos": 2}})
    assert "at most 2^63 - 2" in refusal(last, config=two)
    assert "from 0 to 2^63 - 1" in refusal({"prompt": "a", "seed": MAX_SEED + 1})


def test_rows_are_completed_from_the_defaults():
    """Defaults come from the config, each sampling parameter reaches the sample, further columns stay unchanged."""
    config = RunConfig.model_validate({"defaults": {"height": 256, "fps": 12}, "output": {"shard_size": 2}})
    row = {
        "prompt": "  a  ",
        "negative_prompt": "",
        "width": 512.0,
        "num_frames": 33,
        "num_inference_steps": 5,
        "seed": 3,
        "guidance_scale": 1,
        "cfg_scale": 2.5,
        "guidance_rescale": 0.5,
        "flow_shift": 9,
        "take": {"number": 3},
        "note": None,
    }
    assert samples_of(row, config=config)[0].params == SamplingParams(
        prompt="a",
        negative_prompt="",
        height=256,
        width=512,
        num_frames=33,
        num_inference_steps=5,
        seed=3,
        guidance_scale=1.0,
        cfg_scale=2.5,
        guidance_rescale=0.5,
        flow_shift=9.0,
    )
    (sample,) = samples_of(row, config=config)
    assert (sample.fps, sample.extra) == (12, {"take": {"number": 3}})
    assert type(sample.params.width) is int
    assert type(sample.params.guidance_scale) is float
    shards = [s.shard for s in samples_of(*({"prompt": "a", "seed": n} for n in range(5)), config=config)]
    assert shards == [0, 0, 1, 1, 2]


@settings(deadline=None)  # a busy machine is not a failure
@given(
    values=st.dictionaries(
        st.sampled_from(["prompt", "id", "height", "num_frames", "seed", "num_videos", "cfg_scale", "fps", "extra"]),
        json_values | st.sampled_from([16, 720.0, 33, 2**53, 2.0**60, 10**400, -1]),
    )
)
def test_a_row_is_either_invalid_or_renderable(values):
    """P6: property: a row gives problems, or parameters that break no rule and metadata that JSON can hold."""
    row = read_row(1, values)
    if row.problems:
        assert all(isinstance(problem, FieldProblem) for problem in row.problems)
        return
    parameters = {**PLAIN.defaults.model_dump(), **row.values}
    assert problems(parameters) == []
    assert {"height": int, "num_frames": int, "fps": int, "cfg_scale": float}.items() <= {
        name: type(value) for name, value in parameters.items()
    }.items()
    json.dumps(dict(row.extra), allow_nan=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"height": 721}, "height = 721; allowed: a multiple of 16 from 16 to 8192; nearest: 720 and 736"),
        ({"width": 8200}, "width = 8200; allowed: a multiple of 16 from 16 to 8192; nearest: 8192"),
        ({"num_frames": 34}, "as 33, 65 or 129; nearest: 33 and 37"),
        ({"height": "720"}, 'height = "720"; allowed: a multiple of 16'),
        ({"height": True}, "height = true; allowed: a multiple of 16"),
        ({"height": 720.5}, "height = 720.5; allowed: a multiple of 16"),
        ({"seed": 2.0**60}, "seed = 1.152921504606847e+18; allowed: a whole number"),
        ({"seed": "7"}, 'seed = "7"; allowed: a whole number'),
        ({"prompt": ["a"]}, 'prompt = ["a"]; allowed: a text that is not blank'),
        ({"prompt": " \n"}, 'prompt = ""; allowed: a text that is not blank'),
        ({"prompt": None}, "prompt is missing; allowed: a text that is not blank"),
        ({"negative_prompt": 3}, "negative_prompt = 3; allowed: a text"),
        ({"cfg_scale": 0.5}, "cfg_scale = 0.5; allowed: a number from 1 (off) to 100"),
        ({"guidance_scale": 10**400}, "allowed: a number from 0 to 100"),
        ({"fps": 0}, "fps = 0; allowed: a whole number from 1 to 240"),
        ({"num_videos": 10_001}, "num_videos = 10001; allowed: a whole number from 1 to 10000"),
    ],
)
def test_an_invalid_value_is_reported(values, expected):
    """P6: the report has the row number, field, value and allowed values."""
    assert f"row 2: {next(iter(values))}" in (text := refusal({"prompt": "fine"}, {"prompt": "a", **values}))
    assert expected in text


def test_a_size_that_the_codec_refuses_is_reported():
    """P6: libx265 refuses thin and long videos; other codecs, and images of this size, are rendered."""
    h265 = RunConfig.model_validate({"media": {"codec": "h265"}})
    rows = [{"prompt": "a", "height": 16, "width": 4176}, {"prompt": "b", "height": 8192, "width": 16}]
    text = refusal(*rows, config=h265)
    assert "row 1: width = 4176; allowed: at most 4160 with height 16 and media.codec = h265" in text
    assert "row 2: height = 8192; allowed: at most 4160 with width 16 and media.codec = h265" in text
    fitting = [
        {"prompt": "c", "height": 16, "width": 4160},
        {"prompt": "d", "height": 32, "width": 8192},
        {"prompt": "e", "height": 16, "width": 8192, "num_frames": 1},
    ]
    assert len(samples_of(*fitting, config=h265)) == 3
    assert len(samples_of(*rows)) == 2


def test_all_invalid_rows_are_reported_together():
    """P6: one error lists unreadable lines, invalid values, duplicate keys and likely typing errors."""
    config = RunConfig.model_validate({"manifest": {"duplicates": "refuse"}})
    text = refusal(
        {"prompt": "a", "id": "Shot", "height": 1},
        "{not json",
        {"prompt": "a"},
        {"id": "shot", "heights": 33},
        {"prompt": " a "},
        {"prompt": "x" * 1000, "cfg_scale": -1},
        {"prompt": "a", "id": "good"},
        {"prompt": "y" * 1000, "seed": "z" * 1000},
        config=config,
    )
    assert "has 7 problem(s) in 8 row(s)" in text
    for expected in (
        "row 1: height = 1;",
        "row 2: line = ",
        "row 4: prompt is missing",
        "row 4: id = \"shot\"; allowed: an id that differs not only by case; row 1 has 'Shot'",
        "row 5: id is missing; allowed: rows that differ; row 3 is the same. Give both an id or another seed",
        "row 6: cfg_scale = -1",
        'row 8: seed = "zzz',
        "note: column \"heights\" (first in row 4) is not 'height'",
    ):
        assert expected in text
    assert "good" not in text
    assert max(map(len, text.splitlines())) < 250


def test_a_video_of_a_row_may_not_take_the_key_of_another_row():
    """P1: keys are unique over samples, not only over ids."""
    text = refusal({"prompt": "a", "id": "x", "num_videos": 3}, {"prompt": "b", "id": "x-V1"})
    assert "row 2: id = \"x-V1\"; allowed: an id whose files have other names; the files of row 1 (id 'x') are" in text
    check(manifest_of({"prompt": "a", "id": "x", "num_videos": 3}, {"prompt": "b", "id": "x-v3"}))


def test_oversized_values_are_reported_with_their_row(tmp_path):
    """P6, P7: too long texts, too deep nesting and too many digits give one problem each, never a crash."""
    deep = "[" * 500 + "]" * 500
    text = refusal(
        {"prompt": "x" * 100_001},
        {"prompt": "a", "negative_prompt": "x" * 100_001},
        {"prompt": "a", "id": "x" * 100_001},
        '{"prompt": "a", "id": "deep", "note": ' + deep + "}",
        '{"prompt": "a", "id": "long", "note": ' + "9" * 2000 + "}",
        '{"prompt": "a", "id": "infinite", "note": 1e999}',
        {"prompt": "a", "id": "fine" * 2500, "note": [[1]], "other": "\x00\x1b[31m"},
    )
    assert "has 6 problem(s) in 7 row(s)" in text
    for expected in (
        'row 1: prompt = "xxx',
        'row 2: negative_prompt = "xxx',
        'row 3: id = "xxx',
        "row 4: note = [[[[",
        "row 5: note = 999",
        "row 6: note = Infinity; allowed: a value that JSON can hold, nested at most 100 deep",
    ):
        assert expected in text
    pq.write_table(pa.table({"prompt": ["a", "x" * (50 << 20)]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r'row 2: row = "50.0 MiB"; allowed: columns of together at most 16 MiB'):
        check(Manifest(str(tmp_path / "m.parquet")))
    pq.write_table(pa.table({"prompt": ["a"], "note": ["x" * (17 << 20)]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"row 1: row = .17\.0 MiB.; allowed: columns of together at most 16 MiB"):
        check(Manifest(str(tmp_path / "m.parquet")))


def test_a_manifest_with_too_many_columns_is_rejected():
    """P7: each further column becomes a metadata column, so their number is limited to a thousand."""
    assert len(check(manifest_of(*({"prompt": "a", f"c{n}": n} for n in range(1000)))).summary.extra_kinds) == 1000
    assert "more than 1000 columns" in refusal(*({"prompt": "a", f"c{n}": n} for n in range(1001)))


def test_the_report_of_problems_is_bounded():
    """P7: the report has details of the first thousand problems and the number of the others."""
    text = refusal(*({"prompt": "a", "id": n, "height": 1} for n in range(1500)))
    assert "has 1500 problem(s)" in text
    assert len(text.splitlines()) == 1 + 1000 + 1
    assert text.endswith("and 500 more")
    clashes = refusal(*({"prompt": "a", "id": n // 2} for n in range(5000)))
    assert "has 2500 problem(s)" in clashes
    assert clashes.endswith("and 1500 more")


def test_a_valid_manifest_has_a_summary():
    """One pass gives `rows`, `samples`, `shards`, `shapes`, warnings and the digest."""
    config = RunConfig.model_validate({"output": {"shard_size": 2}})
    manifest = manifest_of(
        {"prompt": "a", "num_videos": 3, "seed": 3, "Seed": 4, "uuid": "x"},
        {"prompt": "b", "height": 544, "width": 960, "heights": 1, "steps": 3, "num_inference_steps": 3},
    )
    summary = check(manifest, config).summary
    assert (summary.rows, summary.samples, summary.shards) == (2, 4, 2)
    assert summary.shapes == {(720, 1280, 129): 3, (544, 960, 129): 1}
    assert summary.digest == manifest.digest
    assert [re.match(r'column "(\w+)" \(first in row (\d)\)', text).groups() for text in summary.warnings] == [
        ("uuid", "1"),
        ("heights", "2"),
    ]


def test_parquet_gives_the_same_samples_as_jsonl(tmp_path):
    """P3: the format of the manifest is not part of a video's identity."""
    rows = [
        {"prompt": "a", "id": None, "height": 720, "seed": None, "cfg_scale": 6.0, "take": 1},
        {"prompt": "b", "id": None, "height": None, "seed": 5, "cfg_scale": None, "take": None},
        {"prompt": "c", "id": "c/1", "height": 544, "seed": None, "cfg_scale": 1.0, "take": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    with_gaps = pa.Table.from_pylist(rows).set_column(2, "height", pa.array([720.0, None, 544.0]))
    pq.write_table(with_gaps, tmp_path / "gaps.parquet")  # pandas writes whole numbers like this in a column with nulls
    sparse = [{name: value for name, value in row.items() if value is not None} for row in rows]
    sparse[0]["cfg_scale"] = 6
    expected = samples_of(*sparse)
    for path in (tmp_path / "m.parquet", tmp_path / "gaps.parquet"):
        assert list(check(Manifest(str(path)))) == expected


def test_parquet_values_without_a_json_type_become_text_and_numbers(tmp_path):
    """Any type but binary is allowed in a further column: a duration becomes seconds, a UUID text, NaN is missing."""
    columns = {
        "prompt": ["a"],
        "length": [timedelta(seconds=2.5)],
        "score": [float("nan")],
        "take": pa.array([uuid.UUID(int=7).bytes], pa.uuid()),
    }
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    manifest = Manifest(str(tmp_path / "m.parquet"))
    (sample,) = check(manifest)
    assert sample.extra == {"length": 2.5, "take": "00000000-0000-0000-0000-000000000007"}


def test_nan_in_a_known_column_is_invalid(tmp_path):
    """P6: a NaN in a known column is reported and not replaced by a default."""
    pq.write_table(pa.table({"prompt": ["a"], "cfg_scale": [float("nan")]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"row 1: cfg_scale = NaN; allowed: a number"):
        check(Manifest(str(tmp_path / "m.parquet")))


def test_the_demo_manifest_shows_what_the_renderer_can_do():
    """The shipped demo: 12 prompts, the sizes that the toy was trained at and another, a row of two images, one without
    CFG; cheap.
    """
    config = load_config(str(CONFIGS / "demo_cpu.yaml"))
    manifest = Manifest(str(CONFIGS / "demo_prompts.jsonl"))
    index = check(manifest, config)
    summary, samples = index.summary, list(index)
    assert summary.rows == 12
    assert summary.warnings == ()
    assert {shape[:2] for shape in summary.shapes} > set(SIZES)
    assert [sample.params.is_image for sample in samples].count(True) == 2
    assert [sample.params.uses_cfg for sample in samples].count(False) == 1
    assert [sample.params.guidance_rescale > 0 for sample in samples].count(True) == 1
    assert any(sample.video_index == 1 for sample in samples)
    assert all(sample.extra.keys() == {"category"} for sample in samples)
    tokens = [
        params.latent_shape[1] * params.height // 16 * (params.width // 16) for params in (s.params for s in samples)
    ]
    assert any(count % 2 for count in tokens)  # a group of two ranks has to pad these
    assert sum(tokens) < 10_000
