"""What cost models are told of a network: its layers, and the steps of its execution with all that lives beside each.

Steps are the nodes of the graph in its order, as qopt's C program and ONNX Runtime run them: a Relu, Clip or addition
of a constant behind a node is part of its step, a Reshape is a name for the same memory, an addition of two tensors
overwrites one that nobody needs any more, and so does pooling without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, final

import onnx_ir as ir

from qopt.graph.compare import observed_shapes
from qopt.graph.model import Layer, Prepared
from qopt.graph.names import values
from qopt.graph.shapes import fix_shapes
from qopt.hardware.cost_model import LayerDescription, Live, Step

VIEWS: Final = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear"}
)
"""Operators that only name the same memory anew."""

FUSED: Final = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu"})
"""Operators on single elements that run as part of the step before them."""

ARITHMETIC: Final = frozenset({"Add", "Sub", "Mul", "Div"})
"""Operators that may overwrite an operand, and are fused where the other one is constant."""

POOLS: Final = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"})
"""Operators that write no element before they have read what it depends on, where nothing is padded."""


@final
@dataclass(frozen=True)
class NetworkDescription:
    """What a cost model may know of a network: its layers, and its steps in the order of their execution."""

    layers: tuple[LayerDescription, ...]
    steps: tuple[Step, ...]

    def layer(self, name: str) -> LayerDescription:
        """The layer called ``name``; KeyError where there is none."""
        return {layer.name: layer for layer in self.layers}[name]


def describe(
    prepared: Prepared, activation_bits: int, narrow: Mapping[str, int] | None = None, *, observe: bool = True
) -> NetworkDescription:
    """The network with activations of ``activation_bits`` bits, 32 for float, for one image or item.

    ``narrow`` has the bits of values that differ, by ONNX name. A step without a layer counts as wide as the widest
    tensor that it reads or writes, and a layer with several uses as wide as the widest of its inputs.

    Shapes that inference does not tell are observed in a run; without ``observe`` these tensors are left out.

    Raises:
        UnsupportedModelError: the run fails.
    """
    elements = _elements(prepared, observe)
    executed, outputs, alias = _executed(prepared.model.graph, elements)
    widths = _Widths(activation_bits, {alias.get(name, name): bits for name, bits in (narrow or {}).items()}, alias)
    nodes = {str(node.name): node for node in prepared.model.graph}
    layers = tuple(_layer(layer, nodes, elements, widths) for layer in prepared.layers)
    return NetworkDescription(layers, _steps(prepared, executed, outputs, elements, widths))


@final
@dataclass(frozen=True, eq=False)
class _Widths:
    """Bits of every value: those of the memory that it names."""

    default: int
    narrow: Mapping[str, int]
    alias: Mapping[str, str]

    def widest(self, names: Iterable[str]) -> int:
        return max((self.narrow.get(self.alias.get(name, name), self.default) for name in names), default=self.default)


def _layer(
    layer: Layer, nodes: Mapping[str, ir.Node], elements: Mapping[str, int], widths: _Widths
) -> LayerDescription:
    convolution = layer.op in ("Conv", "ConvTranspose")
    kernel = layer.shape[2:] if convolution else ()
    strides = nodes[layer.uses[0].node].attributes.get("strides") if convolution else None
    return LayerDescription(
        layer.name, layer.op, layer.shape, layer.channels, layer.weights, layer.macs, kernel,
        tuple(strides.as_ints()) if strides is not None else (1,) * len(kernel), layer.groups,
        sum(elements.get(use.input, 0) for use in layer.uses), sum(elements.get(use.output, 0) for use in layer.uses),
        widths.widest(use.input for use in layer.uses), widths.widest(use.output for use in layer.uses),
        len(layer.uses),
    )  # fmt: skip


def _elements(prepared: Prepared, observe: bool) -> dict[str, int]:
    """Elements of every float value that is computed, for one image."""
    probe = prepared.model.clone()
    known = {name: array.shape for name, array in prepared.example.items()}
    fix_shapes(probe, known)
    wanted = [value for node in probe.graph for value in node.outputs if value.name and value.dtype in _FLOATS]
    for value in (*probe.graph.inputs, *wanted):
        if value.shape is not None and value.shape.is_static():
            known[str(value.name)] = tuple(dim for dim in value.shape if isinstance(dim, int))
    missing = [str(value.name) for value in wanted if value.name not in known]
    known.update(observed_shapes(probe, missing, prepared.example) if missing and observe else {})
    first = known.get(prepared.input, ())
    items = first[0] if len(first) > 1 else 1
    floats = {str(value.name) for value in values(probe.graph) if value.dtype in _FLOATS}
    return {name: prod(shape) // items for name, shape in known.items() if name in floats}


_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@final
@dataclass(frozen=True, eq=False)
class _Executed:
    """A node that is a step of its own: the tensors that it reads and the one that it writes."""

    node: ir.Node
    reads: tuple[str, ...]
    target: str


def _steps(
    prepared: Prepared, executed: Sequence[_Executed], outputs: set[str], elements: Mapping[str, int], widths: _Widths
) -> tuple[Step, ...]:
    layers = {use.node: layer.name for layer in prepared.layers for use in layer.uses}
    live = _live(executed, {str(value.name) for value in prepared.model.graph.inputs}, outputs, elements)
    return tuple(
        Step(
            str(one.node.name), one.node.op_type, layers.get(str(one.node.name), ""),
            sum(elements[name] for name in one.reads), elements[one.target], widths.widest((*one.reads, one.target)),
            tuple(Live(name, elements[name], widths.widest([name])) for name in names),
        )
        for one, names in zip(executed, live, strict=True)
    )  # fmt: skip


def _executed(graph: ir.Graph, elements: Mapping[str, int]) -> tuple[list[_Executed], set[str], dict[str, str]]:
    """The steps without views and what is fused, the tensors that leave the network, and what names whose memory."""
    alias: dict[str, str] = {}
    found = []
    for node in graph:
        reads = [alias.get(name, name) for name in _activations(node, elements)]
        written = [str(value.name) for value in node.outputs if value.name in elements]
        if len(reads) == 1 and written and (node.op_type in VIEWS or _fuses(node, elements)):
            alias |= dict.fromkeys(written, reads[0])
        elif reads:
            found += [_Executed(node, tuple(dict.fromkeys(reads)), name) for name in written]
    return found, {alias.get(str(value.name), str(value.name)) for value in graph.outputs}, alias


def _activations(node: ir.Node, elements: Mapping[str, int]) -> list[str]:
    """The names of the float tensors that a node reads and that are not constant."""
    found = [str(value.name) for value in node.inputs if value is not None and not value.is_initializer()]
    return [name for name in found if name in elements]


def _fuses(node: ir.Node, elements: Mapping[str, int]) -> bool:
    """Whether the step before it does it: on single elements of a computed tensor that nothing else reads."""
    if node.op_type not in FUSED | ARITHMETIC or len(node.outputs) != 1:
        return False
    (name,) = _activations(node, elements)
    data = next(value for value in node.inputs if value is not None and value.name == name)
    same = elements[name] == elements.get(str(node.outputs[0].name))
    return same and len(list(data.uses())) == 1 and data.producer() is not None


def _live(
    executed: Sequence[_Executed], inputs: set[str], outputs: set[str], elements: Mapping[str, int]
) -> list[list[str]]:
    """Of every step the tensors in memory; of those that share memory the one that owns it."""
    last = {name: i for i, one in enumerate(executed) for name in (one.target, *one.reads)}
    last |= {name: len(executed) - 1 for name in outputs if name in last}
    owner = {name: name for name in inputs}
    spans = {name: (0, last[name]) for name in inputs if name in last}
    for i, one in enumerate(executed):
        taken = next((r for r in one.reads if last[r] == i and r not in inputs and _overwrites(one, r, elements)), None)
        owner[one.target] = one.target if taken is None else owner.get(taken, taken)
        first, _ = spans.get(owner[one.target], (i, i))
        spans[owner[one.target]] = first, last[one.target]
    return [[name for name, (first, end) in spans.items() if first <= i <= end] for i in range(len(executed))]


def _overwrites(one: _Executed, source: str, elements: Mapping[str, int]) -> bool:
    if elements[source] < elements[one.target]:
        return False
    if one.node.op_type in POOLS:
        pads = one.node.attributes.get("pads")
        return pads is None or not any(pads.as_ints())
    return one.node.op_type in ARITHMETIC | FUSED
