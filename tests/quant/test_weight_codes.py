"""Weights to codes: hand-computed tables, then properties over every format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError, VerificationError
from qopt.quant import QuantizedWeight, codebook, quantize_whole
from qopt.spec import WeightSpec

FORMATS = [*(f"{kind}{bits}" for kind in ("int", "log") for bits in range(1, 9)), "ternary"]
OPTIONS = ["", ":max", ":tensor", ":tensor:max"]

GRIDS = [f"int{bits}:{grid}" for bits in range(2, 9) for grid in ("narrow", "full")] + [
    "int2:mid",
    "int3:mid",
    "int4:mid",
]
CASES = [a + b for a in FORMATS for b in OPTIONS] + [a + b for a in GRIDS for b in ("", ":tensor")]
formats = st.sampled_from(CASES).map(WeightSpec.parse)
shapes = st.sampled_from([(1,), (7,), (3, 5), (4, 3, 3, 3), (2, 40), (6, 1, 5)])


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Float32 weights of many kinds: Gaussian, heavy-tailed, few-valued, with zero rows, of any magnitude."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["gauss", "heavy", "grid", "holes", "zero"]))
    if kind == "heavy":
        base = base**3
    elif kind == "grid":
        base = torch.round(base * 2) / 4
    elif kind == "holes":
        base[torch.rand(shape, generator=generator) < 0.5] = 0.0
        base[0] = 0.0
    elif kind == "zero":
        base = torch.zeros(shape)
    return base * draw(st.sampled_from([1.0, 0.037, 1e-20, 1e20, 3e-30, 1e30]))


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    return float((weight.double() - quantized.dequantize().double()).square().sum())


GOLDEN = [
    # linear, max-abs: scale = max / q
    ("int8:tensor:max", [127.0, -1.0, 0.4, 0.6], [127, -1, 0, 1], [127.0, -1.0, 0.0, 1.0]),
    ("int4:tensor:max", [0.7, -0.31, 0.14, 0.0], [7, -3, 1, 0], [0.7, -0.3, 0.1, 0.0]),
    ("int3:tensor:max", [-3.0, 1.6, 1.4, -0.4], [-3, 2, 1, 0], [-3.0, 2.0, 1.0, 0.0]),
    ("int3:tensor:max", [3.0, 0.5, 1.5, -2.5], [3, 0, 2, -2], [3.0, 0.0, 2.0, -2.0]),  # ties to even
    ("int2:tensor:max", [4.0, -2.5, 1.9, -4.0], [1, -1, 0, -1], [4.0, -4.0, 0.0, -4.0]),
    # ternary under the best scale: {3, 3.2, -2.8} to +-3, {0.1} to zero
    ("int2:tensor:narrow", [3.0, 3.2, -2.8, 0.1], [1, 1, -1, 0], [3.0, 3.0, -3.0, 0.0]),
    ("ternary:tensor", [3.0, 3.2, -2.8, 0.1], [1, 1, -1, 0], [3.0, 3.0, -3.0, 0.0]),
    ("ternary:tensor:max", [4.0, -2.5, 1.9, -4.0], [1, -1, 0, -1], [4.0, -4.0, 0.0, -4.0]),
    # two's complement, its longer side to the left and, under a negative scale, to the right
    ("int2:tensor:full", [-2.0, -1.0, 0.0, 1.0], [-2, -1, 0, 1], [-2.0, -1.0, 0.0, 1.0]),
    ("int2:tensor:full", [2.0, -1.0, 0.0, 1.0], [-2, 1, 0, -1], [2.0, -1.0, 0.0, 1.0]),
    ("int3:tensor", [4.0, -3.0, 0.0, 1.0], [-4, 3, 0, -1], [4.0, -3.0, 0.0, 1.0]),
    ("int2:tensor:full", [1.0, -1.0, 0.0, 1.0], [1, -1, 0, 1], [1.0, -1.0, 0.0, 1.0]),  # no need of it: upright
    # mid-rise: odd multiples of half a step, ties away from zero, and zero is positive
    ("int2:tensor:mid", [3.0, 1.0, -1.0, -3.0], [3, 2, 1, 0], [3.0, 1.0, -1.0, -3.0]),
    ("int2:tensor", [3.0, 1.0, -1.0, -3.0], [3, 2, 1, 0], [3.0, 1.0, -1.0, -3.0]),
    ("int3:tensor:mid", [7.0, 5.0, 3.0, 1.0, -7.0], [7, 6, 5, 4, 0], [7.0, 5.0, 3.0, 1.0, -7.0]),
    ("int1:tensor", [0.5, -1.5, 1.0, 0.0], [1, -1, 1, 1], [0.75, -0.75, 0.75, 0.75]),
    ("int1:tensor:max", [0.5, -1.5, 1.0, 0.0], [1, -1, 1, 1], [0.75, -0.75, 0.75, 0.75]),
    ("log1:tensor", [0.5, -1.5, 1.0, 0.0], [1, -1, 1, 1], [0.75, -0.75, 0.75, 0.75]),
    # log, rounding the exponent: 1/sqrt(2) = 0.7071 of a level is the border
    ("log2:tensor:max", [1.0, 0.71, 0.70, -1.0], [1, 1, 0, 2], [1.0, 1.0, 0.0, -1.0]),
    ("log3:tensor:max", [1.0, -0.71, 0.70, 0.36], [1, 4, 2, 2], [1.0, -1.0, 0.5, 0.5]),
    ("log3:tensor:max", [2.0, 0.71, 0.36, -0.35], [1, 2, 3, 0], [2.0, 1.0, 0.5, 0.0]),
    ("log4:tensor:max", [64.0, -32.0, 1.0, 0.7, 3.0, 0.75], [1, 9, 7, 0, 5, 7], [64.0, -32.0, 1.0, 0.0, 4.0, 1.0]),
    ("log5:tensor:max", [1.0, -0.5, 2.0**-14, 2.0**-15], [1, 17, 15, 0], [1.0, -0.5, 2.0**-14, 0.0]),
    ("log8:tensor:max", [1.0, -1.0, 2.0**-60, -(2.0**-126)], [1, 128, 61, 254], [1.0, -1.0, 2.0**-60, -(2.0**-126)]),
    # log of 2 bits under the best scale is the same ternary format
    ("log2:tensor", [3.0, 3.2, -2.8, 0.1], [1, 1, 2, 0], [3.0, 3.0, -3.0, 0.0]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "values", "codes", "levels"), GOLDEN)
def test_golden(text: str, values: list[float], codes: list[int], levels: list[float]) -> None:
    quantized = quantize_whole(torch.tensor(values), WeightSpec.parse(text))
    assert quantized.codes.tolist() == codes
    assert torch.allclose(quantized.dequantize(), torch.tensor(levels), rtol=1e-6, atol=0)


TABLES = [
    ("log2", [0, 64, -64, 0]),
    ("log3", [0, 64, 32, 16, -64, -32, -16, 0]),
    ("log4", [0, 64, 32, 16, 8, 4, 2, 1, -64, -32, -16, -8, -4, -2, -1, 0]),
]


@pytest.mark.parametrize(("text", "table"), TABLES)
def test_small_tables_are_int8_powers_of_two(text: str, table: list[int]) -> None:
    spec = WeightSpec.parse(text)
    found = codebook(spec).table
    assert found is not None
    assert found.dtype == torch.int8
    assert found.tolist() == table
    assert len(table) == spec.packing.base


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_wide_tables_are_float_and_cover_every_code(bits: int) -> None:
    found = codebook(WeightSpec("log", bits)).table
    assert found is not None
    assert found.dtype == torch.float32
    assert found.shape == (256,)
    count = 2 ** (bits - 1) - 1
    expected = [0.0, *[2.0**-k for k in range(count)], *[-(2.0**-k) for k in range(count)]]
    assert found[: len(expected)].tolist() == expected
    assert not found[len(expected) :].any()


def test_the_top_level_of_a_small_log_format_is_64_scales() -> None:
    quantized = quantize_whole(torch.tensor([[3.0, 1.0], [-5.0, 5.0]]), WeightSpec.parse("log4:max"))
    assert (quantized.scale * 64).tolist() == [3.0, 5.0]


@given(weights(), formats)
@settings(max_examples=150)
def test_codes_are_representable(weight: Tensor, spec: WeightSpec) -> None:
    quantized = quantize_whole(weight, spec)
    assert quantized.codes.shape == weight.shape
    assert bool(torch.isfinite(quantized.scale).all())
    q = max(1, 2 ** (spec.bits - 1) - 1)
    if quantized.grid == "mid":
        assert int(quantized.codes.max()) < 2**spec.bits
    elif quantized.table is None:
        assert -q - spec.full_range <= int(quantized.codes.min())
        assert int(quantized.codes.max()) <= q
        assert spec.bits > 1 or bool((quantized.codes != 0).all())
    else:
        assert int(quantized.codes.max()) <= 2 * q
    values = quantized.dequantize()
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all())
    first_axis = values.reshape(len(values), -1) if spec.granularity == "channel" else values.reshape(1, -1)
    assert all(len(set(row.tolist())) <= 2**spec.bits for row in first_axis)


@given(weights(), formats)
@settings(max_examples=150)
def test_idempotent(weight: Tensor, spec: WeightSpec) -> None:
    once = quantize_whole(weight, spec).dequantize()
    again = quantize_whole(once, spec)
    assert torch.equal(again.dequantize(), once)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("option", OPTIONS)
def test_idempotent_from_float64(text: str, option: str) -> None:
    """Magnitudes that float32 does not have: the scale, not the weight, must be stable."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(300, 17, generator=generator, dtype=torch.float64)
    spec = WeightSpec.parse(text + option)
    once = quantize_whole(weight, spec).dequantize()
    assert torch.equal(quantize_whole(once, spec).dequantize(), once)


