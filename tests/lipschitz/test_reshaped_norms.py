"""Reshaped matrices and their norms against explicit convolution matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz import as_matrix, max_row_sum, reshaped_l2, spectral_norm


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(operator: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of a linear map of one image of ``shape``, column by column."""
    size = math.prod(shape)
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, -1).T


configurations = st.tuples(
    st.sampled_from([1, 2, 3]),  # kernel
    st.sampled_from([1, 2]),  # stride
    st.sampled_from([0, 1]),  # padding
    st.sampled_from([1, 2, 3]),  # groups
    st.integers(0, 10**6),
)


@given(configurations)
@settings(max_examples=60)
def test_convolution(case: tuple[int, int, int, int, int]) -> None:
    """reshaped <= operator norm <= sqrt(overlap) * reshaped in l2; equal in linf: one full patch fits in 7 x 7."""
    kernel, stride, padding, groups, seed = case
    weight = random(2 * groups, 2, kernel, kernel, seed=seed)
    dense = explicit(
        lambda x: functional.conv2d(x, weight, stride=stride, padding=padding, groups=groups), (2 * groups, 7, 7)
    )
    reshaped = reshaped_l2(weight, 0, groups)
    operator = spectral_norm(dense)
    assert reshaped.lower <= operator.upper
    assert operator.lower <= math.ceil(kernel / stride) * reshaped.upper
    if kernel <= stride or kernel == 1:
        assert operator.lower <= reshaped.upper
    row_sum = max_row_sum(weight, 0, groups)
    largest = float(dense.abs().sum(dim=1).max())
    assert row_sum.lower * (1 - 1e-14) <= largest <= row_sum.upper * (1 + 1e-14)


@given(configurations)
@settings(max_examples=60)
def test_transposed_convolution(case: tuple[int, int, int, int, int]) -> None:
    kernel, stride, padding, groups, seed = case
    padding = min(padding, kernel - 1)
    weight = random(2 * groups, 3, kernel, kernel, seed=seed)
    dense = explicit(
        lambda x: functional.conv_transpose2d(x, weight, stride=stride, padding=padding, groups=groups),
        (2 * groups, 5, 5),
    )
    row_sum = max_row_sum(weight, 1, groups)
    largest = float(dense.abs().sum(dim=1).max())
    assert largest <= row_sum.upper * (1 + 1e-14)
    if stride == 1:
        assert row_sum.lower <= largest * (1 + 1e-14)
    assert reshaped_l2(weight, 1, groups).lower <= row_sum.upper * math.sqrt(weight.shape[1])


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_linear_layers_are_exact(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    for axis, matrix in ((0, weight), (1, weight.T)):
        assert torch.equal(as_matrix(weight, axis)[0], matrix)
        assert torch.equal(as_matrix(weight, axis - 2)[0], matrix)
        assert reshaped_l2(weight, axis).value == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
        assert max_row_sum(weight, axis).value == pytest.approx(float(torch.linalg.matrix_norm(matrix, math.inf)))


@pytest.mark.parametrize(
    ("shape", "axis", "groups", "expected"),
    [
        ((6, 4, 3, 3), 0, 1, (1, 6, 36)),
        ((6, 4, 3, 3), 0, 3, (3, 2, 36)),
        ((6, 1, 5), 0, 6, (6, 1, 5)),
        ((6, 4, 3, 2), 1, 1, (1, 4, 36)),
        ((6, 4, 3, 2), 1, 3, (3, 4, 12)),
        ((7,), 0, 1, (1, 7, 1)),
        ((2, 3, 4), 2, 1, (1, 4, 6)),
    ],
)
def test_shapes(shape: tuple[int, ...], axis: int, groups: int, expected: tuple[int, ...]) -> None:
    assert tuple(as_matrix(torch.zeros(shape), axis, groups).shape) == expected


def test_a_transposed_row_holds_what_reaches_its_output() -> None:
    weight = random(4, 3, 2, 2)
    blocks = as_matrix(weight, 1, 2)
    for group in range(2):
        for output in range(3):
            assert torch.equal(blocks[group, output], weight[2 * group : 2 * group + 2, output].reshape(-1))


def block_diagonal_norm(blocks: Tensor) -> float:
    dense = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return float(torch.linalg.matrix_norm(dense, 2))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_take_the_maximum(groups: int) -> None:
    """Planted mistakes, product and ungrouped norm over groups, differ from the block-diagonal truth."""
    weight = random(8, 3, 3, 3) * torch.logspace(-1, 0, 8)[:, None, None, None]
    true = block_diagonal_norm(as_matrix(weight, 0, groups))
    bound = reshaped_l2(weight, 0, groups)
    assert bound.lower <= true * (1 + 1e-12)
    assert bound.upper >= true * (1 - 1e-12)
    product = math.prod(spectral_norm(block).value for block in as_matrix(weight, 0, groups))
    assert abs(product - true) > 0.1 * true
    assert abs(reshaped_l2(weight).value - true) > 1e-3 * true


def test_a_wrong_channel_axis_would_be_caught() -> None:
    weight = random(4, 6, 3, 3)
    assert reshaped_l2(weight, 0).value != pytest.approx(reshaped_l2(weight, 1).value, rel=1e-3)
    assert max_row_sum(weight, 0).value != pytest.approx(max_row_sum(weight, 1).value, rel=1e-3)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
@settings(max_examples=40)
def test_norms_scale_and_obey_the_triangle(seed: int, factor: float) -> None:
    a, b = random(4, 3, 2, 2, seed=seed), random(4, 3, 2, 2, seed=seed + 1)
    for norm in (reshaped_l2, max_row_sum):
        assert norm(a * factor).value == pytest.approx(norm(a).value * factor, rel=1e-9)
        assert norm(a + b).lower <= norm(a).upper + norm(b).upper + 1e-12
        assert norm(torch.zeros(4, 3, 2, 2)).upper == 0.0


@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([1.0, 1e-20, 1e20]))
@settings(max_examples=60)
def test_row_sums_cover_their_rounding(seed: int, columns: int, magnitude: float) -> None:
    row = (random(1, columns, seed=seed) ** 5).float() * magnitude
    exact = math.fsum(abs(value) for value in row[0].tolist())
    bound = max_row_sum(row)
    assert bound.lower <= exact <= bound.upper
    assert bound.upper - bound.lower <= 1e-12 * exact + 1e-300


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((6, 4), 2, 1), ((6, 4), -3, 1), ((6, 4, 3), 0, 4), ((6, 4, 3), 0, 0), ((6, 4, 3), 2, 2), ((), 0, 1),
     ((0, 4), 0, 1)],
)  # fmt: skip
def test_weights_that_do_not_fit(shape: tuple[int, ...], axis: int, groups: int) -> None:
    with pytest.raises(UsageError, match=r"layer4\.conv"):
        as_matrix(torch.zeros(shape), axis, groups, where="layer4.conv")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_must_be_finite(bad: float) -> None:
    weight = torch.tensor([[1.0, bad]])
    for norm in (reshaped_l2, max_row_sum):
        with pytest.raises(CorruptModelError, match="fc: "):
            norm(weight, where="fc")
