"""hv_batch.job.manifest.files: the files of a manifest, their order, and the detection of changes."""

import hashlib
import json
import os
import re
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.files import refuse_own_outputs
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.sampling_params import FieldProblem


def check(manifest):
    return check_manifest(manifest, RunConfig(), Store(f"memory://{uuid.uuid4().hex}"))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(*urls):
    return [row["prompt"] for _, row in Manifest(urls).rows()]


def refusal(*urls):
    with pytest.raises(UserError) as caught:
        list(Manifest(urls).rows())
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A folder with files of three formats, hidden files and a subfolder."""
    write(tmp_path / "in" / "b.jsonl", {"prompt": "b1"}, {"prompt": "b2"})
    write(tmp_path / "in" / "c" / "a.csv", "prompt,seed\n", "c1,5\n")
    pq.write_table(pa.table({"prompt": ["a1"]}), tmp_path / "in" / "a.parquet")
    for hidden in ("_SUCCESS", ".a.parquet.crc", "_temporary/x.jsonl"):
        write(tmp_path / "in" / hidden, "no row")
    return tmp_path / "in"


def test_a_folder_is_all_its_files_sorted_by_path(folder):
    """P3: the order does not depend on the listing, and rows are numbered over all files."""
    assert prompts(str(folder)) == ["a1", "b1", "b2", "c1"]
    assert [number for number, _ in Manifest(str(folder)).rows()] == [1, 2, 3, 3 + 2]  # a CSV's first row is line 2
    assert prompts(f"{folder}/") == prompts(f"{folder}/*.parquet", f"{folder}/**/*.csv", f"{folder}/b.jsonl")


def test_a_file_that_matches_two_patterns_is_read_once(folder):
    """A manifest has no duplicate files, and the order of the URLs does not matter."""
    assert prompts(f"{folder}/b.jsonl", f"{folder}/*.jsonl", str(folder)) == ["a1", "b1", "b2", "c1"]
    assert Manifest([f"{folder}/c", f"{folder}/b.jsonl"]).sources == Manifest([f"{folder}/b*", f"{folder}/c"]).sources


def test_a_file_name_may_contain_glob_characters(tmp_path):
    """A URL that exists as written is not expanded as a glob."""
    assert prompts(write(tmp_path / "take[1].jsonl", {"prompt": "a"})) == ["a"]


def test_folders_named_like_columns_are_columns(tmp_path):
    """Hive-style partitions are parsed by the rule of their column and percent-decoded; Hive's null name is a null."""
    for day, height in (("2026-11-19", "720"), ("2026-11-20", "__HIVE_DEFAULT_PARTITION__")):
        write(tmp_path / f"date={day}" / f"height={height}" / "kind=a%2Fb" / "m.jsonl", {"prompt": day})
    rows = [row for _, row in Manifest(str(tmp_path)).rows()]
    assert rows == [
        {"prompt": "2026-11-19", "date": "2026-11-19", "height": 720, "kind": "a/b"},
        {"prompt": "2026-11-20", "date": "2026-11-20", "height": None, "kind": "a/b"},
    ]
    index = check(Manifest(f"{tmp_path}/date=*/**/*.jsonl"))
    assert [(sample.params.height, sample.extra["date"]) for sample in index] == [
        (720, "2026-11-19"),
        (720, "2026-11-20"),
    ]


def test_folders_above_the_manifest_set_nothing(tmp_path):
    """Only folders below the named folder or glob are the manifest's own; others are named in a note."""
    base = tmp_path / "fps=60"
    write(base / "seed=7" / "m.jsonl", {"prompt": "a"})
    for url, row in (
        (f"{base}/seed=7/m.jsonl", {"prompt": "a"}),
        (f"{base}/seed=7/*.jsonl", {"prompt": "a"}),
        (f"{base}/seed=7", {"prompt": "a"}),
        (f"{base}", {"prompt": "a", "seed": 7}),
        (f"{base}/", {"prompt": "a", "seed": 7}),
        (f"{base}/*/m.jsonl", {"prompt": "a", "seed": 7}),
        (f"{base}/seed=*/m.jsonl", {"prompt": "a", "seed": 7}),
        (f"{tmp_path}", {"prompt": "a", "seed": 7, "fps": 60}),
        (f"{tmp_path}/*=60/*/*.jsonl", {"prompt": "a", "seed": 7, "fps": 60}),
    ):
        assert [found for _, found in Manifest(url).rows()] == [row], url
    urls = [f"{base}/seed=7/m.jsonl", str(base)]
    assert list(Manifest(urls).rows()) == list(Manifest(urls[::-1]).rows()) == [(1, {"prompt": "a", "seed": 7})]
    (note,) = check(Manifest(f"{base}")).summary.warnings
    assert 'the folder "fps=60" sets no column' in note