@given(weights(), formats)
@settings(max_examples=150)
def test_mse_is_never_worse_than_max(weight: Tensor, spec: WeightSpec) -> None:
    mse = quantize_whole(weight, replace(spec, scale="mse"))
    if "mid" in str(spec):  # its levels are others
        return
    largest = quantize_whole(weight, replace(spec, scale="max", grid="auto"))
    assert squared_error(weight, mse) <= squared_error(weight, largest) * (1 + 1e-12)


@given(weights(), st.integers(2, 8), st.sampled_from(["channel", "tensor"]))
@settings(max_examples=100)
def test_linear_max_is_within_half_a_step(weight: Tensor, bits: int, granularity: str) -> None:
    quantized = quantize_whole(weight, WeightSpec.parse(f"int{bits}:{granularity}:max"))
    scale = quantized.scale.double()
    steps = scale.view(-1, *[1] * (weight.ndim - 1)) if granularity == "channel" else scale
    error = (weight.double() - quantized.dequantize().double()).abs()
    assert bool((error <= steps * (0.5 + 2**-16)).all())


@given(weights(), st.integers(2, 8))
@settings(max_examples=100)
def test_log_max_is_within_half_an_octave(weight: Tensor, bits: int) -> None:
    """Relative error at most sqrt(2) - 1 and 1 - 1/sqrt(2) where not flushed to zero: the format's floor."""
    quantized = quantize_whole(weight, WeightSpec.parse(f"log{bits}:tensor:max"))
    values = quantized.dequantize().double()
    kept = values != 0
    ratio = weight.double()[kept] / values[kept]
    assert bool((ratio >= 0.5**0.5 - 1e-6).all())
    assert bool((ratio <= 2**0.5 + 1e-6).all())
    smallest = weight.abs().max().double() * 2.0 ** -(2 ** (bits - 1) - 2)
    assert bool((weight.double().abs()[~kept] <= smallest * 0.5**0.5 + 1e-45).all())


