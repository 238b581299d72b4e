"""Biases of weighted nodes: read from the float graph, replaced or added in the emitted one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.emit.accumulator import Bias
from qopt.emit.additions import Additions
from qopt.errors import VerificationError
from qopt.graph.model import Layer, Prepared, Use
from qopt.graph.quantized import Quantized


def bias_of(prepared: Prepared, layer: Layer, index: int, quantized: Quantized) -> NDArray[np.float32] | None:
    """The bias float32 (channels,) that a use has in the quantized network, or None."""
    if (layer.name, index) in quantized.biases:
        return np.asarray(quantized.biases[layer.name, index].numpy(), np.float32)
    name = layer.uses[index].bias
    return None if name is None else np.asarray(prepared.initializer(name), np.float32).reshape(-1)


def write_bias(additions: Additions, node: ir.Node, layer: Layer, use: Use, bias: NDArray[np.float32]) -> None:
    """Give a use the bias float32 (channels,). A convolution with this one fuses: ONNX Runtime quantizes it itself."""
    _set(additions, node, layer, use, additions.constant(f"{layer.name}/bias", bias))


def write_integer_bias(additions: Additions, node: ir.Node, layer: Layer, use: Use, bias: Bias) -> None:
    """The bias in int32 with a DequantizeLinear: without it a Gemm with a float output does not fuse."""
    codes = additions.constant(f"{layer.name}/bias/codes", bias.codes)
    unit = additions.constant(f"{layer.name}/bias/scale", bias.unit)
    axis = {"axis": 0} if bias.unit.ndim else {}
    dequantize = additions.node("DequantizeLinear", [codes, unit], f"{layer.name}/bias/dequantized", **axis)
    additions.graph.insert_before(node, dequantize)
    _set(additions, node, layer, use, dequantize.outputs[0])


def _set(additions: Additions, node: ir.Node, layer: Layer, use: Use, bias: ir.Value) -> None:
    if use.bias is not None:
        holder, position = _find(node, use.bias)
        holder.replace_input_with(position, bias)
    elif layer.op == "MatMul":
        _append_add(additions, node, layer, bias)
    else:
        node.resize_inputs(3)
        node.replace_input_with(2, bias)


def _append_add(additions: Additions, node: ir.Node, layer: Layer, bias: ir.Value) -> None:
    """An Add behind a MatMul; its output takes over the name, so that what reads and quantizes the value finds it."""
    product = node.outputs[0]
    add = additions.node("Add", [product, bias], f"{layer.name}/add_bias")
    added = add.outputs[0]
    added.shape, added.type = product.shape, product.type
    product.replace_all_uses_with(added, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    taken, product.name = product.name, additions.name(f"{layer.name}/product")
    added.name = taken
    additions.graph.insert_after(node, add)


def _find(node: ir.Node, bias: str) -> tuple[ir.Node, int]:
    """Where the bias is read: by the node itself, or by the Add behind it."""
    for holder in (node, *node.outputs[0].consumers()):
        for position, value in enumerate(holder.inputs):
            if value is not None and value.name == bias:
                return holder, position
    raise VerificationError("the bias of a layer is not where it was found", where=node.name, got=bias)
