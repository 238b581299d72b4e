"""Codes made in parts are those that the whole weight has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qopt.errors import CorruptModelError, PlanError, UsageError
from qopt.quant import quantize_weight, quantize_whole
from qopt.quant.large import LARGE, PART, quantize_large
from qopt.quant.quantized import QuantizedWeight
from qopt.spec import WeightSpec

pytestmark = pytest.mark.long

FORMATS = [
    "int1", "int2", "int3", "int4", "int4:max", "int8", "ternary", "ternary:max", "log2", "log4", "log4:max",
    "int4:block64", "int3:block32", "int4:mid", "int4:asym", "int8:tensor:max",
]  # fmt: skip
SHAPES = {(2050, 512): 0, (512, 2050): 1, (1030, 64, 4, 4): 0, (64, 1030, 16): 1}


def weight(shape: tuple[int, ...], kind: str = "gauss") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) * 0.05
    return values if kind == "gauss" else values.abs().sqrt() * values.sign()


def squared(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def same(found: object, whole: object, values: Tensor) -> None:
    """Equal but for the last bit of some scales, and as good."""
    assert isinstance(found, QuantizedWeight)
    assert isinstance(whole, QuantizedWeight)
    assert (found.spec, found.axis, found.grid, found.shape) == (whole.spec, whole.axis, whole.grid, whole.shape)
    assert (found.table is None) == (whole.table is None)
    assert found.table is None or torch.equal(found.table, whole.table if whole.table is not None else found.table)
    torch.testing.assert_close(found.scale, whole.scale, rtol=3e-7, atol=0)
    assert int((found.codes != whole.codes).sum()) <= 4
    assert squared(values, found.dequantize()) == pytest.approx(squared(values, whole.dequantize()), rel=1e-9)


@pytest.mark.parametrize("text", FORMATS)
def test_parts_are_the_whole(text: str) -> None:
    values = weight((2050, 512))
    assert values.numel() >= LARGE > PART
    spec = WeightSpec.parse(text)
    same(quantize_large(values, spec, 0), quantize_weight(values, spec, 0), values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", ["int2", "int4:max", "ternary"])
def test_every_shape_and_axis(shape: tuple[int, ...], text: str) -> None:
    values, spec = weight(shape), WeightSpec.parse(text)
    same(quantize_large(values, spec, SHAPES[shape]), quantize_weight(values, spec, SHAPES[shape]), values)


def test_the_grid_is_chosen_for_the_whole() -> None:
    """Half of the channels would be better mid-rise, and the other half, which weighs more, would not."""
    values = weight((2048, 512))
    values[:1024] = torch.where(values[:1024] >= 0, 0.01, -0.01)
    values[1024:] *= 10
    spec = WeightSpec.parse("int2")
    grids = {quantize_whole(values[part], spec).grid for part in (slice(1024), slice(1024, None))}
    assert grids == {"mid", "full"}
    same(quantize_large(values, spec, 0), quantize_weight(values, spec, 0), values)


def test_a_dead_channel_rules_the_mid_rise_grid_out() -> None:
    values, spec = weight((2048, 512)), WeightSpec.parse("int2")
    found = quantize_large(values, spec)
    assert isinstance(found, QuantizedWeight)
    assert found.grid == "mid"
    values[7] = 0
    found = quantize_large(values, spec)
    same(found, quantize_weight(values, spec), values)
    assert isinstance(found, QuantizedWeight)
    assert found.grid == "full"
    assert not found.dequantize()[7].any()


def test_small_weights_are_quantized_as_ever() -> None:
    values, spec = weight((64, 32)), WeightSpec.parse("int4")
    a, b = quantize_large(values, spec), quantize_weight(values, spec)
    assert torch.equal(a.dequantize(), b.dequantize())


def test_a_weight_that_is_quantized_already_keeps_its_values() -> None:
    spec = WeightSpec.parse("int4")
    once = quantize_large(weight((2048, 512)), spec).dequantize()
    assert torch.equal(quantize_large(once, spec).dequantize(), once)


def test_errors_name_the_layer() -> None:
    values = weight((2048, 512))
    with pytest.raises(UsageError, match=r"big: no such channel axis"):
        quantize_large(values, WeightSpec.parse("int4"), 2, where="big")
    with pytest.raises(PlanError, match="big: blocks that do not fill a channel"):
        quantize_large(values, WeightSpec.parse("int4:block96"), where="big")
    values[2047, 511] = float("inf")
    with pytest.raises(CorruptModelError, match="big: weights that are not finite"):
        quantize_large(values, WeightSpec.parse("int4"), where="big")
