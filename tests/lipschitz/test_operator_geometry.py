"""The geometry of one axis against counting by hand: taps, phases, copies of pixels, tori."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from qopt.errors import UsageError
from qopt.lipschitz.frequency import FINE, FINENESS, samplings, torus_points
from qopt.lipschitz.operator import Axis, Operator, PaddingMode
from qopt.lipschitz.stretch import unread


def axis(
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, int] = (0, 0),
    size: int | None = None,
    mode: PaddingMode = "zeros",
) -> Axis:
    """The axis as `Operator` makes it."""
    sizes = None if size is None else (size,)
    operator = Operator("convolution", 0, 1, (stride,), (dilation,), (padding,), (), mode, sizes)
    return operator.axes((1, 1, kernel))[1]


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "extent", "phases", "taps"),
    [
        (3, 1, 1, 3, 1, 3),
        (3, 2, 1, 3, 2, 2),
        (3, 3, 1, 3, 3, 1),
        (3, 2, 2, 5, 1, 3),  # all taps fall on even pixels: gcd(2, 2) = 2
        (3, 4, 2, 5, 2, 2),
        (5, 6, 4, 17, 3, 2),
        (5, 3, 2, 9, 3, 2),
        (7, 2, 1, 7, 2, 4),
        (1, 5, 3, 1, 5, 1),
        (16, 16, 1, 16, 16, 1),
    ],
)
def test_phases(kernel: int, stride: int, dilation: int, extent: int, phases: int, taps: int) -> None:
    found = axis(kernel, stride, dilation)
    assert (found.extent, found.phases, found.taps) == (extent, phases, taps)
    assert len({(dilation * tap) % stride for tap in range(kernel)}) == min(phases, kernel)
    assert max(Counter((dilation * tap) % stride for tap in range(kernel)).values()) == taps


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize(
    ("before", "after", "size"), [(0, 0, 4), (1, 0, 4), (0, 2, 4), (2, 2, 4), (3, 3, 4), (1, 1, 2)]
)
def test_pixels_are_those_of_torch(mode: PaddingMode, before: int, after: int, size: int) -> None:
    found = axis(1, padding=(before, after), size=size, mode=mode)
    image = torch.arange(size, dtype=torch.float64)[None]
    padded = functional.pad(image, (before, after), mode=mode)[0] if before + after else image[0]
    assert found.pixels() == padded.int().tolist()
    assert found.copies == max(Counter(found.pixels()).values())
    assert axis(1, padding=(before, after), mode=mode).copies >= found.copies


def test_zeros_show_no_pixel_twice() -> None:
    found = axis(3, padding=(2, 1), size=3)
    assert found.pixels() == [-1, -1, 0, 1, 2, -1]
    assert found.copies == 1
    assert found.padded() == found


def test_an_axis_over_the_padded_image() -> None:
    padded = axis(3, padding=(2, 1), size=4, mode="reflect").padded()
    assert (padded.before, padded.after, padded.mode, padded.size, padded.outputs) == (0, 0, "zeros", 7, 5)
    assert axis(3, padding=(2, 1), mode="circular").padded().size is None


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(1, 12)
)
@settings(max_examples=150)
def test_outputs_and_what_they_leave(kernel: int, stride: int, dilation: int, p: int, q: int, size: int) -> None:
    assume(size + p + q >= dilation * (kernel - 1) + 1)
    found = axis(kernel, stride, dilation, (p, q), size)
    assert found.outputs is not None
    last = (found.outputs - 1) * stride + found.extent
    assert last <= size + p + q < last + stride
    assert unread(found) == size + p + q - last


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 6),
    st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=150)
def test_a_transposed_axis_is_that_of_its_adjoint(
    kernel: int, stride: int, dilation: int, p: int, q: int, size: int, extra: int
) -> None:
    assume(extra < max(stride, dilation))
    whole = (size - 1) * stride + dilation * (kernel - 1) + 1 + extra
    assume(whole - p - q >= 1)
    operator = Operator("transposed", 0, 1, (stride,), (dilation,), ((p, q),), (extra,), size=(size,))
    found = operator.axes((1, 1, kernel))[1]
    image = torch.zeros(1, 1, size)
    output = functional.conv_transpose1d(image, torch.zeros(1, 1, kernel), None, stride, 0, extra, 1, dilation)
    assert found.size == output.shape[2] - p - q
    assert found.outputs == size
    assert unread(found) == extra


@pytest.mark.parametrize(
    ("found", "points"),
    [
        (axis(3, padding=(1, 1), size=7), 8),  # both ends share what is wrapped around
        (axis(3, padding=(2, 0), size=7), 9),
        (axis(3, padding=(1, 1), size=7, stride=2), 4),
        (axis(3, padding=(1, 1), size=8, stride=2), 5),
        (axis(3, padding=(0, 0), size=8, dilation=2), 4),  # even and odd pixels never meet
        (axis(3, padding=(0, 0), size=9, dilation=2), 9),
        (axis(3, padding=(0, 0), size=8, stride=2, dilation=2), 4),
        (axis(3, padding=(1, 1), size=8, mode="circular"), 8),
        (axis(3, padding=(1, 1), size=8, mode="circular", stride=2), 4),
        (axis(3, padding=(1, 1), size=9, mode="circular", stride=2), 6),  # 9 + 2 pixels, a multiple of 2
        (axis(3, padding=(2, 2), size=8, mode="circular"), 12),  # outputs that come twice
        (axis(3, padding=(1, 1), size=8, mode="reflect"), 10),
        (axis(3), None),
    ],
    ids=str,
)
def test_the_torus_holds_image_and_padding(found: Axis, points: int | None) -> None:
    assert torus_points(found) == points


def test_few_frequencies_are_taken_whole_and_many_on_a_grid() -> None:
    small, large = axis(3, padding=(1, 1), size=7), axis(3, padding=(1, 1), size=100)
    assert samplings(small, FINE).points == 8
    assert samplings(small, FINE).factor == 1.0
    grid = samplings(large, FINE + 1)
    assert grid.points == 2 * FINENESS
    assert grid.factor == pytest.approx(1 / math.cos(2 * math.pi / (2 * grid.points)))
    assert samplings(large, FINE).points == 2 * grid.points
    assert 1 < samplings(large, FINE).factor < grid.factor
    assert samplings(axis(3), FINE) == samplings(large, FINE)


def test_one_tap_has_one_frequency() -> None:
    for found in (axis(1), axis(1, padding=(2, 2), size=5), axis(4, stride=4, size=16)):
        assert (samplings(found, 8).points, samplings(found, 8).factor) == (1, 1.0)


@pytest.mark.parametrize(
    ("padding", "mode", "size", "factor"),
    [
        ((1, 1), "reflect", 8, math.sqrt(2)),
        ((1, 1), "reflect", 3, math.sqrt(3)),
        ((1, 0), "reflect", None, math.sqrt(2)),
        ((1, 1), "reflect", None, math.sqrt(3)),
        ((1, 1), "circular", 8, 1.0),
        ((2, 2), "circular", 8, math.sqrt(2)),
        ((1, 1), "circular", None, 1.0),
        ((1, 1), "zeros", 8, 1.0),
    ],
)
def test_copies_of_pixels_cost_their_root(
    padding: tuple[int, int], mode: PaddingMode, size: int | None, factor: float
) -> None:
    plain = samplings(axis(3, size=size), 8).factor if size is None else 1.0
    assert samplings(axis(3, padding=padding, mode=mode, size=size), 8).factor == pytest.approx(factor * plain)


def test_one_axis_becomes_the_second_of_two() -> None:
    first, second = Operator("convolution", stride=(2,), size=(9,)).axes((4, 3, 3))
    assert (first.kernel, first.size, first.outputs) == (1, 1, 1)
    assert (second.kernel, second.stride, second.size, second.outputs) == (3, 2, 9, 4)


def test_errors_name_the_layer() -> None:
    with pytest.raises(UsageError, match=r"^stem: an image too small"):
        Operator("convolution", size=(2,)).axes((1, 1, 3), where="stem")
