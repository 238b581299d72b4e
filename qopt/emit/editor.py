"""Write a quantization into the prepared graph: packed weights, changed biases, quantized activations, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import onnx_ir as ir

from qopt.config import Dialect
from qopt.emit.accumulator import IntegerLayer
from qopt.emit.activations import quantize_values
from qopt.emit.additions import Additions
from qopt.emit.biases import bias_of, write_bias, write_integer_bias
from qopt.emit.dialect import folding_weight, qdq_weight
from qopt.emit.float_weights import keep_float_weights
from qopt.emit.integer import integer_parts, runs_on_integers
from qopt.emit.nbits import DOMAIN, packed_layers, write_packed
from qopt.errors import VerificationError, nearest
from qopt.graph.model import Layer, Prepared
from qopt.graph.names import values
from qopt.graph.quantized import Quantized
from qopt.quant import AnyWeight
from qopt.runtime.patterns import Subgraph

__all__ = ["emit", "runs_on_integers"]

EXPORTERS = ("pkg.torch.", "pkg.onnxscript.")
"""Beginnings of the keys under which exporters note down how they came by a node, a value or the graph."""


def emit(
    prepared: Prepared,
    quantized: Quantized,
    *,
    metadata: Mapping[str, str] | None = None,
    layer_metadata: Mapping[str, Mapping[str, str]] | None = None,
    dialect: Dialect = "folding",
    memory: bool = False,
) -> ir.Model:
    """A copy of the prepared graph that computes the quantized network.

    Layers of `integer_parts` come in the form that fuses to integer kernels, all others in the one that folds to
    float. Inputs, outputs, opset and all that need not change stay as they are.

    Args:
        prepared: the float graph.
        quantized: what to write into it.
        metadata: properties of the model.
        layer_metadata: layer name to properties of the nodes that use it, beside ``qopt.layer`` and ``qopt.format``.
        dialect: how weights are written down, see `qopt.emit.dialect`.
        memory: write the layers of `packed_layers` that no integer kernel runs as `MatMulNBits`.

    Raises:
        PlanError: a format that the dialect does not have.
        VerificationError: a name that the graph does not have, or a layer that does not come out quantized.
    """
    _check_names(prepared, quantized)
    model = prepared.model.clone()
    graph = model.graph
    places = {node: number for number, node in enumerate(graph)}
    job = _Job(prepared, quantized, Additions(graph), {node.name: node for node in graph}, places, dialect)
    parts = integer_parts(prepared, quantized)
    packed = packed_layers(prepared, quantized) - set(parts) if memory else frozenset()
    if packed:
        model.opset_imports[DOMAIN] = 1
    for layer in prepared.layers:
        if layer.name in parts:
            job.write_integer(layer, parts[layer.name])
        elif layer.name in packed:
            job.write_packed(layer)
        else:
            job.write_float(layer)
        for use in layer.uses:
            properties = job.nodes[use.node].metadata_props
            properties["qopt.layer"] = layer.name
            properties["qopt.format"] = str(quantized.spec(layer.name))
            properties.update((layer_metadata or {}).get(layer.name, {}))
    quantize_values(job.additions, quantized.activations)
    keep_float_weights(job.additions)
    _drop_unused_initializers(graph)
    _drop_exporter_traces(graph)
    model.metadata_props.update(metadata or {})
    _check_every_layer(model, prepared, quantized)
    return model


@final
@dataclass(frozen=True, eq=False)
class _Job:
    """One emission under way; ``nodes`` are those of the copy, by name, and ``places`` their numbers in the graph."""

    prepared: Prepared
    quantized: Quantized
    additions: Additions
    nodes: Mapping[str | None, ir.Node]
    places: Mapping[ir.Node, int]
    dialect: Dialect

    def write_integer(self, layer: Layer, part: IntegerLayer) -> None:
        """The weight for integer kernels, and the biases as these kernels round them."""
        self._replace_weight(layer, self._packed(layer, part.weight, integer=True, gemm=part.gemm))
        for index, use in enumerate(layer.uses):
            node = self.nodes[use.node]
            if index not in part.biases:
                self._write_changed_bias(layer, index)
            elif layer.op == "Conv":
                write_bias(self.additions, node, layer, use, part.biases[index].values)
            else:
                write_integer_bias(self.additions, node, layer, use, part.biases[index])

    def write_float(self, layer: Layer) -> None:
        """The weight, where it is quantized, in the form that folds to float, and the biases that change."""
        if layer.name in self.quantized.weights:
            self._replace_weight(layer, self._packed(layer, self.quantized.weights[layer.name]))
        for index in range(len(layer.uses)):
            self._write_changed_bias(layer, index)

    def write_packed(self, layer: Layer) -> None:
        """The weight in nibbles that stay packed at run time; of a Gemm the bias too, which the operator adds."""
        write_packed(self.additions, self.nodes, layer, self.quantized, self.prepared)
        if layer.op != "Gemm":
            for index in range(len(layer.uses)):
                self._write_changed_bias(layer, index)

    def _packed(
        self, layer: Layer, weight: AnyWeight, *, integer: bool = False, gemm: bool = False
    ) -> tuple[Subgraph, ir.Value]:
        write = qdq_weight if self.dialect == "qdq" else folding_weight
        return write(layer.name, weight, integer=integer, gemm=gemm)

    def _write_changed_bias(self, layer: Layer, index: int) -> None:
        bias = bias_of(self.prepared, layer, index, self.quantized)
        if bias is not None and (layer.name, index) in self.quantized.biases:
            use = layer.uses[index]
            write_bias(self.additions, self.nodes[use.node], layer, use, bias)

    def _replace_weight(self, layer: Layer, packed: tuple[Subgraph, ir.Value]) -> None:
        """Whoever reads the weight reads the packed one: the layer's nodes, for a tied table through a Transpose."""
        subgraph, weight = packed
        graph = self.additions.graph
        readers = list(graph.initializers[layer.initializer].uses())
        first = min((node for node, _ in readers), key=self.places.__getitem__)
        self.additions.place(subgraph, first)
        for node, position in readers:
            node.replace_input_with(position, weight)


