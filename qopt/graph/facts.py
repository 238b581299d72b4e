"""Which weights of a graph can be quantized, what they are called and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast, final

import onnx_ir as ir

from qopt.graph.compare import observed_shapes
from qopt.graph.layer_names import layer_name
from qopt.graph.model import Layer, Use, WeightedOp
from qopt.graph.names import unique, values
from qopt.graph.shapes import set_batch

_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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


def find_layers(model: ir.Model, input_shape: Sequence[int]) -> tuple[Layer, ...]:
    """The layers of ``model`` in graph order.

    Taken are Conv over one or two axes, ConvTranspose with one group, Gemm without scaling or a transposed left side,
    and MatMul by a matrix; in each the weight is a float32 initializer that has no other kind of use.

    Args:
        model: a graph at opset 21 or newer, with unique names.
        input_shape: shape of one image.
    """
    groups = _grouped(model)[0]
    shapes = _shapes(model, input_shape, [v for sites in groups for site in sites for v in (site.input, site.output)])
    taken: set[str] = set()
    layers = []
    for sites in groups:
        first = sites[0]
        name = unique(layer_name(first.weight, first.node, first.bias), taken.__contains__)
        taken.add(name)
        layers.append(
            Layer(
                name=name, op=first.op, initializer=str(first.weight.name), shape=_weight_shape(first.weight),
                channel_axis=first.axis, groups=first.groups, uses=tuple(_use(site, shapes) for site in sites),
            )
        )  # fmt: skip
    return tuple(layers)


def left_in_float(model: ir.Model) -> tuple[str, ...]:
    """One clause for each weight that stays in float, and why."""
    return tuple(_grouped(model)[1])


def _grouped(model: ir.Model) -> tuple[list[list[_Site]], list[str]]:
    """The sites of each weight, in graph order, and the reasons why some weights are none."""
    found: dict[ir.Value, list[_Site]] = {}
    reasons: dict[ir.Value, str] = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in _OPS and len(node.inputs) > 1 else None
        if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.FLOAT:
            continue
        site = _site(node, weight)
        if isinstance(site, _Site):
            found.setdefault(weight, []).append(site)
        else:
            reasons.setdefault(weight, site)
    for weight, sites in found.items():
        applied = {(site.op, site.axis, site.groups) for site in sites}
        if len(applied) > 1 or len(weight.uses()) != len(sites) or weight.is_graph_output():
            reasons.setdefault(weight, "another kind of operator uses the weight too")
    kept = [sites for weight, sites in found.items() if weight not in reasons]
    return kept, [f"{weight.name} stays in float: {reason}" for weight, reason in reasons.items()]


def _site(node: ir.Node, weight: ir.Value) -> _Site | str:
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
    axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if _int(node, "transB", 0) else 1, "MatMul": 1}[node.op_type]
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
    return tuple(int(size) for size in tensor.numpy().shape)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else 1.0


def _shapes(
    model: ir.Model, input_shape: Sequence[int], wanted: Sequence[ir.Value]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape of every wanted value for a batch, and the batch: inferred where possible, else observed in a run."""
    probe = model.clone()
    declared = probe.graph.inputs[0].shape
    batch = declared[0] if declared is not None and isinstance(declared[0], int) else 1
    set_batch(probe, batch)
    known: dict[str, tuple[int, ...]] = {}
    for value in values(probe.graph):
        if value.name and value.shape is not None and value.shape.is_static():
            known[value.name] = tuple(dim for dim in value.shape if isinstance(dim, int))
    known[str(probe.graph.inputs[0].name)] = (batch, *input_shape)
    missing = [str(value.name) for value in wanted if value.name not in known]
    known.update(observed_shapes(probe, missing) if missing else {})
    return {str(value.name): (known[str(value.name)], batch) for value in wanted}


def _use(site: _Site, shapes: dict[str, tuple[tuple[int, ...], int]]) -> Use:
    """A weight element is multiplied once per position: of the output, or of the input for a transposed convolution."""
    shape, batch = shapes[str(site.input.name if site.op == "ConvTranspose" else site.output.name)]
    weight = _weight_shape(site.weight)
    per_position = prod(weight[1:]) if site.op in ("Conv", "ConvTranspose") else weight[1 - site.axis]
    return Use(
        node=str(site.node.name), input=str(site.input.name), output=str(site.output.name), bias=site.bias,
        macs=prod(shape) * per_position // batch,
    )  # fmt: skip
