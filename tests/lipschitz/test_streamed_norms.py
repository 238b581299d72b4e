"""Norms in parts against numpy's SVD and the norms of the whole, and planted errors of the certificate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz import max_row_sum, spectral_norm, streamed, streamed_norms


def matrix(rows: int, columns: int, seed: int = 0, magnitude: float = 1.0, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if rank:
        values = values[:, :rank] @ values[:rank]
    return values * magnitude


def largest(a: Tensor) -> float:
    return float(np.linalg.svd(a.double().numpy(), compute_uv=False)[0])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, so that small matrices have many."""
    monkeypatch.setattr(streamed, "PART", 50)


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6),
    st.sampled_from([1.0, 1e-20, 1e20, 1e-37, 1e35, 1e-44, 0.02]), st.booleans(),
)  # fmt: skip
@settings(max_examples=150)
def test_bounds_hold_and_are_close(rows: int, columns: int, seed: int, magnitude: float, error: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "PART", 50)
        a = matrix(rows, columns, seed, magnitude)
        b = matrix(rows, columns, seed + 1, magnitude * 0.1) if error else None
        spectral, row = streamed_norms(a, b)
    whole = a.double() - b.double() if b is not None else a.double()
    svd, rounding = largest(whole), 8e-16 * max(rows, columns) * largest(whole)
    assert spectral.lower <= svd + rounding
    assert svd - rounding <= spectral.upper
    assert spectral.upper - spectral.lower <= 1e-9 * svd
    exact = float(whole.abs().sum(1).max())
    assert row.lower <= exact * (1 + 1e-15)
    assert exact * (1 - 1e-15) <= row.upper <= exact * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(40, 700), (700, 40), (300, 300), (1, 900), (900, 1)])
def test_the_same_as_of_the_whole(shape: tuple[int, int], small_parts: None) -> None:
    a = matrix(*shape, magnitude=0.05)
    spectral, row = streamed_norms(a)
    expected, rows = spectral_norm(a), max_row_sum(a)
    assert spectral.method == expected.method
    assert (spectral.lower, spectral.upper) == pytest.approx((expected.lower, expected.upper), rel=1e-12)
    assert row.method == rows.method
    assert row.upper == pytest.approx(rows.upper, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shape", [(60, 900), (900, 60), (200, 200)])
def test_the_certificate_encloses(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WIDEST_DENSE", 10)
    a = matrix(*shape, rank=rank)
    bound, _ = streamed_norms(a)
    assert bound.method == "gram+cholesky"
    assert bound.lower <= largest(a) * (1 + 1e-14)
    assert largest(a) * (1 - 1e-14) <= bound.upper <= largest(a) * 1.06
    assert bound.upper <= bound.lower * 1.06


def test_one_direction_is_enclosed_to_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WIDEST_DENSE", 10)
    bound, _ = streamed_norms(matrix(100, 80, rank=1))
    assert bound.upper <= bound.lower * (1 + 1e-6)


@pytest.mark.parametrize("iterations", [0, 1])
def test_a_power_method_that_has_not_converged_costs_width_and_not_truth(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "WIDEST_DENSE", 10)
    monkeypatch.setattr(streamed, "ITERATIONS", iterations)
    a = matrix(64, 64, seed=3)
    a[:, 0] = 0
    a[0] += 5 * torch.linalg.svd(a.double()).Vh[-1].float()
    bound, _ = streamed_norms(a)
    assert bound.lower <= largest(a) <= bound.upper


def test_a_gap_too_wide_for_the_certificate_falls_back_on_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WIDEST_DENSE", 10)
    monkeypatch.setattr(streamed, "WIDTHS", ())
    a = matrix(30, 40)
    bound, _ = streamed_norms(a)
    assert bound.lower <= largest(a) <= bound.upper <= largest(a) * (1 + 1e-9)


def test_zeros() -> None:
    bound, row = streamed_norms(torch.zeros(20, 30))
    assert (bound.lower, bound.upper, row.upper) == (0, 0, 0)
    a = matrix(20, 30)
    bound, row = streamed_norms(a, a.clone())
    assert (bound.upper, row.upper) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operands_stay_as_they_are(dtype: torch.dtype, small_parts: None) -> None:
    a = matrix(20, 30).to(dtype)
    before = a.clone()
    streamed_norms(a)
    streamed_norms(a, a)
    assert torch.equal(a, before)


def test_transposed_views_are_taken(small_parts: None) -> None:
    a = matrix(20, 30)
    turned, plain = (streamed_norms(m)[0] for m in (a.T.contiguous().T, a))
    assert (turned.lower, turned.upper) == pytest.approx((plain.lower, plain.upper), rel=1e-12)


def test_what_is_refused() -> None:
    for a, b in ((torch.zeros(3), None), (torch.zeros(0, 3), None), (torch.zeros(2, 3), torch.zeros(3, 2))):
        with pytest.raises(UsageError, match="no two matrices of one shape"):
            streamed_norms(a, b)
    bad = torch.ones(20, 30)
    bad[19, 29] = float("nan")
    for a, b in ((bad, None), (torch.ones(20, 30), bad)):
        with pytest.raises(CorruptModelError, match="fc: entries that are not finite"):
            streamed_norms(a, b, where="fc")
