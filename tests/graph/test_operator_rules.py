"""The functions that carry ONNX's rules on order, indices, casts and grids, against numpy and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.graph.compare import Runner, difference, random_images
from qopt.graph.operators import along_axis, arithmetic, attention, indexing, reduction, shape, types
from qopt.graph.operators.interpolation import Rules, taps
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 999)
FEW = settings(max_examples=50)
Array = NDArray[Any]


def _draw(sizes: tuple[int, ...], seed: int, levels: int = 4) -> Array:
    """Few levels, so that there are equals."""
    return np.random.default_rng(seed).integers(0, levels, sizes).astype(np.float32)


def _same(got: torch.Tensor, expected: Any) -> None:
    assert tuple(got.shape) == np.asarray(expected).shape
    assert np.array_equal(got.numpy(), expected)


# --- along an axis -----------------------------------------------------------------------------------------------


@FEW
@given(sizes=SHAPES, seed=SEEDS, data=st.data(), last=st.booleans(), largest=st.booleans(), keep=st.booleans())
def test_places(sizes: tuple[int, ...], seed: int, data: st.DataObject, last: bool, largest: bool, keep: bool) -> None:
    x = _draw(sizes, seed)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    find = np.argmax if largest else np.argmin
    expected = sizes[axis] - 1 - find(np.flip(x, axis), axis) if last else find(x, axis)
    expected = np.expand_dims(expected, axis) if keep else expected
    _same(along_axis.place_of(torch.from_numpy(x), axis, keep, last, largest), expected)


@FEW
@given(sizes=SHAPES, seed=SEEDS, data=st.data(), largest=st.booleans())
def test_first_sorted_takes_the_first_of_equals(
    sizes: tuple[int, ...], seed: int, data: st.DataObject, largest: bool
) -> None:
    x = _draw(sizes, seed)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    count = data.draw(st.integers(0, sizes[axis]))
    order = np.argsort(-x if largest else x, axis, kind="stable").take(range(count), axis)
    values, places = along_axis.first_sorted(torch.from_numpy(x), torch.tensor([count]), axis, largest)
    _same(places, order)
    _same(values, np.take_along_axis(x, order, axis))


@FEW
@given(
    sizes=SHAPES, seed=SEEDS, data=st.data(), exclusive=st.booleans(), backwards=st.booleans(), product=st.booleans()
)
def test_running_totals(
    sizes: tuple[int, ...], seed: int, data: st.DataObject, exclusive: bool, backwards: bool, product: bool
) -> None:
    x = _draw(sizes, seed)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    rows = np.moveaxis(np.flip(x, axis) if backwards else x, axis, 0)
    total = np.empty_like(rows)
    state = np.full_like(rows[0], 1 if product else 0)
    for place, row in enumerate(rows):
        following = state * row if product else state + row
        total[place] = state if exclusive else following
        state = following
    expected = np.moveaxis(total, 0, axis)
    expected = np.flip(expected, axis) if backwards else expected
    _same(along_axis.running(torch.from_numpy(x), torch.tensor(axis), exclusive, backwards, product), expected)


@FEW
@given(rows=st.integers(1, 4), places=st.integers(1, 5), seed=SEEDS, data=st.data())
def test_rows_reversed_as_far_as_they_reach(rows: int, places: int, seed: int, data: st.DataObject) -> None:
    x = _draw((places, rows, 2), seed)
    lengths = [data.draw(st.integers(1, places)) for _ in range(rows)]
    expected = x.copy()
    for row, length in enumerate(lengths):
        expected[:length, row] = x[:length, row][::-1]
    _same(along_axis.reversed_rows(torch.from_numpy(x), torch.tensor(lengths), 1, 0), expected)


@FEW
@given(sizes=SHAPES, seed=SEEDS, data=st.data(), keep=st.booleans(), kind=st.sampled_from(sorted(reduction._REDUCERS)))
def test_reductions_over_axes_that_are_computed(
    sizes: tuple[int, ...], seed: int, data: st.DataObject, keep: bool, kind: str
) -> None:
    x = 1 + _draw(sizes, seed) / 10  # products of a hundred of them stay finite
    axes = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True))
    over = tuple(axes) if axes else None
    expected = {
        "ReduceL1": lambda: np.abs(x).sum(over, keepdims=keep),
        "ReduceL2": lambda: np.sqrt((x * x).sum(over, keepdims=keep)),
        "ReduceLogSum": lambda: np.log(x.sum(over, keepdims=keep)),
        "ReduceLogSumExp": lambda: np.log(np.exp(x).sum(over, keepdims=keep)),
        "ReduceMax": lambda: x.max(over, keepdims=keep),
        "ReduceMean": lambda: x.mean(over, keepdims=keep),
        "ReduceMin": lambda: x.min(over, keepdims=keep),
        "ReduceProd": lambda: x.prod(over, keepdims=keep),
        "ReduceSum": lambda: x.sum(over, keepdims=keep),
        "ReduceSumSquare": lambda: (x * x).sum(over, keepdims=keep),
    }[kind]()
    got = reduction.reduce_computed(torch.from_numpy(x), torch.tensor(axes, dtype=torch.int64), kind, keep, False)
    assert tuple(got.shape) == np.asarray(expected).shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
    alone = reduction.reduce_computed(torch.from_numpy(x), torch.zeros(0, dtype=torch.int64), kind, keep, True)
    assert alone.shape == x.shape


# --- by index ----------------------------------------------------------------------------------------------------


@FEW
@given(sizes=SHAPES, seed=SEEDS, data=st.data())
def test_elements_read_and_written(sizes: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    x = generator.standard_normal(sizes).astype(np.float32)
    order = np.argsort(generator.standard_normal(sizes), axis)  # every place once, so that no write is overwritten
    signed = np.where(generator.random(sizes) < 0.5, order, order - sizes[axis])
    index = torch.from_numpy(signed)
    _same(indexing.gathered_elements(torch.from_numpy(x), index, axis), np.take_along_axis(x, order, axis))
    updates = generator.standard_normal(sizes).astype(np.float32)
    written, added = x.copy(), x.copy()
    np.put_along_axis(written, order, updates, axis)
    np.put_along_axis(added, order, np.take_along_axis(x, order, axis) + updates, axis)
    for expected, how in ((written, None), (added, "sum")):
        _same(indexing.scattered_elements(torch.from_numpy(x), index, torch.from_numpy(updates), axis, how), expected)


@FEW
@given(sizes=SHAPES, seed=SEEDS, data=st.data())
def test_slices_read_and_written(sizes: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(sizes).astype(np.float32)
    width = data.draw(st.integers(1, len(sizes)))
    places = [place for place in np.ndindex(*sizes[:width]) if generator.random() < 0.5] or [(0,) * width]
    index = torch.tensor([[p - s * (p % 2) for p, s in zip(place, sizes[:width], strict=True)] for place in places])
    _same(indexing.gathered_slices(torch.from_numpy(x), index, 0), np.stack([x[place] for place in places]))
    updates = generator.standard_normal((len(places), *sizes[width:])).astype(np.float32)
    expected = x.copy()
    for place, update in zip(places, updates, strict=True):
        expected[place] = np.maximum(expected[place], update)
    got = indexing.scattered_slices(torch.from_numpy(x), index, torch.from_numpy(updates), "amax")
    _same(got, expected)


@FEW
@given(sizes=SHAPES, data=st.data(), depth=st.integers(1, 4), seed=SEEDS)
def test_hot_places(sizes: tuple[int, ...], data: st.DataObject, depth: int, seed: int) -> None:
    index = np.random.default_rng(seed).integers(-2 * depth, 2 * depth, sizes)
    axis = data.draw(st.integers(-len(sizes) - 1, len(sizes)))
    place = axis % (len(sizes) + 1)
    expected = np.full((*sizes[:place], depth, *sizes[place:]), 3.0, np.float32)
    for where in np.ndindex(*sizes):
        if -depth <= index[where] < depth:
            expected[(*where[:place], index[where] % depth, *where[place:])] = 7.0
    got = indexing.hot(torch.from_numpy(index), torch.tensor(depth), torch.tensor([3.0, 7.0]), axis)
    _same(got, expected)


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (2, False), (4, False), (16, False), (32, False)])
def test_narrow_casts_wrap_round(bits: int, signed: bool) -> None:
    dtype = ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
    low, high = types.code_range(dtype)
    assert high - low + 1 == 2**bits
    numbers = [0, 1, -1, low, high, low - 1, high + 1, 3 * 2**bits + 1]
    got = types.to_narrow(torch.tensor(numbers, dtype=torch.float64), types.CARRIERS[dtype], low, high).tolist()
    assert got == [(number - low) % 2**bits + low for number in numbers]


@pytest.mark.parametrize("dtype", [d for d in types.CARRIERS if d != ir.DataType.BFLOAT16])
def test_constants_keep_their_numbers(dtype: ir.DataType) -> None:
    numbers = [0, 1] if dtype == ir.DataType.BOOL else [0, 1, 1]
    array = np.array(numbers).astype(dtype.numpy())
    held = types.carried(array, dtype)
    assert held.dtype == types.CARRIERS[dtype]
    assert held.to(torch.int64).tolist() == numbers
    with pytest.raises(TypeError, match="STRING"):
        types.carried(array, ir.DataType.STRING)


def test_bits_leave_on_the_left() -> None:
    assert arithmetic.shifted_left(torch.tensor(200, dtype=torch.uint8), torch.tensor(1), 255).item() == 144
    assert arithmetic.flipped(torch.tensor(5, dtype=torch.int32), 65535).item() == 65530


# --- grids -------------------------------------------------------------------------------------------------------

PLAIN = Rules("linear", "half_pixel", "round_prefer_floor", -0.75, False, False, 0.0)


@FEW
@given(old=st.integers(1, 9), new=st.integers(1, 20), cubic=st.booleans(), smooth=st.booleans(), out=st.booleans())
def test_weights_of_taps_sum_to_one(old: int, new: int, cubic: bool, smooth: bool, out: bool) -> None:
    rules = PLAIN._replace(mode="cubic" if cubic else "linear", antialias=smooth, exclude_outside=out)
    index, weights, _ = taps(old, new, new / old, (0.0, 1.0), rules)
    assert index.shape == weights.shape
    assert (index >= 0).all()
    assert (index < old).all()
    assert torch.allclose(weights.sum(1), torch.ones(new, dtype=torch.float64))


@FEW
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    how=st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    antialias=st.booleans(),
)
def test_any_resize(sizes: tuple[int, int], mode: str, how: str, rounding: str, antialias: bool, graph: Any) -> None:
    """To any size by every mode; coordinates are rounded as ONNX Runtime rounds them."""
    g = graph((2, 7, 9))
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how, "nearest_mode": rounding}
    if antialias and mode != "nearest":
        attributes["antialias"] = 1
    result = g.op("Resize", "x", "", "", g.ints(*sizes), axes=[2, 3], **attributes)
    prepared = prepare(g.model(g.op("Flatten", result)))
    twin = build_twin(prepared)
    images = random_images((2, 7, 9), 2)
    assert difference(twin(torch.from_numpy(images)).numpy(), Runner(prepared.model)(images)) <= 1e-5


# --- what is computed when the twin runs -------------------------------------------------------------------------


def test_shapes_that_are_computed() -> None:
    x = torch.arange(12.0).reshape(3, 1, 4)
    assert shape.squeeze_all(x, torch.tensor([1])).shape == (3, 4)
    assert shape.unsqueeze_all(x, torch.tensor([0, -1])).shape == (1, 3, 1, 4, 1)
    assert [part.shape[0] for part in shape.split_by(x, torch.tensor([1, 2]), 0)] == [1, 2]
    assert shape.padded_by(x, torch.tensor([1, 0]), torch.tensor([2]), "constant", torch.tensor(5.0))[0, 0, 0] == 5
    assert shape.padded_by(x, torch.tensor([0, 0, 1, 0, 0, 0]), None, "wrap", 0.0)[0, 0].tolist() == [3, 0, 1, 2, 3]
    cut = shape.sliced(x, (0,), (9,), torch.tensor([2]), torch.tensor([2]))
    assert cut[0, 0].tolist() == [0, 2]


def test_a_query_that_sees_nothing_gets_zeros_and_a_gradient() -> None:
    query = torch.ones(1, 1, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    result, *_ = attention.attended(
        query, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), mask, None, None, None,
        scale=None, causal=False, heads=(1, 1), softcap=0.0, shown=0, window=(-1, -1),
    )  # fmt: skip
    assert result[0, 0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert torch.autograd.grad(result.sum(), query)[0].isfinite().all()
