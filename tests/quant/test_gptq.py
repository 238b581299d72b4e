"""GPTQ against a literal transcription with explicit inverses, and what it promises for any format."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.errors import UsageError
from qopt.quant import QuantizedWeight, quantize_whole
from qopt.quant import gptq as module
from qopt.quant.gptq import as_rows, as_stored, gptq
from qopt.spec import WeightSpec

Array = NDArray[np.float64]
SPECS = [
    "int1", "int2", "int3", "int4", "int8", "int2:narrow", "int3:mid", "int3:full", "int4:max", "int3:tensor",
    "ternary", "log2", "log3", "log4", "log5", "log4:tensor", "log3:max", "ternary:tensor", "int1:tensor",
]  # fmt: skip
SINGLE_SCALE = [spec for spec in SPECS if "tensor" in spec]


def spec(text: str) -> WeightSpec:
    return WeightSpec.parse(text)


def inputs(seed: int, groups: int, columns: int, count: int = 200) -> torch.Tensor:
    """Correlated and not centred, as activations are: float64 (groups, count, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(groups, count, columns, generator=generator, dtype=torch.float64)
    mixed: torch.Tensor = noise @ mix / columns**0.5 + 0.5 * noise[:, :, :1] + 0.3
    return mixed.relu()


def moment_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.mT @ rows / rows.shape[1]


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def errors(weight: torch.Tensor, rounded: QuantizedWeight, moment: torch.Tensor) -> torch.Tensor:
    """``dW H dW^T`` of every output channel."""
    difference = as_rows(weight.double() - rounded.dequantize().double(), rounded.axis, len(moment))
    return torch.einsum("gri,gij,grj->gr", difference, moment, difference).reshape(-1)


def transcribed(
    weight: Array, scale: float, levels: Array, moment: Array, damping: float, activation: bool, mistake: str = ""
) -> Array:
    """The values of one row: the optimal brain surgeon, an explicit inverse of what is left at every step."""
    columns = len(weight)
    matrix = moment + (0 if mistake == "no damping" else damping) * np.diag(moment).mean() * np.eye(columns)
    steps = np.argsort(-np.diag(moment), kind="stable") if activation else np.arange(columns)
    matrix, left = matrix[np.ix_(steps, steps)], weight[steps].copy()
    values = np.zeros(columns)
    for j in range(columns):
        inverse = np.linalg.inv(matrix[j:, j:])
        values[j] = levels[np.abs(left[j] / scale - levels).argmin()] * scale
        step = (left[j] - values[j]) / inverse[0, 0] * inverse[0]
        left[j:] += step if mistake == "wrong sign" else -step
    if mistake == "no way back":
        return values
    result = np.zeros(columns)
    result[steps] = values
    return result


def table(weight: torch.Tensor, like: QuantizedWeight, moment: torch.Tensor, order: str, mistake: str = "") -> Array:
    """Every row by the transcription."""
    found = []
    for row, scale in zip(weight.double().numpy(), like.scale.double().expand(len(weight)).numpy(), strict=True):
        found.append(
            transcribed(row, scale, like.levels()[0].numpy(), moment[0].numpy(), 0.01, order == "activation", mistake)
        )
    return np.array(found)


@pytest.mark.parametrize("order", ["activation", "stored"])
@pytest.mark.parametrize("text", ["int2", "int3", "int4:tensor", "log3", "ternary", "int3:mid", "int3:full", "int1"])
def test_it_is_the_transcription_wherever_that_beats_nearest(text: str, order: Any) -> None:
    weight, moment = weights(0, 12, 15), moment_of(inputs(0, 1, 15))
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, moment, order=order, scale_search=False)
    expected = torch.from_numpy(table(weight, like, moment, order))
    slow = torch.einsum("ri,ij,rj->r", weight - expected, moment[0], weight - expected)
    wins = slow < errors(weight, like, moment)
    assert 6 <= wins.sum() <= 12, "mostly better, or there is nothing to compare"
    chosen = torch.where(wins[:, None], expected, like.dequantize().double())
    torch.testing.assert_close(found.dequantize().double(), chosen, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.scale, like.scale)


