"""hv_batch.job.manifest.formats.prompt_list: one prompt a line, with the options of musubi-tuner's prompt files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.prompt_list import OPTIONS
from hv_batch.job.manifest.reader import Manifest
from hv_batch.sampling_params import FieldProblem
from tests.support.manifests import check_file, refusal_of


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(Manifest(str(path)).rows())


@pytest.mark.parametrize("chunk_bytes", [1, 8, 1 << 20])
def test_each_line_is_a_prompt(tmp_path, monkeypatch, chunk_bytes):
    """BOM, CRLF, blank lines, comments and a last line without an end are accepted; row numbers are line numbers."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", chunk_bytes)
    rows = rows_of(tmp_path / "m.txt", b"\xef\xbb\xbfa cat\r\n\r\n# a comment\r\n  a dog, 4k \r\n#b\na \xc3\xa4")
    assert rows == [(1, {"prompt": "a cat"}), (4, {"prompt": "a dog, 4k"}), (6, {"prompt": "a ä"})]


@given(prompt=st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="-#")).filter(str.strip))
def test_a_line_without_options_is_the_prompt_as_it_is(prompt, tmp_path_factory):
    """Property: quotation marks, commas, braces and percent signs have no meaning."""
    rows = rows_of(tmp_path_factory.mktemp("m") / "m.txt", prompt)
    assert [row["prompt"].strip() for _, row in rows] == [prompt.strip()]


def test_options_at_the_end_of_a_line_are_parameters(tmp_path):
    """The options that musubi-tuner documents for HunyuanVideo; a dash between words is text."""
    (row, plain) = rows_of(
        tmp_path / "m.txt",
        "A cat -- asleep, well-fed. --w 640 --h 480 --f 25 --d 1 --s 20 --g 6.5 --fs 14.5 --l 2 --n blurry, dark\n"
        "a dog--like robot -- 3 of them\n",
    )
    assert row[1] == {
        "prompt": "A cat -- asleep, well-fed.",
        "width": 640,
        "height": 480,
        "num_frames": 25,
        "seed": 1,
        "num_inference_steps": 20,
        "guidance_scale": 6.5,
        "flow_shift": 14.5,
        "cfg_scale": 2.0,
        "negative_prompt": "blurry, dark",
    }
    assert set(OPTIONS.values()) == set(row[1]) - {"prompt"}
    assert plain[1] == {"prompt": "a dog--like robot -- 3 of them"}
    (sample,) = check_file(_write(tmp_path, "a --w 640 --h 480 --f 25 --d -1"))
    assert (sample.params.width, sample.params.height, sample.params.num_frames) == (640, 480, 25)


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("a cat --i first.png", "--w (width), --h (height), --f (num_frames)"),
        ("a cat --ar 16:9", "or with none"),
        ("a cat --w 640 --w 320", "--w that is given once"),
        ("a cat --w", "--w with a value"),
        ("a cat --s --w 640", "--s with a value"),
        ("--w 640", "prompt is missing"),
        ("a cat --w wide", "width = "),
        ("a cat --h 481", "nearest: 480 and 496"),
        ("a cat \xff", "text in UTF-8"),
    ],
)
def test_an_option_is_read_or_refused_and_never_rendered_as_text(line, allowed, tmp_path):
    """P6: an option without a counterpart, or with a wrong value, is a problem of its row."""
    path = tmp_path / "m.txt"
    path.write_bytes(b"fine\n" + line.encode("latin-1") + b"\nfine as well\n")
    text = refusal_of(path)
    assert "has 1 problem(s) in 3 row(s)" in text
    assert "row 2: " in text
    assert allowed in text


def test_a_line_that_is_too_long_is_one_problem(tmp_path, monkeypatch):
    """P7: a binary file with the suffix .txt is not held in memory."""
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1000)
    rows = rows_of(tmp_path / "m.txt", b"a\n" + b"x" * 5000 + b"\nb")
    assert [isinstance(row, FieldProblem) for _, row in rows] == [False, True, False]


def _write(folder, text):
    (folder / "n.txt").write_text(text)
    return folder / "n.txt"
