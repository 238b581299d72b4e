"""Keep float weights float where the runtime would quantize them unasked.

ONNX Runtime (1.31; "WeightBiasQuantization", since 1.21) takes a Conv, ConvTranspose or Gemm with a constant float
weight between quantized activations for an oversight and rounds the weight to 8 bits, one scale for the whole tensor.
What a plan leaves in float, log formats above 4 bits and every ConvTranspose would then run as something else than the
file says. It leaves a node alone whose bias is no constant, and it never folds DequantizeLinear: so such a node gets
its bias as int32 codes, exactly.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.emit.accumulator import Bias
from qopt.emit.additions import Additions

MANTISSA = 24
"""Bits of a float32 number's mantissa: as many as its code has."""

SMALLEST_EXPONENT = -126
"""Of a normal float32 number: the smallest unit of a code."""


def keep_float_weights(additions: Additions) -> None:
    """Give every node that ONNX Runtime would quantize unasked a bias that stops it; nothing is computed differently.

    The graph must have its activations quantized already.
    """
    for node in list(additions.graph):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and _between_codes(node, node.outputs[0]):
            _shield(additions, node, node, 2)
        elif node.op_type == "MatMul":
            add = _adder(node)
            if add is not None and _between_codes(node, add.outputs[0]):
                _shield(additions, node, add, 0 if add.inputs[1] is node.outputs[0] else 1)


def exact_codes(bias: NDArray[np.float32]) -> Bias:
    """Codes of 24 bits and units that are powers of two, whose products are ``bias`` (channels,) to the last bit."""
    exponents = np.maximum(np.frexp(bias)[1] - MANTISSA, SMALLEST_EXPONENT)
    units = np.ldexp(1.0, exponents)
    return Bias(np.rint(bias / units).astype(np.int32), units.astype(np.float32))


def _between_codes(node: ir.Node, output: ir.Value) -> bool:
    data, weight = node.inputs[0], node.inputs[1]
    if not _made_by(data, "DequantizeLinear") or _made_by(weight, "DequantizeLinear"):
        return False
    readers = list(output.consumers())
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = list(readers[0].outputs[0].consumers())
    return any(reader.op_type == "QuantizeLinear" for reader in readers)


def _shield(additions: Additions, node: ir.Node, holder: ir.Node, position: int) -> None:
    """Replace the constant bias of shape (channels,) that ``holder`` reads at ``position``, or add one of zeros."""
    old = holder.inputs[position] if len(holder.inputs) > position else None
    bias = _zeros(node) if old is None else _vector(old)
    if bias is None:
        return
    coded = exact_codes(bias)
    name = f"{node.name}/bias"
    codes = additions.constant(f"{name}/codes", coded.codes)
    unit = additions.constant(f"{name}/scale", coded.unit)
    dequantize = additions.node("DequantizeLinear", [codes, unit], f"{name}/dequantized", axis=0)
    additions.graph.insert_before(node, dequantize)
    if len(holder.inputs) <= position:
        holder.resize_inputs(position + 1)
    holder.replace_input_with(position, dequantize.outputs[0])


def _adder(node: ir.Node) -> ir.Node | None:
    """The Add that alone reads a MatMul of rank 2, with which ONNX Runtime makes a Gemm of it."""
    product = node.outputs[0]
    readers = list(product.consumers())
    two = product.shape is not None and len(product.shape) == 2
    return readers[0] if two and len(readers) == 1 and readers[0].op_type == "Add" else None


def _made_by(value: ir.Value | None, op: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op


def _vector(value: ir.Value) -> NDArray[np.float32] | None:
    array = value.const_value.numpy() if value.const_value is not None else None
    return np.asarray(array, np.float32) if array is not None and array.ndim == 1 else None


def _zeros(node: ir.Node) -> NDArray[np.float32] | None:
    shape = node.outputs[0].shape
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    return np.zeros(channels, np.float32) if isinstance(channels, int) else None
