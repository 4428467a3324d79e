"""hv_batch.job.manifest.reader: rows are read lazily from any URL, and unreadable ones are reported."""

import csv
import datetime
import gzip
import hashlib
import itertools
import json
import tracemalloc
from decimal import Decimal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.limits import MAX_LINE_BYTES
from hv_batch.job.manifest.reader import Manifest
from hv_batch.protocol import UserError
from hv_batch.sampling_params import FieldProblem


def jsonl(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Manifest(str(path))


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return Manifest(str(path))


def refusal(manifest):
    with pytest.raises(UserError) as caught:
        list(manifest.rows())
    assert manifest.name in str(caught.value)
    return str(caught.value)


def test_jsonl_rows_carry_their_line_number(tmp_path):
    """P6: row numbers are line numbers, as in an editor; blank lines count; BOM and CRLF are accepted."""
    manifest = jsonl(
        tmp_path / "m.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "\xc3\xa4"}\n{"prompt": "c"}'
    )
    assert list(manifest.rows()) == [(1, {"prompt": "a"}), (4, {"prompt": "ä"}), (5, {"prompt": "c"})]
    assert list(manifest.rows()) == list(manifest.rows())


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        (b'{"prompt": ', "one JSON object a line"),
        (b"[1, 2]", "one JSON object a line"),
        (b'"prompt"', "one JSON object a line"),
        (b'{"prompt": "a", "cfg_scale": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "value has 5000 digits)"),
        (b'{"prompt": "a", "meta": {"x": -Infinity}}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', 'the key "prompt" is given twice'),
        (b'{"prompt": "\xff"}', "text in UTF-8"),
        (b'{"prompt": "\\ud800"}', "text in UTF-8"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "one JSON object a line"),
        (b"[" * 100_000, "not nested so deeply"),
    ],
)
def test_a_line_that_cannot_be_read_does_not_end_the_pass(tmp_path, line, allowed):
    """P6: invalid rows are reported together, so reading continues after one."""
    manifest = jsonl(tmp_path / "m.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    first, (number, problem), last = manifest.rows()
    assert (first, last) == ((1, {"prompt": "a"}), (3, {"prompt": "c"}))
    assert number == 2
    assert isinstance(problem, FieldProblem)
    assert allowed in problem.allowed


def test_unicode_line_separators_do_not_split_a_line(tmp_path):
    """Only \\n ends a line of JSON Lines; U+2028 and surrogate pairs are ordinary text of a prompt."""
    manifest = jsonl(tmp_path / "m.jsonl", '{"prompt": "a\u2028b\u0085c \\ud83d\\ude00"}\n')
    assert list(manifest.rows()) == [(1, {"prompt": "a\u2028b\u0085c 😀"})]


def test_an_oversized_line_is_one_invalid_row(tmp_path):
    """P6, P7: a 50 MB prompt is reported with its row number; it is not held in memory and does not end the pass."""
    short = b'{"prompt": "a"}\n'
    long = b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}\n'
    for content, numbers in ((short + long + short, [1, 2, 3]), (long + short, [1, 2]), (short + long[:-1], [1, 2])):
        rows = dict(jsonl(tmp_path / "m.jsonl", content).rows())
        assert list(rows) == numbers
        (problem,) = (row for row in rows.values() if isinstance(row, FieldProblem))
        assert "at most 16 MiB" in problem.allowed
        assert len(problem.value) <= 100


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_gives_the_same_rows_as_jsonl(tmp_path, end):
    """A cell of a number column becomes a number and an empty cell a null; all others stay text."""
    lines = [
        "\ufeffid,prompt,height,cfg_scale,seed,note,take",
        '1,"a ""red"" ball, rolling",720,1.5,,,007',
        "",
        f'2,"two{end}lines",, 6 ,12,NaN,x',
        "3,c,720.0,1e1,abc,true,",
    ]
    rows = list(jsonl(tmp_path / "m.csv", end.join(lines) + end).rows())
    assert rows == [
        (2, _row("1", 'a "red" ball, rolling', 720, 1.5, None, None, "007")),
        (4, _row("2", "two\nlines" if end == "\n" else "two\r\nlines", None, 6.0, 12, "NaN", "x")),
        (6, _row("3", "c", 720.0, 10.0, "abc", "true", None)),
    ]


