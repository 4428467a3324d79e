"""The options of the attention methods, which the engine and the cost model share."""

from __future__ import annotations

import pytest

from hv_batch.attention_methods import (
    AttentionMethods,
    QuantizedAttention,
    SparseAttention,
    parse_quantized_attention,
    parse_sparse_attention,
)
from hv_batch.protocol import UserError


def test_sparse_attention_is_parsed():
    """YAML lists become tuples, and a JSON round trip gives an equal value."""
    assert parse_sparse_attention(None) is None
    parsed = parse_sparse_attention({"density": 0.25, "brick": [2, 4, 2]})
    assert parsed == SparseAttention(density=0.25, brick=(2, 4, 2))
    assert parsed.to_json()["brick"] == [2, 4, 2]
    assert "top_p" not in parsed.to_json()
    assert parse_sparse_attention(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (0.25, "give a mapping with density"),
        ({}, "give a mapping with density"),
        ({"density": 0.3, "blocks": 1}, "and optionally top_p, brick, neighbours, dense_until, backend"),
        ({"density": 0}, "density is 0; allowed is a number above 0 and at most 1"),
        ({"density": True}, "density is True"),
        ({"density": 0.3, "top_p": 1}, "top_p is 1"),
        ({"density": 0.3, "brick": [4, 4]}, "brick is"),
        ({"density": 0.3, "brick": [4, 4, 2.5]}, "brick is"),
        ({"density": 0.3, "brick": [64, 64, 64]}, "brick is"),
        ({"density": 0.3, "neighbours": ["all"]}, "allowed is all, faces, none"),
        ({"density": 0.3, "dense_until": 1.0}, "dense_until is 1.0"),
        ({"density": 0.3, "backend": "auto"}, "allowed is flex, flex-flash, eager"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    """P6: the error names the field, its value and the allowed values."""
    with pytest.raises(UserError, match=message):
        parse_sparse_attention(options)


@pytest.mark.parametrize(("steps", "dense"), [(50, 10), (6, 2), (5, 1), (1, 1)])
def test_the_first_fifth_of_the_steps_is_dense(steps, dense):
    """The number of dense steps is rounded up, so that few steps also begin dense."""
    methods = AttentionMethods(SparseAttention(density=0.25))
    assert [methods.density(step, steps) for step in range(steps)] == [1.0] * dense + [0.25] * (steps - dense)
    assert [methods.at(step, steps).sparse is None for step in range(steps)] == [True] * dense + [False] * (
        steps - dense
    )


def test_quantized_attention_is_parsed():
    """The backend follows from the format, and the resolved one is recorded. A JSON round trip gives an equal value."""
    assert parse_quantized_attention(None) is None
    assert parse_quantized_attention({"qk": "fp8"}) == QuantizedAttention(qk="fp8", backend="fa3")
    parsed = parse_quantized_attention({"qk": "int8"})
    assert parsed.to_json() == {"qk": "int8", "backend": "sage", "exact_until": 0.1}
    assert parse_quantized_attention(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("int8", "give a mapping with qk, such as {qk: int8}, and optionally backend, exact_until"),
        ({"qk": "int4"}, "qk is 'int4'; allowed is int8, fp8"),
        ({"qk": ["int8"]}, "qk is"),
        ({"qk": "int8", "backend": "fa3"}, "backend is 'fa3'; allowed with qk int8 is sage, reference"),
        ({"qk": "fp8", "exact_until": True}, "exact_until is True; allowed is a number of at least 0 and below 1"),
    ],
    ids=str,
)
def test_wrong_quantized_options_are_refused(options, message):
    """P6: the error names the field, its value and the allowed values."""
    with pytest.raises(UserError, match=message):
        parse_quantized_attention(options)


@pytest.mark.parametrize(("steps", "used"), [(50, range(5, 49)), (6, range(1, 5)), (2, range(1, 1))])
def test_the_first_and_the_last_steps_keep_their_precision(steps, used):
    """The hybrid schedule: the first tenth, rounded up, and the last step are exact."""
    methods = AttentionMethods(quantized=QuantizedAttention(qk="int8", backend="reference"))
    assert [step for step in range(steps) if methods.at(step, steps).quantized] == list(used)
    assert all(methods.density(step, steps) == 1.0 for step in range(steps))


def test_two_methods_at_once_are_refused():
    """P6: no kernel is both sparse and in 8 bits."""
    with pytest.raises(UserError, match="no kernel combines them"):
        AttentionMethods(SparseAttention(density=0.5), QuantizedAttention(qk="int8", backend="reference"))
