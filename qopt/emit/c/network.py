"""From the prepared graph and its codes to the steps of the C program; whatever has none is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import final

import onnx_ir as ir

from qopt.emit.c.codes import clipped, not_quantized, wide
from qopt.emit.c.fixed_point import multiplier, multipliers
from qopt.emit.c.layers import Accumulators, layer_step
from qopt.emit.c.normalise import find_input
from qopt.emit.c.steps import (
    AddStep,
    AverageStep,
    Code,
    ConcatStep,
    MaxStep,
    MoveStep,
    Network,
    RescaleStep,
    Step,
    Tensor,
    Window,
)
from qopt.emit.c.values import VIEWS, box, constant, keeps_order, number, numbers, refuse, sizes, whole, window
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized

_BOUNDS = ("Relu", "Clip")


def read_network(prepared: Prepared, quantized: Quantized) -> Network:
    """The steps in integers.

    Raises:
        UnsupportedModelError: an activation that is not quantized, a weight that is not, an operator or an attribute
            that C code does not have, sums that int32 does not hold; naming the tensor, layer or node.
    """
    return _Reader(prepared, quantized).read()


@final
class _Reader:
    """The graph walked once in its order; ``tensors`` holds what is computed so far, by ONNX name."""

    def __init__(self, prepared: Prepared, quantized: Quantized) -> None:
        self.prepared, self.quantized = prepared, quantized
        self.uses = {use.node: (layer, i) for layer in prepared.layers for i, use in enumerate(layer.uses)}
        self.biased = {use.output for layer in prepared.layers for use in layer.uses}
        self.passed: set[str] = set()  # what a Relu or Clip reads that a step before it has taken in
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[Step] = []
        self.handlers: dict[str, Callable[[ir.Node], None]] = {
            "Add": self._add, "Concat": self._concat, "MaxPool": self._max_pool, "GlobalMaxPool": self._max_pool,
            "AveragePool": self._average, "GlobalAveragePool": self._average, "ReduceMean": self._average,
            "Relu": self._bounds, "Clip": self._bounds, **dict.fromkeys(VIEWS, self._view),
            "Slice": self._move, "Pad": self._move,
        }  # fmt: skip

    def read(self) -> Network:
        """Visit what the output depends on."""
        graph = self.prepared.model.graph
        value, normalisation = find_input(self.prepared, self.quantized)
        name = str(value.name)
        if name not in self.quantized.activations:
            raise not_quantized(name)
        image = self._register(value, Code.of(self.quantized.activations[name]))
        needed = self._needed(graph.outputs[0])
        for node in graph:
            if node in needed and not self._is_taken_in(node):
                self._visit(node)
        output = self.tensors[self.prepared.output]
        if output.root == image.root:
            target = replace(output, name=f"{output.name} (copy)", root=f"{output.name} (copy)")
            self._rescale(output, target, self.prepared.output)
            output = target
        return Network(image, output, tuple(self.steps), normalisation)

    def _is_taken_in(self, node: ir.Node) -> bool:
        """Whether a step before it computes it: a Relu or Clip, or the Add of a layer's bias."""
        name = str(node.outputs[0].name)
        return name in self.tensors or name in self.passed or (name in self.biased and node.name not in self.uses)

    def _needed(self, output: ir.Value) -> set[ir.Node]:
        """The nodes that compute the output; sizes, weights and bounds do not count."""
        found: set[ir.Node] = set()
        waiting = [output.producer()]
        while waiting:
            node = waiting.pop()
            if node is None or node in found or str(node.outputs[0].name) in self.tensors:
                continue
            found.add(node)
            many = node.op_type in ("Add", "Concat")
            inputs = node.inputs if many else node.inputs[:1]
            waiting += [value.producer() for value in inputs if value is not None]
        return found

    def _visit(self, node: ir.Node) -> None:
        if node.name in self.uses:
            self._layer(node, *self.uses[node.name])
        elif node.op_type in self.handlers:
            self.handlers[node.op_type](node)
        else:
            raise refuse(node, "is not in C code", fix="keep ONNX for this network")

    def _layer(self, node: ir.Node, layer: Layer, index: int) -> None:
        source = self._source(node)
        use = layer.uses[index]
        value = node.outputs[0]
        if str(value.name) != use.output:
            value = next(iter(value.consumers())).outputs[0]
        if layer.op == "ConvTranspose":
            raise refuse(node, "is not in C code", fix="keep ONNX for this network")
        sums = Accumulators(self.prepared, self.quantized, layer, index, source.code)
        target = self._target(value, sums.largest)
        self.steps.append(layer_step(node, sums, source, target, layer.shape[2:], use.macs))

    def _add(self, node: ir.Node) -> None:
        a, b = self._source(node), self._source(node, 1)
        if a.shape != b.shape:
            raise refuse(node, f"of shapes {a.shape} and {b.shape} is not in C code")
        target = self._target(node.outputs[0], a.code.largest + b.code.largest)
        ratios = (a.code.scale / target.code.scale, b.code.scale / target.code.scale)
        mantissas, shift = multipliers(ratios, str(node.name))
        self.steps.append(AddStep(a, b, target, (mantissas[0], mantissas[1]), shift))

    def _concat(self, node: ir.Node) -> None:
        sources = tuple(self._source(node, i) for i in range(len(node.inputs)))
        axis = number(node, "axis", 0)
        axis += len(sources[0].shape) + 1 if axis < 0 else 0
        if axis == 0:
            raise refuse(node, "over images is not in C code")
        target = self._target(node.outputs[0], max(source.code.largest for source in sources))
        blocks = prod(sources[0].shape[: axis - 1])
        pairs = tuple(multiplier(source.code.scale / target.code.scale, str(node.name)) for source in sources)
        self.steps.append(ConcatStep(sources, target, blocks, pairs))

    def _max_pool(self, node: ir.Node) -> None:
        source = self._source(node)
        if any(value.uses() for value in node.outputs[1:]):
            raise refuse(node, "with its indices is not in C code")
        view = whole(node, source) if node.op_type == "GlobalMaxPool" else self._pool_window(node, source)[0]
        self._same_codes(source, node.outputs[0], lambda target: MaxStep(source, target, view))

    def _move(self, node: ir.Node) -> None:
        source = self._source(node)
        starts, strides = box(node, source.shape, sizes(node.outputs[0]))
        self._same_codes(source, node.outputs[0], lambda target: MoveStep(source, target, starts, strides))

    def _same_codes(self, source: Tensor, value: ir.Value, step: Callable[[Tensor], Step]) -> None:
        """A step that only chooses among the codes of ``source``; where ``value`` has other ones, they follow."""
        name = str(value.name)
        own = self.quantized.activations.get(name)
        same = own is None or source.code.within(Code.of(own))
        label = name if same else f"{name} (before)"
        target = self.tensors[name] = Tensor(label, sizes(value), source.code, label)
        self.steps.append(step(target))
        if own is not None and not same:
            self._rescale(target, self._register(value, Code.of(own)), name)

    def _average(self, node: ir.Node) -> None:
        source = self._source(node)
        if node.op_type == "AveragePool":
            view, padded = self._pool_window(node, source)
            if number(node, "ceil_mode", 0) or view.dilation_height * view.dilation_width > 1:
                raise refuse(node, "with ceil_mode or dilations is not in C code")
        else:
            self._check_axes(node, len(source.shape))
            view, padded = whole(node, source), False
        target = self._target(node.outputs[0], source.code.largest)
        size = view.kernel_height * view.kernel_width
        varies = padded and not number(node, "count_include_pad", 0)
        ratio = source.code.scale / target.code.scale
        pairs = tuple(multiplier(ratio / n, str(node.name)) for n in (range(1, size + 1) if varies else (size,)))
        self.steps.append(AverageStep(source, target, view, pairs))

    def _pool_window(self, node: ir.Node, source: Tensor) -> tuple[Window, bool]:
        """The windows of a pool, and whether they are padded."""
        view, (bottom, right) = window(node, source, numbers(node, "kernel_shape") or ())
        if max(view.pad_top, bottom) >= view.kernel_height or max(view.pad_left, right) >= view.kernel_width:
            raise refuse(node, "with windows that see nothing but padding is not in C code")
        return view, bool(view.pad_top or view.pad_left or bottom or right)

    def _check_axes(self, node: ir.Node, rank: int) -> None:
        """A mean over all axes behind the channels."""
        if node.op_type != "ReduceMean":
            return
        axes = constant(node, 1)
        wanted = set(range(2, rank + 1))
        if axes is None or {int(axis) % (rank + 1) for axis in axes} != wanted or rank < 2:
            raise refuse(node, "over anything but all axes behind the channels is not in C code")

    def _bounds(self, node: ir.Node) -> None:
        """A Relu or Clip that no step before it could take in."""
        source = self._source(node)
        target = self._target(node.outputs[0], source.code.largest, node)
        self._rescale(source, target, str(node.name))

    def _view(self, node: ir.Node) -> None:
        source, value = self._source(node, view=True), node.outputs[0]
        shape = sizes(value)
        if not keeps_order(node, source.shape, shape):
            raise refuse(node, f"that moves elements, {source.shape} to {shape}, is not in C code")
        own = self.quantized.activations.get(str(value.name))
        if own is None or source.code.within(Code.of(own)):
            self.tensors[str(value.name)] = replace(source, name=str(value.name), shape=shape)
        else:
            self._rescale(source, self._register(value, Code.of(own)), str(node.name))

    def _rescale(self, source: Tensor, target: Tensor, where: str) -> None:
        self.steps.append(RescaleStep(source, target, *multiplier(source.code.scale / target.code.scale, where)))

    def _source(self, node: ir.Node, position: int = 0, *, view: bool = False) -> Tensor:
        value = node.inputs[position]
        name = "" if value is None else str(value.name)
        if name not in self.tensors:
            raise refuse(node, f"of the constant {name!r} is not in C code", fix="keep ONNX for this network")
        if self.tensors[name].code.wide and not view:
            raise not_quantized(name)
        return self.tensors[name]

    def _register(self, value: ir.Value, code: Code) -> Tensor:
        name = str(value.name)
        self.tensors[name] = Tensor(name, sizes(value), code, name)
        return self.tensors[name]

    def _target(self, value: ir.Value, largest: float, first: ir.Node | None = None) -> Tensor:
        """The tensor that a step writes, with the Relu and Clip behind it, beginning with ``first``, taken in.

        It is quantized, or becomes the output by views alone and then has int32 codes up to ``largest``.
        """
        bounds = [first] if first else []
        while str(value.name) not in self.quantized.activations:
            users = list(value.uses())
            if value.is_graph_output() or len(users) != 1 or users[0].node.op_type not in _BOUNDS or users[0].idx:
                break
            bounds.append(users[0].node)
            self.passed.add(str(value.name))
            value = users[0].node.outputs[0]
        affine = self.quantized.activations.get(str(value.name))
        if affine is None and not self._ends(value):
            raise not_quantized(str(value.name))
        code = Code.of(affine) if affine else wide(largest)
        for node in bounds:
            code = clipped(code, node)
        return self._register(value, code)

    def _ends(self, value: ir.Value) -> bool:
        """Whether the value is the network's output, but for its shape."""
        while not value.is_graph_output():
            nodes = [user.node for user in value.uses()]
            if len(nodes) != 1 or nodes[0].op_type not in VIEWS:
                return False
            value = nodes[0].outputs[0]
            if str(value.name) in self.quantized.activations:
                return False
        return True