@given(weights(), formats)
@settings(max_examples=100)
def test_sign_symmetry(weight: Tensor, spec: WeightSpec) -> None:
    weight = weight if spec.bits > 1 else torch.where(weight == 0, 0.5, weight)
    weight = torch.where(weight == 0, 0.5, weight) if "mid" in str(spec) else weight
    positive = quantize_whole(weight, spec)
    negative = quantize_whole(-weight, spec)
    assert torch.allclose(positive.scale.abs(), negative.scale.abs(), rtol=1e-4) or positive.grid != negative.grid
    assert squared_error(weight, positive) == pytest.approx(squared_error(-weight, negative), rel=1e-3)
    if not spec.full_range:
        assert torch.equal(positive.dequantize(), -negative.dequantize())


@given(weights(), formats, st.integers(-10, 10))
@settings(max_examples=60)
def test_a_power_of_two_scales_through(weight: Tensor, spec: WeightSpec, exponent: int) -> None:
    plain = quantize_whole(weight, spec)
    scaled = quantize_whole(weight * 2.0**exponent, spec)
    if bool(weight.any()):
        assert torch.equal(scaled.codes, plain.codes)
        assert torch.equal(scaled.dequantize(), plain.dequantize() * 2.0**exponent)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("axis", [0, 1, 3, -2])
