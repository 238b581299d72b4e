"""GPTQ and AdaRound where a row has a scale, and perhaps a zero point, for each of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.quant import QuantizedWeight, quantize_whole
from qopt.quant import gptq as module
from qopt.quant.adaround import SoftRounding, mixed
from qopt.quant.gptq import as_rows, gptq
from qopt.spec import WeightSpec

Array = NDArray[np.float64]
SPECS = [
    "int1:block8", "int2:block8", "int4:block8", "int4:block16:max", "int3:block8:mid", "int3:block8:full",
    "ternary:block8", "log3:block8", "log5:block8", "int2:block8:asym", "int4:block16:asym", "int3:block8:max:asym",
    "int8:block8:asym", "int3:asym", "int4:max:asym", "int3:tensor:asym",
]  # fmt: skip


def spec(text: str) -> WeightSpec:
    return WeightSpec.parse(text)


def moment_of(seed: int, groups: int, columns: int, count: int = 200) -> torch.Tensor:
    """That of inputs that are correlated and not centred, float64 (groups, columns, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(groups, count, columns, generator=generator, dtype=torch.float64)
    rows = (noise @ mix / columns**0.5 + 0.5 * noise[:, :, :1] + 0.3).relu()
    moment: torch.Tensor = rows.mT @ rows / count
    return moment


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def errors(weight: torch.Tensor, rounded: QuantizedWeight, moment: torch.Tensor) -> torch.Tensor:
    """``dW H dW^T`` of every output channel."""
    difference = as_rows(weight.double() - rounded.dequantize().double(), rounded.axis, len(moment))
    return torch.einsum("gri,gij,grj->gr", difference, moment, difference).reshape(-1)


def by_weight(like: QuantizedWeight) -> tuple[Array, Array]:
    """The scale and the zero point of each weight."""
    zero = torch.zeros_like(like.scale) if like.zero is None else like.zero
    scale, zeros = (like.spread(values.double()).expand(like.shape) for values in (like.scale, zero))
    return scale.numpy(), zeros.numpy()


def transcribed(
    weight: torch.Tensor, like: QuantizedWeight, moment: Array, activation: bool, mistake: str = ""
) -> Array:
    """Every row by the optimal brain surgeon, an explicit inverse of what is left at every step."""
    columns = weight.shape[1]
    steps = np.argsort(-np.diag(moment), kind="stable") if activation else np.arange(columns)
    matrix = (moment + 0.01 * np.diag(moment).mean() * np.eye(columns))[np.ix_(steps, steps)]
    scales, zeros = by_weight(like)
    levels, found = like.levels()[0].numpy(), np.zeros(weight.shape)
    for row in range(len(weight)):
        left = weight[row].double().numpy()[steps].copy()
        for j, column in enumerate(steps):
            taken = j if mistake == "scales in the order of the steps" else column
            scale, zero = scales[row, taken], zeros[row, taken]
            value = (levels[np.abs(left[j] / scale + zero - levels).argmin()] - zero) * scale
            inverse = np.linalg.inv(matrix[j:, j:])
            left[j:] -= (left[j] - value) / inverse[0, 0] * inverse[0]
            found[row, column] = value
    return found


TRANSCRIBED = ["int2:block8", "int3:block16", "ternary:block8", "int3:block8:mid", "int3:block8:asym", "int2:asym"]


@pytest.mark.parametrize("order", ["activation", "stored"])
@pytest.mark.parametrize("text", TRANSCRIBED)
def test_it_is_the_transcription_wherever_that_beats_nearest(text: str, order: Any) -> None:
    weight, moment = weights(0, 20, 16), moment_of(0, 1, 16)
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, moment, order=order, scale_search=False)
    expected = torch.from_numpy(transcribed(weight, like, moment[0].numpy(), order == "activation"))
    slow = torch.einsum("ri,ij,rj->r", weight - expected, moment[0], weight - expected)
    wins = slow < errors(weight, like, moment)
    assert wins.sum() >= 5, "often better, or there is nothing to compare"
    chosen = torch.where(wins[:, None], expected, like.dequantize().double())
    torch.testing.assert_close(found.dequantize().double(), chosen, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.scale, like.scale)


