"""hv_batch.job.manifest.formats.delimited: tab-separated files, and separators that do not fit the suffix."""

import pytest

from hv_batch.job.manifest.reader import Manifest
from tests.support.manifests import refusal_of


def test_tab_separated_files_are_read_as_comma_separated_ones(tmp_path):
    """The same rules: a header, quoted cells, numbers in number columns, an empty cell is a null."""
    (tmp_path / "m.tsv").write_text('prompt\tseed\tnote\n"a, ""red"" ball"\t7\t\nb\t\tx,y\n')
    assert list(Manifest(str(tmp_path / "m.tsv")).rows()) == [
        (2, {"prompt": 'a, "red" ball', "seed": 7, "note": None}),
        (3, {"prompt": "b", "seed": None, "note": "x,y"}),
    ]
    (tmp_path / "m.tsv").write_text('prompt\tseed\n"a"b\t1\n')
    assert "tab-separated cells" in refusal_of(tmp_path / "m.tsv")


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("m.csv", "id;prompt", "separated by semicolons, not by commas; separate them by commas"),
        ("m.csv", '"id";"prompt"', "separated by semicolons, not by commas"),
        ("m.csv", "id\tprompt", "separated by tabs, not by commas; rename the file to .tsv"),
        ("m.tsv", "id,prompt", "separated by commas, not by tabs; rename the file to .csv"),
        ("m.csv", "id,text", "it has no column `prompt`"),
    ],
)
def test_another_separator_is_named(name, header, message, tmp_path):
    """P6: the cause of a header without `prompt` is the separator, not the names."""
    (tmp_path / name).write_text(f"{header}\n")
    assert message in refusal_of(tmp_path / name)