def test_each_channel_is_quantized_alone(text: str, axis: int) -> None:
    weight = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(axis + 9))
    whole = quantize_whole(weight, WeightSpec.parse(text), axis)
    assert whole.axis == axis % 4
    assert whole.scale.shape == (weight.shape[axis],)
    for index, channel in enumerate(weight.movedim(axis, 0)):
        grid = "" if whole.grid == "auto" else f":{whole.grid}"  # which is chosen for the whole tensor
        alone = quantize_whole(channel, WeightSpec.parse(f"{text}:tensor{grid}"))
        assert torch.allclose(alone.dequantize(), whole.dequantize().movedim(axis, 0)[index], rtol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_zero_channel_stays_zero(text: str, option: str) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    spec = WeightSpec.parse(text + option)
    quantized = quantize_whole(weight, spec)
    if spec.granularity == "channel":
        assert not quantized.dequantize()[1].any()
        assert float(quantized.scale[1]) == (0.0 if spec.bits == 1 else 1.0)
        assert not quantized.codes[1].any() or spec.bits == 1
    assert not quantize_whole(torch.zeros(3, 8), spec).dequantize().any()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1.2e-38, 3.4028234e38])
def test_extreme_magnitudes_stay_finite(text: str, magnitude: float) -> None:
    weight = torch.tensor([1.0, -0.5, 0.25, 0.0]) * magnitude
    for option in OPTIONS:
        values = quantize_whole(weight, WeightSpec.parse(text + option)).dequantize()
        assert bool(torch.isfinite(values).all())
        assert bool((values.double().abs() <= 2 * magnitude + 2e-38).all())


def test_half_precision_and_strided_weights_are_taken() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    spec = WeightSpec.parse("int4")
    expected = quantize_whole(weight.float(), spec, axis=1).dequantize()
    assert torch.equal(quantize_whole(weight.T, spec, axis=0).dequantize().T, expected)


@pytest.mark.parametrize(
    ("weight", "text", "axis", "error"),
    [
        (torch.tensor([1.0, float("nan")]), "int4", 0, CorruptModelError),
        (torch.tensor([1.0, float("inf")]), "log4", 0, CorruptModelError),
        (torch.tensor([1.0, 1e39], dtype=torch.float64), "int4", 0, CorruptModelError),
        (torch.zeros(0, 3), "int4", 0, CorruptModelError),
        (torch.zeros(3, 0), "int1", 0, CorruptModelError),
        (torch.ones(3), "float", 0, UsageError),
        (torch.ones(3), "int4", 1, UsageError),
        (torch.ones(3), "int4", -2, UsageError),
        (torch.tensor(1.0), "int4", 0, UsageError),
    ],
)
def test_errors_name_the_layer(weight: Tensor, text: str, axis: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"conv1\.weight"):
        quantize_whole(weight, WeightSpec.parse(text), axis, where="conv1.weight")


@given(weights(), st.integers(2, 8), st.sampled_from(["channel", "tensor"]))
@settings(max_examples=150)
def test_auto_is_never_worse_than_any_grid(weight: Tensor, bits: int, granularity: str) -> None:
    """The best for the whole tensor; a dead channel keeps it from the mid-rise grid."""
    auto = squared_error(weight, quantize_whole(weight, WeightSpec.parse(f"int{bits}:{granularity}")))
    rows = weight.reshape(len(weight) if granularity == "channel" else 1, -1)
    alive = float(rows.abs().amax(dim=1).min()) > 1e-4 * float(rows.abs().max())
    for option in (":max", ":narrow", ":full", *([":mid"] if bits <= 4 and alive else [])):
        single = squared_error(weight, quantize_whole(weight, WeightSpec.parse(f"int{bits}:{granularity}{option}")))
        assert auto <= single * (1 + 1e-12)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.70), (3, 0.85), (4, 0.94)])
def test_the_grids_are_worth_their_while_on_a_gaussian(bits: int, gain: float) -> None:
    weight = torch.randn(16, 576, generator=torch.Generator().manual_seed(3))
    errors = {
        grid: squared_error(weight, quantize_whole(weight, WeightSpec.parse(f"int{bits}:{grid}")))
        for grid in ("narrow", "full", "mid", "auto")
    }
    assert errors["auto"] == min(errors.values())
    assert errors["auto"] < gain * errors["narrow"]
    assert errors["full"] < errors["narrow"]


