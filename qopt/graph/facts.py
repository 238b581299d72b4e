"""Which weights of a graph can be quantized, what they are called and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, TypeGuard, cast, final

import onnx_ir as ir

from qopt.graph.compare import observed_shapes
from qopt.graph.layer_names import layer_name
from qopt.graph.model import Feeds, Layer, Use, WeightedOp
from qopt.graph.names import unique, values
from qopt.graph.shapes import fix_shapes

_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

SHORTEST_ROW: Final = 8
"""Numbers in a row of a table that are worth a scale of their own: 32 bits, as many as 8 codes of 4 bits have."""


@final
@dataclass(frozen=True)
class _Site:
    """One application of a weight, before its cost is known."""

    node: ir.Node
    op: WeightedOp
    weight: ir.Value
    axis: int
    groups: int
    input: ir.Value
    output: ir.Value
    bias: str | None


def find_layers(model: ir.Model, example: Feeds, *, tables: bool = False) -> tuple[Layer, ...]:
    """The layers of ``model`` in graph order.

    Taken are Conv over one or two axes, ConvTranspose with one group, Gemm without scaling or a transposed left side,
    MatMul by a matrix, and with ``tables`` Gather of rows: embeddings, which the output layer may share where it
    reads rows as its channels. In each the weight is a float32 initializer that has no other kind of use.

    Args:
        model: a graph at opset 21 or newer, with unique names.
        example: inputs that the graph takes; sizes, and so costs, are those of the first input's first axis by one.
        tables: whether embeddings are layers.
    """
    groups = _grouped(model, tables)[0]
    wanted = [v for sites in groups for site in sites for v in (site.input, site.output)]
    shapes, items = _shapes(model, example, wanted), _items(model, example)
    taken: set[str] = set()
    layers = []
    for sites in groups:
        first = sites[0]
        name = unique(layer_name(first.weight, first.node, first.bias), taken.__contains__)
        taken.add(name)
        layers.append(
            Layer(
                name=name, op=_op(sites), initializer=str(first.weight.name), shape=_weight_shape(first.weight),
                channel_axis=first.axis, groups=first.groups, uses=tuple(_use(site, shapes, items) for site in sites),
            )
        )  # fmt: skip
    return tuple(layers)


def kept_in_float(model: ir.Model, *, tables: bool = False) -> dict[str, str]:
    """Name of each weight that an operator of a layer applies and that stays in float, to why it does."""
    return {str(weight.name): reason for weight, reason in _grouped(model, tables)[1].items()}


def left_in_float(model: ir.Model, *, tables: bool = False) -> tuple[str, ...]:
    """One clause for each weight of `kept_in_float`."""
    return tuple(f"{name} stays in float: {reason}" for name, reason in kept_in_float(model, tables=tables).items())


def _grouped(model: ir.Model, tables: bool) -> tuple[list[list[_Site]], dict[ir.Value, str]]:
    """The sites of each weight, in graph order, and why some weights are no layers."""
    found: dict[ir.Value, list[_Site]] = {}
    reasons: dict[ir.Value, str] = {}
    for node in model.graph:
        for weight, site in _applied(node, tables):
            if isinstance(site, _Site):
                found.setdefault(weight, []).append(site)
            else:
                reasons.setdefault(weight, site)
    for weight, sites in found.items():
        alike = len({(site.axis, site.groups) for site in sites}) == 1 and _alike({site.op for site in sites})
        if not alike or len(weight.uses()) != len(sites) or weight.is_graph_output():
            reasons.setdefault(weight, "another kind of operator uses the weight too")
    kept = [sites for weight, sites in found.items() if weight not in reasons]
    return kept, reasons


def _alike(ops: set[WeightedOp]) -> bool:
    """Whether one format suits all operators of a weight: one operator, or an embedding with the output layer."""
    return len(ops) == 1 or (len(ops) == 2 and "Gather" in ops and ops <= {"Gather", "Gemm", "MatMul"})


def _op(sites: Sequence[_Site]) -> WeightedOp:
    return next((site.op for site in sites if site.op == "Gather"), sites[0].op)


def _applied(node: ir.Node, tables: bool) -> Iterator[tuple[ir.Value, _Site | str]]:
    """The constant that ``node`` applies, with how it does, or why the constant cannot be quantized there."""
    first, second = ([*node.inputs, None, None])[:2]
    if node.op_type == "Gather" and tables and _is_weight(first):
        yield first, _table_site(node, first)
    elif node.op_type in _OPS and _is_weight(second):
        yield second, _site(node, second)
    elif node.op_type == "MatMul" and (table := _transposed(second)) is not None:
        yield table, _site(node, table, transposed=True)
    elif node.op_type in ("Gemm", "MatMul") and _is_weight(first):
        yield first, "it is the left side of the product"


def _is_weight(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """The constant matrix that ``value`` is the transpose of."""
    node = None if value is None else value.producer()
    table = node.inputs[0] if node is not None and node.op_type == "Transpose" else None
    return table if _is_weight(table) and len(_weight_shape(table)) == 2 else None


def _table_site(node: ir.Node, table: ir.Value) -> _Site | str:
    index, shape = node.inputs[1], _weight_shape(table)
    if index is None or index.is_initializer():
        return "no input flows through it"
    if _int(node, "axis", 0) != 0:
        return "Gather along another axis than its rows"
    if prod(shape[1:]) < SHORTEST_ROW:
        return f"its rows have fewer than {SHORTEST_ROW} numbers"
    return _Site(node, "Gather", table, 0, 1, index, node.outputs[0], None)


def _site(node: ir.Node, weight: ir.Value, *, transposed: bool = False) -> _Site | str:
    """How ``node`` applies ``weight``, or why the weight cannot be quantized there."""
    data = node.inputs[0]
    rank = len(_weight_shape(weight))
    if data is None or data.is_initializer():
        return "no image flows through it"
    groups = _int(node, "group", 1)
    if node.op_type in ("Conv", "ConvTranspose") and rank not in (3, 4):
        return f"{node.op_type} over {rank - 2} axes"
    if node.op_type == "ConvTranspose" and groups > 1:
        return "ConvTranspose with groups"
    if node.op_type == "Gemm" and (_int(node, "transA", 0) or _float(node, "alpha") != 1 or _float(node, "beta") != 1):
        return "Gemm with scaling or a transposed left side"
    if node.op_type == "MatMul" and rank != 2:
        return "MatMul by a stack of matrices"
    by_rows = bool(_int(node, "transB", 0)) or transposed
    axis = 0 if by_rows or node.op_type == "Conv" else 1
    output, bias = node.outputs[0], None
    if node.op_type == "MatMul":
        output, bias = _added_bias(node, _weight_shape(weight)[axis])
    elif len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _vector(node.inputs[2], _weight_shape(weight)[axis], 2 if node.op_type == "Gemm" else 1)
        if bias is None:
            return "its bias is no constant vector"
    return _Site(node, cast("WeightedOp", node.op_type), weight, axis, groups, data, output, bias)


def _added_bias(node: ir.Node, channels: int) -> tuple[ir.Value, str | None]:
    """The Add that alone reads a MatMul and adds a vector to its channels: its output and the vector's name."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.is_graph_output():
        return product, None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    bias = _vector(other, channels, 1) if other is not None and other is not product else None
    return (add.outputs[0], bias) if bias is not None else (product, None)