def _row(*values):
    return dict(zip(("id", "prompt", "height", "cfg_scale", "seed", "note", "take"), values, strict=True))


@pytest.mark.parametrize(
    ("record", "allowed"),
    [
        (b"a", "2 cells, like the header"),
        (b"a,b,c", "2 cells, like the header"),
        (b'a,"b"c', "comma-separated cells"),
        (b"a,\xff", "text in UTF-8"),
    ],
)
def test_a_csv_record_that_cannot_be_read_does_not_end_the_pass(tmp_path, record, allowed):
    """P6: as for JSON Lines."""
    first, (number, problem), last = jsonl(tmp_path / "m.csv", b"prompt,note\na,b\n" + record + b"\nc,d\n").rows()
    assert (first, last) == ((2, {"prompt": "a", "note": "b"}), (4, {"prompt": "c", "note": "d"}))
    assert number == 3
    assert allowed in problem.allowed


def test_an_unclosed_quote_is_reported_with_its_row(tmp_path):
    """P6, P7: the rest of the file is then one cell, which must not be held in memory."""
    content = b'prompt,note\na,b\nc,"d\n' + (b"e" * 9_999 + b"\n") * (MAX_LINE_BYTES // 5_000)
    problems = [(number, row) for number, row in jsonl(tmp_path / "m.csv", content).rows() if number == 3]
    assert "field larger than field limit" in problems[0][1].allowed
    ended = list(jsonl(tmp_path / "m.csv", b'prompt\na\n"b\n').rows())
    assert ended[0] == (2, {"prompt": "a"})
    assert "unexpected end of data" in ended[1][1].allowed


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)


