"""Cross-layer equalisation: even out the ranges of the channels between two layers (Nagel et al. 2019, section 4.1).

Between two layers ``f(W1 x + b1)`` and ``W2 y`` whose f is positively homogeneous, channel i can be divided by any
positive ``s_i`` in W1 and b1 and multiplied by it in W2: the network computes the same. With ``r1_i`` and ``r2_i`` the
largest magnitudes of the channel in W1 and W2, ``s_i = sqrt(r1_i r2_i) / r2_i`` (equation 11) makes both
``sqrt(r1_i r2_i)``. A format with one scale for a whole tensor then fits every channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.graph.compare import TOLERANCE, Runner, difference, random_images
from qopt.graph.digest import digest
from qopt.graph.model import Layer, Prepared

DEAD: Final = 2.0**-16
"""A channel whose range is no more than this part of its tensor's largest is dead and keeps its scale: what its bias
adds would otherwise outgrow every other activation."""

CONVERGED: Final = 1e-4
"""Largest ``|log s|`` of a round over all pairs that counts as no change."""

ROUNDS: Final = 200
"""Rounds at most; a chain of n layers needs a number of the order of n squared."""

_ELEMENTWISE: Final = frozenset({"Relu", "LeakyRelu", "Identity"})
_POOLS: Final = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_RESHAPES: Final = frozenset({"Flatten", "Reshape", "Squeeze"})

Array = NDArray[np.float64]


def equalise(prepared: Prepared) -> tuple[Prepared, list[str]]:
    """The same network with equalised channels, and what was done, one clause each.

    Pairs are layers with one use each (Conv, Gemm, MatMul) with nothing between them but ReLU, LeakyReLU, pooling and
    flattening, whose values have no other reader. Pairs are equalised one after the other until nothing moves, so that
    chains settle. What cannot be proven in ONNX Runtime to compute the same (relative difference 1e-5 on random images)
    is undone. ``prepared`` stays as it is; the digest of the result is another one where weights have changed.
    """
    model = prepared.model.clone()
    pairs = _pairs(model, prepared.layers)
    tensors = _Tensors(model)
    rounds = 0
    while pairs and rounds < ROUNDS:
        rounds += 1
        if max([_balance(pair, tensors) for pair in pairs]) <= CONVERGED:
            break
    if not tensors.write():
        return prepared, []
    images = random_images(prepared.input_shape, prepared.batch or 3)
    differs = difference(Runner(model)(images), Runner(prepared.model)(images))
    if differs > TOLERANCE:
        return prepared, [f"cross-layer equalisation undone: relative difference {differs:.1e}"]
    plural = "s" if len(pairs) > 1 else ""
    note = f"{len(pairs)} pair{plural} of layers equalised in {rounds} round{'s' if rounds > 1 else ''}"
    return replace(prepared, model=model, digest=digest(model, prepared.layers)), [note]


@final
@dataclass(frozen=True)
class _Pair:
    """Two layers with homogeneous operators between them."""

    first: Layer
    second: Layer

    @property
    def bias(self) -> str | None:
        return self.first.uses[0].bias


@final
class _Tensors:
    """The constants of a model in float64, rounded once when they are written back."""

    def __init__(self, model: ir.Model) -> None:
        self._initializers = model.graph.initializers
        self._changed: dict[str, Array] = {}

    def get(self, name: str) -> Array:
        value = self._initializers[name].const_value
        assert value is not None
        return self._changed[name] if name in self._changed else value.numpy().astype(np.float64)

    def set(self, name: str, array: Array) -> None:
        self._changed[name] = array

    def write(self) -> bool:
        """Whether anything has changed."""
        for name, array in self._changed.items():
            self._initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
        return bool(self._changed)


def _balance(pair: _Pair, tensors: _Tensors) -> float:
    """Equalise one pair; the largest ``|log s|``, 0 where nothing is to do."""
    first, second = pair.first, pair.second
    weight, following = tensors.get(first.initializer), tensors.get(second.initializer)
    rows = np.moveaxis(weight, first.channel_axis, 0).reshape(first.channels, -1)
    columns = _input_channels(following, second, first.channels)
    own, next_ = np.abs(rows).max(1), np.abs(columns).max((0, 2))
    alive = (own > DEAD * own.max()) & (next_ > DEAD * next_.max())
    scale = np.sqrt(np.where(alive, own, 1.0) / np.where(alive, next_, 1.0))
    moved = float(np.abs(np.log(scale)).max())
    if moved <= CONVERGED:
        return moved
    shape = [-1 if axis == first.channel_axis else 1 for axis in range(weight.ndim)]
    tensors.set(first.initializer, weight / scale.reshape(shape))
    tensors.set(second.initializer, _stored(columns * scale[None, :, None], following.shape, second))
    if pair.bias is not None:
        bias = tensors.get(pair.bias)
        tensors.set(pair.bias, bias / scale.reshape(bias.shape))
    return moved


def _input_channels(weight: Array, layer: Layer, channels: int) -> Array:
    """A weight as (outputs of a group, input channels, rest); flattened features count to the channel they are of."""
    if layer.op != "Conv":
        return np.moveaxis(weight, layer.channel_axis, 0).reshape(layer.channels, channels, -1)
    grouped = weight.reshape(layer.groups, layer.channels // layer.groups, channels // layer.groups, -1)
    return grouped.swapaxes(0, 1).reshape(layer.channels // layer.groups, channels, -1)


def _stored(columns: Array, shape: Sequence[int], layer: Layer) -> Array:
    """What `_input_channels` was made from, of shape ``shape``."""
    if layer.op != "Conv":
        moved = columns.reshape(layer.channels, -1)
        return moved if layer.channel_axis == 0 else moved.T
    outputs, channels, rest = columns.shape
    grouped = columns.reshape(outputs, layer.groups, channels // layer.groups, rest)
    return grouped.swapaxes(0, 1).reshape(shape)


def _pairs(model: ir.Model, layers: Sequence[Layer]) -> list[_Pair]:
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for node in model.graph for value in node.outputs}
    single = [layer for layer in layers if len(layer.uses) == 1 and layer.op != "ConvTranspose"]
    readers = {nodes[layer.uses[0].node]: layer for layer in single}
    found = []
    for layer in single:
        bias = layer.uses[0].bias
        reader = _next_node(values[layer.uses[0].output], layer)
        second = None if reader is None else readers.get(reader)
        if second is not None and (bias is None or len(model.graph.initializers[bias].uses()) == 1):
            found.append(_Pair(layer, second))
    return found


def _next_node(value: ir.Value, layer: Layer) -> ir.Node | None:
    """The first node after a layer that is not homogeneous, where it alone reads the layer's channels."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        node, axis = use.node, _axis(layer.op, value)
        if node.op_type not in _ELEMENTWISE | _POOLS | _RESHAPES:
            same = axis is not None and axis == _axis(node.op_type, value)
            return node if use.idx == 0 and same else None
        keeps = node.op_type in _ELEMENTWISE or (
            axis == 1 and (node.op_type in _POOLS or _flattens(value, node.outputs[0]))
        )
        others = [output for output in node.outputs[1:] if output.uses() or output.is_graph_output()]
        if use.idx or not keeps or others:
            return None
        value = node.outputs[0]
    return None


def _axis(op_type: str, value: ir.Value) -> int | None:
    """The axis of channels before and behind a layer: the second of convolutions, the last of products if known."""
    if op_type == "Conv":
        return 1
    return None if value.shape is None else len(value.shape) - 1


def _flattens(source: ir.Value, result: ir.Value) -> bool:
    """Whether all axes but the first become one, in order: the features of a channel stay together."""
    if source.shape is None or result.shape is None or len(result.shape) != 2:
        return False
    sizes = [dim for dim in source.shape[1:] if isinstance(dim, int)]
    return len(sizes) == len(source.shape) - 1 and result.shape[1] == prod(sizes)
