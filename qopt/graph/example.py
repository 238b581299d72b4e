"""Inputs drawn at random for a graph of which nobody says what they mean: token ids, masks, pictures of any size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.errors import UnsupportedModelError, UsageError, nearest
from qopt.graph.compare import Runner
from qopt.graph.model import Feeds, GraphInput
from qopt.seeds import derive

BATCHES: Final = (2, 1)
"""Sizes that are tried for a dynamic first axis."""

SIZES: Final = (16, 8, 32, 64, 2, 224, 1)
"""Sizes that are tried for all other dynamic axes together."""

RUNS: Final = 2
"""Inputs of as many sizes are kept: a graph that was bound to one size by mistake does not take the other."""

LARGEST_INDEX: Final = 1000
"""Integers are drawn below it, or below the smallest table that they index."""

Integers = Literal["drawn", "ones", "zeros"]
"""How integers that index a table are chosen; all others are ones, which as a mask hide nothing."""

_INTEGERS: Final[tuple[Integers, ...]] = ("drawn", "ones", "zeros")


def graph_inputs(model: ir.Model) -> tuple[GraphInput, ...]:
    """What the graph takes; every input needs a type and a known number of axes."""
    found = []
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
        found.append(GraphInput(str(value.name), value.dtype.name, shape))
    return tuple(found)


def running_examples(model: ir.Model, axes: Mapping[str, int]) -> list[tuple[Feeds, list[Any]]]:
    """Inputs that the graph takes, each with its outputs: one, or `RUNS` of different sizes where it takes those.

    Floats are uniform in [0, 1); integers that index tables lie below the smallest of these; masks, and integers that
    index nothing, are ones. Dynamic axes of one name have one size, and ``a + b`` is the sum of the two.

    Args:
        model: a valid graph.
        axes: sizes of dynamic axes by name, or, for one without a name, by ``INPUT.AXIS``; the others are tried.

    Raises:
        UsageError: no such dynamic axis, or a size that is none.
        UnsupportedModelError: an input of a type that cannot be drawn, or nothing that was drawn runs.
    """
    free = _dynamic(model)
    _check_axes(axes, free)
    runner, limits = Runner(model), index_limits(model)
    found: list[tuple[Feeds, list[Any]]] = []
    failure: UnsupportedModelError | None = None
    for sizes in _guesses(free, axes):
        for integers in _INTEGERS:
            feeds = draw(model, sizes, limits, integers)
            try:
                found.append((feeds, runner.all(feeds)))
                break
            except UnsupportedModelError as error:
                failure = failure or error
        if len(found) == RUNS:
            break
    if not found:
        raise _nothing_runs(model, free, failure)
    return found


def draw(
    model: ir.Model, sizes: Mapping[str, int], limits: Mapping[str, int], integers: Integers = "drawn", seed: int = 0
) -> dict[str, NDArray[Any]]:
    """One value for every input; ``sizes`` by name of the axis, ``limits`` as `index_limits` returns them."""
    feeds = {}
    for value in model.graph.inputs:
        name = str(value.name)
        assert value.shape is not None
        shape = [_size(key, sizes) if isinstance(key, str) else key for key in _axis_names(value)]
        generator = np.random.default_rng(derive(seed, "graph", "inputs", name))
        feeds[name] = _drawn(value, shape, limits.get(name), integers, generator)
    return feeds


def index_limits(model: ir.Model) -> dict[str, int]:
    """Input to the smallest number of rows of any constant table that `Gather` reads by values computed from it."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        reached, rows = {value}, []
        for node in model.graph:
            if node.op_type in ("Shape", "Size") or not any(used in reached for used in node.inputs):
                continue
            if node.op_type == "Gather" and node.inputs[1] in reached:
                rows += _rows(node)
            reached.update(out for out in node.outputs if out.dtype is None or not out.dtype.is_floating_point())
        if rows and _is_integer(value):
            limits[str(value.name)] = min(rows)
    return limits


def _rows(node: ir.Node) -> list[int]:
    table = node.inputs[0]
    if table is None or table.const_value is None:
        return []
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = table.const_value.shape.numpy()
    return [shape[axis]] if shape else []


def _drawn(
    value: ir.Value, shape: Sequence[int], limit: int | None, integers: Integers, generator: np.random.Generator
) -> NDArray[Any]:
    dtype = value.dtype
    assert dtype is not None
    if dtype is ir.DataType.STRING:
        raise UnsupportedModelError("an input of text cannot be drawn", where=f"input {value.name!r}")
    kind = dtype.numpy()
    if "mask" in str(value.name).lower() or dtype is ir.DataType.BOOL or (_is_integer(value) and limit is None):
        return np.ones(shape, kind)
    if dtype.is_floating_point():
        return np.asarray(generator.random(shape), kind)
    if integers == "drawn":
        return np.asarray(generator.integers(0, min(limit or 1, LARGEST_INDEX), shape), kind)
    return np.full(shape, integers == "ones", kind)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _axis_names(value: ir.Value) -> list[int | str]:
    """The sizes of an input, for dynamic axes their names."""
    assert value.shape is not None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return [f"{value.name}.{axis}" if dim is None else dim for axis, dim in enumerate(dims)]


def _dynamic(model: ir.Model) -> dict[str, bool]:
    """Every dynamic axis, sums taken apart, with whether it is some input's first and never anything else."""
    first: dict[str, bool] = {}
    for value in model.graph.inputs:
        names = _axis_names(value)
        for axis, name in enumerate(names):
            for part in _parts(name) if isinstance(name, str) else []:
                first[part] = first.get(part, True) and axis == 0 and len(names) > 1
    return first


def _parts(name: str) -> list[str]:
    return [part for part in (text.strip() for text in name.split("+")) if not part.isdigit()]


def _size(name: str, sizes: Mapping[str, int]) -> int:
    parts = [text.strip() for text in name.split("+")]
    return sum(int(part) if part.isdigit() else sizes[part] for part in parts)


def _check_axes(axes: Mapping[str, int], free: Mapping[str, bool]) -> None:
    for name, size in axes.items():
        if name not in free:
            raise UsageError("the network has no such dynamic axis", where=f"--axis {name}", fix=nearest(name, free))
        if size < 1:
            raise UsageError("an axis must have a size", where=f"--axis {name}", expected="at least 1", got=str(size))


def _guesses(free: Mapping[str, bool], axes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try, each combination once; the first two differ in all axes that are tried."""
    tried: list[dict[str, int]] = []
    for batch, size in product(BATCHES, SIZES):
        sizes = {name: axes.get(name, batch if first else size) for name, first in free.items()}
        if sizes not in tried:
            tried.append(sizes)
            yield sizes


def _nothing_runs(
    model: ir.Model, free: Mapping[str, bool], failure: UnsupportedModelError | None
) -> UnsupportedModelError:
    named = ", ".join(map(str, graph_inputs(model)))
    sizes = f"give sizes that it takes, such as --axis {next(iter(free), 'batch')}=128"
    return UnsupportedModelError(
        "the network runs on none of the inputs that were drawn for it", where=f"inputs {named}",
        got=None if failure is None else failure.got, fix=sizes if free else "export it for inputs of any value",
    )  # fmt: skip
