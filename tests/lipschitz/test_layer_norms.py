"""Norms of layers against the explicit matrix of the map that torch computes, and mistakes that this must catch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz import NormBound, as_matrix, frequency, layer, reshaped_l2, stretch
from qopt.lipschitz.layer import LayerNorms, layer_norms, operator_l2, operator_linf
from qopt.lipschitz.operator import Axis, Operator, PaddingMode

Case = tuple[Tensor, Operator]
Norms = Callable[[Tensor, Operator], LayerNorms]

ROUNDING = 1e-12
"""Of numpy's own norms, relative."""

PADDINGS: list[PaddingMode] = ["zeros", "zeros", "reflect", "circular"]
MODES = {"zeros": "constant", "reflect": "reflect", "circular": "circular"}


def kernel(kind: str, shape: tuple[int, ...], seed: int, magnitude: float) -> Tensor:
    """Float32 kernels whose frequency responses differ: random, smooth, sparse, one direction, nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "smooth":
        values = values.abs() + 1
    elif kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.3)
    elif kind == "rank1":
        values = values[:1] * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    elif kind == "zero":
        values = torch.zeros(shape)
    elif kind == "ones":
        values = torch.ones(shape)
    elif kind == "rows":
        values = values * torch.logspace(-12, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return values * magnitude


def output(weight: Tensor, operator: Operator, image: Tensor) -> Tensor:
    """What torch computes for a convolution of one or two axes, padded by hand."""
    axes = weight.ndim - 2
    stride, dilation = operator.stride or (1,) * axes, operator.dilation or (1,) * axes
    padding = operator.padding or ((0, 0),) * axes
    if operator.kind == "transposed":
        transposed: Any = functional.conv_transpose2d if axes == 2 else functional.conv_transpose1d
        extra = operator.output_padding or (0,) * axes
        whole: Tensor = transposed(image, weight, None, stride, 0, extra, operator.groups, dilation)
        for dim, (before, after) in enumerate(padding, start=2):
            whole = whole.narrow(dim, before, whole.shape[dim] - before - after)
        return whole
    flat = [end for pair in reversed(padding) for end in pair]
    padded = functional.pad(image, flat, MODES[operator.padding_mode]) if any(flat) else image
    plain: Any = functional.conv2d if axes == 2 else functional.conv1d
    result: Tensor = plain(padded, weight, None, stride, 0, dilation, operator.groups)
    return result


def explicit(weight: Tensor, operator: Operator) -> Tensor:
    """The dense matrix of the layer, (outputs, inputs), one input at a time."""
    assert operator.size is not None
    channels = weight.shape[0] if operator.kind == "transposed" else weight.shape[1] * operator.groups
    size = channels * math.prod(operator.size)
    images = torch.eye(size, dtype=torch.float64).reshape(size, channels, *operator.size)
    return output(weight.double(), operator, images).reshape(size, -1).T


def fits(case: Case) -> bool:
    weight, operator = case
    try:
        operator.axes(tuple(weight.shape))
    except UsageError:
        return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A convolution of every geometry, of one or two axes, plain or transposed, on a small image."""
    axes = draw(st.sampled_from([1, 2, 2]))
    transposed = draw(st.integers(0, 2)) == 0
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def each(most: int, least: int = 1) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    shape = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *each(4))
    stride, dilation = each(3), each(3)
    padding = tuple(zip(each(3, 0), each(3, 0), strict=True)) if draw(st.booleans()) else ()
    mode: PaddingMode = "zeros" if transposed else draw(st.sampled_from(PADDINGS))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    operator = Operator(
        "transposed" if transposed else "convolution", 0, groups, stride, dilation, padding,
        extra if transposed else (), mode, each(7),
    )  # fmt: skip
    kind = draw(st.sampled_from(["gauss", "gauss", "smooth", "sparse", "rank1", "zero", "ones", "rows"]))
    magnitude = draw(st.sampled_from([1.0, 1.0, 1e-20, 1e20, 1e-37, 1e35]))
    return kernel(kind, shape, draw(st.integers(0, 10**6)), magnitude), operator


