"""Write a quantization into the prepared graph: packed weights, changed biases, quantized activations, metadata."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qopt.emit.activations import quantize_values
from qopt.errors import VerificationError
from qopt.graph.model import Layer, Prepared, Use
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange, QuantizedWeight
from qopt.runtime.patterns import Subgraph, float_weight, has_integer_levels, integer_weight, kernel_scale
from qopt.runtime.values import constant

EXPORTER_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.onnxscript.rewriter.rule_name")


def emit(
    prepared: Prepared,
    quantized: Quantized,
    *,
    metadata: Mapping[str, str] | None = None,
    layer_metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> ir.Model:
    """A copy of the prepared graph that computes the quantized network.

    Args:
        prepared: the float graph.
        quantized: what to write into it.
        metadata: properties of the model.
        layer_metadata: layer name to properties of the nodes that use it, beside ``qopt.format``.

    Raises:
        VerificationError: a layer that was quantized does not come out quantized.
    """
    model = prepared.model.clone()
    graph = model.graph
    nodes = {node.name: node for node in graph}
    for layer in prepared.layers:
        for index, use in enumerate(layer.uses):
            if (layer.name, index) in quantized.biases:
                _write_bias(graph, nodes, layer, index, use, quantized)
        if layer.name in quantized.weights:
            _write_weight(graph, nodes, layer, quantized)
        for use in layer.uses:
            node = nodes[use.node]
            node.metadata_props["qopt.layer"] = layer.name
            node.metadata_props["qopt.format"] = str(quantized.spec(layer.name))
            node.metadata_props.update((layer_metadata or {}).get(layer.name, {}))
    quantize_values(graph, quantized.activations)
    _drop_unused_initializers(graph)
    _drop_exporter_traces(graph)
    model.metadata_props.update(metadata or {})
    _check_every_layer(model, prepared, quantized)
    return model


def runs_on_integers(layer: Layer, quantized: Quantized) -> bool:
    """Whether every use of the layer has quantized activations and its levels fit an integer kernel."""
    weight = quantized.weights.get(layer.name)
    return (
        weight is not None
        and has_integer_levels(weight)
        and all(use.input in quantized.activations for use in layer.uses)
    )


def _write_weight(graph: ir.Graph, nodes: Mapping[str | None, ir.Node], layer: Layer, quantized: Quantized) -> None:
    weight = quantized.weights[layer.name]
    integer = runs_on_integers(layer, quantized)
    if integer:
        packed, value = integer_weight(layer.name, weight, zero_points=layer.op == "Gemm")
    else:
        packed, value = float_weight(layer.name, weight)
    _insert(graph, packed, nodes[layer.uses[0].node])
    for index, use in enumerate(layer.uses):
        _replace_input(nodes[use.node], layer.initializer, value)
        if integer and layer.op == "Gemm":
            _quantize_bias(graph, nodes[use.node], _bias_name(layer, index), weight, quantized.activations[use.input])


def _insert(graph: ir.Graph, packed: Subgraph, before: ir.Node) -> None:
    for name, value in packed.initializers.items():
        if name not in graph.initializers:
            graph.initializers[name] = value
        elif value is not graph.initializers[name]:
            value.replace_all_uses_with(graph.initializers[name])
    graph.insert_before(before, packed.nodes)


def _replace_input(node: ir.Node, old: str, new: ir.Value) -> None:
    for position, value in enumerate(node.inputs):
        if value is not None and value.name == old:
            node.replace_input_with(position, new)


def _write_bias(
    graph: ir.Graph, nodes: Mapping[str | None, ir.Node], layer: Layer, index: int, use: Use, quantized: Quantized
) -> None:
    value = constant(_bias_name(layer, index), quantized.biases[layer.name, index].numpy())
    graph.initializers[str(value.name)] = value
    node = nodes[use.node]
    if use.bias is None:
        _add_bias(graph, node, layer, value)
        return
    holder = node if any(v is not None and v.name == use.bias for v in node.inputs) else _consumer(node, use.bias)
    _replace_input(holder, use.bias, value)


def _add_bias(graph: ir.Graph, node: ir.Node, layer: Layer, bias: ir.Value) -> None:
    if layer.op == "MatMul":
        output = node.outputs[0]
        shape, dtype, name = output.shape, output.type, output.name
        add = ir.node("Add", [output, bias], name=f"{layer.name}/add_bias")
        added = add.outputs[0]
        added.shape, added.type = shape, dtype
        output.replace_all_uses_with(added, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        output.name, added.name = f"{layer.name}/product", name
        graph.insert_after(node, add)
        return
    node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _quantize_bias(graph: ir.Graph, node: ir.Node, name: str, weight: QuantizedWeight, code: AffineRange) -> None:
    """The bias in int32, in units of the accumulator: without it a Gemm with a float output does not fuse."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return
    scale = np.asarray(kernel_scale(weight) * np.float32(code.scale), np.float32)
    codes = np.rint(bias.const_value.numpy().astype(np.float64) / scale)
    limits = np.iinfo(np.int32)
    inputs = [constant(f"{name}/codes", codes.clip(limits.min, limits.max).astype(np.int32))]
    inputs.append(constant(f"{name}/scale", scale))
    for value in inputs:
        graph.initializers[str(value.name)] = value
    axis = {"axis": 0} if scale.ndim else {}
    dequantize = ir.node("DequantizeLinear", inputs, attributes=axis, name=f"{name}/dequantized")
    dequantize.outputs[0].name = dequantize.name
    graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])


def _consumer(node: ir.Node, bias: str) -> ir.Node:
    for user in node.outputs[0].consumers():
        if any(value is not None and value.name == bias for value in user.inputs):
            return user
    raise VerificationError("the bias of a layer is not where it was found", where=node.name, got=bias)


def _bias_name(layer: Layer, index: int) -> str:
    return f"{layer.name}/bias" + (f"_{index}" if index else "")


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _drop_exporter_traces(graph: ir.Graph) -> None:
    """A file that ships carries no stack traces of whoever exported it: they tell paths and fill a tenth of it."""
    for node in graph:
        for key in EXPORTER_TRACES:
            node.metadata_props.pop(key, None)


def _check_every_layer(model: ir.Model, prepared: Prepared, quantized: Quantized) -> None:
    left = [
        layer.name
        for layer in prepared.layers
        if layer.name in quantized.weights and layer.initializer in model.graph.initializers
    ]
    if left:
        raise VerificationError("layers that the plan quantizes are still float in the file", where=", ".join(left))