def _check_names(prepared: Prepared, quantized: Quantized) -> None:
    uses = {layer.name: len(layer.uses) for layer in prepared.layers}
    wrong = [name for name in quantized.weights if name not in uses]
    wrong += [name for name, index in quantized.biases if not 0 <= index < uses.get(name, 0)]
    if wrong:
        raise VerificationError("the model has no such layer or use", where=wrong[0], fix=nearest(wrong[0], uses))


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _drop_exporter_traces(graph: ir.Graph) -> None:
    """A file that ships carries no notes of whoever exported it: they tell paths and fill up to a sixth of it."""
    for holder in (graph, *graph, *values(graph)):
        notes = holder.metadata_props
        for key in [key for key in notes if key == "namespace" or key.startswith(EXPORTERS)]:
            del notes[key]


def _check_every_layer(model: ir.Model, prepared: Prepared, quantized: Quantized) -> None:
    nodes = {node.name: node for node in model.graph}
    left = [
        layer.name
        for layer in prepared.layers
        if layer.name in quantized.weights and not all(_reads_codes(nodes.get(use.node)) for use in layer.uses)
    ]
    if left:
        raise VerificationError("layers that the plan quantizes are still float in the file", where=", ".join(left))


def _reads_codes(node: ir.Node | None) -> bool:
    """Whether the weight is computed, for a tied table before it is transposed, or packed."""
    if node is not None and node.op_type == "MatMulNBits":
        return True
    weight = None if node is None else node.inputs[0 if node.op_type == "Gather" else 1]
    producer = None if weight is None else weight.producer()
    if producer is not None and producer.op_type == "Transpose":
        source = producer.inputs[0]
        return source is not None and source.producer() is not None
    return producer is not None