@pytest.mark.parametrize("mistake", ["wrong sign", "no way back"])
def test_planted_mistakes_are_worse_than_nearest(mistake: str) -> None:
    weight, moment = weights(0, 12, 15), moment_of(inputs(0, 1, 15))
    like = quantize_whole(weight, spec("int3"))
    right, wrong = (torch.from_numpy(table(weight, like, moment, "activation", m)) for m in ("", mistake))
    sums = [torch.einsum("ri,ij,rj->", weight - v, moment[0], weight - v) for v in (right, wrong)]
    nearest = errors(weight, like, moment).sum()
    assert sums[0] < nearest < sums[1]
    assert errors(weight, gptq(weight, like, moment, scale_search=False), moment).sum() <= sums[0] + 1e-9


def test_a_singular_moment_needs_its_damping() -> None:
    """The transcription without it fails or explodes; with it, and in the function, it does not."""
    rows = inputs(3, 1, 10, count=4)
    weight, moment = weights(3, 5, 10), moment_of(rows)
    like = quantize_whole(weight, spec("int3"))
    with np.errstate(all="ignore"):
        try:
            wrong = table(weight, like, moment, "activation", "no damping")
        except np.linalg.LinAlgError:
            wrong = np.full(weight.shape, np.inf)
    right = table(weight, like, moment, "activation")
    assert not np.allclose(wrong, right)
    for damping in (1e-30, 1e-12, 0.01, 10.0):
        found = gptq(weight, like, moment, damping=damping)
        assert bool((errors(weight, found, moment) <= errors(weight, like, moment)).all())


cases = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(SPECS),
    st.sampled_from([(1, 6, 5), (1, 4, 17), (2, 6, 4), (4, 4, 3), (1, 1, 1), (3, 3, 9)]),
    st.sampled_from([1, 3, 300]),
)


@settings(max_examples=120)
@given(cases, st.booleans(), st.sampled_from(["activation", "stored"]), st.sampled_from([1e-6, 0.01, 1.0]))
def test_never_worse_than_nearest(case: tuple[Any, ...], search: bool, order: Any, damping: float) -> None:
    seed, text, (groups, channels, columns), count = case
    weight, moment = weights(seed, channels, columns), moment_of(inputs(seed, groups, columns, count))
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, moment, damping=damping, order=order, scale_search=search)
    before, after = errors(weight, like, moment), errors(weight, found, moment)
    if text in SINGLE_SCALE and search:
        before, after = before.sum(), after.sum()
    assert bool((after <= before * (1 + 1e-9)).all())
    assert found.spec == like.spec
    assert found.scale.dtype == torch.float32
    allowed = set(like.levels()[1].tolist())
    assert set(found.codes.reshape(-1).tolist()) <= allowed
    if not search:
        assert torch.equal(found.scale, like.scale)


@pytest.mark.parametrize("text", SPECS)
def test_the_search_for_scales_only_helps(text: str) -> None:
    weight, moment = weights(5, 8, 20), moment_of(inputs(5, 1, 20))
    like = quantize_whole(weight, spec(text))
    sums = [float(errors(weight, gptq(weight, like, moment, scale_search=s), moment).sum()) for s in (False, True)]
    assert sums[1] <= sums[0] * (1 + 1e-9)
    if text in ("int2", "int3", "log3", "ternary"):
        assert sums[1] < 0.9 * sums[0] < 0.6 * float(errors(weight, like, moment).sum())


@pytest.mark.parametrize("text", [s for s in SPECS if s != "log3:max"])
def test_a_diagonal_moment_leaves_rounding_to_nearest(text: str) -> None:
    """Of codes that round to the nearest level, which log codes under a max-abs scale do not."""
    weight = weights(7, 6, 11)
    like = quantize_whole(weight, spec(text))
    moment = torch.diag(torch.arange(1.0, 12.0, dtype=torch.float64))[None]
    assert torch.equal(gptq(weight, like, moment, scale_search=False).codes, like.codes)


