"""Matrix products that keep 4-bit weights packed at run time: ``MatMulNBits`` of com.microsoft.

What folds at load is small on disk and float in memory. This operator reads nibbles, a scale for every block of 16 to
256 weights of a column and optionally 4-bit zero points, and unpacks a tile at a time. By default it rounds activations
to 8 bits unasked; ``accuracy_level=1`` makes it multiply in float32. At that level ONNX Runtime 1.31 has a kernel for
4 bits only: of 2 and 8 bits it unpacks the whole matrix in every run (measured on 2048 x 2048: 65 ms against 2.7, and
more memory than float). So codes of fewer bits are stored in four, and 8-bit ones are left to the other form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qopt.emit.additions import Additions
from qopt.emit.biases import bias_of
from qopt.emit.pair_sums import integer_levels
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AnyWeight, QuantizedWeight, pack, parts_of
from qopt.spec import Packing

DOMAIN: Final = "com.microsoft"
BLOCKS: Final = (256, 128, 64, 32, 16)
"""How many weights may share a scale."""

ZERO: Final = 8
"""The nibble that stands for zero where there are no zero points."""

_NIBBLES: Final = Packing(16, 2, 1)


def packed_layers(prepared: Prepared, quantized: Quantized) -> frozenset[str]:
    """Layers that `MatMulNBits` can compute: products with a constant matrix of at most 16 levels per block."""
    nodes = {node.name: node for node in prepared.model.graph}
    return frozenset(
        layer.name
        for layer in prepared.layers
        if layer.name in quantized.weights
        and _takes(quantized.weights[layer.name])
        and all(_is_product(prepared, layer, index, nodes) for index in range(len(layer.uses)))
        and len(list(prepared.model.graph.initializers[layer.initializer].uses())) == len(layer.uses)
    )


def write_packed(
    additions: Additions, nodes: Mapping[str | None, ir.Node], layer: Layer, quantized: Quantized, prepared: Prepared
) -> None:
    """Make every use of a layer of `packed_layers` a `MatMulNBits` node of the same name and output."""
    weight = quantized.weights[layer.name]
    columns = layer.weights // layer.channels
    block = weight.spec.block or best_block(columns)
    nibbles, zero = _nibbles(weight)
    codes = additions.constant(f"{layer.name}/codes", pack_blocks(nibbles, block))
    blocks = -(-columns // block)
    scale = weight.scale.numpy()
    scales = additions.constant(f"{layer.name}/scale", _per_block(scale, layer.channels, blocks))
    zeros = None
    if zero is not None:
        packed = pack_zeros(_per_block(zero, layer.channels, blocks))
        zeros = additions.constant(f"{layer.name}/zero", packed)
    for index, use in enumerate(layer.uses):
        node = nodes[use.node]
        bias = bias_of(prepared, layer, index, quantized) if layer.op == "Gemm" else None
        added = None if bias is None else additions.constant(f"{layer.name}/bias", bias)
        _become(node, [node.inputs[0], codes, scales, zeros, None, added])
        sizes = {"K": columns, "N": layer.channels, "bits": 4, "block_size": block, "accuracy_level": 1}
        node.attributes.update({name: ir.AttrInt64(name, value) for name, value in sizes.items()})


def best_block(columns: int) -> int:
    """The block of fewest bytes for a column of ``columns`` weights that share a scale; the largest of equals."""
    return min(BLOCKS, key=lambda block: -(-columns // block) * (block // 2 + 4))


def pack_blocks(nibbles: NDArray[np.uint8], block: int) -> NDArray[np.uint8]:
    """Nibbles (channels, columns) as the operator takes them: (channels, blocks, block / 2), the first one lowest.

    What fills up the last block meets no activation.
    """
    channels, columns = nibbles.shape
    blocks = -(-columns // block)
    filled = np.pad(nibbles, ((0, 0), (0, blocks * block - columns)), constant_values=ZERO)
    return np.asarray(pack(filled, _NIBBLES), np.uint8).reshape(channels, blocks, block // 2)


def pack_zeros(zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Zero points (channels, blocks) as nibbles (channels, ceil(blocks / 2)): every channel begins a byte."""
    channels, blocks = zeros.shape
    filled = np.pad(zeros, ((0, 0), (0, blocks % 2)))
    return np.asarray(pack(filled, _NIBBLES), np.uint8).reshape(channels, -1)


def _takes(weight: AnyWeight) -> bool:
    if weight.scale.ndim == 2 and weight.spec.block not in BLOCKS:
        return False
    if isinstance(weight, QuantizedWeight) and weight.zero is not None:
        return weight.spec.bits <= 4
    if any(part.table is not None and part.table.is_floating_point() for part, _ in parts_of(weight)):
        return False
    levels = integer_levels(weight)
    return bool(levels.min() >= -ZERO and levels.max() < ZERO)


def _is_product(prepared: Prepared, layer: Layer, index: int, nodes: Mapping[str | None, ir.Node]) -> bool:
    node, use = nodes[layer.uses[index].node], layer.uses[index]
    right = len(layer.shape) == 2 and node.inputs[1] is prepared.model.graph.initializers[layer.initializer]
    if node.op_type == "MatMul":
        return right
    if node.op_type != "Gemm" or not right:
        return False
    number = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    plain = all(_number(node, name, default) == default for name, default in number.items())
    return plain and (use.bias is not None or len(node.inputs) < 3 or node.inputs[2] is None)


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _nibbles(weight: AnyWeight) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The nibbles (channels, columns), and the zero points in the shape of the scales where they are not `ZERO`."""
    rows = np.moveaxis(integer_levels(weight), weight.axis, 0)
    if isinstance(weight, QuantizedWeight) and weight.zero is not None:
        return rows.astype(np.uint8), np.asarray(weight.zero.numpy(), np.uint8)
    return (rows + ZERO).astype(np.uint8), None


def _per_block(values: NDArray[Any], channels: int, blocks: int) -> NDArray[Any]:
    """One for each block (channels, blocks), from one for all, one per channel or one per block."""
    spread = values if values.ndim == 2 else values.reshape(-1, 1)
    return np.ascontiguousarray(np.broadcast_to(spread, (channels, blocks)))


def _become(node: ir.Node, inputs: list[ir.Value | None]) -> None:
    """The node in place: its name, output and properties stay."""
    while inputs[-1] is None:
        inputs.pop()
    node.attributes.clear()
    node.domain, node.op_type = DOMAIN, "MatMulNBits"
    node.resize_inputs(len(inputs))
    for position, value in enumerate(inputs):
        node.replace_input_with(position, value)
