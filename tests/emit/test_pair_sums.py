"""Worst pair sums against brute force, and against the saturating product itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qopt.emit import SATURATES, worst_pair_sums
from qopt.emit.integer import integer_parts
from qopt.emit.pair_sums import integer_levels, worst_pair_sum
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange


def saturating(a: tuple[int, int], w: np.ndarray) -> int:
    """VPMADDUBSW on one pair."""
    return int(np.clip(a[0] * w[0] + a[1] * w[1], -32768, SATURATES))


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 7)), elements=st.integers(-128, 127)),
       st.sampled_from([1, 3, 15, 127, 255]))  # fmt: skip
def test_against_all_extreme_codes(rows: np.ndarray, largest: int) -> None:
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    sums = [
        abs(a * int(row[i]) + b * int(row[i + 1]))
        for row in padded
        for i in range(0, padded.shape[1], 2)
        for a, b in product((0, largest), repeat=2)
    ]
    assert worst_pair_sum(rows, largest) == max(sums)


@given(hnp.arrays(np.int64, 2, elements=st.integers(-127, 127)), st.integers(0, 255), st.integers(0, 255))
def test_below_the_limit_nothing_saturates(pair: np.ndarray, a: int, b: int) -> None:
    if worst_pair_sum(pair[None], 255) <= SATURATES:
        assert saturating((a, b), pair) == a * pair[0] + b * pair[1]


def quantized(prepared: Prepared, codes: Any, bits: int = 8) -> Quantized:
    code = AffineRange.from_bounds(-1.0, 1.0, bits)
    names = {use.input for layer in prepared.layers for use in layer.uses} | {"y", "r"}
    present = {value.name for node in prepared.model.graph for value in node.outputs} | {"x"}
    return Quantized(codes, {}, dict.fromkeys(names & present, code))


LAYERS = ["Conv", "grouped", "Conv1d", "Gemm", "Gemm_t", "MatMul", "MatMul_3d"]


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("spec", ["int8:max", "int4", "int3:mid", "log4", "ternary", "int1"])
def test_every_layer_against_its_own_levels(
    one_layer: Callable[..., Prepared], codes_of: Any, op: str, spec: str
) -> None:
    prepared = one_layer(op)
    plan = quantized(prepared, codes_of(prepared, spec))
    (found,) = worst_pair_sums(prepared, plan).values()
    (part,) = integer_parts(prepared, plan).values()
    weight = part.weight
    levels = (weight.dequantize().numpy() / _scales(weight)).round()
    np.testing.assert_array_equal(integer_levels(weight), levels)
    rows = {
        "Conv": lambda v: v.transpose(0, 2, 3, 1), "grouped": lambda v: v.transpose(0, 2, 3, 1),
        "Conv1d": lambda v: v.transpose(0, 2, 1), "Gemm_t": lambda v: v,
    }.get(op, lambda v: v.T)(levels).reshape(prepared.layers[0].channels, -1)  # fmt: skip
    assert found == worst_pair_sum(rows.astype(np.int64), 255)


def _scales(weight: Any) -> np.ndarray:
    shape = [1] * len(weight.shape)
    if weight.scale.ndim:
        shape[weight.axis] = -1
    return np.asarray(weight.scale.numpy().reshape(shape), np.float64)


def test_fewer_activation_bits_sum_to_less(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv")
    codes = codes_of(prepared, "int8:max")
    found = [worst_pair_sums(prepared, quantized(prepared, codes, bits))["l.weight"] for bits in (8, 4, 1)]
    assert found == [255 * found[2], 15 * found[2], found[2]]


@pytest.mark.parametrize(("op", "spec"), [("depthwise", "int8"), ("ConvTranspose", "int8"), ("Gemm", "log8")])
def test_kernels_that_add_no_pairs(one_layer: Callable[..., Prepared], codes_of: Any, op: str, spec: str) -> None:
    prepared = one_layer(op)
    assert worst_pair_sums(prepared, quantized(prepared, codes_of(prepared, spec))) == {}


def test_rows_of_several_formats(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Gemm")
    spec = "rows(int8:max*2,ternary*3,log4*4,int2)"
    plan = quantized(prepared, codes_of(prepared, spec))
    weight = plan.weights["l.weight"]
    levels = (weight.dequantize().numpy() / _scales(weight)).round().astype(np.int64)
    np.testing.assert_array_equal(integer_levels(weight), levels)
    assert worst_pair_sums(prepared, plan)["l.weight"] == worst_pair_sum(levels.T, 255)


def test_four_bits_never_reach_the_limit(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    """DESIGN 3.8: 4-bit codes and tables up to 64 are safe."""
    for spec in ("int4", "log4", "int4:mid", "int7:max"):
        prepared = one_layer("Gemm")
        assert worst_pair_sums(prepared, quantized(prepared, codes_of(prepared, spec)))["l.weight"] <= SATURATES