def test_scales_that_do_not_follow_their_columns_are_seen() -> None:
    """A planted mistake: the order of the columns without that of their blocks."""
    weight, moment = weights(0, 10, 16) * torch.linspace(0.1, 4, 16), moment_of(0, 1, 16)
    like = quantize_whole(weight, spec("int3:block8"))
    values = [torch.from_numpy(transcribed(weight, like, moment[0].numpy(), True, m)) for m in
              ("", "scales in the order of the steps")]  # fmt: skip
    right, wrong = (float(torch.einsum("ri,ij,rj->", weight - v, moment[0], weight - v)) for v in values)
    assert float(errors(weight, gptq(weight, like, moment, scale_search=False), moment).sum()) <= right + 1e-9
    assert right < 0.7 * wrong


cases = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(SPECS),
    st.sampled_from([(1, 6, 16), (1, 4, 48), (2, 6, 16), (4, 4, 32), (1, 1, 16)]),
    st.sampled_from([1, 3, 300]),
)


@settings(max_examples=120)
@given(cases, st.booleans(), st.sampled_from(["activation", "stored"]), st.sampled_from([1e-6, 0.01, 1.0]))
def test_never_worse_than_nearest(case: tuple[Any, ...], search: bool, order: Any, damping: float) -> None:
    seed, text, (groups, channels, columns), count = case
    weight, moment = weights(seed, channels, columns), moment_of(seed, groups, columns, count)
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, moment, damping=damping, order=order, scale_search=search)
    before, after = errors(weight, like, moment), errors(weight, found, moment)
    if "tensor" in text and search:
        before, after = before.sum(), after.sum()
    assert bool((after <= before * (1 + 1e-9)).all())
    assert found.spec == like.spec
    assert found.scale.dtype == torch.float32
    assert (found.zero is None) if like.zero is None else torch.equal(found.zero, like.zero)  # type: ignore[arg-type]
    assert set(found.codes.reshape(-1).tolist()) <= set(like.levels()[1].tolist())
    if not search:
        assert torch.equal(found.scale, like.scale)


@pytest.mark.parametrize("text", SPECS)
def test_the_search_for_scales_only_helps(text: str) -> None:
    weight, moment = weights(5, 8, 48), moment_of(5, 1, 48)
    like = quantize_whole(weight, spec(text))
    found = {search: gptq(weight, like, moment, scale_search=search) for search in (False, True)}
    plain, searched = (float(errors(weight, found[search], moment).sum()) for search in (False, True))
    assert searched <= plain * (1 + 1e-9)
    if text in ("int2:block8", "ternary:block8", "int2:block8:asym", "int3:asym"):
        assert searched < 0.95 * plain < 0.6 * float(errors(weight, like, moment).sum())
        factors = found[True].scale / like.scale
        one = factors.reshape(8, -1)[:, :1].expand(8, factors.numel() // 8)
        torch.testing.assert_close(factors.reshape(8, -1), one, rtol=1e-5, atol=0, msg="one factor a row")


@settings(max_examples=40)
@given(cases)
def test_what_the_levels_represent_comes_back(case: tuple[Any, ...]) -> None:
    seed, text, (groups, channels, columns), _ = case
    exact = quantize_whole(weights(seed, channels, columns), spec(text))
    weight, moment = exact.dequantize(), moment_of(seed, groups, columns)
    again = gptq(weight, exact, moment)
    assert torch.equal(again.codes, exact.codes)
    assert torch.equal(again.scale, exact.scale)
    spoiled = replace(exact, codes=exact.codes.flip(-1))
    torch.testing.assert_close(gptq(weight, spoiled, moment, scale_search=False).dequantize(), weight)


@pytest.mark.parametrize("text", ["int3", "log3", "ternary", "int3:mid"])
def test_blocks_of_equal_scales_are_a_channel(text: str) -> None:
    weight, moment = weights(2, 6, 24), moment_of(2, 1, 24)
    channel = quantize_whole(weight, spec(text))
    word, *options = text.split(":")
    blocks = replace(
        channel, spec=spec(":".join([word, "block8", *options])), scale=channel.scale[:, None].repeat(1, 3)
    )  # fmt: skip
    assert torch.equal(gptq(weight, blocks, moment, scale_search=False).codes,
                       gptq(weight, channel, moment, scale_search=False).codes)  # fmt: skip
    searched = [errors(weight, gptq(weight, like, moment), moment) for like in (blocks, channel)]
    torch.testing.assert_close(searched[0], searched[1], rtol=1e-4, atol=0)


def test_a_zero_point_in_the_middle_is_twos_complement() -> None:
    weight, moment = weights(3, 6, 24), moment_of(3, 1, 24)
    full = quantize_whole(weight, spec("int3:full"))
    full = replace(full, codes=(full.codes.clamp(-3, 3)), scale=full.scale.abs())
    asym = replace(
        full,
        spec=spec("int3:asym"),
        codes=(full.codes + 4).to(torch.uint8),
        zero=torch.full((6,), 4, dtype=torch.uint8),
    )
    assert torch.equal(asym.dequantize(), full.dequantize())
    for search in (False, True):
        found = [gptq(weight, like, moment, scale_search=search).dequantize() for like in (asym, full)]
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("block", "elements"), [(1, 1), (7, 40), (64, 300)])
@pytest.mark.parametrize("text", ["int3:block16", "int3:block8:asym"])
def test_lazy_batches_and_parts_do_not_matter(
    text: str, block: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = weights(4, 10, 144), moment_of(4, 2, 144, 600)
    like = quantize_whole(weight, spec(text))
    expected = gptq(weight, like, moment)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "ELEMENTS", elements)
    found = gptq(weight, like, moment)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.scale, expected.scale)


