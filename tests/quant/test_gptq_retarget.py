"""The retargeted weight solves its least-squares problem."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant import quantize_whole
from qopt.quant.gptq import gptq
from qopt.quant.retarget import retargeted
from qopt.spec import WeightSpec


@dataclass(frozen=True)
class Pairs:
    """Inputs v of the float network and u of the quantized one, float64 (groups, count, columns)."""

    v: Tensor
    u: Tensor

    @staticmethod
    def of(seed: int, groups: int, columns: int, count: int = 400) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(groups, count, columns, generator=generator, dtype=torch.float64).relu()
        wrong = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64) * 0.2
        return Pairs(v, (v + v @ wrong / columns**0.5 + 0.05).relu())

    @property
    def moment(self) -> Tensor:
        return self.u.mT @ self.u / self.u.shape[1]

    @property
    def cross(self) -> Tensor:
        return self.v.mT @ self.u / self.u.shape[1]

    def loss(self, weight: Tensor, other: Tensor) -> float:
        """``E ||W v - W' u||^2`` for rows (groups, rows, columns)."""
        return float(((self.v @ weight.mT - self.u @ other.mT) ** 2).mean(1).sum())


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.sampled_from([0.01, 0.1, 1.0]))
def test_no_step_lowers_the_objective(seed: int, groups: int, ridge: float) -> None:
    pairs, weight = Pairs.of(seed, groups, 6), weights(seed, groups * 2, 6)
    rows = weight.double().reshape(groups, 2, 6)
    held = ridge * pairs.moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def objective(other: Tensor) -> float:
        return pairs.loss(rows, other) + float((held * (rows - other) ** 2).sum())

    found = retargeted(weight, 0, pairs.moment, pairs.cross, ridge=ridge).reshape(groups, 2, 6)
    assert objective(found) < objective(rows)
    for step in range(5):
        other = found + 0.01 * weights(seed + step, groups, 2, 6).double()
        assert objective(found) <= objective(other)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_what_rounding_adds_is_the_quadratic_form(seed: int) -> None:
    """``E ||W v - M u||^2`` of any M exceeds that of the least-squares weight by ``tr (M - W') H (M - W')^T``."""
    pairs, weight = Pairs.of(seed, 1, 5), weights(seed, 3, 5)
    best = retargeted(weight, 0, pairs.moment, pairs.cross, ridge=1e-9)
    other = best + weights(seed + 1, 3, 5).double()
    added = torch.einsum("ri,ij,rj->", other - best, pairs.moment[0], other - best)
    rows = weight.double()[None]
    assert pairs.loss(rows, other[None]) - pairs.loss(rows, best[None]) == pytest.approx(float(added), rel=1e-5)


def test_rounding_it_comes_closer_to_the_float_network_than_rounding_the_weight() -> None:
    pairs, weight = Pairs.of(0, 1, 12), weights(0, 8, 12)
    like = quantize_whole(weight, WeightSpec.parse("int3"))
    target = retargeted(weight, 0, pairs.moment, pairs.cross)
    own, crossed = (gptq(w, like, pairs.moment).dequantize().double()[None] for w in (weight, target))
    rows = weight.double()[None]
    assert pairs.loss(rows, crossed) < 0.8 * pairs.loss(rows, own)


@pytest.mark.parametrize(("shape", "axis", "groups"), [((4, 3, 2, 2), 0, 2), ((12, 4), 1, 1), ((4, 12), 0, 1)])
def test_equal_inputs_change_nothing(shape: tuple[int, ...], axis: int, groups: int) -> None:
    pairs, weight = Pairs.of(1, groups, 12), weights(1, *shape)
    found = retargeted(weight, axis, pairs.moment, pairs.moment)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, weight.double(), rtol=1e-8, atol=1e-9)


def test_a_strong_ridge_holds_the_weight() -> None:
    pairs, weight = Pairs.of(2, 1, 6), weights(2, 3, 6)
    torch.testing.assert_close(
        retargeted(weight, 0, pairs.moment, pairs.cross, ridge=1e9), weight.double(), rtol=1e-6, atol=1e-6
    )


def test_the_stored_orientation_does_not_matter() -> None:
    pairs, weight = Pairs.of(3, 1, 7), weights(3, 4, 7)
    torch.testing.assert_close(
        retargeted(weight.T, 1, pairs.moment, pairs.cross).T, retargeted(weight, 0, pairs.moment, pairs.cross)
    )


def test_groups_are_independent() -> None:
    pairs, weight = Pairs.of(4, 2, 6), weights(4, 4, 6)
    found = retargeted(weight, 0, pairs.moment, pairs.cross)
    for g in range(2):
        part = retargeted(weight[2 * g : 2 * g + 2], 0, pairs.moment[g : g + 1], pairs.cross[g : g + 1])
        torch.testing.assert_close(found[2 * g : 2 * g + 2], part)


def test_inputs_that_are_always_zero_keep_the_weight() -> None:
    weight, nothing = weights(5, 3, 4), torch.zeros(1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(retargeted(weight, 0, nothing, nothing), weight.double())


@pytest.mark.parametrize(("ridge", "columns"), [(0.0, 4), (-1.0, 4), (0.1, 5)])
def test_what_has_no_solution_is_an_error(ridge: float, columns: int) -> None:
    moments = torch.eye(4, dtype=torch.float64)[None], torch.eye(columns, dtype=torch.float64)[None]
    with pytest.raises(UsageError, match="no least-squares weight"):
        retargeted(weights(0, 2, 4), 0, *moments, ridge=ridge)
