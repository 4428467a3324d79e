"""hv_batch.job.manifest: rows come lazily, numbered, from any URL; what cannot be read is told, never guessed."""

import datetime
import hashlib
import itertools
import json
import tracemalloc
from decimal import Decimal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.job.manifest import MAX_LINE_BYTES, Manifest
from hv_batch.protocol import FieldProblem, UserError


def jsonl(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Manifest(str(path))


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return Manifest(str(path))


def refusal(manifest):
    with pytest.raises(UserError) as caught:
        list(manifest.rows())
    assert manifest.url in str(caught.value)
    return str(caught.value)


def test_jsonl_rows_carry_their_line_number(tmp_path):
    """P6: row numbers are line numbers, so an editor finds them; blank lines count; BOM and CRLF are tolerated."""
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
        (b'{"prompt": "a", "meta": {"x": -Infinity}}', "-Infinity is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', 'the key "prompt" is given twice'),
        (b'{"prompt": "\xff"}', "text in UTF-8"),
        (b'{"prompt": "\\ud800"}', "text in UTF-8"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "one JSON object a line"),
        (b"[" * 100_000, "not nested so deeply"),
    ],
)
def test_a_line_that_cannot_be_read_does_not_end_the_pass(tmp_path, line, allowed):
    """P6: bad rows are reported together, so reading goes on behind one."""
    manifest = jsonl(tmp_path / "m.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    first, (number, problem), last = manifest.rows()
    assert (first, last) == ((1, {"prompt": "a"}), (3, {"prompt": "c"}))
    assert number == 2
    assert isinstance(problem, FieldProblem)
    assert allowed in problem.allowed


def test_unicode_line_separators_do_not_split_a_line(tmp_path):
    """JSON Lines ends a line at \\n alone; U+2028 and surrogate pairs are ordinary text of a prompt."""
    manifest = jsonl(tmp_path / "m.jsonl", '{"prompt": "a\u2028b\u0085c \\ud83d\\ude00"}\n')
    assert list(manifest.rows()) == [(1, {"prompt": "a\u2028b\u0085c 😀"})]


def test_first_rows_come_before_the_rest_is_read(tmp_path):
    """P7: rows are read lazily. The end of both files is damaged, and the first rows do not know."""
    lines = b'{"prompt": "a"}\n' * 100_000
    manifest = jsonl(tmp_path / "m.jsonl", lines + b"x" * (MAX_LINE_BYTES + (2 << 20)))
    assert len(list(itertools.islice(manifest.rows(), 1000))) == 1000
    assert "has a line of more than 16 MiB" in refusal(manifest)

    path = tmp_path / "m.parquet"
    damaged = parquet(path, {"prompt": [f"a red ball {n}" for n in range(20_000)]}, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    assert len(list(itertools.islice(damaged.rows(), 1000))) == 1000
    assert "cannot be read as Parquet" in refusal(damaged)


def test_memory_stays_bounded(tmp_path):
    """P7: neither format is held as a whole, not even a Parquet row group that is the whole file."""
    prompts = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() * 160 for n in range(3000)]  # 30 MB
    as_jsonl = jsonl(tmp_path / "m.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    layout = {"compression": "none", "use_dictionary": False, "data_page_size": 1 << 16}
    as_parquet = parquet(tmp_path / "m.parquet", {"prompt": prompts}, **layout)
    del prompts

    for manifest, in_arrow in ((as_jsonl, 0), (as_parquet, 16 << 20)):
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            assert max(pa.total_allocated_bytes() - before for _ in manifest.rows()) <= in_arrow
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


def test_parquet_says_what_jsonl_says(tmp_path):
    """Two formats, one manifest: equal rows, a null for a value left out."""
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
    """P2: a resumed run compares the manifest's bytes; they are known after a complete pass only."""
    for manifest in (
        jsonl(tmp_path / "m.jsonl", b'{"prompt": "a"}\r\n\n{"prompt": "b"}'),
        parquet(tmp_path / "m.parquet", {"prompt": ["a", "b"]}),
    ):
        next(manifest.rows())
        with pytest.raises(RuntimeError):
            _ = manifest.digest
        list(manifest.rows())
        with open(manifest.url, "rb") as file:
            assert manifest.digest == hashlib.sha256(file.read()).hexdigest()


def test_a_manifest_that_changes_between_passes_is_refused(tmp_path):
    """P2: what was checked is what is rendered."""
    manifest = jsonl(tmp_path / "m.jsonl", '{"prompt": "a"}\n')
    list(manifest.rows())
    jsonl(tmp_path / "m.jsonl", '{"prompt": "b"}\n')
    assert "changed while it was read" in refusal(manifest)


def test_what_is_no_manifest_is_refused_by_name(tmp_path):
    """P6: missing, empty, cut short, without prompts, of another format: one sentence with the file and the remedy."""
    for name in ("m.csv", "m.json", "m", "m.jsonl.gz", "s3://bucket/m?file=m.jsonl"):
        with pytest.raises(UserError, match=r"allowed: \.jsonl, \.ndjson .* and \.parquet, \.pq"):
            Manifest(name)
    assert "does not exist" in refusal(Manifest(str(tmp_path / "none.jsonl")))
    assert "does not exist" in refusal(Manifest(str(tmp_path / "none.parquet")))
    assert "has no rows" in refusal(jsonl(tmp_path / "empty.jsonl", b""))
    assert "has no rows" in refusal(jsonl(tmp_path / "blank.jsonl", b"\n \r\n"))
    assert "has no rows" in refusal(parquet(tmp_path / "empty.parquet", {"prompt": pa.array([], pa.string())}))
    assert "has no column `prompt`; it has text, seed" in refusal(
        parquet(tmp_path / "other.parquet", {"text": ["a"], "seed": [1]})
    )
    assert "cannot be read as Parquet" in refusal(jsonl(tmp_path / "really.parquet", '{"prompt": "a"}\n'))
    whole = tmp_path / "whole.parquet"
    parquet(whole, {"prompt": ["a"] * 1000})
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    assert "cannot be read as Parquet" in refusal(Manifest(str(tmp_path / "cut.parquet")))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "seed", "seed"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "two columns named seed" in refusal(Manifest(str(tmp_path / "twice.parquet")))


def test_manifests_come_from_any_url(tmp_path):
    """design 4: any fsspec URL, chained ones and upper-case suffixes too."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/night/m.JSONL", b'{"prompt": "a"}\n')
    parquet(tmp_path / "m.parquet", {"prompt": ["a"]})
    memory.pipe("/night/m.pq", (tmp_path / "m.parquet").read_bytes())
    for url in ("memory://night/m.JSONL", "memory://night/m.pq", f"simplecache::file://{tmp_path}/m.parquet"):
        assert list(Manifest(url).rows()) == [(1, {"prompt": "a"})]


def test_manifests_come_from_s3(tmp_path):
    """design 4: any fsspec URL; here a real S3 server, reached with storage options."""
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