def test_a_row_that_contradicts_its_folder_is_invalid(tmp_path):
    """P6: two different values are ambiguous; the same value twice is allowed."""
    write(tmp_path / "take=7" / "m.jsonl", {"prompt": "a", "take": 7}, {"prompt": "b", "take": 8})
    (_, same), (number, problem) = Manifest(str(tmp_path)).rows()
    assert same == {"prompt": "a", "take": "7"}
    assert number == 2
    assert isinstance(problem, FieldProblem)
    assert (problem.field, problem.value) == ("take", 8)


def test_problems_name_file_and_row(tmp_path):
    """P6: with several files, the row number alone is not enough; mixed schemas are validated row by row."""
    write(tmp_path / "a.jsonl", {"prompt": "a", "id": "Shot"}, {"prompt": "b", "height": 1}, "{bad\n")
    write(tmp_path / "b.csv", "prompt,id,heights\n", "c,,1\n", "d,shot,1\n", "e,x,\n")
    pq.write_table(pa.table({"prompt": ["f", None], "seed": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(UserError) as caught:
        check(Manifest(str(tmp_path)))
    text = str(caught.value)
    assert "5 problem(s) in 8 row(s)" in text
    for expected in (
        f"{tmp_path}/a.jsonl: row 2: height = 1",
        f"{tmp_path}/a.jsonl: row 3: line = ",
        f'{tmp_path}/b.csv: row 3: id = "shot"; allowed: an id that differs not only by case; '
        f"{tmp_path}/a.jsonl: row 1 has 'Shot'",
        f'{tmp_path}/c.parquet: row 1: seed = "x"',
        f"{tmp_path}/c.parquet: row 2: prompt is missing",
        f'column "heights" (first in {tmp_path}/b.csv: row 2)',
    ):
        assert expected in text


def test_mixed_schemas_join_their_columns(tmp_path):
    """Files may have different columns; a column with several types is JSON text in all of them."""
    write(tmp_path / "a.jsonl", {"prompt": "a", "take": 1, "only_a": True})
    pq.write_table(pa.table({"prompt": ["b"], "take": ["x"]}), tmp_path / "b.parquet")
    assert check(Manifest(str(tmp_path))).summary.extra_kinds == {"take": "json", "only_a": "bool"}


def test_missing_and_foreign_files_are_reported_by_name(folder, tmp_path):
    """P6: no file is skipped silently."""
    assert f"{tmp_path}/none-*.jsonl does not exist" in refusal(f"{tmp_path}/none-*.jsonl")
    write(folder / "notes.md", "hello")
    assert f"{folder}/notes.md has the suffix '.md'; allowed: .jsonl, .ndjson" in refusal(str(folder))
    (tmp_path / "empty").mkdir()
    assert "is a folder without files" in refusal(str(tmp_path / "empty"))
    write(tmp_path / "bad" / "a.csv", "text\n", "x\n")
    assert f"{tmp_path}/bad/a.csv cannot be read as csv: it has no column `prompt`" in refusal(str(tmp_path / "bad"))


def test_the_digest_of_several_files_is_of_their_bytes_and_partitions(tmp_path):
    """P2: a copy elsewhere is the same manifest; other bytes, another order or folder column make another manifest."""

    def digest(root, *files):
        for name, prompt in files:
            write(tmp_path / root / name, {"prompt": prompt})
        manifest = Manifest(str(tmp_path / root))
        list(manifest.rows())
        assert Manifest(str(tmp_path / root)).read_digest() == manifest.digest
        return manifest.digest

    two = digest("one", ("a.jsonl", "x"), ("b.jsonl", "y"))
    assert digest("copy", ("a.jsonl", "x"), ("b.jsonl", "y")) == two
    assert digest("renamed", ("1.jsonl", "x"), ("2.jsonl", "y")) == two
    assert digest("swapped", ("a.jsonl", "y"), ("b.jsonl", "x")) != two
    assert digest("alone", ("a.jsonl", "x")) == hashlib.sha256(b'{"prompt": "x"}\n').hexdigest()
    assert digest("dated", ("date=1/a.jsonl", "x")) != digest("other", ("date=2/a.jsonl", "x"))


def test_a_file_that_changes_while_it_is_read_is_reported_by_name(tmp_path):
    """P2: each open compares size and time (or ETag), and each complete pass compares the bytes."""
    first, second = (write(tmp_path / name, {"prompt": name}, {"prompt": "x"}) for name in ("a.jsonl", "b.jsonl"))

    def error_of(change):
        manifest = Manifest(str(tmp_path))
        rows = manifest.rows()
        next(rows)
        change()
        with pytest.raises(UserError, match="changed while it was read") as caught:
            list(rows)
        return str(caught.value)

    assert first in error_of(lambda: write(tmp_path / "a.jsonl", {"prompt": "longer than it was"}))
    assert second in error_of(lambda: write(tmp_path / "b.jsonl", {"prompt": "longer than it was"}))
    assert second in error_of(lambda: os.utime(second, (1, 1)))
    write(tmp_path / "c.jsonl", {"prompt": "c"})
    assert "c.jsonl does not exist" in _read_until_gone(tmp_path)


def _read_until_gone(folder):
    manifest = Manifest(str(folder))
    rows = manifest.rows()
    next(rows)
    (folder / "c.jsonl").unlink()
    with pytest.raises(UserError) as caught:
        list(rows)
    return str(caught.value)


def test_folders_and_globs_of_a_bucket(s3):
    """Design section 4: names of files in a bucket are complete URLs, and a changed ETag is detected."""
    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"in-{uuid.uuid4().hex}"
    bucket.mkdir(name)
    for day in ("19", "20"):
        bucket.pipe(f"{name}/date={day}/m.jsonl", b'{"prompt": "%s"}\n' % day.encode())
    assert [row["date"] for _, row in Manifest(f"s3://{name}").rows()] == ["19", "20"]
    manifest = Manifest(f"s3://{name}/date=*/*.jsonl")
    assert [source.name for source in manifest.sources] == [f"s3://{name}/date={day}/m.jsonl" for day in ("19", "20")]
    bucket.pipe(f"{name}/date=20/m.jsonl", b'{"prompt": "21"}\n')  # of the same size
    with pytest.raises(UserError, match=r"date=20/m\.jsonl changed while it was read"):
        list(manifest.rows())


@pytest.mark.parametrize(
    ("manifest", "root", "is_refused"),
    [
        (".", "out", True),
        (".", ".", True),
        ("**/*.parquet", "out", True),
        ("*/plan/*", "out", True),
        ("link", "out", True),  # a symbolic link to the folder
        ("out", "link/out", True),
        ("out/data", "out", True),
        ("prompts.jsonl", "out", False),
        ("prompts.jsonl", ".", False),
        ("*.jsonl", "out", False),
        ("*/*.jsonl", "out", False),
        ("prompts", "out", False),
        ("out/prompts", "out", False),
        (".", "_out", False),  # hidden files of a folder are not read
        ("missing", "out", False),
    ],
)
def test_a_folder_or_glob_must_not_read_the_output_root(tmp_path, manifest, root, is_refused):
    """P6: what would be read is decided by the rules that find the files of a manifest."""
    for folder in ("prompts", "out/prompts", "out/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    url = str(tmp_path / manifest)
    if is_refused:
        with pytest.raises(UserError, match="would also read the output root"):
            refuse_own_outputs([url], str(tmp_path / root), layout.examples())
    else:
        refuse_own_outputs([url], str(tmp_path / root), layout.examples())
    refuse_own_outputs([url], "memory://out", layout.examples())


def test_an_example_of_each_kind_of_object_is_known():
    """A new kind of object must be compared with the manifest as well."""
    made = {key.split("/")[0].rsplit(".", 1)[0] for key in layout.examples()}
    documented = re.findall(r"^    ([\w_]+)", layout.__doc__, re.MULTILINE)
    assert set(documented) <= made
