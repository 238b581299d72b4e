"""The functions that carry ONNX's rules on shapes, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.graph.operators import arithmetic, shape

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
FEW = settings(max_examples=60)


def _numbered(sizes: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(sizes)), dtype=np.float32).reshape(sizes)


def _same(got: torch.Tensor, expected: Any) -> None:
    assert tuple(got.shape) == np.asarray(expected).shape
    assert np.array_equal(got.numpy(), expected)


def _as_given(numbers: list[int], computed: bool) -> Any:
    return torch.tensor(numbers) if computed else tuple(numbers)


@FEW
@given(sizes=SHAPES, data=st.data(), computed=st.booleans())
def test_slices(sizes: tuple[int, ...], data: st.DataObject, computed: bool) -> None:
    x = _numbered(sizes)
    axes = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True, min_size=1))
    ends = st.one_of(st.integers(-7, 7), st.sampled_from([2**31 - 1, 2**63 - 1, -(2**31)]))
    starts = [data.draw(st.integers(-7, 7)) for _ in axes]
    stops = [data.draw(ends) for _ in axes]
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
    cut = [slice(None)] * len(sizes)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        cut[axis] = slice(start, stop, step)
    signed = tuple(axis - len(sizes) * data.draw(st.integers(0, 1)) for axis in axes)
    first, last = _as_given(starts, computed), _as_given(stops, computed)
    _same(shape.sliced(torch.from_numpy(x), first, last, signed, tuple(steps)), x[tuple(cut)])


@FEW
@given(sizes=SHAPES, index=SHAPES, data=st.data())
def test_gathers(sizes: tuple[int, ...], index: tuple[int, ...], data: st.DataObject) -> None:
    x = _numbered(sizes)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    size = sizes[axis]
    chosen = np.array([data.draw(st.integers(-size, size - 1)) for _ in range(int(np.prod(index)))]).reshape(index)
    expected = np.take(x, chosen, axis)
    _same(shape.gathered(torch.from_numpy(x), torch.from_numpy(chosen), axis), expected)


@FEW
@given(sizes=SHAPES, mode=st.sampled_from(["constant", "edge", "reflect"]), data=st.data())
def test_pads(sizes: tuple[int, ...], mode: str, data: st.DataObject) -> None:
    x = _numbered(sizes)
    widths = [(data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))) for _ in sizes]
    expected = np.pad(x, widths, mode=mode)  # type: ignore[call-overload]
    before, after = tuple(low for low, _ in widths), tuple(high for _, high in widths)
    _same(shape.padded(torch.from_numpy(x), before, after, tuple(range(-len(sizes), 0)), mode, 0), expected)


@FEW
@given(sizes=SHAPES, data=st.data(), computed=st.booleans())
def test_broadcasts(sizes: tuple[int, ...], data: st.DataObject, computed: bool) -> None:
    dropped = [data.draw(st.booleans()) for _ in sizes]
    x = _numbered(tuple(1 if drop else size for size, drop in zip(sizes, dropped, strict=True)))
    target = [data.draw(st.integers(1, 3)), *sizes]
    target = [
        size if drop or place == 0 else 1
        for place, (size, drop) in enumerate(zip(target, [True, *dropped], strict=True))
    ]
    expected = np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(target)))
    _same(shape.broadcast(torch.from_numpy(x), _as_given(target, computed)), expected)


@FEW
@given(sizes=SHAPES, data=st.data(), computed=st.booleans())
def test_reshapes(sizes: tuple[int, ...], data: st.DataObject, computed: bool) -> None:
    x = _numbered(sizes)
    target = [0 if data.draw(st.booleans()) else size for size in sizes]
    if data.draw(st.booleans()):
        target[data.draw(st.integers(0, len(sizes) - 1))] = -1
    _same(shape.reshape_like(torch.from_numpy(x), _as_given(target, computed), allowzero=False), x)


def test_zero_is_a_size_with_allowzero() -> None:
    assert shape.reshape_like(torch.zeros(0, 3), (3, 0), allowzero=True).shape == (3, 0)


@FEW
@given(sizes=SHAPES, data=st.data())
def test_matrices(sizes: tuple[int, ...], data: st.DataObject) -> None:
    x = _numbered(sizes)
    axis = data.draw(st.integers(-len(sizes), len(sizes)))
    rows = int(np.prod(sizes[: axis if axis >= 0 else len(sizes) + axis]))
    _same(shape.as_matrix(torch.from_numpy(x), axis), x.reshape(rows, -1))


@FEW
@given(sizes=SHAPES, data=st.data())
def test_new_axes(sizes: tuple[int, ...], data: st.DataObject) -> None:
    x = _numbered(sizes)
    rank = len(sizes) + 2
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=2, max_size=2, unique=True))
    signed = tuple(axis - rank * data.draw(st.integers(0, 1)) for axis in axes)
    _same(shape.unsqueeze_all(torch.from_numpy(x), signed), np.expand_dims(x, tuple(axes)))


@pytest.mark.parametrize(("size", "parts", "expected"), [(6, 3, [2, 2, 2]), (7, 3, [3, 3, 1]), (5, 2, [3, 2])])
def test_even_splits(size: int, parts: int, expected: list[int]) -> None:
    assert [len(part) for part in shape.split_evenly(torch.zeros(size), parts, 0)] == expected


@pytest.mark.parametrize(("a", "b", "expected"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3)])
def test_integers_divide_towards_zero(a: int, b: int, expected: int) -> None:
    assert arithmetic.divide(torch.tensor(a), torch.tensor(b)) == expected


def test_a_power_keeps_the_type_of_its_base() -> None:
    assert arithmetic.raised(torch.tensor([2, 3]), torch.tensor([2.0])).dtype == torch.int64
    assert arithmetic.raised(torch.tensor([2.0]), torch.tensor([2])).dtype == torch.float32


def test_shapes_stay_beside_their_tensor() -> None:
    x = torch.zeros(2, 3, 4, device="meta")
    assert shape.shape_of(x, 1, None).device.type == "meta"
    assert shape.shape_of(torch.zeros(2, 3, 4), -2, None).tolist() == [3, 4]
    assert shape.size_of(torch.zeros(2, 3)).item() == 6
    assert shape.counted(torch.tensor(1), torch.tensor(6), torch.tensor(2)).tolist() == [1, 3, 5]
    assert shape.filled(torch.tensor([2, 1]), 1.5, torch.float32).tolist() == [[1.5], [1.5]]