def test_each_channel_turns_its_own_longer_side() -> None:
    weight = torch.tensor([[-4.0, 3.0, 1.0, 0.0], [4.0, -3.0, 1.0, 0.0], [3.0, -3.0, 1.0, 0.0]])
    quantized = quantize_whole(weight, WeightSpec.parse("int3"))
    assert quantized.grid == "full"
    assert quantized.scale.sign().tolist() == [1.0, -1.0, 1.0]
    assert quantized.codes.amin(dim=1).tolist() == [-4, -4, -3]
    assert torch.equal(quantized.dequantize(), weight)


def test_the_sign_of_the_longer_side_matters() -> None:
    """A planted mistake: the longer side left where two's complement has it."""
    weight = torch.tensor([4.0, 4.0, -3.0, 2.0, 1.0, -1.0, 0.0])
    quantized = quantize_whole(weight, WeightSpec.parse("int3:tensor:full"))
    assert squared_error(weight, quantized) == 0
    scales = torch.linspace(0.5, 1.5, 201)
    ahead = [float((weight - (weight / s).round().clamp(-4, 3) * s).square().sum()) for s in scales]
    assert min(ahead) > 0.3


@pytest.mark.parametrize(("text", "grid"), [("int4", "full"), ("int4:mid", "mid"), ("int1", "auto")])
def test_a_dead_channel_has_a_scale_of_zero_only_where_no_code_is_zero(text: str, grid: str) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    weight[1] = 0
    quantized = quantize_whole(weight, WeightSpec.parse(text))
    assert quantized.grid == grid
    assert bool(quantized.scale[1] == 0) == (grid != "full")
    assert not quantized.dequantize()[1].any()


@pytest.mark.parametrize("bits", [5, 8])
def test_wide_mid_rise_grids_do_not_exist(bits: int) -> None:
    with pytest.raises(UsageError, match="mid-rise"):
        codebook(WeightSpec("int", bits), "mid")


@pytest.mark.parametrize("text", ["float", "int1", "log1", "nf@4"])
def test_formats_without_a_codebook(text: str) -> None:
    with pytest.raises(UsageError, match="codebook"):
        codebook(WeightSpec.parse(text))


@pytest.mark.parametrize(
    ("codes", "scale", "axis", "table", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(3), 0, None, "int4"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.float64), 0, None, "int4"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), 0, None, "int4:tensor"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), 2, None, "int4"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.ones(2), 0, None, "int4"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), 0, torch.zeros(16), "log4"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), 0, torch.zeros(15, dtype=torch.int8), "log4"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), 0, torch.zeros(16), "log4"),
    ],
)
def test_inconsistent_parts_are_refused(
    codes: Tensor, scale: Tensor, axis: int, table: Tensor | None, text: str
) -> None:
    with pytest.raises(VerificationError):
        QuantizedWeight(WeightSpec.parse(text), codes, scale, axis, table)


def test_dequantize_is_one_float32_product() -> None:
    """What the file computes, in numpy: cast, look up, multiply."""
    weight = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    for text in FORMATS:
        quantized = quantize_whole(weight, WeightSpec.parse(text))
        levels = quantized.codes.numpy()
        if quantized.table is not None:
            levels = quantized.table.numpy()[levels]
        expected = levels.astype(np.float32) * quantized.scale.numpy()[:, None]
        assert np.array_equal(quantized.dequantize().numpy(), expected)


@pytest.mark.parametrize("text", FORMATS)
def test_levels_are_what_codes_select(text: str) -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(len(text)))
    quantized = quantize_whole(weight, WeightSpec.parse(f"{text}:tensor"))
    levels, codes = quantized.levels()
    assert (levels.diff() > 0).all()
    table = codes.to(torch.float64) if quantized.table is None else quantized.table.double()[codes.long()]
    assert torch.equal(table, levels)
    few = {"int1": 2, "log1": 2, "ternary": 3}
    assert len(levels) == (few[text] if text in few else 2 ** int(text[-1]) - text.startswith("log"))
    used = (quantized.dequantize().double() / quantized.scale.double()).flatten()
    assert (used[:, None] - levels).abs().min(dim=1).values.max() < 1e-4
