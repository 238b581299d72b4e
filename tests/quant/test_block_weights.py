"""A scale for each block of a channel: every block as a weight of its own, in the order in which weights are stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import PlanError, VerificationError
from qopt.quant import QuantizedWeight, codebook, quantize_weight, quantize_whole
from qopt.quant.scales import mean_square_scale
from qopt.spec import WeightSpec

FORMATS = [*(f"{kind}{bits}" for kind in ("int", "log") for bits in range(1, 9)), "ternary"]
GRIDS = ["int2:mid", "int3:full", "int4:narrow", "int4:mid", "int8:full", "int2:asym", "int4:asym", "int8:asym"]
MAXIMA = ["int4:max", "log3:max", "log6:max", "ternary:max", "int3:max:asym"]
ALL = [*FORMATS, *GRIDS, *MAXIMA]


def in_blocks(text: str, block: int) -> WeightSpec:
    word, *options = text.split(":")
    return WeightSpec.parse(":".join([word, f"block{block}", *options]))


def weight_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    return float((weight.double() - quantized.dequantize().double()).square().sum())


def block_by_block(weight: Tensor, whole: QuantizedWeight) -> Tensor:
    """Every block quantized alone, by a format with one scale on the grid that the whole weight took."""
    word, *options = str(whole.spec).split(":")
    kept = [option for option in options if not option.startswith("block") and option != "asym"]
    grid = [] if whole.grid == "auto" or (whole.spec.scale == "max" and whole.grid != "asym") else [whole.grid]
    alone = WeightSpec.parse(":".join([word, "tensor", *(o for o in kept if o == "max"), *grid]))
    moved = weight.movedim(whole.axis, 0)
    found = torch.empty(moved.shape)
    for channel, out in zip(moved, found, strict=True):
        parts = [quantize_whole(part, alone).dequantize() for part in channel.reshape(-1).split(whole.spec.block)]
        out.copy_(torch.cat(parts).reshape(out.shape))
    return found.movedim(0, whole.axis)


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize(("shape", "axis", "block"), [((3, 4, 3, 2), 0, 8), ((32, 2), 1, 16), ((4, 3, 6, 1), 2, 12)])
def test_every_block_is_a_weight_of_its_own(text: str, shape: tuple[int, ...], axis: int, block: int) -> None:
    weight = weight_of(len(text), *shape)
    whole = quantize_whole(weight, in_blocks(text, block), axis)
    assert whole.scale.shape == (shape[axis], weight.numel() // shape[axis] // block)
    assert whole.codes.shape == weight.shape
    torch.testing.assert_close(whole.dequantize(), block_by_block(weight, whole), rtol=1e-5, atol=1e-6)


def test_the_oracle_sees_blocks_that_lie_elsewhere() -> None:
    """A planted mistake: blocks along the channels instead of within them."""
    weight = weight_of(1, 16, 16)
    right = quantize_whole(weight, in_blocks("int4", 8))
    wrong = replace(right, scale=right.scale.reshape(2, 16).T.contiguous())
    assert not torch.allclose(wrong.dequantize(), block_by_block(weight, right), rtol=1e-3)


kinds = st.sampled_from(["gauss", "heavy", "grid", "holes", "zero", "positive"])


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 weights of many kinds whose channels blocks of 8 fill."""
    shape = draw(st.sampled_from([(1, 8), (3, 2, 4), (2, 8, 3), (5, 16), (2, 64)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base, kind = torch.randn(shape, generator=generator), draw(kinds)
    if kind == "heavy":
        base = base**3
    elif kind == "grid":
        base = torch.round(base * 2) / 4
    elif kind == "holes":
        base[torch.rand(shape, generator=generator) < 0.5] = 0.0
        base.view(-1)[:8] = 0.0
    elif kind == "zero":
        base = torch.zeros(shape)
    elif kind == "positive":
        base = base.abs() + 1
    return base * draw(st.sampled_from([1.0, 0.037, 1e-20, 1e20, 3e-30, 1e30, 1e-38]))


@given(weights(), st.sampled_from(ALL))
@settings(max_examples=200)
def test_idempotent(weight: Tensor, text: str) -> None:
    spec = in_blocks(text, 8)
    once = quantize_whole(weight, spec)
    assert bool(torch.isfinite(once.dequantize()).all())
    assert torch.equal(quantize_whole(once.dequantize(), spec).dequantize(), once.dequantize())


@given(weights(), st.sampled_from([text for text in FORMATS if "1" not in text]))
@settings(max_examples=100)
def test_mse_is_never_worse_than_max(weight: Tensor, text: str) -> None:
    best, largest = (quantize_whole(weight, in_blocks(text + scale, 8)) for scale in ("", ":max"))
    assert squared_error(weight, best) <= squared_error(weight, largest) * (1 + 1e-12)


@given(weights(), st.integers(2, 4))
@settings(max_examples=60)
def test_auto_is_never_worse_than_any_grid(weight: Tensor, bits: int) -> None:
    """Blocks of zeros included: no integer kernel has to hold their scale."""
    auto = squared_error(weight, quantize_whole(weight, in_blocks(f"int{bits}", 8)))
    for option in (":max", ":narrow", ":full", ":mid"):
        assert auto <= squared_error(weight, quantize_whole(weight, in_blocks(f"int{bits}{option}", 8))) * (1 + 1e-12)


@pytest.mark.parametrize("text", ALL)
def test_blocks_and_channels_of_zeros_stay_zero(text: str) -> None:
    weight = weight_of(2, 3, 24)
    weight[1], weight[2, 8:16] = 0, 0
    found = quantize_whole(weight, in_blocks(text, 8))
    values = found.dequantize()
    assert not values[1].any()
    assert not values[2, 8:16].any()
    assert values[2, :8].any()
    assert bool(torch.isfinite(found.scale).all())


@pytest.mark.parametrize("text", ["int2", "int4", "log3", "ternary", "int4:asym", "int3:max"])
def test_smaller_blocks_are_closer(text: str) -> None:
    weight = weight_of(3, 8, 512) * torch.exp2(weight_of(4, 8, 512).round())
    errors = [squared_error(weight, quantize_whole(weight, in_blocks(text, block))) for block in (512, 64, 8)]
    assert errors[0] > 1.05 * errors[1] > 1.1 * errors[2]
    channel = squared_error(weight, quantize_whole(weight, WeightSpec.parse(text)))
    assert errors[0] == pytest.approx(channel, rel=2e-3), "one block is a channel"


@pytest.mark.parametrize("text", ["int2", "int3", "int4", "int8", "log4", "int4:mid"])
@pytest.mark.parametrize("count", [8, 32, 300])
def test_scales_that_are_left_out_are_never_the_best(text: str, count: int) -> None:
    spec = WeightSpec.parse(text)
    rows = torch.randn(40, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) ** 3
    rows[:20, 1:] *= 0.001  # one weight rules its row
    grids = (["mid"] if spec.grid == "mid" else ["narrow", "full"]) if spec.kind == "int" else ["narrow"]
    for grid in grids:
        levels = codebook(spec, grid)  # type: ignore[arg-type]
        every, some = (mean_square_scale(rows, levels, blocks=blocks) for blocks in (False, True))
        torch.testing.assert_close(some, every, rtol=1e-6, atol=0)


def test_rows_in_parts_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(5, 50, 32)
    expected = quantize_whole(weight, in_blocks("int4", 8))
    monkeypatch.setattr("qopt.quant.scales.LOOKUPS", 40)
    found = quantize_whole(weight, in_blocks("int4", 8))
    torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "text", "fix"),
    [
        ((4, 27), "int4:block32", "give the layer :block27, or a scale per channel"),
        ((4, 64, 3, 3), "log4:block128", "give the layer :block144, or a scale per channel"),
        ((4, 7), "ternary:block8", "give the layer a scale per channel"),
        ((4, 7), "int4:block14:asym", "give the layer a scale per channel"),
        ((4, 8), "int4:block16", "give the layer :block8, or"),
    ],
)
def test_blocks_that_do_not_fill_a_channel(shape: tuple[int, ...], text: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        quantize_weight(weight_of(0, *shape), WeightSpec.parse(text), where="conv1.weight")
    message = str(caught.value)
    columns = torch.Size(shape[1:]).numel()
    assert message.startswith("conv1.weight: blocks that do not fill a channel (expected a divisor of")
    assert f"got {text} for {columns} weights per channel" in message
    assert fix in message


@pytest.mark.parametrize("shape", [(2,), (2, 2), (2, 4), (1, 3)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    right = quantize_whole(weight_of(0, 2, 24), in_blocks("int4", 8))
    with pytest.raises(VerificationError, match="scales that do not fit"):
        replace(right, scale=torch.ones(shape))


def test_codes_that_blocks_do_not_fill_are_refused() -> None:
    right = quantize_whole(weight_of(0, 2, 24), in_blocks("int4", 8))
    with pytest.raises(VerificationError, match="blocks that do not fill the channels"):
        replace(right, codes=right.codes[:, :20])


def test_spread_gives_every_weight_its_scale() -> None:
    whole = quantize_whole(weight_of(0, 2, 4, 3, 2), in_blocks("int4", 8), 2)
    spread = whole.spread(whole.scale)
    assert spread.shape == whole.shape
    for channel in range(3):
        assert torch.equal(spread[:, :, channel].reshape(-1, 8)[:, :1], whole.scale[channel][:, None])
        assert torch.equal(spread[:, :, channel].reshape(-1, 8)[:, 7:], whole.scale[channel][:, None])
