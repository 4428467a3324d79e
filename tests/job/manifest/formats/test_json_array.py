"""hv_batch.job.manifest.formats.json_array: an array of rows, cut into rows in bounded memory."""

import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.reader import Manifest
from hv_batch.protocol import UserError
from hv_batch.sampling_params import FieldProblem
from tests.support.manifests import check_file, refusal_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(Manifest(str(path)).rows())


@settings(max_examples=40)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    wrapped=st.booleans(),
    chunk=st.sampled_from([1, 7, 1 << 20]),
)
def test_every_array_is_read_back(rows, indent, ascii_only, wrapped, chunk, tmp_path_factory):
    """Property: rows and numbers do not depend on layout, escapes, or where the file is cut."""
    document = {"data": rows} if wrapped else rows
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "CHUNK_BYTES", chunk)
        assert rows_of(tmp_path_factory.mktemp("m") / "m.json", text) == list(enumerate(rows, start=1))


def test_texts_are_prompts(tmp_path):
    """A list of prompts is common; rows of both kinds may be mixed."""
    rows = rows_of(tmp_path / "m.json", '\ufeff["a \\"cat\\"", {"prompt": "b", "seed": 1}]\r\n')
    assert rows == [(1, {"prompt": 'a "cat"'}), (2, {"prompt": "b", "seed": 1})]
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(b'["a"]'))
    assert list(Manifest(str(tmp_path / "m.json.gz")).rows()) == [(1, {"prompt": "a"})]


def test_a_row_that_is_no_object_does_not_end_the_pass(tmp_path):
    """P6: the rules of a row are those of JSON Lines."""
    rows = rows_of(tmp_path / "m.json", '[{"prompt": "a"}, 12, [1], {"a": NaN}, {"b": 1, "b": 2}, "\\ud800", {"c": 1}]')
    assert [number for number, row in rows if isinstance(row, FieldProblem)] == [2, 3, 4, 5, 6]
    assert "an object with a prompt, or a prompt as text" in rows[1][1].allowed
    assert "NaN is not JSON" in rows[3][1].allowed


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"prompt": "a"}', 'an object with the key "prompt"; allowed: an array of rows'),
        ('{"3": {"class_type": "KSampler", "inputs": {}}}', 'an object with the key "3"'),  # a graph of ComfyUI
        ("{}", "an object without keys"),
        ('{"data": [{"prompt": "a"}], "num_inference_steps": 20}', "keys beside `data`, which would be lost"),
        ('{"data": {"prompt": "a"}}', "'[' is expected"),
        ('[{"prompt": "a"}', "the file ends"),
        ('[{"prompt": "a"},]', "at character 17 is not JSON"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "',' is expected"),
        ('[{"prompt": "a}]', "at character 1 is not JSON, or is too long"),
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "it goes on after the array, at character 18"),
        ('"a"', "'[' is expected"),
        ("", "the file ends"),
        ("[" + "[" * 100_000, "nested too deeply"),
        (b'[{"prompt": "\xff"}]', "utf-8"),
        ("[]", "has no rows"),
    ],
)
def test_another_document_is_refused_with_what_is_allowed(document, message, tmp_path):
    """P6: nothing of a document is skipped silently."""
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path / "m.json", document)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700


def test_long_arrays_and_broken_ones_are_read_in_bounded_memory(tmp_path):
    """P7: neither an array of many rows nor a value without an end is held in memory."""
    path = tmp_path / "m.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"prompt": f"{n} " + "x" * 1000}) for n in range(30_000)) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in Manifest(str(path)).rows()) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    path.write_text('["a", "' + "x" * (40 << 20))
    with pytest.raises(UserError, match="a row at character 6 is not JSON, or is too long"):
        list(Manifest(str(path)).rows())


def test_the_columns_of_an_array_are_mapped(tmp_path):
    """`--column` applies to every format with names of columns."""
    (tmp_path / "m.json").write_text(json.dumps({"data": [{"caption": "a", "num_frames": 33}]}))
    (sample,) = check_file(tmp_path / "m.json", columns={"prompt": "caption"})
    assert (sample.params.prompt, sample.params.num_frames) == ("a", 33)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"}]', "it is one JSON array, not one object a line; rename it to .json"),
        ('[\n {"prompt": "a"}\n]', "rename it to .json"),
        ('{\n  "prompt": "a",\n  "id": "x"\n}\n', "it is pretty-printed JSON"),
        ('\ufeff\n{"prompt": "a",\n "id": "x"}\n', "it is pretty-printed JSON"),
    ],
)
def test_a_document_in_a_file_of_json_lines_is_named_as_such(text, message, tmp_path):
    """P6: one message instead of a problem for each line."""
    (tmp_path / "m.jsonl").write_text(text)
    found = refusal_of(tmp_path / "m.jsonl")
    assert message in found
    assert len(found.splitlines()) == 1


def test_broken_lines_are_still_problems_of_their_rows(tmp_path):
    """A first line that is cut off is not mistaken for a document."""
    (tmp_path / "m.jsonl").write_text('{"prompt": "a"\n{"prompt": "b"}\n')
    assert "row 1: line = " in refusal_of(tmp_path / "m.jsonl")