@pytest.mark.parametrize("text", ["int3:block8", "int4:block16:asym", "log5:block8"])
def test_a_weight_stored_the_other_way_round(text: str) -> None:
    weight, moment = weights(8, 5, 32), moment_of(8, 1, 32)
    expected = gptq(weight, quantize_whole(weight, spec(text)), moment)
    found = gptq(weight.T, quantize_whole(weight.T, spec(text), 1), moment)
    assert found.codes.shape == (32, 5)
    assert torch.equal(found.codes.T, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("text", SPECS)
def test_blocks_of_zeros_stay_as_they_are(text: str) -> None:
    weight = weights(1, 4, 32)
    weight[2], weight[3, 16:] = 0, 0
    like = quantize_whole(weight, spec(text))
    found = gptq(weight, like, torch.eye(32, dtype=torch.float64)[None])
    assert not found.dequantize()[2].any()
    if "block" in text:
        assert not found.dequantize()[3, 16:].any()


def brute_force(weight: torch.Tensor, like: QuantizedWeight) -> torch.Tensor:
    """What the soft weight starts as, by looking at every level of every weight."""
    scales, zeros = by_weight(like)
    levels, current = like.levels()[0].numpy(), like.dequantize().double().numpy()
    expected = np.empty(weight.shape)
    for index in np.ndindex(*weight.shape):
        reach = np.sort((levels - zeros[index]) * scales[index])
        own = int(np.abs(reach - current[index]).argmin())
        up = float(weight[index]) >= reach[own]
        low, high = (own, min(own + 1, len(reach) - 1)) if up else (max(own - 1, 0), own)
        expected[index] = min(max(float(weight[index]), reach[low]), reach[high])
    return torch.from_numpy(expected)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("axis", [0, 1])
def test_soft_weights_start_at_the_target(text: str, axis: int) -> None:
    weight = weights(3, 16, 16, 1)
    like = quantize_whole(weight, spec(text), axis)
    soft = SoftRounding(weight, like)
    found = soft.weight(soft.part).detach().double()
    torch.testing.assert_close(found, brute_force(weight, like), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [text for text in SPECS if "log" not in text])
def test_soft_weights_round_to_what_they_start_from(text: str) -> None:
    weight = weights(4, 6, 16)
    like = quantize_whole(weight, spec(text))
    rounded = SoftRounding(weight, like).rounded()
    assert torch.equal(rounded.codes, like.codes)
    assert torch.equal(rounded.scale, like.scale)


@pytest.mark.parametrize("text", ["int3:block8", "int3:block8:asym"])
def test_channels_of_two_roundings(text: str) -> None:
    weight = weights(4, 3, 16)
    given = quantize_whole(weight, spec(text))
    other = replace(given, codes=given.codes.flip(1))
    found = mixed(given, other, torch.tensor([True, False, True]))
    assert torch.equal(found.codes[1], given.codes[1])
    assert torch.equal(found.codes[[0, 2]], other.codes[[0, 2]])
    assert torch.equal(found.scale, given.scale)
