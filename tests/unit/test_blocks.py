"""hv_batch.job.blocks: rows judged together are judged as each alone would be, to the byte."""

import json
from dataclasses import astuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hv_batch.job import blocks, judge
from hv_batch.job.config import Defaults
from hv_batch.job.formats import JsonLines
from hv_batch.job.judge import judge_chunk
from hv_batch.job.manifest import Chunk
from hv_batch.protocol import MAX_SEED

DEFAULTS = Defaults().model_dump()

odd = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
zeros = st.sampled_from([0.0, -0.0, 1.0, 2.5])
good = {
    "id": st.text(min_size=1, max_size=6) | st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True),
    "prompt": st.text(min_size=1, max_size=8),
    "negative_prompt": st.text(max_size=5),
    "height": st.sampled_from([256, 720]),
    "width": st.sampled_from([256.0, 1280.0]),
    "num_frames": st.sampled_from([1, 33]),
    "seed": st.integers(0, 2**40) | st.integers(MAX_SEED - 3, MAX_SEED),
    "cfg_scale": st.sampled_from([1, 6]),
    "guidance_rescale": st.sampled_from([0.0, -0.0, 0.5]),
    "num_videos": st.integers(1, 3),
    "fps": st.just(24),
    "take": zeros | st.none(),
    'note "ä"': st.text(max_size=4) | st.none(),
    "size": st.integers(-(2**70), 2**70),
    "done": st.booleans(),
    "tags": st.lists(st.text(max_size=2), max_size=2),
}


@st.composite
def tables(draw):
    """Rows of the same columns, most of them good, some with nulls or with a value that does not belong there."""
    names = draw(st.lists(st.sampled_from(sorted(good)), unique=True, max_size=7))
    if draw(st.integers(0, 9)):
        names = ["prompt", *(name for name in names if name != "prompt")]
    count = draw(st.integers(1, 6))
    columns = []
    for name in names:
        values = good[name] | st.none() if draw(st.booleans()) and name != "prompt" else good[name]
        columns.append(draw(st.lists(values, min_size=count, max_size=count)))
    if names and draw(st.integers(0, 3)) == 0:
        columns[draw(st.integers(0, len(names) - 1))][draw(st.integers(0, count - 1))] = draw(odd)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] or [{}] * count


def chunk_of(rows):
    lines = [json.dumps(row) for row in rows]
    return Chunk(0, 7, {}, JsonLines(1, "\n".join(lines).encode()))


def facts(verdict):
    """All of a verdict, and the order in which its columns were found."""
    return astuple(verdict), list(verdict.extra_kinds), list(verdict.extra_rows)


@settings(max_examples=300)
@example([[{"prompt": "p", "late": None, "early": 1}, {"prompt": "p", "late": 1, "early": 1}]], 1, 4)
@given(st.lists(tables(), min_size=1, max_size=3), st.sampled_from([1, 2]), st.integers(1, 4))
def test_together_and_one_by_one_the_verdict_is_the_same(parts, cfg_degree, block_rows):
    """P3, P6: problems, keys, hashes, shapes, columns and the bytes of the index do not depend on the way."""
    chunk = chunk_of([row for rows in parts for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "WORTH_A_BLOCK", 10**9)
        alone = judge_chunk(chunk, DEFAULTS, cfg_degree)
        patch.setattr(judge, "WORTH_A_BLOCK", 1)
        patch.setattr(judge, "BLOCK_ROWS", block_rows)
        together = judge_chunk(chunk, DEFAULTS, cfg_degree)
    assert facts(together) == facts(alone)


@given(st.lists(st.tuples(good["prompt"], good["width"], good["take"], good["done"]), min_size=8))
def test_plain_rows_are_judged_together(values):
    """P7: what nearly every manifest consists of takes the quick way."""
    rows = [{"prompt": f"a{p}", "width": width, "take": take, "done": done} for p, width, take, done in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge._Findings, "add_row", lambda *_: pytest.fail("judged one by one"))
        assert judge_chunk(chunk_of(rows), DEFAULTS, 1).rows == len(rows)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"height": 719},
        {"height": True},
        {"seed": MAX_SEED + 1},
        {"prompt": " "},
        {"prompt": None},
        {"id": "  "},
        {"take": [1]},
        {"take": 10**1001},
        {"cfg_scale": 1.0},
    ],
    ids=str,
)
def test_a_block_with_anything_unusual_says_nothing(spoilt):
    """P6: only the way row by row words problems, so a problem must lead there."""
    row = {"id": "a", "prompt": "p", "height": 720, "seed": 1, "cfg_scale": 6.0, "take": 1}
    rows = [{**row, "id": f"a{n}"} for n in range(4)]
    assert blocks.judge_block(tuple(row), rows, DEFAULTS, 2)
    rows[2] |= spoilt
    assert blocks.judge_block(tuple(row), rows, DEFAULTS, 2) is None