def test_log_codes_under_a_max_scale_come_closer() -> None:
    weight = weights(7, 6, 50)
    like = quantize_whole(weight, spec("log3:max"))
    moment = torch.eye(50, dtype=torch.float64)[None]
    assert (
        errors(weight, gptq(weight, like, moment, scale_search=False), moment).sum()
        < errors(weight, like, moment).sum()
    )


@settings(max_examples=40)
@given(cases)
def test_what_the_levels_represent_comes_back(case: tuple[Any, ...]) -> None:
    """Also from a start that is wrong everywhere, under the right scale."""
    seed, text, (groups, channels, columns), _ = case
    exact = quantize_whole(weights(seed, channels, columns), spec(text))
    weight, moment = exact.dequantize(), moment_of(inputs(seed, groups, columns))
    again = gptq(weight, exact, moment)
    assert torch.equal(again.codes, exact.codes)
    assert torch.equal(again.scale, exact.scale)
    spoiled = replace(exact, codes=exact.codes.flip(-1))
    torch.testing.assert_close(gptq(weight, spoiled, moment, scale_search=False).dequantize(), weight)


@pytest.mark.parametrize("text", SPECS)
def test_channels_of_zeros_stay_as_they_are(text: str) -> None:
    weight = weights(1, 4, 9)
    weight[2] = 0
    if "tensor" in text:
        weight[:] = 0
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, moment_of(inputs(1, 1, 9)))
    assert not like.dequantize()[2].any()
    assert torch.equal(found.codes[2], like.codes[2])
    assert not found.dequantize()[2].any()


@pytest.mark.parametrize("order", ["activation", "stored"])
def test_inputs_that_are_always_zero_round_to_nearest(order: Any) -> None:
    rows = inputs(2, 1, 12)
    rows[:, :, [0, 5, 6, 11]] = 0
    weight, moment = weights(2, 40, 12), moment_of(rows)
    like = quantize_whole(weight, spec("int3"))
    found = gptq(weight, like, moment, order=order, scale_search=False)
    assert torch.equal(found.codes[:, [0, 5, 6, 11]], like.codes[:, [0, 5, 6, 11]])
    assert not torch.equal(found.codes, like.codes)
    kept = [1, 2, 3, 4, 7, 8, 9, 10]
    part = replace(like, codes=like.codes[:, kept])
    alone = gptq(weight[:, kept], part, moment[:, kept][:, :, kept], order=order, scale_search=False)
    assert torch.equal(found.codes[:, kept], alone.codes), "they take no part in damping or order"


def test_no_inputs_at_all_change_nothing() -> None:
    weight = weights(2, 7, 12)
    like = quantize_whole(weight, spec("int3"))
    found = gptq(weight, like, torch.zeros(1, 12, 12, dtype=torch.float64))
    assert torch.equal(found.codes, like.codes)
    assert torch.equal(found.scale, like.scale)


@pytest.mark.parametrize(("block", "elements"), [(1, 1), (7, 40), (64, 1 << 22), (150, 300), (1000, 100_000)])
def test_blocks_and_parts_do_not_matter(block: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = weights(4, 10, 150), moment_of(inputs(4, 1, 150, 1000))
    like = quantize_whole(weight, spec("int4"))
    expected = gptq(weight, like, moment)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "ELEMENTS", elements)
    found = gptq(weight, like, moment)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.scale, expected.scale)


def test_groups_are_independent() -> None:
    weight, moment = weights(6, 6, 2, 3, 3), moment_of(inputs(6, 3, 18))
    like = quantize_whole(weight, spec("int3"))
    found = gptq(weight, like, moment)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        alone = gptq(
            weight[part], replace(like, codes=like.codes[part], scale=like.scale[part]), moment[group : group + 1]
        )
        assert torch.equal(found.codes[part], alone.codes)
        torch.testing.assert_close(found.scale[part], alone.scale)