convolutions = cases().filter(fits)


def within(bound: NormBound, norm: float) -> bool:
    return bound.lower <= norm * (1 + ROUNDING) and norm * (1 - ROUNDING) <= bound.upper


def complaints(norms: Norms, weight: Tensor, operator: Operator) -> list[str]:
    """Everything that does not hold of the norms of one layer."""
    matrix = explicit(weight, operator)
    scale = float(weight.abs().max()) or 1.0
    l2, linf = float(torch.linalg.matrix_norm(matrix / scale, 2)) * scale, float(matrix.abs().sum(dim=1).max())
    axis = 1 if operator.kind == "transposed" else 0
    blocks = as_matrix(weight.double() / scale, axis, operator.groups).numpy()
    reshaped = max(float(np.linalg.norm(block, 2)) for block in blocks) * scale
    found = norms(weight, operator)
    any_size = norms(weight, replace(operator, size=None))
    wrong = {
        "reshaped": not within(found.reshaped, reshaped),
        "operator_l2": not within(found.operator_l2, l2),
        "operator_linf": not within(found.operator_linf, linf),
        "operator_linf is not exact": found.operator_linf.upper - found.operator_linf.lower > 1e-12 * linf,
        "operator_l2 of any size": any_size.operator_l2.upper < l2 * (1 - ROUNDING),
        "operator_linf of any size": any_size.operator_linf.upper < linf * (1 - ROUNDING),
        "adjoint": not adjoint_holds(weight, operator, matrix),
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def adjoint_holds(weight: Tensor, operator: Operator, matrix: Tensor) -> bool:
    """Whether the map of the lower bound and its adjoint are the layer's matrix, or its transpose, either way."""
    four = weight.double() if weight.ndim == 4 else weight.double()[:, :, None]
    convolution = stretch.Convolution(four, operator.axes(tuple(weight.shape)), operator.groups)
    size = math.prod(convolution.image)
    images = convolution(torch.eye(size, dtype=torch.float64).reshape(size, *convolution.image))
    forward = images.flatten(1).T
    rows = torch.eye(len(forward), dtype=torch.float64).reshape(-1, *images.shape[1:])
    try:
        back = convolution.adjoint(rows).flatten(1)
    except RuntimeError:  # pixels that it needs are missing
        return False
    if back.shape != forward.shape:
        return False
    expected = matrix.T if operator.kind == "transposed" else matrix
    near = 1e-13 * float(weight.abs().max())
    return torch.allclose(forward, expected, rtol=1e-13, atol=near) and torch.allclose(back, expected, 1e-13, near)


@given(convolutions)
@settings(max_examples=540, suppress_health_check=list(HealthCheck))
def test_norms_hold(case: Case) -> None:
    """The property: 540 configurations."""
    assert complaints(layer_norms, *case) == []


# --- mistakes that the property must catch ---


def _circular(axis: Axis) -> int | None:
    """A torus as large as the image: fine for wrapped padding, no bound for zeros."""
    return None if axis.size is None else max(1, -(-axis.size // axis.stride))


def _product(weight: Tensor, operator: Operator) -> LayerNorms:
    alone = replace(operator, groups=1)
    parts = [layer_norms(part, alone).operator_l2 for part in weight.chunk(operator.groups)]
    product = math.prod(part.upper for part in parts)
    return replace(layer_norms(weight, operator), operator_l2=NormBound(0.0, min(product, 1e300), "product"))


def _power_as_upper(weight: Tensor, operator: Operator) -> LayerNorms:
    norms = layer_norms(weight, operator)
    lower = norms.operator_l2.lower
    return norms if operator.size is None else replace(norms, operator_l2=NormBound(lower, lower, "power"))


def _reshaped_as_operator(weight: Tensor, operator: Operator) -> LayerNorms:
    norms = layer_norms(weight, operator)
    return replace(norms, operator_l2=norms.reshaped)


def _float32_gram(weight: Tensor, operator: Operator) -> LayerNorms:
    norms = layer_norms(weight, operator)
    rows = as_matrix(weight, 1 if operator.kind == "transposed" else 0, operator.groups)
    value = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(rows @ rows.mT).max())))
    return replace(norms, reshaped=NormBound(value, value, "float32"))


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def _strideless(weight: Tensor, axes: tuple[Axis, Axis], groups: int) -> stretch.Convolution:
    """The lower bound's convolution without its stride."""
    moved = [
        replace(a, stride=1, outputs=None if a.size is None else a.size + a.before + a.after - a.extent + 1)
        for a in axes
    ]  # fmt: skip
    return stretch.Convolution(weight, (moved[0], moved[1]), groups)