def _vector(value: ir.Value, channels: int, most_axes: int) -> str | None:
    """The name of an initializer of shape (channels,), or (1, channels) where two axes are allowed."""
    allowed = [(channels,), (1, channels)][:most_axes]
    fits = value.is_initializer() and value.dtype == ir.DataType.FLOAT and _weight_shape(value) in allowed
    return value.name if fits else None


def _weight_shape(weight: ir.Value) -> tuple[int, ...]:
    tensor = weight.const_value
    assert tensor is not None
    return tuple(int(size) for size in tensor.shape.numpy())


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else 1.0


def _shapes(model: ir.Model, example: Feeds, wanted: Sequence[ir.Value]) -> dict[str, tuple[int, ...]]:
    """Shape of every wanted value for the example: inferred where possible, else observed in a run."""
    probe = model.clone()
    known = {name: array.shape for name, array in example.items()}
    fix_shapes(probe, known)
    for value in values(probe.graph):
        if value.name and value.shape is not None and value.shape.is_static():
            known[value.name] = tuple(dim for dim in value.shape if isinstance(dim, int))
    missing = [str(value.name) for value in wanted if value.name not in known]
    known.update(observed_shapes(probe, missing, example) if missing else {})
    return {str(value.name): known[str(value.name)] for value in wanted}


def _items(model: ir.Model, example: Feeds) -> int:
    """How many images, texts, ... the example holds."""
    shape = example[str(model.graph.inputs[0].name)].shape
    return shape[0] if len(shape) > 1 else 1


def _use(site: _Site, shapes: dict[str, tuple[int, ...]], items: int) -> Use:
    """A weight element is multiplied once per position: of the output, or of the input for a transposed convolution."""
    shape = shapes[str(site.input.name if site.op == "ConvTranspose" else site.output.name)]
    weight = _weight_shape(site.weight)
    per_position = weight[1 - site.axis] if site.op in ("Gemm", "MatMul") else prod(weight[1:])
    macs = 0 if site.op == "Gather" else prod(shape) * per_position // items
    return Use(
        node=str(site.node.name), input=str(site.input.name), output=str(site.output.name), bias=site.bias, macs=macs
    )