@pytest.mark.parametrize("text", ["int3", "log4", "int3:tensor"])
def test_a_weight_stored_the_other_way_round(text: str) -> None:
    weight, moment = weights(8, 5, 14), moment_of(inputs(8, 1, 14))
    expected = gptq(weight, quantize_whole(weight, spec(text)), moment)
    found = gptq(weight.T, quantize_whole(weight.T, spec(text), 1), moment)
    assert found.codes.shape == (14, 5)
    assert torch.equal(found.codes.T, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize(("shape", "axis", "groups"), [((6, 2, 3, 3), 0, 2), ((5, 7), 1, 1), ((4, 3, 5), 2, 1)])
def test_rows_and_back(shape: tuple[int, ...], axis: int, groups: int) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    rows = as_rows(tensor, axis, groups)
    assert rows.shape == (groups, shape[axis] // groups, math.prod(shape) // shape[axis])
    assert torch.equal(rows.reshape(shape[axis], -1)[1], tensor.select(axis, 1).reshape(-1))
    assert torch.equal(as_stored(rows, tensor.shape, axis), tensor)


@pytest.mark.parametrize("exponent", [-30, -12, 12, 30])
def test_the_unit_of_inputs_and_weights_does_not_matter(exponent: int) -> None:
    weight, moment = weights(9, 6, 10), moment_of(inputs(9, 1, 10))
    like = quantize_whole(weight, spec("int3"))
    expected = gptq(weight, like, moment)
    assert torch.equal(gptq(weight, like, moment * 2.0**exponent).codes, expected.codes)
    other = weight * 2.0**exponent
    found = gptq(other, quantize_whole(other, spec("int3")), moment)
    torch.testing.assert_close(found.dequantize(), expected.dequantize() * 2.0**exponent)


def test_the_largest_weights_stay_finite() -> None:
    weight = weights(9, 6, 10) * 1e38
    like = quantize_whole(weight.clamp(-3.4e38, 3.4e38), spec("int3:max"))
    found = gptq(weight.clamp(-3.4e38, 3.4e38), like, moment_of(inputs(9, 1, 10)))
    assert bool(found.dequantize().isfinite().all())


def test_the_same_call_gives_the_same_codes() -> None:
    weight, moment = weights(9, 6, 10), moment_of(inputs(9, 1, 10))
    like = quantize_whole(weight, spec("int2"))
    one, two = gptq(weight, like, moment), gptq(weight, like, moment)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)


GOOD = torch.eye(9, dtype=torch.float64)[None]


@pytest.mark.parametrize(
    ("shape", "moment", "damping", "words"),
    [
        ((5, 9), GOOD, 0.01, "another weight"),
        ((4, 9), GOOD[:, :8, :8], 0.01, "does not fit the weight"),
        ((4, 9), GOOD[0], 0.01, "does not fit the weight"),
        ((4, 9), GOOD.expand(3, 9, 9), 0.01, "does not fit the weight"),
        ((4, 9), GOOD[:0], 0.01, "does not fit the weight"),
        ((4, 9), GOOD * math.nan, 0.01, "not finite"),
        ((4, 9), GOOD, 0.0, "damping must be positive"),
        ((4, 9), GOOD, -1.0, "damping must be positive"),
        ((4, 9), GOOD, math.nan, "damping must be positive"),
    ],
)
def test_what_does_not_fit_is_an_error(
    shape: tuple[int, ...], moment: torch.Tensor, damping: float, words: str
) -> None:
    like = quantize_whole(weights(0, 4, 9), spec("int4"))
    with pytest.raises(UsageError, match=words) as caught:
        gptq(weights(0, *shape), like, moment, damping=damping)
    assert "\n" not in str(caught.value)
