"""The norms of a layer as the map that its uses make of its weight, whose geometry is read from the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import onnx_ir as ir
from torch import fx

from qopt.cache import Cache, digest_arrays
from qopt.errors import UnsupportedModelError
from qopt.graph.model import Layer, Prepared
from qopt.graph.operators import Op
from qopt.graph.operators.convolution import convolution_window, window_axes, window_pads
from qopt.lipschitz import LayerNorms, NormBound, Operator
from qopt.lipschitz.layer import layer_norms as operator_norms
from qopt.measure.norms import kept_bounds, layer_norms
from qopt.quantize import WeightOnly


@final
class LayerOperators:
    """What the layers of a network do with their weights, read from its graph."""

    def __init__(self, prepared: Prepared) -> None:
        self._nodes: Mapping[str, ir.Node] = {str(node.name): node for node in prepared.model.graph}
        self._opset = prepared.model.opset_imports.get("", 0)

    def of(self, layer: Layer) -> tuple[Operator, ...] | None:
        """The different maps that ``layer`` is used as, an embedding only where nothing multiplies by its table.

        None where padding is only known once images run: a transposed convolution with ``output_shape`` or
        ``auto_pad``, and a convolution with ``auto_pad`` on images of unknown size.
        """
        nodes = [self._nodes[use.node] for use in layer.uses]
        products = [node for node in nodes if node.op_type != "Gather"]
        try:
            return tuple(dict.fromkeys(self._operator(layer, node) for node in products or nodes))
        except UnsupportedModelError:
            return None

    def _operator(self, layer: Layer, node: ir.Node) -> Operator:
        if node.op_type == "Gather":
            return Operator("embedding")
        if node.op_type not in ("Conv", "ConvTranspose"):
            return Operator("linear", axis=layer.channel_axis)
        op = Op(node, self._opset, _no_twin)
        sizes = (op.dims(0) or ())[2:]
        size = tuple(s for s in sizes if s is not None)
        whole = size if size and len(size) == len(sizes) else None
        if node.op_type == "Conv":
            stride, before, after, dilation, groups = convolution_window(op)
            padding = tuple(zip(before, after, strict=True))
            return Operator("convolution", groups=groups, stride=stride, dilation=dilation, padding=padding, size=whole)
        if op.has("output_shape") or op.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            raise op.refuse("with output_shape or auto_pad")
        ones = (1,) * window_axes(op)
        stride, dilation = op.integers("strides") or ones, op.integers("dilations") or ones
        before, after = window_pads(op, ones, stride, dilation)
        return Operator(
            "transposed", stride=stride, dilation=dilation, padding=tuple(zip(before, after, strict=True)),
            output_padding=op.integers("output_padding") or (), size=whole,
        )  # fmt: skip


def all_norms(
    quantizer: WeightOnly, layer: Layer, operators: tuple[Operator, ...] | None, cache: Cache
) -> tuple[NormBound, NormBound | None, NormBound | None]:
    """``reshaped``, ``operator_l2`` and ``operator_linf`` of a layer; the largest over its uses, kept by content.

    The operator norms are None where ``operators`` is, and for a table that is no matrix.

    Raises:
        CorruptModelError: for NaN or infinite weights, naming the layer.
    """
    reshaped, row_sum = layer_norms(quantizer, layer, cache)
    if operators is None or (operators[0].kind == "embedding" and len(layer.shape) != 2):
        return reshaped, None, None
    if all(operator.kind == "linear" for operator in operators):
        return reshaped, reshaped, row_sum
    found = [_norms(quantizer, layer, operator, cache) for operator in operators]
    linf = NormBound.largest(norms.operator_linf for norms in found)
    return reshaped, NormBound.largest(norms.operator_l2 for norms in found), linf


def _norms(quantizer: WeightOnly, layer: Layer, operator: Operator, cache: Cache) -> LayerNorms:
    weight = quantizer.weight(layer)

    def compute() -> tuple[NormBound, ...]:
        norms = operator_norms(weight, operator, where=layer.name)
        return norms.reshaped, norms.operator_l2, norms.operator_linf

    key = {"weight": digest_arrays(weight.numpy()), "operator": str(operator)}
    return LayerNorms(*kept_bounds(cache, "operator-norms", key, compute))


def _no_twin(value: ir.Value) -> fx.Node:
    raise UnsupportedModelError("a geometry that depends on a computed value", where=str(value.name))
