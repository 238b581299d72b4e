"""Both ends of the spectral norm against numpy's SVD in float64, and shortcuts that are no bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz import spectral_norm, spectral_norms

KINDS = ["gauss", "rank1", "flat", "repeated", "outlier", "rows", "zero", "ones"]


def matrix(kind: str, rows: int, columns: int, seed: int, magnitude: float = 1.0) -> Tensor:
    """Float32 matrices whose spectra differ: random, one direction, flat, equal values, ill-scaled rows."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    if kind == "rank1":
        base = base[:, :1] @ base[:1]
    elif kind == "flat":
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator)).Q
        base = q if rows >= columns else q.T
    elif kind == "repeated":
        base = torch.eye(rows, columns) * 3
    elif kind == "outlier":
        base[0, 0] = 1000.0
    elif kind == "rows":
        base = base * torch.logspace(-12, 0, rows)[:, None]
    elif kind == "zero":
        base = torch.zeros(rows, columns)
    elif kind == "ones":
        base = torch.ones(rows, columns)
    return base * magnitude


def truth(a: Tensor) -> float:
    return float(np.linalg.svd(a.double().numpy(), compute_uv=False)[0])


matrices = st.builds(
    matrix,
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 1e-20, 1e20, 1e-37, 1e35, 0.3]),
)


@given(matrices)
@settings(max_examples=200)
def test_both_ends_hold_and_are_close(a: Tensor) -> None:
    bound = spectral_norm(a)
    svd = truth(a)
    rounding = 8e-16 * max(a.shape) * svd  # of numpy's own result
    assert bound.lower <= svd + rounding
    assert svd - rounding <= bound.upper
    width = 12 * 2.3e-16 * sum(a.shape) * min(a.shape)
    assert bound.upper - bound.lower <= width * svd * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(64, 576), (256, 100), (300, 300)])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_sizes(shape: tuple[int, int], kind: str) -> None:
    a = matrix(kind, *shape, seed=1, magnitude=0.02)
    bound = spectral_norm(a)
    assert bound.lower <= truth(a) * (1 + 1e-12)
    assert bound.upper >= truth(a) * (1 - 1e-12)
    assert bound.upper <= truth(a) * (1 + 1e-8)
    assert bound.method == "gram+eigvalsh"


@given(matrices, st.integers(-60, 60))
@settings(max_examples=60)
def test_scaling_by_a_power_of_two_is_exact(a: Tensor, exponent: int) -> None:
    a = a.double() * 1e-20
    plain, scaled = spectral_norm(a), spectral_norm(a * 2.0**exponent)
    assert scaled.lower == pytest.approx(plain.lower * 2.0**exponent, rel=1e-15)
    assert scaled.upper == pytest.approx(plain.upper * 2.0**exponent, rel=1e-15)


@given(matrices)
@settings(max_examples=60)
def test_transpose(a: Tensor) -> None:
    plain, turned = spectral_norm(a), spectral_norm(a.T)
    assert turned.lower <= plain.upper
    assert plain.lower <= turned.upper


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=60)
def test_triangle_and_product(seed: int, kind: str, other: str, rows: int, columns: int) -> None:
    a, b = matrix(kind, rows, columns, seed).double(), matrix(other, rows, columns, seed + 1).double()
    total = spectral_norm(a + b)
    assert total.lower <= spectral_norm(a).upper + spectral_norm(b).upper + 1e-12
    assert spectral_norm(a).lower - spectral_norm(b).upper <= total.upper + 1e-12
    assert spectral_norm(a @ b.T).lower <= spectral_norm(a).upper * spectral_norm(b).upper * (1 + 1e-12) + 1e-12


@given(matrices, st.integers(0, 100))
@settings(max_examples=60)
def test_no_vector_is_stretched_further(a: Tensor, seed: int) -> None:
    vector = torch.randn(a.shape[1], 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stretched = (a.double() @ vector).norm(dim=0) / vector.norm(dim=0)
    assert float(stretched.max()) <= spectral_norm(a).upper * (1 + 1e-14)


def power_iteration(a: Tensor, tolerance: float) -> float:
    """The usual estimate, stopped when it changes by less than ``tolerance``: a lower bound only."""
    vector = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0), dtype=a.dtype)
    norm = previous = 0.0
    for _ in range(1000):
        vector = a.mT @ (a @ (vector / vector.norm()))
        norm = math.sqrt(float(vector.norm()))
        if abs(norm - previous) <= tolerance * norm:
            break
        previous = norm
    return norm


def test_power_iteration_as_an_upper_bound_would_be_caught() -> None:
    """A planted mistake: on noise such as dW it stops low."""
    caught = 0
    for seed in range(20):
        noise = matrix("gauss", 64, 144, seed).double()
        estimate = power_iteration(noise, 1e-3)
        assert estimate <= spectral_norm(noise).upper
        caught += estimate < spectral_norm(noise).lower
    assert caught >= 18


def test_a_float32_gram_without_inflation_would_be_caught() -> None:
    """A planted mistake: it falls below the true norm for some matrix."""
    caught = 0
    for seed in range(40):
        a = matrix("gauss", 32, 200, seed)
        plain = math.sqrt(float(torch.linalg.eigvalsh(a @ a.T)[-1]))
        caught += plain < spectral_norm(a).lower
    assert caught >= 5


def test_an_unscaled_gram_would_be_caught() -> None:
    """A planted mistake: squares of float32 numbers near 1e-30 vanish in a float32 Gram matrix."""
    a = matrix("gauss", 8, 8, 0, 1e-30)
    assert float((a @ a.T).abs().max()) == 0.0
    assert spectral_norm(a).lower > 0.9 * truth(a)


def test_float64_extremes() -> None:
    tiny = torch.tensor([[3e-320, 0.0], [0.0, 1e-322]], dtype=torch.float64)
    bound = spectral_norm(tiny)
    assert bound.lower <= 3e-320 <= bound.upper <= 3.1e-320
    assert spectral_norm(torch.full((2, 2), 3e38)).upper == pytest.approx(6e38)


def test_zero_is_exact() -> None:
    bound = spectral_norm(torch.zeros(3, 5))
    assert (bound.lower, bound.upper) == (0.0, 0.0)


def test_a_batch_is_each_alone() -> None:
    batch = torch.stack([matrix(kind, 9, 4, 3, 10.0**i) for i, kind in enumerate(KINDS)])
    together = spectral_norms(batch)
    assert len(together) == len(KINDS)
    for a, bound in zip(batch, together, strict=True):
        alone = spectral_norm(a)
        assert bound.lower == pytest.approx(alone.lower, rel=1e-12)
        assert bound.upper == pytest.approx(alone.upper, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_other_dtypes(dtype: torch.dtype) -> None:
    a = torch.tensor([[3, 0], [0, -4]], dtype=dtype)
    assert spectral_norm(a).value == pytest.approx(4.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_must_be_finite(bad: float) -> None:
    with pytest.raises(CorruptModelError, match="fc1: entries that are not finite"):
        spectral_norm(torch.tensor([[1.0, bad]]), where="fc1")


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (1, 2, 3)])
def test_not_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        spectral_norm(torch.zeros(shape))


def test_not_a_batch() -> None:
    with pytest.raises(UsageError, match="batch"):
        spectral_norms(torch.zeros(2, 2))
