"""The root of a moment: R R^T is C up to what its own rounding is, whatever C's rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qopt.lipschitz import moment_root, weighted_l2


def moment(columns: int, positions: int, seed: int, single: bool) -> Tensor:
    """``E[u u^T]`` of random inputs after a ReLU, (1, columns, columns); ``single``: products summed in float32."""
    rows = torch.randn(positions, columns, generator=torch.Generator().manual_seed(seed)).relu()
    rows = rows if single else rows.double()
    return ((rows.mT @ rows).double() / positions)[None]


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 99), st.booleans())
def test_the_root_squared_is_the_moment(columns: int, positions: int, seed: int, single: bool) -> None:
    c = moment(columns, positions, seed, single)
    root = moment_root(c)
    slack = (1e-4 if single else 1e-6) * float(c.diagonal(dim1=1, dim2=2).sum())
    assert torch.allclose(root @ root.mT, c, rtol=0, atol=slack + 1e-30)


@pytest.mark.parametrize("positions", [40, 300])
def test_fewer_positions_than_columns_need_no_eigenvectors(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products summed in float32 leave eigenvalues below zero; a matrix of 4608 columns has minutes of eigenvectors."""

    def refuse(matrix: Tensor) -> None:
        raise AssertionError(f"eigenvectors of {tuple(matrix.shape)}")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    c = moment(400, positions, 1, single=True)
    assert float(torch.linalg.eigvalsh(c)[0, 0]) < 0
    root = moment_root(c)
    assert float((root @ root.mT - c).norm() / c.norm()) < 1e-4


def test_what_is_no_moment_at_all_takes_its_positive_part() -> None:
    c = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))[None]
    root = moment_root(c)
    assert torch.allclose(root @ root.mT, c.clamp_min(0.0), atol=1e-12)


def test_dead_inputs_and_zero_moments() -> None:
    c = torch.diag(torch.tensor([9.0, 0.0, 1.0], dtype=torch.float64))[None]
    assert torch.allclose(moment_root(c) @ moment_root(c).mT, c, atol=1e-12)
    assert torch.equal(moment_root(torch.zeros(2, 3, 3)), torch.zeros(2, 3, 3, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(2, 12), st.integers(0, 50))
def test_the_norm_is_the_root_mean_square_output_along_the_worst_direction(rows: int, columns: int, seed: int) -> None:
    c = moment(columns, 4 * columns, seed, single=False)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = weighted_l2(weight, moment_root(c))
    expected = float(torch.linalg.eigvalsh(weight @ c[0] @ weight.mT)[-1].clamp_min(0).sqrt())
    assert found.lower <= expected * (1 + 1e-5) + 1e-9
    assert found.upper >= expected * (1 - 1e-9)
