"""No parameter of a row is lost silently: names of other tools, the mapping of columns, and what is only carried."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.cli.run_flags import with_manifest_flags
from hv_batch.cli.sample import flags as sample_flags
from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.manifest.column_aliases import find_alias
from hv_batch.job.manifest.column_mapping import ColumnMapping
from hv_batch.job.manifest.column_report import describe_columns
from hv_batch.job.records.run_identity import run_identity
from hv_batch.protocol import UserError
from tests.support.manifests import check_file, refusal_of, write_rows


def test_a_parameter_under_a_foreign_name_is_a_problem_with_its_remedy(tmp_path):
    """P6: the row of the issue would be rendered with defaults; each column is one problem of all rows."""
    row = {"prompt": "a cat", "steps": 20, "cfg": 5, "frames": 65, "size": "720x1280", "n": 3}
    text = refusal_of(write_rows(tmp_path / "m.jsonl", *({**row, "id": n} for n in range(500))))
    assert "has 5 problem(s) in 500 row(s)" in text
    for expected in (
        'column "steps" (row 1 and 499 more) does not set num_inference_steps, which would be 50 (defaults of the '
        "config); give --column num_inference_steps=steps, or --carry steps if it is data",
        "--column cfg_scale=cfg, or --carry cfg",
        "--column num_frames=frames, or --carry frames",
        'column "size" (row 1 and 499 more) does not set height and width, which would be 720 and 1280 (defaults of '
        "the config); add columns height and width, or --carry size",
        "--column num_videos=n, or --carry n",
    ):
        assert expected in text
    columns = {"num_inference_steps": "steps", "cfg_scale": "cfg", "num_frames": "frames", "num_videos": "n"}
    first, *rest = check_file(write_rows(tmp_path / "m.jsonl", row), columns=columns, carry=["size"])
    assert (first.params.num_inference_steps, first.params.cfg_scale, first.params.num_frames) == (20, 5.0, 65)
    assert (len(rest), first.extra) == (2, {"size": "720x1280"})


@pytest.mark.parametrize(
    ("flag", "column"),
    [
        ("--neg-prompt", "negative_prompt"),
        ("--video-length", "num_frames"),
        ("--infer-steps", "num_inference_steps"),
        ("--embedded-cfg-scale", "guidance_scale"),
        ("--flow-shift", "flow_shift"),
        ("--cfg-scale", "cfg_scale"),
        ("--guidance-rescale", "guidance_rescale"),
        ("--num-videos", "num_videos"),
        ("--seed", "seed"),
    ],
)
def test_the_flags_of_sample_are_known_names(flag, column, tmp_path):
    """The release and `hv-batch sample` have these flags; as columns, they are columns of hv_batch or problems."""
    sample_flags.parse(["--prompt", "a", flag, "1"])
    name = flag.removeprefix("--")
    for written in (name, name.replace("-", "_"), name.replace("-", " ").title()):
        alias = find_alias(written)
        assert alias is not None
        assert alias.columns == (column,)
        if written not in KNOWN_COLUMNS:
            assert f"--column {column}=" in refusal_of(write_rows(tmp_path / "m.jsonl", {"prompt": "a", written: 1}))
    assert find_alias("video_size").columns == ("height", "width")


@pytest.mark.parametrize(
    "row",
    [
        {"steps": 20, "num_inference_steps": 30},
        {"resolution": "720p", "height": 720, "width": 1280},
        {"guidance": 5, "cfg_scale": 5},
        {"steps": None},
        {"length": 129, "score": 1.0, "category": "cat", "duration": 5},
    ],
)
def test_a_foreign_name_beside_the_parameter_is_metadata(row, tmp_path):
    """Only a row that lacks the parameter would be rendered with a default in its place."""
    (sample,) = check_file(write_rows(tmp_path / "m.jsonl", {"prompt": "a", **row}))
    known = {name: value for name, value in row.items() if name not in KNOWN_COLUMNS and value is not None}
    assert sample.extra == known


def test_one_row_without_the_parameter_is_enough(tmp_path):
    """P6: rows may differ; the first of those that would lose the value is named."""
    rows = [{"prompt": "a", "steps": 2, "num_inference_steps": 3}, {"prompt": "b", "steps": 2}, {"prompt": "c"}]
    assert 'column "steps" (row 2) does not set' in refusal_of(write_rows(tmp_path / "m.jsonl", *rows))


def test_names_of_id_and_prompt_beside_the_real_column_are_notes(tmp_path):
    """`name` may name the videos, and `caption` may be the prompt that was meant; both are only carried."""
    index = check_file(write_rows(tmp_path / "m.jsonl", {"prompt": "a", "uuid": "u", "caption": "b"}))
    assert index.summary.warnings == (
        'column "uuid" (first in row 1) is not read as id, only carried as metadata; --column id=uuid reads it',
        'column "caption" (first in row 1) is not read as prompt, only carried as metadata; --column prompt=caption '
        "reads it",
    )
    options = {"columns": {"id": "uuid"}, "carry": ["caption"]}
    index = check_file(write_rows(tmp_path / "m.jsonl", {"prompt": "a", "uuid": "u", "caption": "b"}), **options)
    assert index.summary.warnings == ()
    assert [(sample.key, sample.extra) for sample in index] == [("u", {"caption": "b"})]


def test_rows_without_a_prompt_are_reported_once_for_the_column_that_has_it(tmp_path):
    """P6: one problem for a file of captions, and carrying the column does not make the rows valid."""
    path = write_rows(tmp_path / "m.jsonl", *({"caption": f"c {n}"} for n in range(50)))
    text = refusal_of(path)
    assert "has 1 problem(s) in 50 row(s)" in text
    assert 'prompt is missing in rows with a column "caption" (row 1 and 49 more)' in text
    assert "--column prompt=caption if that is the prompt" in text
    assert "row 50: prompt is missing" in refusal_of(path, carry=["caption"])
    assert [sample.params.prompt for sample in check_file(path, columns={"prompt": "caption"})][:2] == ["c 0", "c 1"]
    (tmp_path / "m.csv").write_text("id,caption\n1,a\n")
    assert "--column prompt=caption" in refusal_of(tmp_path / "m.csv")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_that_is_not_read_is_carried_under_another_name(tmp_path, suffix):
    """`--column fps=`: the frame rate of a source clip is neither read nor lost."""
    path = tmp_path / f"m.{suffix}"
    path.write_text('{"prompt": "a", "fps": 29.97}\n' if suffix == "jsonl" else "prompt,fps\na,29.97\n")
    assert "fps = 29.97" in refusal_of(path)
    (sample,) = check_file(path, columns={"fps": ""})
    assert (sample.fps, float(sample.extra["extra_fps"])) == (24, 29.97)


def test_a_mapped_column_is_read_by_the_rules_of_its_new_name(tmp_path):
    """In text formats, cells of number columns become numbers; folder names are mapped like columns of the file."""
    folder = tmp_path / "steps=20"
    folder.mkdir()
    (folder / "m.csv").write_text("caption,frames,prompt\na,65,old\n")
    columns = {"prompt": "caption", "num_frames": "frames", "num_inference_steps": "steps"}
    (sample,) = check_file(tmp_path, columns=columns)
    assert (sample.params.prompt, sample.params.num_frames, sample.params.num_inference_steps) == ("a", 65, 20)
    assert sample.extra == {"extra_prompt": "old"}


def test_a_mapping_that_no_row_has_is_a_problem(tmp_path):
    """P6: a misspelt column would otherwise leave every row at the default. A column without values is one."""
    path = write_rows(tmp_path / "m.jsonl", {"prompt": "a", "step_count": 3}, {"prompt": "b", "shots": None})
    text = refusal_of(path, columns={"num_inference_steps": "stepcount"})
    assert 'no row has a column "stepcount"; allowed: step_count' in text
    check_file(path, columns={"num_inference_steps": "shots", "fps": ""})


@given(
    names=st.lists(st.sampled_from(["fps", "steps", "a", "extra_fps", "height", "width"]), unique=True),
    columns=st.dictionaries(st.sampled_from(["fps", "height", "width"]), st.sampled_from(["", "a", "width", "height"])),
)
def test_renamed_columns_are_as_many_as_before(names, columns):
    """Property: no column is lost, whatever is mapped; a column that is not mapped keeps its name."""
    sources = [theirs for theirs in columns.values() if theirs]
    if len(set(sources)) < len(sources):
        return
    renamed = ColumnMapping.of(columns).rename(tuple(names))
    assert len(set(renamed)) == len(names)
    for name, new in zip(names, renamed, strict=True):
        assert new == name or name in sources or name in columns


def test_the_mapping_belongs_to_the_identity_only_if_it_is_set(tmp_path):
    """P2: older output roots keep their identity; another mapping is another run."""
    plain, mapped = RunConfig(), RunConfig.model_validate({"manifest": {"columns": {"seed": "s"}, "carry": ["b", "a"]}})
    assert "manifest_options" not in run_identity(resolve_run(plain))
    assert run_identity(resolve_run(mapped))["manifest_options"] == {"columns": {"seed": "s"}, "carry": ["a", "b"]}


def test_the_flags_add_to_the_config(tmp_path):
    """`--column` and `--carry` extend `manifest` of the config; wrong flags are refused with what is allowed."""
    path = tmp_path / "c.yaml"
    path.write_text('manifest: {columns: {prompt: caption, fps: ""}, carry: [size], duplicates: drop}\n')
    options = with_manifest_flags(load_config(str(path)), ["seed=s", "prompt=text"], ["n"], "refuse").manifest
    assert options.columns == {"prompt": "text", "fps": "", "seed": "s"}
    assert (options.carry, options.duplicates) == (["n", "size"], "refuse")
    assert with_manifest_flags(RunConfig(), None, None, None) == RunConfig()
    for column, message in (
        (["steps"], 'is "steps"; allowed: OURS=THEIRS'),
        (["steps=num_steps"], "hv_batch has id, prompt"),
        (["prompt="], "prompt, which every row needs"),
        (["height=size", "width=size"], "each column of the manifest once"),
    ):
        with pytest.raises(UserError, match="--column") as caught:
            with_manifest_flags(RunConfig(), column, None, None)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="'number', 'drop' or 'refuse'"):
        with_manifest_flags(RunConfig(), None, None, "keep")


def test_a_seed_of_minus_one_is_derived_with_a_note(tmp_path):
    """-1 means "random" in other tools. The seed is that of a row without one, so a resume renders the same video."""
    rows = [{"prompt": "a", "id": 1, "seed": -1}, {"prompt": "a", "id": 2, "seed": -1.0}, {"prompt": "a", "id": 3}]
    index = check_file(write_rows(tmp_path / "m.jsonl", *rows))
    without = check_file(write_rows(tmp_path / "n.jsonl", *({"prompt": "a", "id": n} for n in (1, 2, 3))))
    assert [sample.params.seed for sample in index] == [sample.params.seed for sample in without]
    (note,) = index.summary.warnings
    assert "a seed of -1 (row 1 and 1 more) is replaced by one that is derived" in note
    assert "seed = -2" in refusal_of(write_rows(tmp_path / "m.jsonl", {"prompt": "a", "seed": -2}))


def test_carried_columns_are_one_line_in_which_nothing_can_hide(tmp_path):
    """The names come from the manifest: no control character reaches the terminal, and a shell runs none of them."""
    row = {"prompt": "a", "b\x1b[31m": 1, "score": 2, "": 3, **{f"c{n:03}": n for n in range(100)}}
    line, *notes = describe_columns(*_columns(check_file(write_rows(tmp_path / "m.jsonl", row))))
    assert line.startswith("columns carried as metadata: ")
    assert "\x1b" not in line
    assert "score" in line
    assert line.endswith("and 63 more")
    assert notes == []
    assert next(describe_columns([], [])) == "columns carried as metadata: none"
    hostile = write_rows(tmp_path / "m.jsonl", {"prompt": "a", "CFG `reboot`": 1, " cfg": 2, "Steps ": 3})
    text = refusal_of(hostile)
    assert "--column cfg_scale=' cfg'," in text
    assert "--column num_inference_steps='Steps '," in text


def _columns(index):
    return index.summary.extra_kinds, index.summary.warnings
