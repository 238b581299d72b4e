"""Streaming ranges against numpy over the whole data."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import DataError, UsageError
from qopt.quant import RangeObserver
from qopt.quant.observer import HALF, PART

values32 = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60)


def observe(*batches: Tensor) -> RangeObserver:
    observer = RangeObserver("relu1")
    for batch in batches:
        observer.update(batch)
    return observer


DATA = {
    "gauss": lambda g: torch.randn(20000, generator=g),
    "relu": lambda g: torch.randn(20000, generator=g).clamp(min=0),
    "heavy": lambda g: torch.randn(20000, generator=g) ** 3,
    "negative": lambda g: -torch.rand(20000, generator=g) - 5,
    "tiny": lambda g: torch.randn(20000, generator=g) * 1e-30,
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("percentile", [51.0, 90.0, 99.0, 99.9, 99.99])
def test_percentiles_are_within_a_bin_of_numpy(kind: str, percentile: float) -> None:
    data = DATA[kind](torch.Generator().manual_seed(1))
    observer = observe(*torch.split(data, 3000))
    low, high = observer.bounds(percentile)
    expected = np.percentile(data.double().numpy(), [100 - percentile, percentile])
    assert observer.bin_width <= float(data.abs().max()) / (HALF / 2)
    assert abs(low - expected[0]) <= observer.bin_width
    assert abs(high - expected[1]) <= observer.bin_width


@given(values32, st.sampled_from([50.5, 75.0, 99.0, 99.9]))
@settings(max_examples=100)
def test_percentiles_of_any_values(values: list[float], percentile: float) -> None:
    data = torch.tensor(values)
    observer = observe(data)
    expected = np.percentile(data.double().numpy(), [100 - percentile, percentile])
    found = observer.bounds(percentile)
    assert np.allclose(found, expected, rtol=0, atol=observer.bin_width * (1 + 1e-9))
    assert observer.low <= found[0] <= observer.high
    assert observer.low <= found[1] <= observer.high


@given(values32, st.randoms(use_true_random=False), st.integers(1, 7))
@settings(max_examples=100)
def test_order_and_batches_do_not_matter(values: list[float], shuffler: object, size: int) -> None:
    ordered = observe(torch.tensor(values))
    shuffled = list(values)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    streamed = observe(*torch.split(torch.tensor(shuffled), size))
    assert torch.equal(streamed._counts, ordered._counts)
    assert streamed.bin_width == ordered.bin_width
    for percentile in (60.0, 99.0, 100.0):
        assert streamed.bounds(percentile) == ordered.bounds(percentile)


@given(values32)
@settings(max_examples=50)
def test_minimum_and_maximum_are_exact(values: list[float]) -> None:
    data = torch.tensor(values)
    assert observe(data).bounds() == (float(data.min()), float(data.max()))
    assert observe(data).count == len(values)


def test_percentiles_are_monotone_and_inside() -> None:
    observer = observe(torch.randn(5000, generator=torch.Generator().manual_seed(2)))
    bounds = [observer.bounds(p) for p in (60.0, 80.0, 95.0, 99.0, 99.9, 100.0)]
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in pairwise(bounds))


def test_zeros_first_then_values_of_growing_size() -> None:
    """The width is unknown while only zeros were seen, then doubles over 150 powers of two."""
    observer = observe(torch.zeros(10))
    assert observer.bounds(99.0) == (0.0, 0.0)
    assert observer.bin_width == 0.0
    exponents = range(-140, 100, 7)
    for exponent in exponents:
        observer.update(torch.tensor([2.0**exponent]))
    assert observer.count == 10 + len(exponents)
    assert observer.high == 2.0 ** exponents[-1]
    assert 0 <= observer.bounds(75.0)[1] <= observer.bin_width


def test_memory_is_bounded_and_nothing_is_kept() -> None:
    observer = observe(torch.randn(10))
    before = observer._counts.numel()
    observer.update(torch.randn(4, 8, 16, 16) * 100)
    assert observer._counts.numel() == before == 2 * HALF
    tensors = [value for value in vars(observer).values() if isinstance(value, Tensor)]
    assert len(tensors) == 1


def test_large_batches_are_binned_in_parts() -> None:
    data = torch.linspace(-1, 1, PART + 1000)
    observer = observe(data)
    assert observer.count == PART + 1000
    assert observer.bounds(75.0)[1] == pytest.approx(0.5, abs=observer.bin_width)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_the_state(bad: float) -> None:
    observer = observe(torch.tensor([1.0, 2.0]))
    with pytest.raises(DataError, match="relu1"):
        observer.update(torch.tensor([5.0, bad]))
    assert observer.bounds() == (1.0, 2.0)
    assert observer.count == 2


def test_an_empty_batch_changes_nothing() -> None:
    assert observe(torch.zeros(0), torch.tensor([3.0])).bounds() == (3.0, 3.0)


def test_no_data_is_an_error() -> None:
    with pytest.raises(UsageError, match="relu1: no activations"):
        RangeObserver("relu1").bounds()


@pytest.mark.parametrize("percentile", [50.0, 0.0, 100.1, math.nan])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        observe(torch.ones(1)).bounds(percentile)