def _with(target: object, name: str, value: object) -> Norms:
    def norms(weight: Tensor, operator: Operator) -> LayerNorms:
        with patched(target, name, value):
            return layer_norms(weight, operator)

    return norms


def _as_it_is(weight: Tensor, operator: Operator) -> LayerNorms:
    return layer_norms(weight, operator)


PLANTED: dict[str, tuple[Norms, str]] = {
    "torus n": (_with(frequency, "torus_points", _circular), "operator_l2"),
    "product over groups": (_product, "operator_l2"),
    "gcd ignored": (_with(Axis, "phases", property(lambda axis: axis.stride)), "operator_l2"),
    "power iteration as upper": (_power_as_upper, "operator_l2"),
    "reshaped norm as operator norm": (_reshaped_as_operator, "operator_l2"),
    "float32 Gram without inflation": (_float32_gram, "reshaped"),
    "stride ignored in the lower bound": (_with(layer, "Convolution", _strideless), "operator_l2"),
    "wrong output padding": (_as_it_is, "adjoint"),
}
MAP: dict[str, tuple[object, str, object]] = {"wrong output padding": (stretch, "unread", lambda axis: 0)}
"""Mistakes in the map of the lower bound itself."""


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    norms, what = PLANTED[mistake]

    def caught(case: Case) -> bool:
        with patched(*MAP[mistake]) if mistake in MAP else nullcontext():
            return what in complaints(norms, *case)

    quick = settings(max_examples=540, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    weight, operator = find(convolutions, caught, settings=quick)
    assert what not in complaints(layer_norms, weight, operator)


# --- how close the bounds are, and what they are where it is known ---


@pytest.mark.parametrize(
    ("shape", "operator", "widest"),
    [
        ((8, 8, 3, 3), Operator("convolution", padding=((1, 1), (1, 1)), size=(12, 12)), 1.03),
        ((8, 8, 3, 3), Operator("convolution", padding=((1, 1), (1, 1)), size=(48, 48)), 1.011),
        ((80, 80, 3, 3), Operator("convolution", padding=((1, 1), (1, 1)), size=(20, 20)), 1.045),
        ((8, 8, 3, 3), Operator("convolution"), 1.01),
        ((80, 80, 3, 3), Operator("convolution"), 1.0396),
        ((16, 3, 7, 7), Operator("convolution", stride=(2, 2), padding=((3, 3), (3, 3)), size=(32, 32)), 1.02),
        ((8, 8, 5), Operator("convolution", dilation=(2,), size=(40,)), 1.02),
        ((8, 4, 3, 3), Operator("transposed", stride=(2, 2), padding=((1, 1), (1, 1)), size=(10, 10)), 1.02),
        ((12, 1, 3, 3), Operator("convolution", groups=12, padding=((1, 1), (1, 1)), size=(14, 14)), 1.03),
        ((8, 8, 3, 3), Operator("convolution", padding=((1, 1), (1, 1)), padding_mode="circular", size=(8, 8)), 1.001),
        ((8, 8, 1, 1), Operator("convolution", size=(9, 9)), 1 + 1e-6),
        ((8, 3, 4, 4), Operator("convolution", stride=(4, 4), size=(16, 16)), 1 + 1e-6),
        ((8, 3, 4, 4), Operator("convolution", stride=(4, 4)), 1 + 1e-6),
    ],
    ids=str,
)
def test_bounds_are_close(shape: tuple[int, ...], operator: Operator, widest: float) -> None:
    bound = operator_l2(kernel("gauss", shape, 1, 0.1), operator)
    assert bound.upper <= bound.lower * widest


def test_where_patches_do_not_overlap_the_reshaped_norm_is_the_operator_s() -> None:
    for shape, operator in (
        ((8, 3, 4, 4), Operator("convolution", stride=(4, 4), size=(16, 16))),
        ((5, 7), Operator()),
    ):
        norms = layer_norms(kernel("gauss", shape, 2, 1.0), operator)
        assert norms.operator_l2.upper == pytest.approx(norms.reshaped.upper, rel=1e-5)


def test_a_smooth_kernel_is_three_times_its_reshaped_norm() -> None:
    ones = torch.ones(1, 1, 3, 3)
    norms = layer_norms(ones, Operator("convolution", padding=((1, 1), (1, 1)), size=(64, 64)))
    assert norms.reshaped.value == pytest.approx(3.0)
    assert 8.9 < norms.operator_l2.lower <= norms.operator_l2.upper <= 9.0 * (1 + 1e-12)
    assert norms.operator_linf.value == pytest.approx(9.0)


def test_at_the_border_the_linf_norm_is_what_is_read() -> None:
    """An image of 2 x 2 under a 3 x 3 kernel: no output reads more than 2 x 2 taps."""
    ones = torch.ones(1, 1, 3, 3)
    geometry = Operator("convolution", padding=((1, 1), (1, 1)), size=(2, 2))
    assert operator_linf(ones, geometry).value == pytest.approx(4.0)
    assert operator_linf(ones, replace(geometry, size=None)).value == pytest.approx(9.0)
    signs = torch.tensor([1.0, 5.0, -1.0]).reshape(1, 1, 3)
    mirrored = Operator("convolution", padding=((1, 1),), padding_mode="reflect", size=(2,))
    assert operator_linf(signs, mirrored).value == pytest.approx(5.0)  # taps 1 and -1 meet on one pixel


def test_linear_layers() -> None:
    weight = kernel("gauss", (5, 9), 3, 1.0)
    for axis, matrix in ((0, weight), (1, weight.T)):
        norms = layer_norms(weight, Operator(axis=axis))
        assert norms.reshaped == norms.operator_l2
        assert within(norms.operator_l2, float(np.linalg.norm(matrix.double().numpy(), 2)))
        assert within(norms.operator_linf, float(matrix.double().abs().sum(dim=1).max()))


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_an_embedding_is_its_longest_row(magnitude: float) -> None:
    table = kernel("gauss", (20, 6), 4, magnitude)
    norms = layer_norms(table, Operator("embedding"))
    rows = table.double() / magnitude
    assert within(norms.operator_l2, float(rows.norm(dim=1).max()) * magnitude)
    assert norms.operator_l2.upper - norms.operator_l2.lower <= 1e-13 * magnitude * 10
    assert within(norms.operator_linf, float(rows.abs().max()) * magnitude)
    assert within(norms.reshaped, float(np.linalg.norm(rows.numpy(), 2)) * magnitude)


@given(st.integers(-60, 60), st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_power_of_two_scales_exactly(exponent: int, seed: int) -> None:
    weight = kernel("gauss", (3, 2, 3, 2), seed, 1.0)
    operator = Operator("convolution", stride=(2, 1), padding=((1, 0), (1, 1)), size=(6, 5))
    plain, scaled = operator_l2(weight, operator), operator_l2(weight * 2.0**exponent, operator)
    assert scaled.lower == pytest.approx(plain.lower * 2.0**exponent, rel=1e-15)
    assert scaled.upper == pytest.approx(plain.upper * 2.0**exponent, rel=1e-15)


def test_zero_layers_and_dead_channels() -> None:
    operator = Operator("convolution", padding=((1, 1), (1, 1)), size=(5, 5))
    norms = layer_norms(torch.zeros(3, 2, 3, 3), operator)
    assert norms.operator_l2.upper == norms.operator_linf.upper == norms.reshaped.upper == 0.0
    weight = kernel("gauss", (4, 2, 3, 3), 0, 1.0)
    dead = torch.cat([weight, torch.zeros(2, 2, 3, 3)])
    assert operator_l2(dead, operator).upper == pytest.approx(operator_l2(weight, operator).upper, rel=1e-6)


def test_a_kernel_that_meets_only_padding() -> None:
    operator = Operator("convolution", stride=(4,), padding=((2, 2),), size=(1,))
    weight = torch.tensor([[[1.0]]])
    assert layer_norms(weight, operator).operator_linf.upper == 0.0
    assert operator_l2(weight, operator).lower == 0.0


# --- what is refused ---

PLAIN = Operator("convolution", size=(5, 5))


@pytest.mark.parametrize(
    ("shape", "operator", "message"),
    [
        ((0, 2, 3, 3), PLAIN, "without entries"),
        ((2, 0, 3, 3), PLAIN, "without entries"),
        ((2, 2, 0, 3), PLAIN, "without entries"),
        ((2, 2), PLAIN, "axes are not those"),
        ((2, 2, 3), PLAIN, "axes are not those"),
        ((2, 2, 3, 3, 3), Operator("convolution"), "axes are not those"),
        ((2, 2, 3, 3), Operator("convolution", stride=(2,)), "axes are not those"),
        ((3, 2, 3, 3), Operator("convolution", groups=2), "groups that do not divide"),
        ((2, 2, 6, 3), PLAIN, "too small"),
        ((2, 2, 3), Operator("convolution", padding=((3, 3),), padding_mode="reflect", size=(3,)), "too small"),
        ((2, 2, 3), Operator("convolution", padding=((4, 3),), padding_mode="circular", size=(3,)), "too small"),
        ((2, 2, 3), Operator("transposed", padding=((2, 2),), size=(1,)), "too small"),
        ((2, 2, 3), Operator("transposed", stride=(2,), output_padding=(2,)), "output padding"),
        ((2, 2, 3), Operator(), "a matrix"),
        ((2, 2), Operator(groups=2), "a matrix"),
        ((0, 2), Operator("embedding"), "without entries"),
    ],
    ids=str,
)
def test_what_does_not_fit_names_the_layer(shape: tuple[int, ...], operator: Operator, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^layer1\.conv: .*{message}"):
        layer_norms(torch.zeros(shape), operator, where="layer1.conv")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operator", [PLAIN, replace(PLAIN, kind="transposed"), Operator(), Operator("embedding")])
def test_entries_must_be_finite(bad: float, operator: Operator) -> None:
    weight = torch.ones(2, 2, 3, 3) if operator.is_convolution else torch.ones(2, 2)
    weight[1, 1] = bad
    with pytest.raises(CorruptModelError, match=r"^fc: entries that are not finite"):
        layer_norms(weight, operator, where="fc")


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": 0}, {"stride": (0,)}, {"dilation": (1, 0)}, {"size": (0, 3)}, {"padding": ((-1, 0),)}, {"axis": 2},
        {"kind": "transposed", "padding_mode": "reflect"}, {"kind": "convolution", "output_padding": (1,)},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_operators(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Operator(**fields)


def test_only_convolutions_have_the_convolutions_norms() -> None:
    for norm in (operator_l2, operator_linf):
        with pytest.raises(UsageError, match="fc: not a convolution"):
            norm(torch.ones(2, 2), Operator(), where="fc")
    assert reshaped_l2(torch.ones(2, 2)).value == pytest.approx(2.0)
