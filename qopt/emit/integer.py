"""Which layers a stock ONNX Runtime runs on integer kernels, and which it would leave in float at a loss.

A layer whose weight ends in DequantizeLinear and does not fuse dequantizes it in every run: such a layer gets its
weight in the form that folds to float. What fuses was measured with ONNX Runtime 1.31 on the CPU:

- ConvTranspose has no integer kernel; Conv over one or two axes, Gemm and MatMul have one.
- The input must be quantized, and for a convolution also the output, after a Relu or Clip that the codes make
  redundant; a Gemm or MatMul may write float.
- A single Relu or Clip behind the node that the codes do not make redundant, and that has one reader, blocks fusion.
- A MatMul of rank 2 with a bias becomes a Gemm, which fuses like one; after it only where qopt knows the bias.

Besides, a kernel's accumulator holds no bias that is far larger than the weight's scale. `fit_scales` mends that by a
larger scale and codes near zero, which grids without a zero level do not have: such a layer stays in float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.emit.accumulator import IntegerLayer, fit_scales, round_bias, scales_fit, smallest_scales
from qopt.emit.biases import bias_of
from qopt.graph.model import Layer, Prepared, Use
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.patterns import has_integer_levels

_End = Literal["codes", "float", "blocked"]
_Nodes = Mapping[str | None, ir.Node]


def runs_on_integers(layer: Layer, quantized: Quantized) -> bool:
    """What the layer alone tells: its operator has integer kernels, which take its levels and all its inputs.

    `integer_layers` also looks at what follows the layer.
    """
    weight = quantized.weights.get(layer.name)
    return (
        weight is not None
        and layer.op != "ConvTranspose"
        and has_integer_levels(weight)
        and all(use.input in quantized.activations for use in layer.uses)
    )


def integer_layers(prepared: Prepared, quantized: Quantized) -> frozenset[str]:
    """Names of the layers that are emitted for integer kernels; a weight is shared, so all its uses must fuse."""
    nodes = {node.name: node for node in prepared.model.graph}
    return frozenset(
        layer.name
        for layer in prepared.layers
        if runs_on_integers(layer, quantized)
        and all(_fuses(layer, index, nodes[use.node], quantized) for index, use in enumerate(layer.uses))
        and _holds_biases(prepared, layer, nodes, quantized)
    )


def integer_parts(prepared: Prepared, quantized: Quantized) -> dict[str, IntegerLayer]:
    """What integer kernels compute, for every layer of `integer_layers`, in graph order."""
    nodes = {node.name: node for node in prepared.model.graph}
    chosen = integer_layers(prepared, quantized)
    return {layer.name: _part(prepared, layer, nodes, quantized) for layer in prepared.layers if layer.name in chosen}


def makes_redundant(code: AffineRange, node: ir.Node) -> bool:
    """Whether ``node`` is a Relu or Clip and changes no value that ``code`` would not clip to the same code."""
    if node.op_type == "Relu":
        return code.zero_point == 0
    if node.op_type != "Clip":
        return False
    low, high = _bound(node, 1, -math.inf), _bound(node, 2, math.inf)
    return _code(low, code) <= 0 and _code(high, code) >= code.largest_code


def _part(prepared: Prepared, layer: Layer, nodes: _Nodes, quantized: Quantized) -> IntegerLayer:
    gemms = [_becomes_gemm(layer, index, nodes[use.node], quantized) for index, use in enumerate(layer.uses)]
    added = _added(prepared, layer, gemms, quantized)
    weight = fit_scales(quantized.weights[layer.name], smallest_scales(added.values(), layer.channels))
    biases = {index: round_bias(bias, weight, code) for index, (bias, code) in added.items()}
    return IntegerLayer(weight, biases, any(gemms))


def _added(
    prepared: Prepared, layer: Layer, gemms: list[bool], quantized: Quantized
) -> dict[int, tuple[NDArray[np.float32], AffineRange]]:
    """The biases that the kernels add: number of the use to the bias (channels,) and the codes of its input."""
    biases = {index: bias_of(prepared, layer, index, quantized) for index in range(len(layer.uses))}
    return {
        index: (bias, quantized.activations[layer.uses[index].input])
        for index, bias in biases.items()
        if bias is not None and (gemms[index] or layer.op == "Conv")
    }


def _holds_biases(prepared: Prepared, layer: Layer, nodes: _Nodes, quantized: Quantized) -> bool:
    gemms = [_becomes_gemm(layer, index, nodes[use.node], quantized) for index, use in enumerate(layer.uses)]
    smallest = smallest_scales(_added(prepared, layer, gemms, quantized).values(), layer.channels)
    return scales_fit(quantized.weights[layer.name], smallest)


def _becomes_gemm(layer: Layer, index: int, node: ir.Node, quantized: Quantized) -> bool:
    return layer.op == "Gemm" or (
        layer.op == "MatMul" and _rank(node) == 2 and _has_bias(layer.name, index, layer.uses[index], quantized)
    )


def _fuses(layer: Layer, index: int, node: ir.Node, quantized: Quantized) -> bool:
    end = _end(_output(layer.uses[index], node), quantized)
    if layer.op == "Conv":
        return end == "codes"
    if layer.op == "MatMul" and _rank(node) == 2 and _unknown_bias(layer, index, node, quantized):
        return False
    return end != "blocked"


def _output(use: Use, node: ir.Node) -> ir.Value:
    """The value that leaves the layer: the node's output, or that of the Add behind a MatMul."""
    product = node.outputs[0]
    if product.name == use.output:
        return product
    return next(iter(product.consumers())).outputs[0]


def _end(value: ir.Value, quantized: Quantized) -> _End:
    """How ONNX Runtime sees the node that ends in ``value``: written as codes, as float, or not to be fused."""
    codes = quantized.activations
    if str(value.name) in codes:
        return "blocked" if value.is_graph_output() else "codes"
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type not in ("Relu", "Clip"):
        return "float"
    clipped = uses[0].node.outputs[0]
    if clipped.is_graph_output():
        return "float"
    code = codes.get(str(clipped.name))
    if code is not None:
        return "codes" if makes_redundant(code, uses[0].node) and not value.is_graph_output() else "blocked"
    return "blocked" if len(list(clipped.uses())) == 1 else "float"


def _unknown_bias(layer: Layer, index: int, node: ir.Node, quantized: Quantized) -> bool:
    """Whether a constant that is not taken for the layer's bias is added to its float output."""
    if _has_bias(layer.name, index, layer.uses[index], quantized) or layer.uses[index].output in quantized.activations:
        return False
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return False
    other = uses[0].node.inputs[1 - uses[0].idx]
    return other is not None and other.is_initializer()


def _has_bias(name: str, index: int, use: Use, quantized: Quantized) -> bool:
    return use.bias is not None or (name, index) in quantized.biases


def _rank(node: ir.Node) -> int | None:
    data = node.inputs[0]
    return None if data is None or data.shape is None else len(data.shape)


def _bound(node: ir.Node, position: int, missing: float) -> float:
    """A bound of a Clip; NaN, which no comparison accepts, where it is computed."""
    value = node.inputs[position] if len(node.inputs) > position else None
    if value is None:
        return missing
    return float(value.const_value.numpy()) if value.const_value is not None else math.nan


def _code(bound: float, code: AffineRange) -> float:
    return round(bound / code.scale) + code.zero_point if math.isfinite(bound) else bound
