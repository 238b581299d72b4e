"""Suprema over frequencies, lower bounds by search and row sums, each against an oracle of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from qopt.lipschitz import frequency, stretch
from qopt.lipschitz.frequency import Sampling, polyphase, samplings, supremum
from qopt.lipschitz.operator import Axis, Operator
from qopt.lipschitz.row_sums import largest_column_sum, largest_row_sum
from qopt.lipschitz.stretch import Convolution


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def response(blocks: Tensor, down: float, across: float) -> NDArray[np.complex128]:
    """``F(w)`` of every group by its definition."""
    y, x = np.arange(blocks.shape[3]), np.arange(blocks.shape[4])
    turns = np.exp(1j * (down * y[:, None] + across * x[None]))
    found: NDArray[np.complex128] = np.einsum("grcyx,yx->grc", blocks.numpy(), turns)
    return found


def largest(blocks: Tensor, points: int) -> float:
    """The largest norm over a grid, by numpy's SVD."""
    angles = 2 * np.pi * np.arange(points) / points
    return max(float(np.linalg.svd(response(blocks, a, b), compute_uv=False).max()) for a in angles for b in angles)


blocks_of = st.builds(
    lambda shape, seed: random(*shape, seed=seed),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 10**6),
)


@given(blocks_of, st.integers(1, 6))
@settings(max_examples=60)
def test_the_largest_of_a_grid(blocks: Tensor, points: int) -> None:
    found = supremum(blocks, (Sampling(points, 1.0), Sampling(points, 1.0)))
    expected = largest(blocks, points)
    assert found.low <= expected * (1 + 1e-12)
    assert expected * (1 - 1e-12) <= found.high <= expected * (1 + 2e-6)
    assert found.bound >= found.high


@given(blocks_of)
@settings(max_examples=40)
def test_the_factor_covers_what_lies_between(blocks: Tensor) -> None:
    """Of a coarse grid, against one that has no frequency in common with it but 0."""
    grid = []
    for taps in blocks.shape[3:]:
        points = max(1, 4 * (taps - 1))
        grid.append(Sampling(points, 1 / math.cos((taps - 1) * math.pi / (2 * points))))
    found = supremum(blocks, (grid[0], grid[1]))
    assert found.bound >= largest(blocks, 13) * (1 - 1e-12)


def test_without_the_factor_a_coarse_grid_would_be_caught() -> None:
    caught = 0
    for seed in range(10):
        blocks = random(1, 2, 2, 3, 3, seed=seed)
        found = supremum(blocks, (Sampling(4, 1.0), Sampling(4, 1.0)))
        caught += found.bound < largest(blocks, 16)
    assert caught >= 4


@given(blocks_of, st.integers(0, 1))
@settings(max_examples=40)
def test_frequencies_that_are_guessed_wrong_cost_time_and_not_truth(blocks: Tensor, sign: int) -> None:
    """The order of the eigenvalue problems is a guess: upside down, or the same for all, the bounds hold."""
    with pytest.MonkeyPatch.context() as patch:
        guess = frequency._estimates
        patch.setattr(frequency, "_estimates", lambda grams: -sign * guess(grams))
        found = supremum(blocks, (Sampling(5, 1.0), Sampling(5, 1.0)))
    expected = largest(blocks, 5)
    assert found.low <= expected * (1 + 1e-12)
    assert expected * (1 - 1e-12) <= found.high <= expected * (1 + 2e-6)


def test_grids_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random(2, 3, 4, 3, 3)
    whole = supremum(blocks, (Sampling(12, 1.0), Sampling(9, 1.0)))
    monkeypatch.setattr(frequency, "TOGETHER", 1)
    parts = supremum(blocks, (Sampling(12, 1.0), Sampling(9, 1.0)))
    assert parts.high == pytest.approx(whole.high, rel=2e-6)
    assert parts.low == pytest.approx(whole.low, rel=2e-6)


def geometry(stride: int = 1, dilation: int = 1, size: int | None = None, padding: int = 0) -> tuple[Axis, Axis]:
    sizes = None if size is None else (size, size)
    operator = Operator(
        "convolution", 0, 1, (stride, stride), (dilation, dilation), ((padding, padding),) * 2, size=sizes
    )
    return operator.axes((1, 1, 3, 3))


