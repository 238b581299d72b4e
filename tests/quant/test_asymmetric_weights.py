"""Asymmetric codes: by hand, against every scale and zero point, and what they promise."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import VerificationError
from qopt.quant import QuantizedWeight, quantize_whole
from qopt.quant import asymmetric as module
from qopt.quant.asymmetric import MANTISSA, least_squares, spanning
from qopt.spec import WeightSpec

CASES = [f"int{bits}{option}:asym" for bits in range(2, 9) for option in ("", ":max", ":tensor", ":tensor:max")]


def quantized(weight: Tensor, text: str) -> QuantizedWeight:
    return quantize_whole(weight, WeightSpec.parse(text))


def squared_error(weight: Tensor, found: QuantizedWeight) -> float:
    return float((weight.double() - found.dequantize().double()).square().sum())


GOLDEN = [
    ("int2:tensor:max:asym", [0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3], 0, 1.0),
    ("int2:tensor:max:asym", [-3.0, -2.0, -1.0, 0.0], [0, 1, 2, 3], 3, 1.0),
    ("int2:tensor:max:asym", [-1.0, 0.0, 1.0, 2.0], [0, 1, 2, 3], 1, 1.0),
    ("int2:tensor:max:asym", [-1.5, 1.5, 0.0, 0.4], [0, 3, 2, 2], 2, 1.0),  # half a step on either side
    ("int2:tensor:max:asym", [2.0, 3.0, 2.5, 3.0], [2, 3, 3, 3], 0, 1.0),  # zero is a level though no weight is near
    ("int3:tensor:max:asym", [-0.5, 3.0, 0.2, 1.1], [0, 7, 1, 3], 1, 0.5),
    ("int8:tensor:max:asym", [-1.0, 254.0, 0.4, 0.6], [0, 255, 1, 2], 1, 1.0),
    ("int4:tensor:asym", [-2.0, 13.0, 5.0, 0.0], [0, 15, 7, 2], 2, 1.0),
    ("int4:tensor:asym", [0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], 0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values", "codes", "zero", "scale"), GOLDEN)
def test_by_hand(text: str, values: list[float], codes: list[int], zero: int, scale: float) -> None:
    found = quantized(torch.tensor(values), text)
    assert found.zero is not None
    assert (found.codes.tolist(), int(found.zero), float(found.scale)) == (codes, zero, scale)
    assert (found.codes.dtype, found.zero.dtype, found.grid) == (torch.uint8, torch.uint8, "asym")
    expected = (np.array(codes, np.float32) - zero) * np.float32(scale)
    assert found.dequantize().tolist() == expected.tolist()


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 weights: symmetric, one-sided, far from zero, with holes, of any magnitude."""
    shape = draw(st.sampled_from([(7,), (3, 5), (2, 40), (4, 3, 3, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = torch.randn(shape, generator=generator) ** draw(st.sampled_from([1, 3]))
    base = base + draw(st.sampled_from([0.0, 0.7, -5.0]))
    kind = draw(st.sampled_from(["any", "holes", "positive", "coarse", "mirrored"]))
    if kind == "holes":
        base[torch.rand(shape, generator=generator) < 0.5] = 0.0
        base[0] = 0.0
    elif kind == "positive":
        base = base.abs()
    elif kind == "coarse":
        base = torch.round(base * 2) / 4
    elif kind == "mirrored":
        base = torch.cat([base, -base], -1)
    return base * draw(st.sampled_from([1.0, 0.037, 1e-20, 1e20, 3e-30, 1e30, 1e-38]))


@given(weights(), st.sampled_from(CASES))
@settings(max_examples=150)
def test_idempotent_and_zero_stays_zero(weight: Tensor, text: str) -> None:
    found = quantized(weight, text)
    once = found.dequantize()
    assert bool(torch.isfinite(once).all())
    assert not once[weight == 0].any()
    assert int(found.codes.max()) < 2**found.spec.bits
    again = quantized(once, text)
    assert torch.equal(again.dequantize(), once)


@given(weights(), st.integers(2, 8), st.sampled_from(["", ":tensor"]))
@settings(max_examples=150)
def test_mse_is_never_worse_than_max(weight: Tensor, bits: int, shared: str) -> None:
    best, largest = (quantized(weight, f"int{bits}{shared}{scale}:asym") for scale in ("", ":max"))
    assert squared_error(weight, best) <= squared_error(weight, largest)


@given(weights(), st.integers(2, 8))
@settings(max_examples=150)
def test_max_is_within_half_a_step(weight: Tensor, bits: int) -> None:
    found = quantized(weight, f"int{bits}:tensor:max:asym")
    error = (weight.double() - found.dequantize().double()).abs().max()
    assert float(error) <= float(found.scale) * (0.5 + 2.0 ** (bits - MANTISSA))


@given(weights(), st.integers(2, 8))
@settings(max_examples=60)
def test_every_level_is_exact_in_float32(weight: Tensor, bits: int) -> None:
    found = quantized(weight, f"int{bits}:asym")
    assert found.zero is not None
    multiples = torch.arange(2**bits).double() - found.zero.double().reshape(-1, 1)
    exact = multiples * found.scale.double().reshape(-1, 1)
    assert torch.equal(exact.float().double(), exact)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shift", [0.0, 0.8, -3.0])
@pytest.mark.parametrize("power", [1, 3])
def test_close_to_the_best_of_all_scales_and_zero_points(bits: int, shift: float, power: int) -> None:
    """Of those whose codes reach both ends, or have zero there: what quantizing again can find again."""
    rows = torch.randn(12, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) ** power + shift
    found = least_squares(rows, bits)
    values = (found.codes.double() - found.zero.double()[:, None]) * found.scale.double()[:, None]
    error = (rows - values).square().sum(1)
    span = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    best = torch.full_like(error, torch.inf)
    for part, zero in product(np.geomspace(0.02, 1.3, 200), range(2**bits)):
        scale = (span * part / (2**bits - 1))[:, None]
        codes = ((rows / scale).round() + zero).clamp(0, 2**bits - 1)
        reached = (codes.amin(1) == 0) & ((codes.amax(1) == 2**bits - 1) | (zero == 2**bits - 1))
        reached |= (zero == 0) & (codes.amax(1) == 2**bits - 1)
        best = torch.where(reached, torch.minimum(best, (rows - (codes - zero) * scale).square().sum(1)), best)
    assert bool((error <= 1.12 * best).all())
    assert float(error.sum()) <= 1.03 * float(best.sum())


@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges_that_are_left_out_are_never_better(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) ** 3
    some = least_squares(rows, bits)
    monkeypatch.setattr(module._Search, "hopeless", lambda self, part: False)
    every = least_squares(rows, bits)
    assert torch.equal(some.codes, every.codes)
    assert torch.equal(some.scale, every.scale)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_sided_weights_gain_a_bit(bits: int) -> None:
    weight = torch.rand(16, 300, generator=torch.Generator().manual_seed(0))
    asym, full = (squared_error(weight, quantized(weight, f"int{bits}{grid}")) for grid in (":asym", ":full"))
    assert asym < 0.4 * full


def test_rows_in_parts_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(9, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = least_squares(rows, 3)
    monkeypatch.setattr(module, "AT_A_TIME", 70)
    found = least_squares(rows, 3)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)


def test_auto_does_not_consider_it() -> None:
    weight = torch.rand(16, 300, generator=torch.Generator().manual_seed(0))
    for text in ("int4", "int8", "int4:block100"):
        assert quantized(weight, text).grid != "asym"
        assert quantized(weight, text).zero is None


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1.2e-38, 3.4028234e38])
@pytest.mark.parametrize("text", CASES)
def test_extreme_magnitudes_stay_finite(text: str, magnitude: float) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [-1.0, -0.5, 1.0, 0.0]]) * magnitude
    values = quantized(weight, text).dequantize()
    assert bool(torch.isfinite(values).all())
    assert bool((values.double().abs() <= 2 * magnitude + 2e-38).all())


