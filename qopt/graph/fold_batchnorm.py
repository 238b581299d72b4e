"""Folding batch normalisation into the weights before it."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.graph.names import unique, value_names

_FOLDS: Final = ("Conv", "ConvTranspose", "Gemm")

Array = NDArray[np.float64]


def fold_batchnorm(model: ir.Model) -> int:
    """Fold each BatchNormalization into the Conv, ConvTranspose or Gemm that alone feeds it.

    With ``s = scale / sqrt(var + epsilon)`` per channel, ``W' = s W`` and ``b' = s (b - mean) + shift``, computed
    in float64. The weight keeps its name. A norm stays where its producer has another reader, where the weight has
    another use, or where the result is not finite.

    Returns:
        The number of norms folded.
    """
    folded = 0
    for norm in list(model.graph):
        if norm.op_type == "BatchNormalization" and _fold(model.graph, norm):
            folded += 1
    return folded


def _fold(graph: ir.Graph, norm: ir.Node) -> bool:
    data = norm.inputs[0]
    layer = data.producer() if data is not None else None
    if layer is None or data is None or layer.op_type not in _FOLDS or not _sole_reader(data, norm):
        return False
    statistics = [_constant(value) for value in norm.inputs[1:5]]
    weight, weight_value = _constant(layer.inputs[1]), layer.inputs[1]
    if weight is None or weight_value is None or len(weight_value.uses()) != 1:
        return False
    if any(array is None for array in statistics) or len(norm.outputs) != 1 or not _plain(layer):
        return False
    axis, groups = _channels(layer)
    channels = weight.shape[axis] * (groups if layer.op_type == "ConvTranspose" else 1)
    bias = _bias(layer, channels)
    scale, shift, mean, variance = (array for array in statistics if array is not None)
    if bias is None or scale.shape != (channels,):
        return False
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + _epsilon(norm))
        new_weight = _scaled(weight, factor, axis, groups if layer.op_type == "ConvTranspose" else 1)
        new_bias = (bias - mean) * factor + shift
        stored = new_weight.astype(np.float32), new_bias.astype(np.float32)
    if not all(np.isfinite(array).all() for array in stored):
        return False
    weight_value.const_value = ir.tensor(stored[0], name=weight_value.name)
    _set_bias(graph, layer, stored[1])
    _bypass(graph, layer, norm)
    return True


def _sole_reader(value: ir.Value, reader: ir.Node) -> bool:
    return [use.node for use in value.uses()] == [reader] and not value.is_graph_output()


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy().astype(np.float64) if value.dtype == ir.DataType.FLOAT else None


def _plain(layer: ir.Node) -> bool:
    alpha, beta = layer.attributes.get("alpha"), layer.attributes.get("beta")
    return (alpha is None or alpha.as_float() == 1.0) and (beta is None or beta.as_float() == 1.0)


def _channels(layer: ir.Node) -> tuple[int, int]:
    """The weight's axis of output channels, and the groups."""
    group = layer.attributes.get("group")
    groups = group.as_int() if group is not None else 1
    if layer.op_type == "Gemm":
        transposed = layer.attributes.get("transB")
        return (0 if transposed is not None and transposed.as_int() else 1), groups
    return (0 if layer.op_type == "Conv" else 1), groups


def _bias(layer: ir.Node, channels: int) -> Array | None:
    """The bias as a vector, zeros where there is none, None where it is no constant vector."""
    if len(layer.inputs) < 3 or layer.inputs[2] is None:
        return np.zeros(channels)
    bias = _constant(layer.inputs[2])
    if bias is None or bias.shape not in ((), (1,), (channels,), (1, channels)):
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,))


def _epsilon(norm: ir.Node) -> float:
    epsilon = norm.attributes.get("epsilon")
    return epsilon.as_float() if epsilon is not None else 1e-5


def _scaled(weight: Array, factor: Array, axis: int, groups: int) -> Array:
    if groups == 1:
        return weight * factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    # ConvTranspose: rows of the input axis belong to groups, and each group has output channels of its own
    inputs, outputs = weight.shape[:2]
    grouped = weight.reshape(groups, inputs // groups, outputs, -1) * factor.reshape(groups, 1, outputs, 1)
    return grouped.reshape(weight.shape)


def _set_bias(graph: ir.Graph, layer: ir.Node, bias: NDArray[np.float32]) -> None:
    old = layer.inputs[2] if len(layer.inputs) > 2 else None
    weight = layer.inputs[1]
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(bias, name=old.name)
        old.shape = ir.Shape(bias.shape)
        return
    assert weight is not None
    assert weight.name is not None
    taken = value_names(graph)
    name = unique(weight.name.removesuffix(".weight") + ".bias", taken.__contains__)
    tensor = ir.tensor(bias, name=name)
    value = ir.Value(name=name, shape=ir.Shape(bias.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.register_initializer(value)
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, value)


def _bypass(graph: ir.Graph, layer: ir.Node, norm: ir.Node) -> None:
    """Let the layer compute the norm's output, under the norm's name if that is the graph's output."""
    output, kept = norm.outputs[0], layer.outputs[0]
    name = output.name if output.is_graph_output() else None
    output.replace_all_uses_with(kept, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    if name is not None:
        kept.name = name
