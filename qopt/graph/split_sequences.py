"""Sequences that only take a tensor apart, as torch exports `split`, become Split: nothing else of them is known."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qopt.graph.names import unique


def split_sequences(model: ir.Model) -> int:
    """Turn every SplitToSequence whose parts are read by SequenceAt with constant positions into a Split.

    Parts may be read more than once; others stay sequences, which `prepare` refuses by name.

    Returns:
        The number of sequences that went.
    """
    graph, gone = model.graph, 0
    for node in [node for node in graph if node.op_type == "SplitToSequence"]:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        sizes, reads = _sizes(node, axis), _reads(node)
        if sizes is None or reads is None:
            continue
        taken = {str(value.name) for other in graph for value in other.outputs} | set(graph.initializers)
        name = unique(f"{node.outputs[0].name}_sizes", taken.__contains__)
        stored = ir.Value(name=name, const_value=ir.tensor(np.array(sizes, np.int64), name=name))
        graph.initializers[name] = stored
        split = ir.node("Split", [node.inputs[0], stored], attributes={"axis": axis}, num_outputs=len(sizes))
        split.name, gone = node.name, gone + 1
        for index, output in enumerate(split.outputs):
            output.name = f"{node.outputs[0].name}_part{index}"
            output.type = node.inputs[0].type if node.inputs[0] is not None else None
        graph.insert_before(node, split)
        for read, position in reads:
            read.outputs[0].replace_all_uses_with(split.outputs[position], replace_graph_outputs=True)
            graph.remove(read, safe=True)
        graph.remove(node, safe=True)
    return gone


def _sizes(node: ir.Node, axis: int) -> list[int] | None:
    """The sizes of the parts; None where they are not known, or the sequence is not one of parts."""
    if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int() and len(node.inputs) < 2:
        return None
    split, data = node.inputs[1] if len(node.inputs) > 1 else None, node.inputs[0]
    sizes = _numbers(split) if split is not None else [1]
    if sizes is None or data is None:
        return None
    if split is not None and not _is_scalar(split):
        return sizes
    length = data.shape[axis] if data.shape is not None else None
    if not isinstance(length, int) or sizes[0] < 1:
        return None
    whole, rest = divmod(length, sizes[0])
    return [sizes[0]] * whole + ([rest] if rest else [])


def _is_scalar(value: ir.Value) -> bool:
    producer, tensor = value.producer(), _tensor(value)
    if producer is not None and "value_ints" in producer.attributes:
        return False
    return tensor is None or len(tensor.shape) == 0


def _reads(node: ir.Node) -> list[tuple[ir.Node, int]] | None:
    """Every SequenceAt of the sequence with the part it takes; None where anything else reads it."""
    found = []
    for use in node.outputs[0].uses():
        position = _numbers(use.node.inputs[1]) if use.node.op_type == "SequenceAt" else None
        if position is None or len(position) != 1:
            return None
        found.append((use.node, position[0]))
    return None if node.outputs[0].is_graph_output() else found


def _numbers(value: ir.Value | None) -> list[int] | None:
    """A constant of integers, of an initializer or a Constant node."""
    producer = value.producer() if value is not None else None
    if producer is not None and "value_ints" in producer.attributes:
        return list(producer.attributes["value_ints"].as_ints())
    if producer is not None and "value_int" in producer.attributes:
        return [producer.attributes["value_int"].as_int()]
    tensor = _tensor(value)
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return value.const_value if value is not None else None