@settings(deadline=None, max_examples=50)  # a busy machine is not a failure
@given(cells=st.lists(st.tuples(CELLS.filter(str.strip), CELLS), min_size=1, max_size=5))
def test_csv_round_trips_every_text(cells, tmp_path_factory):
    """Property: any cell that a csv writer has quoted is read back unchanged."""
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "note"), *cells])
    rows = [row for _, row in Manifest(str(path)).rows()]
    assert rows == [{"prompt": prompt, "note": note or None} for prompt, note in cells]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_where_a_file_is_cut_makes_no_difference(tmp_path, monkeypatch, chunk_bytes, suffix):
    """Rows and their numbers do not depend on chunks, nor on compression."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", chunk_bytes)
    for name, content in (
        ("m.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "\xc3\xa4"}\n\n\n{bad\n{"prompt": "c"}'),
        ("m.csv", b'\xef\xbb\xbfprompt,note\r\na,\n\n"\xc3\xa4\n",x\nbad\nc,"y"'),
    ):
        expected = {"m.jsonl": [1, 3, 6, 7], "m.csv": [2, 4, 6, 7]}[name]
        path = tmp_path / f"{name}{suffix}"
        codec = {".gz": "gzip", ".zst": "zstd"}.get(suffix)
        path.write_bytes(pa.Codec(codec).compress(content, asbytes=True) if codec else content)
        manifest = Manifest(str(path))
        numbers, rows = zip(*manifest.rows(), strict=True)
        assert list(numbers) == expected
        assert rows[0]["prompt"] == "a"
        assert rows[1]["prompt"].strip() == "ä"
        assert isinstance(rows[2], FieldProblem)
        assert manifest.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parquet_values_that_python_lacks_are_one_bad_row(tmp_path):
    """P6: text that is not UTF-8 and years after 9999 are reported with their row; the other rows are read."""
    foreign = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"c"]).buffers())
    manifest = parquet(tmp_path / "m.parquet", {"prompt": foreign})
    first, (number, problem), last = manifest.rows()
    assert (first, last, number) == ((1, {"prompt": "a"}), (3, {"prompt": "c"}), 2)
    assert "values that can be read" in problem.allowed
    far = pa.array([0, 10**12], pa.timestamp("s"))
    (_, fine), (_, problem) = parquet(tmp_path / "m.parquet", {"prompt": ["a", "b"], "day": far}).rows()
    assert fine["day"] == "1970-01-01T00:00:00"
    assert isinstance(problem, FieldProblem)


def test_first_rows_come_before_the_rest_is_read(tmp_path):
    """P7: rows are read lazily: the first rows of a file with a damaged end can be read."""
    lines = b'{"prompt": "a"}\n' * 400_000
    whole = gzip.compress(lines, 0)
    (tmp_path / "m.jsonl.gz").write_bytes(whole[:-100])
    manifest = Manifest(str(tmp_path / "m.jsonl.gz"))
    assert len(list(itertools.islice(manifest.rows(), 1000))) == 1000
    assert "cannot be read as gzip" in refusal(manifest)

    path = tmp_path / "m.parquet"
    damaged = parquet(path, {"prompt": [f"a red ball {n}" for n in range(100_000)]}, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    assert len(list(itertools.islice(damaged.rows(), 1000))) == 1000
    assert "cannot be read as parquet" in refusal(damaged)


def test_memory_stays_bounded(tmp_path):
    """P7: no file is held in memory as a whole, not even a Parquet file of one row group."""
    prompts = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() * 160 for n in range(6000)]  # 60 MB
    as_jsonl = jsonl(tmp_path / "m.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    layout = {"compression": "none", "use_dictionary": False, "data_page_size": 1 << 16}
    as_parquet = parquet(tmp_path / "m.parquet", {"prompt": prompts}, **layout)
    del prompts

    for manifest, in_arrow in ((as_jsonl, 0), (as_parquet, 24 << 20)):
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            assert max(pa.total_allocated_bytes() - before for _ in manifest.rows()) <= in_arrow
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()


def test_parquet_says_what_jsonl_says(tmp_path):
    """JSON Lines and Parquet give equal rows, with a null for an absent value."""
    rows = [
        {"prompt": "a", "height": 720, "cfg_scale": 1.5, "tags": ["x", "y"], "meta": {"k": "v"}, "ok": True},
        {"prompt": "b", "height": None, "cfg_scale": None, "tags": [], "meta": {"k": None}, "ok": None},
    ]
    as_jsonl = jsonl(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    assert list(as_jsonl.rows()) == list(Manifest(str(tmp_path / "m.parquet")).rows()) == [(1, rows[0]), (2, rows[1])]


def test_parquet_values_become_json(tmp_path):
    """The docstring of `rows`: ISO strings for times, numbers for decimals, values for dictionaries."""
    noon = datetime.datetime(2024, 5, 1, 12, 0, 0, 250_000, tzinfo=datetime.UTC)
    columns = {
        "prompt": pa.array(["a"]).dictionary_encode(),
        "day": pa.array([datetime.date(2024, 5, 1)]),
        "at": pa.array([noon], pa.timestamp("us", "UTC")),
        "nanos": pa.array([1714564800_000000123], pa.timestamp("ns")),
        "clock": pa.array([datetime.time(12, 30)]),
        "whole": pa.array([Decimal(7)], pa.decimal128(5, 0)),
        "price": pa.array([Decimal("7.50")], pa.decimal128(5, 2)),
        "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "nested": pa.array([{"days": [datetime.date(2024, 5, 1)]}]),
    }
    ((_, row),) = parquet(tmp_path / "m.parquet", columns).rows()
    assert row == {
        "prompt": "a",
        "day": "2024-05-01",
        "at": "2024-05-01T12:00:00.250000+00:00",
        "nanos": "2024-05-01T12:00:00",
        "clock": "12:30:00",
        "whole": 7,
        "price": 7.5,
        "pairs": [["k", 1]],
        "nested": {"days": ["2024-05-01"]},
    }
    assert isinstance(row["whole"], int)
    json.dumps(row)


def test_digest_is_the_sha256_of_the_file(tmp_path):
    """P2: a resumed run compares the digest of the manifest, which is available only after a complete pass."""
    for manifest in (
        jsonl(tmp_path / "m.jsonl", b'{"prompt": "a"}\r\n\n{"prompt": "b"}'),
        parquet(tmp_path / "m.parquet", {"prompt": ["a", "b"]}),
    ):
        next(manifest.rows())
        with pytest.raises(RuntimeError):
            _ = manifest.digest
        list(manifest.rows())
        with open(manifest.name, "rb") as file:
            assert manifest.digest == hashlib.sha256(file.read()).hexdigest()


def test_a_manifest_that_changes_between_passes_is_refused(tmp_path):
    """P2: a run renders the same rows that were validated."""
    manifest = jsonl(tmp_path / "m.jsonl", '{"prompt": "a"}\n')
    list(manifest.rows())
    jsonl(tmp_path / "m.jsonl", '{"prompt": "b"}\n')
    assert "changed while it was read" in refusal(manifest)


def test_an_invalid_manifest_is_rejected_by_name(tmp_path):
    """P6: missing, empty, truncated, without prompts, or another format: the error names the file and the remedy."""
    for name in ("m.md", "m", "m.jsonl.bz2", "m.parquet.gz"):
        assert "allowed: .jsonl, .ndjson (one JSON" in refusal(jsonl(tmp_path / name, '{"prompt": "a"}'))
    assert "does not exist" in refusal(Manifest(str(tmp_path / "none.jsonl")))
    assert "does not exist" in refusal(Manifest(str(tmp_path / "none.parquet")))
    assert "cannot be reached" in refusal(Manifest("http://127.0.0.1:9/m.jsonl"))  # no server listens on that port
    assert "has no rows" in refusal(jsonl(tmp_path / "empty.jsonl", b""))
    assert "has no rows" in refusal(jsonl(tmp_path / "blank.jsonl", b"\n \r\n"))
    assert "has no rows" in refusal(jsonl(tmp_path / "empty.csv", b""))
    assert "has no rows" in refusal(jsonl(tmp_path / "header.csv", b"prompt,seed\n"))
    assert 'no column `prompt`, but "text"' in refusal(jsonl(tmp_path / "other.csv", b"text\na\n"))
    assert 'two columns named "seed"' in refusal(jsonl(tmp_path / "twice.csv", b"prompt,seed,seed\na,1,2\n"))
    assert "cannot be read as gzip" in refusal(jsonl(tmp_path / "really.jsonl.gz", b'{"prompt": "a"}\n'))
    assert "cannot be read as zstd" in refusal(jsonl(tmp_path / "really.csv.zst", b"prompt\na\n"))
    assert "has no rows" in refusal(parquet(tmp_path / "empty.parquet", {"prompt": pa.array([], pa.string())}))
    assert 'no column `prompt`, but "text", "seed"' in refusal(
        parquet(tmp_path / "other.parquet", {"text": ["a"], "seed": [1]})
    )
    assert "cannot be read as parquet" in refusal(jsonl(tmp_path / "really.parquet", '{"prompt": "a"}\n'))
    whole = tmp_path / "whole.parquet"
    parquet(whole, {"prompt": ["a"] * 1000})
    for end in (-20, 100, 3, 0):
        (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:end])
        assert "cannot be read as parquet" in refusal(Manifest(str(tmp_path / "cut.parquet")))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "seed", "seed"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert 'two columns named "seed"' in refusal(Manifest(str(tmp_path / "twice.parquet")))


def test_manifests_come_from_any_url(tmp_path):
    """Design section 4: a manifest may have any fsspec URL, including chained ones and upper-case suffixes."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/night/m.JSONL", b'{"prompt": "a"}\n')
    parquet(tmp_path / "m.parquet", {"prompt": ["a"]})
    memory.pipe("/night/m.pq", (tmp_path / "m.parquet").read_bytes())
    for url in ("memory://night/m.JSONL", "memory://night/m.pq", f"simplecache::file://{tmp_path}/m.parquet"):
        assert list(Manifest(url).rows()) == [(1, {"prompt": "a"})]


def test_manifests_come_from_s3(tmp_path):
    """Design section 4: a manifest may be on an S3 server that is configured with storage options."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}", "skip_instance_cache": True}
        bucket = fsspec.filesystem("s3", **options)
        bucket.mkdir("night")
        bucket.pipe("night/m.jsonl", b'{"prompt": "a"}\n' * 3)
        parquet(tmp_path / "m.parquet", {"prompt": ["a"] * 3})
        bucket.put_file(str(tmp_path / "m.parquet"), "night/m.parquet")
        for name in ("m.jsonl", "m.parquet"):
            manifest = Manifest(f"s3://night/{name}", options)
            assert [number for number, _ in manifest.rows()] == [1, 2, 3]
        assert "does not exist" in refusal(Manifest("s3://night/none.jsonl", options))
        assert "does not exist" in refusal(Manifest("s3://nobucket/m.jsonl", options))
    finally:
        server.stop()