def test_a_row_is_spanned() -> None:
    found = spanning(torch.tensor([[-3.0, 0.0, 12.0], [0.0, 0.0, 0.0], [5.0, 6.0, 7.5]], dtype=torch.float64), 4)
    assert found.zero.tolist() == [3, 0, 0]
    assert found.codes.tolist() == [[0, 3, 15], [0, 0, 0], [10, 12, 15]]
    assert found.scale.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("text", ["int3:asym", "int3:tensor:asym", "int3:block8:asym"])
def test_levels_count_from_the_zero_point(text: str) -> None:
    found = quantized(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), text)
    levels, codes = found.levels()
    assert levels.tolist() == codes.tolist() == list(range(8))
    assert codes.dtype == torch.uint8
    assert found.zero is not None
    values = (levels[found.codes.long()] - found.spread(found.zero.double())).float() * found.spread(found.scale)
    assert torch.equal(values, found.dequantize())


RIGHT = quantize_whole(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), WeightSpec.parse("int3:asym"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero": None}, "codes of a wrong type"),
        ({"zero": None, "codes": torch.zeros(3, 16, dtype=torch.int8)}, "zero points that do not fit int3:asym"),
        ({"zero": torch.zeros(3, dtype=torch.int8)}, "zero points that do not fit int3:asym"),
        ({"zero": torch.zeros(1, dtype=torch.uint8)}, "zero points that do not fit int3:asym"),
        ({"zero": torch.full((3,), 8, dtype=torch.uint8)}, "expected 0..7"),
        ({"codes": torch.full((3, 16), 8, dtype=torch.uint8)}, "expected 0..7"),
        ({"codes": torch.zeros(3, 16, dtype=torch.int8)}, "codes of a wrong type"),
        ({"spec": WeightSpec.parse("int3")}, "zero points that do not fit int3"),
        ({"spec": WeightSpec.parse("log3"), "table": torch.zeros(8, dtype=torch.int8)}, "zero points that do not fit"),
    ],
)
def test_inconsistent_parts_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(VerificationError, match=words) as caught:
        replace(RIGHT, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_wrong_zero_point_is_seen() -> None:
    """A planted mistake: the zero point of a neighbouring channel."""
    weight = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) - torch.tensor([[0.1], [0.9]])
    found = quantized(weight, "int4:asym")
    assert found.zero is not None
    wrong = replace(found, zero=found.zero.flip(0))
    assert squared_error(weight, wrong) > 100 * squared_error(weight, found)
