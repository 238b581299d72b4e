"""The twin: the prepared graph as torch.fx, which everything that needs gradients or tensors works on."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Sequence
from typing import Any, final

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qopt.errors import UnsupportedModelError
from qopt.graph.model import Layer, Prepared
from qopt.graph.names import unique
from qopt.graph.operators import TABLE, Call, Op, carried
from qopt.graph.operators.registry import REFUSED
from qopt.graph.operators.types import CARRIERS


def build_twin(prepared: Prepared) -> fx.GraphModule:
    """``prepared`` as a torch.fx graph with the same names, in eval mode, on the CPU.

    The graph has one placeholder, the image of shape (batch, ...), one ``get_attr`` per constant in use, one
    ``call_function`` per ONNX node (and ``getitem`` for each further output), and returns the logits. For every node
    that holds an ONNX value, ``meta["value"]`` is that value's name and ``name`` a sanitised version of it, and
    ``meta["op"]`` is the ONNX operator that computes it. A call
    that applies a layer has ``meta["layer"]``, the layer's name, and ``meta["use"]``, its place in ``layer.uses``; its
    first arguments are the activations, the weight as ONNX stores it and, except for MatMul, the bias or None.
    Constants are buffers and take no gradient; the image does. Codes of constants are turned into numbers here, once.

    Raises:
        UnsupportedModelError: naming the operator and the node that the twin does not have.
    """
    return _imported(prepared.model, prepared.layers)


def import_graph(model: ir.Model) -> fx.GraphModule:
    """Any graph at opset 21 or newer, with unique names and inferred types and shapes, as `build_twin` makes it.

    It takes the inputs in their order, as `qopt.graph.operators.types.CARRIERS` says, and returns the one output, or a
    tuple of all of them.

    Raises:
        UnsupportedModelError: naming the operator and the node that the twin does not have.
    """
    return _imported(model, ())


def _imported(model: ir.Model, layers: Sequence[Layer]) -> fx.GraphModule:
    twin = _Importer(model, layers).build()
    twin.eval()
    return twin


@final
class _Importer:
    def __init__(self, model: ir.Model, layers: Sequence[Layer]) -> None:
        self._model = model
        self._opset = model.opset_imports[""]
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._uses = {use.node: (layer.name, index) for layer in layers for index, use in enumerate(layer.uses)}

    def build(self) -> fx.GraphModule:
        for value in self._model.graph.inputs:
            if not value.is_initializer():
                self._hold(value, self._placeholder(value))
        for node in self._model.graph:
            self._add(node)
        outputs = tuple(self._lookup(value) for value in self._model.graph.outputs)
        self._graph.output(outputs[0] if len(outputs) == 1 else outputs)
        self._drop_unused_constants()
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, class_name="Twin")

    def _placeholder(self, value: ir.Value) -> fx.Node:
        if not isinstance(value.type, ir.TensorType) or value.dtype not in CARRIERS:
            raise UnsupportedModelError(
                "an input of a type that torch does not have", where=repr(value.name), got=str(value.type)
            )
        return self._graph.placeholder(_identifier(str(value.name)))

    def _add(self, node: ir.Node) -> None:
        op = Op(node, self._opset, self._lookup)
        handler = TABLE.get(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        if handler is None:
            kind = REFUSED.get(node.op_type) if not node.domain else f"of the domain {node.domain!r}"
            raise op.refuse("in the attackable twin" + (f" ({kind})" if kind else ""))
        call = handler(op)
        name = _identifier(str(node.outputs[0].name))
        if node.op_type == "DequantizeLinear" and self._is_constant(call):
            self._hold(node.outputs[0], self._dequantized(call, name))
            return
        made = self._call(call.function, call.args, call.kwargs, f"{name}_parts" if call.parts else name)
        made.meta["op"] = node.op_type
        if node.name in self._uses:
            made.meta["layer"], made.meta["use"] = self._uses[node.name]
        if not call.parts:
            self._hold(node.outputs[0], made)
            return
        for index, output in enumerate(node.outputs):
            if not op.uses_output(index):
                continue
            part = self._call(operator.getitem, (made, index), {}, _identifier(str(output.name)))
            part.meta["op"] = node.op_type
            self._hold(output, part)

    def _drop_unused_constants(self) -> None:
        """Codes that became numbers, and what handlers looked up and then took as numbers."""
        for node in list(self._graph.nodes):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
                delattr(self._root, str(node.target))

    def _is_constant(self, call: Call) -> bool:
        """Whether a call reads constants only."""
        return all(arg.op == "get_attr" for arg in call.args if isinstance(arg, fx.Node))

    def _dequantized(self, call: Call, name: str) -> fx.Node:
        """The numbers that constant codes stand for, as a constant in place of the codes."""
        args = [self._root.get_buffer(str(a.target)) if isinstance(a, fx.Node) else a for a in call.args]
        return self._buffer(name, call.function(*args, **call.kwargs))

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        return self._graph.create_node("call_function", function, args, kwargs, name=name)

    def _lookup(self, value: ir.Value) -> fx.Node:
        if value not in self._nodes:
            self._hold(value, self._constant(value))
        return self._nodes[value]

    def _hold(self, value: ir.Value, node: fx.Node) -> None:
        self._nodes[value] = node
        node.meta["value"] = str(value.name)

    def _constant(self, value: ir.Value) -> fx.Node:
        if value.const_value is None:
            raise UnsupportedModelError("the value has no producer", where=repr(value.name))
        try:
            tensor = carried(value.const_value.numpy(), value.const_value.dtype)
        except TypeError as error:
            raise UnsupportedModelError(
                "a constant of a type that torch does not have", where=repr(value.name), got=str(value.dtype)
            ) from error
        return self._buffer(_identifier(str(value.name)), tensor)

    def _buffer(self, wanted: str, tensor: Tensor) -> fx.Node:
        # modules have attributes of their own ("training", "code"), which a constant must not replace
        name = unique(wanted, lambda name: hasattr(self._root, name) or _is_reserved(name))
        self._root.register_buffer(name, tensor)
        return self._graph.create_node("get_attr", name, name=name)


def _is_reserved(name: str) -> bool:
    return hasattr(fx.GraphModule, name)


def _identifier(name: str) -> str:
    """A Python identifier close to ``name``."""
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    if keyword.iskeyword(text):
        return f"{text}_"
    return f"_{text}" if not text or text[0].isdigit() else text
