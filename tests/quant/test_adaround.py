"""AdaRound's numerics: the rectified sigmoid, the penalty, and soft weights between two levels of any format."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant import QuantizedWeight, quantize_weight
from qopt.quant.adaround import (
    FIRST_BETA,
    LAST_BETA,
    SoftRounding,
    beta_at,
    inverse_rectified_sigmoid,
    mixed,
    penalty,
    rectified_sigmoid,
)  # fmt: skip
from qopt.quant.gptq import gptq
from qopt.spec import WeightSpec

SPECS = [
    "int1", "int2", "int3", "int4", "int8", "int3:tensor", "log2", "log3", "log4", "log8", "ternary", "int2:mid",
    "int3:mid", "int3:full",
]  # fmt: skip


def weight_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(weight: Tensor, text: str, axis: int = 0) -> QuantizedWeight:
    """``weight`` rounded to nearest."""
    codes = quantize_weight(weight, WeightSpec.parse(text), axis)
    assert isinstance(codes, QuantizedWeight)
    return codes


class TestRectifiedSigmoid:
    """h(V), equation 23."""

    def test_against_numpy(self) -> None:
        v = torch.linspace(-8, 8, 101)
        expected = np.clip(1.2 / (1 + np.exp(-v.numpy().astype(np.float64))) - 0.1, 0, 1)
        np.testing.assert_allclose(rectified_sigmoid(v), expected, atol=1e-6)

    def test_it_reaches_both_ends(self) -> None:
        assert rectified_sigmoid(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]

    @given(part=st.floats(0, 1))
    def test_its_inverse(self, part: float) -> None:
        v = inverse_rectified_sigmoid(torch.tensor(part, dtype=torch.float64))
        assert abs(float(v)) < 2.4
        assert float(rectified_sigmoid(v)) == pytest.approx(part, abs=1e-12)


class TestPenalty:
    """Equation 24 and its schedule."""

    @pytest.mark.parametrize(
        ("parts", "beta", "expected"),
        [([0.0, 1.0], 2, 0), ([0.5], 2, 1), ([0.5, 0.5], 20, 2), ([0.25], 2, 0.75), ([0.9], 20, 1 - 0.8**20)],
    )
    def test_values(self, parts: list[float], beta: float, expected: float) -> None:
        assert float(penalty(torch.tensor(parts, dtype=torch.float64), beta)) == pytest.approx(expected)

    def test_it_pushes_away_from_the_middle(self) -> None:
        part = torch.tensor([0.3, 0.7], requires_grad=True)
        penalty(part, 2.0).backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        assert part.grad[0] > 0 > part.grad[1], "descent lowers the first and raises the second"

    def test_the_schedule(self) -> None:
        betas = [beta_at(step, 10, 0.2) for step in range(10)]
        assert betas[:2] == [None, None]
        assert betas[2] == FIRST_BETA
        assert betas[9] == LAST_BETA
        assert np.allclose(np.diff([b for b in betas if b is not None]), (LAST_BETA - FIRST_BETA) / 7)

    @given(steps=st.integers(1, 50), warm_up=st.floats(0, 1, exclude_max=True))
    def test_it_falls_within_its_ends(self, steps: int, warm_up: float) -> None:
        betas = [b for step in range(steps) if (b := beta_at(step, steps, warm_up)) is not None]
        assert betas == sorted(betas, reverse=True)
        assert all(LAST_BETA <= b <= FIRST_BETA for b in betas)

    @pytest.mark.parametrize(("step", "steps", "warm_up"), [(0, 0, 0.2), (-1, 3, 0.2), (3, 3, 0.2), (0, 3, 1.0)])
    def test_out_of_range(self, step: int, steps: int, warm_up: float) -> None:
        with pytest.raises(UsageError, match="no such step of a training"):
            beta_at(step, steps, warm_up)


def brute_force(weight: Tensor, like: QuantizedWeight) -> Tensor:
    """What the soft weight starts as, by looking at every level of every weight."""
    levels = like.levels()[0].tolist()
    scales = like.scale.double().reshape(-1)
    current = like.dequantize().double()
    expected = torch.empty(weight.shape, dtype=torch.float64)
    for index in np.ndindex(*weight.shape):
        scale = float(scales[index[like.axis] if len(scales) > 1 else 0])
        reach = sorted(level * scale for level in levels)
        own = min(range(len(reach)), key=lambda i: abs(reach[i] - float(current[index])))
        target = float(weight[index])
        above, below = min(own + 1, len(reach) - 1), max(own - 1, 0)
        low, high = (own, above) if target >= reach[own] else (below, own)
        expected[index] = min(max(target, reach[low]), reach[high])
    return expected


class TestSoftWeights:
    """Where they start, how far they reach, and what they round to."""

    @pytest.mark.parametrize("text", SPECS)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_nearest_codes_start_at_the_target(self, text: str, axis: int) -> None:
        weight = weight_of(3, 4, 5, 3)
        like = codes_of(weight, text, axis)
        soft = SoftRounding(weight, like)
        found = soft.weight(soft.part).detach().double()
        torch.testing.assert_close(found, brute_force(weight, like), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("text", SPECS)
    def test_rounding_the_start_of_nearest_codes_gives_them_back(self, text: str) -> None:
        weight = weight_of(4, 6, 10)
        like = codes_of(weight, text, 0)
        rounded = SoftRounding(weight, like).rounded()
        torch.testing.assert_close(rounded.dequantize(), _nearest(weight, like), rtol=1e-5, atol=1e-6)
        assert torch.equal(rounded.scale, like.scale)
        assert rounded.spec == like.spec

    @pytest.mark.parametrize("text", ["int2", "int3", "log3", "ternary"])
    def test_codes_from_elsewhere_keep_their_level_in_reach(self, text: str) -> None:
        """GPTQ's codes are up to several levels from the weight: the start is at most one level from them."""
        weight = weight_of(5, 6, 20)
        inputs = weight_of(6, 60, 20).double() @ weight_of(7, 20, 20).double()
        like = gptq(weight, codes_of(weight, text, 0), (inputs.mT @ inputs / 60)[None])
        soft = SoftRounding(weight, like)
        found = soft.weight(soft.part).detach().double()
        torch.testing.assert_close(found, brute_force(weight, like), rtol=1e-5, atol=1e-6)
        assert not torch.equal(like.codes, codes_of(weight, text, 0).codes)
        with torch.no_grad():
            reach = [soft.weight(torch.full_like(soft.v, end)) for end in (0.0, 1.0)]
        given = like.dequantize()
        nearest_end = torch.minimum((given - reach[0]).abs(), (given - reach[1]).abs())
        assert float(nearest_end.max()) < 1e-6

    @settings(max_examples=40)
    @given(text=st.sampled_from(["int1", "int2", "int3", "log3", "ternary", "int8"]), seed=st.integers(0, 999))
    def test_the_ends_are_levels(self, text: str, seed: int) -> None:
        """Whatever V becomes, what comes out is what the file can hold, and equals the soft weight at the ends."""
        weight = weight_of(seed, 3, 7)
        like = codes_of(weight, text, 0)
        soft = SoftRounding(weight, like)
        with torch.no_grad():
            soft.v.copy_(weight_of(seed + 1, 3, 7).sign() * 5)
            rounded = soft.rounded()
            torch.testing.assert_close(rounded.dequantize(), soft.weight(soft.part), rtol=1e-5, atol=1e-7)
        codes = like.levels()[1].tolist()
        assert set(rounded.codes.reshape(-1).tolist()) <= set(codes)

    def test_negative_scales(self) -> None:
        """The full range may turn its longer side to the positive weights."""
        weight = torch.tensor([[-1.0, 0.2, 2.0, 1.2], [1.0, -0.2, -2.0, -1.2]])
        like = codes_of(weight, "int2", 0)
        turned = replace(like, scale=-like.scale.abs()) if like.grid == "full" else like
        soft = SoftRounding(weight, turned)
        found = soft.weight(soft.part).detach().double()
        torch.testing.assert_close(found, brute_force(weight, turned), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("text", ["int3", "log3", "ternary", "int1"])
    def test_dead_channels_stay(self, text: str) -> None:
        weight = weight_of(8, 3, 6)
        weight[1] = 0
        like = codes_of(weight, text, 0)
        soft = SoftRounding(weight, like)
        with torch.no_grad():
            soft.v.fill_(9.0)
        rounded = soft.rounded()
        assert bool(torch.isfinite(soft.weight(soft.part)).all())
        if float(like.scale[1]) == 0:
            assert torch.equal(rounded.codes[1], like.codes[1])

    def test_another_shape(self) -> None:
        like = codes_of(weight_of(0, 3, 4), "int3", 0)
        with pytest.raises(UsageError, match="codes of another weight"):
            SoftRounding(weight_of(0, 4, 3), like)


def _nearest(weight: Tensor, like: QuantizedWeight) -> Tensor:
    """The nearest level of every weight (rows, columns)."""
    reach = like.levels()[0].float() * like.scale.expand(len(weight))[:, None]
    return torch.stack([r[(w[:, None] - r).abs().argmin(-1)] for w, r in zip(weight, reach, strict=True)])


class TestMixed:
    """The better codes of two, channel by channel."""

    @pytest.mark.parametrize("axis", [0, 1])
    def test_by_channel(self, axis: int) -> None:
        weight = weight_of(9, 3, 3, 2)
        given = codes_of(weight, "int3", axis)
        other = replace(given, codes=-given.codes)
        found = mixed(given, other, torch.tensor([True, False, True])).codes.movedim(axis, 0)
        assert torch.equal(found[[0, 2]], other.codes.movedim(axis, 0)[[0, 2]])
        assert torch.equal(found[1], given.codes.movedim(axis, 0)[1])

    @pytest.mark.parametrize("better", [True, False])
    def test_all_at_once(self, better: bool) -> None:
        given = codes_of(weight_of(9, 3, 4), "ternary", 0)
        other = replace(given, codes=-given.codes)
        assert torch.equal(mixed(given, other, torch.tensor([better])).codes, (other if better else given).codes)


@pytest.mark.parametrize("text", ["int2", "int3", "log3", "ternary"])
def test_training_beats_nearest_and_comes_near_the_best(text: str) -> None:
    """Full-batch training on correlated inputs, against all roundings of two short rows."""
    weight = weight_of(1, 2, 8)
    inputs = weight_of(2, 200, 8) @ weight_of(3, 8, 8) / math.sqrt(8)
    like = codes_of(weight, text, 0)

    def errors(values: Tensor) -> Tensor:
        return (inputs @ (values - weight).T).square().mean(0)

    soft, before, steps = SoftRounding(weight, like), errors(like.dequantize()).sum(), 300
    with torch.no_grad():
        low, high = (soft.weight(torch.full_like(weight, end)) for end in (0.0, 1.0))
    choices = torch.tensor(list(product((False, True), repeat=8)))[:, None]
    every = torch.where(choices, high, low)  # 256 roundings of both rows
    best = torch.stack([errors(candidate) for candidate in every]).amin(0).sum()
    optimizer = torch.optim.Adam([soft.v], lr=0.1)
    for step in range(steps):
        part, beta = soft.part, beta_at(step, steps, 0.2)
        loss = errors(soft.weight(part)).sum() / before * part.numel()
        if beta is not None:
            loss = loss + 100 * penalty(part, beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    part = soft.part.detach()
    assert float(torch.minimum(part, 1 - part).max()) < 0.1, "every weight has decided"
    after = errors(soft.rounded().dequantize()).sum()
    assert best * (1 - 1e-4) <= after < 1.5 * best
    assert after <= before * (1 + 1e-4)