@pytest.mark.parametrize(
    ("stride", "dilation", "expected"),
    [(1, 1, (2, 4, 3, 3)), (2, 1, (2, 16, 2, 2)), (2, 2, (2, 4, 3, 3)), (3, 1, (2, 36, 1, 1)), (4, 2, (2, 16, 2, 2))],
)
def test_phases_become_channels(stride: int, dilation: int, expected: tuple[int, ...]) -> None:
    weight = random(2, 4, 3, 3)
    blocks = polyphase(weight, geometry(stride, dilation), 1)
    assert tuple(blocks.shape[1:]) == expected
    assert float(blocks.square().sum()) == pytest.approx(float(weight.square().sum()))


def test_groups_are_blocks_of_their_own() -> None:
    weight = random(4, 3, 3, 3)
    blocks = polyphase(weight, geometry(), 2)
    assert tuple(blocks.shape) == (2, 2, 3, 3, 3)
    grid = samplings(geometry()[0], 2)
    whole = supremum(blocks, (grid, grid))
    assert whole.high == pytest.approx(max(supremum(part[None], (grid, grid)).high for part in blocks), rel=2e-6)


# --- the search for lower bounds ---


def dense(convolution: Convolution) -> Tensor:
    size = math.prod(convolution.image)
    return convolution(torch.eye(size, dtype=torch.float64).reshape(size, *convolution.image)).flatten(1).T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, 1), (1, 2, 0), (2, 2, 2)])
def test_the_search_comes_close(stride: int, dilation: int, padding: int, seed: int) -> None:
    convolution = Convolution(random(4, 3, 3, 3, seed=seed), geometry(stride, dilation, 9, padding), 1)
    norm = float(torch.linalg.matrix_norm(dense(convolution), 2))
    assert norm * 0.995 <= stretch.stretch(convolution, 0.0) <= norm * (1 + 1e-12)
    assert stretch.stretch(convolution, 0.1 * norm) <= 0.9 * norm


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_search_cut_short_is_lower_and_holds(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = Convolution(random(4, 3, 3, 3), geometry(1, 1, 9, 1), 1)
    whole = stretch.stretch(convolution, 0.0)
    monkeypatch.setattr(stretch, "STEPS", steps)
    short = stretch.stretch(convolution, 0.0)
    assert 0 < short <= whole * (1 + 1e-12)


def test_a_wrong_adjoint_costs_width_and_not_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower bound is a quotient that the map itself gives."""
    convolution = Convolution(random(4, 3, 3, 3), geometry(1, 1, 9, 1), 1)
    norm = float(torch.linalg.matrix_norm(dense(convolution), 2))
    right = Convolution.adjoint
    monkeypatch.setattr(Convolution, "adjoint", lambda self, output: right(self, output).flip(2))
    assert stretch.stretch(convolution, 0.0) <= norm * (1 + 1e-12)


def test_a_map_of_one_direction_ends_the_search() -> None:
    weight = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    weight[0, 0, 1, 1] = 3.0
    convolution = Convolution(weight, geometry(1, 1, 5, 1), 1)
    assert stretch.stretch(convolution, 0.0) == pytest.approx(3.0, rel=1e-6)


# --- sums of rows and columns ---


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(3, 7), st.integers(0, 10**6))
@settings(max_examples=60)
def test_sums_of_rows_and_columns(stride: int, dilation: int, padding: int, size: int, seed: int) -> None:
    size = max(size, 2 * dilation + 1 - 2 * padding)
    weight, axes = random(3, 2, 3, 3, seed=seed), geometry(stride, dilation, size, padding)
    magnitudes = dense(Convolution(weight, axes, 1)).abs()
    for bound, dim in ((largest_row_sum(weight, axes), 1), (largest_column_sum(weight, axes, 1), 0)):
        expected = float(magnitudes.sum(dim=dim).max())
        assert bound.lower <= expected * (1 + 1e-13)
        assert expected * (1 - 1e-13) <= bound.upper <= expected * (1 + 1e-12)


@pytest.mark.parametrize(("stride", "read_by"), [(1, 9), (2, 4), (3, 1)])
def test_a_pixel_is_read_by_as_many_outputs_as_have_a_tap_on_it(stride: int, read_by: int) -> None:
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert largest_column_sum(ones, geometry(stride), 1).value == pytest.approx(read_by)
    assert largest_row_sum(ones, geometry(stride)).value == pytest.approx(9)
